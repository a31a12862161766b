"""What the branch brings where a crop's border passes through a word: ways with and without one, trained and asked.

    python -m pheye.nano.branches --model nano-runs/base3 --data nano-runs/mixture.json --output OUTPUT
        [--pictures 1200] [--rounds 120] [--seeds 2] [--count 1000] [--fine 300] [--ways whole none]

Each way begins with the same Pheye-nano, which has no branch. Eyes learn (`nano.eyes`) and stand before what the
model has learnt (`nano.join`), and its blocks learn (`nano.replay`), with a seed on the same pictures. Then it reads
held-out signs. OUTPUT gets a folder for each run and, from all of them, branches.md. A run that was killed goes on
from its last checkpoint, and one that has a result is not done again.
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import PheyeProcessor
from ..common.command import Parser, at_least, default_device, exit_status
from ..common.files import write_atomically
from ..common.json_lines import read_rows
from ..common.machine import machine
from ..evaluation.tertiles import TERTILES
from .learning.checkpoints import LOG, claim
from .learning.commands import begin, finish
from .learning.configs import TILES
from .learning.kept_training import ask, clock_of, once, opened, weights_of
from .scoring.held_out import (
    FINE,
    MAIN,
    SIGN,
    HeldOutPicture,
    character_error,
    exact_shares,
    held_out_pictures,
    interval,
    of_height,
    percent,
    requests_of,
    with_interval,
)
from .scoring.tables import table


@dataclass(frozen=True)
class Way:
    """branch: one of `configs.BRANCHES`; more: pictures and rounds, over those of the others."""

    title: str
    branch: str
    more: float = 1


WAYS = {
    "whole": Way("branch, sees the whole picture", "whole"),
    "tiles": Way("branch, sees each tile alone", "tiles"),
    "none": Way("no branch", "none"),
    "longer": Way("no branch, two fifths more pictures", "none", 1.4),
}
PLACES = {"across": True, "inside": False}  # whether a border passes through the word
PLACES_OF_EYES = {"across": "crossing", "inside": "inside"}  # by their names in the log of the eyes

REPORT = """# The branch, and words across a crop's border

