"""A run's folder is taken once, for one set of settings."""

import pytest

from pheye.common.command import InputError
from pheye.nano.checkpoints import claim

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
