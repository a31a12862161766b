"""CIDEr-D (Vedantam et al., 2015) as pycocoevalcap's `Cider` computes it, without Java."""

from collections import Counter

import numpy as np

from .ptb import tokenize

ORDERS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of the Gaussian penalty on the difference of lengths


def count_ngrams(words: list[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(words[start : start + n]) for n in range(1, ORDERS + 1) for start in range(len(words) - n + 1)
    )


class Weights:
    """The tf-idf weights of one caption's n-grams, their norm per order, and its length in words."""

    def __init__(self, counts: Counter, idf: dict, unseen: float):
        self.by_ngram = {ngram: count * idf.get(ngram, unseen) for ngram, count in counts.items()}
        squares = np.zeros(ORDERS)
        for ngram, weight in self.by_ngram.items():
            squares[len(ngram) - 1] += weight**2
        self.norms = np.sqrt(squares)  # (ORDERS,)
        self.length = sum(count for ngram, count in counts.items() if len(ngram) == 1)


def similarity(candidate: Weights, reference: Weights) -> np.ndarray:
    """Cosine per order, the candidate's weights clipped to the reference's, times the penalty on lengths."""
    products = np.zeros(ORDERS)
    for ngram, weight in candidate.by_ngram.items():
        other = reference.by_ngram.get(ngram)
        if other is not None:
            products[len(ngram) - 1] += min(weight, other) * other
    norms = candidate.norms * reference.norms
    cosines = np.divide(products, norms, out=np.zeros(ORDERS), where=norms != 0)
    return cosines * np.exp(-((candidate.length - reference.length) ** 2) / (2 * SIGMA**2))  # (ORDERS,)


def cider_of_tokens(candidates: list[list[str]], references: list[list[list[str]]]) -> tuple[float, np.ndarray]:
    """`cider` of captions cut into words already."""
    if len(candidates) != len(references) or not candidates or not all(references):
        raise ValueError(
            f"CIDEr needs at least one candidate and one reference for each, not {len(candidates)} candidates and "
            f"references for {sum(map(bool, references))}."
        )
    counted = [[count_ngrams(words) for words in group] for group in references]
    frequency = Counter(ngram for group in counted for ngram in set().union(*group))
    unseen = np.log(len(counted))
    idf = {ngram: unseen - np.log(count) for ngram, count in frequency.items()}
    scores = []
    for words, group in zip(candidates, counted, strict=True):
        candidate = Weights(count_ngrams(words), idf, unseen)
        scores.append(10 * np.mean([similarity(candidate, Weights(counts, idf, unseen)) for counts in group]))
    return float(np.mean(scores)), np.array(scores)


def cider(candidates: list[str], references: list[list[str]]) -> tuple[float, np.ndarray]:
    """Score of the corpus, the mean, and of each candidate, on pycocoevalcap's scale; tables print 100 times that.

    How rare an n-gram is comes from `references`, so a score belongs to its corpus: a part of the samples, or a single
    one, scores otherwise.

    Raises:
        ValueError: if there is no candidate, or no reference for one.
    """
    tokens = [[tokenize(caption) for caption in group] for group in references]
    return cider_of_tokens([tokenize(caption) for caption in candidates], tokens)
