"""What can be asked about a drawn picture, with the answers, and what each stage asks."""

import random

from ...processing_pheye import CAPTION_INSTRUCTION
from .pictures import KINDS, Picture, Shape, scene

SIGN = "What is written on the sign?"
SIGNS = "What is written on the signs?"
COLOUR = "What colour is the "  # begins a question
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOST_SHAPES = {"describe": 2, "instruct": 5, "tasks": 5}  # on a picture, by stage
MOST_SIGNS = {"describe": 1, "instruct": 10, "tasks": 1}  # or as many as find room
CAPTIONS = {"describe": 1.0, "instruct": 0.3, "tasks": 0.25}  # share of the pictures that are described
SHAPE_QUESTIONS = 8  # about a picture that is not described
CAP_HEIGHTS = 0.038, 0.2  # of letters, over the height of a crop
WHOLE_CAP_HEIGHT = 0.055  # least, where one crop shows the whole picture, and no branch helps to read
LEAST_PIXELS = 7  # of a capital
SIDES = 100, 420  # pixels of the picture that a crop shows, along each side, before it is brought to a view

Turn = tuple[str, str]


# --- What can be said about a picture ---


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def signs_in_order(picture: Picture) -> list[str]:
    """Texts of the signs from top to bottom."""
    tops = {letter.line: letter.corners[0][1] for letter in reversed(picture.letters)}
    return [picture.signs[line] for line in sorted(tops, key=tops.get)]


def caption(picture: Picture) -> str:
    """All shapes from left to right, then all signs."""
    shapes = sorted(picture.shapes, key=lambda shape: shape.centre)
    items = [with_article(f"{shape.colour} {shape.kind}") for shape in shapes]
    signs = signs_in_order(picture)
    if signs:
        items.append(f"{'a sign that says' if len(signs) == 1 else 'signs that say'} {listed(signs)}")
    sentence = listed(items) + "."
    return sentence[0].upper() + sentence[1:]


def count_question(kind: str, shapes: list[Shape]) -> Turn:
    return f"How many {kind}s are there?", NUMBERS[sum(shape.kind == kind for shape in shapes)]


def presence_question(kind: str, shapes: list[Shape]) -> Turn:
    return f"Is there {with_article(kind)}?", "yes" if any(shape.kind == kind for shape in shapes) else "no"


def colour_question(kind: str, shapes: list[Shape]) -> Turn | None:
    """None unless there is exactly one shape of this kind."""
    colours = [shape.colour for shape in shapes if shape.kind == kind]
    return (f"{COLOUR}{kind}?", colours[0]) if len(colours) == 1 else None


def shape_questions(rng: random.Random, picture: Picture, count: int = SHAPE_QUESTIONS) -> list[Turn]:
    """One to `count` different questions, the first more often about a kind that is there than about another."""
    kinds = [rng.choice(picture.shapes).kind if picture.shapes and rng.random() < 0.5 else rng.choice(KINDS)]
    kinds += rng.choices(KINDS, k=4 * count)
    makers = [count_question, presence_question, colour_question]
    turns = dict.fromkeys(rng.choice(makers)(kind, picture.shapes) for kind in kinds)
    asked = [turn for turn in turns if turn is not None][:count]
    return asked or [count_question(kinds[0], picture.shapes)]  # no colour to ask for, and nothing else was drawn


def sign_question(picture: Picture) -> Turn:
    signs = signs_in_order(picture)
    return (SIGN, signs[0]) if len(signs) == 1 else (SIGNS, ", ".join(signs))


# --- Pictures of a stage ---


def stage_picture(stage: str, rng: random.Random, tiles_per_side: int = 3) -> tuple[Picture, list[Turn]]:
    """A picture for a stage with its turns: a caption, or the question for the signs and several about shapes.

    A caption stands alone, for it would give away the answers to the questions that follow. Colours are asked for
    last: only a shape that is the one of its kind is asked for its colour, which would tell how many there are. With
    fewer tiles pictures are smaller and letters larger, so that crops look the same.
    """
    least, most = WHOLE_CAP_HEIGHT if tiles_per_side == 1 else CAP_HEIGHTS[0], CAP_HEIGHTS[1]
    picture = scene(
        rng,
        sizes=tuple(side * tiles_per_side for side in SIDES),
        cap_heights=(least / tiles_per_side, most / tiles_per_side),
        least_pixels=LEAST_PIXELS,
        signs=rng.randint(1, MOST_SIGNS[stage]),
        shapes=rng.randint(0, MOST_SHAPES[stage]),
    )
    if rng.random() < CAPTIONS[stage]:
        return picture, [(CAPTION_INSTRUCTION, caption(picture))]
    turns = [sign_question(picture), *shape_questions(rng, picture)]
    rng.shuffle(turns)
    return picture, sorted(turns, key=lambda turn: turn[0].startswith(COLOUR))
