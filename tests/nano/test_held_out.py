"""The held-out pictures: what is asked, and how it is counted."""

from functools import partial

import pytest

from pheye.nano import evaluate, held_out, questions, words
from pheye.nano.held_out import SHAPES, SIGN

pytestmark = pytest.mark.once


def row(answer: str | None, reference: str, kind: str = SIGN, tertile: str = "small", question: str = "") -> dict:
    given = {"error": "broken"} if answer is None else {"answer": answer}
    return {**given, "reference": reference, "kind": kind, "tertile": tertile, "question": question}


def test_held_out_pictures_show_one_word_that_training_never_sees():
    for sample in held_out.held_out_samples(4):
        picture = held_out.draw(sample.index)
        assert picture.signs == [sample.word] and words.is_held_out(sample.word)
        assert held_out.LETTERS[0] <= len(sample.word) <= held_out.LETTERS[1]
        assert 0.9 * held_out.CAP_HEIGHTS[0] < sample.cap_height < 1.1 * held_out.CAP_HEIGHTS[1]
        assert sample.image().tobytes() == picture.image.tobytes()
        assert sample.image(32).size == (32, 32)
        question, answer = sample.shape_question
        assert question.endswith("?") and answer in (*questions.NUMBERS, "yes", "no", *nano_colours())


def nano_colours() -> tuple[str, ...]:
    from pheye.nano.pictures import COLOURS

    return tuple(COLOURS)


def test_tertiles_have_equal_sizes_and_go_by_letter_height():
    samples = [
        held_out.Sample(index, "WORD", height, ("", "")) for index, height in enumerate((0.05, 0.03, 0.06, 0.04))
    ]
    assert held_out.tertiles_of(samples[:3]) == ["medium", "small", "large"]
    assert held_out.tertiles_of(samples) == ["medium", "small", "large", "small"]


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
    assert any("33.3 %" in line for line in evaluate.scores_table(found))


def test_questions_about_shapes_are_asked_of_the_whole_picture_only():
    samples = held_out.held_out_samples(3)
    assert [request.fields["kind"] for request in held_out.requests_of(samples, None)] == [SIGN, SHAPES] * 3
    reduced = held_out.requests_of(samples, 64)
    assert [request.fields["kind"] for request in reduced] == [SIGN] * 3
    assert isinstance(reduced[0].image, partial) and reduced[0].image().size == (64, 64)
