"""Texts about pictures that nobody drew, and a step of a language model on them."""

import random
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from ...processing_pheye import CAPTION_INSTRUCTION
from ...training.collator import IGNORED
from ...training.mixture import CAPTION_INSTRUCTIONS
from ..drawing import pictures, questions, words
from ..drawing.pictures import Picture, Shape
from .checkpoints import autocast

MOST_SHAPES = max(questions.MOST_SHAPES.values())
TOLD = 0.9  # share of the texts that give the answer away


def imagined(rng: random.Random, signs: int, most_shapes: int = MOST_SHAPES) -> Picture:
    """What a picture with so many signs has in it, without the picture; without signs it has shapes."""
    picture = Picture(image=None)
    for _ in range(rng.randint(0 if signs else 1, most_shapes)):
        place = (rng.random(), rng.random())
        picture.shapes.append(Shape(rng.choice(pictures.KINDS), rng.choice(list(pictures.COLOURS)), [place]))
    for line in range(signs):
        text = words.sign_text(rng, held_out=False)
        picture.signs.append(text)
        picture.letters.append(pictures.Letter(text[0], [(0.0, float(line))] * 4, line, 0))
    return picture


def messages_of(turns: list[questions.Turn], told: str = "") -> list[dict[str, str]]:
    """Turns as messages; what is told stands before the first question."""
    said = [text for turn in turns for text in turn]
    said[0] = f"{told} {said[0]}".lstrip()
    return [
        {"role": role, "content": text} for role, text in zip(("user", "assistant") * len(turns), said, strict=True)
    ]


def lesson(rng: random.Random, most_shapes: int) -> list[dict[str, str]]:
    """One question about one to `most_shapes` shapes that are told, and its answer."""
    turns = []
    while not turns:  # nobody asks for the colour of a kind that is not there once
        picture = imagined(rng, signs=0, most_shapes=most_shapes)
        turns = questions.shape_questions(rng, picture, count=1)
    return messages_of(turns, questions.caption(picture))


def conversation(rng: random.Random) -> list[dict[str, str]]:
    """Messages about an imagined picture."""
    if rng.random() < 0.3:
        picture = imagined(rng, signs=1 if rng.random() < 0.4 else rng.randint(2, 8))
        instruction = rng.choice((CAPTION_INSTRUCTION, *CAPTION_INSTRUCTIONS))
        turns = [(instruction, questions.caption(picture))]
    else:
        picture = imagined(rng, signs=rng.choice((0, 0, 0, 1, 2, 3)))
        turns = [questions.sign_question(picture)] if picture.signs else []
        turns += questions.shape_questions(rng, picture)
        rng.shuffle(turns)
    told = ""
    if rng.random() < TOLD:
        told = ". ".join(picture.signs) if picture.signs and rng.random() < 0.25 else questions.caption(picture)
    return messages_of(turns, told)


def padded(rows: list[tuple[list[int], list[int]]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (B, T) of texts."""
    length = max(len(ids) for ids, _ in rows)
    ids = [ids + [padding] * (length - len(ids)) for ids, _ in rows]
    labels = [labels + [IGNORED] * (length - len(labels)) for _, labels in rows]
    return torch.tensor(ids), torch.tensor(labels)


def learn(model: nn.Module, optimizers: Sequence[Optimizer], ids: torch.Tensor, labels: torch.Tensor) -> float:
    """A step on texts (B, T); its loss."""
    with autocast(ids.device.type):
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()
