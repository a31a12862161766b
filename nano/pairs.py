"""Two pictures in a prompt: whether Pheye-nano learns to tell them apart.

    python -m pheye.nano.pairs --model checkpoints/pheye-nano --output OUTPUT [--lessons 500] [--steps 800] [--seeds 2]
        [--count 300]

A model that has seen one picture at a time learns from pairs with a sign each: in which image is this word, and what
is written on the sign of the other? First its language model reads such texts, in which the signs are told, for as
many steps as --lessons says. Then blocks and view encoding learn from pictures. It is asked about held-out pairs, and
about single pictures as before. Features of pictures are kept in OUTPUT, and used up to four times, as `nano.replay`
does. OUTPUT gets the pairs, the model that has read, a folder for each run and, from all of them, pairs.md. A run that
has a result is not done again.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch

from .. import PheyeForConditionalGeneration, PheyeProcessor
from ..answering.rows import Request
from ..common.command import Parser, at_least, exit_status
from ..common.files import appear_whole, write_atomically
from ..common.machine import machine
from ..training.collator import encode
from ..training.mixture import Mixture, read_mixture
from .drawing import words
from .drawing.pictures import scene
from .drawing.questions import CAP_HEIGHTS, LEAST_PIXELS, NUMBERS, SIDES
from .learning import texts
from .learning.checkpoints import claim, rate_share
from .learning.crops import SPREAD
from .learning.features import BATCH, FeatureStore
from .learning.kept_training import add_options, ask, once, opened, train, weights_of
from .learning.muon import optimizers_for, set_learning_rates
from .scoring.held_out import SIGN, HeldOutPicture, held_out_pictures, interval, is_exact, requests_of, with_interval
from .scoring.tables import table

WHICH, READ = "which image has the word", "the sign of one image"  # kinds of question
TILES = 3
TEXTS, OLD_TEXTS = 24, 0.2  # of a step of lessons, and the share of those of `nano.language`

REPORT = """# Two pictures in a prompt

`python -m pheye.nano.pairs`; {lessons} steps of texts and {steps} of pictures from {model}, learning rate of pictures
{rate}; {count} held-out pairs; {machine}. Answers that are exactly right, in %, mean over {seeds} seeds. A guess has
50 % of the first question. Intervals are over the pairs (bootstrap), not over trainings. `before` is the model without
this training, whose prompt may hold two pictures, too.

{scores}
"""


def turns_of(signs: list[str], rng: random.Random) -> dict[str, tuple[str, str]]:
    """A question of each kind about two pictures with these words, and its answer. The second is about the other
    picture than the first, whose word it would repeat."""
    asked = rng.randrange(2)
    read = 1 - asked
    return {
        WHICH: (f"In which image is the word {signs[asked]}?", NUMBERS[asked + 1]),
        READ: (f"What is written on the sign of image {NUMBERS[read + 1]}?", signs[read]),
    }


def write_pairs(output: Path, count: int) -> Path:
    """A data set of `count` pairs in LLaVA's format, as `nano.draw_data` writes; its file."""
    claim(output, count=count)
    path = output / "data.jsonl"
    if path.exists():
        return path
    rows = []
    for index in range(count):
        rng, names, signs = random.Random(f"pair {index}"), [], []
        while len(signs) < 2:
            picture = scene(
                rng,
                sizes=tuple(side * TILES for side in SIDES),
                cap_heights=tuple(share / TILES for share in CAP_HEIGHTS),
                least_pixels=LEAST_PIXELS,
                text=words.word(rng, False),
            )
            if picture.signs[0] not in signs:
                signs += picture.signs
                names.append(f"{index:06d}-{len(signs)}.jpg")
                picture.image.save(output / names[-1], quality=rng.randint(70, 95))
        said = []
        for number, (question, reply) in enumerate(turns_of(signs, rng).values()):
            said += [{"from": "human", "value": question if number else f"<image><image>{question}"}]
            said += [{"from": "gpt", "value": reply}]
        rows.append({"id": f"pair-{index}", "image": names, "conversations": said})
    write_atomically(path, [json.dumps(row).encode() + b"\n" for row in rows])
    return path


def requests_of_pairs(pictures: list[HeldOutPicture]) -> list[Request]:
    """Both questions about each pair of pictures: the first and the second, the third and the fourth, ..."""
    requests = []
    for number in range(0, len(pictures) - 1, 2):
        pair = pictures[number : number + 2]
        images = [picture.image for picture in pair]
        turns = turns_of([picture.word for picture in pair], random.Random(f"held out pair {number}"))
        for kind, (question, reference) in turns.items():
            fields = {"kind": kind, "reference": reference}
            requests.append(Request(f"{number:05d}-{kind}", images, question, fields))
    return requests


def questions(pictures: list[HeldOutPicture]) -> list[Request]:
    """Those about pairs of `pictures`, and that for the sign of every second one alone."""
    alone = [request for request in requests_of(pictures[::2], None) if request.fields["kind"] == SIGN]
    return [*requests_of_pairs(pictures), *alone]


def build(folder: Path, seed: int, device: str) -> tuple[PheyeForConditionalGeneration, PheyeProcessor]:
    """The model in `folder` for two pictures, its trained parts chosen, and its processor."""
    return opened(folder, device, seed, max_images=2), PheyeProcessor.from_pretrained(folder, max_images=2)


