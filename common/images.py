"""One image among many: where its name may lead, and an error of its own in place of the end of a run."""

import os
import re
from collections.abc import Callable
from typing import TypeVar

from .. import image_opening_pheye
from .command import InputError

T = TypeVar("T")


def inside(folder: str | os.PathLike, name: str | os.PathLike) -> str:
    """The path of an image in `folder` that a data file names.

    Raises:
        InputError: if the name leads out of the folder, by a link too.
    """
    try:
        return image_opening_pheye.inside(folder, name)
    except ValueError as error:
        raise InputError(f"{error} Give a folder that holds all images, or leave this one out.") from error


def tried(read: Callable[[], T]) -> tuple[T | None, str | None]:
    """What `read` gives of one image, and None; or None, and what is wrong with the image.

    Whatever goes wrong is the image's, for a run must not end at a picture that a stranger has made; but for an
    InputError, which says that the command has to be another.
    """
    try:
        return read(), None
    except InputError:
        raise
    except Exception as error:
        # Without addresses, which would make the row of a broken image another one in each run.
        text = re.sub(r"<(_io\.BytesIO) object at \w+>", "the data", str(error))
        return None, text or type(error).__name__
