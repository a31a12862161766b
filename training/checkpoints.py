"""Checkpoints of a run: found by their step, whole or absent, and looked at before a run goes on from one."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

CHECKSUMS_FILE = "checksums.json"  # of the other files, written when a checkpoint is whole
OPTIMIZERS = ("optimizer*", "global_step*")  # the Trainer's file or folder, and DeepSpeed's
UNFINISHED = "unfinished"  # folder of an output, of what has no place there yet, or no longer


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(output: str | os.PathLike) -> list[Path]:
    """The checkpoints in an output folder by their steps; folders of other names are none."""
    found = []
    for path in Path(output).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(0|[1-9][0-9]*)", path.name)
        if step and path.is_dir():
            found.append(path)
    return sorted(found, key=step_of)


def last_checkpoint(output: str | os.PathLike) -> Path | None:
    """The checkpoint of most steps in an output folder."""
    return next(reversed(checkpoints(output)), None)


def whole_checkpoint(output: str | os.PathLike) -> tuple[Path | None, dict[str, str]]:
    """The last checkpoint that a run can go on from exactly, and what is wrong with those after it, by their names."""
    flaws = {}
    for path in reversed(checkpoints(output)):
        flaw = flaw_of(path)
        if flaw is None:
            return path, flaws
        flaws[path.name] = flaw
    return None, flaws


def flaw_of(checkpoint: Path) -> str | None:
    """What keeps a run from going on from `checkpoint` exactly, in words; None if nothing does."""
    try:
        recorded = dict(json.loads((checkpoint / CHECKSUMS_FILE).read_bytes()))
    except FileNotFoundError:
        return f"it has no {CHECKSUMS_FILE}"
    except (TypeError, ValueError):
        return f"its {CHECKSUMS_FILE} is not whole"
    for name, checksum in recorded.items():
        path = checkpoint / name
        if not path.is_file():
            return f"its {name} is missing"
        if checksum_of(path) != checksum:
            return f"its {name} is not as it was written"
    if not any(path for pattern in OPTIMIZERS for path in checkpoint.glob(pattern)):
        return "it holds no optimizer (--save_only_model)"
    return None


def checksum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(source: Path, target: Path):
    """Move a written checkpoint to its place in one step, with the checksums of its files, after all of it is on the
    disk."""
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    checksums = {path.relative_to(source).as_posix(): checksum_of(path) for path in files}
    (source / CHECKSUMS_FILE).write_text(json.dumps(checksums, indent=2))
    for path in (*files, source / CHECKSUMS_FILE):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)  # of an earlier run that went on from a checkpoint before it
    os.replace(source, target)


def rotate(output: str | os.PathLike, limit: int | None, best: str | None, step: int):
    """Remove the oldest checkpoints beyond `limit`, but neither the last one nor the `best`; each is there whole or
    not at all. Those behind `step`, where the run is, come first: it could not go on from them, and began before."""
    earlier = sorted(checkpoints(output), key=lambda path: (step_of(path) <= step, step_of(path)))[:-1]
    if limit is None or limit <= 0:
        return
    others = [path for path in earlier if best is None or path != Path(best)]
    room = max(0, limit - 1 - (len(earlier) - len(others)))
    aside = Path(output) / UNFINISHED
    for path in others[: len(others) - room]:
        clear(aside)
        os.replace(path, aside)
        shutil.rmtree(aside, ignore_errors=True)


def clear(path: Path):
    """Remove a folder, a file or a link at `path`, never what a link leads to."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
