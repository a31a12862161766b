"""The evaluation of Pheye-nano from end to end."""

import json

import pytest
import torch
from PIL import Image

from pheye.nano import evaluate
from pheye.nano.scoring.held_out import FINE, MAIN, SHAPES, SIGN

from tiny import tiny_config, tiny_model, tiny_processor

pytestmark = pytest.mark.once


def test_the_table_gives_shares_in_percent():
    signs = {"questions": 3, "exact": 0.3333, "interval": [0.0, 1.0], "character_error": 0.3077}
    shapes = {"questions": 2, "exact": 0.5, "interval": [0.0, 1.0], "character_error": 0.4}
    assert evaluate.scores_table({SIGN: signs, SHAPES: shapes})[2:] == [
        "| what is written on the sign | 3 | 33.3 % (0.0 to 100.0) | 30.8 % |",
        "| shapes, all questions | 2 | 50.0 % (0.0 to 100.0) |  |",
    ]


def test_what_is_kept_of_a_reduced_picture_stands_beside_it():
    signs = {"exact": 0.5, "interval": [0.4, 0.6], "character_error": 0.25}
    found = {SIGN: signs, "by_tertile": {name: {"exact": 0.5} for name in ("small", "medium", "large")}}
    reduced = {**found, "kept": {"share": 0.3, "interval": [0.2, 0.41]}}
    assert evaluate.resolution_table({"full": found, "reduced to 224": reduced})[2:] == [
        "| full | 50.0 (40.0 to 60.0) | 50.0 | 50.0 | 50.0 | 25.0 |  |",
        "| reduced to 224 | 50.0 (40.0 to 60.0) | 50.0 | 50.0 | 50.0 | 25.0 | 30.0 (20.0 to 41.0) |",
    ]


def test_the_table_of_borders_leaves_empty_what_was_not_compared():
    across = {"words": 2, "exact": 0.5, "paired": 0.5, "paired_height": 0.0345}
    inside = {"words": 4, "exact": 1.0, "paired": 1.0, "paired_height": 0.0344}
    found = {"across": across, "inside": inside, "pairs": 2, "difference": {"share": -0.5, "interval": [-1.0, 0.0]}}
    none = {"across": {"words": 0, "exact": None}, "inside": {"words": 4, "exact": 1.0}, "pairs": 0}
    assert evaluate.border_table({MAIN: found, FINE: none})[2:] == [
        "| 2.5 to 6.0 % | 50.0 of 2 | 100.0 of 4 | 2 | 50.0 | 100.0 | -50.0 (-100.0 to 0.0) | 3.45 | 3.44 |",
        "| 1.3 to 2.5 % |  | 100.0 of 4 | 0 |  |  |  |  |  |",
    ]


def test_borders_are_those_that_all_pictures_share():
    assert evaluate.tiles_with_borders(tiny_config(tiles_per_side=3)) == 3
    assert evaluate.tiles_with_borders(tiny_config(tiles_per_side=1)) is None
    assert evaluate.tiles_with_borders(tiny_config(canvases=[[1, 2], [2, 1]])) is None


def test_the_command_writes_tables_and_plot_and_goes_on_where_it_stopped(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    command = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    command += ["--count", "3", "--fine", "4", "--reduced", "64", "--batch_size", "2", "--workers", "0"]
    assert evaluate.main(command) == 0
    result = json.loads((tmp_path / "out" / "nano.json").read_text())
    assert result["inputs"].keys() == {"full", "reduced to 64"} and result["pictures"] == 3
    assert result["inputs"]["full"][SIGN]["questions"] == result["inputs"]["full"][SHAPES]["questions"] == 3
    assert [len(group["global_share"]) for group in result["attention"]["tertiles"]] == [2, 2, 2]
    assert [found[SIGN]["questions"] for found in result["fine"]["inputs"].values()] == [4, 4]
    assert SHAPES not in result["fine"]["inputs"]["full"]
    borders = result["borders"]["sets"]
    assert [borders[name]["across"]["words"] + borders[name]["inside"]["words"] for name in borders] == [3, 4]
    text = (tmp_path / "out" / "nano.md").read_text()
    assert "## Fine letters\n\n4 other pictures" in text and "of the 2 x 2 crops" in text
    assert "reduced to 64" in text and "| what is written on the sign | 3 |" in text
    assert Image.open(tmp_path / "out" / "nano.png").width > 500
    answers = tmp_path / "out" / "answers-full.jsonl"
    written = answers.stat().st_mtime_ns
    assert evaluate.main(command) == 0
    assert answers.stat().st_mtime_ns == written
    changed = tiny_model()
    with torch.no_grad():
        next(changed.parameters()).add_(1)
    changed.save_pretrained(tmp_path / "model")
    assert evaluate.main(command) == 1
    assert "files of the model was" in capsys.readouterr().err
    assert answers.stat().st_mtime_ns == written
