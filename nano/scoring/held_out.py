"""Pictures that training never shows, what is asked about them, and how answers are scored."""

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment

from ...answering.rows import Request
from ...evaluation.metrics.anls import edit_distance
from ...evaluation.metrics.bootstrap import confidence_interval
from ...evaluation.tertiles import TERTILES, tertiles
from ...image_processing_pheye import resize
from ..drawing import questions, words
from ..drawing.pictures import Picture, scene
from ..learning.picture_labels import crossing

SEED = 2501
LETTERS = 3, 7  # of the word on the sign, fewest and most
MAIN, FINE = "main", "fine"  # sets of pictures, by the letters of their signs
# Of a picture in pixels, shortest and longest side. Fine capitals have 8 pixels at least; with fewer nobody reads them
SIZES = {MAIN: (300, 2000), FINE: (600, 2000)}
CAP_HEIGHTS = {MAIN: (0.025, 0.06), FINE: (0.013, 0.025)}  # of a sign's capitals over the picture's height
ASPECTS = {"1:1": 1.0, "4:3": 4 / 3, "16:9": 16 / 9, "1:3": 1 / 3}  # more sets, of one shape: width over height
ASPECT_SIDES = 600, 1400  # of a square with as many pixels as such a picture, whose letters are as high as there
LIKE = 1.1  # most by which letter heights of like words differ, as a factor
SIGN, SHAPES = "sign", "shapes"  # kinds of question


@dataclass
class HeldOutPicture:
    """A picture drawn anew whenever it is needed, with its two questions and answers.

    `letters`: which set it is of; `crosses`: whether a crop's border passes through its word, if that was asked for.
    """

    index: int
    word: str
    cap_height: float
    shape_question: tuple[str, str]
    zoom: float = 1
    letters: str = MAIN
    crosses: bool | None = None

    def image(self, reduced: int | None = None) -> Image.Image:
        """The picture; with `reduced`, stretched to a square of so many pixels a side, as the views are."""
        image = draw(self.index, self.zoom, self.letters).image
        return resize(image, (reduced, reduced), Image.Resampling.BICUBIC) if reduced else image


@functools.lru_cache(maxsize=1)  # several questions in a row are about one picture
def draw(index: int, zoom: float = 1, letters: str = MAIN) -> Picture:
    """Held-out picture number `index` of a set: a sign with one word, real or made-up, and up to five shapes.

    A set is MAIN, FINE or one of ASPECTS. With `zoom` the picture has so many times fewer pixels a side, and so many
    times higher letters, as in one of the crops.
    """
    rng = random.Random(f"held out {SEED} {index}" if letters == MAIN else f"held out {letters} {SEED} {index}")
    text = words.word(rng, True, *LETTERS)
    if letters in ASPECTS:
        side, root = math.exp(rng.uniform(*map(math.log, ASPECT_SIDES))), ASPECTS[letters] ** 0.5
        cap_heights = tuple(root * share for share in CAP_HEIGHTS[MAIN])
        return scene(rng, True, size=(round(side * root), round(side / root)), cap_heights=cap_heights, text=text)
    sizes = tuple(int(side / zoom) for side in SIZES[letters])
    cap_heights = tuple(zoom * share for share in CAP_HEIGHTS[letters])
    return scene(rng, True, sizes=sizes, cap_heights=cap_heights, text=text)


def held_out_pictures(
    count: int, zoom: float = 1, letters: str = MAIN, tiles_per_side: int | None = None
) -> list[HeldOutPicture]:
    """The first `count` held-out pictures of a set; with `tiles_per_side` it is known whose words cross a border of
    so many crops a side."""
    pictures = []
    for index in range(count):
        drawn = draw(index, zoom, letters)
        [question] = questions.shape_questions(random.Random(f"shapes {SEED} {index}"), drawn, 1)
        crosses = None if tiles_per_side is None else bool(crossing(drawn, tiles_per_side).any())
        pictures.append(HeldOutPicture(index, drawn.signs[0], drawn.cap_height, question, zoom, letters, crosses))
    return pictures


def requests_of(pictures: Sequence[HeldOutPicture], reduced: int | None) -> list[Request]:
    """Both questions about each picture; about a reduced one, or one with fine letters, only that for the sign."""
    requests = []
    for picture, group in zip(pictures, tertiles_of(pictures), strict=True):
        image = functools.partial(picture.image, reduced)
        asked = [(SIGN, questions.SIGN, picture.word)]
        if not reduced and picture.letters == MAIN:
            asked.append((SHAPES, *picture.shape_question))
        for kind, question, reference in asked:
            fields = {"kind": kind, "question": question, "reference": reference, "tertile": group}
            fields["cap_height"] = round(picture.cap_height, 5)
            if picture.crosses is not None:
                fields["crosses"] = picture.crosses
            requests.append(Request(f"{picture.index}-{kind}", image, question, fields))
    return requests


def tertiles_of(pictures: Sequence[HeldOutPicture]) -> list[str]:
    """Small, medium or large: each picture's letters among those of all."""
    groups = tertiles({place: picture.cap_height for place, picture in enumerate(pictures)})
    return [TERTILES[groups[place]] for place in range(len(pictures))]


# --- Scores ---


def is_exact(row: dict) -> bool:
    return row.get("answer", "").strip() == row["reference"]


