"""The line that says what made a result."""

import datetime
import re
import subprocess

import torch
import transformers

import pheye.common.machine
from pheye.common.machine import commit, machine, versions


def test_versions_are_those_that_run():
    assert versions() == {
        "pheye": pheye.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def test_the_machine_is_one_line_with_hardware_versions_commit_and_date():
    line = machine("cpu")
    assert "\n" not in line and "CPUs (" in line
    assert f"torch {torch.__version__}, transformers {transformers.__version__}" in line
    assert f"commit {commit()}; {datetime.date.today()}" in line
    assert commit() == "unknown" or re.fullmatch(r"[0-9a-f]{7,}\+?", commit())


def test_the_commit_of_a_project_around_the_package_is_not_its_own(tmp_path, monkeypatch):
    package = tmp_path / "environment" / "pheye"
    (package / "common").mkdir(parents=True)
    monkeypatch.setattr(pheye.common.machine, "__file__", str(package / "common" / "machine.py"))
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for folder in (tmp_path, package):
        assert commit() == "unknown"
        for command in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "first"]):
            subprocess.run(["git", "-C", folder, *command], check=True)
    assert re.fullmatch(r"[0-9a-f]{7,}", commit())
    (package / "new.py").touch()
    subprocess.run(["git", "-C", package, "add", "new.py"], check=True)
    assert commit().endswith("+")
