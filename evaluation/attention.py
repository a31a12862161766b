"""Where a Pheye looks while it answers: cross-attention on the views of a picture (appendix C of the paper).

    python -m pheye.evaluation.attention --model FOLDER_OR_ID --image FILE --prompt "..." --output OUT.png
    python -m pheye.evaluation.attention --model FOLDER_OR_ID --data FILE.jsonl --output OUT.png

The first draws the picture with its crops and, for each word of the answer, heat maps over the global view and over
the crops. The second draws, for many samples, the mean share of the global view per block (the paper's Figure 4): each
line of FILE.jsonl has `image` (a path, from the file's folder), `prompt` and, for a curve per tertile, `boxes_area`
(the answer's box over the picture) or `tertile` (small, medium or large). Both write a JSON beside the picture.

The attention of a word is that of the positions which predict its tokens, averaged over them and over the heads.

Shapes: L blocks, T tokens of the answer, N image tokens, V views, k crops and G patches along each side.
"""

import argparse
import contextlib
import json
import math
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers import DynamicCache

from ..answering.engine import open_model
from ..common.command import InputError, at_least, default_device, exit_status, require
from ..common.files import write_atomically
from ..common.machine import versions
from ..image_processing_pheye import load_image, resize, tile_boxes, to_rgb
from .detail import TERTILES, read_lines, tertiles

# So that memory does not grow with the answer:
CHUNK = 16  # tokens in one forward pass
DRAWN_WORDS = 60  # the JSON has them all

# --- Weights of image tokens to views and pixels ---


def view_shares(weights: np.ndarray, views: int) -> np.ndarray:
    """Attention on each view, class and register tokens included: (..., N) to (..., V)."""
    return weights.reshape(*weights.shape[:-1], views, -1).sum(-1)


def heat_maps(weights: np.ndarray, tiles_per_side: int, patches_per_side: int) -> tuple[np.ndarray, np.ndarray]:
    """Attention on the patches of the global view (G, G), and on those of all crops in their places (k * G, k * G).

    weights: (N,). Class and register tokens, which come first in a view, stand for no place and are left out.
    """
    size = patches_per_side
    views = weights.reshape(1 + tiles_per_side**2, -1)[:, -(size**2) :].reshape(-1, size, size)  # (V, G, G)
    crops = np.empty((tiles_per_side * size, tiles_per_side * size), weights.dtype)
    boxes = tile_boxes(tiles_per_side, size, size)
    for (left, top, right, bottom), crop in zip(boxes, views[1:], strict=True):
        crops[top:bottom, left:right] = crop
    return views[0], crops


