"""What commands share: errors in the user's words, the exit status, options, processes and their device."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import PartialState


PATIENCE = timedelta(days=1)  # of a process for slower ones; the usual minutes would end a run with unequal machines


class InputError(ValueError):
    """Something that the user can mend; the message says how."""


def exit_status(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run a command; errors that the user can mend become a line on standard error and the status 1."""
    try:
        run(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"error: {error}\nGive the same command with a smaller --batch_size to go on.", file=sys.stderr)
        return 1
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def require(package: str):
    """A package of the extra `eval`, imported.

    Raises:
        InputError: if it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise InputError(f'This needs {package}: run pip install "pheye[eval]".') from error


def process_state(cpu: bool = False) -> "PartialState":
    """Which of how many processes this is, and its device; the first call in a process decides.

    Raises:
        InputError: if accelerate is not installed, or does not see the processes that were launched.
    """
    accelerate = require("accelerate")
    # Without an accelerator, accelerate takes each of several processes for the only one unless it is told.
    cpu = cpu or accelerate.utils.parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = accelerate.PartialState(cpu=cpu, timeout=PATIENCE)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != launched:
        raise InputError(f"{launched} processes were launched, but accelerate sees {state.num_processes}; check both.")
    return state


def default_device() -> str:
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def at_least(minimum: int):
    """A parser of integers."""

    def parse(text: str) -> int:
        if not text.strip().lstrip("-").isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least {minimum}")
        return int(text)

    return parse
