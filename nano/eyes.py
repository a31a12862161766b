"""Stage 0 with the branch: train vision tower, LoRA, high-resolution branch and fusion blocks together on whole
pictures.

    python -m pheye.nano.eyes --output FOLDER --minutes 13 [--start FILE]

The same command again goes on from its last checkpoint for as many minutes more, or with `--pictures N` until it has
seen N; `--start` takes these parts from a Pheye's weights instead of from nothing. FOLDER/eyes.safetensors has the
parts in bfloat16, by their names in a Pheye. The labels (picture_labels.py) are read off by linear layers over the
states that Pheye uses; those layers are thrown away afterwards.
"""

import argparse
import functools
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from ..common.command import Parser, at_least, default_device, exit_status
from .drawing import pictures
from .drawing.recolouring import recoloured
from .learning.checkpoints import autocast, claim, load_checkpoint, log
from .learning.configs import BRANCHES, BRANCHES_HELP, TILES, VIEW, nano_config
from .learning.labels import IGNORED
from .learning.muon import optimizers_for, set_learning_rates
from .learning.picture_labels import HEADS, OF_LETTERS, POINTS, crossing, heights, picture_labels
from .learning.probes import (
    CAP_HEIGHTS,
    LEAST_PIXELS,
    Eyes,
    begin_with,
    drawn,
    learning_rate_share,
    losses_of,
    means,
    pixels_of,
    save,
    spent,
    split_logits,
    towers_pixels,
)

VIEWS_HEIGHT = TILES * VIEW  # pixels of all crops, one below the other
PAGES = 0.6  # share of pictures that are full of letters; the others are scenes
SIGNS = 3, 10  # of a scene, or as many as find room
SIZES = 400, 1400  # of a picture in pixels, shortest and longest side
PAGE_CAP_HEIGHTS = 0.012, 0.07  # over the picture's height
EASY_CAP_HEIGHT = 0.035  # least at first, of pages
EASY, HARD = 300, 1500  # pictures up to which pages are easy, and from which on they are as hard as they will be
ECHOES = 2  # times that a picture is used, its colours changed
RATES = 3e-3, 1.5e-3  # of matrices by Muon, and of everything else by AdamW
READING = 0.1  # of these rates, for a tower that reads already and LoRA: at all of them it would forget how to
ALONE = 600  # pictures at first from which only the branch learns, in less than half of the time
SAVE_EVERY, LOG_EVERY = 8, 2  # minutes
TEST_PICTURES = 24
SMALL, LARGE = 0.022, 0.037  # heights of letters' boxes over the picture's, up to and from which they are so called


# --- Data ---


def picture_of(index: int, seed: int, held_out: bool, ease: float) -> tuple[pictures.Picture, bool]:
    """Picture number `index`, and whether it is a page; those for testing are scenes.

    `ease`: from 0 to 1; with 1 pages have large dark letters on plain bright paper.
    """
    rng = random.Random(f"eyes {seed} {held_out} {index}")
    is_page = not held_out and rng.random() < PAGES + (1 - PAGES) * ease
    if not is_page:
        signs, shapes = rng.randint(*SIGNS), rng.randint(0, 5)
        sizes = {"sizes": SIZES, "cap_heights": CAP_HEIGHTS, "least_pixels": LEAST_PIXELS}
        return pictures.scene(rng, held_out, signs=signs, shapes=shapes, **sizes), False
    width, height = pictures.random_size(rng, *SIZES)
    least, most = max(PAGE_CAP_HEIGHTS[0], LEAST_PIXELS / height), PAGE_CAP_HEIGHTS[1]
    caps = (least + ease * max(0, EASY_CAP_HEIGHT - least)) * VIEWS_HEIGHT, most * VIEWS_HEIGHT
    is_plain = rng.random() < 0.3 + 0.7 * ease
    return pictures.page(rng, held_out, width, height, caps, is_plain, VIEWS_HEIGHT), True


def ease_of(index: int) -> float:
    return min(1.0, max(0.0, (HARD - index) / (HARD - EASY)))


