"""A stage for a processor: blocks and view encoding learn from features of pictures that are kept and used again.

    python -m pheye.nano.replay --model nano-runs/base2 --data nano-runs/instruct/data.jsonl --output nano-runs/stage2
        [--rounds 500 | --minutes 6]

With nine crops, four fifths of a step of the training command go into the vision tower, which always gives the same
for a picture while its LoRA does not train. Here a round encodes some new pictures, keeps their features (a megabyte
each, in FOLDER/features) and takes several steps: the first on the new pictures, so that its loss is that of pictures
never seen, the others on kept ones. No picture is used more than four times, and none a second time before many are
kept: with ten uses of few pictures, blocks learnt those by heart. The same command again goes on from its last
checkpoint; the features of a finished run may be deleted.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch

from .. import PheyeProcessor
from ..common.command import Parser, at_least, default_device, exit_status
from ..training.mixture import Mixture, read_mixture
from .learning.checkpoints import claim, load_checkpoint, log, rate_share, save_checkpoint
from .learning.features import BATCH, FeatureStore, schedule
from .learning.kept_training import learn, opened

ROUNDS = 500
SAVE_EVERY, LOG_EVERY = 150, 30  # steps


def train(
    model: Path,
    data: list[str],
    output: Path,
    rounds: int | None = None,
    minutes: float | None = None,
    learning_rate: float = 7e-4,
    seed: int = 0,
    device: str = "cpu",
):
    """Train for `rounds` rounds in all, or for so many `minutes` more, and save the model.

    It goes on from the last checkpoint, if there is one.
    """
    claim(output, model=model, data=data, learning_rate=learning_rate, seed=seed)
    processor = PheyeProcessor.from_pretrained(model)
    trained = opened(model, device)
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    store = FeatureStore(output / "features", Mixture(read_mixture(data, turns=None), seed), processor, BATCH, seed)
    done, began = load_checkpoint(output, trained, [optimizer]), None
    steps = None if rounds is None else sum(1 for _ in schedule(rounds, seed))

    def passed(step: int) -> float:
        return (time.time() - began) / (60 * minutes) if steps is None else step / steps

    losses: dict[bool, list[float]] = {True: [], False: []}
    for step, (number, is_new, indices) in enumerate(itertools.islice(schedule(rounds, seed), done, None), done):
        if is_new:
            store.encode(number, trained)
        began = began or time.time()  # so that the first step has a learning rate, however few the minutes
        optimizer.param_groups[0]["lr"] = learning_rate * rate_share(step, passed(step))
        losses[is_new].append(learn(trained, optimizer, store, indices))
        is_last = passed(step + 1) >= 1
        if (step + 1) % LOG_EVERY == 0 or is_last:
            new, kept = (round(sum(values) / max(1, len(values)), 4) for values in (losses[True], losses[False]))
            log(output, {"step": step + 1, "loss": new, "kept_loss": kept, "seconds": round(time.time() - began)})
            losses = {True: [], False: []}
        if (step + 1) % SAVE_EVERY == 0 or is_last:
            save_checkpoint(output, trained, [optimizer], step + 1)
        if is_last:
            break
    trained.save_pretrained(output)
    processor.save_pretrained(output)


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--data", nargs="+", required=True, help="as the training command takes it")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--rounds", type=at_least(1), help=f"of {BATCH} new pictures each (default: {ROUNDS})")
    length.add_argument("--minutes", type=float, help="of training, from the last checkpoint on")
    parser.add_argument("--learning_rate", type=float, default=7e-4, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=default_device(), help="(default: %(default)s)")
    options = vars(parser.parse_args(argv))
    if options["rounds"] is None and options["minutes"] is None:
        options["rounds"] = ROUNDS
    return options


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(train, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
