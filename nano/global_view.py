"""Let the global view count shapes: its LoRA learns alone, on scenes of which only the global view is encoded.

    python -m pheye.nano.global_view --start checkpoints/pheye-nano/model.safetensors --output FOLDER --minutes 20

No crop shows a shape whole that its border cuts; the global view does. Only this one is encoded, so a minute has ten
times as many pictures as one of `nano.eyes`, and only its LoRA changes, so crops are seen as before. The labels are
those of `nano.eyes`, letters too, lest they be forgotten, and the numbers of shapes. The same command again goes on
from its last checkpoint for as many minutes more. FOLDER/eyes.safetensors is what `nano.join` takes.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW
from torch.utils.data import Dataset

from ..common.command import InputError, Parser, at_least, default_device, exit_status
from ..layers_pheye import CALL, ViewCall
from ..vision_pheye import run_with
from .drawing import pictures
from .learning.checkpoints import autocast, claim, load_checkpoint, log
from .learning.configs import nano_config
from .learning.muon import set_learning_rates
from .learning.picture_labels import HEADS, picture_labels
from .learning.probes import (
    CAP_HEIGHTS,
    LEAST_PIXELS,
    Eyes,
    begin_with,
    branch_precision,
    drawn,
    label_losses,
    learning_rate_share,
    means,
    pixels_of,
    save,
    spent,
    towers_pixels,
)

SIZES = 350, 900  # of a scene in pixels, shortest and longest side: the global view shows 224
SIGNS, SHAPES = (2, 7), (0, 6)
# What counts of the losses: numbers of shapes off the first token and off shapes' patches, shapes' centres, and among
# these patches without one.
COUNT, PATCH_COUNT, CENTRE, NO_CENTRE = 1.0, 1.0, 2.0, 0.02
RATES = 1e-3, 2e-3  # of LoRA, and of the linear layers
ALONE = 100  # steps at first in which only the linear layers learn
SAVE_EVERY = 2  # minutes, and of the log
TEST_PICTURES = 60


class Scenes(Dataset):
    """Scenes by their numbers: the global view (1, H, W, 3), tiles (k * k, T, T, 3), and its letters, maps, counts."""

    def __init__(self, seed: int, held_out: bool = False):
        self.seed, self.held_out = seed, held_out

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        rng = random.Random(f"global view {self.seed} {self.held_out} {index}")
        signs, shapes = rng.randint(*SIGNS), rng.randint(*SHAPES)
        options = {"sizes": SIZES, "cap_heights": CAP_HEIGHTS, "least_pixels": LEAST_PIXELS}
        picture = pictures.scene(rng, self.held_out, signs=signs, shapes=shapes, **options)
        labels, (views, tiles) = picture_labels(picture), pixels_of(picture)
        return views[:1], tiles, labels.letters[:1], labels.maps[:1], labels.counts[:1]


def logits_of(eyes: Eyes, views: torch.Tensor, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Global views (B, 1, 3, H, W) and tiles to logits of labels (B, N, labels), and of counts off each token, the
    first one's first (B, 1 + N, kinds, counts)."""
    tower, count = eyes.pheye.vision_tower, eyes.pheye.config.views_per_image
    with torch.no_grad(), branch_precision(tiles.device.type):
        maps = [one.unflatten(0, (-1, count))[:, 0] for one in eyes.pheye.encode_high_res(tiles)]
    states = run_with(len(views), tower, views.flatten(0, 1), **{CALL: ViewCall(tower, maps)}).last_hidden_state
    return eyes.heads(states[:, 1:]), eyes.count_heads(states).unflatten(-1, (len(pictures.KINDS), -1))


def counts_of(of_counts: torch.Tensor, maps: torch.Tensor, counts: torch.Tensor) -> dict[str, tuple]:
    """Logits (rows, counts) and numbers (rows,) off the first token and off patches with a shape, a row for each kind.

    Args:
        of_counts: those of `logits_of`.
        maps: (B, heads, G, G).
        counts: (B, kinds).
    """
    has_shape = maps[:, list(HEADS).index("shape")].flatten(1) > 0  # (B, N)
    of_patches = counts[:, None].expand(-1, has_shape.shape[1], -1)
    return {
        "count": (of_counts[:, 0].flatten(0, 1), counts.flatten().long()),
        "patch_count": (of_counts[:, 1:][has_shape].flatten(0, 1), of_patches[has_shape].flatten().long()),
    }


