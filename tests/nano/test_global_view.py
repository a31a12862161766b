"""The global view learns to count: only its LoRA changes, and it sees what it sees among all views."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pheye.nano import eyes, global_view
from pheye.nano.learning import probes
from pheye.nano.learning.picture_labels import HEADS

from tiny import randomize
from toy_eyes import toy_config

pytestmark = pytest.mark.once


@pytest.fixture
def toy(monkeypatch):
    """Small eyes and pictures; LoRA learns from the first step on."""
    monkeypatch.setattr(global_view, "nano_config", toy_config)
    monkeypatch.setattr(global_view, "SIZES", (300, 320))
    monkeypatch.setattr(global_view, "TEST_PICTURES", 3)
    monkeypatch.setattr(global_view, "ALONE", 0)
    monkeypatch.setattr(global_view, "learning_rate_share", lambda *_: 1.0)


def begun(folder, branch: str = "whole"):
    model = randomize(probes.Eyes(toy_config(branch)))
    save_file(model.parts(), folder / "start.safetensors")
    return folder / "start.safetensors", model


@torch.no_grad()
def test_the_global_view_alone_is_seen_as_among_all_views(toy, tmp_path):
    _, model = begun(tmp_path)
    model.pheye.config.lora_dropout = 0.0
    pictures = [eyes.Drawn(0, eyes.HARD)[index] for index in range(2)]
    views, tiles = (torch.stack([torch.from_numpy(one[number]) for one in pictures]) for number in range(2))
    views, tiles = probes.towers_pixels(views, tiles)
    _, labels, counts = model(views, tiles)
    found = global_view.logits_of(model, views[:, :1], tiles)
    torch.testing.assert_close(found[0], labels[::10], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1][:, 0], counts[::10], rtol=1e-4, atol=1e-4)


def test_patches_with_a_shape_are_asked_for_all_counts():
    of_counts = torch.randn(2, 5, 4, 6)
    maps = torch.zeros(2, len(HEADS), 2, 2, dtype=torch.uint8)
    maps[1, list(HEADS).index("shape"), 0, 1] = 7
    counts = torch.tensor([[0, 0, 0, 0], [1, 0, 2, 5]])
    found = global_view.counts_of(of_counts, maps, counts)
    assert torch.equal(found["count"][0], of_counts[:, 0].reshape(8, 6))
    assert found["count"][1].tolist() == [0, 0, 0, 0, 1, 0, 2, 5]
    assert torch.equal(found["patch_count"][0], of_counts[1, 2]) and found["patch_count"][1].tolist() == [1, 0, 2, 5]


def test_only_its_lora_changes(toy, tmp_path):
    start, _ = begun(tmp_path)
    command = ["--start", start, "--output", tmp_path / "out", "--together", "2", "--device", "cpu"]
    command += ["--minutes", "1e-9"]
    for steps in (1, 2):  # the second goes on
        assert global_view.main([str(word) for word in command]) == 0
        *_, entry = map(json.loads, (tmp_path / "out" / "log.jsonl").read_text().splitlines())
        assert entry["step"] == steps and entry["pictures"] == 2 * steps and 0 <= entry["count_0"] <= 1
        assert any(name.startswith("patch_count_") for name in entry)
    before, after = load_file(start), load_file(tmp_path / "out" / probes.WEIGHTS)
    assert before.keys() == after.keys()
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name].bfloat16(), after[name])}
    assert changed == {"global_lora"}


def test_eyes_without_a_branch_are_refused(toy, tmp_path, capsys):
    start, _ = begun(tmp_path, "none")
    assert global_view.main(["--start", str(start), "--output", str(tmp_path / "out"), "--minutes", "1"]) == 1
    assert "has no branch; give the weights of a Pheye-nano that has one" in capsys.readouterr().err
