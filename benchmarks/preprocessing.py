"""What preprocessing costs beyond the two resizes of each picture: `python -m pheye.benchmarks.preprocessing`.

Photographs of 12 megapixels, put together from those of scikit-image at their own scale, go through the image
processor as decoded pictures and as JPEG files, on one thread and on all, in turn with the resizes alone; then as
JPEGs decoded at reduced scale, with the change of the pixel values. Last, one picture of each of several sizes also
becomes the tiles of a high-resolution branch. Prints tables, and a line of JSON last.
"""

import argparse
import io
import json
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from pheye import PheyeImageProcessor
from pheye.image_opening_pheye import load_image
from pheye.image_processing_pheye import resize

from ..common.command import Parser
from ..common.machine import machine
from .measuring import now, summary

WIDTH, HEIGHT = 4000, 3000
VIEW, TILES = 224, 3
HIGH_RES_TILE = 512  # for views of 16 x 16 patches
SIZES = ((4000, 3000), (1920, 1080), (320, 240))


def photographs(count: int) -> list[Image.Image]:
    """Mosaics of photographs, as full of detail as a camera's picture."""
    from skimage import data

    parts = [Image.fromarray(part) for part in (data.astronaut(), data.coffee(), data.chelsea(), data.rocket())]
    pictures = []
    for number in range(count):
        picture, top = Image.new("RGB", (WIDTH, HEIGHT)), 0
        while top < HEIGHT:
            row = [parts[(number + top + place) % len(parts)] for place in range(9)]
            left = 0
            for part in row:
                picture.paste(part, (left, top))
                left += part.width
            top += min(part.height for part in row)
        pictures.append(picture)
    return pictures


def resizes(picture: Image.Image, sides: tuple[int, ...] = (VIEW, VIEW * TILES)):
    for side in sides:
        resize(picture, (side, side), Image.Resampling.BICUBIC)


def measure(pictures: list[Image.Image], repeats: int) -> dict:
    """Seconds for all pictures, by part and number of threads; and the change of pixels by reduced decoding."""
    files = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=92)
        files.append(buffer.getvalue())
    exact = PheyeImageProcessor(tiles_per_side=TILES, size={"height": VIEW, "width": VIEW})
    reduced = PheyeImageProcessor(tiles_per_side=TILES, size={"height": VIEW, "width": VIEW}, reduce_jpegs=True)
    all_threads, seconds = torch.get_num_threads(), defaultdict(list)
    for _ in range(repeats):
        for threads in sorted({1, all_threads}):
            torch.set_num_threads(threads)
            with ThreadPoolExecutor(threads) as pool:
                parts = {
                    "resizes alone": lambda pool=pool: list(pool.map(resizes, pictures)),
                    "decoding alone": lambda pool=pool: list(pool.map(load_image, files)),
                    "processor, pictures": lambda: exact(pictures),
                    "processor, JPEG files": lambda: exact(files),
                    "processor, JPEG files at reduced scale": lambda: reduced(files),
                }
                for name, call in parts.items():
                    start = now()
                    call()
                    seconds[f"{name}, {threads} threads"].append(now() - start)
    torch.set_num_threads(all_threads)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    ratios = {}
    for threads in sorted({1, all_threads}):
        suffix = f", {threads} threads"
        resizing, decoding = medians["resizes alone" + suffix], medians["decoding alone" + suffix]
        ratios["pictures / resizes" + suffix] = medians["processor, pictures" + suffix] / resizing
        ratios["JPEG files / (decoding + resizes)" + suffix] = medians["processor, JPEG files" + suffix] / (
            decoding + resizing
        )
    for name in ("processor, pictures", "processor, JPEG files"):
        ratios[f"{name}: 1 thread / {all_threads}"] = (
            medians[f"{name}, 1 threads"] / medians[f"{name}, {all_threads} threads"]
        )
    ratios["JPEG files / the same at reduced scale"] = (
        medians[f"processor, JPEG files, {all_threads} threads"]
        / medians[f"processor, JPEG files at reduced scale, {all_threads} threads"]
    )
    return {
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "ratios": ratios,
        "change at reduced scale": pixel_change(exact, reduced, files),
    }


def high_res_costs(photo: Image.Image, repeats: int) -> list[dict]:
    """Seconds of the processor on one picture whose tiles it makes too, beside its three resizes, by size and k."""
    rows = []
    for tiles in (2, 3):
        processor = PheyeImageProcessor(tiles_per_side=tiles, high_res_tile_size=HIGH_RES_TILE)
        for width, height in SIZES:
            picture, seconds = photo.crop((0, 0, width, height)), defaultdict(list)
            calls = {
                "resizes": lambda picture=picture, k=tiles: resizes(picture, (VIEW, VIEW * k, HIGH_RES_TILE * k)),
                "processor": lambda picture=picture, processor=processor: processor(picture),
            }
            for _ in range(repeats):
                for name, call in calls.items():
                    start = now()
                    call()
                    seconds[name].append(now() - start)
            ratios = [ours / bare for ours, bare in zip(seconds["processor"], seconds["resizes"], strict=True)]
            row = {name: summary(values) for name, values in seconds.items()}
            rows.append({"tiles": tiles, "width": width, "height": height, **row, "ratio": summary(ratios)})
    return rows


def pixel_change(exact: PheyeImageProcessor, reduced: PheyeImageProcessor, files: list[bytes]) -> dict:
    """Of pixels in steps of 1/255, with every picture at full and at reduced scale."""
    options = {"do_normalize": False, "return_tensors": "np"}
    changes = [
        np.abs(exact(file, **options)["pixel_values"] - reduced(file, **options)["pixel_values"]) * 255
        for file in files
    ]
    return {"mean": float(np.mean(changes)), "99 %": float(np.quantile(changes, 0.99)), "max": float(np.max(changes))}


def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    pictures = photographs(args.pictures)
    result = measure(pictures, args.repeats) | {"high resolution": high_res_costs(pictures[0], args.repeats)}
    print(f"{args.pictures} pictures of {WIDTH} x {HEIGHT} pixels; {machine()}\n")
    print("| seconds | median | fastest | slowest |\n| --- | --- | --- | --- |")
    for name, row in result["seconds"].items():
        print(f"| {name} | {row['median']:.3f} | {row['min']:.3f} | {row['max']:.3f} |")
    print("\n| ratio of medians | |\n| --- | --- |")
    for name, ratio in result["ratios"].items():
        print(f"| {name} | {ratio:.3f} |")
    for name, change in result["change at reduced scale"].items():
        print(f"| change of pixels at reduced scale, {name}, in 1/255 | {change:.2f} |")
    print("\n| k | picture | resizes, s | processor, s | ratio, median | least | most |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in result["high resolution"]:
        times = " | ".join(f"{row[name]['median']:.4f}" for name in ("resizes", "processor"))
        ratio = " | ".join(f"{row['ratio'][name]:.2f}" for name in ("median", "min", "max"))
        print(f"| {row['tiles']} | {row['width']} x {row['height']} | {times} | {ratio} |")
    print(json.dumps({"benchmark": "preprocessing", **vars(args), "machine": machine(), **result}))


if __name__ == "__main__":
    main()
