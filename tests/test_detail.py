import json
from difflib import SequenceMatcher

import numpy as np
import pytest
from PIL import Image

from pheye.common.command import InputError
from pheye.evaluation.detail import (
    Box,
    accuracy_by_tertile,
    answer_areas,
    by_detail,
    choose_box,
    compare,
    main,
    markdown,
    read_boxes,
    read_questions,
    read_results,
    relative_change,
    similarities,
    tertiles,
)

pytestmark = pytest.mark.once


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def flat_boxes(path, areas):
    return write(path, *({"question_id": key, "area": area} for key, area in areas.items()))


def rows_of(scores):
    return [{"id": key, "score": score} for key, score in scores.items()]


# --- Which box ---


def test_similarity_is_the_mean_of_difflibs_ratio():
    texts = ["Coca-Cola", "cola", "7", "", "hp sauce " * 30]
    answers = ["coca cola", "coca cola", "coke", "7", "HP", "hp sauce " * 29, "coca cola", "a", "b", "c"]
    expected = [
        np.mean([SequenceMatcher(None, text.lower(), answer.lower(), autojunk=False).ratio() for answer in answers])
        for text in texts
    ]
    assert similarities(texts, answers) == pytest.approx(expected)
    # "cola" and "coke" have "co" in common, 2 * 2 of 8 characters; of longer common blocks none is forgotten.
    assert similarities(["cola"], ["coke"]) == [0.5]
    assert similarities(["STOP"], ["stop", "stop sign"]) == [pytest.approx((1 + 8 / 13) / 2)]


def test_the_box_most_similar_to_all_answers_is_chosen():
    boxes = [Box(0.1, "stop"), Box(0.2, "main"), Box(0.3, "main st"), Box(0.4, "main st")]
    assert choose_box(boxes, ["main st"] * 6 + ["stop"] * 4) is boxes[2]  # the first of equals
    assert choose_box(boxes, ["stop"] * 8 + ["main st"] * 2) is boxes[0]
    assert choose_box(boxes, ["42"]) is None
    assert choose_box([], ["42"]) is None
    assert choose_box([Box(0.1)], []).area == 0.1
    with pytest.raises(InputError, match="no answers"):
        choose_box(boxes, [])


# --- Tertiles ---


@pytest.mark.parametrize("count", [3, 4, 5, 11, 300])
def test_tertiles_are_the_thirds_of_the_sorted_areas(count):
    areas = {f"q{i}": area for i, area in enumerate(np.random.default_rng(count).random(count))}
    expected = {}
    for group, keys in enumerate(np.array_split(sorted(areas, key=areas.get), 3)):
        expected.update(dict.fromkeys(keys.tolist(), group))
    assert tertiles(areas) == expected


def test_equal_areas_fall_into_the_same_tertile_in_any_order():
    areas = dict.fromkeys("abcdef", 0.5)
    shuffled = {key: areas[key] for key in "fcadbe"}
    assert tertiles(areas) == tertiles(shuffled) == {"a": 0, "b": 0, "c": 1, "d": 1, "e": 2, "f": 2}


def test_fewer_than_three_samples_make_no_tertiles():
    with pytest.raises(InputError, match="2 samples"):
        tertiles({"a": 0.1, "b": 0.2})


def test_accuracy_per_tertile():
    areas = {"a": 0.5, "b": 0.01, "c": 0.02, "d": 0.9, "e": 0.3}
    scores = {"a": 1, "b": 0.3, "c": 0.6, "d": 0, "e": 0.5}
    small, medium, large = accuracy_by_tertile(scores, areas)
    assert small == {
        "tertile": "small",
        "samples": 2,
        "smallest_area": 0.01,
        "largest_area": 0.02,
        "accuracy": pytest.approx(0.45),
    }
    assert (medium["samples"], medium["accuracy"], medium["largest_area"]) == (2, 0.75, 0.5)
    assert (large["samples"], large["accuracy"]) == (1, 0)


# --- Formats ---


def test_one_line_per_box(tmp_path):
    path = write(
        tmp_path / "boxes.jsonl",
        {"question_id": 7, "area": 0.25},
        {"id": "8", "text": "left", "area": 0.1},
        {"id": "8", "object": "right", "area": 0.2},
        {"question_id": 9, "answer": "anything", "area": 0.3},
    )
    rows = [{"id": 7}, {"id": "8", "references": ["rigth"]}, {"id": 9, "references": ["42"]}, {"id": 10}]
    assert answer_areas(rows, read_boxes(path)) == {"7": 0.25, "8": 0.2, "9": 0.3}


def test_one_line_per_question_as_the_authors_set_has_it(tmp_path):
    dog = {"category": "dog", "bounding_box": [10, 20, 30.0, 40.0], "segmentation_area": 600.0}
    cat = {"category": "cat", "bounding_box": [0, 0, 100.0, 50.0], "segmentation_area": 600.0}
    line = {"width": 200, "height": 100, "annotations": [dog, cat]}
    answers = [{"answer": "cats", "answer_id": 1}, {"answer": "cat", "answer_id": 2}]
    path = write(tmp_path / "boxes.jsonl", {"question_id": 1, **line, "answers": answers}, {"question_id": 2, **line})
    boxes = read_boxes(path)
    assert answer_areas([{"id": 1}], boxes) == {"1": 100 * 50 / (200 * 100)}
    assert answer_areas([{"id": 2, "answers": ["a dog"]}], boxes) == {"2": 30 * 40 / (200 * 100)}
    assert answer_areas([{"id": 1, "references": ["dog"]}], boxes) == {"1": 0.06}  # the row's own answers come first
    only_one = {"question_id": 3, **line, "annotations": [dog]}
    boxes = read_boxes(write(tmp_path / "boxes.jsonl", only_one, {"question_id": 4, "area": 1}))
    assert answer_areas([{"id": 3, "references": ["42"]}, {"id": 4}], boxes) == {"4": 1}


