"""What keeping the shape of a picture brings to Pheye-nano: a stretched picture's crops against canvases (after FILA).

    python -m pheye.nano.canvases --model checkpoints/pheye-nano --data nano-runs/mixture.json --output OUTPUT
        [--steps 200] [--seeds 2] [--count 250]

Each way takes as many steps from the same model, with a seed on the same pictures, and reads the same held-out signs
on pictures of four shapes. Features of pictures are kept in OUTPUT, and used up to four times, as `nano.replay` does.
OUTPUT gets a folder for each run and, from all of them, canvases.md. A run that has a result is not done again.
"""

import argparse
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import PheyeConfig, PheyeForConditionalGeneration, PheyeProcessor
from ..canvases_pheye import place_image, views_in
from ..common.command import Parser, at_least, exit_status
from ..common.files import write_atomically
from ..common.machine import machine
from ..training.mixture import Mixture, read_mixture
from .learning.checkpoints import claim
from .learning.configs import VIEW
from .learning.features import BATCH, FeatureStore
from .learning.kept_training import add_options, ask, once, opened, train, weights_of
from .scoring.held_out import (
    ASPECTS,
    HeldOutPicture,
    held_out_pictures,
    interval,
    is_exact,
    percent,
    requests_of,
    with_interval,
)
from .scoring.tables import table


@dataclass(frozen=True)
class Way:
    """canvases: of the model, or none: pictures are stretched onto k x k crops, by default as many as it had."""

    title: str
    canvases: str | None = None
    tiles_per_side: int | None = None


WAYS = {
    "stretched": Way("3 x 3 crops, stretched"),
    "stretched_2": Way("2 x 2 crops, stretched", tiles_per_side=2),
    "fila": Way("five canvases after FILA, of up to 4 crops", "fila"),
    "wide": Way("all canvases of up to 9 crops", "wide"),
}
HEIGHTS = 10, 14, 20, 28  # edges of groups of capitals, in pixels of the crops

REPORT = """# Canvases in Pheye-nano

`python -m pheye.nano.canvases`; {steps} steps a way from {model}, learning rate {rate}, {seeds} seeds; {count}
held-out pictures of each shape, width to height; {machine}. A score is the mean over the seeds. Intervals are over the
pictures (bootstrap), not over trainings. Pictures of all shapes have as many pixels, and letters as high.

## By shape

Words read exactly, in %.

{shapes}

Capitals in pixels of the crops, mean height, and views of a picture, mean:

{sizes}

## Differences

In points, of the same pictures.

{differences}

## By height

Words read exactly, in %, of all shapes, by the height of their capitals in pixels of the crops; in brackets, how many.

{heights}
"""


def build(way: str, folder: Path, seed: int, device: str) -> tuple[PheyeForConditionalGeneration, PheyeProcessor]:
    """The model in `folder` with the crops of a way, its trained parts chosen, and its processor."""
    canvases, tiles_per_side = WAYS[way].canvases, WAYS[way].tiles_per_side
    processor = PheyeProcessor.from_pretrained(folder, canvases=canvases)
    if tiles_per_side is not None:
        processor.image_processor.tiles_per_side = tiles_per_side
    return opened(folder, device, seed, tiles_per_side, canvases=canvases), processor


def on_canvas(picture: HeldOutPicture, config: PheyeConfig) -> tuple[float, int]:
    """The height of the picture's capitals in pixels of the crops, and the number of its views."""
    width, height = picture.image().size
    place = place_image(width, height, config.tiles_per_side, config.canvases, (VIEW, VIEW))
    _, top, _, bottom = place.shares((VIEW, VIEW))
    return picture.cap_height * (bottom - top) * place.rows * VIEW, views_in((place.rows, place.columns))


def rows_of(
    model: PheyeForConditionalGeneration, processor: PheyeProcessor, pictures: list[HeldOutPicture], folder: Path
) -> list[dict]:
    """A row for each of some pictures of one shape; features are kept in `folder`."""
    shape = pictures[0].letters
    rows = ask(model, processor, requests_of(pictures, None), folder / shape)
    places = {picture.index: on_canvas(picture, model.config) for picture in pictures}
    for row in rows:
        pixels, views = places[int(row["id"].partition("-")[0])]
        row |= {"id": f"{shape}-{row['id']}", "shape": shape, "pixels": round(pixels, 2), "views": views}
    return rows


def run(
    name: str,
    seed: int,
    output: Path,
    *,
    model: Path,
    mixture: Mixture,
    steps: int,
    rate: float,
    pictures: dict[str, list[HeldOutPicture]],
    settings: dict,
    device: str,
) -> dict:
    """Train one way with one seed, and ask it about `pictures`, by their shape."""

    def trained_and_asked() -> tuple[dict, list[dict]]:
        trained, processor = build(name, model, seed, device)
        store = FeatureStore(output / f"features-{name}", mixture, processor, BATCH, 0)
        found = train(trained, store, steps, rate, seed)
        folder = output / f"asked-{name}"
        folder.mkdir(exist_ok=True)
        return found, [row for alike in pictures.values() for row in rows_of(trained, processor, alike, folder)]

    return {"way": name, "seed": seed, **once(output / f"{name}-{seed}", settings, trained_and_asked)}


