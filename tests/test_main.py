"""The console command: what it lists, what it starts, and what it does not import."""

import re
import subprocess
import sys

import pytest

from pheye.__main__ import COMMANDS, main

pytestmark = pytest.mark.once

LAZY = """
import sys
from pheye.__main__ import main

assert main(["--help"]) == 0 and main(["--version"]) == 0 and main(["captoin"]) == 2
print(sorted({"torch", "transformers", "numpy", "PIL", "huggingface_hub"} & sys.modules.keys()))
"""


def test_help_lists_every_command_in_a_line(capsys):
    assert main(["--help"]) == main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, what) in COMMANDS.items():
        assert sum(line.split() == [name, *what.split()] for line in lines) == 2  # once in each


def test_nothing_heavy_is_imported_before_a_command_is_chosen(tmp_path):
    done = subprocess.run([sys.executable, "-c", LAZY], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_unknown_command_is_refused_with_those_that_there_are(capsys):
    assert main(["captoin", "--model", "x"]) == 2
    error = capsys.readouterr().err
    assert "'captoin'" in error and all(name in error for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_says_its_own_name(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert re.match(rf"usage: pheye {name} ", capsys.readouterr().out)


def test_the_status_of_a_command_is_that_of_pheye(capsys, tmp_path):
    options = ["--model", str(tmp_path), "--images", str(tmp_path / "none"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["caption", *options]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_it_runs_as_a_module(tmp_path):
    done = subprocess.run([sys.executable, "-m", "pheye", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "caption" in done.stdout


def test_who_stops_it_while_modules_are_imported_sees_no_traceback(monkeypatch, capsys):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("pheye.__main__.importlib.import_module", stopped)
    assert main(["caption"]) == 130
    assert capsys.readouterr().err == "\ninterrupted.\n"
