"""Tables and plot of `nano.budgets`: what each budget reads, what else would do as well, and what a router saves."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ...common.files import write_atomically
from ..scoring.held_out import FINE, SHAPES, SIGN, interval, of_height, percent, with_interval
from ..scoring.tables import table

GROUPS = {
    "shapes": lambda row: row["kind"] == SHAPES,
    "signs": lambda row: row["kind"] == SIGN and row["letters"] != FINE,
    "signs, small": lambda row: row["kind"] == SIGN and row["letters"] != FINE and row["tertile"] == "small",
    "signs across a border": lambda row: row["kind"] == SIGN and row["letters"] != FINE and row.get("crosses", False),
    "fine signs": lambda row: row["letters"] == FINE,
}
COMPARED = [  # (way, place of its budget) and another; -1 is the largest
    (("universal", -1), ("plain", -1)),
    (("universal", 1), ("one_alone", -1)),
    (("universal", -1), ("two_alone", -1)),
    (("universal", -1), ("views_apart", -1)),
]

REPORT = """# Budgets in Pheye-nano

`python -m pheye.nano.budgets`; {steps} steps a way from {model}, learning rate {rate}, {seeds} seeds; {count}
held-out pictures with a sign and a question about shapes, and {fine} with fine letters ({fine_height} of the height);
{machine}. A score is the mean over the seeds. Intervals are over the pictures (bootstrap), not over trainings.

## What each budget reads

Answers that are exactly right, in %. `GFLOP` is what one encoded picture, a prompt and a first token take, and seconds
are those of an answer; both are without the vision tower. `python -m pheye.benchmarks.complexity --model` counts what
encoding a picture takes more, at each budget.

{curve}

![Right answers by budget](budgets.png)

## Differences

In points, of the same pictures.

{differences}

## The router

It learnt from {routed} other pictures and some with fine letters. `line`: what a coin flip between two budgets reaches
at the router's mean number of blocks, of the best two. `without its kind`: each question's router learnt without
questions of that kind. `rule`: two blocks for signs, none for shapes. `oracle`: the cheapest budget whose answer is
right.

{router}

What the router took, by what the cheapest right answer needs; questions of all seeds. One that no budget answers needs
no block.

{confusion}
"""


def kind_of(row: dict) -> str:
    """The kind of a question: a sign, a fine one, or one of the questions about shapes."""
    if row["kind"] == SIGN:
        return f"{row['letters']} sign"
    return " ".join(row["question"].split()[:2])


def scores_of(row: dict) -> list[float]:
    """Whether the answer is right, at each budget."""
    return [float(answer == row["reference"]) for answer in row["answers"]]


def exact_of(runs: Sequence[dict]) -> np.ndarray:
    """(questions, budgets): the mean over the seeds."""
    return np.mean([[scores_of(row) for row in run["rows"]] for run in runs], axis=0)


# --- Budgets ---


def runs_by_way(results: list[dict]) -> dict[str, list[dict]]:
    ways: dict[str, list[dict]] = {}
    for result in results:
        ways.setdefault(result["way"], []).append(result)
    return ways


def curve_table(ways: dict[str, list[dict]], known: dict) -> list[str]:
    rows = []
    for name, runs in ways.items():
        exact, way = exact_of(runs), known[name]
        for place, budget in enumerate(way.budgets or ((),)):
            cells = [way.title, str(len(budget))]
            for belongs in GROUPS.values():
                chosen = exact[[belongs(row) for row in runs[0]["rows"]], place]
                cells.append(with_interval(chosen.mean(), interval(chosen)) if len(chosen) else "")
            cells += [f"{np.mean([run[cost][place] for run in runs]):.2f}" for cost in ("gflop", "seconds")]
            cells.append(f"{np.mean([run['seconds_per_step'] for run in runs]):.2f}")
            rows.append(cells)
    names = ["way", "blocks", *(f"{name} (95 % interval)" for name in GROUPS)]
    return table([*names, "GFLOP", "s per question", "s per step"], rows)


def differences_table(ways: dict[str, list[dict]], known: dict) -> list[str]:
    rows = []
    for (one, place), (other, other_place) in COMPARED:
        if one in ways and other in ways:
            gain = exact_of(ways[one])[:, place] - exact_of(ways[other])[:, other_place]
            cells = []
            for belongs in GROUPS.values():
                chosen = gain[[belongs(row) for row in ways[one][0]["rows"]]]
                cells.append(with_interval(chosen.mean(), interval(chosen)) if len(chosen) else "")
            blocks = len(known[one].budgets[place])
            rows.append([f"{known[one].title}, at {blocks}, less {known[other].title}", *cells])
    return table(["difference", *(f"{name} (95 % interval)" for name in GROUPS)], rows)


def plot(ways: dict[str, list[dict]], known: dict, path: Path):
    """Right answers by number of blocks, a line for each kind of question, of models whose steps draw a budget."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, runs in ways.items():
        blocks = [len(budget) for budget in known[name].budgets] or [0]
        for number, (group, belongs) in enumerate(GROUPS.items()):
            chosen = exact_of(runs)[[belongs(row) for row in runs[0]["rows"]]]
            if not len(chosen):
                continue
            shares = 100 * chosen.mean(axis=0)
            style = {"color": f"C{number}", "marker": "o" if name == "universal" else "x"}
            label = group if name == "universal" else None
            axes.plot(blocks, shares, linestyle="-" if name == "universal" else "", label=label, **style)
    axes.set_xticks([0, 1, 2])
    axes.set(xlabel="blocks over the image (crosses: other ways)", ylabel="right answers in %", ylim=(0, 100))
    figure.legend(loc="outside right")
    figure.savefig(path, dpi=120)


