"""Weights bit for bit, in shards and dtypes; configs as the source tells them."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, GenerationConfig

from pheye import convert_checkpoint as converter
from pheye.conversion import writing

from conversion_fixtures import (
    EMBEDDINGS,
    GOLDEN,
    INDEX,
    Q_PROJ,
    VIT,
    in_published_dtypes,
    make_tensors,
    refuse,
    small_config,
    stored,
    write,
)
from tiny import tiny_text_config

pytestmark = pytest.mark.once


@pytest.fixture
def tensors():
    return make_tensors(small_config())


@pytest.fixture
def mixed(tensors):
    return in_published_dtypes(tensors)


# --- Configs ---


def test_configs_are_those_that_saving_the_model_writes(tmp_path):
    folder, saved = tmp_path / "out", tmp_path / "saved"
    converter.convert(str(GOLDEN / "x2-448"), folder)
    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).save_pretrained(saved)
    assert json.loads((folder / "config.json").read_text()) == json.loads((saved / "config.json").read_text())
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


# --- Dtypes and shards ---


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
    monkeypatch.setattr(writing, "ELEMENTS_AT_ONCE", 100)
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
    converter.main([str(write(tmp_path / "source", tensors)), str(tmp_path / "out"), "--max_shard_size", "100KB"])
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


def test_too_little_room_is_told_before_writing(tmp_path, tensors, capsys, monkeypatch):
    usage = writing.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda folder: usage)
    assert "has 1,000 left" in refuse(capsys, write(tmp_path / "source", tensors), tmp_path / "out")
