"""Labels of whole pictures, against a picture laid out by hand, and against a slow look at each point."""

import random

import numpy as np
import pytest
from PIL import Image

from pheye.canvases_pheye import crop_boxes
from pheye.nano.drawing.fonts import CHARACTERS
from pheye.nano.drawing.pictures import KINDS, Letter, Picture, Shape, corner_points, page
from pheye.nano.learning.labels import GRID, IGNORED, SPACE
from pheye.nano.learning.picture_labels import HEADS, POINTS, SAMPLES, crossing, heights, picture_labels

pytestmark = pytest.mark.once

PATCH = 14
SIDE = 3 * GRID * PATCH  # of a picture whose crops have patches of 14 pixels


def classes(text: str) -> list[int]:
    return [1 + CHARACTERS.index(character) for character in text]


def written(text: str, left: float, top: float, line: int, wide: float = 1.0, high: float = 1.0) -> list[Letter]:
    """Letters side by side; places and sizes in patches of a crop."""
    letters, word = [], 0
    for number, character in enumerate(text):
        if character == " ":
            word += 1
            continue
        box = (left + number * wide, top, left + (number + 1) * wide, top + high)
        letters.append(Letter(character, corner_points([PATCH * side for side in box]), line, word))
    return letters


def picture(*signs: list[Letter]) -> Picture:
    return Picture(
        Image.new("RGB", (SIDE, SIDE)), signs=[""] * len(signs), letters=[letter for sign in signs for letter in sign]
    )


def middle(labels, name: str, view: int) -> np.ndarray:
    return labels.maps[view, list(HEADS).index(name)]


def test_a_word_that_crosses_a_border_is_told_whole_in_both_crops():
    labels = picture_labels(picture(written("ABCD E", 14, 20, line=0)))  # two letters left of the border at 16
    left, right = 1 + 1, 1 + 3 + 1  # crops go column by column, and the sign is in the middle row
    row = 20 - GRID
    a, b, c, d, e = classes("ABCDE")
    for view, columns, letters, told in (
        (left, [14, 15], [a, b], {"before": [0, a], "after": [b, c], "place": [0, 1], "remaining": [3, 2]}),
        (right, [0, 1, 3], [c, d, e], {"before": [b, c, SPACE], "after": [d, SPACE, 0], "word": [0, 0, 1]}),
        (right, [0, 1, 3], [c, d, e], {"place": [2, 3, 0], "remaining": [1, 0, 0], "sign": [0, 0, 0]}),
    ):
        assert labels.letters[view, POINTS // 2, row, columns].tolist() == letters
        for name, values in told.items():
            assert middle(labels, name, view)[row, columns].tolist() == values, name
    assert np.count_nonzero(labels.letters) == 5 * POINTS  # in the global view letters are a third of a patch wide
    assert (labels.which >= 0).sum() == 5 and labels.which[right, row, 3] == 4


def test_signs_are_numbered_from_the_top_and_only_ten_are_told_apart():
    labels = picture_labels(picture(written("AB", 2, 9, line=0), written("CD", 2, 5, line=1)))
    assert middle(labels, "sign", 1)[[5, 9], 2].tolist() == [0, 1]
    many = picture_labels(picture(*(written("AB", 2, top, line=top) for top in range(11))))
    assert set(middle(many, "sign", 1)[:11, 2]) == {IGNORED} and middle(many, "place", 1)[0, 3] == 1


def test_letters_beyond_the_picture_are_no_part_of_their_words():
    labels = picture_labels(picture(written("ABC", -1, 2, line=0)))
    assert labels.letters[1, POINTS // 2, 2, :2].tolist() == classes("BC")
    assert middle(labels, "before", 1)[2, :2].tolist() == [0, classes("B")[0]]
    assert middle(labels, "place", 1)[2, :2].tolist() == [0, 1]


def test_a_shapes_centre_is_in_one_patch_of_the_global_view_and_of_one_crop():
    left, top = 30 * PATCH, 14 * PATCH  # crops end at 16 and 32, so that four show a part of it
    shape = Shape("triangle", "red", corner_points((left, top, left + 7 * PATCH, top + 7 * PATCH)))
    labels = picture_labels(Picture(Image.new("RGB", (SIDE, SIDE)), shapes=[shape]))
    assert shape.centre == (33.5 * PATCH, 17.5 * PATCH)
    centres = labels.maps[:, list(HEADS).index("centre")]
    kind = 1 + KINDS.index("triangle")
    assert np.argwhere(centres).tolist() == [[0, 17 // 3, 33 // 3], [1 + 2 * 3 + 1, 17 - GRID, 33 - 2 * GRID]]
    assert set(centres[centres > 0]) == {kind}
    assert (labels.maps[:, list(HEADS).index("shape")] > 0).any((1, 2)).sum() == 5


def test_words_of_more_than_nine_letters_have_no_place_beyond_the_ninth():
    labels = picture_labels(picture(written("ABCDEFGHIJ", 0, 2, line=0)))
    assert middle(labels, "place", 1)[2, 8:10].tolist() == [8, IGNORED]
    assert middle(labels, "remaining", 1)[2, :2].tolist() == [IGNORED, 8]


def test_letters_at_columns_are_those_that_cover_most_of_their_points():
    drawn = page(random.Random(3), False, 420, 330, (10, 12))
    labels = picture_labels(drawn)
    corners = np.array([letter.corners for letter in drawn.letters])
    boxes = [(0, 0, 420, 330), *crop_boxes(3, 3, 110, 140)]
    rng = random.Random(0)
    for _ in range(100):
        view, row, column = rng.randrange(1, 10), rng.randrange(GRID), rng.randrange(GRID)
        left, top, right, bottom = boxes[view]
        x = left + (column + 0.5) * (right - left) / GRID
        found = []
        for sample in range(SAMPLES):
            y = top + (row + (sample + 0.5) / SAMPLES) * (bottom - top) / GRID
            found.append({index for index, corner in enumerate(corners) if is_inside(corner, x, y)})
        index = labels.which[view, row, column]
        if index >= 0:
            assert sum(index in there for there in found) >= SAMPLES // 2
        elif labels.letters[view, POINTS // 2, row, column] == 0:
            covered = [sum(index in there for there in found) for index in set().union(*found)]
            assert max(covered, default=0) < SAMPLES // 2 or any(len(there) > 1 for there in found)


def is_inside(corners: np.ndarray, x: float, y: float) -> bool:
    sides = zip(corners, np.roll(corners, -1, 0), strict=True)
    return all((end[0] - start[0]) * (y - start[1]) >= (end[1] - start[1]) * (x - start[0]) for start, end in sides)


@pytest.mark.parametrize(
    ("left", "top", "expected"),
    [
        (2, 2, False),
        (13, 2, True),  # a letter right of the border at 16
        (12.4, 2, False),  # less than half a letter
        (2, 15.5, True),  # cut in the middle of its height
        (2, 15.1, False),
    ],
)
def test_crossing_words(left, top, expected):
    known = picture(written("ABCD", left, top, line=0), written("E", 2, 40, line=1))
    assert crossing(known).tolist() == [expected] * 4 + [False]


def test_heights_are_shares_of_the_picture():
    assert heights(picture(written("AB", 3, 3, line=0, high=2))).tolist() == pytest.approx([2 / 48] * 2)
