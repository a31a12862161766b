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
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from .. import PheyeConfig, PheyeForConditionalGeneration
from ..common.command import InputError, Parser, at_least, default_device, exit_status
from ..image_processing_pheye import cut_crops, cut_views
from ..layers_pheye import CALL, ViewCall
from . import pictures
from .backbones import TILE
from .checkpoints import autocast, claim, load_checkpoint, log, save_checkpoint
from .configs import BRANCHES, BRANCHES_HELP, EYES, TILES, VIEW, nano_config
from .labels import CLASSES, IGNORED, MOST_SHAPES
from .muon import optimizers_for, set_learning_rates
from .picture_labels import HEADS, OF_LETTERS, POINTS, crossing, heights, picture_labels
from .recolouring import recoloured

WEIGHTS = "eyes.safetensors"
VIEWS_HEIGHT = TILES * VIEW  # pixels of all crops, one below the other
PAGES = 0.6  # share of pictures that are full of letters; the others are scenes
SIGNS = 3, 10  # of a scene, or as many as find room
SIZES = 400, 1400  # of a picture in pixels, shortest and longest side
CAP_HEIGHTS, PAGE_CAP_HEIGHTS = (0.012, 0.065), (0.012, 0.07)  # over the picture's height
LEAST_PIXELS = 7  # of a capital
EASY_CAP_HEIGHT = 0.035  # least at first, of pages
EASY, HARD = 300, 1500  # pictures up to which pages are easy, and from which on they are as hard as they will be
ECHOES = 2  # times that a picture is used, its colours changed
# Of columns without a letter, and of patches without a shape or a shape's centre, most of all.
NOTHING_WEIGHT, NO_SHAPE_WEIGHT, NO_CENTRE_WEIGHT = 0.15, 0.01, 0.1
RATES = 3e-3, 1.5e-3  # of matrices by Muon, and of everything else by AdamW
READING = 0.1  # of these rates, for a tower that reads already and LoRA: at all of them it would forget how to
WARMUP = 100  # steps
ALONE = 600  # pictures at first from which only the branch learns, in less than half of the time
FALL = 0.3  # share of the run over which the learning rate falls to 0
SAVE_EVERY, LOG_EVERY = 8, 2  # minutes
TEST_PICTURES = 24
SMALL, LARGE = 0.022, 0.037  # heights of letters' boxes over the picture's, up to and from which they are so called


