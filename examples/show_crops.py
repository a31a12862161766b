"""Draw what a model with canvases sees of images: the global view of each, and beside it the crops where they lie.

    python examples/show_crops.py photo.jpg page.png --canvases wide --output crops.png

Without images, a page of text, a panorama and a receipt are drawn first.
"""

import argparse
import random
import sys

from PIL import Image, ImageDraw

from pheye import PheyeImageProcessor
from pheye.common.command import Parser, exit_status
from pheye.image_opening_pheye import load_image
from pheye.training.inspection import draw_views

GAP = 12


def draw_text(width: int, height: int, seed: int) -> Image.Image:
    """Lines of words, black on white."""
    image, chance = Image.new("RGB", (width, height), "white"), random.Random(seed)
    draw = ImageDraw.Draw(image)
    for top in range(30, height - 40, 34):
        words = " ".join(
            "".join(chance.choices("abcdefghiklmnoprstu", k=chance.randint(2, 8))) for _ in range(width // 95)
        )
        draw.text((25, top), words, "black", font_size=22)
    return image


def draw_panorama(width: int, height: int) -> Image.Image:
    """A row of houses under a sky."""
    image, chance = Image.new("RGB", (width, height), (150, 200, 240)), random.Random(0)
    draw, left = ImageDraw.Draw(image), 0
    while left < width:
        right, top = left + chance.randint(50, 110), chance.randint(height // 4, height // 2)
        colour = tuple(chance.randint(90, 220) for _ in range(3))
        draw.rectangle((left, top, right, height), colour)
        for x in range(left + 10, right - 14, 22):
            for y in range(top + 14, height - 20, 30):
                draw.rectangle((x, y, x + 10, y + 14), (250, 240, 170))
        left = right
    return image


def show_crops(images: list[str], canvases: str, output: str):
    """Write the picture; the arguments are the command's options."""
    drawn = [draw_text(700, 980, 0), draw_panorama(1500, 300), draw_text(300, 1200, 1)]
    opened = [load_image(image) for image in images] or drawn
    processor = PheyeImageProcessor(canvases=canvases, size={"height": 112, "width": 112})
    pictures = []
    for image in opened:
        inputs = processor(image, return_tensors="pt")
        pictures.append(draw_views(inputs["pixel_values"][0], processor, inputs["image_grids"][0, 0].tolist()))
    width = max(picture.width for picture in pictures)
    whole = Image.new("RGB", (width, sum(picture.height + GAP for picture in pictures) - GAP), "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height + GAP
    whole.save(output)
    print(f"Wrote {output}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE")
    parser.add_argument("--canvases", default="wide", help="fila or wide (default: %(default)s)")
    parser.add_argument("--output", default="crops.png", help="(default: %(default)s)")
    return exit_status(show_crops, **vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
