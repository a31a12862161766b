"""The table of ways with and without a branch, from answers of which one knows what comes out."""

import json

import pytest

from pheye.nano import branches
from pheye.nano.held_out import SIGN

pytestmark = pytest.mark.once


def write(folder, reads, count=40, **fields):
    """Answers of a way that reads the words for whose number and crossing `reads` holds."""
    folder.mkdir()
    rows = []
    for number in range(count):
        crosses = number % 2 == 0
        answer = "WORD" if reads(number, crosses) else "WORT"
        row = {"id": f"{number:02}-{SIGN}", "kind": SIGN, "reference": "WORD", "answer": answer, "crosses": crosses}
        rows.append({**row, "tertile": ("small", "medium", "large")[number % 3], **fields})
    rows.append({"id": "00-shapes", "kind": "shapes", "reference": "two", "answer": "one"})
    (folder / "answers-full.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_the_table_says_where_the_branch_reads_better(tmp_path, capsys):
    inside = [write(tmp_path / f"{name}{seed}", lambda _, crosses: not crosses) for name in "tn" for seed in (0, 1)]
    whole = [write(tmp_path / "w0", lambda *_: True), write(tmp_path / "w1", lambda number, _: number < 20)]
    options = ["--whole", *whole, "--tiles", *inside[:2], "--none", *inside[2:], "--output", str(tmp_path / "out")]
    assert branches.main(options) == 0
    text = (tmp_path / "out" / "branches.md").read_text()
    assert "2 seeds; 40 held-out pictures, in 20 of which" in text
    lines = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in text.splitlines() if "|" in line
    }
    whole_way, none = lines["branch, sees the whole picture"], lines["no branch"]
    assert whole_way[1].startswith("75.0 (") and whole_way[2].startswith("75.0 (")
    assert none[1:5] == ["0.0 (0.0 to 0.0)", "100.0 (100.0 to 100.0)", "25.0", "0.0"]
    assert whole_way[3:5] == ["6.2", "6.2"]  # a quarter of the words has one of four letters wrong
    _, across, inside, both = lines["branch, sees the whole picture, less no branch"]
    assert across.startswith("75.0 (") and inside.startswith("-25.0 (") and both.startswith("100.0 (")


def test_folders_that_cannot_be_compared_are_refused(tmp_path, capsys):
    good = write(tmp_path / "good", lambda *_: True)
    cases = {
        "has no answers-full": str(tmp_path),
        "other pictures": write(tmp_path / "few", lambda *_: True, count=9),
    }
    for message, folder in cases.items():
        options = ["--whole", good, "--tiles", folder, "--none", good, "--output", str(tmp_path / "out")]
        assert branches.main(options) != 0
        assert message in capsys.readouterr().err
    path = tmp_path / "good" / "answers-full.jsonl"
    path.write_text(path.read_text().replace('"crosses"', '"other"'))
    with pytest.raises(ValueError, match="does not say which words a border crosses"):
        branches.rows_of(tmp_path / "good")
