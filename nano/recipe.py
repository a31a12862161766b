"""A sitting of so many minutes at a Pheye-nano with the branch: better eyes, and blocks that read with them.

    python -m pheye.nano.recipe --output FOLDER --minutes 13 [--model checkpoints/pheye-nano] [--workers 16]

runs the commands of README.md one after the other: vision tower, LoRA, branch and fusion blocks learn (`nano.eyes`),
then LoRA of the global view alone (`nano.global_view`). They stand before what the model has learnt (`nano.join`), and
its blocks learn (`nano.replay`) from pictures that were drawn meanwhile (`nano.draw_data`). FOLDER/model is the new
model. The same command again goes on from there. FOLDER/packed has what it needs for that in a few files of 15 MB at
most, for a machine that gives little back: `cat packed/run.tar.* | tar --extract` in a new folder makes it FOLDER.
"""

import argparse
import io
import json
import shutil
import sys
import tarfile
import time
from pathlib import Path

from ..common.command import InputError, Parser, at_least, default_device, exit_status
from ..common.files import RUN_FILE, write_atomically
from ..common.json_lines import read_rows
from .learning.checkpoints import LOG, claim, log
from .learning.commands import begin, finish

EYES_SHARE, GLOBAL_VIEW_SHARE = 0.5, 0.15  # of the minutes
STAGES = {"instruct": 2 / 3, "tasks": 1 / 3}  # shares of the pictures
PIECE_BYTES = 15_000_000
PACKED = ("eyes", "model", LOG, RUN_FILE)  # what the command goes on from


def pack(output: Path):
    """Write what the command goes on from to `output`/packed, in pieces of a tar archive."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for name in PACKED:
            if (output / name).exists():
                archive.add(output / name, name)
    content, folder = whole.getvalue(), output / "packed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, first in enumerate(range(0, len(content), PIECE_BYTES)):
        write_atomically(folder / f"run.tar.{number}", [content[first : first + PIECE_BYTES]])


def sit(output: Path, minutes: float, model: Path, pictures: int, workers: int, together: int, device: str):
    """One sitting; the arguments are the command's options.

    Raises:
        InputError: if `model` is no Pheye, the folder holds something else, or a command failed.
    """
    began = time.time()
    start = model / "model.safetensors"
    if not start.is_file():
        raise InputError(f"{model} holds no model.safetensors; give the folder of a Pheye-nano.")
    claim(output, model=model, pictures=pictures, together=together)
    sitting = len(read_rows(output / LOG)) if (output / LOG).exists() else 0
    eyes, counting, drawn, base, read, new = (
        output / name for name in ("eyes", "global_view", "pictures", "base", "read", "model")
    )
    for folder in (counting, drawn, base, read):  # of an earlier sitting: its features are not what better eyes give
        shutil.rmtree(folder, ignore_errors=True)
    drawing = [
        begin(
            "draw_data",
            output=drawn / stage,
            stage=stage,
            count=round(share * pictures),
            seed=sitting,
            workers=workers,
        )
        for stage, share in STAGES.items()
    ]
    settings = {"workers": workers, "device": device}
    finish(begin("eyes", output=eyes, start=start, minutes=EYES_SHARE * minutes, together=together, **settings))
    pack(output)
    options = {"start": eyes / "eyes.safetensors", "minutes": GLOBAL_VIEW_SHARE * minutes}
    finish(begin("global_view", output=counting, **options, **settings))
    finish(begin("join", model=new if sitting else model, eyes=counting / "eyes.safetensors", output=base))
    for process in drawing:
        finish(process)
    sources = {stage: {"path": f"{stage}/data.jsonl", "turns": None} for stage in STAGES}
    write_atomically(drawn / "mixture.json", [json.dumps({"sources": sources}).encode()])
    left = max(0.1, minutes - (time.time() - began) / 60)
    settings = {
        "data": drawn / "mixture.json",
        "minutes": left,
        "seed": sitting,
        "device": device,
    }
    finish(begin("replay", model=base, output=read, **settings))
    finish(begin("ship", runs=read, output=new))
    log(output, {"sitting": sitting + 1, "minutes": round((time.time() - began) / 60, 1)})
    pack(output)


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, required=True, help="of this sitting")
    parser.add_argument("--model", type=Path, default=Path("checkpoints/pheye-nano"), metavar="FOLDER")
    parser.add_argument("--pictures", type=at_least(3), default=4800, help="for the blocks (default: %(default)s)")
    parser.add_argument("--workers", type=at_least(1), default=1, help="processes that draw; on a GPU, all cores")
    parser.add_argument("--together", type=at_least(1), default=1, help="pictures of a step of the eyes")
    parser.add_argument("--device", default=default_device(), help="(default: %(default)s)")
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(sit, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
