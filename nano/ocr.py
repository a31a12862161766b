"""How Pheye-nano reads, beside what people use to read signs: Tesseract and RapidOCR, on the same held-out pictures.

    python -m pheye.nano.ocr --output FOLDER [--count 1000] [--fine 1000] [--nano FOLDER]

writes into FOLDER the answers, ocr.json and the tables nano-ocr.md: words read, characters wrong, where each reader
fails, seconds and megabytes. `--nano` is a folder that pheye.nano.evaluate wrote: its answers join the tables. Readers
that are not installed are left out. The same command goes on after a kill; with a larger --count it does the rest.

A reader is not asked for the sign: it gives all the text that it finds. So a word counts as read if it is one of the
words that were found, one line, or all of them together, without spaces, punctuation and the difference of capitals.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..answering.engine import write_rows
from ..answering.rows import Request, Run
from ..common.command import InputError, Parser, at_least, exit_status
from ..common.files import write_atomically
from ..common.json_lines import read_rows
from ..common.machine import machine
from ..evaluation.metrics.anls import edit_distance
from ..evaluation.tertiles import TERTILES, tertiles
from .drawing import questions, words
from .drawing.pictures import Picture, luminance
from .scoring.held_out import FINE, MAIN, SEED, SIGN, draw, interval, of_height, percent, with_interval
from .scoring.readers import (
    DEBIAN_PACKAGES,
    PHEYE,
    REPEATS,
    TITLES,
    Read,
    installed,
    megabytes,
    open_pheye,
    open_reader,
    reader_versions,
    seconds,
)
from .scoring.tables import table

# --- Answers ---


def facts(drawn: Picture) -> dict:
    """What may decide whether a picture's sign is read."""
    corners = np.array([letter.corners for letter in drawn.letters])  # (letters, 4, 2)
    (left, top), (right, bottom) = corners.min((0, 1)), corners.max((0, 1))
    box = (max(0, int(left)), max(0, int(top)), math.ceil(right), math.ceil(bottom))
    dark, light = np.quantile(luminance(np.moveaxis(np.asarray(drawn.image.crop(box), float), -1, 0)), (0.05, 0.95))
    across, down = corners[-1, 2] - corners[0, 3]  # along the line that the letters stand on
    return {
        "reference": drawn.signs[0],
        "cap_height": round(drawn.cap_height, 5),
        "pixels": round(drawn.cap_height * drawn.image.height),
        "tilt": round(abs(math.degrees(math.atan2(down, across))), 2),
        "contrast": round(float(light - dark), 1),
        "background": drawn.background,
        "board": drawn.boards[0],
    }


def readings(names: Sequence[str], letters: str, count: int, output: Path) -> list[dict]:
    """What each reader finds in each picture of a set: rows with the picture's facts, those of before included."""
    requests = [
        Request(f"{index}-{name}", None, "all text", {"index": index, "reader": name})
        for index in range(count)
        for name in names  # side by side, so that a picture is drawn once
    ]

    def rows_of(readers: dict[str, Read], _, asked: list[Request]) -> Iterator[list[dict]]:
        for request in asked:
            drawn = draw(request.fields["index"], letters=letters)
            text = readers[request.fields["reader"]](drawn.image)
            yield [{"id": request.id, **request.fields, **facts(drawn), "answer": text}]

    run = Run(output / f"readings-{letters}.jsonl", "answer")
    settings = {"seed": SEED, "letters": letters}
    path = write_rows(
        lambda: ({name: open_reader(name, 1) for name in names}, None),
        requests,
        run,
        rows_of,
        settings,
        batch_size=1,
        facts={"readers": reader_versions(names)},
    )
    asked = {request.id for request in requests}
    return [row for row in read_rows(path) if row["id"] in asked]  # an earlier run may have had more


def nano_rows(folder: Path, letters: str, rows: Sequence[dict]) -> list[dict]:
    """Pheye-nano's answers, as pheye.nano.evaluate wrote them, about the pictures of `rows`."""
    path = folder / f"answers-{'' if letters == MAIN else f'{letters}-'}full.jsonl"
    if not path.exists():
        return []
    pictures = {row["index"]: row for row in rows}
    found = []
    for row in read_rows(path):
        index = int(row["id"].partition("-")[0])
        if row["kind"] == SIGN and index in pictures:
            if row["reference"] != pictures[index]["reference"]:
                raise InputError(f"{path} is about other pictures: {row['id']} is {row['reference']!r} there.")
            found.append({**pictures[index], "reader": PHEYE, "answer": row.get("answer", "")})
    return found


# --- Scores ---


