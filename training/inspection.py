"""What a model will see of training data, for the eye (`--inspect`)."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image

from ..canvases_pheye import cells
from .collator import IGNORED, PheyeCollator

GAP = 4  # pixels between views
BACKGROUND = (255, 0, 255)
LEARNT, END = ">>>", "<<<"


def show_samples(samples: Iterable[dict], processor, out: str | Path, count: int = 5, max_length: int | None = None):
    """Print `count` samples, what is learnt in marks, and write the views of each into `out` as one image.

    Of a data set with a length, samples at even distances are shown, so that each part of a mixture has its share.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    collator = PheyeCollator(processor, max_length)
    if hasattr(samples, "__len__"):
        count = min(count, len(samples))
        samples = [samples[number * len(samples) // count] for number in range(count)]
    for number, sample in enumerate(itertools.islice(samples, count)):
        batch = collator([sample])
        file = out / f"sample-{number}.png"
        place = f": {file}" if sample["images"] else ""
        print(f"--- {sample['id']} ({sample.get('source') or 'no source'}){place}")
        if batch["skipped"]:
            print(f"SKIPPED: {batch['skipped'][0]['error']}")
            continue
        views = batch["pixel_values"][0]
        grids = batch["image_grids"][0].tolist() if "image_grids" in batch else [None]
        if sample["images"]:
            draw_images(views, processor.image_processor, grids).save(file)
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        learnt = int((labels != IGNORED).sum())
        print(marked_text(processor.tokenizer, ids, labels))
        print(f"({len(ids)} tokens, {learnt} of them learnt; {len(views) if sample['images'] else 0} views)\n")


def marked_text(tokenizer, ids: torch.Tensor, labels: torch.Tensor) -> str:
    """The text of `ids` (T), its labelled parts marked."""
    parts = []
    for is_learnt, group in itertools.groupby(zip(ids.tolist(), labels.tolist(), strict=True), key=learns):
        text = tokenizer.decode([token for token, _ in group], clean_up_tokenization_spaces=False)
        parts.append(f"{LEARNT}{text}{END}" if is_learnt else text)
    return "".join(parts)


def learns(token: tuple[int, int]) -> bool:
    return token[1] != IGNORED


def draw_images(views: torch.Tensor, image_processor, grids: list[list[int] | None]) -> Image.Image:
    """The views (V, 3, height, width) of several images, one image below another; of None, as many crops as there
    are."""
    drawn, start = [], 0
    for grid in grids:
        end = len(views) if grid is None else start + 1 + grid[0] * grid[1]
        drawn.append(draw_views(views[start:end], image_processor, grid))
        start = end
    together = Image.new(
        "RGB", (max(one.width for one in drawn), sum(one.height + GAP for one in drawn) - GAP), BACKGROUND
    )
    top = 0
    for one in drawn:
        together.paste(one, (0, top))
        top += one.height + GAP
    return together


def draw_views(views: torch.Tensor, image_processor, grid: list[int] | None = None) -> Image.Image:
    """One image of the views (V, 3, height, width): the global one, and beside it the crops where they lie.

    grid: rows and columns of the crops; by default as many of both.
    """
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (image_processor.image_mean, image_processor.image_std)
    )
    pixels = ((views * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)  # (V, H, W, 3)
    global_view, *crops = (Image.fromarray(view.numpy()) for view in pixels)
    width, height = global_view.size
    rows, columns = grid or (math.isqrt(len(crops)),) * 2
    drawn = Image.new("RGB", ((columns + 1) * (width + GAP), rows * (height + GAP) - GAP), BACKGROUND)
    drawn.paste(global_view, (0, 0))
    for (row, column), crop in zip(cells(rows, columns), crops, strict=True):
        drawn.paste(crop, ((column + 1) * (width + GAP) + GAP, row * (height + GAP)))
    return drawn
