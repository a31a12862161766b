"""How accuracy depends on the size of what a question asks for (section 3.3 of the paper).

    python -m pheye.evaluation.detail A B --boxes BOXES --output table.md plot.png

A and B are the folders that two evaluations wrote, or files of rows: lines of JSON with `id` and `score` (or `error`,
which counts as 0).
Samples fall into three groups of equal number by the area of the answer's box over that of the picture. Printed and
written are the accuracy in each and its relative change from A to B, the paper's Table 2.

BOXES is one of these; ids are compared as text:

- Lines of JSON, one per box: `question_id` (or `id`), `area` (box over picture, 0 to 1), and, where a question has
  several lines, the box's text in `text`, `answer` or `object`.
- Lines of JSON, one per question: `question_id` (or `id`) and all its boxes, either as `annotations` (each with
  `category` and `bounding_box`: x, y, width and height in pixels) beside the picture's `width` and `height`, as in the
  authors' VQAv2_sample_areas, or as `ocr_info` (below); and `answers`: texts, or objects with `answer`.
- TextVQA's OCR file (Rosetta): `data`, a list with `image_id` and `ocr_info` (each with `word` and `bounding_box`,
  whose `width` and `height` are shares of the picture's). The rows must then hold `image_id`, or `--questions` names
  TextVQA's question file.

Of several boxes, a question gets the one whose text is most similar to the answers, on the mean over all of them (each
row's `references` or `answers`, or those of BOXES). A question whose boxes have nothing in common with any answer is
left out, and so is one without boxes.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path

from ..common.command import InputError, exit_status, require
from ..common.files import write_atomically

TERTILES = ("small", "medium", "large")
ROWS = "rows.jsonl"  # in the folder of an evaluation
SUFFIXES = (".md", ".png", ".pdf", ".svg")

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


# --- Which box, and which tertile ---


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


def tertiles(areas: dict) -> dict:
    """0, 1 or 2 for each key, in three groups of equal number (the first ones one larger) from small to large.

    Equal areas are told apart by their keys, so that the groups do not depend on the order of the samples.
    """
    if len(areas) < len(TERTILES):
        raise InputError(f"{len(areas)} samples have an area, but three groups need at least 3; give more of them.")
    order = sorted(areas, key=lambda key: (areas[key], key))
    return {key: rank * len(TERTILES) // len(order) for rank, key in enumerate(order)}


# --- Accuracy ---


def accuracy_by_tertile(scores: dict[str, float], areas: dict[str, float]) -> list[dict]:
    """Per tertile of `areas`: its name, number of samples, range of areas, and mean score."""
    groups = [[] for _ in TERTILES]
    for key, tertile in tertiles(areas).items():
        groups[tertile].append(key)
    return [
        {
            "tertile": name,
            "samples": len(keys),
            "smallest_area": min(areas[key] for key in keys),
            "largest_area": max(areas[key] for key in keys),
            "accuracy": math.fsum(scores[key] for key in keys) / len(keys),
        }
        for name, keys in zip(TERTILES, groups, strict=True)
    ]


def by_detail(rows: Sequence[dict], boxes: Boxes | str | Path) -> dict:
    """What `--by-detail` of an evaluation reports: accuracy per tertile, and how many rows had no box."""
    boxes = boxes if isinstance(boxes, Boxes) else read_boxes(boxes)
    areas = answer_areas(rows, boxes)
    scores = scores_by_id(rows, "the result")
    return {"tertiles": accuracy_by_tertile(scores, areas), "left_out": len(rows) - len(areas)}


def relative_change(before: float, after: float) -> float | None:
    """In percent; None from 0, where it has no meaning."""
    return 100 * (after - before) / before if before else None


def compare(before: Sequence[dict], after: Sequence[dict], boxes: Boxes) -> dict:
    """Accuracies of two results per tertile and their relative change, over the samples that both have."""
    before_scores, after_scores = scores_by_id(before, "the first result"), scores_by_id(after, "the second result")
    common = [row for row in before if str(row["id"]) in after_scores]
    if not common:
        raise InputError(
            f"The two results have no id in common: they begin with {next(iter(before_scores))!r} and "
            f"{next(iter(after_scores))!r}. Give results of one task."
        )
    areas = answer_areas(common, boxes)
    second = accuracy_by_tertile(after_scores, areas)
    tertiles = [
        {**group, "accuracy_after": other["accuracy"], "change": relative_change(group["accuracy"], other["accuracy"])}
        for group, other in zip(accuracy_by_tertile(before_scores, areas), second, strict=True)
    ]
    only_one = len(before_scores.keys() ^ after_scores.keys())
    return {"tertiles": tertiles, "left_out": len(common) - len(areas), "in_one_only": only_one}


def scores_by_id(rows: Sequence[dict], name: str) -> dict[str, float]:
    """Score of each row by id (as text); a row with an error counts as wrong."""
    scores = {}
    for row in rows:
        score = row.get("score")
        if score is None and "error" in row:
            score = 0.0
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise InputError(
                f"The row of {row['id']!r} in {name} has no score; evaluate a split whose answers are public."
            )
        if str(row["id"]) in scores:
            raise InputError(f"{name} has several rows of {row['id']!r}; give the rows of one run.")
        scores[str(row["id"])] = float(score)
    return scores


# --- Files ---


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no text file; give a file of JSON.") from error


def read_lines(path: Path, text: str | None = None) -> list[dict]:
    """The objects in lines of JSON, each with the number of its line as `_line`."""
    rows = []
    for number, line in enumerate((read_text(path) if text is None else text).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"Line {number} of {path} is no JSON: {error}.") from error
            if not isinstance(row, dict):
                raise InputError(f"Line {number} of {path} is no JSON object; give one object a line.")
            rows.append({**row, "_line": number})
    if not rows:
        raise InputError(f"{path} is empty.")
    return rows


def read_results(path: Path) -> list[dict]:
    """The rows of an evaluation: of its folder, or a file of them."""
    path = path / ROWS if path.is_dir() else path
    rows = read_lines(path)
    for row in rows:
        if row.get("id") is None:
            raise InputError(f"Line {row['_line']} of {path} has no `id`; give the rows that an evaluation wrote.")
    return rows


def read_questions(path: Path) -> dict[str, dict]:
    """`image_id` and `answers` by question id, of TextVQA's question file."""
    try:
        data = json.loads(read_text(path))["data"]
        return {
            str(entry["question_id"]): {"image_id": entry["image_id"], "answers": answer_texts(entry)}
            for entry in data
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is no question file of TextVQA: JSON with `data`, a list with `question_id` and `image_id`."
        ) from error


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


