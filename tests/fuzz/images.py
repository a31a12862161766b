"""Searches for bytes that the image processor answers with anything but pixels or a ValueError that names the image.

    python tests/fuzz/images.py FOLDER -max_total_time=SECONDS

Coverage of Pillow's Python code guides the search (atheris, which is libFuzzer). FOLDER gets what it builds on. What
it finds is printed with a traceback, written beside FOLDER, and ends it; so do 10 seconds or 1500 MB for one image.
"""

import io
import sys
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["PIL"]):
    from PIL import Image

    Image.init()

import torch

from pheye import PheyeImageProcessor, image_opening_pheye

sys.path.insert(0, str(Path(__file__).parent.parent))
from image_files import seeds

PIXELS = 2**18  # so that no image that is accepted takes long
PROCESSOR = PheyeImageProcessor(tiles_per_side=2, size={"height": 16, "width": 16})


def read(image, name: str):
    try:
        pixels = PROCESSOR(image, return_tensors="pt")["pixel_values"]
    except ValueError as error:
        assert type(error) is ValueError and name in str(error), error
    else:
        assert pixels.shape == (1, 5, 3, 16, 16) and pixels.isfinite().all()


def one(data: bytes):
    read(data, "the given bytes")
    try:
        image = Image.open(io.BytesIO(data))
    except Exception:  # the caller's own affair
        return
    read(image, "The image")


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = image_opening_pheye.MOST_PIXELS = PIXELS
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds().values()):
        (folder / f"seed-{number}").write_bytes(data)
    limits = ["-max_len=6000", "-timeout=10", "-rss_limit_mb=1500", f"-artifact_prefix={folder}-"]
    atheris.Setup([*sys.argv, *limits], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
