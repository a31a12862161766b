"""Every rule, copies, and all that does not fit: dropped, renamed and split tensors, there and back."""

import json
import math

import pytest
import torch
from transformers import CLIPConfig

from pheye import PheyeConfig
from pheye import convert_checkpoint as converter
from pheye.benchmarks import conversion as benchmark
from pheye.conversion import reading, rules

from conversion_fixtures import (
    CASES,
    EMBEDDINGS,
    GOLDEN,
    Q_PROJ,
    VIT,
    make_tensors,
    refuse,
    small_config,
    stored,
    write,
)
from tiny import tiny_text_config, tiny_vision_config

pytestmark = pytest.mark.once


@pytest.fixture
def tensors():
    return make_tensors(small_config())


@pytest.mark.parametrize("case", CASES)
def test_names_lead_there_and_back(case):
    """The checkpoints that the benchmark makes have the names and shapes of a published one."""
    tensors = reading.read_tensors(GOLDEN / case / "checkpoint.pt")
    settings = json.loads((GOLDEN / case / "config.json").read_text())
    config = reading.make_config(settings, GOLDEN / case / "encoder", GOLDEN / case / "decoder", tensors)
    made = benchmark.published_state(config, lambda name, shape: torch.empty(shape))
    assert {name: made[name].shape for name in made} == {name: tensors[name].shape for name in tensors}


def test_every_rule_is_needed_and_says_why(tmp_path, capsys):
    converter.convert(str(GOLDEN / "x2-448"), tmp_path / "out")
    printed = capsys.readouterr().out
    for rule in rules.RULES:
        assert rule.why
        assert f"{rule.source}: {rule.why}" in printed


def test_a_full_size_model_has_the_papers_number_of_parameters():
    shapes = rules.target_shapes(PheyeConfig.from_variant("x4-448"))
    assert sum(math.prod(shape) for shape in shapes.values()) == 2_350_063_136


def test_a_deeper_vision_model_and_a_whole_clip_config_give_the_same_weights(tmp_path, tensors):
    converter.convert(str(write(tmp_path / "plain", tensors)), tmp_path / "out")
    deeper = {name.replace(VIT, VIT + "vision_model."): tensor for name, tensor in tensors.items()}
    source = write(tmp_path / "deeper", deeper)
    CLIPConfig(vision_config=tiny_vision_config().to_dict()).save_pretrained(source / "encoder")
    converter.convert(str(source), tmp_path / "out-deeper", verify=True)
    plain, other = stored(tmp_path / "out"), stored(tmp_path / "out-deeper")
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[name], other[name]) for name in plain)


# --- Copies, and what does not fit ---


def test_copies_may_have_memory_of_their_own_if_they_are_equal(tmp_path, tensors):
    apart = {name: tensor.clone() for name, tensor in tensors.items()}
    converter.convert(str(write(tmp_path / "source", apart)), tmp_path / "out", verify=True)


@pytest.mark.parametrize(
    ("copy", "original"),
    [
        ("lang_encoder.old_decoder_blocks.2.mlp.fc1.bias", "lang_encoder.model.layers.2.decoder_layer.mlp.fc1.bias"),
        (
            "lang_encoder.cross_attn_layers.1.attn.to_q.bias",
            "lang_encoder.model.layers.1.cross_attn_layer.attn.to_q.bias",
        ),
    ],
)
def test_a_copy_that_differs_in_one_value_is_not_dropped(tmp_path, tensors, capsys, copy, original):
    tensors[copy] = tensors[copy].clone()
    tensors[copy][-1] += 1e-6
    error = refuse(capsys, write(tmp_path / "source", tensors), tmp_path / "out")
    assert f"wrong: {copy} differs from {original}" in error