# --- Table, plot and command ---


def percent(value: float) -> str:
    """With three digits that count, however small."""
    return f"{100 * value:.3g} %"


def format_change(change: float | None) -> str:
    return "-" if change is None else f"{change:+.1f} %"


def markdown(comparison: dict, names: Sequence[str] = ("before", "after")) -> str:
    """Table 2 of the paper for one pair of results."""
    heads = [name.replace("|", "\\|") for name in names]
    lines = [
        f"| answer's box | samples | box / picture | {heads[0]} | {heads[1]} | relative change |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for group in comparison["tertiles"]:
        area = f"{percent(group['smallest_area'])} to {percent(group['largest_area'])}"
        accuracies = f"{100 * group['accuracy']:.1f} | {100 * group['accuracy_after']:.1f}"
        lines.append(
            f"| {group['tertile']} | {group['samples']} | {area} | {accuracies} | {format_change(group['change'])} |"
        )
    return "\n".join(lines) + "\n"


def plot(comparison: dict, path: Path, names: Sequence[str] = ("before", "after")):
    """Relative change per tertile, as bars."""
    require("matplotlib")
    from matplotlib.figure import Figure

    groups = comparison["tertiles"]
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{group['tertile']}\n({group['samples']})" for group in groups]
    bars = axes.bar(labels, [group["change"] or 0 for group in groups], width=0.6)
    axes.bar_label(bars, [format_change(group["change"]) for group in groups], padding=2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.15)
    axes.set_xlabel("area of the answer's box (samples)")
    axes.set_ylabel("relative change of accuracy in %")
    axes.set_title(f"{names[0]} to {names[1]}", fontsize=10)
    figure.savefig(path, dpi=150)


def result_names(paths: Sequence[Path]) -> list[str]:
    """Short names of two results: of their folders, unless the files' own names differ."""
    names = [path.stem for path in paths]
    return names if names[0] != names[1] else [path.resolve().parent.name for path in paths]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pheye.evaluation.detail", description="Compare two results by the size of the answer's box."
    )
    parser.add_argument("before", type=Path, metavar="A", help="output of the first evaluation")
    parser.add_argument("after", type=Path, metavar="B", help="that of the second")
    parser.add_argument("--boxes", required=True, type=Path, help="JSONL of boxes, or TextVQA's OCR file")
    parser.add_argument("--questions", type=Path, help="TextVQA's question file, where the rows name no picture")
    parser.add_argument(
        "--output", type=Path, nargs="+", default=[], metavar="FILE", help="the table (.md), the plot (.png) or both"
    )
    args = parser.parse_args(argv)
    for path in args.output:
        if path.suffix not in SUFFIXES:
            parser.error(f"--output {path} must end in one of {', '.join(SUFFIXES)}")
    return args


def run(args: argparse.Namespace):
    questions = read_questions(args.questions) if args.questions else {}
    results = [
        [{**questions.get(str(row["id"]), {}), **row} for row in read_results(path)]
        for path in (args.before, args.after)
    ]
    comparison = compare(*results, read_boxes(args.boxes))
    names = result_names([args.before, args.after])
    table = markdown(comparison, names)
    print(table, end="")
    for count, what in (
        (comparison["left_out"], "have no box"),
        (comparison["in_one_only"], "are in one result only"),
    ):
        if count:
            print(f"{count} samples {what} and are left out.", file=sys.stderr)
    for path in args.output:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            write_atomically(path, [table.encode()])
        else:
            plot(comparison, path, names)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
