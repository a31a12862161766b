"""Let a Pheye that was trained on few crops see more of them, or give it LoRA.

    python -m pheye.nano.more_tiles --model nano/stage1 --output nano/base2 [--tiles-per-side 3] [--lora]

Learning to read from one crop costs a quarter of learning it from nine, and most of what is learnt is the same. With
one crop both views show the same, and blocks may come to read the global one, where nothing small can be read once
there are nine. So the first crop and the global view change places when more crops come.
"""

import argparse
from pathlib import Path

import torch

from .. import PheyeForConditionalGeneration, PheyeProcessor
from .crops import more_tiles


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--tiles-per-side", type=int, default=3)
    parser.add_argument("--lora", action="store_true", help="both sets of LoRA, if it has none")
    arguments = parser.parse_args()
    model = PheyeForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    processor = PheyeProcessor.from_pretrained(arguments.model)
    processor.image_processor.tiles_per_side = arguments.tiles_per_side
    more_tiles(model, arguments.tiles_per_side, arguments.lora).save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
