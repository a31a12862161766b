"""How accuracy depends on the size of what a question asks for (section 3.3 of the paper).

    pheye detail A B --boxes BOXES --output table.md plot.png

A and B are the folders that two evaluations wrote, or files of rows: lines of JSON with `id` and `score` (or `error`,
which counts as 0). Samples fall into three groups of equal number by the area of the answer's box over that of the
image. Printed and written are the accuracy in each and its relative change from A to B, the paper's Table 2.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..common.command import InputError, Parser, exit_status, require
from ..common.files import write_atomically
from ..common.json_lines import parse_json, read_lines, read_text
from .boxes import BOX_FILES, Boxes, answer_areas, answer_texts, read_boxes
from .samples import ROWS
from .tertiles import accuracy_by_tertile, scores_by_id

NO_CHANGE = "No change can be given where the first accuracy is 0."
SUFFIXES = (".md", ".png", ".pdf", ".svg")

# --- Accuracy ---


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


# --- Files ---


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
        data = parse_json(read_text(path))["data"]
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
        f"| answer's box | samples | box / image | {heads[0]} | {heads[1]} | relative change |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for group in comparison["tertiles"]:
        area = f"{percent(group['smallest_area'])} to {percent(group['largest_area'])}"
        accuracies = f"{100 * group['accuracy']:.1f} | {100 * group['accuracy_after']:.1f}"
        lines.append(
            f"| {group['tertile']} | {group['samples']} | {area} | {accuracies} | {format_change(group['change'])} |"
        )
    return "\n".join(lines) + "\n"


def plot_change(comparison: dict, path: Path, names: Sequence[str] = ("before", "after")):
    """Relative change per tertile, as bars."""
    require("matplotlib")
    from matplotlib.figure import Figure

    groups = comparison["tertiles"]
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{group['tertile']}\n({group['samples']})" for group in groups]
    changes = [group["change"] for group in groups]
    bars = axes.bar(labels, [change or 0 for change in changes], width=0.6)
    axes.bar_label(bars, ["no change" if change is None else format_change(change) for change in changes], padding=2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.15)
    if not any(changes):  # an axis would be of rounding errors
        axes.set_ylim(-1, 1)
        axes.set_yticks([0])
    if None in changes:
        axes.text(0.5, 0.98, NO_CHANGE, transform=axes.transAxes, ha="center", va="top", fontsize=9)
    axes.set_xlabel("area of the answer's box (samples)")
    axes.set_ylabel("relative change of accuracy in %")
    axes.set_title(f"{names[0]} to {names[1]}", fontsize=10)
    figure.savefig(path, dpi=150)


def result_names(paths: Sequence[Path]) -> list[str]:
    """Short names of two results: of their folders, unless the files' own names differ."""
    names = [path.name if path.is_dir() else path.stem for path in paths]
    return names if names[0] != names[1] else [path.resolve().parent.name for path in paths]


def detail(before: Path, after: Path, *, boxes: Path, questions: Path | None, output: Sequence[Path]):
    """Compare two results; the arguments are the command's options."""
    asked = read_questions(questions) if questions else {}
    results = [[{**asked.get(str(row["id"]), {}), **row} for row in read_results(path)] for path in (before, after)]
    comparison = compare(*results, read_boxes(boxes))
    names = result_names([before, after])
    table = markdown(comparison, names)
    print(table, end="")
    for count, what in (
        (comparison["left_out"], "have no box"),
        (comparison["in_one_only"], "are in one result only"),
    ):
        if count:
            print(f"{count} samples {what} and are left out.", file=sys.stderr)
    if any(group["change"] is None for group in comparison["tertiles"]):
        print(NO_CHANGE, file=sys.stderr)
    for path in output:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            write_atomically(path, [table.encode()])
        else:
            plot_change(comparison, path, names)


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="pheye detail",
        description=__doc__,
        epilog=BOX_FILES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path, metavar="A", help="output of the first evaluation")
    parser.add_argument("after", type=Path, metavar="B", help="that of the second")
    parser.add_argument("--boxes", required=True, type=Path, help="JSONL of boxes, or TextVQA's OCR file")
    parser.add_argument("--questions", type=Path, help="TextVQA's question file, where the rows name no image")
    parser.add_argument(
        "--output", type=Path, nargs="+", default=[], metavar="FILE", help="the table (.md), the plot (.png) or both"
    )
    options = vars(parser.parse_args(argv))
    for path in options["output"]:
        if path.suffix not in SUFFIXES:
            parser.error(f"--output {path} must end in one of {', '.join(SUFFIXES)}")
    return options


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(detail, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
