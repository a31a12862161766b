"""What commands share: errors, options, processes."""

import pytest
import torch
from accelerate import PartialState

from pheye.common import command
from pheye.common.command import InputError


def test_processes_that_accelerate_does_not_see_are_refused(monkeypatch, fresh_state):
    monkeypatch.setenv("WORLD_SIZE", "2")
    PartialState._shared_state.update(_cpu=True, backend=None, device="cpu", distributed_type="NO", num_processes=1)
    with pytest.raises(InputError, match="2 processes were launched, but accelerate sees 1"):
        command.process_state()


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(command.importlib, "import_module", missing)
    with pytest.raises(InputError, match=r'needs accelerate: run pip install "\.\[eval\]" in a clone'):
        command.require("accelerate")


def test_a_missing_package_may_belong_to_another_extra(monkeypatch):
    monkeypatch.setattr(command.importlib, "import_module", lambda name: __import__("no_such_package"))
    with pytest.raises(ModuleNotFoundError):  # another package is missing: no remedy is made up
        command.require("datasets", "train")


@pytest.mark.parametrize("spelling", ["--max_new_tokens", "--max-new-tokens"])
@pytest.mark.parametrize("joined", [True, False])
def test_options_are_understood_with_underscores_and_with_hyphens(spelling, joined):
    parser = command.Parser()
    parser.add_argument("--max_new_tokens", type=command.at_least(1))
    parser.add_argument("--prompt")
    given = [f"{spelling}=5"] if joined else [spelling, "5"]
    options = vars(parser.parse_args([*given, "--prompt", "as-it-is"]))
    assert options == {"max_new_tokens": 5, "prompt": "as-it-is"}
    assert "--max_new_tokens" in parser.format_help() and "--max-new-tokens" not in parser.format_help()


def test_behind_a_bare_double_hyphen_nothing_is_an_option():
    parser = command.Parser()
    parser.add_argument("question")
    assert parser.parse_args(["--", "--what-is-it?"]).question == "--what-is-it?"


@pytest.mark.parametrize("default", [None, ["a"]])
def test_a_list_that_is_given_twice_is_refused_and_a_value_is_not(default, capsys):
    parser = command.Parser()
    parser.add_argument_group("files").add_argument("--data", nargs="+", default=default)
    parser.add_argument("--more", nargs="+", action="extend")
    parser.add_argument("--count", type=int)
    options = parser.parse_args(["--data", "x", "y", "--count", "1", "--count", "2", "--more", "p", "--more", "q"])
    assert (options.data, options.count, options.more) == (["x", "y"], 2, ["p", "q"])
    with pytest.raises(SystemExit):
        parser.parse_args(["--data", "x", "--data", "y"])
    assert "argument --data: given twice; give its values one behind another" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-3", "2.5", "x", ""])
def test_an_integer_that_is_too_small_or_none_is_refused(text, capsys):
    parser = command.Parser()
    parser.add_argument("--count", type=command.at_least(1))
    with pytest.raises(SystemExit):
        parser.parse_args([f"--count={text}"])
    assert "must be an integer of at least 1" in capsys.readouterr().err


def test_what_the_user_can_mend_is_a_line_and_a_bug_is_not(capsys):
    def run(error, batch_size=None):
        raise error

    assert command.exit_status(run, error=command.InputError("Give more.")) == 1
    assert capsys.readouterr().err == "error: Give more.\n"
    assert command.exit_status(run, error=OSError("disk")) == 1
    assert command.exit_status(run, error=torch.OutOfMemoryError("full")) == 1
    assert capsys.readouterr().err == "error: disk\nerror: full\n"
    assert command.exit_status(run, error=torch.OutOfMemoryError("full"), batch_size=8) == 1
    assert "smaller --batch_size" in capsys.readouterr().err
    assert command.exit_status(lambda: None) == 0
    with pytest.raises(KeyError):
        command.exit_status(run, error=KeyError("a bug"))


def test_one_device_for_several_processes_is_refused(monkeypatch, fresh_state):
    monkeypatch.setenv("WORLD_SIZE", "2")
    PartialState._shared_state.update(_cpu=True, backend=None, device="cpu", distributed_type="NO", num_processes=2)
    with pytest.raises(InputError, match="--device cuda:1 would put all processes on one device"):
        command.process_state("cuda:1")


def test_an_interrupted_command_says_what_is_kept(capsys):
    def run():
        raise command.Interrupted("Rows are kept; give the same command again.")

    assert command.exit_status(run) == 130
    assert capsys.readouterr().err == "\ninterrupted. Rows are kept; give the same command again.\n"
