"""Training on kept features: what `nano.replay` and the short experiments beside it share."""

import itertools
import json
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import torch
from torch import nn

from ... import PheyeForConditionalGeneration, PheyeProcessor
from ...answering.engine import counts_of, generate
from ...answering.rows import Request, row
from ...common.command import InputError, at_least, default_device
from ...common.files import fingerprint, read_record, write_atomically, write_record
from ...common.json_lines import read_rows
from ...training.collator import IGNORED
from ...training.trained import choose_trained
from ...training.vision_budgets import drawn_budget
from .checkpoints import autocast, rate_share
from .crops import with_crops
from .features import BATCH, FeatureStore, as_image, kept_image, schedule

# Samples of one call on a processor. torch's own attention is slow there in training, and two plain products are not
# while the weights of a call stay in its cache.
PART = 4
TOKENS = 16  # of an answer, at most


def opened(
    folder: Path, device: str, seed: int = 0, tiles_per_side: int | None = None, **fields
) -> PheyeForConditionalGeneration:
    """The model in `folder`, of whose trained parts all but LoRA train. `fields` replace some of its configuration,
    and `tiles_per_side` the number of its crops; `seed` is of the parts that are new with them."""
    torch.manual_seed(seed)
    attention = "eager" if device == "cpu" else "sdpa"
    options = {"dtype": torch.float32, "attn_implementation": attention, **fields}
    model = PheyeForConditionalGeneration.from_pretrained(folder, **options).eval()
    if tiles_per_side is not None:
        model = with_crops(model, tiles_per_side, with_lora=False)
    model.to(device)
    has_lora = model.config.global_lora_rank or model.config.local_lora_rank
    choose_trained(model, freeze=["lora"] if has_lora else None)
    return model


def learn(
    model: PheyeForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    store: FeatureStore,
    indices: list[int],
    **options,
) -> float:
    """A step on the samples of these numbers; its loss. `options` go to the model."""
    parts = store.batches(indices, PART if model.device.type == "cpu" else len(indices))
    learnt = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in parts)  # tokens of the answers
    losses = []
    for batch in parts:
        batch = {name: values.to(model.device) for name, values in batch.items()}
        with autocast(model.device.type):
            image = as_image(model, batch.pop("features"), batch.pop("image_grids", None))
            losses.append(model(**image, **batch, num_items_in_batch=learnt, **options).loss)
        losses[-1].backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return sum(loss.item() for loss in losses)


# --- Experiments ---


def add_options(parser: ArgumentParser, steps: int):
    """The options of an experiment that takes some steps from a Pheye-nano."""
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="a Pheye-nano")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--steps", type=at_least(1), default=steps, help="(default: %(default)s)")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate (default: %(default)s)")
    parser.add_argument("--seeds", type=at_least(1), default=2, help="(default: %(default)s)")
    parser.add_argument("--device", default=default_device(), help="(default: %(default)s)")


def clock_of(device: str) -> Callable[[], float]:
    """The seconds of the processor on a CPU; of the world elsewhere."""
    return time.process_time if device == "cpu" else time.perf_counter


def weights_of(folder: Path) -> str:
    """What tells the weights of a model, and so the features that are kept of it, from those of another.

    Raises:
        InputError: if there are none.
    """
    file = folder / "model.safetensors"
    if not file.is_file():
        raise InputError(f"{folder} holds no model.safetensors; give the folder of a Pheye-nano.")
    return fingerprint(file)


def train(model: PheyeForConditionalGeneration, store: FeatureStore, steps: int, rate: float, seed: int) -> dict:
    """Train what requires gradients; of a model with budgets, each step trains one.

    Returns: the mean loss of the last tenth of the steps, and the median seconds of a step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    budgets = len(model.config.self_attention_budgets)
    losses, seconds = [], []
    for step, (number, is_new, indices) in enumerate(itertools.islice(schedule(None, seed), steps)):
        if is_new:
            store.encode(number, model)
        began = time.perf_counter()
        optimizer.param_groups[0]["lr"] = rate * rate_share(step, step / steps)
        budget = {"vision_budget": drawn_budget(seed, step, budgets)} if budgets else {}
        losses.append(learn(model, optimizer, store, indices, **budget))
        seconds.append(time.perf_counter() - began)
    last = losses[-max(1, steps // 10) :]
    return {"loss": round(statistics.mean(last), 4), "seconds_per_step": round(statistics.median(seconds), 3)}


@torch.no_grad()
def ask(
    model: PheyeForConditionalGeneration, processor: PheyeProcessor, requests: Sequence[Request], folder: Path
) -> list[dict]:
    """A row for each request; those of one `subject` have the same images. Features of these are kept in `folder`, for
    other models with the same eyes."""
    folder.mkdir(exist_ok=True)
    subjects: dict[Hashable, list[Request]] = {}
    for request in requests:
        subjects.setdefault(request.subject, []).append(request)
    rows, groups = [], list(subjects.values())
    for first in range(0, len(groups), BATCH):
        together = groups[first : first + BATCH]
        file = folder / f"{first:06d}.safetensors"
        image = kept_image(file, model, processor, lambda together=together: [about[0].images() for about in together])
        places = [place for place, about in enumerate(together) for _ in about]
        image = {name: values[places] for name, values in image.items()}
        asked = [request for about in together for request in about]
        counts = counts_of(image, len(asked))
        conversations = [request.messages(count) for request, count in zip(asked, counts, strict=True)]
        found = generate(model, processor, conversations, image, {"max_new_tokens": TOKENS, "do_sample": False})
        rows += [row(request, "answer", text, None) for request, (text, _) in zip(asked, found, strict=True)]
    return sorted(rows, key=lambda row: row["id"])


def once(folder: Path, settings: dict, run: Callable[[], tuple[dict, list[dict]]]) -> dict:
    """What `run` found, and its answers as `rows`; both also in files in `folder`, from which they are read the next
    time.

    Raises:
        InputError: if the files are of other settings.
    """
    path, answers = folder / "result.json", folder / "answers.jsonl"
    if read_record(path, settings, folder) is None:
        found, rows = run()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(answers, [json.dumps(row).encode() + b"\n" for row in rows])
        write_record(path, settings, **found)
    return {**read_record(path, settings, folder), "rows": read_rows(answers)}
