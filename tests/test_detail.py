"""Two results compared by the size of the answer's box."""

import json

import pytest
from matplotlib.figure import Figure
from PIL import Image

from pheye.common.command import InputError
from pheye.evaluation.boxes import read_boxes
from pheye.evaluation.detail import (
    NO_CHANGE,
    compare,
    main,
    markdown,
    plot_change,
    read_questions,
    read_results,
    relative_change,
)

from toy_boxes import flat_boxes, ocr_word, rows_of, write

pytestmark = pytest.mark.once


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no file .*none\.jsonl"):
        read_boxes(tmp_path / "none.jsonl")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(InputError, match="no text file"):
        read_boxes(tmp_path / "image.png")
    with pytest.raises(InputError, match="no `id`"):
        read_results(write(tmp_path / "rows.jsonl", {"score": 1}))
    with pytest.raises(InputError, match="no question file"):
        read_questions(write(tmp_path / "questions.json", '{"questions": []}'))


def test_comparison_takes_the_samples_that_both_results_have(tmp_path):
    boxes = read_boxes(flat_boxes(tmp_path / "boxes.jsonl", {key: area / 10 for area, key in enumerate("abcdef")}))
    before = rows_of({"a": 0.5, "b": 0.3, "c": 1, "d": 0, "e": 0, "f": 0, "g": 1, "only before": 1})
    after = rows_of({"f": 1, "e": 1, "d": 0.5, "c": 0, "b": 0.9, "a": 0.5, "g": 1})
    result = compare(before, after, boxes)
    assert [group["accuracy"] for group in result["tertiles"]] == [0.4, 0.5, 0]
    assert [group["accuracy_after"] for group in result["tertiles"]] == [0.7, 0.25, 1]
    assert [group["change"] for group in result["tertiles"]] == [pytest.approx(75), -50, None]
    assert (result["left_out"], result["in_one_only"]) == (1, 1)
    assert markdown(result, ("A|x", "B")).splitlines() == [
        "| answer's box | samples | box / image | A\\|x | B | relative change |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| small | 2 | 0 % to 10 % | 40.0 | 70.0 | +75.0 % |",
        "| medium | 2 | 20 % to 30 % | 50.0 | 25.0 | -50.0 % |",
        "| large | 2 | 40 % to 50 % | 0.0 | 100.0 | - |",
    ]


def test_relative_change_is_of_the_first_result():
    assert relative_change(0.4, 0.5) == pytest.approx(25)
    assert relative_change(0.5, 0.4) == pytest.approx(-20)
    assert relative_change(0, 0.4) is None


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (rows_of({"x": 1}), rows_of({"y": 1}), "no id in common: they begin with 'x' and 'y'"),
        (rows_of({"x": 1}), rows_of({"x": 1}), "0 of 1 ids.*begin with x, those of the boxes with a"),
        (rows_of({"a": 1, "b": 1}), rows_of({"a": 1, "b": 1}), "2 samples have an area"),
        ([{"id": "a", "answer": "cat"}], rows_of({"a": 1}), "'a' in the first result has no score"),
        (rows_of({"a": 1}), rows_of({"a": float("nan")}), "the second result has no score"),
        (rows_of({"a": 1}) * 2, rows_of({"a": 1}), "several rows of 'a'"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(tmp_path, before, after, message):
    boxes = read_boxes(flat_boxes(tmp_path / "boxes.jsonl", {"a": 0.1, "b": 0.2, "c": 0.3}))
    with pytest.raises(InputError, match=message):
        compare(before, after, boxes)


def test_command_writes_table_and_plot(tmp_path, capsys):
    for name, scores in (("x4-448", {1: 0.5, 2: 0.5, 3: 1, 4: 1}), ("x4-672", {1: 1, 2: 0.6, 3: 1, 4: 1})):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "rows.jsonl", *rows_of(scores))
    boxes = flat_boxes(tmp_path / "boxes.jsonl", {1: 0.1, 2: 0.2, 3: 0.3})
    outputs = [tmp_path / "out" / "table.md", tmp_path / "out" / "plot.png"]
    arguments = [tmp_path / "x4-448", tmp_path / "x4-672" / "rows.jsonl", "--boxes", boxes, "--output", *outputs]
    assert main(list(map(str, arguments))) == 0
    printed = capsys.readouterr()
    assert "| small | 1 | 10 % to 10 % | 50.0 | 100.0 | +100.0 % |" in printed.out
    assert "1 samples have no box" in printed.err
    assert outputs[0].read_text() == printed.out
    assert Image.open(outputs[1]).size[0] > 300
    arguments[1] = tmp_path / "x4-672"
    assert main(list(map(str, arguments))) == 0
    assert "| x4-448 | x4-672 | relative change |" in capsys.readouterr().out