class Eyes(nn.Module):
    """A Pheye's vision tower, LoRA, branch and fusion blocks, and linear layers that read the labels off: one off the
    states that Pheye uses, one off the branch's last map, which has a cell for each patch."""

    def __init__(self, config: PheyeConfig):
        super().__init__()
        config.lora_dropout = 0.0
        self.pheye = PheyeForConditionalGeneration(config).pheye
        self.pheye.language_model = self.pheye.cross_attention_blocks = self.pheye.view_encoding = None  # for later
        width, labels = config.vision_config.hidden_size, POINTS * CLASSES + sum(HEADS.values())
        self.heads = nn.Linear(width, labels)
        self.count_heads = nn.Linear(width, len(pictures.KINDS) * (1 + MOST_SHAPES))
        branch = config.high_res_vision_config
        self.branch_heads = branch and nn.Linear(branch.hidden_sizes[-1], labels)

    def forward(self, views: torch.Tensor | None, tiles: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """(B, V, 3, H, W) and (B, k * k, 3, T, T) to logits of the branch (B * V, N, labels), None without a branch,
        and with `views` of the states, likewise, and of counts (B * V, kinds, counts)."""
        maps, branch = [], None
        # On a processor the gradients of convolutions take longer in bfloat16 than in single precision.
        precision = torch.autocast("cpu", enabled=False) if tiles.device.type == "cpu" else nullcontext()
        if self.branch_heads is not None:
            with precision:
                maps = self.pheye.encode_high_res(tiles)
                branch = self.branch_heads(maps[-1])
        if views is None:
            return (branch,)
        tower = self.pheye.vision_tower
        states = tower(views.flatten(0, 1), **{CALL: ViewCall(tower, maps)}).last_hidden_state
        counts = self.count_heads(states[:, 0]).unflatten(1, (len(pictures.KINDS), -1))
        return branch, self.heads(states[:, 1:]), counts

    def parts(self) -> dict[str, torch.Tensor]:
        """Weights of the eyes by their names in a Pheye."""
        found = {f"pheye.{name}": weight for name, weight in self.pheye.state_dict().items()}
        return {name: weight for name, weight in found.items() if name.split(".")[1] in EYES}


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


def pixels_of(picture: pictures.Picture) -> tuple[np.ndarray, np.ndarray]:
    return cut_views(picture.image, (TILES, TILES), (VIEW, VIEW)), np.stack(
        cut_crops(picture.image, (TILES, TILES), (TILE, TILE))
    )


def drawn(first: int, seed: int, skipped: int, together: int, workers: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Draws of `together` pictures from draw number `first` on, without end; `workers` processes draw beside the
    training, or none."""
    loader = DataLoader(
        Drawn(seed, skipped),
        batch_size=together,
        sampler=range(first * together, sys.maxsize),
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )
    return iter(loader)


def normalized(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 (B, V, H, W, 3) to what the towers take, (B, V, 3, H, W)."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in (mean, std))
    return ((pixels.float() / 255 - mean) / std).movedim(-1, 2)


def prepared(
    views: torch.Tensor, tiles: torch.Tensor, is_page: torch.Tensor, generator: torch.Generator, inverted: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the towers take of drawn pixels, pages in other colours each time."""
    state = generator.get_state()
    views = recoloured(views.flatten(1, 2), is_page, generator, inverted).view_as(views)
    generator.set_state(state)  # the same colours
    tiles = recoloured(tiles.flatten(1, 2), is_page, generator, inverted).view_as(tiles)
    return towers_pixels(views, tiles)


def towers_pixels(views: torch.Tensor, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        normalized(views, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
        normalized(tiles, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    )


# --- Training ---


def weighted(logits: torch.Tensor, target: torch.Tensor, nothing: float) -> torch.Tensor:
    """Mean cross-entropy of logits (..., classes), where class 0 counts `nothing` and IGNORED does not count."""
    target = target.flatten().long()
    losses = F.cross_entropy(logits.flatten(0, -2), target, ignore_index=IGNORED, reduction="none")
    weights = torch.where(target == 0, nothing, 1.0) * (target != IGNORED)
    return (losses * weights).sum() / weights.sum().clamp(min=1e-6)


def losses_of(outputs: tuple, letters: torch.Tensor, maps: torch.Tensor, counts: torch.Tensor) -> dict:
    """The losses of `Eyes`' outputs, weighted: of each label off the states, of the counts, and of all labels together
    off the branch."""
    letters, maps = letters.flatten(0, 1), maps.flatten(0, 1)  # (B * V, ...)
    losses = {}
    if outputs[0] is not None:
        losses["branch"] = sum(label_losses(outputs[0].float(), letters, maps).values())
    if len(outputs) > 1:
        _, states, count_logits = outputs
        losses["count"] = 0.1 * F.cross_entropy(count_logits.float().flatten(0, 1), counts.flatten().long())
        losses |= label_losses(states.float(), letters, maps)
    return losses


def split_logits(logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits (..., labels) of letters (..., POINTS, classes), and of the other labels by their names."""
    letters, *others = logits.split([POINTS * CLASSES, *HEADS.values()], -1)
    return letters.unflatten(-1, (POINTS, CLASSES)), dict(zip(HEADS, others, strict=True))


def label_losses(logits: torch.Tensor, letters: torch.Tensor, maps: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is asked of letters counts where there is one, rows and columns everywhere."""
    letter_logits, others = split_logits(logits)
    losses = {"letter": 3 * weighted(letter_logits, letters.flatten(2).transpose(1, 2), NOTHING_WEIGHT)}
    middle = letters[:, POINTS // 2]
    has_letter = (middle != 0) & (middle != IGNORED)
    for index, (name, of_name) in enumerate(others.items()):
        target = maps[:, index]
        if name in OF_LETTERS:
            losses[name] = 0.3 * weighted(of_name, target.masked_fill(~has_letter, IGNORED), 1.0)
        elif name == "shape":
            losses[name] = 0.5 * weighted(of_name, target, NO_SHAPE_WEIGHT)
        elif name == "centre":
            losses[name] = weighted(of_name, target, NO_CENTRE_WEIGHT)
        else:
            losses[name] = 0.1 * weighted(of_name, target, 1.0)
    return losses


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


def learning_rate_share(step: int, passed: float) -> float:
    """Warm-up, and a straight fall to 0 over the last part of the run.

    `step`: since the branch, or then all of the eyes, began to learn; `passed`: share of the run that is over.
    """
    return min((step + 1) / WARMUP, 1.0, max(0.0, (1 - passed) / FALL))


# --- Checkpoints ---


def save(output: Path, eyes: Eyes, optimizers: tuple, draws: int):
    """Write what the run needs to go on after `draws` draws, and the weights of the eyes."""
    save_checkpoint(output, eyes, optimizers, draws)
    weights = {name: weight.detach().bfloat16().cpu().contiguous() for name, weight in eyes.parts().items()}
    save_file(weights, output / f"{WEIGHTS}.new", {"format": "pt"})
    os.replace(output / f"{WEIGHTS}.new", output / WEIGHTS)


def begin_with(eyes: Eyes, start: Path) -> bool:
    """Take weights from a Pheye's, or from those that another run wrote; whether it has a branch.

    Raises:
        InputError: if it holds no vision tower, a part that is not whole, or parts of other sizes.
    """
    names, weights = eyes.parts(), load_file(start)
    weights = {name: weights[name].float() for name in names if name in weights}
    lacking = {name.split(".")[1] for name in names if name not in weights}
    if lacking & {"vision_tower", *(name.split(".")[1] for name in weights)}:
        raise InputError(f"{start} lacks weights of {', '.join(sorted(lacking))}; give those of a Pheye-nano.")
    mismatched = [name for name, weight in weights.items() if weight.shape != names[name].shape]
    if mismatched:
        raise InputError(f"{start} is of other sizes: {mismatched[0]} is {tuple(weights[mismatched[0]].shape)}.")
    eyes.load_state_dict({**eyes.state_dict(), **weights})
    return "high_res_tower" not in lacking


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


def spent(began: float) -> dict[str, float]:
    minutes = {"minutes": time.time() - began, "cpu_minutes": time.process_time()}
    return {name: round(seconds / 60, 1) for name, seconds in minutes.items()}


def means(sums: dict[str, torch.Tensor], steps: int) -> dict[str, float]:
    """The loss of a step, and its parts, from their sums over so many steps."""
    parts = {"loss": sum(sums.values()), **{f"loss_{name}": value for name, value in sums.items()}}
    return {name: round(float(value) / steps, 4) for name, value in parts.items()}


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

    for arrays in drawn(draws, seed, skipped, together, workers):
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
