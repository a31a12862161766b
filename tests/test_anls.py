import random
from functools import cache

import pytest

from pheye.evaluation.metrics.anls import anls, edit_distance

pytestmark = pytest.mark.once


def recursive_distance(first: str, second: str) -> int:
    @cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        return min(
            distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (first[i - 1] != second[j - 1])
        )

    return distance(len(first), len(second))


def test_edit_distance_is_the_recursive_definition():
    generator = random.Random(0)
    for _ in range(300):
        first, second = ("".join(generator.choices("abc", k=generator.randrange(8))) for _ in range(2))
        assert edit_distance(first, second) == recursive_distance(first, second)
    assert edit_distance("kitten", "sitting") == 3


@pytest.mark.parametrize(
    "answer, references, expected",
    [
        ("Pepsi", ["pepsi"], 1),
        ("  diet   pepsi\n", ["Diet Pepsi"], 1),
        ("pepsy", ["coke", "pepsi"], 0.8),  # one of five, to the nearest
        ("abcd", ["abxy"], 0),  # a distance of half is too far
        ("abcde", ["abcxy"], 0.6),
        ("", ["x"], 0),
        ("", [""], 1),
        ("abc", ["abcdefgh"], 0),
    ],
)
def test_similarity_to_the_nearest_reference(answer, references, expected):
    assert anls(answer, references) == pytest.approx(expected)


def test_the_threshold_is_an_argument():
    assert anls("abcd", ["abxy"], threshold=0.6) == pytest.approx(0.5)


def test_a_question_without_answers_is_refused():
    with pytest.raises(ValueError, match="at least one reference answer"):
        anls("yes", [])
