"""Commands of nano that others run one after the other, each in a process of its own."""

import subprocess
import sys

from ...common.command import InputError

NANO = __package__.rpartition(".")[0]


def begin(command: str, **options) -> subprocess.Popen:
    """Start a command of nano; a list gives an option several values."""
    arguments = [sys.executable, "-m", f"{NANO}.{command}"]
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *map(str, values)]
    return subprocess.Popen(arguments)


def finish(process: subprocess.Popen):
    """Wait for a command's end.

    Raises:
        InputError: if it failed.
    """
    if process.wait():
        raise InputError(f"{process.args[2]} failed; its error stands above.")