def test_all_that_does_not_fit_is_listed_by_name_in_one_error(tmp_path, tensors, capsys):
    layer = "lang_encoder.model.layers."
    del tensors["lang_encoder.lm_head.bias"]
    del tensors[Q_PROJ + ".lora_B.first.weight"]
    del (
        tensors[layer + "1.cross_attn_layer.attn.to_kv.bias"],
        tensors["lang_encoder.cross_attn_layers.1.attn.to_kv.bias"],
    )
    tensors["lang_encoder.surprise.weight"] = torch.zeros(2)
    tensors["optimizer"] = torch.zeros(2)
    tensors[layer + "2.cross_attn_layer.attn.to_q.bias"] = torch.zeros(64)  # there is no block before layer 2
    tensors[Q_PROJ + ".lora_A.second.weight"] = torch.zeros(5, 32)  # the rank of the others is 4
    tensors["vision_encoder.norm_lvl_1.bias"] = torch.zeros(33)
    tensors["vision_encoder.connector.embedding.weight"] = torch.zeros(4, 32)  # five views
    tensors[layer + "3.cross_attn_layer.attn.to_kv.bias"] = torch.zeros(127)
    tensors["vision_encoder.norm_lvl_2.bias"] = torch.zeros(32, dtype=torch.int64)
    tensors[VIT + "pre_layrnorm.bias"] = "text"
    error = refuse(capsys, write(tmp_path / "source", tensors), tmp_path / "out")
    lines = [
        "missing: lang_encoder.lm_head.bias (for pheye.language_model.lm_head.bias)",
        f"missing: {Q_PROJ}.lora_B.first.weight",
        f"missing: {layer}1.cross_attn_layer.attn.to_kv.bias",
        "extra: lang_encoder.surprise.weight",
        "extra: optimizer",
        f"extra: {layer}2.cross_attn_layer.attn.to_q.bias",
        f"misshapen: {Q_PROJ}.lora_A.second.weight gives pheye.local_lora",
        "misshapen: vision_encoder.norm_lvl_1.bias gives pheye.view_encoding.global_norm.bias the shape (33,), not (",
        "misshapen: vision_encoder.connector.embedding.weight is (4, 32) where at least 5 rows are needed",
        f"misshapen: {layer}3.cross_attn_layer.attn.to_kv.bias is (127,) where rows for 2 equal parts",
        "wrong: lang_encoder.cross_attn_layers.3.attn.to_kv.bias differs",
        "wrong: vision_encoder.norm_lvl_2.bias is of type torch.int64",
        f"wrong: {VIT}pre_layrnorm.bias is of type str",
    ]
    assert [line for line in lines if line not in error] == []
    assert f"{len(lines)} of its tensors are wrong" in error
    assert error.count("\n  ") == len(lines)


NOT_PLAIN = {
    "sparse": (torch.ones(32).to_sparse(), "is of type torch.float32 and torch.sparse_coo"),
    "without values": (torch.ones(32, device="meta"), "is of type torch.float32 without values"),
    "negated when it is read": (torch.zeros(32, dtype=torch.complex64).conj().imag, "is of type torch.float32, not a"),
    "complex": (torch.zeros(32, dtype=torch.complex64), "is of type torch.complex64"),
    "eight bits": (torch.zeros(32).to(torch.float8_e4m3fn), "is of type torch.float8_e4m3fn"),
    "a dict": ({"a": 1}, "is of type dict"),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_what_is_no_plain_tensor_is_refused_by_name(tmp_path, tensors, capsys, case):
    value, reason = NOT_PLAIN[case]
    layer = "lang_encoder.model.layers.1.decoder_layer.input_layernorm.bias"
    for name in ("vision_encoder.norm_lvl_1.bias", layer):  # of the latter there is a copy
        tensors[name] = value
    error = refuse(capsys, write(tmp_path / "source", tensors), tmp_path / "out")
    assert f"wrong: vision_encoder.norm_lvl_1.bias {reason}" in error
    assert f"wrong: {layer} {reason}" in error
    assert "wrong: lang_encoder.old_decoder_blocks.1.input_layernorm.bias differs" in error


def test_names_that_nobody_gives_are_listed_in_lines_of_their_own(tmp_path, tensors, capsys):
    layers = "lang_encoder.model.layers."
    names = ["x" * 10**6, "a\n\x1b[31mred", f"{layers}{'9' * 5000}.decoder_layer.x", f"{layers}\u0660.decoder_layer.x"]
    tensors |= {name: torch.zeros(1) for name in names}
    tensors[VIT + "encoder.layers.0.self_attn.q_proj.lora_A.second.weight"] = torch.tensor(1.0)
    error = refuse(capsys, write(tmp_path / "source", tensors), tmp_path / "out")
    assert error.count("\n  extra: ") == 4
    assert error.count("\n") == 2 + 5
    assert "\x1b" not in error
    assert len(error) < 3000
    tensors |= {f"extra{number}": torch.zeros(1) for number in range(1000)}
    error = refuse(capsys, write(tmp_path / "many", tensors), tmp_path / "out")
    assert error.count("\n  extra: ") == rules.LONGEST_LIST
    assert "\n  and 965 more\n" in error


def test_a_lora_set_that_config_json_does_not_match_is_refused(tmp_path, tensors, capsys):
    source = write(tmp_path / "unexpected", tensors, first_level=False)
    assert f"extra: {Q_PROJ}.lora_A.first.weight" in refuse(capsys, source, tmp_path / "out")
    without = {name: tensor for name, tensor in tensors.items() if ".first." not in name}
    source = write(tmp_path / "expected", without, first_level=True)
    assert f"missing: {Q_PROJ}.lora_A.first.weight" in refuse(capsys, source, tmp_path / "out")


def test_another_decoder_is_refused_with_the_shapes(tmp_path, tensors, capsys):
    source = write(tmp_path / "source", tensors)
    tiny_text_config(hidden_size=64, intermediate_size=96, vocab_size=300).save_pretrained(tmp_path / "other")
    error = refuse(capsys, source, tmp_path / "out", "--decoder", str(tmp_path / "other"))
    embeddings = "pheye.language_model.model.embed_tokens.weight"
    assert f"misshapen: {EMBEDDINGS} gives {embeddings} the shape (257, 64), not (300, 64)" in error
