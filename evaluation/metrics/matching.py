"""Answers that must be the right one."""

import re
from collections.abc import Sequence


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if `answer` is one of `references`, but for capitals, the amount of white space, and a full stop right behind
    the last word."""

    def plain(text: str) -> str:
        return " ".join(text.lower().split()).removesuffix(".")

    return float(plain(answer) in map(plain, references))


def option_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if `answer` begins with the letter of the right option, or is its text; `references` are these two."""
    letter, text = references
    if exact_match(answer, [text]):  # also one that looks like a letter, such as "p.m."
        return 1.0
    chosen = re.match(r"\(?([A-Za-z])(?:[).:]|\s*$)", answer.strip())
    return float(chosen is not None and chosen[1].upper() == letter)
