"""Let a Pheye that was trained on few crops see more of them, and give it LoRA if it has none.

    python -m pheye.training.nano.more_tiles --model nano/stage2 --output nano/base3 [--tiles-per-side 3]

Learning to read from one crop, with a vision tower left as it is, costs a tenth of learning it from nine with LoRA,
and most of what is learnt is the same.
"""

import argparse
import copy
from pathlib import Path

import torch

from pheye import PheyeConfig, PheyeForConditionalGeneration, PheyeProcessor


def more_tiles(
    model: PheyeForConditionalGeneration, tiles_per_side: int, with_lora: bool = True
) -> PheyeForConditionalGeneration:
    """`model` for `tiles_per_side` x `tiles_per_side` crops; their learned vectors start as the mean of the old ones,
    and LoRA that is new starts as nothing."""
    config, usual = copy.deepcopy(model.config), PheyeConfig()
    config.tiles_per_side = tiles_per_side
    if with_lora:
        config.global_lora_rank = config.global_lora_rank or usual.global_lora_rank
        config.local_lora_rank = config.local_lora_rank or usual.local_lora_rank
    weights = model.state_dict()
    name = "pheye.view_encoding.view_embedding.weight"
    global_view, crops = weights[name].split([1, len(weights[name]) - 1])  # (1, D), (k * k, D)
    weights[name] = torch.cat([global_view, crops.mean(0, keepdim=True).expand(tiles_per_side**2, -1)])
    larger = PheyeForConditionalGeneration(config)
    new = {name: weight for name, weight in larger.state_dict().items() if name not in weights and "_lora." in name}
    larger.load_state_dict({**weights, **new})
    return larger.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--tiles-per-side", type=int, default=3)
    arguments = parser.parse_args()
    model = PheyeForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    processor = PheyeProcessor.from_pretrained(arguments.model)
    processor.image_processor.tiles_per_side = arguments.tiles_per_side
    more_tiles(model, arguments.tiles_per_side).save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
