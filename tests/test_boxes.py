"""Boxes of answers: which is chosen, and every format of file."""

import json
from difflib import SequenceMatcher

import numpy as np
import pytest

from pheye.common.command import InputError
from pheye.evaluation.boxes import (
    Box,
    accuracy_by_box,
    answer_areas,
    choose_box,
    read_boxes,
    similarities,
)

from toy_boxes import flat_boxes, ocr_word, rows_of, write

pytestmark = pytest.mark.once


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


# --- Formats ---


def ocr_file(path):
    words = [ocr_word("NOKIA", 0.2, 0.1), ocr_word("12:45", 0.5, 0.5), ocr_word("edge", 1.2, 1.0)]
    data = [{"image_id": "abc", "ocr_tokens": [], "ocr_info": words}, {"image_id": "def", "ocr_info": []}]
    path.write_text(json.dumps({"dataset_name": "rosetta", "data": data}))
    return path


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


def test_ocr_boxes_of_images(tmp_path):
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


# --- Results ---


def test_result_by_detail_counts_rows_without_a_box(tmp_path):
    path = flat_boxes(tmp_path / "boxes.jsonl", {1: 0.1, 2: 0.2, 3: 0.3})
    rows = [*rows_of({3: 0.9, 1: 0.3, 4: 1.0}), {"id": 2, "error": "broken"}]
    result = accuracy_by_box(rows, read_boxes(path))
    assert [group["accuracy"] for group in result["tertiles"]] == [0.3, 0, 0.9]
    assert result["left_out"] == 1
