"""Words of Pheye-nano: what is held out stays out."""

import random

import pytest

from pheye.nano.drawing import words

pytestmark = pytest.mark.once


@pytest.mark.parametrize("held_out", [False, True])
def test_words_for_testing_never_occur_in_training(held_out):
    rng = random.Random(0)
    for _ in range(300):
        for word in words.sign_text(rng, held_out).split():
            assert len(word) < 3 or words.is_held_out(word) == held_out
        assert 3 <= len(words.word(rng, held_out, 3, 7)) <= 7
    drawn = {words.made_up_word(rng, held_out) for _ in range(300)}
    assert all(word.isupper() and word.isalpha() for word in drawn)
    assert len(words.real_words(held_out)) > 2000


def test_a_seventh_of_all_words_is_held_out():
    shares = [len(words.real_words(held_out)) for held_out in (True, False)]
    assert shares[0] / sum(shares) == pytest.approx(1 / words.HELD_OUT_EVERY, rel=0.1)
