"""What the branch brings where a crop's border passes through a word: ways that `nano.evaluate` scored, side by side.

    python -m pheye.nano.branches --output FOLDER --whole FOLDER FOLDER --tiles FOLDER FOLDER --none FOLDER FOLDER

takes what `nano.evaluate --fine 0` wrote, one folder a seed, of the same pictures; the first ones of each way share a
seed, and so on. It writes FOLDER/branches.md. A word's score is the mean over the seeds, and intervals are over
pictures.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..common.command import InputError, Parser, exit_status
from ..common.files import write_atomically
from ..common.json_lines import read_rows
from ..evaluation.tertiles import TERTILES
from .configs import BRANCHES
from .held_out import SIGN, character_error, interval, is_exact, percent, with_interval
from .tables import table

TITLES = {"whole": "branch, sees the whole picture", "tiles": "branch, sees each tile alone", "none": "no branch"}
PLACES = {"across": True, "inside": False}

REPORT = """# The branch, and words across a crop's border

`python -m pheye.nano.branches`; {seeds} seeds; {count} held-out pictures, in {across} of which a border of the crops
passes through the word ([what that means](nano.md#words-across-a-crops-border)).

{words}

Differences of words read exactly, in points. `across, less inside` is the difference of both differences. Intervals
are over the pictures (bootstrap), not over trainings.

{differences}
"""


def rows_of(folder: Path) -> list[dict]:
    """The answers about signs in full pictures, as `nano.evaluate` wrote them.

    Raises:
        InputError: if there are none, or they do not say whether a border passes through the word.
    """
    path = folder / "answers-full.jsonl"
    if not path.is_file():
        raise InputError(f"{folder} has no answers-full.jsonl; give folders that nano.evaluate wrote.")
    rows = [row for row in read_rows(path) if row["kind"] == SIGN]
    if not all("crosses" in row for row in rows):
        raise InputError(f"{path} does not say which words a border crosses; its model has no such crops.")
    return sorted(rows, key=lambda row: row["id"])


def exact_of(runs: Sequence[list[dict]]) -> np.ndarray:
    """Mean over seeds of whether each picture's word was read exactly."""
    return np.mean([[is_exact(row) for row in rows] for rows in runs], axis=0)


def words_table(ways: dict[str, list[list[dict]]]) -> list[str]:
    names = ["way", *(f"{place}, read exactly (95 % interval)" for place in PLACES)]
    names += [f"{place}, characters wrong" for place in PLACES]
    names += [f"{place}, {tertile}" for place in PLACES for tertile in TERTILES]
    lines = []
    for way, runs in ways.items():
        exact = exact_of(runs)
        chosen = {place: [row["crosses"] == crosses for row in runs[0]] for place, crosses in PLACES.items()}
        cells = [with_interval(exact[where].mean(), interval(exact[where])) for where in chosen.values()]
        for where in chosen.values():
            errors = [character_error([row for row, is_in in zip(rows, where, strict=True) if is_in]) for rows in runs]
            cells.append(percent(np.mean(errors)))
        for where in chosen.values():
            for tertile in TERTILES:
                is_in = [one and row["tertile"] == tertile for one, row in zip(where, runs[0], strict=True)]
                cells.append(percent(exact[is_in].mean()) if any(is_in) else "")
        lines.append([TITLES[way], *cells])
    return table(names, lines)


def across(samples: np.ndarray) -> float:
    """Mean of what is in the first column where the second says that a border passes through the word."""
    return samples[samples[:, 1] == 1, 0].mean()


def inside(samples: np.ndarray) -> float:
    return samples[samples[:, 1] == 0, 0].mean()


def across_less_inside(samples: np.ndarray) -> float:
    return across(samples) - inside(samples)


def differences_table(ways: dict[str, list[list[dict]]]) -> list[str]:
    crosses = np.array([row["crosses"] for row in ways["whole"][0]])
    lines = []
    for other in list(ways)[1:]:
        gain = exact_of(ways["whole"]) - exact_of(ways[other])
        samples = np.stack([gain, crosses], axis=1)
        found = (with_interval(one(samples), interval(samples, one)) for one in (across, inside, across_less_inside))
        lines.append([f"{TITLES['whole']}, less {TITLES[other]}", *found])
    return table(["difference", *(f"{name} (95 % interval)" for name in (*PLACES, "across, less inside"))], lines)


def compare(output: Path, **folders: list[Path]):
    """Write the tables; `folders` are the command's options, by way.

    Raises:
        InputError: if the folders are not of the same pictures.
    """
    ways = {way: [rows_of(folder) for folder in folders[way]] for way in BRANCHES}
    asked = {tuple(row["id"] for row in rows) for runs in ways.values() for rows in runs}
    if len(asked) > 1:
        raise InputError("The folders hold answers about other pictures; give each evaluation the same --count.")
    first = ways["whole"][0]
    text = REPORT.format(
        seeds=len(ways["whole"]),
        count=len(first),
        across=sum(row["crosses"] for row in first),
        words="\n".join(words_table(ways)),
        differences="\n".join(differences_table(ways)),
    )
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "branches.md", [text.encode()])
    print(text)


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.branches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    for way in BRANCHES:
        parser.add_argument(f"--{way}", type=Path, nargs="+", required=True, metavar="FOLDER", help=TITLES[way])
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(compare, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
