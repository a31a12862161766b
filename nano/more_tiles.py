"""Let a Pheye that was trained on few crops see more of them, or give it LoRA.

    python -m pheye.nano.more_tiles --model nano-runs/stage1 --output nano-runs/base2 [--tiles_per_side 3] [--lora]

Learning to read from one crop costs a quarter of learning it from nine, and most of what is learnt is the same. With
one crop both views show the same, and blocks may come to read the global one, where nothing small can be read once
there are nine. So the first crop and the global view change places when more crops come.
"""

import argparse
import sys
from pathlib import Path

import torch

from .. import PheyeForConditionalGeneration, PheyeProcessor
from ..common.command import Parser, at_least, exit_status
from .learning.crops import with_crops


def more_tiles(model: Path, output: Path, *, tiles_per_side: int, lora: bool):
    """Write the model for so many crops to `output`; the arguments are the command's options."""
    processor = PheyeProcessor.from_pretrained(model)
    processor.image_processor.tiles_per_side = tiles_per_side
    before = PheyeForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    with_crops(before, tiles_per_side, lora).save_pretrained(output)
    processor.save_pretrained(output)


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.more_tiles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--tiles_per_side", type=at_least(1), default=3)
    parser.add_argument("--lora", action="store_true", help="both sets of LoRA, if it has none")
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(more_tiles, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
