"""Boxes of answers: which one is meant, how large it is, and the files that hold them."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path

from ..common.command import InputError
from .json_lines import read_lines, read_text
from .tertiles import accuracy_by_tertile, scores_by_id

# Boxes that were turned upright reach beyond the picture; above this, they are in pixels.
LARGEST_SIDE = 1.5


@dataclass
class Box:
    """area: over that of the picture; text: what is in the box, or None for the only box of a question."""

    area: float
    text: str | None = None


@dataclass
class Boxes:
    """What a file of boxes holds, by id of the question, or of the picture where `of_images`."""

    source: str
    by_id: dict[str, list[Box]] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)
    of_images: bool = False


# --- Which box ---


def similarities(texts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Of each text the mean similarity to the answers, between 0 and 1, capitals aside.

    difflib's ratio: twice the characters in the longest matching block and, left and right of it, in further ones,
    over the length of both.
    """
    sums = [0.0] * len(texts)
    matcher = SequenceMatcher(autojunk=False)
    for answer, count in Counter(answer.lower() for answer in answers).items():
        matcher.set_seq2(answer)
        for index, text in enumerate(texts):
            matcher.set_seq1(text.lower())
            sums[index] += count * matcher.ratio()
    return [total / len(answers) for total in sums]


def choose_box(boxes: Sequence[Box], answers: Sequence[str]) -> Box | None:
    """The box whose text is most similar to the answers, the first of equals; None if none is similar at all.

    Raises:
        InputError: if there is a choice, and no answers to choose by.
    """
    if not boxes:
        return None
    if len(boxes) == 1 and boxes[0].text is None:
        return boxes[0]
    if not answers:
        raise InputError("there are boxes to choose from, but no answers to compare them with")
    means = similarities([box.text or "" for box in boxes], answers)
    best = max(range(len(boxes)), key=means.__getitem__)
    return boxes[best] if means[best] > 0 else None


def answer_areas(rows: Sequence[dict], boxes: Boxes) -> dict[str, float]:
    """Area of the answer's box by id (as text), for those rows that have one.

    Raises:
        InputError: if no row has a box, or what is needed to choose one is missing.
    """
    areas, known = {}, 0
    for row in rows:
        row_id = str(row["id"])
        key = row_id
        if boxes.of_images:
            if row.get("image_id") is None:
                raise InputError(
                    f"{boxes.source} lists boxes by picture, but the row of {row_id!r} has no image_id; give "
                    "TextVQA's question file as --questions."
                )
            key = str(row["image_id"])
        known += key in boxes.by_id
        answers = answer_texts(row) or boxes.answers.get(key, [])
        try:
            box = choose_box(boxes.by_id.get(key, []), answers)
        except InputError as error:
            raise InputError(
                f"Question {row_id!r}: {error}; they must stand in the rows (`references` or `answers`), in "
                f"{boxes.source} or in the file given as --questions."
            ) from error
        if box is not None:
            areas[row_id] = box.area
    if not areas:
        first = rows[0].get("image_id") if boxes.of_images else rows[0]["id"]
        raise InputError(
            f"No row has a box that resembles its answer: {known} of {len(rows)} ids are in {boxes.source}. The rows' "
            f"begin with {first}, those of the boxes with {next(iter(boxes.by_id))}; give boxes of the same questions."
        )
    return areas


def answer_texts(row: dict) -> list[str]:
    """The reference answers in a row or question: texts, or objects with `answer`."""
    answers = row.get("references") or row.get("answers") or []
    answers = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    if not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"The answers {answers} are no list of texts.")
    return answers


def by_detail(rows: Sequence[dict], boxes: Boxes | str | Path) -> dict:
    """What `--by-detail` of an evaluation reports: accuracy per tertile, and how many rows had no box."""
    boxes = boxes if isinstance(boxes, Boxes) else read_boxes(boxes)
    areas = answer_areas(rows, boxes)
    scores = scores_by_id(rows, "the result")
    return {"tertiles": accuracy_by_tertile(scores, areas), "left_out": len(rows) - len(areas)}


# --- Files ---


def read_boxes(path: str | Path) -> Boxes:
    """Boxes of any of the formats above.

    Raises:
        InputError: if the file has another format.
    """
    path = Path(path)
    text = read_text(path)
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    boxes = Boxes(str(path))
    if isinstance(whole, dict) and "data" in whole:
        boxes.of_images = True
        entries = whole["data"] if isinstance(whole["data"], list) else []
        for number, entry in enumerate(entries, start=1):
            where = f"Entry {number} of `data` in {path}"
            if not isinstance(entry, dict) or "image_id" not in entry or "ocr_info" not in entry:
                raise InputError(f"{where} has no `image_id` and `ocr_info`; give TextVQA's OCR file (Rosetta).")
            boxes.by_id.setdefault(str(entry["image_id"]), []).extend(entry_boxes(entry, where))
    elif isinstance(whole, list):
        raise InputError(f"{path} is a JSON list; write one object a line.")
    else:
        _read_box_lines(boxes, read_lines(path, text))
    if not boxes.by_id:
        raise InputError(f"{path} holds no boxes.")
    return boxes


def _read_box_lines(boxes: Boxes, rows: list[dict]):
    for row in rows:
        where = f"Line {row['_line']} of {boxes.source}"
        key = row.get("question_id", row.get("id"))
        if key is None:
            raise InputError(f"{where} has no `question_id`.")
        boxes.by_id.setdefault(str(key), []).extend(entry_boxes(row, where))
        if answers := answer_texts(row):
            boxes.answers[str(key)] = answers
    for row in rows:
        found = boxes.by_id[str(row.get("question_id", row.get("id")))]
        if "area" in row and len(found) == 1:
            found[0].text = None  # somebody has chosen it already


def entry_boxes(entry: dict, where: str) -> list[Box]:
    """All boxes of one line or entry."""
    try:
        if "area" in entry:
            names = [name for name in ("text", "answer", "object") if entry.get(name) is not None]
            return [Box(share(entry["area"]), str(entry[names[0]]) if names else None)]
        if "annotations" in entry:
            picture = entry["width"] * entry["height"]
            found = [(*box["bounding_box"], box["category"]) for box in entry["annotations"]]
            return [Box(share(width * height / picture), str(text)) for _, _, width, height, text in found]
        if "ocr_info" in entry:
            return [Box(ocr_area(box["bounding_box"]), str(box["word"])) for box in entry["ocr_info"]]
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{where} has another format: {type(error).__name__}: {error}.") from error
    raise InputError(
        f"{where} has neither `area` nor `annotations` nor `ocr_info`; its fields are "
        f"{', '.join(name for name in entry if name != '_line')}."
    )


def share(area: float) -> float:
    if isinstance(area, bool) or not isinstance(area, (int, float)) or not 0 <= area <= 1:
        raise InputError(f"an area of {area!r} is no share of the picture's between 0 and 1.")
    return float(area)


def ocr_area(box: dict) -> float:
    sides = box["width"], box["height"]
    if not all(0 <= side <= LARGEST_SIDE for side in sides):
        raise InputError(f"a box of {sides[0]} x {sides[1]} is not given as shares of the picture's width and height.")
    return min(1.0, sides[0] * sides[1])
