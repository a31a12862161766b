"""Questions with their right answers, each asked at several budgets while its images are encoded once."""

import hashlib
import json
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from ..answering.engine import ImageInputs, collate, counts_of
from ..answering.rows import Request
from ..common.command import InputError
from ..common.tables import IMAGE_SOURCES
from ..evaluation.formats import found_images
from ..evaluation.samples import called
from ..evaluation.sources import read_samples
from ..evaluation.tasks import OWN, TASKS, Task
from .collator import IGNORED, encode

COLUMNS = ("image", "question", "choices", "answers", "id")

# --- Reading ---


def add_data_options(parser: ArgumentParser):
    """The options by which a command is told what to ask: those of `pheye evaluate`."""
    parser.add_argument(
        "--data", required=True, metavar="FILE_OR_DATASET", help="a file of training data, or as for pheye evaluate"
    )
    parser.add_argument("--task", default=OWN, choices=TASKS, help="(default: own, which reads training data)")
    parser.add_argument("--prompt", help="with {question} where the question belongs (default: the task's)")
    parser.add_argument("--split", help="(default: the file's only one, or the task's)")
    parser.add_argument("--images", metavar="FOLDER", help="(default: the folder of the file)")
    parser.add_argument("--image_sources", choices=IMAGE_SOURCES, help="where names in the data may lead")
    parser.add_argument("--annotations", metavar="FILE", help="answers to the questions of VQAv2 or OK-VQA")
    for kind in COLUMNS:
        parser.add_argument(f"--{kind}_column", help="of a data set")


def read_questions(
    data: str, task: str, *, prompt: str | None, images: str | None, **options: str | None
) -> tuple[Task, list[Request]]:
    """The task, and its samples that have an image, with `references` among their fields.

    Raises:
        InputError: if there are none, or their answers are not public.
    """
    found = TASKS[task] if prompt is None else replace(TASKS[task], prompt=prompt)
    samples, _ = read_samples(found, data, images=images, **options)
    if samples[0].names:
        samples = found_images(samples, Path(images or Path(data).parent))
    if any(sample.references is None for sample in samples):
        raise InputError(f"{data} has no right answers; give a split that has them.")
    requests = []
    for sample in samples:
        if sample.image != []:  # a row of text alone reads no image, however closely
            fields = {"question": sample.question, "references": list(sample.references)}
            asked = found.prompt_for(sample.question, sample.options)
            requests.append(Request(sample.id, sample.image, asked, fields, sample.system))
    if not requests:
        raise InputError(f"None of the {len(samples)} samples of {data} has an image.")
    return found, requests


def digest_of(requests: Sequence[Request]) -> str:
    """Changes if ids, prompts, right answers or names of images do."""
    parts = [
        [request.id, request.prompt, request.system, request.fields["references"], called(request.image)]
        for request in requests
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def right_answer(request: Request) -> str:
    """The most frequent of the right answers, of equals the first."""
    return Counter(request.fields["references"]).most_common(1)[0][0]


# --- Asking ---


@dataclass
class Asked:
    """A batch: the questions whose images could be read, their conversations, the images' tensors by name; and what is
    wrong with the images of the others, by id."""

    requests: list[Request]
    conversations: list[list[dict]]
    image_inputs: dict[str, torch.Tensor]
    errors: dict[str | int, str]


def batches(processor, requests: Sequence[Request], batch_size: int, workers: int) -> Iterator[Asked]:
    """All requests in order."""
    loader = torch.utils.data.DataLoader(
        ImageInputs(processor, requests),
        batch_size,
        num_workers=workers,
        collate_fn=partial(collate, tiles_per_side=processor.image_processor.tiles_per_side),
    )
    start = 0
    for errors, image_inputs in loader:
        batch = list(zip(requests[start : start + len(errors)], errors, strict=True))
        start += len(errors)
        whole = [request for request, error in batch if error is None]
        counts = counts_of(image_inputs, len(whole))
        conversations = [request.messages(count) for request, count in zip(whole, counts, strict=True)]
        broken = {request.id: error for request, error in batch if error is not None}
        yield Asked(whole, conversations, image_inputs, broken)


def answered(processor, conversations: list[list[dict]], answers: list[str]) -> dict[str, torch.Tensor]:
    """What the model reads to give the loss of `answers`: ids, mask and labels (B, T), as in training."""
    rows = [
        encode(processor, [*conversation, {"role": "assistant", "content": answer}])
        for conversation, answer in zip(conversations, answers, strict=True)
    ]
    padded = {"padding_side": "right", "return_tensors": "pt"}
    batch = processor.tokenizer.pad({"input_ids": [ids for ids, _ in rows]}, **padded)
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for row, (_, row_labels) in enumerate(rows):
        labels[row, : len(row_labels)] = torch.tensor(row_labels)
    return {**{name: batch[name] for name in ("input_ids", "attention_mask")}, "labels": labels}


@torch.no_grad()
def losses_of(model, text: dict[str, torch.Tensor], image: dict[str, torch.Tensor], budget: int) -> torch.Tensor:
    """The loss of each row's answer (B,), summed over its tokens.

    Raises:
        InputError: if a text is too long. FloatingPointError: if a loss is NaN or infinite.

    Args:
        text: from `answered`.
        image: from `encoded`.
    """
    ids, mask, labels = (text[name].to(model.device) for name in ("input_ids", "attention_mask", "labels"))
    try:
        logits = model(input_ids=ids, attention_mask=mask, **image, vision_budget=budget).logits
    except ValueError as error:  # a text that is too long
        raise InputError(str(error)) from error
    losses = F.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )
    losses = losses.sum(dim=1).cpu()
    if not losses.isfinite().all():
        raise FloatingPointError(
            f"The loss of an answer is {losses[~losses.isfinite()][0].item()} at budget {budget}. Mend the model, or "
            "give --dtype float32."
        )
    return losses


def tokens_of(text: dict[str, torch.Tensor]) -> torch.Tensor:
    """How many tokens of each row are answer (B,)."""
    return (text["labels"][:, 1:] != IGNORED).sum(dim=1)
