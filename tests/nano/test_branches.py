"""Ways with and without a branch: trained and asked, and the tables of answers of which one knows what comes out."""

import json
from pathlib import Path

import pytest
import torch

from pheye import PheyeForConditionalGeneration, PheyeProcessor
from pheye.nano import branches, draw_data, eyes
from pheye.nano.learning import kept_training
from pheye.nano.scoring.held_out import FINE, MAIN, SIGN

pytestmark = pytest.mark.once

NANO = Path(__file__).parents[2] / "checkpoints" / "pheye-nano"


def rows(reads, count=40, letters=MAIN):
    """Answers of a way that reads the words for whose number and crossing `reads` holds."""
    found = []
    for number in range(count):
        crosses = number % 2 == 0
        answer = "WORD" if reads(number, crosses) else "WORT"
        row = {"id": f"{number}-{SIGN}", "kind": SIGN, "reference": "WORD", "answer": answer, "crosses": crosses}
        found.append({**row, "letters": letters, "tertile": ("small", "medium", "large")[number % 3]})
    return found


def result(reads, minutes=(1.0, 2.0)):
    known = {"across": 0.5, "inside": 0.75}
    answers = rows(reads) + rows(reads, 10, FINE)
    found = {"rows": answers, "minutes": minutes, "steps": [40, 20], "seconds_per_question": 0.25}
    return {**found, "parameters": 7_000, "eyes": known}


def cells(lines: list[str]) -> dict[str, list[str]]:
    """Cells of a table by the first of their line."""
    split = [line.strip("| ").split(" | ") for line in lines]
    return {first: others for first, *others in split}


def test_the_tables_say_where_the_branch_reads_better():
    whole = [result(lambda *_: True), result(lambda number, _: number < 20, (3.0, 4.0))]
    inside = [result(lambda _, crosses: not crosses)] * 2
    ways = {"whole": whole, "tiles": inside, "none": inside, "longer": inside}
    words = cells(branches.words_table(ways))
    of_whole, of_none = words["branch, sees the whole picture"], words["no branch"]
    assert [cell.split(" (")[0] for cell in of_whole[:3]] == ["75.0", "75.0", "100.0"]
    assert of_whole[3:5] == ["6.2", "6.2"]  # a quarter of the words has one of four letters wrong
    assert of_none[:2] == ["0.0 (0.0 to 0.0)", "100.0 (100.0 to 100.0)"] and of_none[3:5] == ["25.0", "0.0"]
    assert of_none[5:] == ["0.0"] * 3 + ["100.0"] * 3
    gain = cells(branches.differences_table(ways))["branch, sees the whole picture, less no branch"]
    assert [cell.split(" (")[0] for cell in gain] == ["75.0", "-25.0", "100.0", "50.0"]
    costs = cells(branches.costs_table(ways))["branch, sees the whole picture"]
    assert costs == ["7,000", "2", "3.00", "3", "9.00", "0.25", "50.0", "75.0"]


def test_what_is_spent_is_the_sum_of_all_that_a_killed_run_took(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"minutes": one}) + "\n" for one in (2.0, 4.5, 4.5, 1.0, 3.0)))
    assert branches.spent(log, "minutes") == 7.5


@pytest.fixture
def few_pictures(monkeypatch):
    """Eyes are tested on three pictures."""
    monkeypatch.setattr(eyes, "TEST_PICTURES", 3)
    eyes.test_pictures.cache_clear()
    yield
    eyes.test_pictures.cache_clear()


@pytest.mark.slow
def test_a_way_is_trained_and_asked_once(tmp_path, monkeypatch, capsys):
    start = tmp_path / "start"  # Pheye-nano without its branch
    fields = {"high_res_vision_config": None, "high_res_fusion_layers": None, "dtype": torch.float32}
    PheyeForConditionalGeneration.from_pretrained(NANO, **fields).save_pretrained(start)
    PheyeProcessor.from_pretrained(NANO, high_res_tile_size=None).save_pretrained(start)
    draw_data.write_data(tmp_path / "data", "tasks", 8, workers=1)
    monkeypatch.setattr(kept_training, "TOKENS", 2)
    output = tmp_path / "out"
    command = ["--model", start, "--data", tmp_path / "data" / "data.jsonl", "--output", output, "--ways", "none"]
    command += ["--pictures", 1, "--rounds", 1, "--seeds", 1, "--count", 8, "--fine", 3]
    command = [str(word) for word in command]
    assert branches.main(command) == 0
    answered = [json.loads(line) for line in (output / "none-0" / "answers.jsonl").open()]
    assert [row["letters"] for row in answered] == [MAIN] * 8 + [FINE] * 3
    assert not (output / "none-0" / "asked").exists()  # gigabytes, of a whole run
    text = (output / "branches.md").read_text()
    assert text.count("| no branch |") == 2 and "(not run)" in text
    monkeypatch.setattr(branches, "begin", None)
    assert branches.main(command) == 0 and (output / "branches.md").read_text() == text
    assert branches.main([*command, "--rounds", "2"]) == 1
    assert "other settings" in capsys.readouterr().err


def test_eyes_that_have_seen_all_pictures_learn_no_more(tmp_path, few_pictures):
    eyes.train(tmp_path / "run", pictures=1, branch="none")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    eyes.train(tmp_path / "run", pictures=1, branch="none")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
