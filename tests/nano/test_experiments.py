"""All ways of training Pheye-nano are trained and asked, on tiny parts."""

import json

import pytest

from pheye.nano import draw_data
from pheye.nano.experiments import main
from pheye.nano.held_out import SIGN
from pheye.nano.ways import WAYS

pytestmark = pytest.mark.once


def test_all_ways_are_trained_and_asked_once(parts, tmp_path, capsys):
    data = draw_data.write_data(tmp_path / "data", "tasks", 2, workers=1)
    command = ["--vision", parts["vision"], "--language", parts["language"], "--data", data, "--workers", "0"]
    command = [str(word) for word in (*command, "--output", tmp_path / "out")]
    command += ["--batch_size", "2", "--steps", "1", "--seeds", "1", "--count", "3"]
    assert main(command) == 0
    results = {name: tmp_path / "out" / f"{name}-0" / "result.json" for name in WAYS}
    written = {}
    for name, path in results.items():
        result = json.loads(path.read_text())
        assert result["scores"][SIGN]["questions"] == 3 and result["seconds_per_step"] > 0
        written[name] = path.stat().st_mtime_ns
    report = (tmp_path / "out" / "experiments.md").read_text()
    assert all(way.title in report for way in WAYS.values())
    tertiles = json.loads(results["full"].read_text())["scores"]["by_tertile"].values()
    expected = ", ".join(f"{100 * one['exact']:.1f}" for one in tertiles)
    assert next(line for line in report.splitlines() if WAYS["full"].title in line).split(" | ")[2] == expected
    assert main(command) == 0
    assert {name: path.stat().st_mtime_ns for name, path in results.items()} == written
    command[command.index("--steps") + 1] = "2"
    assert main(command) == 1
    assert "was begun with other settings: steps was 1 and is now 2" in capsys.readouterr().err
    assert main([*command, "--ways", "full", "--output", str(tmp_path / "more")]) == 1
    assert "has 2 samples; 2 steps take 4" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["every4th", "prefix"])
def test_ways_with_other_blocks_are_refused_for_a_model_that_has_blocks(way, capsys):
    with pytest.raises(SystemExit):
        main(["--start", "x", "--data", "x", "--output", "y", "--ways", way])
    assert "with --start only full, k1, one_lora, no_lora;" in capsys.readouterr().err
