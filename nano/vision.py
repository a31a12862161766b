"""Stage 0 for the eyes: pre-train a small CLIP-style vision transformer on dense labels, then freeze it.

    python -m pheye.nano.vision --output FOLDER [--steps 6000]

The same command again goes on from its last checkpoint. The labels are read off by one linear layer over the states
that Pheye uses, those before the post-LayerNorm; that layer is thrown away afterwards.
"""

import argparse
import functools
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .. import PheyeForConditionalGeneration
from ..canvases_pheye import crop_boxes
from ..common.command import Parser, at_least, default_device, exit_status
from ..image_processing_pheye import cut_views
from .drawing import pictures
from .drawing.recolouring import recoloured
from .learning.checkpoints import autocast, claim, load_checkpoint, log, save_checkpoint
from .learning.configs import TILES, VIEW, vision_config
from .learning.labels import HEADS, IGNORED, MOST_SHAPES, ViewLabels, view_labels
from .learning.muon import optimizers_for, set_learning_rates

PAGES, SCENES, CROPS = 10, 2, 3  # of a batch; of each scene the global view and the crops with most letters
ECHOES = 3  # times that a batch is used, its colours changed: drawing costs more than a step
BATCHES_AT_ONCE = 8  # that a process draws
EASY, HARD = 400, 1000  # draws up to which pages are easy, and from which on they are as hard as they will be
CAP_HEIGHTS, EASY_CAP_HEIGHT = (13, 44), 24  # of pages, in pixels of a view: least and most, and least at first
NOTHING_WEIGHT, NO_SHAPE_WEIGHT = 0.15, 0.01  # of patches without a letter and without a shape, which are most
WARMUP = 200  # steps
SAVE_EVERY, LOG_EVERY, TEST_EVERY = 250, 50, 250
TEST_BATCHES = 10


class Reader(nn.Module):
    """A vision transformer and the linear layers that read the labels off its states."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.vision = CLIPVisionModel(config)
        self.patch_heads = nn.Linear(config.hidden_size, sum(HEADS.values()))
        self.count_heads = nn.Linear(config.hidden_size, len(pictures.KINDS) * (1 + MOST_SHAPES))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) to logits of patches (B, N, classes of all heads) and of counts (B, kinds, counts)."""
        states = self.vision(pixels).last_hidden_state
        return self.patch_heads(states[:, 1:]), self.count_heads(states[:, 0]).unflatten(1, (len(pictures.KINDS), -1))


# --- Data ---


def page_view(rng: random.Random, held_out: bool, ease: float) -> tuple[np.ndarray, ViewLabels]:
    """A page at another size and aspect ratio, stretched to a view as crops of pictures are.

    `ease`: from 0 to 1; with 1 all letters are large, hardly stretched, and dark on plain bright paper.
    """
    stretch = 1 - 0.7 * ease
    ratio, side = 2 ** rng.uniform(-stretch, stretch), VIEW * 2 ** rng.uniform(-0.5, 0.8)
    caps = CAP_HEIGHTS[0] + ease * (EASY_CAP_HEIGHT - CAP_HEIGHTS[0]), CAP_HEIGHTS[1]
    page = pictures.page(rng, held_out, round(side * ratio**0.5), round(side / ratio**0.5), caps, rng.random() < ease)
    pixels = cut_views(page.image, (1, 1), (VIEW, VIEW))[0]
    return pixels, view_labels(page, (0, 0, *page.image.size))


def scene_views(rng: random.Random, held_out: bool, crops: int) -> list[tuple[np.ndarray, ViewLabels]]:
    """The global view of a scene and the `crops` crops of it that show most letters."""
    scene = pictures.scene(rng, held_out, sizes=(300, 900), cap_heights=(0.02, 0.1), signs=rng.randint(1, 4))
    width, height = scene.image.size
    views = cut_views(scene.image, (TILES, TILES), (VIEW, VIEW))
    boxes = [(0, 0, width, height), *crop_boxes(TILES, TILES, height / TILES, width / TILES)]
    found = [(pixels, view_labels(scene, box)) for pixels, box in zip(views, boxes, strict=True)]
    most = sorted(found[1:], key=lambda view: -np.count_nonzero(view[1].maps[1]) - rng.random())
    return [found[0], *most[:crops]]


