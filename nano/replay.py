"""A stage for a processor: blocks and view encoding learn from features of pictures that are kept and used again.

    python -m pheye.nano.replay --model nano-runs/base2 --data nano-runs/instruct/data.jsonl --output nano-runs/stage2
        [--rounds 500]

With nine crops, four fifths of a step of the training command go into the vision tower, which always gives the same
for a picture while its LoRA does not train. Here a round encodes some new pictures, keeps their features (a megabyte
each, in FOLDER/features) and takes several steps: the first on the new pictures, so that its loss is that of pictures
never seen, the others on kept ones. No picture is used more than four times, and none a second time before many are
kept: with ten uses of few pictures, blocks learnt those by heart. The same command again goes on from its last
checkpoint; the features of a finished run may be deleted.
"""

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .. import PheyeForConditionalGeneration, PheyeProcessor
from ..common.command import InputError, Parser, at_least, exit_status
from ..training.collator import IGNORED, PheyeCollator
from ..training.mixture import Mixture, read_mixture
from ..training.trained import choose_trained
from .checkpoints import claim, load_checkpoint, log, save_checkpoint

BATCH = 8
STEPS = 4  # of a round
ALONE = 40  # rounds before pictures are used again, of one step each
USES = 4  # of a picture, at most
WARMUP = 20  # steps
SAVE_EVERY, LOG_EVERY = 150, 30  # steps


class FeatureStore:
    """The samples of a mixture in random order, again from the start where it ends, and their features on the disk."""

    def __init__(self, folder: Path, mixture: Mixture, processor: PheyeProcessor, seed: int):
        self.folder, self.mixture, self.collator = folder, mixture, PheyeCollator(processor)
        self.order = random.Random(f"order {seed}").sample(range(len(mixture)), len(mixture))
        folder.mkdir(exist_ok=True)

    def sample(self, index: int) -> dict:
        return self.mixture[self.order[index % len(self.order)]]

    def file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    @torch.no_grad()
    def encode(self, number: int, model: PheyeForConditionalGeneration):
        """Store what the vision tower gives to the view encoding for the pictures of round `number`.

        Raises:
            InputError: if a picture cannot be read.
        """
        if self.file(number).exists():
            return
        samples = [self.sample(number * BATCH + row) for row in range(BATCH)]
        image_inputs, errors = self.collator.open_images([sample["images"] for sample in samples])
        for sample, error in zip(samples, errors, strict=True):
            if error is not None:
                raise InputError(f"{sample['id']}: {error} Draw the data anew.")
        seen = model.pheye.encode_views(**image_inputs).last_hidden_state
        features = seen.unflatten(0, (BATCH, -1)).bfloat16()  # (B, V, N, D)
        temporary = self.file(number).with_suffix(".new")
        save_file({"features": features.contiguous()}, temporary)
        os.replace(temporary, self.file(number))

    def features(self, index: int) -> torch.Tensor:
        """(V, N, D)"""
        number, row = divmod(index, BATCH)
        with safe_open(self.file(number), "pt") as file:
            return file.get_slice("features")[row]

    def batch(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Text, padded on the right, and features (B * V, N, D) of the samples of these numbers."""
        rows = [self.collator.encode_sample(self.sample(index)) for index in indices]
        inputs = self.collator.processor.tokenizer.pad(
            {"input_ids": [ids for ids, _ in rows]}, padding_side="right", return_tensors="pt"
        )
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for row, (_, learnt) in enumerate(rows):
            labels[row, : len(learnt)] = torch.tensor(learnt)
        features = torch.stack([self.features(index) for index in indices])
        return {**inputs, "labels": labels, "features": features.float().flatten(0, 1)}


def schedule(rounds: int, seed: int) -> Iterator[tuple[int, bool, list[int]]]:
    """For each step its round, whether it is on that round's new pictures, and the numbers of its pictures."""
    rng, uses = random.Random(f"kept {seed}"), []
    for number in range(rounds):
        new = list(range(len(uses), len(uses) + BATCH))
        uses += [1] * BATCH
        yield number, True, new
        for _ in range(STEPS - 1 if number >= ALONE else 0):
            chosen = rng.sample([index for index, count in enumerate(uses) if count < USES], BATCH)
            for index in chosen:
                uses[index] += 1
            yield number, False, chosen


def train(model: Path, data: list[str], output: Path, rounds: int, learning_rate: float = 7e-4, seed: int = 0):
    """Train for `rounds` rounds, go on from the last checkpoint if there is one, and save the model."""
    claim(output, model=model, data=data, learning_rate=learning_rate, seed=seed)
    processor = PheyeProcessor.from_pretrained(model)
    trained = PheyeForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    has_lora = trained.config.global_lora_rank or trained.config.local_lora_rank
    choose_trained(trained, freeze=["lora"] if has_lora else None)
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    store = FeatureStore(output / "features", Mixture(read_mixture(data, turns=None), seed), processor, seed)
    steps = list(schedule(rounds, seed))
    done, began = load_checkpoint(output, trained, [optimizer]), time.time()
    losses: dict[bool, list[float]] = {True: [], False: []}
    for step, (number, is_new, indices) in enumerate(steps[done:], done):
        if is_new:
            store.encode(number, trained)
        share = min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / len(steps))))
        optimizer.param_groups[0]["lr"] = learning_rate * share
        batch = store.batch(indices)
        seen = trained.pheye.view_encoding(batch.pop("features"))
        loss = trained(image_hidden_states=seen, **batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses[is_new].append(loss.item())
        is_last = step + 1 == len(steps)
        if (step + 1) % LOG_EVERY == 0 or is_last:
            new, kept = (round(sum(values) / max(1, len(values)), 4) for values in (losses[True], losses[False]))
            log(output, {"step": step + 1, "loss": new, "kept_loss": kept, "seconds": round(time.time() - began)})
            losses = {True: [], False: []}
        if (step + 1) % SAVE_EVERY == 0 or is_last:
            save_checkpoint(output, trained, [optimizer], step + 1)
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
    parser.add_argument("--rounds", type=at_least(1), default=500, help=f"of {BATCH} new pictures each")
    parser.add_argument("--learning_rate", type=float, default=7e-4, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(train, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