def test_command_looks_images_up_in_the_question_file(tmp_path, capsys):
    words = {"one": 0.1, "two": 0.2, "three": 0.3}
    data = [{"image_id": "abc", "ocr_info": [ocr_word(word, side, side) for word, side in words.items()]}]
    (tmp_path / "ocr.json").write_text(json.dumps({"data": data}))
    questions = [
        {"question_id": number, "image_id": "abc", "question": "?", "answers": [word] * 10}
        for number, word in enumerate(words)
    ]
    (tmp_path / "questions.json").write_text(json.dumps({"data": questions}))
    rows = write(tmp_path / "rows.jsonl", *rows_of({0: 0.5, 1: 0.5, 2: 0.5}))
    arguments = [str(rows), str(rows), "--boxes", str(tmp_path / "ocr.json")]
    assert main(arguments) == 1
    assert "--questions" in capsys.readouterr().err
    assert main([*arguments, "--questions", str(tmp_path / "questions.json")]) == 0
    assert "| small | 1 | 1 % to 1 % | 50.0 | 50.0 | +0.0 % |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "labels", "is_told"),
    [
        ([None, None, None], ["no change"] * 3, True),
        ([None, 0.0, 50.0], ["no change", "+0.0 %", "+50.0 %"], True),
        ([0.0, 0.0, 0.0], ["+0.0 %"] * 3, False),
        ([10.0, -20.0, 1e-3], ["+10.0 %", "-20.0 %", "+0.0 %"], False),
    ],
)
def test_a_plot_says_where_no_change_can_be_given(tmp_path, monkeypatch, changes, labels, is_told):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: figures.append(self) or save(self, *args, **kw))
    groups = [{"tertile": name, "samples": 1, "change": change} for name, change in zip("abc", changes, strict=True)]
    plot_change({"tertiles": groups}, tmp_path / "plot.png")
    [axes] = figures[0].axes
    texts = [text.get_text() for text in axes.texts]
    assert texts[:3] == labels
    assert (texts[3:] == [NO_CHANGE]) == is_told
    low, high = axes.get_ylim()
    assert high - low >= 1 and low <= 0 <= high


def test_no_change_is_said_on_the_screen_too(tmp_path, capsys):
    paths = [write(tmp_path / f"{name}.jsonl", *rows_of(dict.fromkeys(range(3), score)))
             for name, score in (("a", 0.0), ("b", 1.0))]  # fmt: skip
    boxes = write(tmp_path / "boxes.jsonl", *({"question_id": number, "area": 0.1 * number} for number in range(3)))
    assert main([*map(str, paths), "--boxes", str(boxes), "--output", str(tmp_path / "plot.png")]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"{NO_CHANGE}\n" and "| 0.0 | 100.0 | - |" in printed.out


def test_command_says_what_is_wrong(tmp_path, capsys):
    assert main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--boxes", "boxes.jsonl"]) == 1
    assert "There is no file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["a", "b", "--boxes", "c", "--output", "table.xlsx"])
    assert "must end in one of .md" in capsys.readouterr().err
