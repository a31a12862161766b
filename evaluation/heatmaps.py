"""Attention drawn on the image, one word after another.

Shapes: L blocks, N image tokens, V views, k x k crops (or those of a canvas), G patches along each side of a view.
"""

import itertools
import math
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..canvases_pheye import cells, crop_boxes
from ..image_processing_pheye import resize, to_rgb
from .word_attention import answer_with_attention, attention_by_word, view_shares

DRAWN_WORDS = 60  # the JSON has them all
FEW_WORDS = 4  # are drawn larger
LONGEST_WORD = 20  # that is drawn whole
ROW_LABEL, COLUMN_LABEL = 46, 20  # room for them, in pixels
LINES = ((0, 0, 0, 110), 3), ((255, 255, 255, 255), 1)  # colour and width: white between dark, to be seen on anything
GRAYS = 50, 235  # of the image under the heat
GAMMAS = 0.4, 1.6
HEATS = 0, 0.25, 0.5, 0.75, 1
COLOURS = (120, 30, 160, 0), (150, 30, 150, 0.3), (225, 50, 80, 0.5), (250, 140, 20, 0.6), (255, 235, 60, 0.7)

Shares = tuple[float, float, float, float]  # left, upper, right, lower, of a canvas
WHOLE = (0.0, 0.0, 1.0, 1.0)

# --- Weights of image tokens to pixels ---


def heat_maps(weights: np.ndarray, grid: tuple[int, int], patches_per_side: int) -> tuple[np.ndarray, np.ndarray]:
    """Attention on the patches of the global view (G, G), and on those of all crops in their places (rows * G,
    columns * G).

    weights: (N,); grid: rows and columns of crops. Class and register tokens, which come first in a view, stand for no
    place and are left out.
    """
    (rows, columns), size = grid, patches_per_side
    views = weights.reshape(1 + rows * columns, -1)[:, -(size**2) :].reshape(-1, size, size)  # (V, G, G)
    crops = np.empty((rows * size, columns * size), weights.dtype)
    boxes = crop_boxes(rows, columns, size, size)
    for (left, top, right, bottom), crop in zip(boxes, views[1:], strict=True):
        crops[top:bottom, left:right] = crop
    return views[0], crops


def to_pixels(heat: np.ndarray, size: tuple[int, int], shares: Shares = WHOLE) -> np.ndarray:
    """The part of a map that shows the image, at the image's `size` (width, height).

    Smooth: the centre of a patch has its value, and between centres it changes evenly.

    shares: where on its canvas, which the map covers, the image lies (`Place.shares`).
    """
    height, width = heat.shape
    box = tuple(share * side for share, side in zip(shares, (width, height) * 2, strict=True))
    return np.asarray(Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BILINEAR, box))  # (H, W)


# --- Drawings ---


def fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    """`size` scaled to the area of a square of this side, but no longer than three sides."""
    scale = min(side / math.sqrt(size[0] * size[1]), 3 * side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def draw_crops(image: Image.Image, grid: tuple[int, int], shares: Shares = WHOLE, side: int = 480) -> Image.Image:
    """The image with thin lines between its crops, whose columns and rows are named outside of it; of a canvas, as far
    as it shows the image."""
    width, height = fit(image.size, side)
    canvas = Image.new("RGB", (width + ROW_LABEL, height + COLUMN_LABEL), "white")
    canvas.paste(resize(image, (width, height), Image.Resampling.BICUBIC), (ROW_LABEL, COLUMN_LABEL))
    draw = ImageDraw.Draw(canvas, "RGBA")
    edges = draw_edges(draw, grid, shares, (ROW_LABEL, COLUMN_LABEL), (width, height))
    label = {"fill": "black", "font_size": 13}
    for number, centre in enumerate(centres_of(edges[0]), start=1):
        if centre is not None:
            draw.text((ROW_LABEL + centre * width, COLUMN_LABEL / 2), f"column {number}", anchor="mm", **label)
    for number, centre in enumerate(centres_of(edges[1]), start=1):
        if centre is not None:
            draw.text((0, COLUMN_LABEL + centre * height), f"row {number}", anchor="lm", **label)
    return canvas


def draw_edges(
    draw: ImageDraw.ImageDraw,
    grid: tuple[int, int],
    shares: Shares,
    corner: tuple[int, int],
    size: tuple[int, int],
) -> tuple[list[float], list[float]]:
    """Draw the lines between crops onto an image that lies at `corner` with this size (width, height).

    Returns:
        the edges of its columns and of its rows (`edges_of`).
    """
    (left, top), (width, height), (rows, columns) = corner, size, grid
    edges = edges_of(columns, shares[0], shares[2]), edges_of(rows, shares[1], shares[3])
    for edge in edges[0][1:-1]:
        for colour, line in LINES if 0 < edge < 1 else ():
            x = left + round(edge * width)
            draw.line((x, top, x, top + height - 1), colour, line)
    for edge in edges[1][1:-1]:
        for colour, line in LINES if 0 < edge < 1 else ():
            y = top + round(edge * height)
            draw.line((left, y, left + width - 1, y), colour, line)
    return edges


def edges_of(count: int, low: float, high: float) -> list[float]:
    """Where the `count` rows or columns of a canvas begin and end, in shares of an image that lies on it from `low` to
    `high`."""
    return [(number / count - low) / (high - low) for number in range(count + 1)]


def centres_of(edges: list[float]) -> list[float | None]:
    """The centre of what each row or column shows of the image; None if it shows nothing."""
    seen = [(max(begin, 0), min(end, 1)) for begin, end in itertools.pairwise(edges)]
    return [(begin + end) / 2 if begin < end else None for begin, end in seen]


def stretched_gray(image: Image.Image) -> np.ndarray:
    """The image in gray (height, width), so that a dark one can be seen too: from dark to light gray whatever its own
    range is, with its middle in the middle."""
    gray = np.asarray(image.convert("L"), np.float32)
    low, high = np.percentile(gray, (1, 99))
    if high - low < 1:
        return np.full_like(gray, sum(GRAYS) / 2)
    gray = np.clip((gray - low) / (high - low), 0, 1)
    gamma = np.clip(math.log(0.5) / math.log(np.clip(np.median(gray), 0.01, 0.99)), *GAMMAS)
    return GRAYS[0] + (GRAYS[1] - GRAYS[0]) * gray**gamma


def draw_heat(image: Image.Image, heat: np.ndarray, shares: Shares = WHOLE) -> Image.Image:
    """The image in gray under colours that cover it more, the more attention there is: from none to yellow, the most
    in `heat`."""
    heat = to_pixels(heat, image.size, shares)
    heat = heat / max(heat.max(), np.finfo(np.float32).tiny)
    red, green, blue, cover = (np.interp(heat, HEATS, channel)[..., None] for channel in zip(*COLOURS, strict=True))
    colour = np.concatenate([red, green, blue], axis=-1)  # (height, width, 3)
    gray = stretched_gray(image)[..., None]
    return Image.fromarray(np.rint((1 - cover) * gray + cover * colour).astype(np.uint8))


class Page:
    """The image with its crops and the answer on top, then two heat maps per word, side by side."""

    GAP, LABEL, WIDTH = 12, 22, 1200

    def __init__(
        self,
        image: Image.Image,
        grid: tuple[int, int],
        shares: Shares,
        prompt: str,
        answer_text: str,
        words: int,
    ):
        self.shares = shares
        drawn = min(words, DRAWN_WORDS)
        self.thumbnail = resize(image, fit(image.size, 320 if drawn <= FEW_WORDS else 200), Image.Resampling.BICUBIC)
        top = draw_crops(image, grid, shares, 400)
        lines = [*textwrap.wrap(prompt, 50), "", *textwrap.wrap(answer_text, 50)]
        which = "Per word" if drawn == words else f"For the first {drawn} of {words} words"
        lines += ["", f"{which}: global view, crops.", "Yellow is the most in each."]
        self.cell = 2 * self.thumbnail.width + 3 * self.GAP, self.thumbnail.height + self.LABEL + self.GAP
        self.columns = max(1, min(drawn, self.WIDTH // self.cell[0]))
        width = max(self.columns * self.cell[0], top.width + 420)
        self.top = max(top.height, 20 * len(lines)) + 2 * self.GAP
        self.canvas = Image.new("RGB", (width, self.top + math.ceil(drawn / self.columns) * self.cell[1]), "white")
        self.draw = ImageDraw.Draw(self.canvas)
        self.canvas.paste(top, (self.GAP, self.GAP))
        self.draw.text((top.width + 2 * self.GAP, self.GAP), "\n".join(lines), fill="black", font_size=15)
        self.count = 0

    def add(self, word: str, global_share: float, heats: Sequence[np.ndarray]):
        if self.count == DRAWN_WORDS:
            return
        row, column = divmod(self.count, self.columns)
        left, top = column * self.cell[0] + self.GAP, self.top + row * self.cell[1]
        word = word if len(word) <= LONGEST_WORD else f"{word[: LONGEST_WORD - 1]}…"
        labels = (f"{word}   global {global_share:.0%}", f"crops {1 - global_share:.0%}")
        for label, heat in zip(labels, heats, strict=True):
            self.draw.text((left, top + 2), label, fill="black", font_size=14)
            self.canvas.paste(draw_heat(self.thumbnail, heat, self.shares), (left, top + self.LABEL))
            left += self.thumbnail.width + self.GAP
        self.count += 1


def view_names(grid: tuple[int, int]) -> list[str]:
    return ["global", *(f"column {column + 1} row {row + 1}" for row, column in cells(*grid))]


def explain(model, processor, image: Image.Image, prompt: str, max_new_tokens: int = 30) -> tuple[Image.Image, dict]:
    """The drawing for one image and prompt, and the shares per view and block that go into the JSON.

    An answer without words gives the image with its crops alone, and no shares.
    """
    config = model.config
    image = to_rgb(image)
    place = processor.image_processor.place_of(image)
    grid, shares = (place.rows, place.columns), place.shares((config.vision_config.image_size,) * 2)
    answer = answer_with_attention(model, processor, image, prompt, max_new_tokens)
    text = f"{answer.text} …" if answer.is_cut else answer.text
    page = Page(image, grid, shares, prompt, text, len(answer.words))
    rows, total, tokens = [], 0, 0
    for word, count, weights in attention_by_word(answer):
        by_view = view_shares(weights, config.tokens_per_view)  # (L, V)
        mean = weights.mean(0)  # (N,)
        heats = heat_maps(mean, grid, config.patches_per_side)
        page.add(word, float(by_view[:, 0].mean()), heats)
        unplaced = round(max(0.0, 1 - float(heats[0].sum() + heats[1].sum())), 6)
        rows.append({"word": word, "tokens": count, **share_fields(by_view), "unplaced": unplaced})
        total, tokens = total + count * by_view, tokens + count
    return page.canvas, {
        "prompt": prompt,
        "answer": answer.text,
        "views": view_names(grid),
        "layers": list(config.cross_attention_layers),
        "overall": {"tokens": tokens, **share_fields(total / tokens)} if tokens else None,
        "words": rows,
    }


def share_fields(shares: np.ndarray) -> dict:
    """shares: (L, V)."""
    shares = shares.astype(float)
    return {"by_view": shares.mean(0).round(6).tolist(), "by_block": shares.round(6).tolist()}
