"""The benchmark of section 2.2: the paper's figures, and counts that a hand can check."""

import json
from pathlib import Path

import pytest
import torch
from test_high_res import hybrid_config
from transformers import AutoBackbone, AutoModel

from pheye import PheyeConfig, PheyeForConditionalGeneration
from pheye.benchmarks import complexity
from pheye.benchmarks.designs import DENSE, HALF, PLAIN
from pheye.benchmarks.full_size import with_branch, with_budgets
from pheye.vision_pheye import PheyeFusionBlock

from tiny import tiny_config

pytestmark = pytest.mark.once


def test_the_papers_figures():
    ratios = list(complexity.paper_ratios().values())
    assert ratios == pytest.approx([12.07, 18.53, 1.0145], rel=5e-4)


def test_counts_are_those_of_the_matrix_products():
    config = tiny_config()
    parts = complexity.counted_parts(config, text_tokens=7)
    image, text, vision, blocks = 25, 128, 32, 2  # tokens of an image, both widths, number of blocks
    assert parts["keys and values of all blocks"] == 2 * blocks * 2 * image * vision * text
    attention = 2 * 7 * text * text * 2 + 2 * 7 * image * text * 2  # queries and output; two products with the image
    mlp = 2 * 7 * text * 4 * text * 2
    assert parts["rest of the blocks"] == blocks * (attention + mlp)
    rows, patches = 5 * 5, 5 * 4  # of five views
    projections, mlp_in, mlp_out = 4 * [(32, 32)], (32, 48), (48, 32)
    linears = 2 * [*projections, mlp_in, mlp_out]
    rank_sum = 1 * 2 + 4 * 4  # over views, for A; B's product has room for both ranks in every row
    lora = sum(2 * 5 * rank_sum * into + 2 * rows * (2 + 4) * out for into, out in linears)
    lora += 2 * 4 * rank_sum * 3 * 16 * 16 + 2 * patches * (2 + 4) * 32
    assert parts["LoRA in the vision tower"] == lora


