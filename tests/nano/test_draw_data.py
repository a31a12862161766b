"""Data sets of drawn pictures with questions."""

import json

import pytest

from pheye.nano import draw_data
from pheye.training.formats import Source
from pheye.training.mixture import Mixture

pytestmark = pytest.mark.once


@pytest.mark.parametrize("stage", ["describe", "instruct", "tasks"])
def test_a_data_set_is_written_once_and_read_by_the_training_command(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(draw_data, "PICTURES_PER_CHUNK", 2)
    path = draw_data.write_data(tmp_path, stage, 3, workers=1)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.glob("images/*/*.jpg")}
    assert len(written) == 3
    assert draw_data.write_data(tmp_path, stage, 3, workers=1) == path
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("images/*/*.jpg")} == written
    for other in ({"count": 5}, {"count": 3, "seed": 1}):  # the last chunk would be short; the pictures old ones
        with pytest.raises(ValueError, match="other settings"):
            draw_data.write_data(tmp_path, stage, workers=1, **other)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"{stage}-{index}" for index in range(3)]
    mixed = Mixture([Source(str(path), turns=None)], 0)
    assert len(mixed) == 3
    for sample in (mixed[index] for index in range(3)):
        assert sample["images"][0].endswith(".jpg") and sample["messages"][-1]["role"] == "assistant"
