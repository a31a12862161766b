"""The paper's claims at a size anyone can run: the same frozen parts, joined and trained in several ways.

    python -m pheye.nano.experiments --start nano-runs/stage2 --ways full k1 one_lora no_lora \
        --data nano-runs/tasks/data.jsonl --output nano-runs/views [--steps 500] [--seeds 2] [--count 500]
    python -m pheye.nano.experiments --vision nano-runs/vision/vision --language nano-runs/language/language \
        --tiles_per_side 1 --ways no_lora every4th prefix --data nano-runs/one/data.jsonl --output nano-runs/blocks

Ways that differ in what the views go through begin with the blocks of `--start`, without its LoRA, and are the last
stage; ways that differ in the blocks begin with new ones, here on pictures for one crop (`draw_data --stage tasks
--tiles_per_side 1`). All take as many steps, with a seed on the same samples, and answer the same held-out
questions. The output folder gets a result per run and, from all of them, experiments.md. A run that has a result is
not done again.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from .. import PheyeProcessor
from ..answering.engine import answer
from ..common.command import InputError, Parser, at_least, default_device, exit_status
from ..common.files import read_record, write_atomically, write_record
from ..common.json_lines import read_rows
from ..common.machine import machine
from ..training.collator import PheyeCollator
from ..training.formats import Source
from ..training.mixture import Mixture
from .held_out import SHAPES, SIGN, HeldOutPicture, held_out_pictures, percent, requests_of, scores
from .ways import WAYS, build

WARMUP = 0.1  # share of the steps
TOKENS = 16  # of an answer
COSTS = "seconds_per_step", "seconds_per_question"


def train(
    model: nn.Module,
    processor: PheyeProcessor,
    seed: int,
    *,
    data: Path,
    steps: int,
    batch_size: int,
    rate: float,
    workers: int,
    device: str,
) -> tuple[float, float]:
    """Train for `steps` steps on what requires gradients; the median seconds of a step, and the mean loss of the last
    tenth of them.

    Raises:
        InputError: if the data are too few.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    model.train()
    names = ("input_ids", "attention_mask", "labels", *processor.image_processor.model_input_names)
    batches, seconds, losses = iter(loader(processor, seed, data, steps, batch_size, workers)), [], []
    for _ in tqdm(range(steps), unit=" steps"):
        batch = next(batches)
        batch = {name: batch[name].to(device) for name in names}
        begin = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), statistics.mean(losses[-math.ceil(steps / 10) :])


def loader(processor: PheyeProcessor, seed: int, data: Path, steps: int, batch_size: int, workers: int) -> DataLoader:
    """Batches for `steps` steps, of the same samples for the same seed."""
    mixture = Mixture([Source(str(data), turns=None)], seed)
    if len(mixture) < batch_size * steps:
        raise InputError(f"{data} has {len(mixture)} samples; {steps} steps take {batch_size * steps}.")
    order = torch.randperm(len(mixture), generator=torch.Generator().manual_seed(seed)).tolist()
    collator = PheyeCollator(processor)
    return DataLoader(mixture, batch_size, sampler=order, collate_fn=collator, num_workers=workers)


def run(
    name: str,
    seed: int,
    folder: Path,
    pictures: list[HeldOutPicture],
    *,
    parts: dict,
    training: dict,
    workers: int,
    device: str,
) -> dict:
    """Train one way with one seed on `parts` (arguments of `build`) as `training` (those of `train`) says, and ask it
    about `pictures`; its result, also in a file, from which it is read the next time.

    Raises:
        InputError: if that file has the result of other settings, or the data are too few.
    """
    path, settings = folder / "result.json", {**parts, **training, "count": len(pictures)}
    if (result := read_record(path, settings, folder)) is not None:
        return result
    model, processor = build(WAYS[name], seed, **parts)
    model.to(device)
    seconds, loss = train(model, processor, seed, **training, workers=workers, device=device)
    model.eval()
    begin = time.perf_counter()
    rows = answer(
        lambda: (model, processor),
        requests_of(pictures, None),
        folder / "answers.jsonl",
        batch_size=8,
        generate_kwargs={"max_new_tokens": TOKENS, "do_sample": False},
        settings={"way": name, "seed": seed, "steps": training["steps"], "time": time.time()},
    )
    found = scores(read_rows(rows))
    write_record(
        path,
        settings,
        way=name,
        seed=seed,
        loss=round(loss, 4),
        seconds_per_step=round(seconds, 3),
        seconds_per_question=round((time.perf_counter() - begin) / (2 * len(pictures)), 3),
        scores=found,
    )
    return read_record(path, settings, folder)


