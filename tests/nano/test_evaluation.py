"""The evaluation of Pheye-nano: what is asked, how it is counted, and the command from end to end."""

import json
from functools import partial

import pytest
from PIL import Image

from pheye.nano import evaluation, questions, words
from pheye.nano.evaluation import SHAPES, SIGN

from tiny import tiny_model, tiny_processor

pytestmark = pytest.mark.once


def row(answer: str | None, reference: str, kind: str = SIGN, tertile: str = "small", question: str = "") -> dict:
    given = {"error": "broken"} if answer is None else {"answer": answer}
    return {**given, "reference": reference, "kind": kind, "tertile": tertile, "question": question}


def test_held_out_pictures_show_one_word_that_training_never_sees():
    for sample in evaluation.held_out_samples(4):
        picture = evaluation.draw(sample.index)
        assert picture.signs == [sample.word] and words.is_held_out(sample.word)
        assert evaluation.LETTERS[0] <= len(sample.word) <= evaluation.LETTERS[1]
        assert 0.9 * evaluation.CAP_HEIGHTS[0] < sample.cap_height < 1.1 * evaluation.CAP_HEIGHTS[1]
        assert sample.image().tobytes() == picture.image.tobytes()
        assert sample.image(32).size == (32, 32)
        question, answer = sample.shape_question
        assert question.endswith("?") and answer in (*questions.NUMBERS, "yes", "no", *nano_colours())


def nano_colours() -> tuple[str, ...]:
    from pheye.nano.pictures import COLOURS

    return tuple(COLOURS)


def test_tertiles_have_equal_sizes_and_go_by_letter_height():
    samples = [
        evaluation.Sample(index, "WORD", height, ("", "")) for index, height in enumerate((0.05, 0.03, 0.06, 0.04))
    ]
    assert evaluation.tertiles_of(samples[:3]) == ["medium", "small", "large"]
    assert evaluation.tertiles_of(samples) == ["medium", "small", "large", "small"]


def test_scores_count_errors_as_wrong():
    rows = [
        row("HOUSE", "HOUSE"),
        row(" HOSE ", "HOUSE", tertile="medium"),  # one letter of five is missing
        row(None, "CAT", tertile="large"),
        row("two", "two", SHAPES, question="How many stars are there?"),
        row("red", "blue", SHAPES, question="What colour is the star?"),
    ]
    found = evaluation.scores(rows)
    assert found[SIGN]["questions"] == 3 and found[SIGN]["exact"] == pytest.approx(1 / 3, abs=1e-3)
    assert found[SIGN]["character_error"] == pytest.approx((0 + 1 + 3) / 13, abs=1e-3)
    assert [found["by_tertile"][name]["exact"] for name in evaluation.TERTILES] == [1, 0, 0]
    assert found[SHAPES]["exact"] == 0.5 and found["how many"]["exact"] == 1 and found["what colour"]["exact"] == 0
    assert "is there" not in found
    assert any("33.3 %" in line for line in evaluation.scores_table(found))


def test_questions_about_shapes_are_asked_of_the_whole_picture_only():
    samples = evaluation.held_out_samples(3)
    assert [request.fields["kind"] for request in evaluation.requests_of(samples, None)] == [SIGN, SHAPES] * 3
    reduced = evaluation.requests_of(samples, 64)
    assert [request.fields["kind"] for request in reduced] == [SIGN] * 3
    assert isinstance(reduced[0].image, partial) and reduced[0].image().size == (64, 64)


def test_the_command_writes_tables_and_plot_and_goes_on_where_it_stopped(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    command = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    command += ["--count", "3", "--reduced", "64", "--batch_size", "2", "--workers", "0"]
    assert evaluation.main(command) == 0
    result = json.loads((tmp_path / "out" / "nano.json").read_text())
    assert result["inputs"].keys() == {"full", "reduced to 64"} and result["pictures"] == 3
    assert result["inputs"]["full"][SIGN]["questions"] == result["inputs"]["full"][SHAPES]["questions"] == 3
    assert [len(group["global_share"]) for group in result["attention"]["tertiles"]] == [2, 2, 2]
    text = (tmp_path / "out" / "nano.md").read_text()
    assert "reduced to 64" in text and "| what is written on the sign | 3 |" in text
    assert Image.open(tmp_path / "out" / "nano.png").width > 500
    answers = tmp_path / "out" / "answers-full.jsonl"
    written = answers.stat().st_mtime_ns
    assert evaluation.main(command) == 0
    assert answers.stat().st_mtime_ns == written
