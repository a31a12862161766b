"""Questions about drawn pictures with their answers, as data sets in LLaVA's format for the training command.

    python -m pheye.nano.draw_data --output FOLDER --stage describe|instruct|tasks --count 20000
        [--tiles_per_side 3]

writes FOLDER/data.jsonl and the pictures. A data set is a function of its stage, seed and number of tiles; the same
command again goes on where the last one stopped.
"""

import argparse
import io
import json
import multiprocessing
import random
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..common.command import Parser, at_least, exit_status
from ..common.files import write_atomically
from .drawing.questions import MOST_SHAPES, stage_picture
from .learning.checkpoints import claim

PICTURES_PER_CHUNK = 200  # which are written together


def write_chunk(first: int, count: int, stage: str, seed: int, tiles_per_side: int, output: Path):
    """PICTURES_PER_CHUNK of `count` pictures, from `first` on, and the rows about them; nothing if they are there."""
    rows_file = output / "chunks" / f"{first:07d}.jsonl"
    if rows_file.exists():
        return
    folder = output / "images" / f"{first:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(first, min(first + PICTURES_PER_CHUNK, count)):
        rng = random.Random(f"{stage} {seed} {index}")
        picture, turns = stage_picture(stage, rng, tiles_per_side)
        encoded = io.BytesIO()
        picture.image.save(encoded, "JPEG", quality=rng.randint(70, 95))
        path = folder / f"{index:07d}.jpg"
        path.write_bytes(encoded.getvalue())
        said = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        rows.append({"id": f"{stage}-{index}", "image": str(path.relative_to(output)), "conversations": said})
    rows_file.parent.mkdir(exist_ok=True)
    write_atomically(rows_file, [f"{json.dumps(row)}\n".encode() for row in rows])


def write_data(output: Path, stage: str, count: int, seed: int = 0, workers: int = 2, tiles_per_side: int = 3) -> Path:
    """Write a data set of `count` pictures, and give its file; `workers` processes draw.

    Raises:
        InputError: if the folder holds something else, or another data set.
    """
    claim(output, stage=stage, count=count, seed=seed, tiles_per_side=tiles_per_side)
    starts = range(0, count, PICTURES_PER_CHUNK)
    chunk = partial(write_chunk, count=count, stage=stage, seed=seed, tiles_per_side=tiles_per_side, output=output)
    with multiprocessing.Pool(workers) as pool:
        list(tqdm(pool.imap_unordered(chunk, starts), total=len(starts), desc=f"drawing for {stage}", disable=None))
    files = [output / "chunks" / f"{first:07d}.jsonl" for first in starts]
    path = output / "data.jsonl"
    write_atomically(path, (file.read_bytes() for file in files))
    print(f"{path}: {count:,} pictures")
    return path


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.draw_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--stage", choices=list(MOST_SHAPES), required=True)
    parser.add_argument("--count", type=at_least(1), required=True, help="pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=at_least(1), default=2, help="processes that draw")
    parser.add_argument(
        "--tiles_per_side", type=at_least(1), default=3, help="crops that the model will make along each side"
    )
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(write_data, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
