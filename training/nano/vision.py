"""Stage 0 for the eyes: pre-train a small CLIP-style vision transformer on dense labels, then freeze it.

    python -m pheye.training.nano.vision --output FOLDER [--steps 6000]

The same command again goes on from its last checkpoint. The labels are read off by one linear layer over the states
that Pheye uses, those before the post-LayerNorm; that layer is thrown away afterwards.
"""

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pheye.image_processing_pheye import tile_boxes, tile_image
from pheye.modeling_pheye import transformer_layers

from . import pictures
from .checkpoints import load_checkpoint, log, save_checkpoint
from .labels import HEADS, IGNORED, MOST_SHAPES, ViewLabels, view_labels

VIEW = 224
TILES = 3
PAGES, SCENES, CROPS = 24, 2, 3  # of a batch; of each scene the global view and the crops with most letters
ECHOES = 2  # times that a batch is used, its colours changed: drawing costs as much as a third of the training
NOTHING_WEIGHT = 0.15  # of patches without a letter or shape, which are most
WARMUP, DECAY = 200, 0.3  # steps; share of the steps in which the learning rate falls to 0
SAVE_EVERY, LOG_EVERY, TEST_EVERY = 250, 50, 500


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        patch_size=14,
        image_size=VIEW,
        hidden_act="gelu",
    )


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


def page_view(rng: random.Random, held_out: bool) -> tuple[np.ndarray, ViewLabels]:
    """A page at another size and aspect ratio, stretched to a view as crops of pictures are."""
    ratio, side = 2 ** rng.uniform(-1, 1), VIEW * 2 ** rng.uniform(-0.5, 0.8)
    page = pictures.page(rng, held_out, round(side * ratio**0.5), round(side / ratio**0.5))
    pixels = tile_image(page.image, 1, (VIEW, VIEW))[0]
    return pixels, view_labels(page, (0, 0, *page.image.size))


def scene_views(rng: random.Random, held_out: bool, crops: int) -> list[tuple[np.ndarray, ViewLabels]]:
    """The global view of a scene and the `crops` crops of it that show most letters."""
    scene = pictures.scene(rng, held_out, sizes=(300, 900), cap_heights=(0.02, 0.1), signs=rng.randint(1, 4))
    width, height = scene.image.size
    views = tile_image(scene.image, TILES, (VIEW, VIEW))
    boxes = [(0, 0, width, height), *tile_boxes(TILES, height / TILES, width / TILES)]
    found = [(pixels, view_labels(scene, box)) for pixels, box in zip(views, boxes, strict=True)]
    most = sorted(found[1:], key=lambda view: -np.count_nonzero(view[1].maps[1]) - rng.random())
    return [found[0], *most[:crops]]


class Batches(Dataset):
    """Batch `index` is a function of seed and index: pixels (B, H, W, 3), maps, counts, and which rows are pages."""

    def __init__(self, seed: int, count: int, held_out: bool = False):
        self.seed, self.count, self.held_out = seed, count, held_out

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        rng = random.Random(f"{self.seed} {self.held_out} {index}")
        views = [page_view(rng, self.held_out) for _ in range(PAGES)]
        for _ in range(SCENES):
            views += scene_views(rng, self.held_out, CROPS)
        pixels = torch.from_numpy(np.stack([view for view, _ in views]))
        maps = torch.from_numpy(np.stack([labels.maps for _, labels in views]))
        counts = torch.from_numpy(np.stack([labels.counts for _, labels in views]))
        return pixels, maps, counts, torch.arange(len(views)) < PAGES


