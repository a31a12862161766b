"""Files that appear whole or not at all."""

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path


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
    """What differs between two records, in words; empty if nothing does."""
    new = json.loads(json.dumps(new, default=str))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)!r} and is now {new.get(name)!r}" for name in names)