`python -m pheye.nano.branches`; {pictures} pictures for the eyes and {rounds} rounds for the blocks, from {model};
{seeds} seeds; {machine}. In {across} of {count} held-out pictures a border of the crops passes through the word ([what
that means](nano.md#words-across-a-crops-border)). {fine} others have fine letters, of {fine_height} of the height. A
score is the mean over the seeds. Intervals are over the pictures (bootstrap), not over trainings.

## Words read exactly

In %. The tertiles are of the letters' height.

{words}

## Differences

In points, of the same pictures. `across, less inside` is the difference of both differences.

{differences}

## Cost, and what the eyes know

Minutes of training; those of the eyes and the seconds of a question are the processor's on a CPU. A question's include
its picture's way through the eyes. The last columns are of patches of crops with a letter, in words across a border
and inside: how often the eyes tell the letter before it in the word.

{costs}
"""


# --- Running ---


def run(
    name: str,
    seed: int,
    output: Path,
    *,
    model: Path,
    data: list[str],
    pictures: int,
    rounds: int,
    tested: dict[str, list[HeldOutPicture]],
    settings: dict,
    device: str,
) -> dict:
    """Train one way with one seed, and let it read the sets `tested`."""
    way, folder = WAYS[name], output / f"{name}-{seed}"
    seen, base, read, asked = (folder / part for part in ("eyes", "base", "read", "asked"))

    def trained_and_asked() -> tuple[dict, list[dict]]:
        options = {"seed": seed, "device": device}
        start, count = model / "model.safetensors", round(way.more * pictures)
        finish(begin("eyes", output=seen, start=start, branch=way.branch, pictures=count, **options))
        finish(begin("join", model=model, eyes=seen / "eyes.safetensors", branch=way.branch, output=base))
        finish(begin("replay", model=base, data=data, output=read, rounds=round(way.more * rounds), **options))
        trained, processor = opened(read, device), PheyeProcessor.from_pretrained(read)
        rows, clock = [], clock_of(device)
        began = clock()
        asked.mkdir(exist_ok=True)
        for letters, chosen in tested.items():
            requests = [request for request in requests_of(chosen, None) if request.fields["kind"] == SIGN]
            rows += [{**row, "letters": letters} for row in ask(trained, processor, requests, asked / letters)]
        seconds = (clock() - began) / len(rows)  # fewer, if killed here: features are kept
        for features in (read / "features", asked):
            shutil.rmtree(features, ignore_errors=True)  # gone already, if killed here
        known, minutes = read_rows(seen / LOG)[-1], "cpu_minutes" if device == "cpu" else "minutes"
        found = {
            "minutes": [spent(seen / LOG, minutes), spent(read / LOG, "seconds") / 60],
            "steps": [known["step"], read_rows(read / LOG)[-1]["step"]],
            "seconds_per_question": round(seconds, 2),
            "parameters": trained.num_parameters(),
            "eyes": {place: known[f"before_{name}"] for place, name in PLACES_OF_EYES.items()},
        }
        return found, rows

    return {"way": name, "seed": seed, **once(folder, settings, trained_and_asked)}


def spent(log: Path, field: str) -> float:
    """The sum of what `field` counts in a log, which begins anew where a killed run goes on."""
    counted = [row[field] for row in read_rows(log)]
    return sum(one for one, after in zip(counted, [*counted[1:], 0], strict=True) if after < one)


# --- Tables ---


def exact_of(runs: list[dict], chosen: Callable[[dict], bool]) -> np.ndarray:
    return exact_shares([run["rows"] for run in runs], chosen)


def of_place(place: str, tertile: str | None = None) -> Callable[[dict], bool]:
    """Whether a row is of a word across a border or inside a crop, and of a tertile if one is given."""
    return lambda row: row["letters"] == MAIN and row["crosses"] == PLACES[place] and tertile in (None, row["tertile"])


def is_fine(row: dict) -> bool:
    return row["letters"] == FINE


def words_table(ways: dict[str, list[dict]]) -> list[str]:
    names = ["way", *(f"{place} (95 % interval)" for place in (*PLACES, "fine letters"))]
    names += [f"{place}, characters wrong" for place in PLACES]
    names += [f"{place}, {tertile}" for place in PLACES for tertile in TERTILES]
    lines = []
    for way, runs in ways.items():
        groups = [exact_of(runs, chosen) for chosen in (*map(of_place, PLACES), is_fine)]
        cells = [with_interval(exact.mean(), interval(exact)) if len(exact) else "" for exact in groups]
        for place in PLACES:
            errors = [character_error(list(filter(of_place(place), run["rows"]))) for run in runs]
            cells.append(percent(np.mean(errors)))
        for place in PLACES:
            for tertile in TERTILES:
                exact = exact_of(runs, of_place(place, tertile))
                cells.append(percent(exact.mean()) if len(exact) else "")
        lines.append([WAYS[way].title, *cells])
    return table(names, lines)


def across(samples: np.ndarray) -> float:
    """Mean of what is in the first column where the second says that a border passes through the word."""
    return samples[samples[:, 1] == 1, 0].mean()


def inside(samples: np.ndarray) -> float:
    return samples[samples[:, 1] == 0, 0].mean()


def across_less_inside(samples: np.ndarray) -> float:
    return across(samples) - inside(samples)


def differences_table(ways: dict[str, list[dict]]) -> list[str]:
    def is_main(row: dict) -> bool:
        return row["letters"] == MAIN

    crosses = np.array([row["crosses"] for row in ways["whole"][0]["rows"] if is_main(row)])
    lines = []
    for other in ways:
        if other == "whole":
            continue
        samples = np.stack([exact_of(ways["whole"], is_main) - exact_of(ways[other], is_main), crosses], axis=1)
        cells = [with_interval(one(samples), interval(samples, one)) for one in (across, inside, across_less_inside)]
        fine = exact_of(ways["whole"], is_fine) - exact_of(ways[other], is_fine)
        cells.append(with_interval(fine.mean(), interval(fine)) if len(fine) else "")
        lines.append([f"{WAYS['whole'].title}, less {WAYS[other].title}", *cells])
    names = (*PLACES, "across, less inside", "fine letters")
    return table(["difference", *(f"{name} (95 % interval)" for name in names)], lines)


def costs_table(ways: dict[str, list[dict]]) -> list[str]:
    lines = []
    for way, runs in ways.items():
        minutes = np.mean([run["minutes"] for run in runs], axis=0)
        known = [percent(np.mean([run["eyes"][place] for run in runs])) for place in PLACES]
        cells = [f"{runs[0]['parameters']:,}"]
        for spent_on, steps in zip(minutes, np.mean([run["steps"] for run in runs], axis=0), strict=True):
            cells += [f"{spent_on:.0f}", f"{60 * spent_on / steps:.2f}"]
        cells.append(f"{np.mean([run['seconds_per_question'] for run in runs]):.2f}")
        lines.append([WAYS[way].title, *cells, *known])
    names = [f"{part}, {unit}" for part in ("eyes", "blocks") for unit in ("minutes", "s per step")]
    known = [f"letter before, {place}, %" for place in PLACES]
    return table(["way", "parameters", *names, "s per question", *known], lines)


# --- The command ---


def branches(
    output: Path,
    *,
    model: Path,
    data: list[str],
    ways: list[str],
    pictures: int,
    rounds: int,
    seeds: int,
    count: int,
    fine: int,
    device: str,
):
    """Run what has no result yet, and write the tables of all; the arguments are the command's options."""
    settings = {"model": model, "data": data, "pictures": pictures, "rounds": rounds, "count": count, "fine": fine}
    settings["weights"] = weights_of(model)
    claim(output, **settings)
    sets = {MAIN: count, FINE: fine}
    tested = {
        letters: held_out_pictures(number, letters=letters, tiles_per_side=TILES) for letters, number in sets.items()
    }
    options = {"model": model, "data": data, "pictures": pictures, "rounds": rounds, "tested": tested}
    options |= {"settings": settings, "device": device}
    found: dict[str, list[dict]] = {name: [] for name in ways}
    for seed in range(seeds):
        for name in ways:
            found[name].append(run(name, seed, output, **options))
    text = REPORT.format(
        **settings,
        seeds=seeds,
        across=sum(bool(picture.crosses) for picture in tested[MAIN]),
        fine_height=of_height(FINE),
        machine=machine(device),
        words="\n".join(words_table(found)),
        differences="\n".join(differences_table(found) if "whole" in ways else ["(not run)"]),
        costs="\n".join(costs_table(found)),
    )
    write_atomically(output / "branches.md", [text.encode()])
    print(text)


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.branches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="a Pheye-nano without a branch")
    parser.add_argument("--data", nargs="+", required=True, help="as the training command takes it")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="(default: all)")
    parser.add_argument("--pictures", type=at_least(1), default=1200, help="for the eyes (default: %(default)s)")
    parser.add_argument("--rounds", type=at_least(1), default=120, help="for the blocks (default: %(default)s)")
    parser.add_argument("--seeds", type=at_least(1), default=2, help="(default: %(default)s)")
    parser.add_argument("--count", type=at_least(3), default=1000, help="held-out pictures (default: %(default)s)")
    parser.add_argument("--fine", type=at_least(3), default=300, help="more, with fine letters (default: %(default)s)")
    parser.add_argument("--device", default=default_device(), help="(default: %(default)s)")
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(branches, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
