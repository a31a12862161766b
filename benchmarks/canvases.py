"""What images of several canvases cost in one batch, beside a batch that fills the largest; and each canvas by itself.

    python -m pheye.benchmarks.canvases [--width 384] [--layers 12] [--repeats 5]

A ViT with random weights encodes 16 images: of mixed shapes, all on the largest canvas, and the latter as a model
without canvases would. All three take turns in one process.
Seconds are those of the processor, which other work on the machine disturbs less.
"""

import argparse
import itertools
import json
import sys
from collections import defaultdict
from time import process_time

import torch
from transformers import CLIPVisionConfig

from pheye import PheyeConfig, PheyeForConditionalGeneration

from ..common.command import Parser, at_least, exit_status
from ..common.machine import machine
from .full_size import chosen_config
from .measuring import summary

CANVASES = [[1, 1], [1, 2], [2, 2], [3, 3]]
IMAGES = 16


def make_models(width: int, layers: int) -> tuple[PheyeForConditionalGeneration, PheyeForConditionalGeneration]:
    """One with canvases, and one for 3 x 3 crops with the same weights but for the views' vectors."""
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=224,
        patch_size=14,
    )
    options = {"vision_config": vision, "text_config": chosen_config("toy").text_config}
    torch.manual_seed(0)
    square = PheyeForConditionalGeneration(PheyeConfig(tiles_per_side=3, **options)).eval()
    canvases = PheyeForConditionalGeneration(PheyeConfig(canvases=CANVASES, **options)).eval()
    canvases.load_state_dict(square.state_dict(), strict=False)
    return canvases, square


def batch(grids: list[list[int]]) -> dict[str, torch.Tensor]:
    views = max(1 + rows * columns for rows, columns in grids)
    pixels = torch.randn(len(grids), views, 3, 224, 224)
    return {"pixel_values": pixels, "image_grids": torch.tensor(grids)[:, None]}


@torch.no_grad()
def measure(width: int, layers: int, repeats: int, images: int = IMAGES) -> dict:
    """Seconds per view that is there, and their ratios; seconds and numbers stored by canvas."""
    model, square = make_models(width, layers)
    mixed = list(itertools.islice(itertools.cycle(CANVASES), images))
    full = batch([CANVASES[-1]] * images)
    calls = {
        "mixed": (model, batch(mixed), sum(1 + rows * columns for rows, columns in mixed)),
        "full": (model, full, 10 * images),
        "square": (square, {"pixel_values": full["pixel_values"]}, 10 * images),
    }
    single = {f"{rows} x {columns}": batch([[rows, columns]]) for rows, columns in CANVASES}
    seconds = defaultdict(list)
    for repeat in range(repeats + 1):
        for name, (asked, inputs, views) in calls.items():
            start = process_time()
            asked.get_image_features(**inputs)
            if repeat:  # the first warms up
                seconds[name].append((process_time() - start) / views)
        for name, inputs in single.items():
            start = process_time()
            model.get_image_features(**inputs)
            if repeat:
                seconds[name].append(process_time() - start)
    ratios = {
        f"{name} / {other}": summary([a / b for a, b in zip(seconds[name], seconds[other], strict=True)])
        for name, other in (("mixed", "full"), ("full", "square"))
    }
    block = model.model.cross_attention_blocks[0]
    stored = {}
    for name, inputs in single.items():
        features = model.get_image_features(**inputs).last_hidden_state
        stored[name] = sum(part.numel() for part in block.project(features)) * len(model.model.cross_attention_blocks)
    return {
        "seconds_per_view": {name: summary(seconds[name]) for name in calls},
        "ratios": ratios,
        "seconds_per_image": {name: summary(seconds[name]) for name in single},
        "keys_and_values": stored,
    }


def run(width: int, layers: int, repeats: int, images: int = IMAGES):
    result = measure(width, layers, repeats, images)
    print(json.dumps({"benchmark": "canvases", "width": width, "layers": layers, "machine": machine(), **result}))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=at_least(64), default=384, help="of the ViT (default: %(default)s)")
    parser.add_argument("--layers", type=at_least(1), default=12, help="of the ViT (default: %(default)s)")
    parser.add_argument("--repeats", type=at_least(1), default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--images", type=at_least(1), default=IMAGES, help="in a batch (default: %(default)s)")
    return exit_status(run, **vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
