"""What each view of a whole picture shows, patch by patch, with labels that only the whole picture can answer.

A letter's place in its word, how many letters follow, and the letters before and after are those of the whole word,
wherever a crop's border cuts it; signs are numbered from the top of the picture. A view alone cannot know them, the
branch can.

Letters of this size are up to five to a patch, and two lines may share one. So each patch is asked at POINTS columns,
side by side, for the letter that covers most of the column there; for all else it is asked at the middle column.

Shapes: V views (the global view first), G patches along each side of a view.
"""

import math
from dataclasses import dataclass

import numpy as np

from ...canvases_pheye import crop_boxes
from ..drawing.fonts import CHARACTERS
from ..drawing.pictures import COLOURS, KINDS, Picture
from .configs import TILES
from .labels import CLASSES, GRID, IGNORED, NOTHING, SPACE, covered_points, view_labels, visible_shares

POINTS = 5  # columns of a patch that are asked for their letter
SAMPLES = 4  # points of a column, one below the other; a letter must cover half of them
LEAST_WIDTHS = 0.4, 0.2  # of a letter that is asked for, in patches: in the global view and in crops
LONGEST_WORD, MOST_WORDS, MOST_SIGNS = 9, 2, 10  # that are told apart; beyond them nothing is asked

# Maps asked at the middle column, beside `letters`, and how many classes each has.
HEADS = {
    "before": CLASSES, "after": CLASSES, "place": LONGEST_WORD, "remaining": LONGEST_WORD, "word": MOST_WORDS,
    "sign": MOST_SIGNS, "shape": 1 + len(KINDS) * len(COLOURS), "row": GRID, "column": GRID, "centre": 1 + len(KINDS),
}  # fmt: skip
OF_LETTERS = list(HEADS)[:6]  # asked where there is a letter
MIDDLE = POINTS // 2


@dataclass
class PictureLabels:
    """Labels of all views: `letters` (V, POINTS, G, G), `maps` (V, heads, G, G) in the order of HEADS, `counts`
    (V, kinds) of shapes, all uint8; `which` (V, G, G) is the number of the letter at the middle column, or -1."""

    letters: np.ndarray
    maps: np.ndarray
    counts: np.ndarray
    which: np.ndarray


def picture_labels(picture: Picture, tiles_per_side: int = TILES) -> PictureLabels:
    """Labels of all views of `picture`."""
    width, height = picture.image.size
    crops = crop_boxes(tiles_per_side, tiles_per_side, height / tiles_per_side, width / tiles_per_side)
    corners = np.array([letter.corners for letter in picture.letters]).reshape(-1, 4, 2)
    rows = letter_rows(picture, visible_shares(corners * (GRID / width, GRID / height)) >= 0.5)
    parts = []
    for view, box in enumerate([(0, 0, width, height), *crops]):
        left, top, right, bottom = box
        places = (corners - (left, top)) * (GRID / (right - left), GRID / (bottom - top))
        which = letters_at(places)  # (POINTS, G, G)
        is_narrow = np.linalg.norm(places[:, 1] - places[:, 0], axis=1) < LEAST_WIDTHS[min(view, 1)]
        asked = np.where(is_narrow[:, None], IGNORED, rows)
        asked = np.concatenate([asked, np.zeros((1, asked.shape[1]), asked.dtype)])  # what -1 finds: nothing
        view = view_labels(Picture(picture.image, picture.shapes), box)
        maps = np.zeros((len(HEADS), GRID, GRID), np.uint8)
        maps[:6] = asked[which[MIDDLE], 1:].transpose(2, 0, 1)
        maps[6:9] = view.maps[-3:]  # shape, row and column
        maps[9] = centres(picture, box)
        shown = np.where((which[MIDDLE] >= 0) & (asked[which[MIDDLE], 0] != IGNORED), which[MIDDLE], -1)
        parts.append((asked[which, 0], maps, view.counts, shown))
    letters, maps, counts, which = (np.stack(part) for part in zip(*parts, strict=True))
    return PictureLabels(letters.astype(np.uint8), maps, counts.astype(np.uint8), which.astype(np.int16))