def ease_of(draw: int, held_out: bool = False) -> float:
    """From 1, with which letters are found out about twice as fast, to 0."""
    return 0.0 if held_out else min(1.0, max(0.0, (HARD - draw) / (HARD - EASY)))


def batch(
    index: int, seed: int = 0, held_out: bool = False, together: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Batch number `index`: pixels (B, H, W, 3), maps, counts, and which rows are pages; all but those are uint8.

    `together`: batches that make one draw, by whose number pages become harder.
    """
    rng = random.Random(f"{seed} {held_out} {index}")
    ease = ease_of(index // together, held_out)
    views = [page_view(rng, held_out, ease) for _ in range(PAGES)]
    for _ in range(SCENES):
        views += scene_views(rng, held_out, CROPS)
    pixels = np.stack([view for view, _ in views])
    maps = np.stack([labels.maps for _, labels in views])
    counts = np.stack([labels.counts for _, labels in views])
    return pixels, maps, counts, np.arange(len(views)) < PAGES


def drawn(
    indices: range, seed: int, held_out: bool, workers: int, ahead: bool, together: int = 1
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Draws of `together` batches, BATCHES_AT_ONCE made by each of `workers` processes, and if `ahead` while the last
    ones are being used.

    Where the processor trains, drawing beside it would slow it down by more than the time that it takes by itself.
    """
    draw = functools.partial(batch, seed=seed, held_out=held_out, together=together)
    size = BATCHES_AT_ONCE * workers * together
    chunks = [indices[first : first + size] for first in range(0, len(indices), size)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pending = None
        for number, chunk in enumerate(chunks):
            pending = pending or pool.map_async(draw, chunk, chunksize=1)
            batches = pending.get()
            is_next_begun = ahead and number + 1 < len(chunks)
            pending = pool.map_async(draw, chunks[number + 1], chunksize=1) if is_next_begun else None
            for first in range(0, len(batches), together):
                parts = zip(*batches[first : first + together], strict=True)
                yield tuple(torch.from_numpy(np.concatenate(arrays)) for arrays in parts)


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) to what the vision tower takes, (B, 3, H, W)."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


# --- Training ---


def loss_of(reader: Reader, pixels: torch.Tensor, maps: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of all heads, empty patches weighted down; neighbours and places count where there is a letter,
    rows and columns everywhere."""
    with autocast(pixels.device.type):
        patch_logits, count_logits = reader(pixels)
    total = 0.2 * F.cross_entropy(count_logits.float().flatten(0, 1), counts.flatten().long())
    has_letter = (maps[:, 1] != 0) & (maps[:, 1] != IGNORED)
    for index, logits in enumerate(patch_logits.float().split(list(HEADS.values()), -1)):
        name = list(HEADS)[index]
        target = maps[:, index].flatten().long()
        if name in ("left_point", "letter", "right_point", "shape"):
            losses = F.cross_entropy(logits.flatten(0, 1), target, ignore_index=IGNORED, reduction="none")
            nothing = NO_SHAPE_WEIGHT if name == "shape" else NOTHING_WEIGHT
            weights = torch.where(target == 0, nothing, 1.0) * (target != IGNORED)
            total = total + (losses * weights).sum() / weights.sum()
        elif name in ("row", "column"):
            total = total + 0.5 * F.cross_entropy(logits.flatten(0, 1), target)
        else:
            chosen = has_letter.flatten() & (target != IGNORED)
            total = total + 0.3 * F.cross_entropy(logits.flatten(0, 1)[chosen], target[chosen])
    return total


@torch.no_grad()
def accuracies(reader: Reader, batches: list) -> dict[str, float]:
    """Share of patch centres with a letter or shape, in pictures of held-out words and fonts, that are told right."""
    right, seen = dict.fromkeys(HEADS, 0), dict.fromkeys(HEADS, 0)
    device = next(reader.parameters()).device
    for pixels, maps in ((pixels.to(device), maps.to(device)) for pixels, maps, *_ in batches):
        with autocast(pixels.device.type):
            patch_logits, _ = reader(normalized(pixels))
        for index, logits in enumerate(patch_logits.split(list(HEADS.values()), -1)):
            name = list(HEADS)[index]
            target = maps[:, index].flatten(1).long()
            asked = (target != IGNORED) & ((target if name == "shape" else maps[:, 1].flatten(1)) != 0)
            right[name] += int((logits.argmax(-1) == target)[asked].sum())
            seen[name] += int(asked.sum())
    return {name: right[name] / max(1, seen[name]) for name in HEADS}


def learning_rate_share(step: int, steps: int) -> float:
    """Warm-up, and a straight fall to 0 at the end: most is learnt while it falls."""
    return min((step + 1) / WARMUP, 1 - step / steps)


def train(
    output: Path,
    steps: int,
    seed: int = 0,
    workers: int = 1,
    together: int = 1,
    start: Path | None = None,
    device: str = "cpu",
):
    """Train for `steps` steps, go on from the last checkpoint if there is one, and save the frozen tower.

    `together`: batches of a step; `start`: a Pheye, to begin with its tower instead of from nothing.
    """
    claim(output, seed=seed, together=together, start=start)
    torch.manual_seed(seed)
    reader = Reader(vision_config())
    if start is not None:
        trained = PheyeForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
        reader.vision.load_state_dict(trained.pheye.vision_tower.state_dict())
    reader.to(device)
    optimizers = optimizers_for(reader, reader.vision.encoder.layers, 3e-3, 1.5e-3)
    step = load_checkpoint(output, reader, optimizers)
    tests = list(drawn(range(TEST_BATCHES), seed, True, workers, False)) if step < steps else []
    skipped = HARD if start else 0  # draws; a tower that reads needs no easy ones
    order = range((skipped + step // ECHOES) * together, (skipped + math.ceil(steps / ECHOES)) * together)
    began, losses = time.time(), []
    for arrays in drawn(order, seed, False, workers, device != "cpu", together):
        pixels, maps, counts, is_page = (array.to(device) for array in arrays)
        for _ in range(min(ECHOES - step % ECHOES, steps - step)):  # fewer in a run that goes on, and at the end
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            set_learning_rates(optimizers, learning_rate_share(step, steps))
            inverted = 0.5 * (1 - ease_of(skipped + step // ECHOES))  # dark letters come first
            views = normalized(recoloured(pixels, is_page, generator, inverted))
            loss = loss_of(reader, views, maps, counts)
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            step += 1
            if step % LOG_EVERY == 0 or step == steps:
                entry = {"step": step, "loss": round(sum(losses) / len(losses), 4)}
                entry["seconds"] = round(time.time() - began)
                if step % TEST_EVERY == 0 or step == steps:
                    entry |= {name: round(value, 4) for name, value in accuracies(reader, tests).items()}
                log(output, entry)
                losses = []
            if step % SAVE_EVERY == 0 or step == steps:
                save_checkpoint(output, reader, optimizers, step)
    reader.vision.eval().save_pretrained(output / "vision")
    CLIPImageProcessorPil().save_pretrained(output / "vision")  # mean and std, for whoever builds on it


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.vision", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--steps", type=at_least(0), default=6000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=at_least(1), default=os.cpu_count(), help="processes that draw")
    parser.add_argument(
        "--together", type=at_least(1), default=1, help="batches of a step; a GPU takes as long for several"
    )
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="a Pheye whose tower to begin with")
    parser.add_argument("--device", default=default_device(), help="(default: %(default)s)")
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(train, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