def to_pixels(heat: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map of the whole picture, which views show stretched to a square, at the picture's `size` (width, height).

    Every pixel gets the value of the patch that its centre lies in; where patches are smaller than pixels, their mean.
    """
    return np.asarray(Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BOX))  # (height, width)


# --- The model's answer and its attention ---


def split_words(tokenizer, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The words of an answer, each with the places in `ids` of the tokens that begin in it.

    White space and half characters belong to what follows. Special tokens belong to no word.
    """

    def decode(count: int) -> str:
        return tokenizer.decode(ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    special = set(tokenizer.all_special_ids)
    text, begin, places = decode(len(ids)), 0, {}
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    for place, token in enumerate(ids):
        word = next((index for index, (_, end) in enumerate(spans) if end > begin), None)
        if word is not None and token not in special:
            places.setdefault(word, []).append(place)
        begin = max(begin, common_length(decode(place + 1), text))  # without half a character at the end
    starts = [spans[word][0] for word in places] + [len(text)]
    return [
        (text[start:end].strip(), found)
        for start, end, found in zip(starts[:-1], starts[1:], places.values(), strict=True)
    ]


def common_length(first: str, second: str) -> int:
    """Number of characters in which two texts begin alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


@contextlib.contextmanager
def recording(model) -> Iterator[list[torch.Tensor]]:
    """Within, each forward pass of one row of text leaves here, block by block, weights (T, N): the mean over heads.

    Only the blocks turn to eager attention, and no block's weights per head outlive its own forward pass.
    """
    records, handles = [], []

    def ask(block, args: tuple) -> tuple:
        return (*args[:3], True)

    def take(block, args: tuple, output: tuple) -> tuple:
        hidden_states, weights = output
        records.append(weights[0].mean(0, dtype=torch.float32))  # (T, N)
        return hidden_states, None

    before = model.config._attn_implementation
    model.set_attn_implementation({"": "eager"})
    for block in model.pheye.cross_attention_blocks:
        handles += [block.register_forward_pre_hook(ask), block.register_forward_hook(take)]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation({"": before})


@dataclass
class Answer:
    """An answer, its words with the places of their tokens, and the attention (L, N) of each token, one after another.

    The attention is computed while it is read, and can be read once.
    """

    text: str
    words: list[tuple[str, list[int]]]
    attention: Iterator[np.ndarray]


@torch.no_grad()
def answer(model, processor, picture: Image.Image, prompt: str, max_new_tokens: int) -> Answer:
    """The model's answer, greedy."""
    text = processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    inputs = processor(images=picture, text=text, return_tensors="pt").to(model.device)
    image = model.get_image_features(inputs["pixel_values"].to(model.dtype)).last_hidden_state  # (1, N, D)
    prompt_ids = inputs["input_ids"]
    ids = model.generate(
        prompt_ids,
        attention_mask=inputs["attention_mask"],
        image_hidden_states=image,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=False,
    )[:, prompt_ids.shape[1] :]
    words = split_words(processor.tokenizer, ids[0].tolist())
    return Answer(
        processor.post_process_image_text_to_text(ids)[0].strip(),
        words,
        token_attention(model, prompt_ids, image, ids),
    )


@torch.no_grad()
def token_attention(
    model, prompt_ids: torch.Tensor, image_hidden_states: torch.Tensor, answer_ids: torch.Tensor
) -> Iterator[np.ndarray]:
    """Attention (L, N) at the position that predicts each token of the answer, given the ones before it.

    The prompt is read without its last token, which predicts the answer's first; ids have one row.
    """
    cache = DynamicCache(config=model.config.text_config)
    model(prompt_ids[:, :-1], image_hidden_states=image_hidden_states, cache=cache, use_cache=True, logits_to_keep=1)
    predicting = torch.cat([prompt_ids[:, -1:], answer_ids[:, :-1]], dim=1)  # (1, T)
    for chunk in predicting.split(CHUNK, dim=1):
        with recording(model) as records:
            model(chunk, cache=cache, use_cache=True, logits_to_keep=1)
        weights = torch.stack([record.cpu() for record in records], dim=1)  # (T, L, N)
        weights /= weights.sum(-1, keepdim=True)  # rows of half precision do not quite add up
        yield from weights.numpy()


def word_attention(found: Answer) -> Iterator[tuple[str, int, np.ndarray]]:
    """Each word with the number of its tokens and their mean attention (L, N)."""
    words = iter(found.words)
    text, places = next(words, ("", []))
    total = 0
    for place, weights in enumerate(found.attention):
        if place in places:
            total = total + weights
            if place == places[-1]:
                yield text, len(places), total / len(places)
                text, places = next(words, ("", []))
                total = 0


# --- Pictures ---


def fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    """`size` scaled to the area of a square of this side, but no longer than three sides."""
    scale = min(side / math.sqrt(size[0] * size[1]), 3 * side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def draw_tiles(picture: Image.Image, tiles_per_side: int, side: int = 480) -> Image.Image:
    """The picture, its crops outlined and numbered in the order in which the model reads them."""
    width, height = fit(picture.size, side)
    canvas = resize(picture, (width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    for number, box in enumerate(tile_boxes(tiles_per_side, 1, 1), start=1):
        left, right = (x * width / tiles_per_side for x in box[::2])
        top, bottom = (y * height / tiles_per_side for y in box[1::2])
        draw.rectangle((left, top, right - 1, bottom - 1), outline="red", width=2)
        draw.text((left + 6, top + 4), str(number), fill="red", font_size=20)
    return canvas


def draw_heat(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """The picture in gray under colours from dark (no attention) to yellow (the most in `heat`)."""
    heat = to_pixels(heat, picture.size)
    heat = heat / max(heat.max(), np.finfo(np.float32).tiny)
    stops = [0, 0.25, 0.5, 0.75, 1]
    channels = [[0, 90, 190, 245, 255], [0, 20, 55, 130, 255], [40, 110, 85, 10, 120]]
    colour = np.stack([np.interp(heat, stops, channel) for channel in channels], axis=-1)  # (height, width, 3)
    gray = np.asarray(picture.convert("L"), np.float32)[..., None]
    return Image.fromarray(np.rint(0.4 * gray + 0.6 * colour).astype(np.uint8))


class Page:
    """The picture with its crops and the answer on top, then two heat maps per word, side by side."""

    GAP, LABEL, WIDTH = 12, 22, 1200

    def __init__(self, picture: Image.Image, tiles_per_side: int, prompt: str, answer_text: str, words: int):
        self.thumbnail = resize(picture, fit(picture.size, 200), Image.Resampling.BICUBIC)
        top = draw_tiles(picture, tiles_per_side, 400)
        lines = [*textwrap.wrap(prompt, 50), "", *textwrap.wrap(answer_text, 50)]
        drawn = min(words, DRAWN_WORDS)
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
        labels = (f"{word[:20]}   global {global_share:.0%}", f"crops {1 - global_share:.0%}")
        for label, heat in zip(labels, heats, strict=True):
            self.draw.text((left, top + 2), label, fill="black", font_size=14)
            self.canvas.paste(draw_heat(self.thumbnail, heat), (left, top + self.LABEL))
            left += self.thumbnail.width + self.GAP
        self.count += 1


def view_names(tiles_per_side: int) -> list[str]:
    boxes = tile_boxes(tiles_per_side, 1, 1)
    return ["global", *(f"column {left + 1} row {top + 1}" for left, top, _, _ in boxes)]


def explain(model, processor, picture: Image.Image, prompt: str, max_new_tokens: int = 30) -> tuple[Image.Image, dict]:
    """The drawing for one picture and prompt, and the shares per view and block that go into the JSON.

    An answer without words gives the picture with its crops alone, and no shares.
    """
    config = model.config
    views, tiles = config.views_per_image, config.tiles_per_side
    patches = config.vision_config.image_size // config.vision_config.patch_size
    picture = to_rgb(picture)
    found = answer(model, processor, picture, prompt, max_new_tokens)
    page = Page(picture, tiles, prompt, found.text, len(found.words))
    rows, total, tokens = [], 0, 0
    for word, count, weights in word_attention(found):
        shares = view_shares(weights, views)  # (L, V)
        mean = weights.mean(0)  # (N,)
        heats = heat_maps(mean, tiles, patches)
        page.add(word, float(shares[:, 0].mean()), heats)
        unplaced = round(max(0.0, 1 - float(heats[0].sum() + heats[1].sum())), 6)
        rows.append({"word": word, "tokens": count, **share_fields(shares), "unplaced": unplaced})
        total, tokens = total + count * shares, tokens + count
    return page.canvas, {
        "prompt": prompt,
        "answer": found.text,
        "views": view_names(tiles),
        "layers": list(config.cross_attention_layers),
        "overall": {"tokens": tokens, **share_fields(total / tokens)} if tokens else None,
        "words": rows,
    }


def share_fields(shares: np.ndarray) -> dict:
    """shares: (L, V)."""
    shares = shares.astype(float)
    return {"by_view": shares.mean(0).round(6).tolist(), "by_block": shares.round(6).tolist()}


# --- Figure 4 ---


def read_samples(path: Path) -> list[dict]:
    """Samples with `image` as a path that exists, `prompt`, and `tertile`: small, medium, large, or None in all.

    Raises:
        InputError: if a line cannot be used; nothing has been computed by then.
    """
    rows = read_lines(path)
    for row in rows:
        where = f"Line {row['_line']} of {path}"
        for name in ("image", "prompt"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise InputError(f"{where} has no `{name}`; each line needs `image` and `prompt`.")
        row["image"] = path.parent / row["image"]
        if not row["image"].is_file():
            raise InputError(f"{where}: there is no image {row['image']}; paths begin at the folder of {path.name}.")
    names = [name for name in ("tertile", "boxes_area") if name in rows[0]]
    for row in rows:
        if names and names[0] not in row:
            raise InputError(f"Line {row['_line']} of {path} has no `{names[0]}`, but line {rows[0]['_line']} has.")
        if names == ["boxes_area"] and not is_share(row["boxes_area"]):
            raise InputError(
                f"Line {row['_line']} of {path}: boxes_area is {row['boxes_area']!r}, not a number from 0 to 1."
            )
        if "tertile" in names and row["tertile"] not in TERTILES:
            raise InputError(
                f"Line {row['_line']} of {path}: tertile is {row['tertile']!r}, not one of {', '.join(TERTILES)}."
            )
    if names == ["boxes_area"]:
        groups = tertiles({index: row["boxes_area"] for index, row in enumerate(rows)})
        return [{**row, "tertile": TERTILES[groups[index]]} for index, row in enumerate(rows)]
    return [{"tertile": None, **row} for row in rows]


def is_share(value) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value <= 1


def global_shares(model, processor, samples: Iterable[dict], max_new_tokens: int) -> dict:
    """Mean share of the global view per block and tertile; every sample counts the same, whatever its length.

    `image` is a picture or a path. Samples whose image cannot be read, or whose answer has no words, are listed and
    left out.
    """
    views = model.config.views_per_image
    sums, counts, left_out = {}, {}, []
    for sample in tqdm(samples, unit=" images"):
        try:
            image = sample["image"]
            picture = to_rgb(image if isinstance(image, Image.Image) else load_image(image))
            found = answer(model, processor, picture, sample["prompt"], max_new_tokens)
            total, tokens = 0, 0
            for _, count, weights in word_attention(found):
                total, tokens = total + count * view_shares(weights, views)[:, 0], tokens + count
            if not tokens:
                raise InputError("The answer has no words.")
        except (InputError, OSError, TypeError, ValueError) as error:
            left_out.append({"line": sample["_line"], "error": str(error)})
            continue
        group = sample["tertile"] or "all"
        sums[group] = sums.get(group, 0) + total / tokens
        counts[group] = counts.get(group, 0) + 1
    if not counts:
        raise InputError(f"No sample could be used; the first: {left_out[0]['error']}")
    groups = [
        {
            "tertile": name,
            "samples": counts[name],
            "global_share": (sums[name] / counts[name]).astype(float).round(6).tolist(),
        }
        for name in (*TERTILES, "all")
        if name in counts
    ]
    return {"layers": list(model.config.cross_attention_layers), "tertiles": groups, "left_out": left_out}


def plot(result: dict, path: Path):
    """Figure 4: a curve per tertile over the blocks."""
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for group in result["tertiles"]:
        label = f"{group['tertile']} ({group['samples']})"
        axes.plot(result["layers"], [100 * share for share in group["global_share"]], marker="o", label=label)
    axes.set_xticks(result["layers"])
    axes.set_xlabel("layer of the language model behind the block")
    axes.set_ylabel("attention on the global view in %")
    axes.legend(title="area of the answer's box")
    figure.savefig(path, dpi=150)


# --- The command ---


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pheye.evaluation.attention", description="Draw where a Pheye looks while it answers."
    )
    parser.add_argument("--model", required=True, metavar="FOLDER_OR_ID")
    parser.add_argument("--image", help="a picture; with --prompt")
    parser.add_argument("--prompt", help="what to ask about it")
    parser.add_argument("--data", type=Path, metavar="FILE.jsonl", help="many samples, for the mean share per block")
    parser.add_argument("--output", required=True, type=Path, metavar="OUT.png", help="a .json goes beside it")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=30, help="(default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default=default_device(), help="(default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit of the model's repository")
    args = parser.parse_args(argv)
    if (args.data is None) == (args.image is None) or (args.image is None) != (args.prompt is None):
        parser.error("give --image and --prompt, or --data alone")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty")
    if args.output.suffix != ".png":
        parser.error(f"--output {args.output} must end in .png")
    return args


def run(args: argparse.Namespace):
    if args.data:
        require("matplotlib")
        samples = read_samples(args.data)
    else:
        try:
            picture = to_rgb(load_image(args.image))
        except ValueError as error:
            raise InputError(str(error)) from error
    revision, load = open_model(args.model, args.revision, args.dtype, args.device)
    model, processor = load()
    about = {"model": args.model, "revision": revision, "versions": versions()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.data:
        result = global_shares(model, processor, samples, args.max_new_tokens)
        plot(result, args.output)
        about["data"] = str(args.data)
    else:
        canvas, result = explain(model, processor, picture, args.prompt, args.max_new_tokens)
        canvas.save(args.output)
        about["image"] = args.image
        print(f"Answer: {result['answer']}")
        if not result["words"]:
            print("The answer has no words, so only the crops were drawn; ask something else.", file=sys.stderr)
    text = json.dumps({**about, **result}, ensure_ascii=False, indent=1)
    write_atomically(args.output.with_suffix(".json"), [text.encode() + b"\n"])
    print(f"Wrote {args.output} and {args.output.with_suffix('.json')}.")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
