"""The converter: both golden cases start to end, every rule, every refusal, and what is left after a crash."""

import errno
import hashlib
import json
import math
import os
import pickle
import re
import runpy
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPConfig, GenerationConfig, pipeline

from pheye import PheyeConfig, configuration_pheye
from pheye import convert_checkpoint as converter
from pheye.benchmarks import conversion as benchmark
from pheye.conversion import card, reading, rules, writing

from hub_server import FakeHub
from tiny import tiny_config, tiny_text_config, tiny_tokenizer, tiny_vision_config

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
CASES = ("x2-448", "x4-672")
COMMANDS = {"x2-448": [str(ROOT / "convert_checkpoint.py")], "x4-672": ["-m", "pheye.convert_checkpoint"]}
CODE = {path.name for path in ROOT.glob("*_pheye.py")}
INDEX = "model.safetensors.index.json"
VIT = "vision_encoder.vision_model.base_model.model."
Q_PROJ = VIT + "encoder.layers.0.self_attn.q_proj"
EMBEDDINGS = "lang_encoder.model.embed_tokens.weight"


def run(arguments: list, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The golden cases through the command, one as a script and one as a module, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("converted"), {}
    for case, command in COMMANDS.items():
        done = run([*command, GOLDEN / case, case, "--verify"], cwd=folder)
        assert done.returncode == 0, done.stderr
        printed[case] = done.stdout
    return folder, printed


def small_config(**kwargs):
    """Text 64 wide, vision 32 wide, blocks before layers 1 and 3 of 4, five views, LoRA ranks 2 and 4."""
    return tiny_config(
        **{
            "vision_config": tiny_vision_config(hidden_size=32),
            "text_config": tiny_text_config(hidden_size=64, intermediate_size=96),
            "tiles_per_side": 2,
            "cross_attention_interval": 2,
            "global_lora_rank": 2,
            "local_lora_rank": 4,
            **kwargs,
        }
    )


@pytest.fixture
def tensors():
    return make_tensors(small_config())


def make_tensors(config) -> dict[str, torch.Tensor]:
    """Random values that matter, under the published names."""
    generator = torch.Generator().manual_seed(0)

    def make(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        return 1 + 0.1 * noise if len(shape) == 1 and name.endswith("norm.weight") else noise * 0.15

    return benchmark.published_state(config, make)


def write(folder: Path, tensors: dict, config=None, **settings) -> Path:
    """A published repo in `folder`."""
    benchmark.write_published(folder, config or small_config(), tensors)
    tiny_tokenizer().save_pretrained(folder / "decoder")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a converted folder, as they are in its files."""
    index = json.loads((folder / INDEX).read_text())
    files = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    assert {name: file for file, held in files.items() for name in held} == index["weight_map"]
    return {name: tensor for held in files.values() for name, tensor in held.items()}


def refuse(capsys, source, output, *options) -> str:
    """The error with which a conversion ends, after a look that nothing is left of it."""
    before = sorted(output.parent.iterdir())
    assert converter.main([str(source), str(output), *options]) == 1
    assert sorted(output.parent.iterdir()) == before
    return capsys.readouterr().err


# --- Golden cases ---


@pytest.mark.parametrize("case", CASES)
def test_golden_case_converts_and_reproduces_the_recorded_outputs(converted, case):
    expected, told = (
        load_file(GOLDEN / case / "expected.safetensors"),
        json.loads((GOLDEN / case / "expected.json").read_text()),
    )
    model, loading = AutoModelForImageTextToText.from_pretrained(
        converted[0] / case, trust_remote_code=True, output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert model.dtype == torch.float32
    processor = AutoProcessor.from_pretrained(converted[0] / case, trust_remote_code=True)
    images = [Image.open(GOLDEN / case / f"image{number}.png") for number in (0, 1)]
    texts = [
        processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        for prompt in told["prompts"]
    ]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["attention_mask"], expected["attention_mask"])
    pixels = inputs["pixel_values"]
    torch.testing.assert_close(pixels[..., ::16, ::16], expected["pixel_values_probe"], atol=1e-6, rtol=0)
    with torch.no_grad():
        features = model.get_image_features(pixels).last_hidden_state
    torch.testing.assert_close(features, expected["vision_features"], atol=2e-4, rtol=0)
    for number in (0, 1):
        ids = expected["input_ids"][number][expected["attention_mask"][number].bool()][None]
        labels = ids.clone()
        labels[:, :-6] = -100
        with torch.no_grad():
            outputs = model(ids, pixels[number : number + 1], labels=labels)
        torch.testing.assert_close(outputs.logits, expected[f"logits_{number}"], atol=2e-3, rtol=0)
        torch.testing.assert_close(outputs.loss, expected[f"loss_{number}"].squeeze(), atol=1e-4, rtol=0)
        for beams in (1, 3):
            generated = model.generate(
                input_ids=ids, pixel_values=pixels[number : number + 1], num_beams=beams, max_new_tokens=12
            )
            assert torch.equal(generated, expected[f"generated_{number}_beams{beams}"])


@pytest.mark.parametrize("case", CASES)
def test_golden_case_answers_in_a_pipeline(converted, case):
    told = json.loads((GOLDEN / case / "expected.json").read_text())
    pipe = pipeline("image-to-text", model=str(converted[0] / case), trust_remote_code=True)
    answer = pipe(str(GOLDEN / case / "image0.png"), prompt=told["prompts"][0], max_new_tokens=12)
    assert answer[0]["generated_text"] == told["texts"]["0_beams1"].lstrip()


@pytest.mark.parametrize(("case", "copies"), zip(CASES, (56 + 28, 112 + 28), strict=True))
def test_the_command_reports_what_became_of_every_tensor(converted, case, copies):
    printed = converted[1][case]
    source = torch.load(GOLDEN / case / "checkpoint.pt", weights_only=True)
    target = stored(converted[0] / case)
    counts = re.search(r"(\d+) tensors of the source: (\d+) renamed, (\d+) split, (\d+) dropped; (\d+) of", printed)
    total, renamed, split, dropped, filled = map(int, counts.groups())
    # Split are the view vectors, and keys from values twice in each of two blocks; two dropped are dead.
    assert (total, split, dropped, filled) == (len(source), 5, copies + 2, len(target))
    assert renamed == total - split - dropped == filled - 1 - 2 * 4
    lines = re.findall(r"^ *(\d+) (renamed|split|dropped) +\S+: .+", printed, re.MULTILINE)
    assert sum(int(count) for count, _ in lines) == total


@pytest.mark.parametrize("case", CASES)
def test_verify_prints_differences_no_larger_than_rounding(converted, case):
    line = re.search(
        r"Largest differences from the reference: pixels (\S+), features (\S+), logits (\S+)", converted[1][case]
    )
    pixels, features, logits = map(float, line.groups())
    assert pixels <= 1e-6
    assert features <= 2e-4
    assert logits <= 2e-3


@pytest.mark.parametrize("case", CASES)
def test_the_folder_is_complete(converted, case):
    assert {path.name for path in (converted[0] / case).iterdir()} == CODE | {
        "README.md",
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model-00001-of-00001.safetensors",
        INDEX,
    }
    for name in CODE:
        assert (converted[0] / case / name).read_bytes() == (ROOT / name).read_bytes()


def test_configs_are_those_that_saving_the_model_writes(converted, tmp_path):
    folder = converted[0] / "x2-448"
    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path)
    assert json.loads((folder / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())
    assert str(GOLDEN) not in (folder / "config.json").read_text()


def test_generation_ends_and_pads_with_the_tokenizers_tokens(tmp_path, tensors):
    config = small_config(
        text_config=tiny_text_config(
            hidden_size=64, intermediate_size=96, bos_token_id=None, eos_token_id=None, pad_token_id=None
        )
    )
    converter.convert(str(write(tmp_path / "source", tensors, config)), tmp_path / "out")
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 0, 0)


# --- Variants of the format ---

WIDE = tiny_text_config(hidden_size=128)
VARIANTS = {
    "no global LoRA": small_config(global_lora_rank=0),
    "reduce 2": small_config(cross_attention_reduction=2, text_config=WIDE),
    "from layer 2": small_config(cross_attention_start_layer=2),
    "nine crops, text wider than vision": small_config(tiles_per_side=3, text_config=WIDE),
    "every layer, one LoRA rank": small_config(cross_attention_interval=1, global_lora_rank=3, local_lora_rank=3),
    "vision wider than text": small_config(vision_config=tiny_vision_config(hidden_size=128, patch_size=8)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_format_agree_with_the_reference(tmp_path, capsys, name):
    config = VARIANTS[name]
    source = write(tmp_path / "source", make_tensors(config), config)
    assert converter.main([str(source), str(tmp_path / "out"), "--verify"]) == 0
    assert "Largest differences" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for field in ("cross_attention_reduction", "cross_attention_start_layer", "global_lora_rank", "local_lora_rank"):
        assert written[field] == getattr(config, field)
    assert written["global_lora_alpha"] == 2 * config.global_lora_rank
    assert written["local_lora_alpha"] == 2 * config.local_lora_rank


def test_a_deeper_vision_model_and_a_whole_clip_config_give_the_same_weights(tmp_path, tensors):
    converter.convert(str(write(tmp_path / "plain", tensors)), tmp_path / "out")
    deeper = {name.replace(VIT, VIT + "vision_model."): tensor for name, tensor in tensors.items()}
    source = write(tmp_path / "deeper", deeper)
    CLIPConfig(vision_config=tiny_vision_config().to_dict()).save_pretrained(source / "encoder")
    converter.convert(str(source), tmp_path / "out-deeper", verify=True)
    plain, other = stored(tmp_path / "out"), stored(tmp_path / "out-deeper")
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_verify_finds_a_wrong_mapping(tmp_path, tensors, capsys, monkeypatch):
    """Keys and values have one shape, so only the reference can tell that they were exchanged."""
    source = write(tmp_path / "source", tensors)
    exchanged = tuple(
        rule._replace(target=rule.target[::-1]) if "to_kv" in rule.source else rule for rule in rules.RULES
    )
    monkeypatch.setattr(rules, "RULES", exchanged)
    error = refuse(capsys, source, tmp_path / "out", "--verify")
    assert "differs from the source" in error
    assert converter.main([str(source), str(tmp_path / "out")]) == 0


def test_the_processor_has_the_encoders_mean_and_std(tmp_path, tensors):
    source = write(tmp_path / "source", tensors)
    published = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "size": {"shortest_edge": 224}}
    (source / "encoder" / "preprocessor_config.json").write_text(json.dumps(published))
    converter.convert(str(source), tmp_path / "out", verify=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True).image_processor
    assert list(processor.image_mean) == [0.5, 0.4, 0.3]
    assert list(processor.image_std) == [0.1, 0.2, 0.3]
    assert dict(processor.size) == {"height": 32, "width": 32}  # what the vision tower takes


# --- Dtypes and shards ---


@pytest.fixture
def mixed(tensors):
    """In the published dtypes: blocks in float32, everything else in bfloat16."""
    return {name: tensor if "cross_attn" in name else tensor.bfloat16() for name, tensor in tensors.items()}


def test_keep_stores_every_tensor_bit_for_bit(tmp_path, mixed):
    converter.convert(str(write(tmp_path / "source", mixed)), tmp_path / "out")
    target = stored(tmp_path / "out")
    # Written out by hand, not by the table: one of each kind.
    block = "lang_encoder.model.layers.3.cross_attn_layer."
    same = {
        "pheye.global_lora.encoder_layers_0_self_attn_q_proj.A": mixed[Q_PROJ + ".lora_A.first.weight"],
        "pheye.local_lora.encoder_layers_0_self_attn_q_proj.B": mixed[Q_PROJ + ".lora_B.second.weight"],
        "pheye.vision_tower.encoder.layers.0.self_attn.q_proj.weight": mixed[Q_PROJ + ".base_layer.weight"],
        "pheye.vision_tower.pre_layrnorm.bias": mixed[VIT + "pre_layrnorm.bias"],
        "pheye.view_encoding.global_norm.weight": mixed["vision_encoder.norm_lvl_1.weight"],
        "pheye.view_encoding.local_norm.weight": mixed["vision_encoder.norm_lvl_2.weight"],
        "pheye.view_encoding.view_embedding.weight": mixed["vision_encoder.connector.embedding.weight"][:5],
        "pheye.cross_attention_blocks.1.to_k.weight": mixed[block + "attn.to_kv.weight"][:64],
        "pheye.cross_attention_blocks.1.to_v.weight": mixed[block + "attn.to_kv.weight"][64:],
        "pheye.cross_attention_blocks.1.mlp_norm.bias": mixed[block + "ff.norm.bias"],
        "pheye.language_model.model.layers.2.mlp.fc1.bias": mixed[
            "lang_encoder.model.layers.2.decoder_layer.mlp.fc1.bias"
        ],
        "pheye.language_model.lm_head.bias": mixed["lang_encoder.lm_head.bias"],
    }
    for name, tensor in same.items():
        assert target[name].dtype == tensor.dtype, name
        assert torch.equal(target[name], tensor), name
    assert {tensor.dtype for name, tensor in target.items() if "blocks" in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in target.items() if "blocks" not in name} == {torch.bfloat16}


def test_a_plain_load_takes_the_language_models_dtype_and_float32_gets_every_bit_back(tmp_path, mixed):
    converter.convert(str(write(tmp_path / "source", mixed)), tmp_path / "out", verify=True)
    load = AutoModelForImageTextToText.from_pretrained
    plain = load(tmp_path / "out", trust_remote_code=True)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    model, target = load(tmp_path / "out", trust_remote_code=True, dtype=torch.float32), stored(tmp_path / "out")
    assert model.state_dict().keys() == target.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, target[name].float()), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_casts_all(tmp_path, mixed, dtype):
    converter.convert(str(write(tmp_path / "source", mixed)), tmp_path / "out", dtype=dtype, verify=True)
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    expected = mixed[EMBEDDINGS].to(getattr(torch, dtype))
    assert torch.equal(stored(tmp_path / "out")["pheye.language_model.model.embed_tokens.weight"], expected)


def test_a_dtype_that_cannot_hold_the_values_is_refused(tmp_path, tensors, capsys):
    tensors["lang_encoder.lm_head.bias"][3] = 1e5
    error = refuse(capsys, write(tmp_path / "source", tensors), tmp_path / "out", "--dtype", "float16")
    assert "lang_encoder.lm_head.bias holds values beyond the range of torch.float16" in error


def test_casting_in_chunks_gives_what_casting_at_once_gives(tmp_path, tensors, monkeypatch):
    source = str(write(tmp_path / "source", tensors))
    converter.convert(source, tmp_path / "whole", dtype="bfloat16")
    monkeypatch.setattr(writing, "CHUNK", 100)
    converter.convert(source, tmp_path / "chunks", dtype="bfloat16")
    whole, chunks = stored(tmp_path / "whole"), stored(tmp_path / "chunks")
    assert all(torch.equal(whole[name], chunks[name]) for name in whole)


def test_tensors_that_are_parts_of_others_or_transposed_are_stored_right(tmp_path, tensors):
    """They keep their layout in the pickle."""
    whole = torch.randn(300, 64)
    tensors[EMBEDDINGS] = whole[20:277]
    fc1 = "lang_encoder.model.layers.0.decoder_layer.mlp.fc1.weight"
    tensors[fc1] = tensors["lang_encoder.old_decoder_blocks.0.mlp.fc1.weight"] = torch.randn(64, 96).T
    converter.convert(str(write(tmp_path / "source", tensors)), tmp_path / "out")
    target = stored(tmp_path / "out")
    assert torch.equal(target["pheye.language_model.model.embed_tokens.weight"], whole[20:277])
    assert torch.equal(target["pheye.language_model.model.layers.0.mlp.fc1.weight"], tensors[fc1])


def test_shards_keep_to_the_size_and_the_index_finds_every_tensor(tmp_path, tensors):
    converter.main([str(write(tmp_path / "source", tensors)), str(tmp_path / "out"), "--max-shard-size", "100KB"])
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    target = stored(tmp_path / "out")
    for file in files:
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            names = shard.keys()
            sizes = [target[name].nbytes for name in names]
        assert sum(sizes) <= 100_000 or len(sizes) == 1
    total = sum(tensor.nbytes for tensor in target.values())
    parameters = sum(tensor.numel() for tensor in target.values())
    assert index["metadata"] == {"total_parameters": parameters, "total_size": total}
    _, loading = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(loading.values()), loading


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


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"level": 1}, "level 1, which exists in the published code as a number only and cannot run"),
        ({"level": 4}, "level 4, which exists in the published code as a number only and cannot run"),
        ({"level": 7}, "level 7, which is unknown"),
        ({"level": True}, "level True"),
        ({"from_layer": 4}, "leave no cross-attention block"),
        ({"reduce": 0}, "reduce 0, which is no integer of at least 1"),
        ({"cross_interval": 9}, "leave no cross-attention block"),
        ({"encoder": 3}, "encoder 3, which is no name"),
        ({"decoder": "nowhere"}, "'nowhere' is neither a folder nor a Hub repo"),
        ({"decoder": "../escape/decoder"}, "neither a folder nor a Hub repo"),
    ],
)
def test_settings_that_make_no_model_are_refused_with_the_reason(tmp_path, tensors, capsys, settings, reason):
    write(tmp_path / "escape", tensors)
    assert reason in refuse(capsys, write(tmp_path / "source", tensors, **settings), tmp_path / "out")


def test_missing_settings_and_files_are_named(tmp_path, tensors, capsys):
    source = write(tmp_path / "source", tensors)
    settings = json.loads((source / "config.json").read_text())
    del settings["reduce"], settings["decoder"]
    (source / "config.json").write_text(json.dumps(settings))
    assert "lacks decoder, reduce" in refuse(capsys, source, tmp_path / "out")
    (source / "config.json").write_text("{")
    assert "could not be read as JSON" in refuse(capsys, source, tmp_path / "out")
    source = write(tmp_path / "no-weights", tensors)
    (source / "checkpoint.pt").unlink()
    assert "has no checkpoint.pt" in refuse(capsys, source, tmp_path / "out")


# --- Safety ---


class Malice:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_tries_to_run_code_is_refused_and_nothing_runs(tmp_path, tensors, capsys, zipped):
    traces = tmp_path / "ran"
    source = write(tmp_path / "source", tensors)
    torch.save({**tensors, "evil": Malice(traces)}, source / "checkpoint.pt", _use_new_zipfile_serialization=zipped)
    error = refuse(capsys, source, tmp_path / "out")
    assert ("is refused; nothing of it was run" if zipped else "is no whole checkpoint in torch's zip format") in error
    assert not traces.exists()
    torch.load(source / "checkpoint.pt", weights_only=False)
    assert traces.exists()  # it would have run


def test_broken_checkpoints_are_refused(tmp_path, tensors, capsys):
    source = write(tmp_path / "source", tensors)
    path = source / "checkpoint.pt"
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", pickle.dumps({"a": 1})):
        path.write_bytes(broken)
        assert "is no whole checkpoint" in refuse(capsys, source, tmp_path / "out")
    torch.save([torch.zeros(2)], path)
    assert "holds no dict of named tensors" in refuse(capsys, source, tmp_path / "out")


def test_an_existing_output_stays_unless_forced(tmp_path, tensors, capsys):
    source, output = write(tmp_path / "source", tensors), tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    assert "give --force to replace it" in refuse(capsys, source, output)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    assert converter.main([str(source), str(output), "--force"]) == 0
    assert not (output / "mine.txt").exists()
    assert stored(output)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    (tmp_path / "file").write_text("mine")
    assert "it is no folder" in refuse(capsys, source, tmp_path / "file", "--force")
    assert "holds" in refuse(capsys, source, tmp_path / "source", "--force")
    assert (source / "checkpoint.pt").exists()


def fail_late(monkeypatch, error):
    """Let the writing fail when half of the tensors are written."""
    written, write_all = [], writing.write_all

    def write_some(file, data):
        written.append(file)
        if len(written) > 80:
            raise error
        write_all(file, data)

    monkeypatch.setattr(writing, "write_all", write_some)


def test_a_full_disk_leaves_nothing_and_a_rerun_works(tmp_path, tensors, capsys, monkeypatch):
    source = write(tmp_path / "source", tensors)
    with monkeypatch.context() as patch:
        fail_late(patch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        assert "No space left on device" in refuse(capsys, source, tmp_path / "out")
    assert converter.main([str(source), str(tmp_path / "out"), "--verify"]) == 0


def test_a_failed_replacement_keeps_what_was_there(tmp_path, tensors, capsys, monkeypatch):
    source, output = write(tmp_path / "source", tensors), tmp_path / "out"
    converter.convert(str(source), output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with monkeypatch.context() as patch:
        fail_late(patch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        refuse(capsys, source, output, "--force")
    with monkeypatch.context() as patch:
        fail_late(patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            converter.main([str(source), str(output), "--force"])
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_too_little_room_is_told_before_writing(tmp_path, tensors, capsys, monkeypatch):
    usage = writing.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda folder: usage)
    assert "has 1,000 left" in refuse(capsys, write(tmp_path / "source", tensors), tmp_path / "out")


STOPPED_TWICE = """
import os, resource, signal, sys
from pheye import convert_checkpoint
from pheye.conversion import writing

resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
print("status", convert_checkpoint.main(sys.argv[1:]), "left", os.listdir("."), flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

write_all, written = writing.write_all, []
def write_some(file, data):
    written.append(file)
    if len(written) > 80:
        os.kill(os.getpid(), signal.SIGKILL)
    write_all(file, data)
writing.write_all = write_some
convert_checkpoint.main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of Unix")
def test_a_run_that_the_system_stops_and_a_killed_one_leave_no_half_folder(tmp_path, tensors):
    source, output = write(tmp_path / "source", tensors), tmp_path / "out"
    done = run(["-c", STOPPED_TWICE, source, output], cwd=tmp_path)
    assert "status 1 left ['source']" in done.stdout, done.stderr
    assert "File too large" in done.stderr
    assert done.returncode == -9, done.stderr
    (leftover,) = {path.name for path in tmp_path.iterdir()} - {"source"}
    assert leftover.startswith(".out.converting-")
    assert list((tmp_path / leftover).glob("*.safetensors"))  # it was killed while it wrote

    assert converter.main([str(source), str(output), "--verify"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_a_run_killed_between_its_last_two_renames_is_put_right(tmp_path, tensors, capsys):
    source, output = write(tmp_path / "source", tensors), tmp_path / "out"
    converter.convert(str(source), output)
    output.rename(tmp_path / ".out.replaced")
    (tmp_path / ".out.converting-123").mkdir()
    assert converter.main([str(source), str(output)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    assert stored(output)


def test_a_relative_output_and_missing_parents_work(tmp_path, tensors, monkeypatch):
    source = write(tmp_path / "source", tensors)
    monkeypatch.chdir(tmp_path)
    assert converter.main([str(source), "deep/er/out"]) == 0
    assert stored(tmp_path / "deep" / "er" / "out")


def test_without_the_package_the_script_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pheye", None)
    with pytest.raises(SystemExit, match=r"pip install \."):
        runpy.run_path(str(ROOT / "convert_checkpoint.py"))


@pytest.mark.parametrize(
    "options", [["--private"], ["--revision", "x"], ["--max-shard-size", "lots"], ["--max-shard-size", "0GB"]]
)
def test_options_that_mean_nothing_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        converter.main(["source", "output", *options])
    assert re.search(r"--push-to-hub|is no size", capsys.readouterr().err)


# --- The Hub ---


def test_options_override_names_and_folders_come_before_the_hub(tmp_path, tensors, monkeypatch):
    source = write(tmp_path / "source", tensors, encoder="gone", decoder="gone", tokenizer="gone")
    (source / "decoder").rename(tmp_path / "decoder")
    (source / "encoder").rename(tmp_path / "encoder")
    monkeypatch.setattr(reading, "snapshot_download", None)  # no call to the Hub
    options = {part: str(tmp_path / folder) for part, folder in
               {"encoder": "encoder", "decoder": "decoder", "tokenizer": "decoder"}.items()}  # fmt: skip
    converter.convert(str(source), tmp_path / "out", **options)
    assert stored(tmp_path / "out")


def test_only_configs_and_tokenizer_of_the_parts_are_fetched(tmp_path, tensors, monkeypatch):
    source = write(tmp_path / "source", tensors, encoder="a/vit", decoder="b/lm", tokenizer="b/lm")
    hub = {"a/vit": source / "encoder", "b/lm": source / "decoder"}
    for folder in hub.values():
        (folder / "model.safetensors").write_text("large")
        (folder / "pytorch_model.bin").write_text("large")
    fetched = set()

    def download(repo, allow_patterns, revision=None):
        for path in hub[repo].iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                fetched.add((repo, path.name))
        return str(hub[repo])

    monkeypatch.setattr(reading, "snapshot_download", download)
    converter.convert(str(source), tmp_path / "out")
    assert {("a/vit", "config.json"), ("b/lm", "config.json"), ("b/lm", "tokenizer.json")} <= fetched
    assert not [name for _, name in fetched if "model" in name]
    data = ModelCard.load(tmp_path / "out" / "README.md", ignore_metadata_errors=False).data
    assert data.base_model == ["a/vit", "b/lm"]


FROM_HUB_TO_HUB = """
import sys
from huggingface_hub import HfApi
from pheye.convert_checkpoint import main
golden, api = sys.argv[1], HfApi()
api.create_repo("miguelcarv/Pheye-x2-448")
api.upload_folder(repo_id="miguelcarv/Pheye-x2-448", folder_path=golden)
api.create_repo("me/converted")
api.upload_file(path_or_fileobj=b"old", path_in_repo="model.safetensors", repo_id="me/converted")
push = ["--push-to-hub", "me/converted", "--private", "--revision", "first/try"]
assert main(["miguelcarv/Pheye-x2-448", "out", *push]) == 0
assert main(["out", "again", "--push-to-hub", "me/converted"]) == 1
from transformers import AutoModelForImageTextToText, pipeline
pipe = pipeline("image-to-text", model="me/converted", revision="first/try", trust_remote_code=True)
print(pipe(golden + "/image0.png", prompt="What is written on the sign?", max_new_tokens=12))
"""


def test_a_repo_on_the_hub_becomes_a_repo_on_the_hub(tmp_path):
    with FakeHub() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "cache")}
        done = run(["-c", FROM_HUB_TO_HUB, GOLDEN / "x2-448"], cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        published = hub.repos["miguelcarv/Pheye-x2-448"]
        pushed = hub.repos["me/converted"]
        files = pushed.commits[pushed.branches["first/try"]].files
    answer = json.loads((GOLDEN / "x2-448" / "expected.json").read_text())["texts"]["0_beams1"].lstrip()
    assert repr(answer) in done.stdout
    assert set(files) == {path.name for path in (tmp_path / "out").iterdir()}  # the old weights are gone
    assert list(pushed.commits[pushed.branches["main"]].files) == ["model.safetensors"]
    assert "lacks encoder" in done.stderr  # a converted folder is no source
    # The card tells where it came from, and how well the published model does.
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert published.branches["main"] in card.text
    assert "miguelcarv/Pheye-x2-448" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [76.0, 111.8, 47.3, 108.9]


def test_private_repos_are_asked_for(monkeypatch, tmp_path):
    calls = []

    class Api:
        def create_repo(self, repo, **kwargs):
            calls.append(("create_repo", repo, kwargs))
            return type("Url", (), {"repo_id": repo})

        def create_branch(self, repo, **kwargs):
            calls.append(("create_branch", repo, kwargs))

        def upload_folder(self, **kwargs):
            calls.append(("upload_folder", kwargs["repo_id"], kwargs))
            return type("Commit", (), {"commit_url": "there"})

    monkeypatch.setattr(converter, "HfApi", Api)
    converter.push(tmp_path, "me/x", private=True, revision=None)
    assert calls[0] == ("create_repo", "me/x", {"private": True, "exist_ok": True})
    assert [name for name, _, _ in calls] == ["create_repo", "upload_folder"]
    assert calls[1][2]["folder_path"] == tmp_path


# --- The model card ---


@pytest.mark.parametrize(
    ("case", "scores"),
    [("x2-448", ("76.0", "111.8", "47.3", "108.9")), ("x4-672", ("75.5", "110.8", "49.2", "111.9"))],
)
def test_the_card_says_what_it_is_and_where_it_comes_from(converted, case, scores):
    card = ModelCard.load(converted[0] / case / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name) == ("image-text-to-text", "transformers")
    assert (card.data.license, card.data.license_name) == ("other", "none-stated-by-the-source")
    assert "states no licence" in card.text
    assert card.data.base_model is None  # encoder and decoder of the golden cases are no repos
    assert {"pheye", "image-to-text", "custom_code"} <= set(card.data.tags)
    assert f"| Pheye-{case} | {' | '.join(scores)} |" in card.text
    assert "other sizes than the published one, so they are not its own" in card.text
    assert card.data.eval_results is None
    assert hashlib.sha256((GOLDEN / case / "checkpoint.pt").read_bytes()).hexdigest() in card.text
    assert str(ROOT) not in card.text


def test_the_card_says_what_is_stored_in_which_dtype(tmp_path, mixed):
    converter.convert(str(write(tmp_path / "source", mixed)), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    target = stored(tmp_path / "out").values()
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        count = sum(tensor.numel() for tensor in target if tensor.dtype == dtype)
        assert f"{count:,} parameters in {name}" in text
    assert "`config.dtype` is that of the language model's weights, bfloat16" in text
    assert "`dtype=torch.float32` gets every stored bit back" in text


def test_no_field_of_the_card_is_left_open(converted):
    for case in CASES:
        assert not re.search(r"\{\w*\}", (converted[0] / case / "README.md").read_text())


# --- Rules and benchmark ---


@pytest.mark.parametrize("case", CASES)
def test_names_lead_there_and_back(case):
    """The checkpoints that the benchmark makes have the names and shapes of a published one."""
    tensors = reading.read_checkpoint(GOLDEN / case / "checkpoint.pt")
    settings = json.loads((GOLDEN / case / "config.json").read_text())
    config = reading.make_config(settings, GOLDEN / case / "encoder", GOLDEN / case / "decoder", tensors)
    made = benchmark.published_state(config, lambda name, shape: torch.empty(shape))
    assert {name: made[name].shape for name in made} == {name: tensors[name].shape for name in tensors}


def test_every_rule_is_needed_and_says_why(converted):
    for rule in rules.RULES:
        assert rule.why
        assert f"{rule.source}: {rule.why}" in converted[1]["x2-448"]


def test_published_scores_cover_the_published_variants():
    assert card.PUBLISHED_SCORES.keys() == configuration_pheye.VARIANTS.keys()


def test_a_full_size_model_has_the_papers_number_of_parameters():
    shapes = rules.target_shapes(PheyeConfig.from_variant("x4-448"))
    assert sum(math.prod(shape) for shape in shapes.values()) == 2_350_063_136


@pytest.mark.slow
def test_the_benchmark_measures_and_cleans_up(tmp_path, capsys):
    benchmark.main(["--workdir", str(tmp_path), "--repeats", "1"], small_config())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["benchmark"] == "conversion"
    for name in benchmark.ROWS:
        assert result[name]["conversion_s"] > result[name]["copy_s"] >= 0
    if sys.platform == "linux":
        assert 0.05 < result["peak_gb"] < 1.5
    assert list(tmp_path.iterdir()) == []
