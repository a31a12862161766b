"""Answers that must be the right one."""

import pytest

from pheye.evaluation.metrics.matching import exact_match, option_accuracy

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("answer", "score"), [("yes", 1), ("Yes.", 1), (" YES ", 1), ("yes, it is", 0), ("", 0), ("no", 0), ("yes..", 0)]
)
def test_exact_match(answer, score):
    assert exact_match(answer, ["Yes"]) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        *[(answer, 1) for answer in ("B", "b", "B.", "(B)", "B. a dog", "B: whatever", "a dog", "A dog.", " B\n")],
        *[(answer, 0) for answer in ("A", "A. a dog", "dog", "", "Because", "BC", "a", "(C) B")],
    ],
)
def test_letter_or_text_of_the_right_option(answer, score):
    assert option_accuracy(answer, ["B", "a dog"]) == score


@pytest.mark.parametrize("text", ["p.m.", "u.s.", "(a)", "C"])
def test_the_text_of_the_right_option_may_look_like_a_letter(text):
    assert option_accuracy(text, ["B", text]) == 1
    assert option_accuracy("A", ["B", text]) == 0
