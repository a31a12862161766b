"""A training run that is killed at random moments goes on, and ends with the same files as one that was not."""

import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from pheye.training import train
from pheye.training.checkpoints import checkpoints, flaw_of

from killing import digests, moments
from training_runs import command, save_base, write_data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.once,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix"),
]
# A constant rate, so that a step too many would show.
OPTIONS = ["--max_steps", "9", "--effective_batch_size", "2", "--learning_rate", "1e-2", "--save_steps", "3"]
OPTIONS += ["--lr_scheduler_type", "constant", "--logging_steps", "1"]
EVALUATION = ["--eval_steps", "3", "--load_best_model_at_end", "--early_stopping_patience", "2"]
OFTEN = 0.001  # seconds

# Each run is a process of its own, forked from one that has imported everything already: imports take ten times as
# long as the run, and few kills would meet what is to be tested.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pheye.training.train", "matplotlib.figure", "datasets"])


def run(arguments: list[str], log: Path):
    """The command, in a process of its own; what it prints is added to `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(train.main(arguments))


def started(arguments: list[str], log: Path) -> multiprocessing.Process:
    process = PROCESSES.Process(target=run, args=(arguments, log))
    process.start()
    return process


def seconds_of(arguments: list[str], log: Path) -> float:
    """How long the command takes when nothing disturbs it."""
    began = time.perf_counter()
    process = started(arguments, log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    return time.perf_counter() - began


def kill(arguments: list[str], log: Path, after: float = 0, when: Path | None = None):
    """Start the command, and kill it after so many seconds, or when there is a file or folder."""
    process = started(arguments, log)
    time.sleep(after)
    while when is not None and process.is_alive() and not when.exists():
        time.sleep(OFTEN)
    process.kill()
    process.join()


def tensors_of(path: Path) -> tuple[dict, dict]:
    """What a safetensors file holds, whose bytes have its metadata in no fixed order: metadata, and the type, shape
    and bytes of each tensor."""
    with safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return file.metadata(), {name: (str(t.dtype), t.shape, t.tobytes()) for name, t in tensors.items()}


def state_of(path: Path) -> dict:
    """What a trainer_state.json says, but for what depends on the clock."""
    state = json.loads(path.read_text())
    rows = [{name: value for name, value in row.items() if "second" not in name and "runtime" not in name}
            for row in state["log_history"]]  # fmt: skip
    return {**state, "log_history": rows}


def content(output: Path) -> dict[str, object]:
    """What each file of a run's folder holds, by its name; checksums follow from the other files, and the code is this
    package's."""
    assert [flaw_of(folder) for folder in checkpoints(output)] == [None, None]
    found = {name: digest for name, digest in digests(output).items()
             if Path(name).name != "checksums.json" and not name.endswith(".py")}  # fmt: skip
    for name in found:
        if name.endswith(".safetensors"):
            found[name] = tensors_of(output / name)
        elif Path(name).name == "trainer_state.json":
            found[name] = state_of(output / name)
    return found


def differing(one: dict, other: dict) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


@pytest.mark.parametrize("evaluates", [False, True])
def test_after_kills_the_same_command_ends_with_the_same_files(tmp_path, evaluates):
    base = save_base(tmp_path / "base", lora_dropout=0.1)
    (tmp_path / "set").mkdir()
    data, output, log = write_data(tmp_path / "set", 12), tmp_path / "out", tmp_path / "log"
    arguments = command(base, data, output, *OPTIONS, *(["--eval_data", str(data), *EVALUATION] if evaluates else ()))
    seconds_of(arguments, log)  # also what is slow only the first time
    shutil.rmtree(output)
    seconds, expected = seconds_of(arguments, log), content(output)
    assert {"model.safetensors", "checkpoint-6/optimizer.pt", "checkpoint-9/optimizer.pt"} <= expected.keys()
    drawn = [{"after": moment} for moment in moments(seconds)]
    # Each second run is killed twice. One is killed when all steps are made and the model is not written yet.
    rounds = [[one, *([other] if number % 2 else [])]
              for number, (one, other) in enumerate(zip(drawn, reversed(drawn), strict=True))]  # fmt: skip
    for kills in [*rounds, [{"when": output / "checkpoint-9"}]]:
        shutil.rmtree(output)
        told = f"of {seconds:.2f} s: {kills}"
        for moment in kills:
            kill(arguments, log, **moment)
            # What makes the folder a model comes last.
            assert (output / "model.safetensors").is_file() or not (output / "config.json").is_file(), told
        seconds_of(arguments, log)
        assert differing(content(output), expected) == [], told
