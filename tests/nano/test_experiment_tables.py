"""The report of `nano.experiments`, of made-up runs."""

import json

import pytest

from pheye.nano.comparing.experiment_tables import write_report
from pheye.nano.comparing.ways import WAYS
from pheye.nano.scoring.held_out import scores

WORDS = "CAB", "DOG", "FOX", "BEE", "COW", "HEN"
SETTINGS = {
    "start": None,
    "parts": "nano-runs/parts",
    "initializer_range": 0.04,
    "data": "nano-runs/one/data.jsonl",
    "steps": None,
    "minutes": 1.5,
    "score_every": 10,
    "keep_features": True,
    **{"batch_size": 32, "rate": 0.001, "lora_sets": 0, "count": len(WORDS), "tiles_per_side": 1},
}


def run_of(output, way: str, seed: int, right: int, steps: int) -> dict:
    """A run that read the first `right` words, and none of the shapes; at each score as many characters were wrong as
    steps were left."""
    rows = []
    for place, word in enumerate(WORDS):
        tertile = ("small", "medium", "large")[place % 3]
        fields = {"tertile": tertile, "answer": word if place < right else ""}
        rows.append({"id": f"{place}-sign", "kind": "sign", "question": "", "reference": word, **fields})
        rows.append({**rows[-1], "id": f"{place}-shapes", "kind": "shapes", "reference": "yes"})
    folder = output / f"{way}-{seed}"
    folder.mkdir()
    (folder / "answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    taken = [*range(10, steps, 10), steps]
    curve = [{"step": step, "seconds": step, "loss": 1.0, "character_error": (steps - step) / 100} for step in taken]
    costs = {"parameters": 1234, "keys": 514, "loss": 0.5, "seconds_per_step": 1.25, "seconds_per_question": 0.5}
    return {
        "way": way,
        "seed": seed,
        "settings": SETTINGS,
        "steps": steps,
        "curve": curve,
        "scores": scores(rows),
    } | costs


@pytest.fixture
def tables(tmp_path) -> list[list[list[str]]]:
    """The cells of the report's three tables, without their heads."""
    results = [
        run_of(tmp_path, way, seed, right, steps)
        for seed in (0, 1)
        for way, right, steps in (("full", 6 - seed, 30), ("fromage", 2, 25 - 10 * seed))
    ]
    write_report(results, tmp_path, "cpu", curve_pictures=50)
    report = (tmp_path / "experiments.md").read_text()
    assert "steps for 1.5 minutes of 32 samples of one/data.jsonl" in report and "were kept" in report
    assert "of the first 6 pictures" in report and "an initializer_range of 0.04" in report
    assert (tmp_path / "experiments.png").stat().st_size > 1000
    blocks = [block.splitlines() for block in report.split("\n\n") if block.startswith("| way")]
    return [[line.strip("|").split("|") for line in block[2:]] for block in blocks]


def test_a_score_is_the_mean_of_the_seeds_and_each_is_given(tables):
    full, fromage = ([cell.strip() for cell in row] for row in tables[0])
    assert full[:4] == [WAYS["full"].title, "2", "1,234", "514"]
    assert full[4].startswith("91.7 (") and full[5] == "100.0, 83.3" and full[6] == "100.0, 100.0, 75.0"
    assert full[7] == "8.3" and full[8] == "0.0 (0.0 to 45.9)" and full[9:] == ["0.50", "30", "1.25", "0.50"]
    assert fromage[4].startswith("33.3 (") and fromage[10] == "20"


def test_differences_are_of_the_same_pictures(tables):
    [[way, signs, shapes]] = tables[1]
    assert way.strip() == WAYS["fromage"].title and shapes.strip() == "0.0 (0.0 to 0.0)"
    assert signs.strip().startswith("-58.3 (")  # of 6 words: 2 read in both, 3 in the first way alone, 1 in half of it


def test_curves_have_the_points_that_all_seeds_reached(tables):
    full, fromage = ([cell.strip() for cell in row][1:] for row in tables[2])
    assert full == ["20.0", "10.0", "0.0", "0.0"]
    assert fromage == ["10.0", "", "", "0.0"]  # 25 and 15 steps
