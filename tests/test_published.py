"""Table 1 of the paper: every published Pheye has a score on every benchmark, and tasks of those names exist."""

import pytest

from pheye.common.published import PUBLISHED
from pheye.configuration_pheye import VARIANTS
from pheye.evaluation.tasks import TASKS

pytestmark = pytest.mark.once


def test_every_variant_has_a_score_on_every_benchmark():
    assert list(PUBLISHED) == ["vqav2", "nocaps", "textvqa", "textcaps"]
    for published in PUBLISHED.values():
        assert [name for name in published.scores if name.startswith("Pheye-")] == [
            f"Pheye-{name}" for name in VARIANTS
        ]
        assert all(published.of_variant(name) == published.scores[f"Pheye-{name}"] for name in VARIANTS)


def test_every_benchmark_is_a_task():
    assert PUBLISHED.keys() <= TASKS.keys()
