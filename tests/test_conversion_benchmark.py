"""`python -m pheye.benchmarks.conversion` on a tiny model."""

import json
import sys

import pytest

from pheye.benchmarks import conversion as benchmark

from conversion_fixtures import small_config

pytestmark = pytest.mark.once


@pytest.mark.slow
def test_the_benchmark_measures_and_cleans_up(tmp_path, capsys):
    benchmark.main(["--workdir", str(tmp_path), "--repeats", "1"], small_config())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["benchmark"] == "conversion"
    for name in benchmark.ROWS:
        assert result[name]["conversion_s"] > result[name]["copy_s"] >= 0
    if sys.platform == "linux":
        assert 0.05 < result["peak_gb"] < 1.5
    assert list(tmp_path.iterdir()) == []
