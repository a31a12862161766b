"""The evaluation of Pheye-nano from end to end."""

import json

import pytest
import torch
from PIL import Image

from pheye.nano import evaluate
from pheye.nano.held_out import SHAPES, SIGN

from tiny import tiny_model, tiny_processor

pytestmark = pytest.mark.once


def test_the_table_gives_shares_in_percent():
    signs = {"questions": 3, "exact": 0.3333, "interval": [0.0, 1.0], "character_error": 0.3077}
    shapes = {"questions": 2, "exact": 0.5, "interval": [0.0, 1.0], "character_error": 0.4}
    assert evaluate.scores_table({SIGN: signs, SHAPES: shapes})[2:] == [
        "| what is written on the sign | 3 | 33.3 % (0.0 to 100.0) | 30.8 % |",
        "| shapes, all questions | 2 | 50.0 % (0.0 to 100.0) |  |",
    ]


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
