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


DTYPES = ("auto", "float32", "bfloat16", "float16")
PATIENCE = timedelta(days=1)  # of a process for slower ones; the usual minutes would end a run with unequal machines


class InputError(ValueError):
    """Something that the user can mend; the message says how."""


class Interrupted(KeyboardInterrupt):
    """The user has stopped the command; the message says what is kept and how to go on."""


class Store(argparse.Action):
    """What argparse does with an option; but a list that is given twice is refused, and does not replace the first."""

    def __call__(self, parser, namespace, values, option_string=None):
        if isinstance(values, list) and getattr(namespace, self.dest, self.default) is not self.default:
            parser.error(f"argument {option_string}: given twice; give its values one behind another")
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """Options are written with underscores, as transformers' are; with hyphens they are understood too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in (None, "store"):
            self.register("action", name, Store)

    def parse_known_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        end = args.index("--") if "--" in args else len(args)  # behind it no argument is an option
        args = [*map(_with_underscores, args[:end]), *args[end:]]
        return super().parse_known_args(args, namespace)


def _with_underscores(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else arg


def add_model_options(parser: argparse.ArgumentParser):
    """The options by which every command that answers is told what model to load, and where."""
    parser.add_argument("--model", required=True, metavar="FOLDER_OR_ID")
    add_loading_options(parser)


def add_budget_option(parser: argparse.ArgumentParser):
    """The option of commands that answer by which a model with budgets is told how closely to read images."""
    parser.add_argument(
        "--vision_budget",
        type=at_least(0),
        help="how closely to read images, where the model has budgets (default: its router's choice, or the largest)",
    )


def add_loading_options(parser: argparse.ArgumentParser):
    """Those beside the model itself."""
    parser.add_argument("--revision", help="branch, tag or commit of the model's repository")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="(default: as the model was saved)")
    parser.add_argument("--device", help="such as cpu or cuda (default: an accelerator if there is one)")


def at_least(minimum: int) -> Callable[[str], int]:
    """A parser of integers."""

    def parse(text: str) -> int:
        if not text.strip().lstrip("-").isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least {minimum}")
        return int(text)

    return parse


def exit_status(run: Callable[..., object], **options) -> int:
    """Run a command with its options; what the user can mend becomes a line on standard error and the status 1."""
    try:
        run(**options)
    except (InputError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"\ninterrupted. {error}".rstrip(), file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        remedy = "\nGive the same command with a smaller --batch_size to go on." if "batch_size" in options else ""
        print(f"error: {error}{remedy}", file=sys.stderr)
        return 1
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def require(package: str, extra: str = "eval"):
    """A package of one of the extras, imported.

    Raises:
        InputError: if it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise InputError(f'This needs {package}: run pip install ".[{extra}]" in a clone of Pheye.') from error


def process_state(device: str | None = None) -> "PartialState":
    """Which of how many processes this is, and its device; the first call in a process decides.

    Args:
        device: what the user asked for, if anything.

    Raises:
        InputError: if accelerate is not installed, or does not see the processes that were launched, or if `device`
            is a single one for several processes.
    """
    accelerate = require("accelerate")
    # Without an accelerator, accelerate takes each of several processes for the only one unless it is told.
    has_none = accelerate.utils.parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = accelerate.PartialState(cpu=device == "cpu" or has_none, timeout=PATIENCE)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != launched:
        raise InputError(f"{launched} processes were launched, but accelerate sees {state.num_processes}; check both.")
    if device and ":" in device and launched > 1:
        raise InputError(f"--device {device} would put all processes on one device; leave it out.")
    return state


def default_device() -> str:
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
