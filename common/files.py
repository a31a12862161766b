"""Files that appear whole or not at all, and runs that go on with the same settings or are refused."""

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path

from .command import InputError


def explained(error: OSError, path: Path) -> OSError:
    """`error` of writing `path`, with what to do."""
    remedy = "Mend this and run the same command again; the rows written so far are whole and kept."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "Free some space and run the same command again; the rows written so far are whole and kept."
    return OSError(f"{path} could not be written: {error.strerror or error}. {remedy}")


def write_atomically(path: Path, chunks: Iterable[bytes]):
    """`path` with this content, or as it was before."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise explained(error, path) from error


def differences(old: dict, new: dict) -> str:
    """What differs between two sets of settings, in words; empty if nothing does."""
    new = json.loads(json.dumps(new, default=str))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)!r} and is now {new.get(name)!r}" for name in names)


def read_record(path: Path, settings: dict, output: Path) -> dict | None:
    """What `write_record` wrote to `path` when the run into `output` began; None if there is nothing.

    Raises:
        InputError: if that run had other settings.
    """
    if not path.exists():
        return None
    remedy = (
        f"Use the same settings, choose another output, or remove {output} and what stands beside it under its name."
    )
    try:
        record = json.loads(path.read_bytes())
        recorded = record["settings"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a record of settings. {remedy}") from error
    if changed := differences(recorded, settings):
        raise InputError(f"{output} was begun with other settings: {changed}. {remedy}")
    return record


def write_record(path: Path, settings: dict, **others):
    """Record what a run depends on, and beside the settings other facts that it may go on without."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"settings": settings, **others}, indent=2, default=str)
    write_atomically(path, [text.encode() + b"\n"])