class Drawn(Dataset):
    """Pictures by their numbers: views (V, H, W, 3), tiles (k * k, T, T, 3), letters, maps, counts, is_page."""

    def __init__(self, seed: int, skipped: int):
        self.seed, self.skipped = seed, skipped

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        picture, is_page = picture_of(index, self.seed, False, ease_of(self.skipped + index))
        labels = picture_labels(picture)
        return *pixels_of(picture), labels.letters, labels.maps, labels.counts, np.array(is_page)


def prepared(
    views: torch.Tensor, tiles: torch.Tensor, is_page: torch.Tensor, generator: torch.Generator, inverted: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the towers take of drawn pixels, pages in other colours each time."""
    state = generator.get_state()
    views = recoloured(views.flatten(1, 2), is_page, generator, inverted).view_as(views)
    generator.set_state(state)  # the same colours
    tiles = recoloured(tiles.flatten(1, 2), is_page, generator, inverted).view_as(tiles)
    return towers_pixels(views, tiles)


# --- Training ---


@functools.cache
def test_pictures(seed: int) -> list[tuple]:
    """Scenes with held-out words, fonts and photographs: pixels, labels, and of each letter whether its word crosses a
    border, and its height."""
    found = []
    for index in range(TEST_PICTURES):
        picture, _ = picture_of(index, seed, True, 0.0)
        pixels = [torch.from_numpy(array)[None] for array in pixels_of(picture)]
        found.append((pixels, picture_labels(picture), crossing(picture), heights(picture)))
    return found


@torch.no_grad()
def accuracies(eyes: Eyes, seed: int) -> dict[str, float]:
    """Shares of patches of crops with a letter at their middle column that are told right, in all words, in those that
    cross a crop's border and those inside one; the letter also by its height. Off the states, and the branch's. And of
    patches of all views with a shape's centre or said to have one, those that are told right, off the states."""
    device = next(eyes.parameters()).device
    right: dict[str, list[np.ndarray]] = {}
    for pixels, labels, crosses, height in test_pictures(seed):
        with autocast(device.type):
            branch, states, _ = eyes(*towers_pixels(*(array.to(device) for array in pixels)))
        told = split_logits(states)[1]["centre"].argmax(-1).flatten().cpu().numpy()
        centres = labels.maps[:, list(HEADS).index("centre")].reshape(-1)
        right.setdefault("centre", []).append((told == centres)[(told > 0) | (centres > 0)])
        which = labels.which[1:].reshape(-1)  # of crops
        is_letter = which >= 0
        which = which[is_letter]
        targets = {name: labels.maps[1:, index] for index, name in enumerate(OF_LETTERS)}
        targets["letter"] = labels.letters[1:, POINTS // 2]
        groups = {"": True, "_crossing": crosses[which], "_inside": ~crosses[which]}
        sizes = {"_small": height[which] < SMALL, "_large": height[which] >= LARGE}
        sizes["_medium"] = ~sizes["_small"] & ~sizes["_large"]
        for prefix, logits in {"": states, "branch_": branch}.items():
            if logits is None:
                continue
            letters, others = split_logits(logits[1:])
            others["letter"] = letters[:, :, POINTS // 2]
            for name, target in targets.items():
                target = target.reshape(-1)[is_letter]
                is_right = others[name].argmax(-1).flatten().cpu().numpy()[is_letter] == target
                for suffix, chosen in (groups | sizes if name == "letter" else groups).items():
                    right.setdefault(prefix + name + suffix, []).append(is_right[chosen & (target != IGNORED)])
    found = {name: np.concatenate(arrays) for name, arrays in right.items()}
    return {name: round(float(array.mean()), 4) for name, array in found.items() if len(array)}


def optimizers_of(eyes: Eyes, tower_share: float) -> tuple[Optimizer, ...]:
    """`tower_share`: of the rates, for the vision tower and its LoRA."""
    pheye = eyes.pheye
    tower = nn.ModuleList([pheye.vision_tower, pheye.global_lora, pheye.local_lora])
    branch = nn.ModuleList(part for part in (pheye.high_res_tower, pheye.fusion_blocks) if part)
    others = nn.ModuleList(part for part in (branch, eyes.heads, eyes.count_heads, eyes.branch_heads) if part)
    tower_rates = (tower_share * rate for rate in RATES)
    return (
        *optimizers_for(tower, pheye.vision_layers(), *tower_rates),
        *optimizers_for(others, branch, *RATES),
    )


def learn(eyes: Eyes, optimizers: tuple, inputs: tuple, labels: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A step; its losses."""
    with autocast(inputs[1].device.type):
        outputs = eyes(*inputs)
    losses = losses_of(outputs, *labels)
    sum(losses.values()).backward()
    nn.utils.clip_grad_norm_(eyes.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def train(
    output: Path,
    minutes: float | None = None,
    pictures: int | None = None,
    seed: int = 0,
    together: int = 1,
    echoes: int = ECHOES,
    workers: int = 0,
    start: Path | None = None,
    branch: str = "whole",
    device: str = "cpu",
):
    """Train for so many minutes more, or until so many pictures were seen, from the last checkpoint if there is one.

    `together`: pictures of a step; `echoes`: times that a picture is used; `start`: weights to begin with; `branch`:
    one of BRANCHES.
    """
    began = time.time()
    claim(output, seed=seed, together=together, echoes=echoes, start=start, branch=branch)
    torch.manual_seed(seed)
    eyes = Eyes(nano_config(branch))
    has_branch = start is not None and begin_with(eyes, start)
    skipped = HARD if has_branch else 0  # eyes that read need no easy pictures
    alone = 0 if has_branch or branch == "none" else ALONE
    eyes.to(device)
    if device == "cpu":
        eyes.pheye.set_attn_implementation({"vision_config": "eager"})  # faster there, see `kept_training.PART`
    optimizers = optimizers_of(eyes, READING if start else 1.0)
    draws = load_checkpoint(output, eyes, optimizers)
    sums, steps, logged, saved = {}, 0, time.time(), time.time()

    def passed() -> float:
        return (time.time() - began) / (60 * minutes) if pictures is None else draws * together / pictures

    if pictures is not None and passed() >= 1:
        return

    for arrays in drawn(draws, Drawn(seed, skipped), together, workers):
        views, tiles, *labels, is_page = (array.to(device) for array in arrays)
        seen = skipped + draws * together  # pictures
        inverted = 0.5 * (1 - ease_of(seen))  # dark letters come first
        first = 0 if seen < alone else echoes * math.ceil(alone / together)  # step of this part
        for echo in range(echoes):
            step = draws * echoes + echo
            set_learning_rates(optimizers, learning_rate_share(step - first, passed()))
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            inputs = prepared(views, tiles, is_page, generator, inverted)
            losses = learn(eyes, optimizers, (None if seen < alone else inputs[0], inputs[1]), labels)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
            steps += 1
        draws += 1
        is_over = passed() >= 1
        is_due = is_over or time.time() - saved > 60 * SAVE_EVERY
        if is_due or time.time() - logged > 60 * LOG_EVERY:
            entry = {"pictures": draws * together, "step": draws * echoes, **spent(began), **means(sums, steps)}
            if is_due:
                entry |= accuracies(eyes, seed)
                save(output, eyes, optimizers, draws)
                saved = time.time()
            log(output, entry)
            sums, steps, logged = {}, 0, time.time()
        if is_over:
            return


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.eyes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="of training, from the last checkpoint on")
    length.add_argument("--pictures", type=at_least(1), help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--together", type=at_least(1), default=1, help="pictures of a step (default: %(default)s)")
    parser.add_argument("--echoes", type=at_least(1), default=ECHOES, help="times that a picture is used")
    parser.add_argument("--workers", type=at_least(0), default=0, help="processes that draw; on a GPU, all cores")
    parser.add_argument("--start", type=Path, metavar="FILE", help="a Pheye's weights to begin with")
    parser.add_argument("--branch", choices=BRANCHES, default="whole", help=BRANCHES_HELP)
    parser.add_argument("--device", default=default_device(), help="(default: %(default)s)")
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(train, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
