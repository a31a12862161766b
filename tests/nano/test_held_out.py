"""The held-out pictures: what is asked, and how it is counted."""

from functools import partial

import pytest

from pheye.nano import held_out, pictures, questions, words
from pheye.nano.held_out import SHAPES, SIGN

pytestmark = pytest.mark.once


def row(answer: str | None, reference: str, kind: str = SIGN, tertile: str = "small", question: str = "") -> dict:
    given = {"error": "broken"} if answer is None else {"answer": answer}
    return {**given, "reference": reference, "kind": kind, "tertile": tertile, "question": question}


def test_held_out_pictures_show_one_word_that_training_never_sees():
    for picture in held_out.held_out_pictures(4):
        drawn = held_out.draw(picture.index)
        assert drawn.signs == [picture.word] and words.is_held_out(picture.word)
        assert held_out.LETTERS[0] <= len(picture.word) <= held_out.LETTERS[1]
        assert 0.9 * held_out.CAP_HEIGHTS[0] < picture.cap_height < 1.1 * held_out.CAP_HEIGHTS[1]
        assert picture.image().tobytes() == drawn.image.tobytes()
        assert picture.image(32).size == (32, 32)
        question, answer = picture.shape_question
        assert question.endswith("?") and answer in (*questions.NUMBERS, "yes", "no", *pictures.COLOURS)


def test_zoomed_pictures_have_fewer_pixels_and_higher_letters():
    whole, *zoomed = (held_out.held_out_pictures(1, zoom)[0] for zoom in (1, 1.5, 3))
    for picture in zoomed:
        drawn = held_out.draw(0, picture.zoom)
        assert drawn.signs == [whole.word] == [picture.word]
        assert picture.cap_height == pytest.approx(picture.zoom * whole.cap_height, rel=0.2)
        sides = zip(drawn.image.size, held_out.draw(0).image.size, strict=True)
        assert all(side == pytest.approx(larger / picture.zoom, abs=2) for side, larger in sides)


def test_tertiles_have_equal_sizes_and_go_by_letter_height():
    drawn = [
        held_out.HeldOutPicture(index, "WORD", height, ("", ""))
        for index, height in enumerate((0.05, 0.03, 0.06, 0.04))
    ]
    assert held_out.tertiles_of(drawn[:3]) == ["medium", "small", "large"]
    assert held_out.tertiles_of(drawn) == ["medium", "small", "large", "small"]


def test_equal_heights_go_by_the_order_of_the_pictures():
    heights = (0.04, 0.03, 0.04, 0.04, 0.03, 0.04, 0.04)
    drawn = [held_out.HeldOutPicture(index, "WORD", height, ("", "")) for index, height in enumerate(heights)]
    expected = ["small", "small", "medium", "medium", "small", "large", "large"]
    assert held_out.tertiles_of(drawn) == expected
    assert held_out.tertiles_of(drawn[2:]) == ["small", "medium", "small", "medium", "large"]


def test_scores_count_errors_as_wrong():
    rows = [
        row("HOUSE", "HOUSE"),
        row(" HOSE ", "HOUSE", tertile="medium"),  # one letter of five is missing
        row(None, "CAT", tertile="large"),
        row("two", "two", SHAPES, question="How many stars are there?"),
        row("red", "blue", SHAPES, question="What colour is the star?"),
    ]
    found = held_out.scores(rows)
    assert found[SIGN]["questions"] == 3 and found[SIGN]["exact"] == pytest.approx(1 / 3, abs=1e-3)
    assert found[SIGN]["character_error"] == pytest.approx((0 + 1 + 3) / 13, abs=1e-3)
    assert [found["by_tertile"][name]["exact"] for name in held_out.TERTILES] == [1, 0, 0]
    assert found[SHAPES]["exact"] == 0.5 and found["how many"]["exact"] == 1 and found["what colour"]["exact"] == 0
    assert "is there" not in found


def test_questions_about_shapes_are_asked_of_the_whole_picture_only():
    drawn = held_out.held_out_pictures(3)
    assert [request.fields["kind"] for request in held_out.requests_of(drawn, None)] == [SIGN, SHAPES] * 3
    reduced = held_out.requests_of(drawn, 64)
    assert [request.fields["kind"] for request in reduced] == [SIGN] * 3
    assert isinstance(reduced[0].image, partial) and reduced[0].image().size == (64, 64)
