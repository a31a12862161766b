"""The command that makes a Pheye of one crop one of many."""

import subprocess
import sys

import pytest

from pheye import PheyeForConditionalGeneration, PheyeProcessor

from tiny import tiny_config, tiny_image, tiny_model, tiny_processor

pytestmark = pytest.mark.once


def test_the_command_makes_a_folder_that_answers(tmp_path):
    tiny_model(tiles_per_side=1).save_pretrained(tmp_path / "one")
    tiny_processor(tiny_config(tiles_per_side=1)).save_pretrained(tmp_path / "one")
    command = [sys.executable, "-m", "pheye.nano.more_tiles", "--model", tmp_path / "one"]
    subprocess.run([*command, "--output", tmp_path / "nine", "--lora"], check=True)
    model = PheyeForConditionalGeneration.from_pretrained(tmp_path / "nine")
    inputs = PheyeProcessor.from_pretrained(tmp_path / "nine")(images=tiny_image(), text="What?", return_tensors="pt")
    assert inputs["pixel_values"].shape[1] == 10
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
