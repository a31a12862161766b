import re

import pytest

from pheye.evaluation.metrics.vqa import normalize_words, strip_punctuation, vqa_accuracy

pytestmark = pytest.mark.once


def test_a_third_for_each_matching_answer_averaged_over_leaving_one_out():
    # Left out is one that matches (n times) or one that does not (10 - n times).
    expected = {0: 0, 1: 0.3, 2: 0.6, 3: 0.9, 4: 1, 9: 1}
    for matches, accuracy in expected.items():
        references = ["yes"] * matches + [f"other {i}" for i in range(10 - matches)]
        assert vqa_accuracy("yes", references) == pytest.approx(accuracy)


def test_the_same_answer_from_everybody_is_compared_as_it_stands():
    assert vqa_accuracy("yes", ["yes"] * 10) == 1
    assert vqa_accuracy("Yes.", ["yes"] * 10) == 0
    assert vqa_accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1
    assert vqa_accuracy("two", ["2"] * 10) == 0
    assert vqa_accuracy("The Cat!", ["the cat"] * 5 + ["a cat"] * 5) == 1


def test_white_space_goes_first_from_answer_and_references():
    assert vqa_accuracy("\tyes\n", ["yes "] * 5 + ["\nyes"] * 5) == 1
    assert vqa_accuracy("a\nb", ["a b"] * 10) == 1
    assert vqa_accuracy("a  b", ["a b"] * 10) == 0


# Worked out by hand from the official code and agreed with by running it.
@pytest.mark.parametrize(
    "text, expected",
    [
        ("red/blue", "red blue"),
        ("red/ blue", "red blue"),
        ("red / blue/green", "red  bluegreen"),  # one mark next to a space, and all of its kind vanish
        ("a-; b", "a  b"),  # the space is looked for in the text as it came
        ("a ;-b", "a  b"),
        ("1,000", "1000"),
        ("1,000-2", "10002"),  # a comma between digits, and all marks vanish
        ("a,b", "a b"),
        ("3.5", "3.5"),
        ("a.b", "ab"),
        ("5.", "5"),
        (".5", ".5"),
        ("what's", "what's"),
        ("12:30 #1 $5 50% a&b a*b", "12:30 #1 $5 50% a&b a*b"),
        ("[x]{y}(z)", " x  y  z "),
        ("." * 40, "." * 8),  # the flag in the place of the count
        ("", ""),
    ],
)
def test_punctuation_as_the_official_code_has_it(text, expected):
    assert strip_punctuation(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The  Cat and a dog", "cat and dog"),
        ("None", "0"),
        ("ten eleven", "10 eleven"),
        ("a", ""),
        ("dont", "don't"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),  # "Im" stands in the table, and never in lower-case text
        ("ow's'at", "'ow's'at"),
        ("youve", "you've"),
        ("she's let's", "she's let's"),
    ],
)
def test_words_as_the_official_code_has_them(text, expected):
    assert normalize_words(text) == expected


def test_a_question_without_answers_is_refused():
    with pytest.raises(ValueError, match=re.escape("at least one reference answer")):
        vqa_accuracy("yes", [])
