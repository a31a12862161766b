"""Questions about drawn pictures with their answers, as data sets in LLaVA's format for the training command.

    python -m pheye.nano.questions --output FOLDER --stage describe|instruct|tasks --count 20000
        [--tiles-per-side 3]

writes FOLDER/data.jsonl and the pictures. A data set is a function of its stage, seed and number of tiles; the same
command again goes on where the last one stopped.
"""

import argparse
import io
import json
import multiprocessing
import random
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..common.files import write_atomically
from ..evaluation.tasks import CAPTION
from . import pictures
from .checkpoints import claim
from .pictures import KINDS, Picture, Shape

SIGN = "What is written on the sign?"
SIGNS = "What is written on the signs?"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOST_SHAPES = {"describe": 2, "instruct": 5, "tasks": 5}  # on a picture, by stage
MOST_SIGNS = {"describe": 1, "instruct": 10, "tasks": 1}  # or as many as find room
CAPTIONS = {"describe": 1.0, "instruct": 0.3, "tasks": 0.25}  # share of the pictures that are described
SHAPE_QUESTIONS = 8  # about a picture that is not described
CHUNK = 200  # pictures that are written together
CAP_HEIGHTS = 0.055, 0.2  # of letters, over the height of a crop
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
    return (f"What colour is the {kind}?", colours[0]) if len(colours) == 1 else None


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


# --- Data sets ---


def sample(stage: str, rng: random.Random, tiles_per_side: int = 3) -> tuple[Picture, list[Turn]]:
    """A picture for a stage with its turns: a caption, or the question for the signs and several about shapes.

    A caption stands alone, for it would give away the answers to the questions that follow. With fewer tiles pictures
    are smaller and letters larger, so that crops look the same.
    """
    picture = pictures.scene(
        rng,
        sizes=tuple(side * tiles_per_side for side in SIDES),
        cap_heights=tuple(share / tiles_per_side for share in CAP_HEIGHTS),
        signs=rng.randint(1, MOST_SIGNS[stage]),
        shapes=rng.randint(0, MOST_SHAPES[stage]),
    )
    if rng.random() < CAPTIONS[stage]:
        return picture, [(CAPTION, caption(picture))]
    turns = [sign_question(picture), *shape_questions(rng, picture)]
    rng.shuffle(turns)
    return picture, turns


def write_chunk(first: int, count: int, stage: str, seed: int, tiles_per_side: int, output: Path):
    """Up to CHUNK of `count` pictures, from `first` on, and the rows about them; none if they are there."""
    rows_file = output / "chunks" / f"{first:07d}.jsonl"
    if rows_file.exists():
        return
    folder = output / "images" / f"{first:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(first, min(first + CHUNK, count)):
        rng = random.Random(f"{stage} {seed} {index}")
        picture, turns = sample(stage, rng, tiles_per_side)
        encoded = io.BytesIO()
        picture.image.save(encoded, "JPEG", quality=rng.randint(70, 95))
        path = folder / f"{index:07d}.jpg"
        path.write_bytes(encoded.getvalue())
        said = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        rows.append({"id": f"{stage}-{index}", "image": str(path.relative_to(output)), "conversations": said})
    rows_file.parent.mkdir(exist_ok=True)
    write_atomically(rows_file, [f"{json.dumps(row)}\n".encode() for row in rows])


def write_data(output: Path, stage: str, count: int, seed: int = 0, workers: int = 2, tiles_per_side: int = 3) -> Path:
    """The file of a data set of `count` pictures, drawn by `workers` processes.

    Raises:
        ValueError: if the folder holds something else, or another data set.
    """
    claim(output, stage=stage, count=count, seed=seed, tiles_per_side=tiles_per_side)
    starts = range(0, count, CHUNK)
    chunk = partial(write_chunk, count=count, stage=stage, seed=seed, tiles_per_side=tiles_per_side, output=output)
    with multiprocessing.Pool(workers) as pool:
        list(tqdm(pool.imap_unordered(chunk, starts), total=len(starts), desc=f"drawing for {stage}", disable=None))
    files = [output / "chunks" / f"{first:07d}.jsonl" for first in starts]
    write_atomically(output / "data.jsonl", (file.read_bytes() for file in files))
    return output / "data.jsonl"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stage", choices=["describe", "instruct", "tasks"], required=True)
    parser.add_argument("--count", type=int, required=True, help="pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that draw")
    parser.add_argument("--tiles-per-side", type=int, default=3, help="crops that the model will make along each side")
    arguments = parser.parse_args()
    path = write_data(**vars(arguments))
    print(f"{path}: {arguments.count:,} pictures")


if __name__ == "__main__":
    main()
