"""Questions about drawn pictures."""

import random

import pytest

from pheye.nano.drawing import questions
from pheye.nano.drawing.pictures import Letter, Picture, Shape
from pheye.processing_pheye import CAPTION_INSTRUCTION

pytestmark = pytest.mark.once


def shape(kind: str, colour: str, x: float) -> Shape:
    return Shape(kind, colour, [(x, 0.0)])


def picture(*signs: str) -> Picture:
    """An orange star between two circles; signs from bottom to top."""
    letters = [Letter(text[0], [(0.0, 100.0 - line)] * 4, line, 0) for line, text in enumerate(signs)]
    shapes = [shape("circle", "red", 9.0), shape("circle", "blue", 1.0), shape("star", "orange", 5.0)]
    return Picture(None, shapes, list(signs), letters)


def test_captions_name_shapes_from_left_to_right_and_signs_from_top_to_bottom():
    assert questions.caption(picture("HELLO")) == (
        "A blue circle, an orange star, a red circle and a sign that says HELLO."
    )
    assert questions.caption(picture("ONE", "TWO")).endswith("a red circle and signs that say TWO and ONE.")
    assert questions.caption(Picture(None, [], ["HI"], picture("HI").letters)) == "A sign that says HI."


def test_questions_about_shapes():
    shapes = picture().shapes
    assert questions.count_question("circle", shapes) == ("How many circles are there?", "two")
    assert questions.count_question("square", shapes) == ("How many squares are there?", "zero")
    assert questions.presence_question("star", shapes) == ("Is there a star?", "yes")
    assert questions.presence_question("triangle", shapes) == ("Is there a triangle?", "no")
    assert questions.colour_question("star", shapes) == ("What colour is the star?", "orange")
    assert questions.colour_question("circle", shapes) is None  # which of them?
    for seed in range(20):
        turns = questions.shape_questions(random.Random(seed), picture())
        assert len(set(turns)) == len(turns) and 6 <= len(turns) <= questions.SHAPE_QUESTIONS
        assert len(questions.shape_questions(random.Random(seed), picture(), 1)) == 1


def test_there_is_a_question_where_no_colour_can_be_asked_for():
    nothing = Picture(None, [], ["HI"], [])
    assert all(len(questions.shape_questions(random.Random(seed), nothing, 1)) == 1 for seed in range(500))


def test_the_question_about_signs():
    assert questions.sign_question(picture("HELLO YOU")) == (questions.SIGN, "HELLO YOU")
    assert questions.sign_question(picture("ONE", "TWO")) == (questions.SIGNS, "TWO, ONE")


def test_captions_stand_alone():
    for stage in ("describe", "instruct", "tasks"):
        for seed in range(4):
            _, turns = questions.stage_picture(stage, random.Random(seed))
            asked = [question for question, _ in turns]
            assert CAPTION_INSTRUCTION not in asked or len(asked) == 1


def test_colours_are_asked_for_last_lest_they_tell_how_many_there_are():
    numbers = 0
    for seed in range(20):
        _, turns = questions.stage_picture("tasks", random.Random(seed))
        asked = [question.startswith(questions.COLOUR) for question, _ in turns]
        assert asked == sorted(asked)
        numbers += sum(asked)
    assert numbers > 10


@pytest.mark.parametrize("stage", ["describe", "instruct", "tasks"])
def test_pictures_of_a_stage_have_as_many_shapes_and_signs_as_it_says(stage):
    drawn = [questions.stage_picture(stage, random.Random(seed))[0] for seed in range(60)]
    assert {len(picture.signs) for picture in drawn} == set(range(1, questions.MOST_SIGNS[stage] + 1))
    assert max(len(picture.shapes) for picture in drawn) == questions.MOST_SHAPES[stage]
