"""How sure a mean, or another statistic, is, from its samples."""

from collections.abc import Callable

import numpy as np


def confidence_interval(
    scores: list[float] | np.ndarray,
    level: float = 0.95,
    repeats: int = 1000,
    seed: int = 0,
    statistic: Callable[[np.ndarray], float] | None = None,
) -> tuple[float, float]:
    """Percentiles of the mean over `repeats` draws, with replacement, of as many scores as there are; or of another
    `statistic` of samples (their number, ...). Draws in which it is NaN do not count.

    For CIDEr these are the scores of the samples in the whole corpus: how rare an n-gram is stays as it was found
    there, and is not counted anew in each draw.
    """
    scores = np.asarray(scores, dtype=float)
    if not scores.size or (scores.ndim != 1 and statistic is None):
        raise ValueError(f"A confidence interval needs a list of at least one score, not the shape {scores.shape}.")
    generator = np.random.default_rng(seed)
    statistic, count = statistic or np.mean, len(scores)
    found = [statistic(scores[generator.integers(count, size=count)]) for _ in range(repeats)]
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
