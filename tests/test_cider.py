import random

import numpy as np
import pytest

from pheye.evaluation.metrics.cider import cider, cider_of_tokens

pytestmark = pytest.mark.once


def random_corpus(seed: int):
    """Few words, so that they repeat within captions and across images; candidates may be empty."""
    generator = random.Random(seed)
    words = [f"w{i}" for i in range(generator.choice([2, 6, 30]))]

    def sentence(shortest: int) -> list[str]:
        return generator.choices(words, k=generator.randint(shortest, 14))

    size = generator.choice([1, 2, 7, 40])
    references = [[sentence(1) for _ in range(generator.randint(1, 5))] for _ in range(size)]
    return [sentence(0) for _ in range(size)], references


@pytest.mark.parametrize("seed", range(30))
def test_scores_are_those_of_pycocoevalcap_on_the_same_words(seed):
    theirs = pytest.importorskip("pycocoevalcap.cider.cider")
    candidates, references = random_corpus(seed)
    expected, each = theirs.Cider().compute_score(
        {i: [" ".join(words) for words in group] for i, group in enumerate(references)},
        {i: [" ".join(words)] for i, words in enumerate(candidates)},
    )
    score, scores = cider_of_tokens(candidates, references)
    assert score == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(scores, each, rtol=0, atol=1e-6)


def test_golden_scores_of_captions():
    golden = [4.621251720107896, 4.862593387743584, 0.0]  # from pycocoevalcap 1.2 with its Java tokenizer
    score, scores = cider(
        ["A man's dog can't swim.", "two RED buses, at 5 p.m.", ""],
        [
            ["The man's dog can't swim!", "a dog that cannot swim"],
            ["Two red-and-white buses at 5 p.m.", "two red buses"],
            ["an empty street", "Nobody is here."],
        ],
    )
    np.testing.assert_allclose(scores, golden, rtol=0, atol=1e-6)
    assert score == pytest.approx(np.mean(golden), abs=1e-6)


def test_a_single_image_scores_nothing():
    # Every n-gram of its references stands in every image there is, so none tells anything.
    assert cider(["a dog"], [["a dog"]])[0] == 0


@pytest.mark.parametrize("candidates, references", [([], []), (["a"], []), (["a", "b"], [["a"], []])])
def test_missing_captions_are_refused(candidates, references):
    with pytest.raises(ValueError, match="at least one candidate and one reference for each"):
        cider(candidates, references)