def recoloured(pixels: torch.Tensor, is_page: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pages with channels rolled and half of them inverted: other pictures with the same letters. Scenes keep theirs,
    for their shapes are asked for their colours."""
    pixels = pixels.clone()
    for row in torch.nonzero(is_page).flatten().tolist():
        shift, invert = torch.randint(0, 6, (1,), generator=generator).item() % 3, torch.rand(1, generator=generator)
        pixels[row] = pixels[row].roll(shift, -1)
        if invert < 0.5:
            pixels[row] = 255 - pixels[row]
    return pixels


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) to what the vision tower takes, (B, 3, H, W)."""
    pixels = (pixels.float() / 255 - torch.tensor(OPENAI_CLIP_MEAN)) / torch.tensor(OPENAI_CLIP_STD)
    return pixels.permute(0, 3, 1, 2)


# --- Training ---


def loss_of(reader: Reader, pixels: torch.Tensor, maps: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of all heads, empty patches weighted down; neighbours and places count where there is a letter."""
    with torch.autocast(pixels.device.type, torch.bfloat16):
        patch_logits, count_logits = reader(pixels)
    total = 0.2 * F.cross_entropy(count_logits.float().flatten(0, 1), counts.flatten().long())
    has_letter = (maps[:, 1] != 0) & (maps[:, 1] != IGNORED)
    for index, logits in enumerate(patch_logits.float().split(list(HEADS.values()), -1)):
        name = list(HEADS)[index]
        target = maps[:, index].flatten().long()
        if name in ("left_point", "letter", "right_point", "shape"):
            losses = F.cross_entropy(logits.flatten(0, 1), target, ignore_index=IGNORED, reduction="none")
            weights = torch.where(target == 0, NOTHING_WEIGHT, 1.0) * (target != IGNORED)
            total = total + (losses * weights).sum() / weights.sum()
        else:
            chosen = has_letter.flatten() & (target != IGNORED)
            total = total + 0.3 * F.cross_entropy(logits.flatten(0, 1)[chosen], target[chosen])
    return total


@torch.no_grad()
def accuracies(reader: Reader, batches: list) -> dict[str, float]:
    """Share of patch centres with a letter or shape, in pictures of held-out words and fonts, that are told right."""
    right, seen = dict.fromkeys(HEADS, 0), dict.fromkeys(HEADS, 0)
    for pixels, maps, _counts, _ in batches:
        with torch.autocast(pixels.device.type, torch.bfloat16):
            patch_logits, _ = reader(normalized(pixels))
        for index, logits in enumerate(patch_logits.split(list(HEADS.values()), -1)):
            name = list(HEADS)[index]
            target = maps[:, index].flatten(1).long()
            asked = (target != IGNORED) & ((target if name == "shape" else maps[:, 1].flatten(1)) != 0)
            right[name] += int((logits.argmax(-1) == target)[asked].sum())
            seen[name] += int(asked.sum())
    return {name: right[name] / max(1, seen[name]) for name in HEADS}


def optimizers_of(reader: Reader) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for everything else."""
    layers = transformer_layers(reader.vision, reader.vision.config.num_hidden_layers, "vision tower")
    matrices = [parameter for parameter in layers.parameters() if parameter.ndim == 2]
    held = {id(p) for p in matrices}
    others = [p for p in reader.parameters() if id(p) not in held]
    return [
        torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.02),
    ]


def learning_rate_share(step: int, steps: int) -> float:
    """Warm-up, a plateau, and a straight fall to 0 at the end."""
    return min((step + 1) / WARMUP, 1.0, max(0.0, (steps - step) / (DECAY * steps)))


def train(output: Path, steps: int, seed: int = 0, workers: int = 1):
    """Train for `steps` steps, go on from the last checkpoint if there is one, and save the frozen tower."""
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    reader = Reader(vision_config())
    optimizers = optimizers_of(reader)
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    start = load_checkpoint(output, reader, optimizers)
    tests = [Batches(seed, 6, held_out=True)[index] for index in range(6)]
    data = Batches(seed, (steps + ECHOES - 1) // ECHOES)
    order = range(start // ECHOES, len(data))
    loader = DataLoader(
        data, batch_size=None, sampler=order, num_workers=workers, prefetch_factor=8 if workers else None
    )
    step, began, losses = start, time.time(), []
    for pixels, maps, counts, is_page in loader:
        for _ in range(ECHOES):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            for optimizer, rates in zip(optimizers, base_rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * learning_rate_share(step, steps)
            loss = loss_of(reader, normalized(recoloured(pixels, is_page, generator)), maps, counts)
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            step += 1
            if step % LOG_EVERY == 0 or step == steps:
                entry = {
                    "step": step,
                    "loss": round(sum(losses) / len(losses), 4),
                    "seconds": round(time.time() - began),
                }
                if step % TEST_EVERY == 0 or step == steps:
                    entry |= {name: round(value, 4) for name, value in accuracies(reader, tests).items()}
                log(output, entry)
                losses = []
            if step % SAVE_EVERY == 0 or step == steps:
                save_checkpoint(output, reader, optimizers, step)
    reader.vision.eval().save_pretrained(output / "vision")
    CLIPImageProcessorPil().save_pretrained(output / "vision")  # mean and std, for whoever builds on it


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    arguments = parser.parse_args()
    train(arguments.output, arguments.steps, arguments.seed, arguments.workers)


if __name__ == "__main__":
    main()
