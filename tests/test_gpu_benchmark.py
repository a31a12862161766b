"""`make gpu`: a part that fails, hangs or finds no time left costs only itself."""

import json
import os
import time

import pytest

from pheye.benchmarks import gpu

pytestmark = pytest.mark.once

HANGING = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
child.wait()
"""
FIGURES = {
    "benchmark": "x",
    "machine": "a card",
    "ratios": {"a / b": 1.5},
    "seconds": {"step": {"median": 0.002, "min": 0.001, "max": 0.003, "n": 3}},
}


def parts(*programs: str, limit: int = 60) -> list[gpu.Part]:
    return [gpu.Part(f"part {i}", limit, ["-c", program]) for i, program in enumerate(programs)]


def test_a_part_that_fails_or_hangs_costs_only_itself(monkeypatch, tmp_path, capsys):
    wrong, hanging, right = parts("1 / 0", HANGING, f"print('| a |'); print({json.dumps(json.dumps(FIGURES))})")
    monkeypatch.setattr(gpu, "PARTS", [wrong, hanging._replace(limit=3), right])
    start = time.monotonic()
    assert gpu.main(["--output", str(tmp_path)]) == 1
    assert time.monotonic() - start < 60
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["status"] for result in results] == ["failed, exit status 1", "stopped after 3 s", "passed"]
    assert "ZeroDivisionError" in results[0]["last line"]
    assert results[2]["figures"] == FIGURES
    assert "| step, ms | 2 (1 to 3) |" in (tmp_path / "results.md").read_text()
    log = (tmp_path / "log.txt").read_text()
    assert log.count("\n=== ") == 3
    child = int(results[1]["last line"])
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # it is killed with its part; its entry goes when its new parent has noticed
            os.kill(child, 0)
            time.sleep(0.1)


def test_the_costs_of_branches_stand_in_the_table():
    one = {"median": 0.002, "min": 0.001, "max": 0.003, "n": 3}
    branches = {"T": {"seconds": {"encode": one}, "ratios": {"a / b": one}, "peaks": {"encode": 3_000_000}}}
    found = gpu.table([{"part": "x", "status": "passed", "seconds": 1, "figures": {**FIGURES, "branches": branches}}])
    assert "| encode, ConvNeXt-T, ms | 2 (1 to 3) |" in found and "| step, ms | 2 (1 to 3) |" in found
    assert "| a / b, ConvNeXt-T | 0.002 |" in found and "| peak of encode, ConvNeXt-T, MB | 3 |" in found


def test_parts_for_which_no_time_is_left_are_said_not_to_have_begun(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "PARTS", parts("print('ran')", "print('ran')"))
    assert gpu.main(["--output", str(tmp_path), "--minutes", "0"]) == 1
    statuses = [result["status"] for result in json.loads((tmp_path / "results.json").read_text())]
    assert statuses == ["not begun: no time was left"] * 2


def test_single_parts_run_in_a_rehearsal_and_see_the_package_that_is_not_installed(monkeypatch, tmp_path, capsys):
    program = (
        "import os, sys, pheye; print(os.path.realpath(pheye.__file__), os.environ['PHEYE_REHEARSE'], *sys.argv[1:])"
    )
    first, second = parts("1 / 0", program)
    monkeypatch.setattr(gpu, "PARTS", [first, second._replace(rehearsed=["toy"])])
    monkeypatch.setenv("PYTHONPATH", "")
    assert gpu.main(["--output", str(tmp_path), "--only", "part 1", "--rehearse"]) == 0
    (result,) = json.loads((tmp_path / "results.json").read_text())
    path, rehearsed, option = result["last line"].split()
    assert os.path.samefile(path, gpu.ROOT / "__init__.py")
    assert (rehearsed, option) == ("1", "toy")


def test_all_parts_together_fit_into_the_limit_that_the_documents_name():
    assert sum(part.limit for part in gpu.PARTS) <= 15 * 60
    assert len({part.name for part in gpu.PARTS}) == len(gpu.PARTS)
