"""What an image costs in multiplications: the paper's formulas (section 2.2), and what the real modules compute.

    python -m pheye.benchmarks.complexity [--variant x4-672 | --model FOLDER_OR_ID] [--text_tokens 65] [--branch L]
        [--budget LAYER ... [--joint]]

Prints a table for the formulas, a table of counted floating-point operations (two to a multiplication) part by part,
beside those of a LLaVA-style model, which has the same language model read as many visual tokens in its text; at the
end, one line of JSON. Nothing is computed: the modules run on torch's meta device, so no weights are needed.
`--branch` gives the model a ConvNeXt of that size as high-resolution branch. What a branch adds is counted, and for a
ConvNeXt stands beside its formula. `--budget` gives it self-attention blocks before these layers, with `--joint` makes
these layers joint ones. Where a model has some, every budget is counted, beside plain Pheye, the LLaVA-style model and
that with half of the visual tokens.
"""

import argparse
import json
import math
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from pheye import PheyeConfig, PheyeForConditionalGeneration

from ..common.command import Parser
from .designs import DENSE, HALF, PLAIN, Reading, budget_name, readings
from .full_size import CONVNEXT_SIZES, with_branch, with_budgets, without_budgets

PAPER_SIZES = {
    "text_tokens": 65,
    "image_tokens": 2305,
    "text_size": 2048,
    "vision_size": 1280,
    "views": 10,
    "per_view": 257,
}


def layer_cost(tokens: int, size: int) -> int:
    """Multiplications of a transformer layer as the paper counts them, with one of the two attention products."""
    return 12 * tokens * size**2 + tokens**2 * size


def llava_cost(text_tokens: int, image_tokens: int, text_size: int) -> int:
    """Per layer of a language model that reads visual tokens in its text."""
    return layer_cost(text_tokens + image_tokens, text_size)


def pheye_cost(text_tokens: int, image_tokens: int, text_size: int, vision_size: int, interval: int) -> float:
    """Per layer of a language model with a cross-attention block before every `interval`-th."""
    block = 10 * text_tokens * text_size**2 + 2 * image_tokens * text_size * vision_size
    block += text_tokens * image_tokens * text_size
    return layer_cost(text_tokens, text_size) + block / interval


def paper_ratios() -> dict[str, float]:
    """The figures of section 2.2."""
    text, image, size, vision = (
        PAPER_SIZES[name] for name in ("text_tokens", "image_tokens", "text_size", "vision_size")
    )
    llava = llava_cost(text, image, size)
    return {
        "LLaVA-style over Pheye, interval 2": llava / pheye_cost(text, image, size, vision, 2),
        "LLaVA-style over Pheye, interval 4": llava / pheye_cost(text, image, size, vision, 4),
        "ViT, one pass over the whole image, over 10 views": layer_cost(image, vision)
        / (PAPER_SIZES["views"] * layer_cost(PAPER_SIZES["per_view"], vision)),
    }


def vision_tower_flops(config: PheyeConfig) -> int:
    """Of a CLIP's ViT without LoRA on all views of an image, two operations to a multiplication."""
    vision, tokens, patches = config.vision_config, config.tokens_per_view, config.patches_per_side**2
    size, mlp = vision.hidden_size, vision.intermediate_size
    layer = tokens * (4 * size**2 + 2 * size * mlp) + 2 * tokens**2 * size
    view = vision.num_hidden_layers * layer + patches * 3 * vision.patch_size**2 * size
    return 2 * config.views_per_image * view


def fusion_flops(config: PheyeConfig, channels: list[int]) -> int:
    """Of the fusion blocks on all views of an image, for maps of `channels`."""
    size, patches = config.vision_config.hidden_size, config.patches_per_side**2
    return 2 * config.views_per_image * patches * sum((size + width) * size + size**2 for width in channels)


def convnext_flops(config: PheyeConfig) -> int:
    """Of a branch that is a ConvNeXt on a whole image."""
    branch, side = config.high_res_vision_config, config.tiles_per_side * config.high_res_tile_size
    multiplications, into, kernel = 0, branch.num_channels, branch.patch_size
    for width, depth in zip(branch.hidden_sizes, branch.depths, strict=True):
        side //= kernel
        layer = 7 * 7 * width + 2 * width * 4 * width
        multiplications += side**2 * (kernel**2 * into * width + depth * layer)
        into, kernel = width, 2
    return 2 * multiplications


def language_model_flops(tokens: int, size: int, layers: int) -> int:
    """Of a language model without its head, whose MLPs are four times as wide."""
    return layers * (24 * tokens * size**2 + 4 * tokens**2 * size)


def self_attention_flops(image_tokens: int, size: int) -> int:
    """Of a self-attention block on an image."""
    return 24 * image_tokens * size**2 + 4 * image_tokens**2 * size


