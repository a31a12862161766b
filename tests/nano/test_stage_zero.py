"""Pre-training of both frozen parts of Pheye-nano, shortened: what comes out loads, and a run goes on as it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPVisionModel

from pheye import PheyeForConditionalGeneration, PheyeProcessor
from pheye.nano import language, vision

pytestmark = pytest.mark.once


def drawn_here(indices, seed, held_out, workers, ahead, together=1):
    """Without other processes, which would not know of the small batches."""
    return [tuple(map(torch.from_numpy, vision.batch(index, seed, held_out))) for index in indices[:4]]


def parameters(folder, kind) -> dict[str, torch.Tensor]:
    return dict(kind.from_pretrained(folder).named_parameters())


@pytest.mark.parametrize("part", ["vision", "language"])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(part, small, tmp_path, monkeypatch):
    module, kind = {"vision": (vision, CLIPVisionModel), "language": (language, AutoModelForCausalLM)}[part]
    monkeypatch.setattr(module, "SAVE_EVERY", 2)
    monkeypatch.setattr(vision, "drawn", drawn_here)
    module.train(tmp_path / "whole", 4)
    save = module.save_checkpoint

    def save_and_stop(output, model, optimizers, step):
        save(output, model, optimizers, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            module.train(tmp_path / "stopped", 4)
    assert not (tmp_path / "stopped" / part).exists()
    module.train(tmp_path / "stopped", 4)
    whole, stopped = (parameters(tmp_path / run / part, kind) for run in ("whole", "stopped"))
    for name, parameter in whole.items():
        assert torch.equal(parameter, stopped[name]), name
    assert json.loads((tmp_path / "stopped" / "log.jsonl").read_text().splitlines()[-1])["step"] == 4
    with pytest.raises(ValueError, match="other settings: seed was 0 and is now 1"):
        module.train(tmp_path / "stopped", 4, seed=1)


def test_both_parts_become_a_pheye_by_the_documented_command(small, tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "drawn", drawn_here)
    vision.train(tmp_path / "vision", 1)
    language.train(tmp_path / "language", 1)
    parts = ["--vision", tmp_path / "vision" / "vision", "--language_model", tmp_path / "language" / "language"]
    example = Path(__file__).parent.parent.parent / "examples" / "new_model.py"
    subprocess.run([sys.executable, example, *parts, "--output", tmp_path / "base", "--interval", "2"], check=True)
    model = PheyeForConditionalGeneration.from_pretrained(tmp_path / "base")
    processor = PheyeProcessor.from_pretrained(tmp_path / "base")
    assert model.config.views_per_image == 10 and model.config.cross_attention_layers == (1, 3)
    assert tuple(processor.image_processor.image_mean) == tuple(vision.OPENAI_CLIP_MEAN)
    assert processor.tokenizer.eos_token_id == model.config.text_config.eos_token_id
    assert len(processor.tokenizer) <= model.config.vocab_size
