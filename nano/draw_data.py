"""Questions about drawn pictures with their answers, as data sets in LLaVA's format for the training command.

    python -m pheye.nano.draw_data --output FOLDER --stage describe|instruct|tasks --count 20000
        [--tiles-per-side 3]

writes FOLDER/data.jsonl and the pictures. A data set is a function of its stage, seed and number of tiles; the same
command again goes on where the last one stopped.
"""

import argparse
import io
import json
import multiprocessing
import random
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..common.files import write_atomically
from .checkpoints import claim
from .questions import sample

CHUNK = 200  # pictures that are written together


def write_chunk(first: int, count: int, stage: str, seed: int, tiles_per_side: int, output: Path):
    """Up to CHUNK of `count` pictures, from `first` on, and the rows about them; none if they are there."""
    rows_file = output / "chunks" / f"{first:07d}.jsonl"
    if rows_file.exists():
        return
    folder = output / "images" / f"{first:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(first, min(first + CHUNK, count)):
        rng = random.Random(f"{stage} {seed} {index}")
        picture, turns = sample(stage, rng, tiles_per_side)
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
    """The file of a data set of `count` pictures, drawn by `workers` processes.

    Raises:
        ValueError: if the folder holds something else, or another data set.
    """
    claim(output, stage=stage, count=count, seed=seed, tiles_per_side=tiles_per_side)
    starts = range(0, count, CHUNK)
    chunk = partial(write_chunk, count=count, stage=stage, seed=seed, tiles_per_side=tiles_per_side, output=output)
    with multiprocessing.Pool(workers) as pool:
        list(tqdm(pool.imap_unordered(chunk, starts), total=len(starts), desc=f"drawing for {stage}", disable=None))
    files = [output / "chunks" / f"{first:07d}.jsonl" for first in starts]
    write_atomically(output / "data.jsonl", (file.read_bytes() for file in files))
    return output / "data.jsonl"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stage", choices=["describe", "instruct", "tasks"], required=True)
    parser.add_argument("--count", type=int, required=True, help="pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that draw")
    parser.add_argument("--tiles-per-side", type=int, default=3, help="crops that the model will make along each side")
    arguments = parser.parse_args()
    path = write_data(**vars(arguments))
    print(f"{path}: {arguments.count:,} pictures")


if __name__ == "__main__":
    main()
