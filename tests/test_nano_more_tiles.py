"""A Pheye of one crop becomes one of many."""

import subprocess
import sys

import torch

from pheye import PheyeForConditionalGeneration, PheyeProcessor
from pheye.training.nano.more_tiles import SPREAD, more_tiles

from tiny import tiny_config, tiny_image, tiny_model, tiny_processor


def test_weights_stay_and_new_crops_can_be_told_apart():
    before = tiny_model(tiles_per_side=1)
    after = more_tiles(before, 3, with_lora=True)
    old, new = before.state_dict(), after.state_dict()
    vectors = "pheye.view_encoding.view_embedding.weight"
    assert old.keys() == new.keys() and len(new[vectors]) == 10
    assert all(torch.equal(old[name], new[name]) for name in old if name != vectors)
    assert torch.equal(new[vectors][0], old[vectors][0])
    moved = (new[vectors][1:] - old[vectors][1]).unflatten(0, (3, 3))  # rows, columns
    assert torch.pdist(moved.flatten(0, 1)).min() > SPREAD
    torch.testing.assert_close(moved.mean((0, 1)), torch.zeros(moved.shape[-1]))
    torch.testing.assert_close(moved[0] - moved[1], (moved[0, :1] - moved[1, :1]).expand(3, -1))


def test_new_lora_changes_nothing_until_it_has_learnt():
    before = tiny_model(tiles_per_side=2, global_lora_rank=0, local_lora_rank=0)
    after = more_tiles(before, 2, with_lora=True)
    assert not any("_lora." in name for name in before.state_dict())
    assert any("local_lora." in name for name in after.state_dict())
    inputs = tiny_processor()(images=tiny_image(), text="What?", return_tensors="pt")
    torch.testing.assert_close(after(**inputs).logits, before(**inputs).logits)


def test_the_command_makes_a_folder_that_answers(tmp_path):
    tiny_model(tiles_per_side=1).save_pretrained(tmp_path / "one")
    tiny_processor(tiny_config(tiles_per_side=1)).save_pretrained(tmp_path / "one")
    command = [sys.executable, "-m", "pheye.training.nano.more_tiles", "--model", tmp_path / "one"]
    subprocess.run([*command, "--output", tmp_path / "nine", "--lora"], check=True)
    model = PheyeForConditionalGeneration.from_pretrained(tmp_path / "nine")
    inputs = PheyeProcessor.from_pretrained(tmp_path / "nine")(images=tiny_image(), text="What?", return_tensors="pt")
    assert inputs["pixel_values"].shape[1] == 10
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
