"""The router of a model with budgets, trained by itself on labels: what it reads is taken from the model once."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

from ..answering.engine import encoded, generate
from ..answering.rows import Request
from ..common.command import InputError
from ..common.files import appear_whole
from ..visor_pheye import PheyeRouter
from .labels import check_budgets
from .questions import batches
from .vision_budgets import changed_config

ROUTER = "pheye.router."  # how the names of its weights begin
WEIGHTS = "model*.safetensors"  # as `save_pretrained` names them


# --- What it reads ---


@dataclass
class States:
    """states: (S, D), what the router is given for each prompt; pictures: by which the same picture is known again;
    errors: of the images of other prompts, by id."""

    states: torch.Tensor
    ids: list[str | int]
    pictures: list[str]
    errors: dict[str | int, str]


def router_states(model, processor, requests: Sequence[Request], batch_size: int, workers: int) -> States:
    """What the router of `model` is given for each prompt, as `generate` gives it."""
    seen, found = [], States(torch.empty(0), [], [], {})
    hook = model.model.router.register_forward_pre_hook(lambda router, args: seen.append(args[0].float().cpu()))
    try:
        with tqdm(total=len(requests), desc="prompts") as bar:
            for batch in batches(processor, requests, batch_size, workers):
                found.errors |= batch.errors
                if batch.requests:
                    one = {"max_new_tokens": 1, "num_beams": 1, "do_sample": False}
                    generate(model, processor, batch.conversations, encoded(model, batch.image_inputs), one)
                    found.ids += [request.id for request in batch.requests]
                    found.pictures += [picture_of(views) for views in batch.image_inputs["pixel_values"]]
                bar.update(len(batch.requests) + len(batch.errors))
    finally:
        hook.remove()
    if not found.ids:
        raise InputError(f"No image could be read; the first: {next(iter(found.errors.values()))}")
    found.states = torch.cat(seen)
    return found


def picture_of(views: torch.Tensor) -> str:
    """A digest of the first view (V, 3, height, width), by which a picture is known again."""
    return hashlib.sha256(views[0].contiguous().numpy().tobytes()).hexdigest()


def held_out(pictures: Sequence[str], share: float) -> torch.Tensor:
    """Which samples (S,) are of the pictures that are kept for the test: those with the first digests.

    Raises:
        InputError: if all pictures or none would be.
    """
    distinct = sorted({*pictures})  # digests: an order without meaning
    kept = {*distinct[: round(share * len(distinct))]}
    if not 0 < len(kept) < len(distinct):
        raise InputError(
            f"A share of {share} of {len(distinct)} pictures holds out {len(kept)}; training and test each need one "
            "at least. Give more pictures, or another --held_out."
        )
    return torch.tensor([picture in kept for picture in pictures])


# --- Training ---


@torch.enable_grad()
def train_router(
    router: PheyeRouter,
    states: torch.Tensor,
    labels: torch.Tensor,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
):
    """Cross-entropy of labels (S,) by states (S, D): AdamW, the rate falling by a cosine to zero."""
    optimizer = torch.optim.AdamW(router.parameters(), lr=learning_rate)
    steps = epochs * -(-len(labels) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=order).split(batch_size):
            loss = F.cross_entropy(router(states[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def report(router: PheyeRouter, states: torch.Tensor, rows: list[dict], budgets: Sequence) -> dict:
    """How the router chooses for states (S, D) whose rows hold labels: accuracy; `confusion`, rows by label, columns
    by choice; and `layers`, the mean number of self-attention layers, beside the mean score or loss: of the router's
    choice, of the label's, and of each budget for all."""
    chosen = router(states).argmax(dim=1).tolist()
    labels = [row["label"] for row in rows]
    confusion = [[0] * len(budgets) for _ in budgets]
    for label, choice in zip(labels, chosen, strict=True):
        confusion[label][choice] += 1
    measure = "scores" if "scores" in rows[0] else "losses"
    ways = {"router": chosen, "labels": labels}
    ways |= {f"budget {number}": [number] * len(rows) for number in range(len(budgets))}
    return {
        "samples": len(rows),
        "accuracy": sum(label == choice for label, choice in zip(labels, chosen, strict=True)) / len(rows),
        "confusion": confusion,
        "ways": {
            name: {
                "layers": sum(len(budgets[choice]) for choice in choices) / len(rows),
                measure: sum(row[measure][choice] for row, choice in zip(rows, choices, strict=True)) / len(rows),
            }
            for name, choices in ways.items()
        },
    }


def labels_by_id(rows: list[dict], budgets: Sequence) -> dict[str | int, dict]:
    """Rows that `make_labels` wrote and that have a label.

    Raises:
        InputError: if there are none, or they are of other budgets.
    """
    check_budgets(budgets)
    labelled = {row["id"]: row for row in rows if "label" in row and "id" in row}
    if not labelled:
        raise InputError("The file of labels holds none; `pheye budgets label` writes it.")
    for row_id, row in labelled.items():
        measured = row.get("scores") or row.get("losses") or ()
        if len(measured) != len(budgets):
            raise InputError(
                f"The label of {row_id!r} was chosen from {len(measured)} budgets, but the model has {len(budgets)}: "
                f"{list(budgets)}. Make the labels with this model."
            )
    return labelled


# --- Saving ---


def save_routed(folder: Path, model, processor, output: Path, force: bool = False):
    """Write what `folder` holds, with the router of `model`, to `output`. All other weights, and all else of the
    configuration, are copied as they are in the files, whatever `model` was loaded as.

    Raises:
        InputError: if there is something at `output`, unless it is a folder and `force` is set.
    """
    state = {}
    for file in sorted(folder.glob(WEIGHTS)):
        state |= load_file(file)
    state |= {name: weight.float().cpu() for name, weight in model.state_dict().items() if name.startswith(ROUTER)}
    with appear_whole(output, force) as written:
        model.save_pretrained(written, state_dict=state)
        (written / "config.json").write_bytes(changed_config(folder, router_size=model.config.router_size))
        processor.save_pretrained(written)
        if (folder / "README.md").is_file():
            shutil.copy(folder / "README.md", written)