def letters_of(text: str) -> str:
    """Capitals and digits, all else left out."""
    return re.sub(r"[^A-Z0-9]", "", text.upper())


def candidates(text: str) -> set[str]:
    """What a reader's text may be taken for: each of its words, each line, all of it, or nothing."""
    return {letters_of(part) for part in ("", text, *text.split("\n"), *text.split())}


def is_read(row: dict) -> bool:
    return row["reference"] in candidates(row["answer"])


def is_all(row: dict) -> bool:
    """Whether the reader found the word and nothing else."""
    return letters_of(row["answer"]) == row["reference"]


def edits(row: dict) -> int:
    """The fewest that turn what was found, or nothing, into the word."""
    return min(edit_distance(text, row["reference"]) for text in candidates(row["answer"]))


def score(rows: Sequence[dict]) -> dict:
    """Shares of words read, alone and by tertile of letter height, and of characters wrong."""
    exact = np.array([is_read(row) for row in rows], float)
    groups = tertiles({row["index"]: row["cap_height"] for row in rows})
    by_tertile = {
        name: percent_read([row for row in rows if groups[row["index"]] == place])
        for place, name in enumerate(TERTILES)
    }
    return {
        "pictures": len(rows),
        "read": round(exact.mean(), 4),
        "interval": interval(exact),
        "nothing_else": round(float(np.mean([is_all(row) for row in rows])), 4),
        "character_error": round(sum(map(edits, rows)) / sum(len(row["reference"]) for row in rows), 4),
        "by_tertile": by_tertile,
    }


def percent_read(rows: Sequence[dict]) -> float:
    return round(float(np.mean([is_read(row) for row in rows])), 4)


GROUPS = {  # by what: names of the groups, and which of them a row belongs to
    "height of capitals": (
        ("below 16 pixels", "16 to 31 pixels", "32 pixels or more"),
        lambda row: (row["pixels"] >= 16) + (row["pixels"] >= 32),
    ),
    "contrast in the word's box, of 255": (
        ("below 120", "120 to 179", "180 or more"),
        lambda row: (row["contrast"] >= 120) + (row["contrast"] >= 180),
    ),
    "tilt": (
        ("below 1 degree", "1 to 3 degrees", "3 degrees or more"),
        lambda row: (row["tilt"] >= 1) + (row["tilt"] >= 3),
    ),
    "behind the letters": (("a board", "the background"), lambda row: not row["board"]),
    "background": (
        ("plain", "gradient", "noise", "texture", "photograph"),
        lambda row: ("plain", "gradient", "noise", "texture", "photograph").index(row["background"]),
    ),
    "word": (("real", "made-up"), lambda row: row["reference"] not in words.real_words(True)),
    "letters of the word": (("3 or 4", "5", "6 or 7"), lambda row: max(0, min(2, len(row["reference"]) - 4))),
}


def score_groups(rows: Sequence[dict]) -> dict[str, dict]:
    """Shares of words read by what the pictures are like; groups without a picture are left out."""
    found = {}
    for what, (names, place) in GROUPS.items():
        for number, name in enumerate(names):
            if chosen := [row for row in rows if place(row) == number]:
                found[f"{what}: {name}"] = {"pictures": len(chosen), "read": percent_read(chosen)}
    return found


# --- Report ---


def score_table(by_reader: dict[str, dict]) -> list[str]:
    rows = []
    for name, one in by_reader.items():
        cells = [TITLES[name], str(one["pictures"]), with_interval(one["read"], one["interval"])]
        cells += [percent(one[key]) for key in ("nothing_else", "character_error")]
        rows.append(cells + [percent(one["by_tertile"][group]) for group in TERTILES])
    names = ["reader", "pictures", "word read (95 % interval)", "and nothing else", "characters wrong"]
    return table([*names, "small letters", "medium", "large"], rows)


def group_table(by_reader: dict[str, dict]) -> list[str]:
    rows = []
    for group, one in next(iter(by_reader.values())).items():
        shares = [percent(found[group]["read"]) if group in found else "" for found in by_reader.values()]
        rows.append([group, str(one["pictures"]), *shares])
    return table(["pictures by", "number", *(TITLES[name] for name in by_reader)], rows)


def cost_table(costs: dict[str, dict]) -> list[str]:
    rows = []
    for name, one in costs.items():
        taken = one["seconds"]
        cells = [f"{taken['1'][kind]:.2f}" for kind in ("wall", "cpu")] + [f"{taken['2']['wall']:.2f}"]
        rows.append([TITLES[name], *cells, *("" if size is None else f"{size:.0f}" for size in one["megabytes"])])
    names = ["reader", "s, one thread", "s of the CPU, one thread", "s, two threads", "MB of weights"]
    return table([*names, "MB as installed"], rows)


