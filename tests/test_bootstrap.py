import numpy as np
import pytest

from pheye.evaluation.metrics.bootstrap import confidence_interval

pytestmark = pytest.mark.once


def test_interval_is_that_of_the_normal_approximation():
    scores = np.random.default_rng(1).normal(0.5, 0.2, 400)
    error = scores.std() / np.sqrt(scores.size)
    low, high = confidence_interval(scores, repeats=4000)
    assert (low, high) == pytest.approx((scores.mean() - 1.96 * error, scores.mean() + 1.96 * error), abs=0.1 * error)
    inner_low, inner_high = confidence_interval(scores, level=0.5, repeats=4000)
    assert inner_high - inner_low == pytest.approx(2 * 0.674 * error, rel=0.1)


def test_the_same_seed_gives_the_same_interval():
    scores = np.random.default_rng(1).random(50)
    assert confidence_interval(scores) == confidence_interval(list(scores))
    assert confidence_interval(scores) != confidence_interval(scores, seed=1)


def test_equal_scores_leave_no_doubt():
    assert confidence_interval([0.5] * 7) == (0.5, 0.5)


def test_another_statistic_is_drawn_from_whole_samples():
    samples = np.random.default_rng(1).random((300, 2)) * [1, 2]

    def ratio(drawn):
        return drawn[:, 0].sum() / drawn[:, 1].sum()

    low, high = confidence_interval(samples, repeats=4000, statistic=ratio)
    # By the delta method.
    error = (samples[:, 0] - ratio(samples) * samples[:, 1]).std() / samples[:, 1].mean() / np.sqrt(300)
    assert (low, high) == pytest.approx(
        (ratio(samples) - 1.96 * error, ratio(samples) + 1.96 * error), abs=0.1 * error
    )
    assert confidence_interval(samples[:, 0]) == confidence_interval(
        samples, statistic=lambda drawn: drawn[:, 0].mean()
    )
    # A draw without anything to divide by says nothing.
    assert confidence_interval([[1.0, 0.0], [1.0, 1.0]], statistic=lambda drawn: drawn[:, 1].max() or np.nan) == (1, 1)


@pytest.mark.parametrize("scores", [[], [[1.0]]])
def test_no_scores_are_refused(scores):
    with pytest.raises(ValueError, match="at least one score"):
        confidence_interval(scores)
