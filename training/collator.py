"""Samples to batches: the processor's prompt, the answers labelled, broken images skipped and reported; and the same
for the eye (`--inspect`)."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

IGNORED = -100  # the label of a token that is not learnt
NO_IMAGE = "It has no image, or several; Pheye sees exactly one."
GAP = 4  # pixels between the tiles of a picture
PAPER = (255, 0, 255)
LEARNT, END = ">>>", "<<<"


def encode(processor, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels: the ids of each answer and of the end token behind it.

    The ids before the first answer are those of the prompt that `generate` is given.
    """
    ids, labels, text = [], [], ""
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = processor.apply_chat_template(messages[:turn], add_generation_prompt=True)
            ids = continued(processor.tokenizer, ids, text, prompt)
            labels += [IGNORED] * (len(ids) - len(labels))
            text = processor.apply_chat_template(messages[: turn + 1])
            ids = continued(processor.tokenizer, ids, prompt, text)
            labels += ids[len(labels) :]
    return ids, labels


def continued(tokenizer, ids: list[int], text: str, longer_text: str) -> list[int]:
    """The ids of `longer_text`, which begin with `ids`, those of `text`.

    What is new is encoded by itself if the tokenizer joins the end of `text` with what follows, for no prompt that
    `generate` is given ends in the middle of such a token.
    """
    if not longer_text.startswith(text):
        raise ValueError("The processor's chat template changes what it made of earlier messages; use another.")
    longer = tokenizer(longer_text)["input_ids"]
    if longer[: len(ids)] == ids:
        return longer
    return ids + tokenizer(longer_text.removeprefix(text), add_special_tokens=False)["input_ids"]


class PheyeCollator:
    """Makes a batch of the samples of `training.data`: input_ids, attention_mask and labels (B, T), pixel_values
    (B, V, 3, height, width), padded on the right; beside them `seen`, the number of samples, and `skipped`, a
    list of {"id", "source", "error"}.

    A sample whose image is missing or broken is skipped: it keeps its row, with a black image and without labels, so
    that batches have the same size in all processes and no other sample counts twice. If all are skipped, no label of
    the batch is left.

    Args:
        max_length: tokens of a row; what exceeds it is cut off at the end.

    Raises:
        ValueError: when called, if a sample has no answer or its answers are cut off whole; the message names it.
    """

    def __init__(self, processor, max_length: int | None = None):
        self.processor = processor
        self.max_length = max_length

    def __call__(self, samples: list[dict]) -> dict[str, Any]:
        rows = [self.encode_sample(sample) for sample in samples]
        pixel_values, errors = self.open_images([sample["image"] for sample in samples])
        # On the right: positions count from the row's beginning in language models that learn them, too.
        padded = {"padding_side": "right", "return_tensors": "pt"}
        batch = self.processor.tokenizer.pad({"input_ids": [ids for ids, _ in rows]}, **padded)
        labels = torch.full_like(batch["input_ids"], IGNORED)  # (B, T)
        for row, ((_, row_labels), error) in enumerate(zip(rows, errors, strict=True)):
            if error is None:
                labels[row, batch["attention_mask"][row].bool()] = torch.tensor(row_labels)
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": labels,
            "pixel_values": pixel_values,
            "seen": len(samples),
            "skipped": [
                {"id": sample["id"], "source": sample.get("source"), "error": error}
                for sample, error in zip(samples, errors, strict=True)
                if error is not None
            ],
        }

    def encode_sample(self, sample: dict) -> tuple[list[int], list[int]]:
        """Ids and labels of a sample, cut to the length."""
        answers = [message["content"] for message in sample["messages"] if message["role"] == "assistant"]
        if not answers or not all(answer.strip() for answer in answers):
            raise ValueError(f"{name_of(sample)} has no answer, or an empty one, so there is nothing to learn.")
        ids, labels = encode(self.processor, sample["messages"])
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORED for label in labels):
            raise ValueError(
                f"The answer of {name_of(sample)} is cut off whole: its prompt fills all of the {self.max_length} "
                "tokens. Raise --max_length, or leave the sample out."
            )
        return ids, labels

    def open_images(self, images: list) -> tuple[torch.Tensor, list[str | None]]:
        """Pixels (B, V, 3, height, width), black for images that cannot be read, and what is wrong with each."""
        image_processor = self.processor.image_processor
        if all(image is not None for image in images):
            try:
                return image_processor(images, return_tensors="pt")["pixel_values"], [None] * len(images)
            except (ValueError, OSError, TypeError):
                pass  # one by one, then
        pixels, errors = [], []
        for image in images:
            error = NO_IMAGE if image is None else None
            if error is None:
                try:
                    opened = image_processor([image], return_tensors="pt")
                except (ValueError, OSError, TypeError) as problem:
                    error = str(problem)
            if error is not None:
                opened = image_processor([Image.new("RGB", (8, 8))], return_tensors="pt")
            pixels.append(opened["pixel_values"])
            errors.append(error)
        return torch.cat(pixels), errors


def name_of(sample: dict) -> str:
    source = sample.get("source")
    return f"Sample {sample['id']!r}" + (f" of {source}" if source else "")


# --- Inspection ---


def show_samples(samples: Iterable[dict], processor, out: str | Path, count: int = 5, max_length: int | None = None):
    """Print `count` samples, what is learnt in marks, and write the views of each into `out` as one picture.

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
        print(f"--- {sample['id']} ({sample.get('source') or 'no source'}): {file}")
        if batch["skipped"]:
            print(f"SKIPPED: {batch['skipped'][0]['error']}")
            continue
        views = batch["pixel_values"][0]
        tiles(views, processor.image_processor).save(file)
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        learnt = int((labels != IGNORED).sum())
        print(marked_text(processor.tokenizer, ids, labels))
        print(f"({len(ids)} tokens, {learnt} of them learnt; {len(views)} views)\n")


def marked_text(tokenizer, ids: torch.Tensor, labels: torch.Tensor) -> str:
    """The text of `ids` (T), its labelled parts marked."""
    parts = []
    for is_learnt, group in itertools.groupby(zip(ids.tolist(), labels.tolist(), strict=True), key=learns):
        text = tokenizer.decode([token for token, _ in group], clean_up_tokenization_spaces=False)
        parts.append(f"{LEARNT}{text}{END}" if is_learnt else text)
    return "".join(parts)


def learns(token: tuple[int, int]) -> bool:
    return token[1] != IGNORED


def tiles(views: torch.Tensor, image_processor) -> Image.Image:
    """One picture of the views (V, 3, height, width): the global one, and beside it the crops where they lie."""
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (image_processor.image_mean, image_processor.image_std)
    )
    pixels = ((views * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)  # (V, H, W, 3)
    global_view, *crops = (Image.fromarray(view.numpy()) for view in pixels)
    width, height = global_view.size
    side = math.isqrt(len(crops))
    picture = Image.new("RGB", ((side + 1) * (width + GAP), side * (height + GAP) - GAP), PAPER)
    picture.paste(global_view, (0, 0))
    for number, crop in enumerate(crops):
        column, row = divmod(number, side)
        picture.paste(crop, ((column + 1) * (width + GAP) + GAP, row * (height + GAP)))
    return picture