# --- The router ---


def line_at(cost: float, costs: Sequence[float], means: Sequence[float]) -> float:
    """The best that a coin flip between two budgets reaches at a mean cost."""
    reached = [mean for own, mean in zip(costs, means, strict=True) if own <= cost]
    for low, high in itertools.combinations(range(len(costs)), 2):
        if costs[low] <= cost <= costs[high] and costs[low] < costs[high]:
            share = (cost - costs[low]) / (costs[high] - costs[low])
            reached.append(means[low] + share * (means[high] - means[low]))
    return max(reached)


def choices_of(row: dict) -> dict[str, int]:
    """The place of the budget that each way to choose takes for a question."""
    right = scores_of(row)
    return {
        "router": row["chosen"],
        "router, without its kind": row["chosen_unseen"],
        "rule": len(right) - 1 if row["kind"] == SIGN else 0,
        "oracle": next((place for place, score in enumerate(right) if score), 0),
    }


def router_table(runs: list[dict], budgets: Sequence[Sequence[int]]) -> list[str]:
    """Mean blocks and right answers of each way to choose, and the difference from the line between fixed budgets."""
    costs, rows = [len(budget) for budget in budgets], []
    exact = exact_of(runs)  # (questions, budgets)
    pictures = np.unique([picture_of(row) for row in runs[0]["rows"]], return_inverse=True)[1]
    for name in choices_of(runs[0]["rows"][0]):
        places = [[choices_of(row)[name] for row in run["rows"]] for run in runs]
        blocks = np.mean([[costs[place] for place in own] for own in places], axis=0)
        right = np.mean(
            [
                [scores_of(row)[place] for row, place in zip(run["rows"], own, strict=True)]
                for run, own in zip(runs, places, strict=True)
            ],
            axis=0,
        )
        # Sums over each picture, so that the draws of the bootstrap are of pictures.
        questions = np.column_stack([np.ones_like(blocks), blocks, right, exact])
        samples = np.zeros((pictures.max() + 1, questions.shape[1]))
        np.add.at(samples, pictures, questions)

        def above_line(samples: np.ndarray) -> float:
            count, blocks, right, *fixed = samples.sum(axis=0)
            return right / count - line_at(blocks / count, costs, [one / count for one in fixed])

        gain = with_interval(above_line(samples), interval(samples, above_line))
        rows.append([name, f"{blocks.mean():.2f}", percent(right.mean()), gain])
    return table(["choice by", "blocks, mean", "right, %", "less the line, points (95 % interval)"], rows)


def picture_of(row: dict) -> str:
    return row["id"].rpartition("-")[0]


def confusion_table(runs: list[dict], budgets: Sequence[Sequence[int]]) -> list[str]:
    counts = np.zeros((len(budgets), len(budgets)), int)
    for run in runs:
        for row in run["rows"]:
            counts[choices_of(row)["oracle"], row["chosen"]] += 1
    blocks = [len(budget) for budget in budgets]
    rows = [[f"needs {needed}", *map(str, own)] for needed, own in zip(blocks, counts, strict=True)]
    return table(["blocks", *(f"router took {taken}" for taken in blocks)], rows)


def write_report(results: list[dict], known: dict, settings: dict, machine: str, output: Path):
    """Write the tables and the plot of all runs; `known`: the ways by name."""
    ways = runs_by_way(results)
    router = confusion = ["(not run)"]
    if "universal" in ways:
        router, confusion = (
            make(ways["universal"], known["universal"].budgets) for make in (router_table, confusion_table)
        )
    text = REPORT.format(
        **settings,
        seeds=len({result["seed"] for result in results}),
        fine_height=of_height(FINE),
        machine=machine,
        curve="\n".join(curve_table(ways, known)),
        differences="\n".join(differences_table(ways, known)),
        router="\n".join(router),
        confusion="\n".join(confusion),
    )
    plot(ways, known, output / "budgets.png")
    write_atomically(output / "budgets.md", [text.encode()])
    print(text)
