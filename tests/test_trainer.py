"""The Trainer: checkpoints that are whole or absent, and what stops a run."""

import errno
import re
import sys
from pathlib import Path

import pytest
import torch

from pheye.training import train
from pheye.training.checkpoints import last_checkpoint
from pheye.training.trainer import PheyeTrainer

from training_runs import STEPS, command, refusal, run_alone, save_base, weights, write_data


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), lora_dropout=0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """16 samples with answers of unequal length."""
    return write_data(tmp_path_factory.mktemp("data"), 16)


# --- Checkpoints ---


def test_checkpoints_hold_what_trains_and_no_more(base, data, tmp_path):
    output = tmp_path / "out"
    trainer = train.run(command(base, data, output, "--effective_batch_size", "8", "--save_steps", "1"))
    names = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert weights(output / "checkpoint-2").keys() == names
    assert not list((output / "checkpoint-2").glob("model*"))
    final = weights(output)
    assert all(torch.equal(tensor, final[name]) for name, tensor in weights(output / "checkpoint-2").items())


KILLED = """
import os, signal, sys
from pheye.training import train
from pheye.training.collator import PheyeCollator
from pheye.training.mixture import Mixture
from pheye.training.trainer import PheyeTrainer

where, count = sys.argv[1], int(sys.argv[2])
original, calls = getattr(PheyeTrainer, where), 0

def die(self, *args, **kwargs):
    global calls
    calls += 1
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)

setattr(PheyeTrainer, where, die)
sys.exit(train.main(sys.argv[3:]))
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(base, data, tmp_path):
    train.run(command(base, data, tmp_path / "undisturbed", *STEPS))
    expected = (tmp_path / "undisturbed" / "model.safetensors").read_bytes()

    script, output = tmp_path / "killed.py", tmp_path / "out"
    script.write_text(KILLED)
    arguments = command(base, data, output, *STEPS)
    # In the second batch of step 3; then, after going on, when step 7's weights are written but not its optimizer.
    for where, count, whole in (("training_step", 6, 2), ("_save_optimizer_and_scheduler", 5, 6)):
        run_alone([str(script), where, str(count), *arguments], expect=-9)
        assert last_checkpoint(output).name == f"checkpoint-{whole}"
        assert not (output / "model.safetensors").exists()
    trainer = train.run(arguments)
    assert trainer.state.global_step == 8
    assert (output / "model.safetensors").read_bytes() == expected
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == len({*losses})


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint_whole(base, data, tmp_path, monkeypatch, capsys):
    output, save, calls = tmp_path / "out", torch.save, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 4:  # in the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    message = refusal(capsys, command(base, data, output, *STEPS))
    assert re.search(r"No space left on device.*checkpoint-1 is whole; run the same command again", message)
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-1", "run.json", "run.lock"]
    monkeypatch.undo()
    assert train.run(command(base, data, output, *STEPS)).state.global_step == 8


# --- Numbers that are none ---


def test_a_nan_loss_stops_the_run_and_saves_nothing(base, data, tmp_path, monkeypatch, capsys):
    output, compute, calls = tmp_path / "out", PheyeTrainer.compute_loss, []

    def spoil(self, *args, **kwargs):
        calls.append(1)
        return compute(self, *args, **kwargs) * (float("nan") if len(calls) == 5 else 1)  # of step 3

    monkeypatch.setattr(PheyeTrainer, "compute_loss", spoil)
    assert re.search(
        r"loss of step 3 is NaN.*checkpoint-2 is whole", refusal(capsys, command(base, data, output, *STEPS))
    )
    assert last_checkpoint(output).name == "checkpoint-2"
    assert all(tensor.isfinite().all() for tensor in weights(output / "checkpoint-2").values())


def test_weights_that_became_nan_are_not_saved(base, data, tmp_path, monkeypatch):
    output, step = tmp_path / "out", PheyeTrainer.training_step

    def spoil(self, *args, **kwargs):
        if self.state.global_step == 1:
            self.model.pheye.view_encoding.global_norm.bias.data[0] = float("inf")
            return step(self, *args, **kwargs) * 0  # as if nobody had noticed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PheyeTrainer, "training_step", spoil)
    monkeypatch.setattr("pheye.training.trainer.StopAtBadLoss.on_pre_optimizer_step", lambda *args, **kwargs: None)
    with pytest.raises(FloatingPointError, match=r"At step 2, .*checkpoint-1 is whole"):
        train.run(command(base, data, output, *STEPS))
    assert last_checkpoint(output).name == "checkpoint-1"


# --- Images that cannot be read ---


@pytest.mark.once
def test_images_that_cannot_be_read_are_skipped_counted_and_listed(base, tmp_path, capsys):
    data, output = write_data(tmp_path, 16), tmp_path / "out"
    (tmp_path / "3.png").write_bytes(b"broken")
    (tmp_path / "5.png").unlink()
    options = ["--effective_batch_size", "4", "--num_train_epochs", "2"]
    trainer = train.run(command(base, data, output, *options))  # batches of one: nothing is left of a broken one
    assert trainer.state.global_step == 8 and trainer.skipped == 4
    printed = capsys.readouterr().out
    assert "2 samples were skipped" in printed and "row 3 of data:" in printed and "row 5 of data:" in printed
    assert all(tensor.isfinite().all() for tensor in weights(output).values())


@pytest.mark.once
def test_too_many_unreadable_images_are_an_error(base, tmp_path):
    data = write_data(tmp_path, 110)
    for index in range(5):
        (tmp_path / f"{index}.png").write_bytes(b"broken")
    options = ["--effective_batch_size", "10", "--per_device_train_batch_size", "10"]
    with pytest.raises(
        ValueError, match=r"2 of the 110 samples of this run have no readable image.*--max_skipped_share"
    ):
        train.run(command(base, data, tmp_path / "out", *options))
    train.run(command(base, data, tmp_path / "more", *options, "--max_skipped_share", "0.1"))


# --- Hooks of the library that this relies on ---


def test_the_trainers_private_methods_that_are_overridden_still_exist_and_are_used():
    from transformers import Trainer

    for name in (
        "_get_output_dir",
        "_save_checkpoint",
        "_save",
        "_load_from_checkpoint",
        "training_step",
        "compute_loss",
    ):
        assert callable(getattr(Trainer, name)), name
    source = Path(sys.modules[Trainer.__module__].__file__).read_text()
    for call in ("self._get_output_dir(trial=trial)", "self._save_checkpoint(model, trial)", "self._save(output_dir"):
        assert call in source, call
