"""What the commands here share: precision, rate, a run's folder, a checkpoint that is whole or absent, and a log."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from ...common.files import RUN_FILE, read_folder_record, write_record
from ...common.machine import versions

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"  # in the folder of a run
WARMUP = 20  # steps


def autocast(device: str) -> torch.autocast:
    """bfloat16, where the device computes in it; a processor that only imitates it takes 20 times as long."""
    found = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch do not tell
    is_fast = device != "cpu" or found.get("avx512_bf16") or found.get("amx_bf16")
    return torch.autocast(device, torch.bfloat16, enabled=bool(is_fast))


def rate_share(step: int, passed: float) -> float:
    """Of the learning rate, at a step, when this share of the training is over."""
    return min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * min(1.0, passed))))


def claim(output: Path, **settings):
    """Take `output` for a run with `settings`, or go on with the run that began there with the same.

    Raises:
        InputError: if the folder holds something else, or a run with other settings.
    """
    if read_folder_record(output, settings) is None:
        write_record(output / RUN_FILE, settings, versions=versions())


def save_checkpoint(output: Path, model: nn.Module, optimizers: Sequence[Optimizer], step: int):
    """Write what `load_checkpoint` needs to go on after `step` steps."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    temporary = output / f"{CHECKPOINT}.new"
    torch.save({"model": model.state_dict(), "optimizers": states, "step": step}, temporary)
    os.replace(temporary, output / CHECKPOINT)


def load_checkpoint(output: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> int:
    """Load the last checkpoint in `output`, if there is one; the number of steps done."""
    if not (output / CHECKPOINT).exists():
        return 0
    # A run that began on a GPU may go on without one.
    state = torch.load(output / CHECKPOINT, weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]


def log(output: Path, entry: dict):
    """Print `entry` and append it to the log; a run that goes on repeats the entries since its checkpoint."""
    with (output / LOG).open("a") as file:
        file.write(json.dumps(entry) + "\n")
    print(entry, flush=True)
