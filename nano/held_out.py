"""Pictures that training never shows, what is asked about them, and how answers are scored."""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..answering.rows import Request
from ..evaluation.metrics.anls import edit_distance
from ..evaluation.metrics.bootstrap import confidence_interval
from ..evaluation.tertiles import TERTILES, tertiles
from ..image_processing_pheye import resize
from . import questions, words
from .pictures import Picture, scene

SEED = 2501
LETTERS = 3, 7  # of the word on the sign, fewest and most
SIZES = 300, 2000  # of its picture in pixels, shortest and longest side
CAP_HEIGHTS = 0.025, 0.06  # of its capitals over the picture's height
SIGN, SHAPES = "sign", "shapes"  # kinds of question


@dataclass
class HeldOutPicture:
    """A picture drawn anew whenever it is needed, with its two questions and answers."""

    index: int
    word: str
    cap_height: float
    shape_question: tuple[str, str]
    zoom: float = 1

    def image(self, reduced: int | None = None) -> Image.Image:
        """The picture; with `reduced`, stretched to a square of so many pixels a side, as the views are."""
        image = draw(self.index, self.zoom).image
        return resize(image, (reduced, reduced), Image.Resampling.BICUBIC) if reduced else image


@functools.lru_cache(maxsize=1)  # several questions in a row are about one picture
def draw(index: int, zoom: float = 1) -> Picture:
    """Held-out picture number `index`: a sign with one word, real or made-up, and up to five shapes.

    With `zoom` it has so many times fewer pixels a side, and so many times higher letters, as in one of the crops.
    """
    rng = random.Random(f"held out {SEED} {index}")
    text = words.word(rng, True, *LETTERS)
    sizes, cap_heights = tuple(int(side / zoom) for side in SIZES), tuple(zoom * share for share in CAP_HEIGHTS)
    return scene(rng, True, sizes=sizes, cap_heights=cap_heights, text=text)


def held_out_pictures(count: int, zoom: float = 1) -> list[HeldOutPicture]:
    """The first `count` held-out pictures."""
    pictures = []
    for index in range(count):
        drawn = draw(index, zoom)
        [question] = questions.shape_questions(random.Random(f"shapes {SEED} {index}"), drawn, 1)
        pictures.append(HeldOutPicture(index, drawn.signs[0], drawn.cap_height, question, zoom))
    return pictures


def requests_of(pictures: Sequence[HeldOutPicture], reduced: int | None) -> list[Request]:
    """Both questions about each picture; about a reduced one only that for the sign."""
    requests = []
    for picture, group in zip(pictures, tertiles_of(pictures), strict=True):
        image = functools.partial(picture.image, reduced)
        asked = [(SIGN, questions.SIGN, picture.word)]
        if not reduced:
            asked.append((SHAPES, *picture.shape_question))
        for kind, question, reference in asked:
            fields = {"kind": kind, "question": question, "reference": reference, "tertile": group}
            fields["cap_height"] = round(picture.cap_height, 5)
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


def summary(rows: Sequence[dict]) -> dict:
    """Share of exact answers with its 95 % interval, and the share of wrong characters."""
    exact = [float(is_exact(row)) for row in rows]
    low, high = confidence_interval(exact)
    return {
        "questions": len(rows),
        "exact": round(sum(exact) / len(exact), 4),
        "interval": [round(low, 4), round(high, 4)],
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


def percent(share: float) -> str:
    return f"{100 * share:.1f}"
