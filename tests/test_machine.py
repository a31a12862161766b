"""The line that says what made a result."""

import datetime
import re

import torch
import transformers

import pheye
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
