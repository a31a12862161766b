"""Boxes of answers: the files that hold them, which one is meant, and how large it is.

A file of boxes is one of these; ids are compared as text:

- Lines of JSON, one per box: `question_id` (or `id`), `area` (box over image, 0 to 1), and, where a question has
  several lines, the box's text in `text`, `answer` or `object`.
- Lines of JSON, one per question: `question_id` (or `id`) and all its boxes, either as `annotations` (each with
  `category` and `bounding_box`: x, y, width and height in pixels) beside the image's `width` and `height`, as in the
  authors' VQAv2_sample_areas, or as `ocr_info` (below); and `answers`: texts, or objects with `answer`.
- TextVQA's OCR file (Rosetta): `data`, a list with `image_id` and `ocr_info` (each with `word` and `bounding_box`,
  whose `width` and `height` are shares of the image's). The rows must then hold `image_id`, or `--questions` names
  TextVQA's question file.

Of several boxes, a question gets the one whose text is most similar to the answers, on the mean over all of them (each
row's `references` or `answers`, or else the file's). A question whose boxes have nothing in common with any answer is
left out, and so is one without boxes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path

from ..common.command import InputError
from ..common.json_lines import parse_json, read_lines, read_text
from .tertiles import accuracy_by_tertile, scores_by_id

BOX_FILES = __doc__  # for the help of commands

# Boxes that were turned upright reach beyond the image; above this, they are in pixels.
LARGEST_SIDE = 1.5


@dataclass
class Box:
    """area: over that of the image; text: what is in the box, or None for the only box of a question."""

    area: float
    text: str | None = None


@dataclass
class Boxes:
    """What a file of boxes holds, by id of the question, or of the image where `of_images`."""

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
                    f"{boxes.source} lists boxes by image, but the row of {row_id!r} has no image_id; give "
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


def accuracy_by_box(rows: Sequence[dict], boxes: Boxes) -> dict:
    """Accuracy per tertile of the answer's box, and how many rows had no box."""
    areas = answer_areas(rows, boxes)
    scores = scores_by_id(rows, "the result")
    return {"tertiles": accuracy_by_tertile(scores, areas), "left_out": len(rows) - len(areas)}


# --- Files ---


def read_boxes(path: str | Path) -> Boxes:
    """The boxes in a file of any of these formats.

    Raises:
        InputError: if the file has another format.
    """
    path = Path(path)
    text = read_text(path)
    try:
        whole = parse_json(text)
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
            whole = entry["width"] * entry["height"]
            found = [(*box["bounding_box"], box["category"]) for box in entry["annotations"]]
            return [Box(share(width * height / whole), str(text)) for _, _, width, height, text in found]
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


def is_share(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value <= 1


def share(area: object) -> float:
    if not is_share(area):
        raise InputError(f"an area of {area!r} is no share of the image's between 0 and 1.")
    return float(area)


def ocr_area(box: dict) -> float:
    sides = box["width"], box["height"]
    if not all(0 <= side <= LARGEST_SIDE for side in sides):
        raise InputError(f"a box of {sides[0]} x {sides[1]} is not given as shares of the image's width and height.")
    return min(1.0, sides[0] * sides[1])
