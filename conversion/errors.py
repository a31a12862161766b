"""What goes wrong in reading and writing, of whatever kind, as one error that names the file and the remedy."""

import contextlib
from collections.abc import Iterator

from ..common.command import InputError

LONGEST = 400  # of what another's error, or a name in a file, adds to ours


def one_line(text: object) -> str:
    """`text` without what would break a line or colour a terminal, and not longer than `LONGEST`."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(text))
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


@contextlib.contextmanager
def refusing(words: str, remedy: str) -> Iterator[None]:
    """Turn what the block raises into an `InputError`: `words`, what the error says, and the `remedy`.

    transformers, tokenizers and torch raise errors of any type on a damaged file or a full disk.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        says = one_line(error).rstrip(".") or type(error).__name__
        raise InputError(f"{words}: {says}. {remedy}") from error