# --- Tables ---


def exact_of(runs: list[dict]) -> np.ndarray:
    """Mean over the seeds of whether each picture's word was read exactly."""
    return np.mean([[is_exact(row) for row in run["rows"]] for run in runs], axis=0)


def values_of(runs: list[dict], name: str) -> np.ndarray:
    return np.array([row[name] for row in runs[0]["rows"]])


def shapes_table(ways: dict[str, list[dict]]) -> list[str]:
    lines = []
    for name, runs in ways.items():
        exact, shapes = exact_of(runs), values_of(runs, "shape")
        cells = [with_interval(exact[chosen].mean(), interval(exact[chosen])) for chosen in each_shape(shapes)]
        seconds = np.mean([run["seconds_per_step"] for run in runs])
        lines.append([WAYS[name].title, *cells, percent(exact.mean()), f"{seconds:.2f}"])
    names = [f"{shape} (95 % interval)" for shape in ASPECTS]
    return table(["way", *names, "all", "s per step"], lines)


def each_shape(shapes: np.ndarray) -> list[np.ndarray]:
    return [shapes == shape for shape in ASPECTS]


def sizes_table(ways: dict[str, list[dict]]) -> list[str]:
    lines = []
    for name, runs in ways.items():
        shapes, pixels, views = (values_of(runs, field) for field in ("shape", "pixels", "views"))
        means = [(pixels[chosen].mean(), views[chosen].mean()) for chosen in each_shape(shapes)]
        lines.append([WAYS[name].title, *(f"{height:.1f} in {count:.1f}" for height, count in means)])
    return table(["way", *ASPECTS], lines)


def differences_table(ways: dict[str, list[dict]]) -> list[str]:
    lines = []
    shaped, stretched = ([name for name in ways if bool(WAYS[name].canvases) is has] for has in (True, False))
    for name, other in itertools.product(shaped, stretched):
        gain = exact_of(ways[name]) - exact_of(ways[other])
        chosen = [*each_shape(values_of(ways[name], "shape")), np.ones(len(gain), bool)]
        cells = [with_interval(gain[one].mean(), interval(gain[one])) for one in chosen]
        lines.append([f"{WAYS[name].title}, less {WAYS[other].title}", *cells])
    return table(["difference", *(f"{shape} (95 % interval)" for shape in (*ASPECTS, "all"))], lines)


def heights_table(ways: dict[str, list[dict]]) -> list[str]:
    edges, lines = (0, *HEIGHTS, 10**6), []
    for name, runs in ways.items():
        exact, pixels = exact_of(runs), values_of(runs, "pixels")
        cells = []
        for low, high in itertools.pairwise(edges):
            chosen = exact[(low <= pixels) & (pixels < high)]
            cells.append(f"{percent(chosen.mean())} ({len(chosen)})" if len(chosen) else "")
        lines.append([WAYS[name].title, *cells])
    between = [f"{low} to {high}" for low, high in itertools.pairwise(HEIGHTS)]
    return table(["way", f"below {HEIGHTS[0]}", *between, f"{HEIGHTS[-1]} and more"], lines)


def write_report(results: list[dict], settings: dict, machine: str, output: Path):
    ways: dict[str, list[dict]] = {}
    for result in results:
        ways.setdefault(result["way"], []).append(result)
    makers = {"shapes": shapes_table, "sizes": sizes_table, "differences": differences_table, "heights": heights_table}
    tables = {name: "\n".join(make(ways)) for name, make in makers.items()}
    text = REPORT.format(**settings, **tables, seeds=len({result["seed"] for result in results}), machine=machine)
    write_atomically(output / "canvases.md", [text.encode()])
    print(text)


# --- The command ---


def canvases(
    output: Path,
    *,
    model: Path,
    data: list[str],
    ways: list[str],
    steps: int,
    rate: float,
    seeds: int,
    count: int,
    device: str,
):
    """Run what has no result yet, and write the tables of all; the arguments are the command's options."""
    settings = {"model": model, "data": data, "steps": steps, "rate": rate, "count": count}
    settings["weights"] = weights_of(model)
    claim(output, **settings)
    mixture = Mixture(read_mixture(data, turns=None), 0)
    pictures = {shape: held_out_pictures(count, letters=shape) for shape in ASPECTS}
    options = {"model": model, "mixture": mixture, "steps": steps, "rate": rate, "pictures": pictures}
    options |= {"settings": settings, "device": device}
    results = [run(name, seed, output, **options) for seed in range(seeds) for name in ways]
    write_report(results, settings, machine(device), output)


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.canvases", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, 200)
    parser.add_argument("--data", nargs="+", required=True, help="as the training command takes it")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="(default: all)")
    parser.add_argument(
        "--count", type=at_least(3), default=250, help="held-out pictures of each shape (default: %(default)s)"
    )
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(canvases, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
