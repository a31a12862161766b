"""Eyes with linear probes: layers that read labels (picture_labels.py) off the states, thrown away after training.

What `nano.eyes` and `nano.global_view` share: the model, what it takes, its losses, its files.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from ... import PheyeConfig, PheyeForConditionalGeneration
from ...common.command import InputError
from ...image_processing_pheye import cut_crops, cut_views
from ...layers_pheye import CALL, ViewCall
from ..drawing import pictures
from .backbones import TILE
from .checkpoints import save_checkpoint
from .configs import EYES, TILES, VIEW
from .labels import CLASSES, IGNORED, MOST_SHAPES
from .picture_labels import HEADS, OF_LETTERS, POINTS

WEIGHTS = "eyes.safetensors"
CAP_HEIGHTS = 0.012, 0.065  # over the picture's height, of signs in scenes
LEAST_PIXELS = 7  # of a capital
# Of columns without a letter, and of patches without a shape or a shape's centre, most of all.
NOTHING_WEIGHT, NO_SHAPE_WEIGHT, NO_CENTRE_WEIGHT = 0.15, 0.01, 0.1
WARMUP = 100  # steps
FALL = 0.3  # share of the run over which the learning rate falls to 0


def branch_precision(device: str) -> AbstractContextManager:
    """On a processor the gradients of convolutions take longer in bfloat16 than in single precision."""
    return torch.autocast("cpu", enabled=False) if device == "cpu" else nullcontext()


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
        if self.branch_heads is not None:
            with branch_precision(tiles.device.type):
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


# --- Pixels ---


def pixels_of(picture: pictures.Picture) -> tuple[np.ndarray, np.ndarray]:
    return cut_views(picture.image, (TILES, TILES), (VIEW, VIEW)), np.stack(
        cut_crops(picture.image, (TILES, TILES), (TILE, TILE))
    )


def drawn(first: int, dataset: Dataset, together: int, workers: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Draws of `together` pictures of `dataset` from draw number `first` on, without end; `workers` processes draw
    beside the training, or none."""
    loader = DataLoader(
        dataset,
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


def towers_pixels(views: torch.Tensor, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        normalized(views, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
        normalized(tiles, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    )


# --- Losses ---


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


def label_losses(
    logits: torch.Tensor,
    letters: torch.Tensor,
    maps: torch.Tensor,
    centre: float = 1.0,
    no_centre: float = NO_CENTRE_WEIGHT,
) -> dict[str, torch.Tensor]:
    """What is asked of letters counts where there is one, rows and columns everywhere. `centre` and `no_centre` weigh
    the loss of shapes' centres, and in it the patches without one."""
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
            losses[name] = centre * weighted(of_name, target, no_centre)
        else:
            losses[name] = 0.1 * weighted(of_name, target, 1.0)
    return losses


def learning_rate_share(step: int, passed: float) -> float:
    """Warm-up, and a straight fall to 0 over the last part of the run.

    `step`: since the branch, or then all of the eyes, began to learn; `passed`: share of the run that is over.
    """
    return min((step + 1) / WARMUP, 1.0, max(0.0, (1 - passed) / FALL))


# --- Files ---


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


def spent(began: float) -> dict[str, float]:
    minutes = {"minutes": time.time() - began, "cpu_minutes": time.process_time()}
    return {name: round(seconds / 60, 1) for name, seconds in minutes.items()}


def means(sums: dict[str, torch.Tensor], steps: int) -> dict[str, float]:
    """The loss of a step, and its parts, from their sums over so many steps."""
    parts = {"loss": sum(sums.values()), **{f"loss_{name}": value for name, value in sums.items()}}
    return {name: round(float(value) / steps, 4) for name, value in parts.items()}
