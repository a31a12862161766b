"""kill -9 at random moments: two for each test of `make slow`, twenty by `make kills`."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = int(os.environ.get("KILLS", 2))
DRAW = random.Random(5)


def start(command: list, log: Path, **kwargs) -> subprocess.Popen:
    """`command` of this Python, in a group of its own; what it prints is added to `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=file, stderr=file, start_new_session=True, **kwargs
        )


def seconds_of(command: list, log: Path, **kwargs) -> float:
    """How long `command` takes when nothing disturbs it."""
    began = time.perf_counter()
    assert start(command, log, **kwargs).wait() == 0, log.read_text()
    return time.perf_counter() - began


def kill_after(seconds: float, command: list, log: Path, **kwargs):
    """Start `command`, and kill it and its children when it has run so long."""
    process = start(command, log, **kwargs)
    time.sleep(seconds)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def moments(whole: float) -> list[float]:
    """Seconds after which to kill what takes `whole`: in turn anywhere, and in the part in which files are written."""
    return [DRAW.uniform(0.5 if number % 2 else 0, 1.02) * whole for number in range(ROUNDS)]


def digests(folder: Path) -> dict[str, str]:
    """A hash of each file of a folder, by its name; empty if there is no folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
