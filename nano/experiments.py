"""The paper's claims at a size anyone can run: the same frozen parts, joined and trained in several ways.

    python -m pheye.nano.experiments --start nano-runs/stage2 --ways full k1 one_lora no_lora \
        --data nano-runs/tasks/data.jsonl --output nano-runs/views [--steps 125] [--seeds 2] [--count 500]
    python -m pheye.nano.experiments --parts checkpoints/pheye-nano \
        --tiles_per_side 1 --lora_sets 0 --ways full fromage prefix --data nano-runs/one/data.jsonl \
        --output nano-runs/connectors [--minutes 30]

Ways that differ in what the views go through begin with the blocks of `--start`, without its LoRA, and are the last
stage; ways that differ in the blocks, or have none, begin with new ones between the eyes and the language model of
`--parts`, on pictures for as many crops (`draw_data --stage tasks --tiles_per_side 1`). All take as many steps, or
with `--minutes` steps for as long, with a seed on the same samples, and answer the same held-out questions. Times on a
CPU are the processor's, so that waiting for other work counts for nothing (its use of caches does); use one thread.
With `--steps` a run uses a picture up to four times. `--keep_features` encodes it once for all runs, where no LoRA
trains.
The output folder gets a result per run and, from all of them, experiments.md and its curves, experiments.png. A run
that has a result is not done again.
"""

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .. import PheyeProcessor
from ..answering.engine import answer, answer_batches
from ..answering.rows import row
from ..common.command import InputError, Parser, at_least, default_device, exit_status
from ..common.files import read_record, write_record
from ..common.json_lines import read_rows
from ..training.collator import PheyeCollator
from ..training.formats import Source
from ..training.mixture import Mixture
from .comparing.connectors import keys_per_image
from .comparing.experiment_tables import write_report
from .comparing.ways import WAYS, build
from .learning.checkpoints import autocast, claim
from .learning.configs import INITIALIZER_RANGE
from .learning.features import FeatureStore, features_as_pixels
from .learning.kept_training import clock_of, weights_of
from .scoring.held_out import SHAPES, SIGN, HeldOutPicture, held_out_pictures, requests_of, scores

WARMUP = 0.1  # share of the steps or minutes
TOKENS = 16  # of an answer
ANSWERING = {"batch_size": 8, "generate_kwargs": {"max_new_tokens": TOKENS, "do_sample": False}}
CURVE_PICTURES = 50  # the first of the held-out ones, for the curves
TOGETHER, USES = 8, 4  # pictures whose features are kept in one file, and how often a run may use a picture
ALIKE = 8  # batches whose samples are sorted by length