def ocr_word(word, width, height):
    box = {"width": width, "height": height, "rotation": 2.5, "roll": 0, "top_left_x": 0.1, "top_left_y": 0.2}
    return {"word": word, "bounding_box": box}


def ocr_file(path):
    words = [ocr_word("NOKIA", 0.2, 0.1), ocr_word("12:45", 0.5, 0.5), ocr_word("edge", 1.2, 1.0)]
    data = [{"image_id": "abc", "ocr_tokens": [], "ocr_info": words}, {"image_id": "def", "ocr_info": []}]
    path.write_text(json.dumps({"dataset_name": "rosetta", "data": data}))
    return path


def test_ocr_boxes_of_pictures(tmp_path):
    boxes = read_boxes(ocr_file(tmp_path / "ocr.json"))
    rows = [
        {"id": 1, "image_id": "abc", "references": ["nokia"] * 10},
        {"id": 2, "image_id": "abc", "references": ["12:45 pm"] * 10},
        {"id": 3, "image_id": "abc", "references": ["edge"]},
        {"id": 4, "image_id": "def", "references": ["nokia"]},
        {"id": 5, "image_id": "abc", "references": ["xyz"]},
    ]
    assert answer_areas(rows, boxes) == {"1": pytest.approx(0.02), "2": 0.25, "3": 1.0}
    with pytest.raises(InputError, match="--questions"):
        answer_areas([{"id": 1, "references": ["nokia"]}], boxes)


def test_ocr_boxes_in_lines(tmp_path):
    line = {"question_id": 1, "ocr_info": [ocr_word("a", 0.5, 0.5), ocr_word("b", 0.1, 0.1)], "answers": ["b"]}
    assert answer_areas([{"id": 1}], read_boxes(write(tmp_path / "boxes.jsonl", line))) == {"1": pytest.approx(0.01)}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "empty"),
        (["no json"], "Line 1 .* is no JSON"),
        (["[1, 2]"], "one object a line"),
        (['{"question_id": 1, "area": 0.5}', "7"], "Line 2 .* no JSON object"),
        ([{"area": 0.5}], "no `question_id`"),
        ([{"question_id": 1, "score": 2}], "neither `area` nor .*; its fields are question_id"),
        ([{"question_id": 1, "area": 5000}], "5000 is no share"),
        ([{"question_id": 1, "area": "0.1"}], "'0.1' is no share"),
        ([{"question_id": 1, "annotations": []}], "KeyError: 'width'"),
        ([{"id": 1, "annotations": [{"category": "", "bounding_box": []}], "width": 2, "height": 2}], "other format"),
        ([{"question_id": 1, "ocr_info": [ocr_word("x", 120, 40)]}], "120 x 40 is not given as shares"),
        (['{"data": [{"image_id": "x"}]}'], "no `image_id` and `ocr_info`"),
        (['{"data": []}'], "holds no boxes"),
    ],
)  # fmt: skip
def test_other_formats_are_refused(tmp_path, lines, message):
    path = tmp_path / "boxes.jsonl"
    write(path, *lines) if lines else path.write_text("")
    with pytest.raises(InputError, match=message):
        read_boxes(path)


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no file .*none\.jsonl"):
        read_boxes(tmp_path / "none.jsonl")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(InputError, match="no text file"):
        read_boxes(tmp_path / "picture.png")
    with pytest.raises(InputError, match="no `id`"):
        read_results(write(tmp_path / "rows.jsonl", {"score": 1}))
    with pytest.raises(InputError, match="no question file"):
        read_questions(write(tmp_path / "questions.json", '{"questions": []}'))


# --- Results ---


def test_result_by_detail_counts_rows_without_a_box(tmp_path):
    path = flat_boxes(tmp_path / "boxes.jsonl", {1: 0.1, 2: 0.2, 3: 0.3})
    rows = [*rows_of({3: 0.9, 1: 0.3, 4: 1.0}), {"id": 2, "error": "broken"}]
    result = by_detail(rows, path)
    assert [group["accuracy"] for group in result["tertiles"]] == [0.3, 0, 0.9]
    assert result["left_out"] == 1


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
        "| answer's box | samples | box / picture | A\\|x | B | relative change |",
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


# --- Command ---


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


def test_command_looks_pictures_up_in_the_question_file(tmp_path, capsys):
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


def test_command_says_what_is_wrong(tmp_path, capsys):
    assert main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--boxes", "boxes.jsonl"]) == 1
    assert "There is no file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["a", "b", "--boxes", "c", "--output", "table.xlsx"])
    assert "must end in one of .md" in capsys.readouterr().err
