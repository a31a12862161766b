"""Errors of any kind become one line that names the file and the remedy."""

import pytest

from pheye.common.command import InputError
from pheye.conversion.errors import LONGEST, one_line, refusing

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (Exception("Model missing.\n at line 1"), "Model missing. at line 1"),
        (IndexError(), "IndexError"),
        (RecursionError(), "RecursionError"),
        (ValueError("\x1b[31mred\x00"), "[31mred"),
    ],
)
def test_any_error_is_refused_in_one_line_with_the_remedy(error, says):
    with pytest.raises(InputError) as caught, refusing("x.pt is damaged", "Download it again."):
        raise error
    assert str(caught.value) == f"x.pt is damaged: {says}. Download it again."
    assert caught.value.__cause__ is error


def test_an_error_in_the_users_words_stays_and_an_interruption_is_none():
    with pytest.raises(InputError, match=r"^as it is$"), refusing("x", "y"):
        raise InputError("as it is")
    with pytest.raises(KeyboardInterrupt), refusing("x", "y"):
        raise KeyboardInterrupt


def test_long_texts_are_cut():
    assert one_line("x" * 10**6) == "x" * LONGEST + "..."