def train(
    model: nn.Module,
    processor: PheyeProcessor,
    seed: int,
    pictures: list[HeldOutPicture],
    *,
    data: Path,
    steps: int | None,
    minutes: float | None,
    batch_size: int,
    rate: float,
    score_every: int,
    workers: int,
    device: str,
    features: Path | None,
) -> dict:
    """Train what requires gradients for `steps` steps, or until the steps have taken so many `minutes`. With a folder
    for `features`, those of pictures are kept there.

    Returns: the number of steps, the mean loss of the last tenth, the mean seconds of a step, and the curve: every
        `score_every` steps and at the end what the steps have taken, their loss, and scores on `pictures`.

    Raises:
        InputError: if the data are too few.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98))
    source = batches(processor, seed, data, steps, batch_size, workers)
    reading, of_images = nullcontext, processor.image_processor.model_input_names
    if features is not None:
        source = kept_batches(model, processor, seed, data, features, steps, batch_size)
        reading, of_images = partial(features_as_pixels, model.pheye), ["pixel_values"]
    names = ("input_ids", "attention_mask", "labels", *of_images)
    seconds, losses, curve, clock = [], [], [], clock_of(device)
    model.train()
    bar = tqdm(total=steps, unit=" steps")
    for batch in source:
        passed = len(losses) / steps if minutes is None else sum(seconds) / (60 * minutes)
        if passed >= 1:
            break
        batch = {name: batch[name].to(device) for name in names}
        begin = clock()
        optimizer.param_groups[0]["lr"] = rate * rate_share(passed)
        with reading():
            losses.append(learn(model, batch, optimizer))
        seconds.append(clock() - begin)
        bar.update()
        if len(losses) % score_every == 0:
            curve.append(curve_point(model, processor, pictures, seconds, losses[-score_every:]))
    if left := len(losses) % score_every:
        curve.append(curve_point(model, processor, pictures, seconds, losses[-left:]))
    return {
        "steps": len(losses),
        "loss": round(statistics.mean(losses[-math.ceil(len(losses) / 10) :]), 4),
        "seconds_per_step": round(statistics.mean(seconds), 3),
        "curve": curve,
    }


def learn(model: nn.Module, batch: dict, optimizer: torch.optim.Optimizer) -> float:
    """A step; its loss."""
    with autocast(batch["labels"].device.type):
        loss = model(**batch).loss
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()  # waits for the device


def rate_share(passed: float) -> float:
    """Of the learning rate, when this share of the steps or minutes is over: a straight rise, then a cosine to 0."""
    if passed < WARMUP:
        return passed / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (passed - WARMUP) / (1 - WARMUP)))


def check_enough(data: Path, samples: int, used: int, steps: int | None, batch_size: int):
    """Of the `samples` in `data`, `used` are seen in one pass.

    Raises:
        InputError: if `steps` would take one more than USES times.
    """
    needed = batch_size * (steps or 1)
    if USES * used < needed:
        raise InputError(
            f"{data} has {samples} samples; {steps or 1} steps take {needed}, each up to {USES} times. Draw more."
        )


def batches(
    processor: PheyeProcessor, seed: int, data: Path, steps: int | None, batch_size: int, workers: int
) -> Iterator[dict]:
    """Batches without end, of the same samples for the same seed, none more than USES times within `steps`."""
    mixture = Mixture([Source(str(data), turns=None)], seed)
    check_enough(data, len(mixture), len(mixture) - len(mixture) % batch_size, steps, batch_size)
    generator, collator = torch.Generator().manual_seed(seed), PheyeCollator(processor)
    for _ in itertools.count():
        order = torch.randperm(len(mixture), generator=generator).tolist()
        options = {"sampler": order, "collate_fn": collator, "num_workers": workers, "drop_last": True}
        yield from DataLoader(mixture, batch_size, **options)


def kept_batches(
    model: nn.Module,
    processor: PheyeProcessor,
    seed: int,
    data: Path,
    features: Path,
    steps: int | None,
    batch_size: int,
) -> Iterator[dict]:
    """The same with the features of pictures in place of pixels; none more than USES times within `steps`. Texts of a
    batch are alike in length and need little padding."""
    mixture = Mixture([Source(str(data), turns=None)], 0)
    count = len(mixture) - len(mixture) % TOGETHER
    check_enough(data, len(mixture), count - count % batch_size, steps, batch_size)
    store = FeatureStore(features, mixture, processor, TOGETHER, seed=0)
    generator = torch.Generator().manual_seed(seed)
    for _ in itertools.count():
        order = torch.randperm(count, generator=generator).tolist()
        for first in range(0, count, ALIKE * batch_size):
            drawn = sorted(order[first : first + ALIKE * batch_size], key=store.length)
            for place in torch.randperm(len(drawn) // batch_size, generator=generator).tolist():
                indices = drawn[place * batch_size : (place + 1) * batch_size]
                for number in {index // TOGETHER for index in indices}:
                    store.encode(number, model)
                batch = store.batch(indices)
                yield {**batch, "pixel_values": batch.pop("features").unflatten(0, (batch_size, -1))}


def curve_point(
    model: nn.Module,
    processor: PheyeProcessor,
    pictures: list[HeldOutPicture],
    seconds: list[float],
    losses: list[float],
) -> dict:
    """Where the training is: steps and seconds so far, the mean of `losses`, and scores on `pictures`."""
    model.eval()
    answered = answer_batches(model, processor, requests_of(pictures, None), workers=0, **ANSWERING)
    found = scores([row(request, "answer", *result) for batch in answered for request, *result in batch])
    model.train()
    return {
        "step": len(seconds),
        "seconds": round(sum(seconds), 1),
        "loss": round(statistics.mean(losses), 4),
        "exact": found[SIGN]["exact"],
        "character_error": found[SIGN]["character_error"],
        "shapes": found[SHAPES]["exact"],
    }


def run(
    name: str,
    seed: int,
    folder: Path,
    pictures: list[HeldOutPicture],
    *,
    built: dict,
    training: dict,
    keep_features: bool,
    workers: int,
    device: str,
) -> dict:
    """Train one way with one seed, `built` by these arguments of `build`, as `training` (those of `train`) says, and
    ask it about `pictures`; its result, also in a file, from which it is read the next time.

    Raises:
        InputError: if that file has the result of other settings, or the data are too few.
    """
    path, settings = folder / "result.json", {**built, **training, "count": len(pictures)}
    settings["keep_features"] = keep_features
    settings["weights"] = weights_of(built["start"] or built["parts"])
    if (result := read_record(path, settings, folder)) is not None:
        return result
    model, processor = build(WAYS[name], seed, **built)
    model.to(device)
    if device == "cpu":
        model.pheye.set_attn_implementation({"": "eager"})  # of the blocks: faster there, see `kept_training.PART`
    features = None
    if keep_features:
        features = folder.parent / f"features-{processor.image_processor.tiles_per_side}"
        claim(features, data=training["data"], weights=settings["weights"])
    costs = {
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "keys": keys_per_image(model),
    }
    options = {**training, "workers": workers, "device": device, "features": features}
    trained = train(model, processor, seed, pictures[:CURVE_PICTURES], **options)
    write_record(path, settings, way=name, seed=seed, **costs, **trained, **asked(model, processor, pictures, folder))
    return read_record(path, settings, folder)


def asked(model: nn.Module, processor: PheyeProcessor, pictures: list[HeldOutPicture], folder: Path) -> dict:
    """Scores of the answers about all pictures, and the seconds of one."""
    model.eval()
    for path in folder.glob("answers.jsonl*"):  # of a run before, which was killed and had another model
        path.unlink()
    clock = clock_of(model.device.type)
    begin = clock()
    rows = answer(
        lambda: (model, processor),
        requests_of(pictures, None),
        folder / "answers.jsonl",
        **ANSWERING,
        settings={},
    )
    found = scores(read_rows(rows))
    seconds = (clock() - begin) / (2 * len(pictures))
    return {"seconds_per_question": round(seconds, 3), "scores": found}


def experiments(
    output: Path,
    *,
    start: Path | None,
    parts: Path | None,
    tiles_per_side: int,
    lora_sets: int,
    initializer_range: float,
    data: Path,
    ways: list[str],
    steps: int | None,
    minutes: float | None,
    batch_size: int,
    rate: float,
    score_every: int,
    seeds: int,
    count: int,
    keep_features: bool,
    workers: int,
    device: str,
):
    """Run what has no result yet and write table and curves of all; the arguments are the command's options."""
    built = {"start": start, "parts": parts, "tiles_per_side": tiles_per_side, "lora_sets": lora_sets}
    built["initializer_range"] = initializer_range
    training = {"data": data, "steps": steps, "minutes": minutes, "batch_size": batch_size, "rate": rate}
    training["score_every"] = score_every
    pictures = held_out_pictures(count, zoom=3 / tiles_per_side)
    options = {"built": built, "training": training, "keep_features": keep_features}
    options |= {"workers": workers, "device": device}
    results = [
        run(name, seed, output / f"{name}-{seed}", pictures, **options) for seed in range(seeds) for name in ways
    ]
    write_report(results, output, device, curve_pictures=CURVE_PICTURES)


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    begin = parser.add_mutually_exclusive_group(required=True)
    begin.add_argument("--start", type=Path, metavar="FOLDER", help="a Pheye; its LoRA is left out")
    begin.add_argument("--parts", type=Path, metavar="FOLDER", help="a Pheye whose blocks are left out")
    parser.add_argument(
        "--tiles_per_side", type=int, choices=[1, 2, 3], default=3, help="of ways that say nothing else"
    )
    parser.add_argument("--lora_sets", type=int, choices=[0, 1, 2], default=2, help="the same (default: %(default)s)")
    parser.add_argument(
        "--initializer_range", type=float, help=f"of new blocks, without --start (default: {INITIALIZER_RANGE})"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="by default all that can be")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=at_least(1), default=500, help="(default: %(default)s)")
    budget.add_argument("--minutes", type=float, help="in place of --steps: of steps, without loading and scoring")
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="(default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--score_every", type=at_least(1), default=250, help="steps (default: %(default)s)")
    parser.add_argument("--seeds", type=at_least(1), default=2, help="(default: %(default)s)")
    parser.add_argument("--count", type=at_least(3), default=500, help="held-out pictures (default: %(default)s)")
    parser.add_argument("--keep_features", action="store_true", help="in OUTPUT; for ways without LoRA")
    parser.add_argument(
        "--workers", type=at_least(0), default=2, help="processes that open pictures, without --keep_features"
    )
    parser.add_argument("--device", default=default_device(), help="(default: %(default)s)")
    options = vars(parser.parse_args(argv))
    start = options["start"]
    if start and options["initializer_range"] is not None:
        parser.error("--initializer_range is of new blocks; --start has its own")
    if options["initializer_range"] is None:
        options["initializer_range"] = INITIALIZER_RANGE
    if options["keep_features"] and (options["lora_sets"] or "one_lora" in (options["ways"] or WAYS)):
        parser.error(
            "--keep_features needs --lora_sets 0, and --ways without one_lora: features change while LoRA learns"
        )
    if options["minutes"] is not None:
        options["steps"] = None
        if not options["minutes"] > 0:
            parser.error(f"--minutes {options['minutes']} must be more than 0")
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
