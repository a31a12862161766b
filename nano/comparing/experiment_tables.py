"""Tables and curves of `nano.experiments`: what each way reads and costs, less the first one, and how it learns."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ...common.files import write_atomically
from ...common.json_lines import read_rows
from ...common.machine import machine
from ...evaluation.tertiles import TERTILES
from ..scoring.held_out import SHAPES, SIGN, exact_shares, interval, percent, share_interval, with_interval
from ..scoring.tables import table
from .ways import WAYS

KINDS = {"signs read": SIGN, "shapes": SHAPES}
COSTS = "seconds_per_step", "seconds_per_question"

REPORT = """# Pheye-nano in several ways

`python -m pheye.nano.experiments`, {budget} of {batch_size} samples of {data} at a learning rate of {rate}, from
{start}; {lora_sets} LoRA sets train where the way says nothing else; {count} held-out pictures with two questions
each, k = {tiles_per_side}; {machine}. A score is the mean over the seeds. Intervals are over the pictures (bootstrap),
not over trainings. Signs are read if no character is wrong: all, and by tertile of letter height. The loss is the mean
of the last tenth of the steps. Keys are the tokens of an image that the text reads.{kept}

{scores}

## Differences

In points, of the same pictures: the way, less {first}.

{differences}

## Curves

Characters wrong after equal steps, in %, of the first {curve_pictures} pictures.{falling}

{curves}

![Loss and characters wrong by step, and characters wrong by time](experiments.png)
"""

FALLING = """
The learning rate falls with the time. So ways with slow steps are further on in their time after equal steps."""

KEPT = """
Features of pictures were kept. So the seconds of a step are those without the vision tower."""


def write_report(results: list[dict], output: Path, device: str, *, curve_pictures: int):
    """Write experiments.md and experiments.png from the results of all runs, whose answers lie in `output`.

    curve_pictures: how many of the held-out pictures the curves are of.
    """
    ways = {name: [result for result in results if result["way"] == name] for name in WAYS}
    ways = {name: runs for name, runs in ways.items() if runs}
    answers = {
        name: [read_rows(output / f"{name}-{run['seed']}" / "answers.jsonl") for run in runs]
        for name, runs in ways.items()
    }
    settings = results[0]["settings"]
    steps, minutes, data = settings["steps"], settings["minutes"], Path(settings["data"])
    text = REPORT.format(
        **{name: settings[name] for name in ("batch_size", "rate", "lora_sets", "count", "tiles_per_side")},
        budget=f"{steps} steps" if minutes is None else f"steps for {minutes:g} minutes",
        data=f"{data.parent.name}/{data.name}",
        start=start_of(settings),
        machine=machine(device),
        kept=KEPT if settings["keep_features"] else "",
        falling="" if minutes is None else FALLING,
        scores="\n".join(scores_table(ways, answers)),
        first=WAYS[next(iter(ways))].title,
        differences="\n".join(differences_table(answers)),
        curve_pictures=min(curve_pictures, settings["count"]),
        curves="\n".join(curves_table(ways)),
    )
    plot(results, output / "experiments.png")
    write_atomically(output / "experiments.md", [text.encode()])


def start_of(settings: dict) -> str:
    if settings["start"]:
        return f"the blocks of {Path(settings['start']).name}"
    return (
        f"new blocks, with an initializer_range of {settings['initializer_range']}, between the eyes and the language "
        f"model of {Path(settings['parts']).name}"
    )


def mean(runs: Sequence[dict], field: Callable[[dict], float]) -> float:
    return statistics.mean(map(field, runs))


def scores_table(ways: dict[str, list[dict]], answers: dict[str, list[list[dict]]]) -> list[str]:
    names = ["way", "seeds", "parameters trained", "keys per image", "signs read, % (95 % interval)", "of each seed"]
    names += ["small, medium, large", "characters wrong, %", "shapes, % (95 % interval)", "loss", "steps"]
    names += ["s per step", "s per question"]
    rows = []
    for name, runs in ways.items():
        signs, shapes = (exact_shares(answers[name], kind) for kind in KINDS.values())
        tertiles = [mean(runs, lambda run, size=size: run["scores"]["by_tertile"][size]["exact"]) for size in TERTILES]
        cells = [WAYS[name].title, str(len(runs)), *(f"{runs[0][count]:,}" for count in ("parameters", "keys"))]
        cells += [with_interval(signs.mean(), share_interval(signs))]
        cells += [", ".join(percent(run["scores"][SIGN]["exact"]) for run in runs), ", ".join(map(percent, tertiles))]
        cells += [percent(mean(runs, lambda run: run["scores"][SIGN]["character_error"]))]
        cells += [with_interval(shapes.mean(), share_interval(shapes)), f"{mean(runs, lambda run: run['loss']):.2f}"]
        cells += [f"{mean(runs, lambda run: run['steps']):.0f}"]
        cells += [f"{mean(runs, lambda run, cost=cost: run[cost]):.2f}" for cost in COSTS]
        rows.append(cells)
    return table(names, rows)


def differences_table(answers: dict[str, list[list[dict]]]) -> list[str]:
    """The mean over the seeds of each way, less that of the first."""
    first, *others = answers
    rows = []
    for name in others:
        gains = [exact_shares(answers[name], kind) - exact_shares(answers[first], kind) for kind in KINDS.values()]
        rows.append([WAYS[name].title, *(with_interval(gain.mean(), interval(gain)) for gain in gains)])
    return table(["way", *(f"{name} (95 % interval)" for name in KINDS)], rows)


def curves_table(ways: dict[str, list[dict]]) -> list[str]:
    """Characters wrong at each of the steps that runs were scored at, mean over the seeds if all came so far."""
    every = next(iter(ways.values()))[0]["settings"]["score_every"]
    last = max(run["steps"] for runs in ways.values() for run in runs)
    steps = range(every, last + 1, every)
    rows = []
    for name, runs in ways.items():
        curves = [{point["step"]: point["character_error"] for point in run["curve"]} for run in runs]
        reached = (all(step in curve for curve in curves) for step in steps)
        cells = [
            percent(statistics.mean(curve[step] for curve in curves)) if known else ""
            for step, known in zip(steps, reached, strict=True)
        ]
        rows.append([WAYS[name].title, *cells, percent(mean(runs, lambda run: run["curve"][-1]["character_error"]))])
    return table(["way", *(f"{step} steps" for step in steps), "at the end"], rows)


def plot(results: list[dict], path: Path):
    """The curves of all runs, a colour for each way."""
    figure = Figure(figsize=(15, 5), layout="constrained")
    panels = [("step", "loss", 1), ("step", "character_error", 100), ("seconds", "character_error", 100)]
    labels = {"step": "steps", "seconds": "seconds of steps", "loss": "loss", "character_error": "characters wrong, %"}
    names = list(dict.fromkeys(result["way"] for result in results))
    for axes, (x, y, factor) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for result in results:
            xs, ys = ([point[name] for point in result["curve"]] for name in (x, y))
            number = names.index(result["way"])
            style = {"color": f"C{number}", "linestyle": "-" if number < 10 else "--", "marker": ".", "linewidth": 1}
            label = WAYS[result["way"]].title if result["seed"] == 0 else None
            axes.plot(xs, [factor * value for value in ys], label=label, **style)
        axes.set(xlabel=labels[x], ylabel=labels[y])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right", fontsize="small")
    figure.savefig(path, dpi=120)
