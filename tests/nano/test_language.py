"""Pre-training of the language model, shortened: its tokenizer and its texts."""

import random

import pytest
import torch

from pheye import PheyeImageProcessor, PheyeProcessor
from pheye.nano import language
from pheye.nano.drawing import questions
from pheye.nano.learning import texts

pytestmark = pytest.mark.once


def test_signs_are_written_letter_by_letter_and_everything_else_word_by_word(small):
    tokenizer = language.train_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(
        tokenizer("Instruction: How many circles are there? AIHOW 10")["input_ids"]
    )
    expected = ["Instruction", ":", "ĠHow", "Ġmany", "Ġcircles", "Ġare", "Ġthere", "?", "Ġ", *"AIHOW", "Ġ", *"10"]
    assert tokens == expected
    assert tokenizer.convert_ids_to_tokens(tokenizer("FRESH BREAD")["input_ids"]) == [*"FRESH", "Ġ", *"BREAD"]
    text = "A blue circle and a sign that says ÄÖ 7."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    processor = PheyeProcessor(PheyeImageProcessor(), tokenizer)
    prompt = processor.apply_chat_template([{"role": "user", "content": questions.SIGN}], add_generation_prompt=True)
    assert len(tokenizer(prompt)["input_ids"]) < len(prompt) / 3


def test_lessons_ask_one_question_about_few_shapes_that_they_tell():
    kinds = set()
    for seed in range(60):
        question, answer = texts.lesson(random.Random(seed), most_shapes=1 + seed % 2)
        told, asked = question["content"].split(". ")
        shapes = told.lower().split(" and ")
        assert 1 <= len(shapes) <= 1 + seed % 2 and asked.endswith("?")
        kind = asked.rstrip("?").removesuffix("s are there").split()[-1]
        found = [shape.split()[1] for shape in shapes if shape.split()[2] == kind]
        expected = {"How": questions.NUMBERS[len(found)], "Is": "yes" if found else "no", "What": "".join(found)}
        assert answer["content"] == expected[asked.split()[0]]
        kinds.add(asked.split()[0])
    assert kinds == {"How", "Is", "What"}


def test_lessons_come_first_in_larger_batches(small, monkeypatch):
    monkeypatch.setattr(language, "LESSON", 1)
    processor = PheyeProcessor(PheyeImageProcessor(), language.train_tokenizer())
    for step in range(language.MOST_SHAPES):
        ids, labels = language.batch_of(processor, 0, step)
        assert ids.shape == labels.shape and len(ids) == language.SORTED * language.BATCH
        shown = [text.split("Instruction:")[1:] for text in processor.tokenizer.batch_decode(ids)]
        assert all(len(turns) == 1 for turns in shown) and len({turn for (turn,) in shown}) > 1
        told = [turn.split(". ")[0].replace(" and ", ", ").count(", ") + 1 for (turn,) in shown]
        assert max(told) <= step + 1 and (step == 0 or max(told) > 1)
    assert len(language.batch_of(processor, 0, language.MOST_SHAPES)[0]) == language.BATCH


@pytest.mark.parametrize("workers", [0, 2])
def test_texts_made_by_other_processes_are_the_same_and_in_order(workers, small):
    processor = PheyeProcessor(PheyeImageProcessor(), language.train_tokenizer())
    first = language.LESSON * language.MOST_SHAPES - 3  # in the middle of a group, and from lessons to conversations
    steps = range(first, first + 6)
    found = list(language.batches(processor, 0, steps, workers))
    assert len(found) == len(steps)
    for step, batch in zip(steps, found, strict=True):
        assert all(
            torch.equal(one, other) for one, other in zip(batch, language.batch_of(processor, 0, step), strict=True)
        )


def test_texts_give_many_answers_away(small):
    told = 0
    for seed in range(100):
        first, answer = texts.conversation(random.Random(seed))[:2]
        word = answer["content"].removesuffix(".").split()[-1]
        told += word.isupper() and word in first["content"]
    assert 10 < told < 60