def losses_of(logits: torch.Tensor, of_counts: torch.Tensor, letters, maps, counts) -> dict[str, torch.Tensor]:
    """Those of `nano.eyes`, of views (B, 1, ...), with other weights of what is counted."""
    letters, maps = letters.flatten(0, 1), maps.flatten(0, 1)
    losses = label_losses(logits.float(), letters, maps, centre=CENTRE, no_centre=NO_CENTRE)
    found = counts_of(of_counts.float(), maps, counts.flatten(0, 1))
    for name, weight in (("count", COUNT), ("patch_count", PATCH_COUNT)):
        told, known = found[name]
        losses[name] = weight * F.cross_entropy(told, known, reduction="sum") / max(1, len(known))
    return losses


@torch.no_grad()
def counted(eyes: Eyes, seed: int, device: str) -> dict[str, float]:
    """Of held-out scenes, by the number of shapes of a kind: how often it is told right, off the first token and off
    shapes' patches."""
    right: dict[str, list[np.ndarray]] = {}
    for index in range(TEST_PICTURES):
        views, tiles, _, maps, counts = (torch.from_numpy(one)[None] for one in Scenes(seed, held_out=True)[index])
        with autocast(device):
            _, of_counts = logits_of(eyes, *towers_pixels(views.to(device), tiles.to(device)))
        for name, (told, known) in counts_of(of_counts.cpu(), maps[:, 0], counts[:, 0]).items():
            for number in known.unique().tolist():
                is_right = told.argmax(-1)[known == number] == number
                right.setdefault(f"{name}_{number}", []).append(is_right.numpy())
    return {name: round(float(np.concatenate(found).mean()), 4) for name, found in sorted(right.items())}


def train(output: Path, start: Path, minutes: float, seed: int, together: int, workers: int, device: str):
    """Train for so many minutes more, from the last checkpoint if there is one.

    Raises:
        InputError: if `start` has no branch, or what `begin_with` raises.
    """
    began = time.time()
    claim(output, seed=seed, together=together, start=start)
    torch.manual_seed(seed)
    eyes = Eyes(nano_config())
    if not begin_with(eyes, start):
        raise InputError(f"{start} has no branch; give the weights of a Pheye-nano that has one.")
    eyes.to(device).requires_grad_(False)
    if device == "cpu":
        eyes.pheye.set_attn_implementation({"vision_config": "eager"})  # faster there, see `kept_training.PART`
    learnt = eyes.pheye.global_lora, nn.ModuleList([eyes.heads, eyes.count_heads])
    lora, heads = optimizers = [
        AdamW([{"params": list(part.requires_grad_(True).parameters()), "full_lr": rate}], lr=rate, betas=(0.9, 0.98))
        for part, rate in zip(learnt, RATES, strict=True)
    ]
    draws = load_checkpoint(output, eyes, optimizers)
    sums, steps, saved = {}, 0, time.time()
    for arrays in drawn(draws, Scenes(seed), together, workers):
        views, tiles, *labels = (array.to(device) for array in arrays)
        passed = (time.time() - began) / (60 * minutes)
        set_learning_rates((heads,), learning_rate_share(draws, passed))
        set_learning_rates((lora,), learning_rate_share(draws - ALONE, passed) if draws >= ALONE else 0.0)
        with autocast(device):
            logits = logits_of(eyes, *towers_pixels(views, tiles))
        losses = losses_of(*logits, *labels)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(eyes.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
        draws, steps = draws + 1, steps + 1
        is_over = time.time() - began > 60 * minutes
        if is_over or time.time() - saved > 60 * SAVE_EVERY:
            save(output, eyes, optimizers, draws)
            entry = {"pictures": draws * together, "step": draws, **spent(began), **means(sums, steps)}
            log(output, entry | (counted(eyes, seed, device) if is_over else {}))
            sums, steps, saved = {}, 0, time.time()
        if is_over:
            return


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.global_view",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--start", type=Path, required=True, metavar="FILE", help="a Pheye's weights, with a branch")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, required=True, help="of training, from the last checkpoint on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--together", type=at_least(1), default=8, help="pictures of a step (default: %(default)s)")
    parser.add_argument("--workers", type=at_least(0), default=0, help="processes that draw; on a GPU, all cores")
    parser.add_argument("--device", default=default_device(), help="(default: %(default)s)")
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(train, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
