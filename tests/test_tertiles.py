"""Three groups of equal number, and the accuracy in each."""

import numpy as np
import pytest

from pheye.common.command import InputError
from pheye.evaluation.tertiles import (
    accuracy_by_tertile,
    tertiles,
)

pytestmark = pytest.mark.once


@pytest.mark.parametrize("count", [3, 4, 5, 11, 300])
def test_tertiles_are_the_thirds_of_the_sorted_areas(count):
    areas = {f"q{i}": area for i, area in enumerate(np.random.default_rng(count).random(count))}
    expected = {}
    for group, keys in enumerate(np.array_split(sorted(areas, key=areas.get), 3)):
        expected.update(dict.fromkeys(keys.tolist(), group))
    assert tertiles(areas) == expected


def test_equal_areas_fall_into_the_same_tertile_in_any_order():
    areas = dict.fromkeys("abcdef", 0.5)
    shuffled = {key: areas[key] for key in "fcadbe"}
    assert tertiles(areas) == tertiles(shuffled) == {"a": 0, "b": 0, "c": 1, "d": 1, "e": 2, "f": 2}


def test_fewer_than_three_samples_make_no_tertiles():
    with pytest.raises(InputError, match="2 samples"):
        tertiles({"a": 0.1, "b": 0.2})


def test_accuracy_per_tertile():
    areas = {"a": 0.5, "b": 0.01, "c": 0.02, "d": 0.9, "e": 0.3}
    scores = {"a": 1, "b": 0.3, "c": 0.6, "d": 0, "e": 0.5}
    small, medium, large = accuracy_by_tertile(scores, areas)
    assert small == {
        "tertile": "small",
        "samples": 2,
        "smallest_area": 0.01,
        "largest_area": 0.02,
        "accuracy": pytest.approx(0.45),
    }
    assert (medium["samples"], medium["accuracy"], medium["largest_area"]) == (2, 0.75, 0.5)
    assert (large["samples"], large["accuracy"]) == (1, 0)