REPORT = """# Pheye-nano in several ways

`python -m pheye.nano.experiments`, {steps} steps of {batch} samples of {data} at a learning rate of {rate},
from {start}; {seeds} seeds (mean, and each), {count} held-out pictures with two questions each, k = {tiles};
{machine}. Signs are read if no character is wrong: all, and by tertile of letter height. The loss is the mean of the
last tenth of the steps.

| way | signs read, % | small, medium, large | characters wrong, % | shapes, % | loss | s per step | s per question |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}
"""


def cell(values: list[float], shown: Callable[[float], str] = percent) -> str:
    """The mean of the seeds, and each."""
    return f"{shown(statistics.mean(values))} ({', '.join(map(shown, values))})"


def report(results: list[dict], device: str) -> str:
    lines = []
    for name, way in WAYS.items():
        runs = [result for result in results if result["way"] == name]
        if runs:
            signs = [one["scores"][SIGN] for one in runs]
            by_tertile = [one["scores"]["by_tertile"] for one in runs]
            cells = [
                way.title,
                cell([one["exact"] for one in signs]),
                ", ".join(
                    percent(statistics.mean(one[size]["exact"] for one in by_tertile)) for size in by_tertile[0]
                ),
                cell([one["character_error"] for one in signs]),
                cell([one["scores"][SHAPES]["exact"] for one in runs]),
                cell([one["loss"] for one in runs], "{:.2f}".format),
                *(f"{statistics.mean(one[cost] for one in runs):.2f}" for cost in COSTS),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    settings = results[0]["settings"]
    data = Path(settings["data"])
    return REPORT.format(
        steps=settings["steps"],
        batch=settings["batch_size"],
        data=f"{data.parent.name}/{data.name}",
        rate=settings["rate"],
        start=f"the blocks of {Path(settings['start']).name}" if settings["start"] else "new blocks",
        tiles=settings["tiles_per_side"],
        seeds=len({result["seed"] for result in results}),
        count=settings["count"],
        machine=machine(device),
        rows="\n".join(lines),
    )


def experiments(
    output: Path,
    *,
    start: Path | None,
    vision: Path | None,
    language: Path | None,
    tiles_per_side: int,
    data: Path,
    ways: list[str],
    steps: int,
    batch_size: int,
    rate: float,
    seeds: int,
    count: int,
    workers: int,
    device: str,
):
    """Run what has no result yet and write the table of all; the arguments are the command's options."""
    parts = {"start": start, "vision": vision, "language": language, "tiles_per_side": tiles_per_side}
    training = {"data": data, "steps": steps, "batch_size": batch_size, "rate": rate}
    pictures = held_out_pictures(count, zoom=3 // tiles_per_side)
    options = {"parts": parts, "training": training, "workers": workers, "device": device}
    results = [
        run(name, seed, output / f"{name}-{seed}", pictures, **options) for seed in range(seeds) for name in ways
    ]
    write_atomically(output / "experiments.md", [report(results, device).encode()])


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="a Pheye; its LoRA is left out")
    parser.add_argument("--vision", type=Path, metavar="FOLDER", help="in place of --start, for new blocks")
    parser.add_argument("--language", type=Path, metavar="FOLDER", help="the same")
    parser.add_argument("--tiles_per_side", type=int, choices=[1, 3], default=3, help="of the way that is full")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="by default all that can be")
    parser.add_argument("--steps", type=at_least(1), default=500, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="(default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--seeds", type=at_least(1), default=2, help="(default: %(default)s)")
    parser.add_argument("--count", type=at_least(3), default=500, help="held-out pictures (default: %(default)s)")
    parser.add_argument("--workers", type=at_least(0), default=2, help="processes that open pictures")
    parser.add_argument("--device", default=default_device(), help="(default: %(default)s)")
    options = vars(parser.parse_args(argv))
    start, needed = options["start"], (options["vision"], options["language"])
    if (start is None) == (None in needed):
        parser.error("give either --start, or both --vision and --language")
    possible = [name for name, way in WAYS.items() if not (start and way.needs_new_blocks)]
    options["ways"] = options["ways"] or possible
    if not set(options["ways"]) <= set(possible):
        parser.error(f"with --start only {', '.join(possible)}; the other ways need new blocks")
    return options


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(experiments, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
