"""Dense labels of views, against a picture laid out by hand."""

import numpy as np
import pytest
from PIL import Image

from pheye.nano.drawing.pictures import COLOURS, KINDS, Letter, Picture, Shape, corner_points
from pheye.nano.learning.labels import CLASSES, GRID, HEADS, IGNORED, SPACE, view_labels

pytestmark = pytest.mark.once

A, B, C = 1, 2, 3
PATCH = 14


def letter(character: str, left: float, right: float, word: int = 0) -> Letter:
    """In the third row of patches; places in patches."""
    return Letter(character, corner_points((left * PATCH, 2 * PATCH, right * PATCH, 3 * PATCH)), 0, word)


def picture() -> Picture:
    """224 pixels: "AB C", a letter a patch but B a patch and a third wide, and a blue square below."""
    letters = [letter("A", 1, 2), letter("B", 2, 3 + 1 / 3), letter("C", 5, 6, word=1)]
    square = Shape("square", "blue", corner_points((4 * PATCH, 8 * PATCH, 6 * PATCH, 10 * PATCH)))
    return Picture(Image.new("RGB", (224, 224)), [square], ["AB C"], letters)


def maps_of(labels) -> dict[str, np.ndarray]:
    return dict(zip(HEADS, labels.maps, strict=True))


def test_labels_of_a_whole_picture():
    labels = view_labels(picture(), (0, 0, 224, 224))
    maps = maps_of(labels)
    for name, row in {
        "left_point": {1: A, 2: B, 3: B, 5: C},
        "letter": {1: A, 2: B, 5: C},
        "right_point": {1: A, 2: B, 5: C},
        "before": {2: A, 5: SPACE},
        "after": {1: B, 2: SPACE},
        "place": {2: 1, 5: 2},
        "remaining": {1: 2, 2: 1},
    }.items():
        expected = np.zeros((GRID, GRID), np.uint8)
        for column, value in row.items():
            expected[2, column] = value
        assert np.array_equal(maps[name], expected), name
    shape = np.zeros((GRID, GRID), np.uint8)
    shape[8:10, 4:6] = 1 + KINDS.index("square") * len(COLOURS) + list(COLOURS).index("blue")
    assert np.array_equal(maps["shape"], shape)
    assert maps["row"][2].tolist() == [2] * GRID and maps["column"][2].tolist() == list(range(GRID))
    assert labels.counts.tolist() == [kind == "square" for kind in KINDS]


def test_a_crop_counts_only_what_it_shows():
    left = (2 + 2 / 3) * PATCH  # half of B is left
    labels = view_labels(picture(), (left, 0, left + 112, 112))
    maps = maps_of(labels)
    assert set(maps["letter"].flatten()) == {0, B, C}
    is_b, is_c = maps["letter"] == B, maps["letter"] == C
    assert (maps["before"][is_b] == 0).all() and (maps["place"][is_b] == 0).all() and (maps["place"][is_c] == 1).all()
    assert labels.counts.sum() == 0  # the square lies below
    mostly_cut = maps_of(view_labels(picture(), (3.1 * PATCH, 0, 3.1 * PATCH + 112, 112)))["left_point"]
    assert IGNORED in mostly_cut and B not in mostly_cut


def test_labels_fit_their_heads():
    assert HEADS["letter"] == CLASSES and max(HEADS.values()) < IGNORED
