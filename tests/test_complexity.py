"""The benchmark of section 2.2: the paper's figures, and counts that a hand can check."""

import json

import pytest

from pheye.benchmarks import complexity

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
