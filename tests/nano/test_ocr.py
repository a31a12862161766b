"""Other readers beside Pheye-nano: what counts as read, what pictures are like, and the command without any reader."""

import json
import math

import pytest
from PIL import Image, ImageDraw

from pheye.common.command import InputError
from pheye.nano import ocr
from pheye.nano.drawing.pictures import Letter, Picture
from pheye.nano.scoring import held_out, readers

pytestmark = pytest.mark.once


def row(answer: str, reference: str = "HOTEL", **others) -> dict:
    known = {"index": 0, "cap_height": 0.03, "pixels": 20, "tilt": 0.0, "contrast": 150.0, "board": True}
    return {**known, "background": "plain", "reference": reference, "answer": answer, **others}


# --- Scores ---


@pytest.mark.parametrize(
    ("answer", "is_read", "is_all", "edits"),
    [
        ("HOTEL\n", True, True, 0),
        ("Hotel!", True, True, 0),
        ("H O T E L\n", True, True, 0),
        ("HO\nTEL", True, True, 0),  # a sign taken for two lines
        ("~ .\n\nHOTEL\n\n|", True, True, 0),  # punctuation is no text
        ("ee HOTEL x\nlii", True, False, 0),
        ("ab\nHO TEL\ncd", True, False, 0),
        ("HOTELS", False, False, 1),
        ("ab H0TEL", False, False, 1),
        ("ab\nHO\nTEL\ncd", False, False, 2),
        ("", False, False, 5),
        ("a big dim mug", False, False, 5),  # no worse than nothing
    ],
)
def test_a_word_is_read_if_it_is_a_word_a_line_or_all_of_the_text(answer, is_read, is_all, edits):
    found = row(answer)
    assert (ocr.is_read(found), ocr.is_all(found), ocr.edits(found)) == (is_read, is_all, edits)


def test_scores_are_shares_of_pictures_and_of_letters():
    rows = [
        row("HOTEL", index=0, cap_height=0.03),
        row("x CAT", "CAT", index=1, cap_height=0.02),
        row("", "DO", index=2, cap_height=0.05),
    ]
    found = ocr.score(rows)
    assert found["read"] == 0.6667 and found["nothing_else"] == 0.3333 and found["character_error"] == 0.2
    assert found["by_tertile"] == {"small": 1, "medium": 1, "large": 0}
    table = "\n".join(ocr.score_table({readers.RAPIDOCR: found}))
    assert "| RapidOCR | 3 | 66.7 (0.0 to 100.0) | 33.3 | 20.0 | 100.0 | 100.0 | 0.0 |" in table


def test_every_group_of_pictures_is_scored_alone():
    rows = [
        row("HOTEL", pixels=15, contrast=119, tilt=0.9, board=False, background="photograph"),
        row("", "CAT", pixels=16, contrast=120, tilt=1.0),
        row("CAT", "CAT", pixels=32, contrast=180, tilt=3.0, background="noise"),
        row("HOTELS", "HOTELS", pixels=31, contrast=179, tilt=2.9),
    ]
    found = ocr.score_groups(rows)
    assert [found[f"height of capitals: {name}"] for name in ocr.GROUPS["height of capitals"][0]] == [
        {"pictures": 1, "read": 1},
        {"pictures": 2, "read": 0.5},
        {"pictures": 1, "read": 1},
    ]
    assert [one["pictures"] for name, one in found.items() if name.startswith("contrast")] == [1, 2, 1]
    assert [one["pictures"] for name, one in found.items() if name.startswith("tilt")] == [1, 2, 1]
    assert found["behind the letters: the background"] == {"pictures": 1, "read": 1}
    assert found["background: plain"] == {"pictures": 2, "read": 0.5} and "background: gradient" not in found
    assert found["letters of the word: 3 or 4"] == {"pictures": 2, "read": 0.5}
    assert found["letters of the word: 5"]["pictures"] == found["letters of the word: 6 or 7"]["pictures"] == 1
    assert "| tilt: 1 to 3 degrees | 2 | 50.0 |" in ocr.group_table({readers.RAPIDOCR: found})


def test_facts_of_a_picture_are_those_of_its_sign():
    image = Image.new("RGB", (200, 100), (250, 0, 0))  # what is away from the word does not count
    ImageDraw.Draw(image).rectangle((40, 30, 119, 79), (40, 40, 40))
    ImageDraw.Draw(image).rectangle((40, 30, 79, 79), (200, 200, 200))
    angle = math.radians(10)

    def turned(x, y):
        return 80 + x * math.cos(angle) - y * math.sin(angle), 55 + x * math.sin(angle) + y * math.cos(angle)

    letters = [
        Letter(character, [turned(x, -10), turned(x + 30, -10), turned(x + 30, 10), turned(x, 10)], 0, 0)
        for character, x in (("O", -30), ("K", 0))
    ]
    drawn = Picture(image, [], ["OK"], letters, 0.2, "plain", [False])
    found = ocr.facts(drawn)
    assert found["tilt"] == pytest.approx(10, abs=0.01)
    assert found["contrast"] == pytest.approx(160, abs=0.5)
    assert found["pixels"] == 20 and found["reference"] == "OK" and found["board"] is False