def character_error(rows: Sequence[dict]) -> float:
    """Edits that turn the answers into the words, over the number of the words' letters."""
    edits = sum(edit_distance(row.get("answer", "").strip(), row["reference"]) for row in rows)
    return edits / sum(len(row["reference"]) for row in rows)


def interval(samples: Sequence, statistic=None) -> list[float]:
    """`confidence_interval` in four digits."""
    return [round(edge, 4) for edge in confidence_interval(samples, statistic=statistic)]


def share_interval(right: Sequence[float]) -> list[float]:
    """`interval` of a share, from a number of 0 to 1 for each sample; the exact one if it is none or all, where a
    bootstrap sees no spread."""
    if {*map(float, right)} not in ({0.0}, {1.0}):
        return interval(right)
    edge = round(1 - 0.025 ** (1 / len(right)), 4)
    return [round(1 - edge, 4), 1.0] if right[0] else [0.0, edge]


def summary(rows: Sequence[dict]) -> dict:
    """Share of exact answers with its 95 % interval, and the share of wrong characters."""
    exact = [float(is_exact(row)) for row in rows]
    return {
        "questions": len(rows),
        "exact": round(sum(exact) / len(exact), 4),
        "interval": interval(exact),
        "character_error": round(character_error(rows), 4),
    }


def scores(rows: Sequence[dict]) -> dict:
    """Summaries by kind of question and, for signs, by tertile of the letters' height."""
    signs = [row for row in rows if row["kind"] == SIGN]
    shapes = [row for row in rows if row["kind"] == SHAPES]
    found = {SIGN: summary(signs)}
    found["by_tertile"] = {name: summary([row for row in signs if row["tertile"] == name]) for name in TERTILES}
    if shapes:
        found[SHAPES] = summary(shapes)
        starts = {"How many": "how many", "Is there": "is there", "What colour": "what colour"}
        for start, name in starts.items():
            chosen = [row for row in shapes if row["question"].startswith(start)]
            if chosen:
                found[name] = summary(chosen)
    return found


# --- Comparisons ---


def exact_shares(seeds: Sequence[Sequence[dict]], chosen: str | Callable[[dict], bool]) -> np.ndarray:
    """For each question of a kind, or of those that `chosen` takes, in how many of the seeds its answer was exact."""
    takes = chosen if callable(chosen) else lambda row: row["kind"] == chosen
    return np.mean([[is_exact(row) for row in rows if takes(row)] for rows in seeds], axis=0)


def kept(full: Sequence[dict], reduced: Sequence[dict]) -> dict | None:
    """Words read in the reduced pictures over those read in the same pictures in full; None if none was."""

    def ratio(exact: np.ndarray) -> float:
        of_full, of_reduced = exact.sum(0)
        return of_reduced / of_full if of_full else np.nan

    by_id = {row["id"]: is_exact(row) for row in reduced}
    exact = np.array([(is_exact(row), by_id[row["id"]]) for row in full if row["kind"] == SIGN], float)
    return {"share": round(ratio(exact), 4), "interval": interval(exact, ratio)} if exact[:, 0].any() else None


def pairs_across_and_inside(rows: Sequence[dict]) -> list[tuple[dict, dict]]:
    """Words that a crop's border crosses, each with a like word inside a crop: of as many letters, of the same height
    but for a factor of LIKE. Each word occurs once at most, and there are as many pairs as can be."""
    pairs = []
    for length in sorted({len(row["reference"]) for row in rows}):
        like = [row for row in rows if len(row["reference"]) == length]
        across, inside = ([row for row in like if row["crosses"] == crosses] for crosses in (True, False))
        heights = ([row["cap_height"] for row in side] for side in (across, inside))
        distances = np.abs(np.subtract.outer(*(np.log(side) for side in heights)))
        is_like = distances <= math.log(LIKE)
        chosen = linear_sum_assignment(np.where(is_like, distances**2, len(like)))  # one unlike exceeds all like
        pairs += [(across[one], inside[other]) for one, other in zip(*chosen, strict=True) if is_like[one, other]]
    return pairs


def border_scores(rows: Sequence[dict]) -> dict:
    """Reading of words across a crop's border and inside: of all, and of pairs of like words with their difference."""
    signs = [row for row in rows if row["kind"] == SIGN]
    pairs = pairs_across_and_inside(signs)
    exact = np.array([[is_exact(row) for row in pair] for pair in pairs], float).reshape(-1, 2)
    heights = np.array([[row["cap_height"] for row in pair] for pair in pairs]).reshape(-1, 2)
    found = {}
    for place, (name, crosses) in enumerate((("across", True), ("inside", False))):
        chosen = [is_exact(row) for row in signs if row["crosses"] == crosses]
        found[name] = {"words": len(chosen), "exact": round(float(np.mean(chosen)), 4) if chosen else None}
        if pairs:
            found[name]["paired"] = round(exact[:, place].mean(), 4)
            found[name]["paired_height"] = round(heights[:, place].mean(), 5)
    found["pairs"] = len(pairs)
    if pairs:
        difference = exact[:, 0] - exact[:, 1]
        found["difference"] = {"share": round(difference.mean(), 4), "interval": interval(difference)}
    return found


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def with_interval(share: float, interval: Sequence[float]) -> str:
    low, high = map(percent, interval)
    return f"{percent(share)} ({low} to {high})"


def of_height(letters: str) -> str:
    """The letters of a set, in words."""
    low, high = map(percent, CAP_HEIGHTS[letters])
    return f"{low} to {high} %"
