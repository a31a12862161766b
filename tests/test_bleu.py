import random

import pytest

pytest.importorskip("sacrebleu")

from pheye.evaluation.metrics.bleu import bleu, bleu_of_tokens

pytestmark = pytest.mark.once


def random_corpus(seed: int):
    """Candidates from empty to longer than their references, of which there are one to five."""
    generator = random.Random(seed)
    words = [f"w{i}" for i in range(generator.choice([3, 8, 30]))]

    def sentence(shortest: int) -> list[str]:
        return generator.choices(words, k=generator.randint(shortest, 12))

    size = generator.choice([2, 7, 40])
    references = [[sentence(1) for _ in range(generator.randint(1, 5))] for _ in range(size)]
    return [sentence(4), *(sentence(0) for _ in range(size - 1))], references


@pytest.mark.parametrize("seed", range(30))
def test_score_is_that_of_pycocoevalcap_on_the_same_words(seed):
    theirs = pytest.importorskip("pycocoevalcap.bleu.bleu")
    candidates, references = random_corpus(seed)
    expected, _ = theirs.Bleu(4).compute_score(
        {i: [" ".join(words) for words in group] for i, group in enumerate(references)},
        {i: [" ".join(words)] for i, words in enumerate(candidates)},
        verbose=0,
    )
    assert bleu_of_tokens(candidates, references) == pytest.approx(expected[3], abs=1e-6)


def test_words_are_cut_as_for_cider():
    assert bleu(["It's a dog, isn't it"], [["it's a DOG isn't it!"]]) == pytest.approx(1)


def test_candidates_without_four_words_score_nothing():
    assert bleu(["a red dog"], [["a red dog"]]) == 0


@pytest.mark.parametrize("candidates, references", [([], []), (["a"], []), (["a", "b"], [["a"], []])])
def test_missing_captions_are_refused(candidates, references):
    with pytest.raises(ValueError, match="at least one candidate and one reference for each"):
        bleu(candidates, references)