def joint_attention_flops(image_tokens: int, text_tokens: int, vision_size: int, text_size: int) -> int:
    """What a joint layer adds to the layer that it is: the image alone, and the text again with it."""
    layers = language_model_flops(image_tokens, text_size, 1) + language_model_flops(text_tokens, text_size, 1)
    return layers + 4 * text_tokens * image_tokens * text_size + 4 * image_tokens * vision_size * text_size


def budget_formulas(config: PheyeConfig, text_tokens: int) -> dict[str, int]:
    """Operations of a prompt about an encoded image, by formula, for the designs of `counted_budgets`."""
    size, layers = config.text_config.hidden_size, config.text_config.num_hidden_layers
    tokens, width = config.tokens_per_image, config.vision_config.hidden_size
    block = 20 * text_tokens * size**2 + 4 * tokens * width * size + 4 * text_tokens * tokens * size
    plain = language_model_flops(text_tokens, size, layers) + len(config.cross_attention_layers) * block
    refinement = self_attention_flops(tokens, width)
    if config.self_attention_kind == "joint":
        refinement = joint_attention_flops(tokens, text_tokens, width, size)
    return {
        PLAIN: plain,
        **{
            budget_name(config, budget): plain + len(active) * refinement
            for budget, active in enumerate(config.self_attention_budgets)
        },
        DENSE: language_model_flops(text_tokens + tokens, size, layers),
        HALF: language_model_flops(text_tokens + (tokens + 1) // 2, size, layers),
    }


def count(call: Callable[[], object]) -> int:
    """Floating-point operations of a call on the meta device."""
    # torch counts batched products that make a new tensor, not those that add to one.
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, **kwargs: 2 * math.prod(a) * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def counted_parts(config: PheyeConfig, text_tokens: int) -> dict[str, int]:
    """Floating-point operations of a prompt about one image, part by part."""
    with torch.device("meta"):
        model = PheyeForConditionalGeneration(config).eval()
        size, vision = config.vision_config.image_size, config.vision_config.hidden_size
        views = torch.empty(config.views_per_image, 3, size, size)
        image = torch.empty(1, config.tokens_per_image, vision)
        text = torch.zeros(1, text_tokens, dtype=torch.long)
        prefix = torch.empty(1, text_tokens + config.tokens_per_image, config.text_config.hidden_size)
    blocks, lora = model.model.cross_attention_blocks, count_lora(model, views)
    tower = count(lambda: model.model.vision_tower(views)) - lora
    text_only = count(lambda: model(text, logits_to_keep=1))
    conditioned = count(lambda: model(text, image_hidden_states=image, logits_to_keep=1))  # at the largest budget
    projections = count(lambda: [block.project(image) for block in blocks])
    refined = counted_refinement(config, text, image, conditioned)
    return {
        "vision tower": tower,
        "LoRA in the vision tower": lora,
        "keys and values of all blocks": projections,
        "rest of the blocks": conditioned - text_only - projections - sum(refined.values()),
        **refined,
        "language model": text_only,
        "LLaVA-style: language model": count(
            lambda: model.model.language_model(inputs_embeds=prefix, logits_to_keep=1)
        ),
        **counted_branch(model, views),
    }


def counted_refinement(
    config: PheyeConfig, text: torch.Tensor, image: torch.Tensor, conditioned: int
) -> dict[str, int]:
    """What the largest budget adds to reading an image, if there are budgets; with it, `conditioned` was counted."""
    if not config.self_attention_layers:
        return {}
    with torch.device("meta"):
        plain = PheyeForConditionalGeneration(without_budgets(config)).eval()
    without = count(lambda: plain(text, image_hidden_states=image, logits_to_keep=1))
    return {"self-attention at the largest budget": conditioned - without}


def counted_budgets(config: PheyeConfig, text_tokens: int) -> dict[str, dict[str, int]]:
    """Operations of a prompt about an image for plain Pheye, every budget, and two LLaVA-style models: to encode the
    image, to read it with the prompt (`prefill`), and of a further token (`step`)."""
    with torch.device("meta"):
        model = PheyeForConditionalGeneration(config).eval()
        size, tile = config.vision_config.image_size, config.high_res_tile_size
        pixels = {"pixel_values": torch.empty(1, config.views_per_image, 3, size, size)}
        if tile is not None:
            pixels["high_res_pixel_values"] = torch.empty(1, config.tiles_per_side**2, 3, tile, tile)
        text = torch.zeros(1, text_tokens, dtype=torch.long)
    return {name: _counted_reading(design, pixels, text) for name, design in readings(model).items()}


def _counted_reading(design: Reading, pixels: dict[str, torch.Tensor], text: torch.Tensor) -> dict[str, int]:
    results = []  # of the calls, which are made as they are counted
    return {
        "encode": count(lambda: results.append(design.encode(**pixels))),
        "prefill": count(lambda: results.append(design.prefill(text, results[0]))),
        "step": count(lambda: design.step(text[:, :1], results[1])),
    }


def print_budgets(config: PheyeConfig, counted: dict[str, dict[str, int]], text_tokens: int):
    formulas, dense = budget_formulas(config, text_tokens), counted[DENSE]["prefill"]
    print("\n| GFLOP counted | prefill | by formula | of LLaVA-style | with encoding | further token |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, parts in counted.items():
        values = (parts["prefill"], formulas[name], parts["encode"] + parts["prefill"], parts["step"])
        prefill, formula, whole, step = (f"{value / 1e9:,.4g}" for value in values)
        print(f"| {name} | {prefill} | {formula} | 1/{dense / parts['prefill']:.3g} | {whole} | {step} |")


def counted_branch(model: PheyeForConditionalGeneration, views: torch.Tensor) -> dict[str, int]:
    """What a high-resolution branch adds to encoding an image, if the model has one."""
    config = model.config
    if config.high_res_vision_config is None:
        return {}
    size = config.high_res_tile_size
    tiles = torch.empty(1, config.tiles_per_side**2, 3, size, size, device="meta")
    backbone = count(lambda: model.model.encode_high_res(tiles))
    plain = count(lambda: model.model.vision_tower(views))
    return {
        "high-resolution backbone": backbone,
        "fusion blocks": count(lambda: model.get_image_features(views[None], tiles)) - plain - backbone,
    }


def branch_formulas(config: PheyeConfig) -> dict[str, int]:
    """The formulas for parts of `counted_parts`, where the branch is a ConvNeXt beside a CLIP."""
    branch = config.high_res_vision_config
    if branch is None or (branch.model_type, config.vision_config.model_type) != ("convnext", "clip_vision_model"):
        return {}
    return {
        "vision tower": vision_tower_flops(config),
        "high-resolution backbone": convnext_flops(config),
        "fusion blocks": fusion_flops(config, branch.hidden_sizes[-len(config.high_res_fusion_layers) :]),
    }


def count_lora(model: PheyeForConditionalGeneration, views: torch.Tensor) -> int:
    """What the LoRA sets add: the tower with them, less the tower of a model that has none."""
    bare = model.config.to_dict() | {"global_lora_rank": 0, "local_lora_rank": 0}
    with torch.device("meta"):
        bare = PheyeForConditionalGeneration(PheyeConfig.from_dict(bare)).eval()
    both = [count(lambda tower=other.model.vision_tower: tower(views)) for other in (model, bare)]
    return both[0] - both[1]


def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--variant", default="x4-672")
    what.add_argument("--model", help="folder or Hub id of any Pheye, in place of a published variant")
    parser.add_argument("--branch", choices=CONVNEXT_SIZES, help="size of a ConvNeXt as high-resolution branch")
    parser.add_argument(
        "--budget", nargs="+", type=int, metavar="LAYER", help="self-attention blocks before these layers, ascending"
    )
    parser.add_argument("--joint", action="store_true", help="let --budget name joint layers of the language model")
    parser.add_argument("--text_tokens", type=int, default=PAPER_SIZES["text_tokens"])
    arguments = parser.parse_args(argv)
    if arguments.joint and not arguments.budget:
        parser.error("--joint needs --budget")
    if arguments.model:
        config = PheyeConfig.from_pretrained(arguments.model)
    else:
        config = PheyeConfig.from_variant(arguments.variant)
    if arguments.branch:
        config = with_branch(config, arguments.branch)
    if arguments.budget:
        config = with_budgets(config, arguments.budget, "joint" if arguments.joint else "block")

    ratios = paper_ratios()
    print("| by the paper's formulas | ratio |\n| --- | --- |")
    for name, ratio in ratios.items():
        print(f"| {name} | {ratio:.4g} |")
    parts = counted_parts(config, arguments.text_tokens)
    tokens = f"{arguments.text_tokens} text and {config.tokens_per_image} image tokens"
    print(f"\n| counted, {tokens} | GFLOP |\n| --- | --- |")
    for name, flops in parts.items():
        print(f"| {name} | {flops / 1e9:,.4g} |")
    formulas = branch_formulas(config)
    if formulas:
        print("\n| high-resolution branch | GFLOP counted | by formula |\n| --- | --- | --- |")
    for name, flops in formulas.items():
        print(f"| {name} | {parts[name] / 1e9:,.4g} | {flops / 1e9:,.4g} |")
    after_vision = sum(
        parts[name] for name in ("keys and values of all blocks", "rest of the blocks", "language model")
    )
    ratio = parts["LLaVA-style: language model"] / after_vision
    print(f"\nLLaVA-style over Pheye after the vision tower, counted: {ratio:.4g}")
    result = {"benchmark": "complexity", "paper": ratios, "counted_flops": parts, "counted_ratio": ratio}
    if config.self_attention_layers:
        result["budgets"] = counted_budgets(config, arguments.text_tokens)
        print_budgets(config, result["budgets"], arguments.text_tokens)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