@torch.no_grad()
def tell_apart(model: PheyeForConditionalGeneration):
    """A vector for the second picture as large as those of new crops: Pheye's begins at zero, and stayed there."""
    model.pheye.view_encoding.image_embedding.weight[1].normal_(std=SPREAD)


# --- Texts ---


def lesson(rng: random.Random) -> list[dict[str, str]]:
    """Messages with one or both questions about two signs that are told."""
    signs: list[str] = []
    while len(signs) < 2:
        word = words.word(rng, False)
        signs += [word] if word not in signs else []
    told = " ".join(f"Image {NUMBERS[place + 1]}: a sign that says {sign}." for place, sign in enumerate(signs))
    turns = list(turns_of(signs, rng).values())
    rng.shuffle(turns)
    return texts.messages_of(turns[: rng.randint(1, 2)], told)


def read(model: PheyeForConditionalGeneration, processor: PheyeProcessor, steps: int):
    """Let the language model of `model` read such texts, and those of `nano.language` so that it forgets nothing."""
    learner, rng = model.pheye.language_model.requires_grad_(True).train(), random.Random("texts of pairs")
    optimizers = optimizers_for(learner, learner.base_model.layers, 1e-3, 5e-4)
    for step in range(steps):
        set_learning_rates(optimizers, rate_share(step, step / steps))
        chosen = [texts.conversation(rng) if rng.random() < OLD_TEXTS else lesson(rng) for _ in range(TEXTS)]
        batch = texts.padded([encode(processor, text) for text in chosen], processor.tokenizer.pad_token_id)
        texts.learn(learner, optimizers, *(tensor.to(model.device) for tensor in batch))
    learner.requires_grad_(False).eval()


def write_reader(folder: Path, model: Path, lessons: int, device: str) -> Path:
    """`folder`, with the model in the folder `model` whose language model has read."""
    if not folder.exists():
        reader, processor = build(model, 0, device)
        read(reader, processor, lessons)
        with appear_whole(folder, force=False) as unfinished:
            reader.save_pretrained(unfinished)
            processor.save_pretrained(unfinished)
    return folder


# --- The command ---


def run(
    folder: Path,
    seed: int | None,
    *,
    model: Path,
    data: Path,
    steps: int,
    rate: float,
    pictures: list[HeldOutPicture],
    settings: dict,
    device: str,
) -> list[dict]:
    """Train with one seed, or not at all (None), and ask; the rows."""

    def trained_and_asked() -> tuple[dict, list[dict]]:
        trained, processor = build(model, seed or 0, device)
        mixture = Mixture(read_mixture([str(data)], turns=None), 0, max_images=2)
        store = FeatureStore(folder.parent / "features", mixture, processor, BATCH, 0)
        found = {}
        if seed is not None:
            tell_apart(trained)
            found = train(trained, store, steps, rate, seed)
        return found, ask(trained, processor, questions(pictures), folder.parent / "asked")

    return once(folder, settings, trained_and_asked)["rows"]


def scores_table(ways: dict[str, list[list[dict]]]) -> list[str]:
    """Right answers of each way, a list of rows for each seed."""
    kinds = {WHICH: WHICH, READ: READ, SIGN: "the sign of one picture alone"}
    lines = []
    for name, runs in ways.items():
        exact = np.mean([[is_exact(row) for row in rows] for rows in runs], axis=0)
        chosen = [exact[[row["kind"] == kind for row in runs[0]]] for kind in kinds]
        lines.append([name, *(with_interval(one.mean(), interval(one)) for one in chosen)])
    return table(["", *(f"{title} (95 % interval)" for title in kinds.values())], lines)


def pairs(
    output: Path,
    *,
    model: Path,
    lessons: int,
    steps: int,
    rate: float,
    seeds: int,
    count: int,
    drawn: int,
    device: str,
):
    """Run what has no result yet, and write the table; the arguments are the command's options."""
    settings = {"model": model, "lessons": lessons, "steps": steps, "rate": rate, "count": count, "drawn": drawn}
    settings["weights"] = weights_of(model)
    claim(output, **settings)
    data = write_pairs(output / "pairs", drawn)
    options = {"data": data, "steps": steps, "rate": rate, "settings": settings, "device": device}
    options["pictures"] = held_out_pictures(2 * count)
    ways = {"before": [run(output / "before", None, model=model, **options)]}
    if lessons:
        model = write_reader(output / "reader", model, lessons, device)
        ways["after texts"] = [run(output / "after-texts", None, model=model, **options)]
    ways["after"] = [run(output / f"after-{seed}", seed, model=model, **options) for seed in range(seeds)]
    scores = "\n".join(scores_table(ways))
    text = REPORT.format(**settings, scores=scores, seeds=seeds, machine=machine(device))
    write_atomically(output / "pairs.md", [text.encode()])
    print(text)


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.pairs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, 800)
    parser.set_defaults(rate=7e-4)
    parser.add_argument(
        "--lessons",
        type=at_least(0),
        default=500,
        help="steps of texts, for the language model (default: %(default)s)",
    )
    parser.add_argument("--count", type=at_least(3), default=300, help="held-out pairs (default: %(default)s)")
    parser.add_argument(
        "--drawn", type=at_least(BATCH), default=1900, help="pairs to learn from (default: %(default)s)"
    )
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(pairs, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
