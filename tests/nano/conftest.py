"""Small parts and short batches for the tests of Pheye-nano."""

from pathlib import Path

import pytest
from transformers import CLIPVisionConfig, CLIPVisionModel, PhiForCausalLM

from pheye.nano import language, vision

from tiny import tiny_text_config, tiny_tokenizer, tiny_vision_config


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> dict[str, Path]:
    """Folders of a vision tower and a language model, as arguments of `build`."""
    folder = tmp_path_factory.mktemp("parts")
    CLIPVisionModel(tiny_vision_config(image_size=224, patch_size=56)).save_pretrained(folder / "vision")
    PhiForCausalLM(tiny_text_config(max_position_embeddings=2048)).save_pretrained(folder / "language")
    tiny_tokenizer().save_pretrained(folder / "language")
    return {"vision": folder / "vision", "language": folder / "language"}


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
