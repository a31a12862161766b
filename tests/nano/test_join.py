"""A Pheye of new eyes and of what another learnt behind its own."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import ConvNextConfig

from pheye import PheyeForConditionalGeneration, PheyeProcessor
from pheye.nano import join
from pheye.nano.learning.configs import EYES

from tiny import tiny_config, tiny_image, tiny_model, tiny_processor

pytestmark = pytest.mark.once

BRANCH = ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 16], layer_scale_init_value=0.0)


def eyes_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items() if name.split(".")[1] in EYES}


@pytest.fixture
def new_config():
    """Of twice as many blocks and with a branch."""
    return tiny_config(cross_attention_interval=1, high_res_vision_config=BRANCH, high_res_fusion_layers=[1])


def test_new_blocks_and_an_idle_branch_change_next_to_nothing(tmp_path, monkeypatch, new_config):
    old = tiny_model()
    assert old.config.cross_attention_layers == (1, 3) and new_config.cross_attention_layers == (0, 1, 2, 3)
    eyes = eyes_of(PheyeForConditionalGeneration(new_config)) | eyes_of(old)  # a new branch adds nothing yet
    old.save_pretrained(tmp_path / "old")
    tiny_processor().save_pretrained(tmp_path / "old")
    save_file(eyes, tmp_path / "eyes.safetensors")
    monkeypatch.setattr(join, "nano_config", lambda branch: new_config)
    options = ["--model", tmp_path / "old", "--eyes", tmp_path / "eyes.safetensors", "--output", tmp_path / "new"]
    assert join.main(list(map(str, options))) == 0
    new = PheyeForConditionalGeneration.from_pretrained(tmp_path / "new").eval()
    processor = PheyeProcessor.from_pretrained(tmp_path / "new")
    inputs = processor(images=tiny_image(), text="What?", return_tensors="pt")
    assert "high_res_pixel_values" in inputs
    before = old(**tiny_processor()(images=tiny_image(), text="What?", return_tensors="pt")).logits
    after = new(**inputs).logits
    other = new(**processor(images=tiny_image(3), text="What?", return_tensors="pt")).logits
    assert (after - before).std() < 0.1 * (other - after).std()


def test_what_does_not_fit_is_refused(new_config, capsys):
    eyes = eyes_of(PheyeForConditionalGeneration(new_config))
    with pytest.raises(ValueError, match="has no place in the new model"):
        join.joined(tiny_model(cross_attention_reduction=2), eyes, new_config)
    eyes.popitem()
    with pytest.raises(ValueError, match="The eyes lack"):
        join.joined(tiny_model(), eyes, new_config)
