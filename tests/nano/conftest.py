"""Small parts and short batches for the tests of Pheye-nano."""

from pathlib import Path

import pytest
from transformers import CLIPVisionConfig, ConvNextConfig

from pheye import PheyeConfig, PheyeForConditionalGeneration
from pheye.nano import language, vision

from tiny import tiny_model, tiny_processor, tiny_text_config, tiny_vision_config


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> Path:
    """Folder of a Pheye without LoRA, from which `build` takes eyes and language model."""
    folder = tmp_path_factory.mktemp("parts")
    config = PheyeConfig(
        vision_config=tiny_vision_config(image_size=224, patch_size=56),
        text_config=tiny_text_config(max_position_embeddings=2048),
        global_lora_rank=0,
        local_lora_rank=0,
    )
    PheyeForConditionalGeneration(config).save_pretrained(folder)
    tiny_processor(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def parts_with_branch(tmp_path_factory) -> Path:
    """The same with a branch, and with LoRA that has learnt."""
    folder = tmp_path_factory.mktemp("parts_with_branch")
    config = PheyeConfig(
        vision_config=tiny_vision_config(image_size=224, patch_size=14),
        text_config=tiny_text_config(max_position_embeddings=2048),
        high_res_vision_config=ConvNextConfig(depths=[1] * 4, hidden_sizes=[8] * 4),
        high_res_fusion_layers=[1],
        cross_attention_interval=1,
        tiles_per_side=3,
    )
    tiny_model(config).save_pretrained(folder)
    tiny_processor(config).save_pretrained(folder)
    return folder


@pytest.fixture
def small(monkeypatch):
    """Few pictures and texts to a batch, and small models."""
    monkeypatch.setattr(vision, "PAGES", 2)
    monkeypatch.setattr(vision, "SCENES", 1)
    monkeypatch.setattr(vision, "CROPS", 1)
    monkeypatch.setattr(vision, "WARMUP", 2)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=14
    )
    monkeypatch.setattr(vision, "vision_config", lambda: config)
    monkeypatch.setattr(language, "language_config", lambda size: tiny_text_config(vocab_size=size))
    monkeypatch.setattr(language, "BATCH", 2)
    monkeypatch.setattr(language, "TOKENIZER_TEXTS", 300)
