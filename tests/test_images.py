"""One image among many: names from data files stay in their folder, and whatever is wrong with an image is its own."""

import io
import struct

import pytest
import torch
from PIL import Image

from pheye.common.command import InputError
from pheye.common.images import inside, tried

pytestmark = pytest.mark.once


def test_names_stay_in_their_folder(tmp_path):
    assert inside(tmp_path, "a/b.png") == f"{tmp_path}/a/b.png"
    for name in ("../a.png", "/etc/passwd", "a/../../b.png"):
        with pytest.raises(InputError, match=r"leads out of the folder.*Give a folder that holds all images"):
            inside(tmp_path, name)


@pytest.mark.parametrize(
    "error",
    [SyntaxError("odd"), struct.error("odd"), MemoryError("odd"), torch.OutOfMemoryError("odd"), KeyError("odd")],
    ids=lambda error: type(error).__name__,
)
def test_whatever_goes_wrong_is_the_images(error):
    def read():
        raise error

    found, problem = tried(read)
    assert found is None and "odd" in problem


def test_what_goes_right_has_no_error():
    assert tried(lambda: 5) == (5, None)


def test_an_error_without_words_has_its_type():
    def read():
        raise AssertionError

    assert tried(read) == (None, "AssertionError")


def test_errors_are_the_same_in_each_run():
    first, second = (tried(lambda: Image.open(io.BytesIO(b"no image")))[1] for _ in range(2))
    assert first == second == "cannot identify image file the data"


@pytest.mark.parametrize("error", [InputError("another command"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_what_is_wrong_with_the_command_ends_it(error):
    def read():
        raise error

    with pytest.raises(type(error)):
        tried(read)