# --- Pheye-nano's answers ---


def test_answers_of_nano_are_those_about_the_same_pictures(tmp_path):
    def answered(index, kind, reference, **answer):
        return {"id": f"{index}-{kind}", "kind": kind, "reference": reference, **answer}

    lines = [
        answered(0, "sign", "HOTEL", answer="HOTEL"),
        answered(0, "shapes", "two", answer="two"),
        answered(1, "sign", "CAT", error="broken"),
        answered(7, "sign", "MORE", answer="MORE"),  # was not shown to the readers
    ]
    (tmp_path / "answers-full.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [row("", index=0, reader="x"), row("", "CAT", index=1, reader="x")]
    found = ocr.nano_rows(tmp_path, held_out.MAIN, rows)
    assert [(one["index"], one["answer"], one["pixels"]) for one in found] == [(0, "HOTEL", 20), (1, "", 20)]
    assert ocr.nano_rows(tmp_path, held_out.FINE, rows) == []
    with pytest.raises(InputError, match="other pictures"):
        ocr.nano_rows(tmp_path, held_out.MAIN, [row("", "DOG", index=1)])


# --- The command ---


@pytest.fixture
def seen(monkeypatch) -> list:
    """Two readers, of which one knows every word and the other none; their names, in the order of reading."""
    seen, shown = [], []

    def draw(index, letters=held_out.MAIN):
        shown[:] = [held_out.draw(index, letters=letters)]
        return shown[0]

    def open_reader(name, threads):
        def read(image):
            seen.append(name)
            return f"noise\n{shown[0].signs[0].lower()}\n" if name == "rapidocr" else ""

        return read

    monkeypatch.setattr(ocr, "draw", draw)
    monkeypatch.setattr(ocr, "installed", lambda: ["tesseract-11", "rapidocr"])
    monkeypatch.setattr(ocr, "reader_versions", lambda names: {"Reader": "1.0"})
    monkeypatch.setattr(ocr, "open_reader", open_reader)
    monkeypatch.setattr(ocr, "megabytes", lambda name, model: (4.1, None))
    return seen


def test_the_command_writes_tables_and_goes_on_where_it_stopped(seen, tmp_path):
    command = ["--output", str(tmp_path), "--count", "3", "--fine", "4", "--timed", "0"]
    assert ocr.main(command) == 0
    assert seen == ["tesseract-11", "rapidocr"] * 7
    result = json.loads((tmp_path / "ocr.json").read_text())
    scores = {name: {one: found[one]["scores"] for one in found} for name, found in result["sets"].items()}
    assert scores["main"]["rapidocr"]["read"] == 1 and scores["main"]["rapidocr"]["nothing_else"] == 0
    assert scores["fine"]["tesseract-11"]["read"] == 0 and scores["fine"]["tesseract-11"]["pictures"] == 4
    text = (tmp_path / "nano-ocr.md").read_text()
    assert "| RapidOCR | 3 | 100.0 (100.0 to 100.0) | 0.0 | 0.0 |" in text and "## Costs" not in text
    assert "Letters of 1.3 to 2.5 % of the height" in text
    assert ocr.main(command) == 0 and len(seen) == 14
    more = ["--output", str(tmp_path), "--count", "4", "--fine", "4", "--timed", "2"]
    assert ocr.main(more) == 0
    assert seen[14:16] == ["tesseract-11", "rapidocr"]  # the fourth picture; the rest is for the seconds
    assert len(seen) == 16 + 2 * len(readers.THREADS) * (1 + 2 * readers.REPEATS)
    assert "| RapidOCR | 4 | 100.0" in (tmp_path / "nano-ocr.md").read_text()
    assert "| 4 |  |" in (tmp_path / "nano-ocr.md").read_text()  # megabytes
    assert ocr.main(more) == 0 and len(seen) == 16 + 2 * len(readers.THREADS) * (1 + 2 * readers.REPEATS)
    assert ocr.main(command) == 0
    assert "| RapidOCR | 3 | 100.0" in (tmp_path / "nano-ocr.md").read_text()


def test_what_is_missing_is_told(tmp_path, monkeypatch, capsys, seen):
    assert ocr.main(["--output", str(tmp_path / "out"), "--nano", str(tmp_path)]) == 1
    assert "nano.json" in capsys.readouterr().err
    monkeypatch.setattr(ocr, "installed", lambda: [])
    assert ocr.main(["--output", str(tmp_path / "out")]) == 1
    assert "apt-get install tesseract-ocr" in capsys.readouterr().err