def test_command_prints_one_line_of_json_last(capsys, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    complexity.main(["--model", str(tmp_path), "--text_tokens", "7"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["counted_flops"] == complexity.counted_parts(tiny_config(), 7)


# --- The high-resolution branch ---

GFLOPS = {  # of the design, for an image at k = 2 and 3
    "vision tower": (1671, 3342),
    "fusion blocks": (43, 86),
    "T": (186, 419),
    "B": (642, 1444),
    "L": (1436, 3231),
}


@pytest.mark.parametrize("tiles_per_side", [1, 2, 3])
def test_the_formulas_of_a_branch_are_what_its_model_computes(tiles_per_side):
    config = hybrid_config(tiles_per_side=tiles_per_side)
    formulas = complexity.branch_formulas(config)
    counted = complexity.counted_parts(config, text_tokens=7)
    assert formulas == {name: counted[name] for name in formulas} and len(formulas) == 3
    plain = complexity.counted_parts(tiny_config(vision_config=config.vision_config, tiles_per_side=tiles_per_side), 7)
    assert plain == {name: counted[name] for name in plain} and len(counted) == len(plain) + 2


def test_other_backbones_are_counted_without_a_formula():
    assert complexity.branch_formulas(hybrid_config("swin")) == complexity.branch_formulas(tiny_config()) == {}
    assert complexity.counted_parts(hybrid_config("swin"), 7)["high-resolution backbone"] > 0


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("size", ["T", "B", "L"])
def test_a_convnext_costs_what_the_design_says(size, place):
    config = with_branch(PheyeConfig(), size, tiles_per_side=2 + place)
    with torch.device("meta"):
        backbone = AutoBackbone.from_config(config.high_res_vision_config)
        image = torch.empty(1, 3, *2 * [config.tiles_per_side * config.high_res_tile_size])
    counted = complexity.count(lambda: backbone(image))
    assert counted == pytest.approx(complexity.convnext_flops(config), rel=0.01)
    assert counted == pytest.approx(1e9 * GFLOPS[size][place], rel=0.01)


@pytest.mark.parametrize("place", [0, 1])
def test_vision_tower_and_fusion_blocks_cost_what_the_design_says(place):
    config = with_branch(PheyeConfig(), "L", tiles_per_side=2 + place)
    channels, views = config.high_res_vision_config.hidden_sizes, config.views_per_image
    with torch.device("meta"):
        tower = AutoModel.from_config(config.vision_config)
        blocks = [PheyeFusionBlock(1280, width) for width in channels]
        pixels, states = torch.empty(views, 3, 224, 224), torch.empty(views, 257, 1280)
        maps = [torch.empty(views, 256, width) for width in channels]
    formulas = complexity.branch_formulas(config)
    fusion = complexity.count(lambda: [block(states, one) for block, one in zip(blocks, maps, strict=True)])
    for name, counted in (("vision tower", complexity.count(lambda: tower(pixels))), ("fusion blocks", fusion)):
        assert counted == pytest.approx(formulas[name], rel=0.01)
        assert counted == pytest.approx(1e9 * GFLOPS[name][place], rel=0.01)
    millions = [sum(part.numel() for part in block.parameters()) / 1e6 for block in blocks]
    assert millions == pytest.approx([3.53, 3.77, 4.27, 5.25], abs=0.005)
    assert sum(millions) == pytest.approx(16.8, abs=0.05)


def test_command_gives_a_branch_to_a_model_and_prints_its_formulas(capsys, monkeypatch):
    config = hybrid_config()
    monkeypatch.setattr(complexity, "with_branch", lambda plain, size: config if size == "T" else None)
    complexity.main(["--branch", "T", "--text_tokens", "7"])
    output = capsys.readouterr().out
    assert "| high-resolution branch | GFLOP counted | by formula |" in output
    assert json.loads(output.splitlines()[-1])["counted_flops"] == complexity.counted_parts(config, 7)


# --- Budgets ---

X2, X4, TEXT_TOKENS = [3, 5, 9, 11, 15, 17, 21, 23], [7, 11, 15, 19, 23], 64
BUDGET_GFLOPS = {  # of the specification, section 10: LLaVA-style, then by number of blocks
    "x2-448": (X2, 3617, {0: 390, 1: 449, 2: 508, 4: 626, 8: 862}),
    "x4-448": (X4, 3617, {0: 273, 1: 332, 2: 391, 4: 509, 5: 568}),
    "x2-672": (X2, 7728, {0: 559, 1: 694, 2: 829, 4: 1098, 8: 1638}),
    "x4-672": (X4, 7728, {0: 357, 1: 492, 2: 627, 4: 896, 5: 1031}),
}


COUNTS = complexity.counted_budgets, complexity.budget_formulas


def shallow(config: PheyeConfig) -> PheyeConfig:
    """With one layer in the vision tower: what is counted here comes behind it."""
    vision_config = config.vision_config.to_dict() | {"num_hidden_layers": 1}
    return PheyeConfig.from_dict(config.to_dict() | {"vision_config": vision_config})


def nano_sizes() -> PheyeConfig:
    """Pheye-nano without its branch, with blocks before every second layer."""
    nano = PheyeConfig.from_pretrained(Path(__file__).parent.parent / "checkpoints" / "pheye-nano")
    return PheyeConfig(
        vision_config=nano.vision_config,
        text_config=nano.text_config,
        tiles_per_side=nano.tiles_per_side,
        cross_attention_interval=2,
    )


@pytest.mark.parametrize("variant", BUDGET_GFLOPS)
def test_budgets_cost_what_the_specification_says(variant):
    layers, dense, by_blocks = BUDGET_GFLOPS[variant]
    config = with_budgets(PheyeConfig.from_variant(variant), layers)
    formulas = list(complexity.budget_formulas(config, TEXT_TOKENS).values())  # plain, each budget, dense, half
    assert len(formulas) == len(layers) + 4 and formulas[0] == formulas[1]
    assert formulas[-2] == pytest.approx(1e9 * dense, rel=0.01)
    for blocks, gflops in by_blocks.items():
        assert formulas[1 + blocks] == pytest.approx(1e9 * gflops, rel=0.01)


@pytest.mark.parametrize("variant", ["x4-448", pytest.param("x2-672", marks=pytest.mark.slow)])
def test_budgets_of_published_sizes_are_counted_within_a_percent_of_their_formulas(variant):
    config = shallow(with_budgets(PheyeConfig.from_variant(variant), BUDGET_GFLOPS[variant][0][:2]))
    with torch.device("meta"):
        model = PheyeForConditionalGeneration(config).eval()
        image = torch.empty(1, config.tokens_per_image, config.vision_config.hidden_size)
        text = torch.zeros(1, TEXT_TOKENS, dtype=torch.long)
    counted = [
        complexity.count(lambda b=b: model(text, image_hidden_states=image, vision_budget=b, logits_to_keep=1))
        for b in range(3)
    ]
    formulas = list(complexity.budget_formulas(config, TEXT_TOKENS).values())[1:4]
    assert counted == pytest.approx(formulas, rel=0.01)
    assert counted[2] - counted[1] == counted[1] - counted[0] == formulas[1] - formulas[0]  # affine


def test_designs_of_nanos_size_are_counted_beside_each_other():
    config = with_budgets(shallow(nano_sizes()), [3, 5])
    counted, formulas = (function(config, TEXT_TOKENS) for function in COUNTS)
    assert list(counted) == list(formulas)
    for name, parts in counted.items():
        assert parts["prefill"] == pytest.approx(formulas[name], rel=0.01), name
    budgets = [parts for name, parts in counted.items() if name not in (PLAIN, DENSE, HALF)]
    assert [parts["prefill"] for parts in budgets] == pytest.approx([2.0e9, 9.3e9, 16.7e9], rel=0.01)
    for parts in budgets:  # no budget changes encoding, nor a further token
        assert {**parts, "prefill": 0} == {**counted[PLAIN], "prefill": 0}
    assert counted[DENSE]["step"] > counted[HALF]["step"]  # which attend over their visual tokens


@pytest.mark.parametrize(("tiles_per_side", "gflops"), [(2, 164), (3, 348)])
def test_a_joint_layer_costs_what_the_specification_says(tiles_per_side, gflops):
    config = with_budgets(PheyeConfig(tiles_per_side=tiles_per_side), [6, 10], "joint")
    _, none, one, two, *_ = complexity.budget_formulas(config, TEXT_TOKENS).values()
    assert one - none == two - one == pytest.approx(1e9 * gflops, rel=0.01)


def test_joint_layers_are_counted_within_a_percent_of_their_formula():
    config = with_budgets(shallow(nano_sizes()), [2, 4], "joint")
    counted, formulas = (function(config, TEXT_TOKENS) for function in COUNTS)
    for name, parts in counted.items():
        assert parts["prefill"] == pytest.approx(formulas[name], rel=0.01), name
    none, one, two = (counted[f"joint layers {layers}"]["prefill"] for layers in ([], [2], [2, 4]))
    assert two - one == one - none  # affine
    assert counted["joint layers [2]"]["step"] > counted["joint layers []"]["step"] == counted[PLAIN]["step"]


def test_parts_of_a_model_with_budgets_add_up():
    plain = complexity.counted_parts(tiny_config(), 7)
    config = with_budgets(tiny_config(), [3])
    counted = complexity.counted_parts(config, 7)
    block = counted.pop("self-attention at the largest budget")
    assert counted == plain and block == complexity.self_attention_flops(config.tokens_per_image, 32)


def test_command_counts_budgets(capsys, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    complexity.main(["--model", str(tmp_path), "--text_tokens", "7", "--budget", "3"])
    output = capsys.readouterr().out
    last = json.loads(output.splitlines()[-1])
    config = with_budgets(tiny_config(), [3])
    assert list(last["budgets"]) == list(complexity.budget_formulas(config, 7))
    assert all(f"| {name} |" in output for name in last["budgets"])
    block = last["budgets"]["blocks before [3]"]["prefill"] - last["budgets"]["blocks before []"]["prefill"]
    assert block == complexity.self_attention_flops(config.tokens_per_image, 32)
