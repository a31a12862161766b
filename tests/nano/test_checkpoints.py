"""A run's folder is taken once, for one set of settings."""

import pytest
import torch

from pheye.common.command import InputError
from pheye.nano.learning.checkpoints import claim, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.once


def test_a_folder_goes_on_with_the_same_settings_only(tmp_path):
    folder = tmp_path / "run"
    claim(folder, start=tmp_path / "start", seed=0)
    written = (folder / "run.json").read_bytes()
    claim(folder, start=tmp_path / "start", seed=0)
    assert (folder / "run.json").read_bytes() == written
    with pytest.raises(InputError, match="other settings: seed was 0 and is now 1"):
        claim(folder, start=tmp_path / "start", seed=1)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        claim(tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_that_began_on_a_gpu_goes_on_without_one(tmp_path, monkeypatch):
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        save_checkpoint(tmp_path, model, [], 7)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert load_checkpoint(tmp_path, other, []) == 7
    assert torch.equal(model.weight, other.weight)
