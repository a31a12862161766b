"""What encoding an image costs with a high-resolution branch, beside its parts alone; run by `generation --branch`."""

from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F

from pheye import PheyeConfig, PheyeForConditionalGeneration
from pheye.vision_pheye import join_tiles

from ..common.machine import memory, reset_peak_memory
from .full_size import chosen_config, random_model, with_branch
from .measuring import now, summary

VIT, BACKBONE, PRODUCTS = "ViT with LoRA alone", "backbone alone", "fusion products alone"


def multiply_as_fusion(model: PheyeForConditionalGeneration):
    """The matrix products of all fusion blocks on the views of one image, and nothing else."""
    rows = model.config.views_per_image * model.config.patches_per_side**2
    for block in model.pheye.fusion_blocks:
        for linear in (block.mlp_in, block.mlp_out):
            F.linear(linear.weight.new_ones(rows, linear.in_features), linear.weight)


def peak_of(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call takes at most, beyond those that were taken before; of a CPU, pages of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    reset_peak_memory()
    before = memory("VmRSS")
    call()
    return None if before is None else memory("VmHWM") - before


@torch.no_grad()
def branch_costs(config: PheyeConfig, convnext: str, dtype: torch.dtype, device: str, repeats: int) -> dict:
    """Seconds, peaks of memory and the ratio to the parts' sum, for `config` with a ConvNeXt of this size.

    The language model is a toy's: no image goes through it here.
    """
    text_config = chosen_config("toy").text_config.to_dict()
    model = random_model(with_branch(config, convnext, text_config=text_config), dtype, device)
    config, size, tile = model.config, model.config.vision_config.image_size, model.config.high_res_tile_size
    pixels = torch.randn(1, config.views_per_image, 3, size, size).to(model.device, dtype)
    tiles = torch.randn(1, config.tiles_per_side**2, 3, tile, tile).to(model.device, dtype)
    whole = join_tiles(tiles, config.tiles_per_side, config.tiles_per_side)
    calls = {
        "encode": lambda: model.get_image_features(pixels, tiles),
        VIT: lambda: model.pheye.vision_tower(pixels[0]),
        BACKBONE: lambda: model.pheye.high_res_tower(whole),
        PRODUCTS: lambda: multiply_as_fusion(model),
    }
    peaks = {name: peak_of(call, model.device) for name, call in calls.items()}  # and a warm-up
    seconds = defaultdict(list)
    for _ in range(repeats):
        for name, call in calls.items():
            start = now(model.device)
            call()
            seconds[name].append(now(model.device) - start)
    rounds = list(zip(*(seconds[name] for name in calls), strict=True))
    return {
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "ratios": {
            "encode / (ViT + backbone + fusion products)": summary([one[0] / sum(one[1:]) for one in rounds]),
            "encode / ViT": summary([one[0] / one[1] for one in rounds]),
        },
        "peaks": peaks,
    }


def print_costs(convnext: str, costs: dict):
    print(
        f"| ConvNeXt-{convnext} | median | fastest | slowest | peak of memory, MB |\n| --- | --- | --- | --- | --- |"
    )
    for name, row in costs["seconds"].items():
        peak = costs["peaks"][name]
        shown = "" if peak is None else f"{peak / 1e6:.0f}"
        print(f"| {name}, seconds | {row['median']:.3f} | {row['min']:.3f} | {row['max']:.3f} | {shown} |")
    for name, row in costs["ratios"].items():
        print(f"| {name} | {row['median']:.3f} | {row['min']:.3f} | {row['max']:.3f} | |")
    print(flush=True)
