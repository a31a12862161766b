"""The held-out pictures: what is asked, and how it is counted."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
from PIL import Image

from pheye.nano.drawing import pictures, questions, words
from pheye.nano.learning.picture_labels import crossing
from pheye.nano.scoring import held_out
from pheye.nano.scoring.held_out import FINE, MAIN, SHAPES, SIGN

pytestmark = pytest.mark.once


def row(answer: str | None, reference: str, kind: str = SIGN, tertile: str = "small", question: str = "") -> dict:
    given = {"error": "broken"} if answer is None else {"answer": answer}
    return {**given, "reference": reference, "kind": kind, "tertile": tertile, "question": question}


def test_held_out_pictures_show_one_word_that_training_never_sees():
    for picture in held_out.held_out_pictures(4):
        drawn = held_out.draw(picture.index)
        assert drawn.signs == [picture.word] and words.is_held_out(picture.word)
        assert held_out.LETTERS[0] <= len(picture.word) <= held_out.LETTERS[1]
        low, high = held_out.CAP_HEIGHTS[MAIN]
        assert 0.9 * low < picture.cap_height < 1.1 * high
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


# Number and set of a picture, then its word, size, height of capitals, first letter's place, shapes and mean colour.
KNOWN = [
    (0, MAIN, "UNRULY", (865, 1074), 0.0298, (146, 785), "yellow triangle, blue square", (139, 65, 37)),
    (1, MAIN, "AWAITS", (1113, 612), 0.0261, (459, 582), "yellow star, blue star, purple star", (72, 165, 90)),
    (
        250,
        MAIN,
        "FRIDRE",
        (468, 786),
        0.0344,
        (127, 523),
        "orange star, green star, red star, green star",
        (83, 22, 33),
    ),
    (999, MAIN, "DIES", (1225, 732), 0.0301, (726, 357), "green star, white star, yellow circle", (115, 220, 205)),
    (999, FINE, "CURES", (686, 724), 0.0235, (364, 174), "blue circle, green circle", (144, 225, 187)),
]


@pytest.mark.parametrize(("index", "letters", "word", "size", "height", "place", "shapes", "colour"), KNOWN)
def test_held_out_pictures_stay_the_same(index, letters, word, size, height, place, shapes, colour):
    # Or else published scores can no longer be compared.
    drawn = held_out.draw(index, letters=letters)
    assert (drawn.signs, drawn.image.size) == ([word], size)
    assert drawn.cap_height == pytest.approx(height, abs=1e-4)
    assert drawn.letters[0].corners[0] == pytest.approx(place, abs=1)
    assert ", ".join(f"{shape.colour} {shape.kind}" for shape in drawn.shapes) == shapes
    assert drawn.image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) == pytest.approx(colour, abs=2)


def test_fine_letters_are_finer_and_have_enough_pixels_to_be_read():
    for picture in held_out.held_out_pictures(3, letters=FINE, tiles_per_side=3):
        low, high = held_out.CAP_HEIGHTS[FINE]
        assert 0.9 * low < picture.cap_height < 1.1 * high
        assert round(picture.cap_height * picture.image().height) >= 8
        assert picture.crosses == crossing(held_out.draw(picture.index, letters=FINE), 3).any()
        assert held_out.draw(picture.index).signs != [picture.word]
    asked = held_out.requests_of(held_out.held_out_pictures(3, letters=FINE, tiles_per_side=3), None)
    assert [request.fields["kind"] for request in asked] == [SIGN] * 3
    assert all(isinstance(request.fields["crosses"], bool) for request in asked)
    assert asked[0].image().tobytes() == held_out.draw(0, letters=FINE).image.tobytes()


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


def test_an_interval_is_that_of_a_known_distribution():
    exact = np.array([1.0] * 320 + [0.0] * 80)
    low, high = held_out.interval(exact)
    error = math.sqrt(0.8 * 0.2 / 400)
    assert (low, high) == pytest.approx((0.8 - 1.96 * error, 0.8 + 1.96 * error), abs=0.004)


@pytest.mark.parametrize("count", [500, 7])
def test_an_interval_of_none_or_all_is_the_exact_one(count):
    low, high = held_out.share_interval([0.0] * count)
    assert low == 0 and (1 - high) ** count == pytest.approx(0.025, rel=0.05)
    assert held_out.share_interval(np.ones(count)) == pytest.approx([1 - high, 1])
    some = [0.0, 1.0, 1.0, 0.5]
    assert held_out.share_interval(some) == held_out.interval(some)


def test_what_is_kept_counts_words_read_in_full_pictures():
    def rows(*answers):
        return [{**row(answer, "CAT"), "id": index} for index, answer in enumerate(answers)]

    full = rows("CAT", "CAT", "COT", "CAT", None, "CAT")
    reduced = rows("CAT", "CT", "CAT", "", "", "CAT")[::-1]
    found = held_out.kept(full, reduced)
    assert found["share"] == 0.75  # three are read when reduced, four in full
    assert 0 <= found["interval"][0] < 0.75 < found["interval"][1]
    assert held_out.kept(rows(None, "COT"), rows("CAT", "CAT")) is None


def word_row(word: str, height: float, crosses: bool, is_read: bool = True) -> dict:
    return {**row(word if is_read else "", word), "cap_height": height, "crosses": crosses}


def test_pairs_are_as_many_and_as_like_as_can_be():
    rng = np.random.default_rng(0)
    for _ in range(20):
        heights = rng.uniform(0.025, 0.04, 7).round(5).tolist()
        rows = [word_row("CAT", height, place < 3) for place, height in enumerate(heights)]
        found = held_out.pairs_across_and_inside(rows)
        across, inside = heights[:3], heights[3:]

        def worth(chosen, across=across, inside=inside):
            apart = [abs(math.log(one / inside[place])) for one, place in zip(across, chosen, strict=True)]
            like = [distance for distance in apart if distance <= math.log(held_out.LIKE)]
            return len(like), -sum(distance**2 for distance in like)

        best = max(worth(chosen) for chosen in itertools.permutations(range(4), 3))
        apart = [abs(math.log(one["cap_height"] / other["cap_height"])) for one, other in found]
        assert (len(found), -sum(distance**2 for distance in apart)) == pytest.approx(best)
        assert all(one["crosses"] and not other["crosses"] for one, other in found)


def test_words_across_a_border_are_compared_with_like_words_inside():
    rows = [
        word_row("HOTEL", 0.030, True, is_read=False),
        word_row("HOUSE", 0.031, False),
        word_row("MOUSE", 0.060, False),  # like none
        word_row("CAT", 0.030, True),
        word_row("DOG", 0.050, True, is_read=False),  # like none
        word_row("COW", 0.030, False),
        row("two", "two", SHAPES),
    ]
    found = held_out.border_scores(rows)
    assert found["across"] == {"words": 3, "exact": 0.3333, "paired": 0.5, "paired_height": 0.03}
    assert found["inside"] == {"words": 3, "exact": 1.0, "paired": 1.0, "paired_height": 0.0305}
    assert found["pairs"] == 2 and found["difference"] == {"share": -0.5, "interval": [-1.0, 0.0]}


def test_without_like_words_there_is_no_difference():
    found = held_out.border_scores([word_row("CAT", 0.03, False), word_row("HOTEL", 0.03, False)])
    assert found == {"across": {"words": 0, "exact": None}, "inside": {"words": 2, "exact": 1.0}, "pairs": 0}
