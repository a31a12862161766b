"""Pictures to begin with: signs and pages that are drawn anew each time, and photographs."""

import math
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from skimage import data

# Pheye-nano never saw these in training; a test asks nano/drawing/words.py.
WORDS = (
    "BARBER", "BIKES", "BOOKS", "BREAD", "EAST", "GATE", "HOTEL", "LIGHT", "ORANGE", "PAPER", "RIVER", "ROCKET",
    "SHOP", "TEA", "THEATRE", "TUNNEL", "WINDOW",
)  # fmt: skip
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple")
CORNERS = {"circle": 48, "square": 4, "triangle": 3}
PHOTOGRAPHS = ("coffee.png", "rocket.jpg", "astronaut.png", "chelsea.png")
SIZE = 900, 640


def sign() -> Image.Image:
    """A word on a board, and shapes of one kind beside it, on a ground of changing colours."""
    corners = [[tuple(random.choices(range(130, 256), k=3)) for _ in range(2)] for _ in range(2)]
    image = Image.new("RGB", (2, 2))
    image.putdata([*corners[0], *corners[1]])
    image = image.resize(SIZE, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    left, top = random.randint(40, 420), random.randint(40, 240)
    font = ImageFont.load_default(random.randint(52, 72))
    word = random.choice(WORDS)
    box = draw.textbbox((left, top), word, font)
    margin = font.size // 2
    draw.rectangle((box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin), (250, 250, 245))
    draw.text((left, top), word, (20, 20, 60), font)
    kind, places = random.choice(list(CORNERS)), random.sample(range(4), random.randint(1, 4))
    for place in places:
        centre, radius = (130 + 210 * place, 500), random.randint(45, 75)
        draw.polygon(outline(CORNERS[kind], centre, radius), random.choice(COLOURS))
    return image


def outline(corners: int, centre: tuple[int, int], radius: int) -> list[tuple[float, float]]:
    """Corners of a shape that stands on its side, or on its edge if there are many."""
    start = math.pi / corners if corners % 2 == 0 else 0
    angles = [start + 2 * math.pi * corner / corners for corner in range(corners)]
    return [(centre[0] + radius * math.sin(angle), centre[1] - radius * math.cos(angle)) for angle in angles]


def page() -> Image.Image:
    """Lines of words on paper."""
    image = Image.new("RGB", SIZE, (244, 240, 228))
    font, draw = ImageFont.load_default(40), ImageDraw.Draw(image)
    for line in range(5):
        draw.text((60, 60 + 110 * line), "   ".join(random.sample(WORDS, 3)), (30, 30, 35), font)
    return image


def photograph() -> Image.Image:
    """One of scikit-image's."""
    with Image.open(Path(data.__file__).parent / random.choice(PHOTOGRAPHS)) as image:
        return image.convert("RGB")
