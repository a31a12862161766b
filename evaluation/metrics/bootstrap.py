"""How sure a mean is, from its samples."""

import numpy as np


def confidence_interval(
    scores: list[float] | np.ndarray, level: float = 0.95, repeats: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentiles of the mean over `repeats` draws, with replacement, of as many scores as there are.

    For CIDEr these are the scores of the samples in the whole corpus: how rare an n-gram is stays as it was found
    there, and is not counted anew in each draw.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 1 or not scores.size:
        raise ValueError(f"A confidence interval needs a list of at least one score, not the shape {scores.shape}.")
    generator = np.random.default_rng(seed)
    means = [scores[generator.integers(scores.size, size=scores.size)].mean() for _ in range(repeats)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
