"""Files and folders that appear whole or not at all, and runs that go on with the same settings or are refused."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from .command import InputError
from .json_lines import parse_json

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

RUN_FILE = "run.json"  # in the folder of a run
LOCK_FILE = "run.lock"  # beside it, while a process writes there
LONGEST_VALUE = 300  # characters of a setting in a message
READ = 2**16  # bytes at each place of a file that its fingerprint looks at,
PLACES = 256  # of which a large file has so many: 16 MB, a moment


def explained(error: OSError, path: Path) -> OSError:
    """`error` of writing `path`, with what to do."""
    remedy = "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Mend this"
    return OSError(
        f"{path} could not be written: {error.strerror or error}. {remedy} and run the same command again; what was "
        "written before is whole and kept."
    )


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


@contextlib.contextmanager
def appear_whole(output: Path, force: bool) -> Iterator[Path]:
    """A folder beside `output` that gets its name when the block is done, and is removed when the block fails.

    A file beside both is locked all the while. If this run is killed, that file tells the next one what to put right:
    a folder that it does not name is left alone, whatever it is called.

    Raises:
        InputError: if `output` exists, unless it is a folder and `force` is set; if another process writes it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with _claim(output) as journal:
        _refuse_existing(output, force)
        token = uuid.uuid4().hex
        journal.write(f"pheye {token}\n".encode())
        journal.flush()
        folder, replaced = _names(output, token)
        try:
            folder.mkdir()
            yield folder
            _refuse_existing(output, force)  # once more, since the block may have taken long
            if output.exists():
                os.rename(output, replaced)
            os.rename(folder, output)
        finally:
            _put_right(output, token)


@contextlib.contextmanager
def _claim(output: Path) -> Iterator[BinaryIO]:
    """An empty file beside `output`, locked until the block ends; what a killed run left is put right first."""
    path = output.with_name(f".{output.name}.unfinished")
    while True:
        file = path.open("a+b")
        lock(file, output)
        with contextlib.suppress(FileNotFoundError):  # where the process that held it has just removed it
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    with file:
        file.seek(0)
        if content := file.read(1000):
            if not (match := re.fullmatch(rb"pheye ([0-9a-f]{32})\n", content)):
                raise InputError(f"{path} is in the way, and is none of this program's files; rename it.")
            _put_right(output, match[1].decode())
            file.truncate(0)
        try:
            yield file
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _names(output: Path, token: str) -> tuple[Path, Path]:
    """Where what becomes `output` is written, and where what it replaces is until then."""
    return output.with_name(f".{output.name}.unfinished-{token}"), output.with_name(f".{output.name}.replaced-{token}")


def _put_right(output: Path, token: str):
    """Remove what a run has left beside `output`; what it was about to replace gets its name back."""
    folder, replaced = _names(output, token)
    if not folder.exists():  # it is `output` by now, unless nothing was begun
        shutil.rmtree(replaced, ignore_errors=True)
    elif replaced.exists() and not os.path.lexists(output):
        os.rename(replaced, output)
    shutil.rmtree(folder, ignore_errors=True)


def _refuse_existing(output: Path, force: bool):
    if os.path.lexists(output) and not (force and output.is_dir()):
        remedy = (
            "give --force to replace it" if output.is_dir() else "it is no folder, so even --force leaves it alone"
        )
        raise InputError(f"{output} exists already; choose another output, or {remedy}.")


def lock(file: BinaryIO, path: Path):
    """Hold `file`, which is open at `path`, until the process ends, however it does; its children do not hold it.

    Raises:
        InputError: if another process holds it.
    """
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise InputError(f"Another process is still writing {path}; wait until it has ended, or end it.") from error
    except OSError:  # a file system without locks
        pass


def fingerprint(*paths: Path) -> str:
    """Changes if one of the files does, in name, size or content; of a large file, content is looked at in places."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(os.fsencode(path.name) + f" {size} ".encode())
        with path.open("rb") as file:
            for place in range(0, size, max(READ, size // PLACES)):
                file.seek(place)
                digest.update(file.read(READ))
    return digest.hexdigest()


def differences(old: dict, new: dict) -> str:
    """What differs between two sets of settings, in words; empty if nothing does."""
    new = json.loads(json.dumps(new, default=str))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {_short(old.get(name))} and is now {_short(new.get(name))}" for name in names)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def read_record(path: Path, settings: dict, output: Path) -> dict | None:
    """What `write_record` wrote to `path` when the run into `output` began; None if there is nothing.

    Raises:
        InputError: if that run had other settings.
    """
    if not path.exists():
        return None
    beside = "" if path.parent == output else " and what stands beside it under its name"
    remedy = f"Use the same settings, choose another output, or remove {output}{beside}."
    try:
        record = parse_json(path.read_bytes())
        recorded = dict(record["settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a record of settings. {remedy}") from error
    if changed := differences(recorded, settings):
        raise InputError(f"{output} was begun with other settings: {changed}. {remedy}")
    return record


def read_folder_record(output: Path, settings: dict) -> dict | None:
    """What `write_record` wrote to `RUN_FILE` in the folder `output` when a run began there; None if the folder is
    empty, or missing.

    Raises:
        InputError: if the folder holds something else, or a run with other settings.
    """
    record = read_record(output / RUN_FILE, settings, output)
    if record is None and output.is_dir() and any(path.name != LOCK_FILE for path in output.iterdir()):
        raise InputError(f"{output} is not empty and holds no run of this command; choose another --output.")
    return record


def write_record(path: Path, settings: dict, **others):
    """Record what a run depends on, and beside the settings other facts that it may go on without."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"settings": settings, **others}, indent=2, default=str)
    write_atomically(path, [text.encode() + b"\n"])
