"""What a view shows, patch by patch: the dense labels that the vision tower is pre-trained on.

A drawn picture knows where each letter lies. Three points of every patch, side by side, are asked for the letter that
covers them, for a line of small letters has up to three of them in a patch; the patch's centre also for the letters
before and after, for the letter's place in its line as far as this view shows it, and for the shape there. Every patch
is asked for its row and column: blocks that go from one letter to the next need to know where they are, and without
this question a tower forgets it.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ..drawing.fonts import CHARACTERS
from ..drawing.pictures import COLOURS, KINDS, Picture

GRID = 16  # patches along each side of a view
POINTS = 3  # points per patch that are asked for their letter
NOTHING, SPACE = 0, len(CHARACTERS) + 1
CLASSES = len(CHARACTERS) + 2  # nothing, the characters, a space (only as a neighbour)
PLACES = 16  # places in a line that are told apart
IGNORED = 255
LEAST_VISIBLE = 0.35  # share of a letter inside the view from which on it is asked for
OVERSAMPLING = 4  # of the drawing that tells which patch centres a shape covers
MOST_SHAPES = 5  # counted

# The maps over patches, and how many classes each has.
HEADS = {
    "left_point": CLASSES, "letter": CLASSES, "right_point": CLASSES, "before": CLASSES, "after": CLASSES,
    "place": PLACES, "remaining": PLACES, "shape": 1 + len(KINDS) * len(COLOURS), "row": GRID, "column": GRID,
}  # fmt: skip


@dataclass
class ViewLabels:
    """`maps` (heads, GRID, GRID) in the order of HEADS; `counts` (kinds,) of shapes whose centre the view shows."""

    maps: np.ndarray
    counts: np.ndarray


def view_labels(picture: Picture, box: tuple[float, float, float, float]) -> ViewLabels:
    """Labels of the part `box` (left, upper, right, lower) of a picture, which one view shows."""
    left, top, right, bottom = box
    scale = np.array([GRID / (right - left), GRID / (bottom - top)])
    maps = np.zeros((len(HEADS), GRID, GRID), np.uint8)
    maps[:7] = letter_maps(picture, np.array([left, top]), scale)
    places = [(np.array(shape.corners) - (left, top)) * scale for shape in picture.shapes]  # in patches
    drawing = Image.new("L", (GRID * OVERSAMPLING,) * 2)
    draw = ImageDraw.Draw(drawing)
    counts = np.zeros(len(KINDS), np.uint8)
    for shape, corners in zip(picture.shapes, places, strict=True):
        kind, colour = KINDS.index(shape.kind), list(COLOURS).index(shape.colour)
        draw.polygon([tuple(corner * OVERSAMPLING) for corner in corners], 1 + kind * len(COLOURS) + colour)
        centre = (np.array(shape.centre) - (left, top)) * scale
        counts[kind] += bool((centre >= 0).all() and (centre < GRID).all())
    maps[7] = np.asarray(drawing)[OVERSAMPLING // 2 :: OVERSAMPLING, OVERSAMPLING // 2 :: OVERSAMPLING]
    maps[3:7][:, maps[7] > 0] = 0
    maps[8:] = np.indices((GRID, GRID))
    return ViewLabels(maps, counts.clip(0, MOST_SHAPES))


def letter_maps(picture: Picture, origin: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The seven maps about letters, (7, GRID, GRID)."""
    points = np.zeros((GRID, GRID * POINTS, 5), np.uint8)  # letter, before, after, place, remaining
    if picture.letters:
        corners = (np.array([letter.corners for letter in picture.letters]) - origin) * scale  # (letters, 4, 2)
        rows = letter_rows(picture, visible_shares(corners))
        seen = (corners.max(1) > 0).all(1) & (corners.min(1) < GRID).all(1)
        x, y = (np.arange(GRID * POINTS) + 0.5) / POINTS, np.arange(GRID) + 0.5
        where, which = covered_points(corners[seen], x, y)
        points.reshape(-1, 5)[where] = rows[seen][which]
    columns = points.reshape(GRID, GRID, POINTS, 5)
    letters = columns[..., 0].transpose(2, 0, 1)  # (POINTS, GRID, GRID)
    return np.concatenate([letters, columns[:, :, POINTS // 2, 1:].transpose(2, 0, 1)])


def visible_shares(corners: np.ndarray) -> np.ndarray:
    """Share of each letter's box (letters, 4, 2), in patches, that lies inside the view."""
    least, most = corners.min(1), corners.max(1)
    inside = (most.clip(0, GRID) - least.clip(0, GRID)).prod(1)
    return inside / (most - least).prod(1).clip(1e-6)


def letter_rows(picture: Picture, shares: np.ndarray) -> np.ndarray:
    """For each letter its class, those before and after, its place in the line and how many follow: (letters, 5).

    Only what the view shows counts; a letter of which it shows too little is ignored.
    """
    rows = np.full((len(picture.letters), 5), IGNORED, np.uint8)
    is_visible = shares >= LEAST_VISIBLE
    lines: dict[int, list[int]] = {}
    for index, letter in enumerate(picture.letters):
        if is_visible[index]:
            lines.setdefault(letter.line, []).append(index)
    for line in lines.values():
        shown = [picture.letters[index] for index in line]
        classes = [1 + CHARACTERS.index(letter.character) for letter in shown]
        for place, index in enumerate(line):
            before = after = NOTHING
            if place:
                before = classes[place - 1] if shown[place - 1].word == shown[place].word else SPACE
            if place + 1 < len(line):
                after = classes[place + 1] if shown[place + 1].word == shown[place].word else SPACE
            last = PLACES - 1
            rows[index] = classes[place], before, after, min(place, last), min(len(line) - 1 - place, last)
    return rows


def covered_points(corners: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which points of the grid of all `x` and all `y` lie in which of the quadrilaterals (letters, 4, 2): flat indices
    of points (rows first), and of letters."""
    inside = np.ones((len(corners), len(y), len(x)), bool)
    for corner in range(4):
        start, end = corners[:, corner], corners[:, (corner + 1) % 4]
        edge = end - start
        inside &= (
            edge[:, 0, None, None] * (y[:, None] - start[:, 1, None, None])
            - edge[:, 1, None, None] * (x - start[:, 0, None, None])
        ) >= 0
    which, where = np.nonzero(inside.reshape(len(corners), len(y) * len(x)))
    return where, which