def centres(picture: Picture, box: tuple[float, float, float, float]) -> np.ndarray:
    """The kind of the shape whose centre is in each patch of a view (G, G), 0: none. By these one can count."""
    left, top, right, bottom = box
    found = np.zeros((GRID, GRID), np.uint8)
    for shape in picture.shapes:
        x, y = shape.centre
        column = math.floor((x - left) * GRID / (right - left))
        row = math.floor((y - top) * GRID / (bottom - top))
        if 0 <= row < GRID and 0 <= column < GRID:
            found[row, column] = 1 + KINDS.index(shape.kind)
    return found


def letter_rows(picture: Picture, is_visible: np.ndarray) -> np.ndarray:
    """For each letter (letters, 7): its class, those before and after it in its sign, its place in its word, how many
    letters of the word follow, the word's number in its sign, and the sign's number from the top.

    Letters of which the picture shows too little are ignored, as if their words ended before them.
    """
    rows = np.full((len(picture.letters), 7), IGNORED, np.int64)
    signs: dict[int, list[int]] = {}
    for index, letter in enumerate(picture.letters):
        if is_visible[index]:
            signs.setdefault(letter.line, []).append(index)
    tops = {line: picture.letters[sign[0]].corners[0][1] for line, sign in signs.items()}
    order = {line: number for number, line in enumerate(sorted(tops, key=tops.get))}
    is_numbered = len(order) <= MOST_SIGNS
    for line, sign in signs.items():
        words = [picture.letters[index].word for index in sign]
        classes = [1 + CHARACTERS.index(picture.letters[index].character) for index in sign]
        for number, index in enumerate(sign):
            before = after = NOTHING
            if number:
                before = classes[number - 1] if words[number - 1] == words[number] else SPACE
            if number + 1 < len(sign):
                after = classes[number + 1] if words[number + 1] == words[number] else SPACE
            place = number - words.index(words[number])
            remaining = words.count(words[number]) - 1 - place
            told = (place, remaining, words[number]), (LONGEST_WORD, LONGEST_WORD, MOST_WORDS)
            place, remaining, word = (value if value < most else IGNORED for value, most in zip(*told, strict=True))
            rows[index] = (
                classes[number],
                before,
                after,
                place,
                remaining,
                word,
                order[line] if is_numbered else IGNORED,
            )
    return rows


def letters_at(corners: np.ndarray) -> np.ndarray:
    """Which of the letters (letters, 4, 2), in patches, each column of each patch shows: (POINTS, G, G), -1: none."""
    found = np.full((GRID * SAMPLES) * (GRID * POINTS), -1)
    seen = np.flatnonzero((corners.max(1) > 0).all(1) & (corners.min(1) < GRID).all(1))
    x, y = ((np.arange(GRID * points) + 0.5) / points for points in (POINTS, SAMPLES))
    where, which = covered_points(corners[seen], x, y)
    found[where] = seen[which]
    found = found.reshape(GRID, SAMPLES, GRID, POINTS)
    times = (found[:, :, None] == found[:, None]).sum(
        2
    )  # (G, SAMPLES, G, POINTS): how often a sample's letter is there
    times[(found < 0) | (times < SAMPLES // 2)] = 0
    best = times.argmax(1)[:, None]
    chosen = np.take_along_axis(np.where(times > 0, found, -1), best, 1)[:, 0]  # (G, G, POINTS)
    return chosen.transpose(2, 0, 1)


# --- Of each letter, for scores ---


def crossing(picture: Picture, tiles_per_side: int = TILES) -> np.ndarray:
    """Which letters (letters,) are of a word through which a crop's border passes: an upright one with at least half a
    letter on either side, or a level one with at least a quarter of the letters' height."""
    found = np.zeros(len(picture.letters), bool)
    words: dict[tuple[int, int], list[int]] = {}
    for index, letter in enumerate(picture.letters):
        words.setdefault((letter.line, letter.word), []).append(index)
    for word in words.values():
        corners = np.array([picture.letters[index].corners for index in word])  # (letters, 4, 2)
        least, most = corners.min((0, 1)), corners.max((0, 1))
        one = (corners.max(1) - corners.min(1)).mean(0) * (0.5, 0.25)
        for border in range(1, tiles_per_side):
            line = np.array(picture.image.size) * border / tiles_per_side
            found[word] |= bool((np.minimum(line - least, most - line) >= one).any())
    return found


def heights(picture: Picture) -> np.ndarray:
    """Height of each letter's box (letters,) over the picture's height."""
    corners = np.array([letter.corners for letter in picture.letters]).reshape(-1, 4, 2)
    return np.linalg.norm(corners[:, 3] - corners[:, 0], axis=1) / picture.image.height