REPORT = """# Pheye-nano and other readers of signs

`python -m pheye.nano.ocr --output FOLDER{nano} --count {count} --fine {fine}`; {machine}; {versions}.

The pictures are the held-out ones of [nano.md](nano.md). Each has one sign with one word. Tesseract and RapidOCR are
not asked for the sign. They give all the text that they find, with their own settings. So this rule is in their
favour: a word is read if it is one of the words that a reader found, or one of the lines without its spaces, or all of
the text without its spaces. Punctuation and the difference of capitals do not count. `and nothing else` is the share
of pictures where the reader found the word alone. Characters wrong are the fewest edits from one of these texts, or
from none, to the word. Pheye-nano is asked "{question}", and scored by the same rule. Shares
are in %. Intervals are over the pictures (bootstrap). Tertiles are by the height of the letters.
{sets}{costs}"""

SET = """
## Letters of {height} of the height

{scores}

Words read in %, by what the pictures are like. A reader that was asked about fewer of them has its share of those.

{groups}
"""

COSTS = """
## Costs

Seconds are the median of {timed} pictures of the first set, each the least of {repeats} readings. Those of Tesseract
have the start of the program, and those of the others do not. Installed are the Python packages with all that they
need, and of Debian {packages}.

{table}
"""


def report(result: dict) -> str:
    sets = [
        SET.format(
            height=of_height(letters),
            scores="\n".join(score_table({name: one["scores"] for name, one in found.items()})),
            groups="\n".join(group_table({name: one["groups"] for name, one in found.items()})),
        )
        for letters, found in result["sets"].items()
    ]
    costs = COSTS.format(
        timed=result["timed"],
        repeats=REPEATS,
        packages=", ".join(DEBIAN_PACKAGES),
        table="\n".join(cost_table(result["costs"])),
    )
    return REPORT.format(
        nano=" --nano FOLDER" if any(PHEYE in found for found in result["sets"].values()) else "",
        count=result["count"],
        fine=result["fine"],
        machine=result["machine"],
        versions=", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        question=questions.SIGN,
        sets="".join(sets),
        costs=costs if result["costs"] else "",
    )


# --- The command ---


def compare(output: Path, *, count: int, fine: int, nano: Path | None, timed: int):
    """Write answers, scores and tables; the arguments are the command's options.

    Raises:
        InputError: if no reader is installed, or `nano` is no folder of pheye.nano.evaluate.
    """
    names = installed()
    if not names:
        raise InputError("No reader is here: run apt-get install tesseract-ocr, or pip install rapidocr-onnxruntime.")
    if nano and not (nano / "nano.json").exists():
        raise InputError(f"{nano} has no nano.json; give a folder that python -m pheye.nano.evaluate wrote.")
    model = json.loads((nano / "nano.json").read_text())["model"] if nano else None
    sets = {}
    for letters, number in ((MAIN, count), (FINE, fine)):
        if number:
            rows = readings(names, letters, number, output)
            by_reader = {name: [row for row in rows if row["reader"] == name] for name in names}
            if nano and (own := nano_rows(nano, letters, rows)):
                by_reader[PHEYE] = own
            sets[letters] = {
                name: {"scores": score(found), "groups": score_groups(found)} for name, found in by_reader.items()
            }
    costs = {}
    if timed:
        images = [draw(index).image for index in range(timed)]
        openers = {name: lambda threads, name=name: open_reader(name, threads) for name in names}
        if model:
            openers[PHEYE] = lambda threads: open_pheye(model, threads)
        costs = {
            name: {"seconds": seconds(name, opened, images, output, model), "megabytes": megabytes(name, model)}
            for name, opened in openers.items()
        }
    result = {
        "count": count,
        "fine": fine,
        "machine": machine(),
        "versions": reader_versions(names),
        "sets": sets,
        "timed": timed,
        "costs": costs,
    }
    write_atomically(output / "ocr.json", [json.dumps(result, indent=1).encode() + b"\n"])
    write_atomically(output / "nano-ocr.md", [report(result).encode()])
    print(report(result))


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.ocr", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--count", type=at_least(3), default=1000, help="pictures (default: %(default)s)")
    parser.add_argument(
        "--fine", type=at_least(0), default=1000, help="more, with fine letters (default: %(default)s)"
    )
    parser.add_argument("--nano", type=Path, metavar="FOLDER", help="what pheye.nano.evaluate wrote")
    parser.add_argument(
        "--timed", type=at_least(0), default=20, help="pictures for the seconds (default: %(default)s)"
    )
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(compare, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
