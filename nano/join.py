"""A Pheye of the eyes that `nano.eyes` trained, and of what another Pheye-nano has learnt behind its own.

    python -m pheye.nano.join --model checkpoints/pheye-nano --eyes nano-runs/eyes/eyes.safetensors \
        --output nano-runs/base

The language model, its blocks and the encoding of the views are those of `--model`. Layers that had no block get one
that adds nearly nothing at first, as all blocks of a new Pheye do.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .. import PheyeConfig, PheyeForConditionalGeneration, PheyeProcessor
from ..common.command import InputError, Parser, exit_status
from .learning.configs import BRANCHES, BRANCHES_HELP, EYES, nano_config

BLOCKS = "pheye.cross_attention_blocks"


def joined(
    model: PheyeForConditionalGeneration, eyes: dict[str, torch.Tensor], config: PheyeConfig
) -> PheyeForConditionalGeneration:
    """A model of `config` with `eyes`, weights by their names in a Pheye, and all else that fits of `model`.

    Raises:
        InputError: if something of `model` does not fit, or the eyes lack a weight.
    """
    torch.manual_seed(0)
    new = PheyeForConditionalGeneration(config)
    weights = {name: weight for name, weight in model.state_dict().items() if name.split(".")[1] not in EYES}
    weights = with_blocks_moved(weights, model.config.cross_attention_layers, config.cross_attention_layers) | eyes
    expected = new.state_dict()
    for name, weight in weights.items():
        if name not in expected or expected[name].shape != weight.shape:
            raise InputError(f"{name} {tuple(weight.shape)} has no place in the new model; give a Pheye-nano.")
    lacking = [name for name in expected if name.split(".")[1] in EYES and name not in eyes]
    if lacking:
        raise InputError(f"The eyes lack {lacking[0]}; give the eyes.safetensors of nano.eyes.")
    new.load_state_dict({**expected, **{name: weight.float() for name, weight in weights.items()}})
    return new.eval()


def with_blocks_moved(
    weights: dict[str, torch.Tensor], before: tuple[int, ...], after: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """`weights`, of blocks at the layers `before`, by their names in a model with blocks at the layers `after`."""
    moved = {}
    for name, weight in weights.items():
        if name.startswith(f"{BLOCKS}."):
            number, rest = name.removeprefix(f"{BLOCKS}.").split(".", 1)
            name = f"{BLOCKS}.{after.index(before[int(number)])}.{rest}"
        moved[name] = weight
    return moved


def join(model: Path, eyes: Path, output: Path, branch: str):
    """Write the model and its processor to `output`; the arguments are the command's options."""
    behind = PheyeForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    new = joined(behind, load_file(eyes), nano_config(branch))
    processor = PheyeProcessor.from_pretrained(model)
    images = processor.image_processor
    images.high_res_tile_size = new.config.high_res_tile_size  # None without a branch
    images.high_res_image_mean, images.high_res_image_std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    new.save_pretrained(output)
    processor.save_pretrained(output)


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.join", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="a Pheye-nano")
    parser.add_argument("--eyes", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--branch", choices=BRANCHES, default="whole", help=BRANCHES_HELP)
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(join, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
