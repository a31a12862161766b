"""Samples to batches: the processor's prompt, the answers labelled, broken images skipped and reported."""

from functools import partial
from typing import Any

import torch
from PIL import Image

from ..common.command import InputError
from ..common.images import tried
from ..image_processing_pheye import pad_rows

IGNORED = -100  # the label of a token that is not learnt


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
        raise InputError("The processor's chat template changes what it made of earlier messages; use another.")
    longer = tokenizer(longer_text)["input_ids"]
    if longer[: len(ids)] == ids:
        return longer
    return ids + tokenizer(longer_text.removeprefix(text), add_special_tokens=False)["input_ids"]


class PheyeCollator:
    """Makes a batch of the samples of a `Mixture`: input_ids, attention_mask and labels (B, T), padded on the right,
    and what the image processor gives for the images, by its names (pixel_values); beside them `seen`, the number of
    samples, and `skipped`, a list of {"id", "source", "error"}.

    A sample of which an image is missing or broken is skipped: it keeps its row, with a black image and without
    labels, so that batches have the same size in all processes and no other sample counts twice. If all are skipped,
    no label of the batch is left.

    Samples without images are text. A batch of nothing else has a row more, with a black image and without labels, so
    that all that trains has a gradient in every step and process, if one of 0.

    Args:
        max_length: tokens of a row; what exceeds it is cut off at the end.

    Raises:
        InputError: when called, if a sample has no answer or its answers are cut off whole; the message names it.
    """

    def __init__(self, processor, max_length: int | None = None):
        self.processor = processor
        self.max_length = max_length

    def __call__(self, samples: list[dict]) -> dict[str, Any]:
        rows = [self.encode_sample(sample) for sample in samples]
        images = [[black()] if "error" in sample else sample["images"] for sample in samples]
        if not any(images):
            rows.append(([self.processor.tokenizer.eos_token_id], [IGNORED]))
            images.append([black()])
        image_inputs, errors = self.open_images(images)
        errors = [sample.get("error", error) for sample, error in zip(samples, errors, strict=False)]
        # On the right: positions count from the row's beginning in language models that learn them, too.
        padded = {"padding_side": "right", "return_tensors": "pt"}
        batch = self.processor.tokenizer.pad({"input_ids": [ids for ids, _ in rows]}, **padded)
        labels = torch.full_like(batch["input_ids"], IGNORED)  # (B, T)
        for row, ((_, row_labels), error) in enumerate(zip(rows, errors, strict=False)):
            if error is None:
                labels[row, batch["attention_mask"][row].bool()] = torch.tensor(row_labels)
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": labels,
            **image_inputs,
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
            raise InputError(f"{name_of(sample)} has no answer, or an empty one, so there is nothing to learn.")
        ids, labels = encode(self.processor, sample["messages"])
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORED for label in labels):
            raise InputError(
                f"The answer of {name_of(sample)} is cut off whole: its prompt fills all of the {self.max_length} "
                "tokens. Raise --max_length, or leave the sample out."
            )
        return ids, labels

    def open_images(self, images: list[list]) -> tuple[dict[str, torch.Tensor], list[str | None]]:
        """The model's inputs for the images of each row, by name, those of a black image where one of them cannot be
        read; and what is wrong with the images of each row."""
        image_processor = self.processor.image_processor
        opened, error = tried(partial(image_processor, images, return_tensors="pt"))
        if error is None:
            return dict(opened), [None] * len(images)
        # One by one, then: each beside a row without images if there is any, so that all have grids or none has.
        beside = [] if all(images) else [[]]
        placeholder = image_processor([[black()], *beside], return_tensors="pt")
        rows, errors = [], []
        for own in images:
            opened, error = None, None
            if own:
                opened, error = tried(partial(image_processor, [own, *beside], return_tensors="pt"))
            values = {name: tensor[0] for name, tensor in (opened or placeholder).items()}
            rows.append(values if own else {name: tensor[:0] for name, tensor in values.items()})
            errors.append(error)
        return pad_rows(rows), errors


def black() -> Image.Image:
    return Image.new("RGB", (8, 8))


def name_of(sample: dict) -> str:
    source = sample.get("source")
    return f"Sample {sample['id']!r}" + (f" of {source}" if source else "")
