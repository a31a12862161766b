"""Checkpoints: found by their step, checked before a run goes on from one, removed when they are too many."""

import shutil
from pathlib import Path

import pytest

from pheye.training.checkpoints import (
    checkpoints,
    clear,
    flaw_of,
    last_checkpoint,
    publish,
    rotate,
    whole_checkpoint,
)

pytestmark = pytest.mark.once

FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "trained.safetensors", "deep/part.bin")


@pytest.fixture
def output(tmp_path) -> Path:
    """An output folder with the checkpoints 2, 10 and 9, in this order."""
    output = tmp_path / "out"
    output.mkdir()
    for step in (2, 10, 9):
        written = tmp_path / "unfinished"
        (written / "deep").mkdir(parents=True)
        for name in FILES:
            (written / name).write_bytes(f"{name} of {step}".encode() * 100)
        publish(written, output / f"checkpoint-{step}")
        assert not written.exists()
    return output


def test_they_are_sorted_by_their_steps_and_other_names_are_left_alone(output):
    for name in ("checkpoint-best", "checkpoint-10.bak", "checkpoint-", "checkpoint-011", "checkpoint--3"):
        (output / name).mkdir()
    (output / "checkpoint-12").write_text("no folder")
    assert [path.name for path in checkpoints(output)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    assert last_checkpoint(output).name == "checkpoint-10"
    assert whole_checkpoint(output) == (output / "checkpoint-10", {})
    assert last_checkpoint(output / "nowhere") is None and whole_checkpoint(output / "nowhere") == (None, {})


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        flip,
    ],
    ids=["missing", "empty", "cut", "a bit flipped"],
)
def test_a_torn_checkpoint_is_named_and_the_whole_one_before_it_is_taken(output, name, harm):
    harm(output / "checkpoint-10" / name)
    found, flaws = whole_checkpoint(output)
    assert found == output / "checkpoint-9"
    assert list(flaws) == ["checkpoint-10"] and name in flaws["checkpoint-10"]


def test_a_checkpoint_without_checksums_or_optimizer_is_not_gone_on_from(output):
    (output / "checkpoint-10" / "checksums.json").write_text("[")
    (output / "checkpoint-9" / "checksums.json").unlink()
    found, flaws = whole_checkpoint(output)
    assert found == output / "checkpoint-2"
    assert flaws == {
        "checkpoint-10": "its checksums.json is not whole",
        "checkpoint-9": "it has no checksums.json",
    }
    written = output.parent / "unfinished"
    written.mkdir()
    (written / "trained.safetensors").write_text("weights")
    publish(written, output / "checkpoint-11")
    assert "--save_only_model" in flaw_of(output / "checkpoint-11")


def test_the_oldest_are_removed_but_neither_the_last_nor_the_best_nor_what_is_none(output):
    shutil.copytree(output / "checkpoint-2", output / "checkpoint-2.bak")
    rotate(output, None, None, 10)
    rotate(output, 3, None, 10)
    assert len(checkpoints(output)) == 3
    rotate(output, 1, str(output / "checkpoint-2"), 10)  # the best stays beside the last
    assert [path.name for path in checkpoints(output)] == ["checkpoint-2", "checkpoint-10"]
    rotate(output, 2, str(output / "checkpoint-2"), 10)
    assert [path.name for path in checkpoints(output)] == ["checkpoint-2", "checkpoint-10"]
    rotate(output, 1, str(output / "checkpoint-10"), 10)
    assert [path.name for path in checkpoints(output)] == ["checkpoint-10"]
    assert (output / "checkpoint-2.bak").is_dir()


def test_those_behind_the_step_of_a_run_that_began_before_them_are_removed_first(output):
    rotate(output, 2, None, 9)
    assert [path.name for path in checkpoints(output)] == ["checkpoint-2", "checkpoint-9"]
    rotate(output, 1, None, 5)  # a run that began anew, and has saved its step 2
    assert [path.name for path in checkpoints(output)] == ["checkpoint-2"]


def test_one_whose_removal_is_cut_short_is_absent(output, monkeypatch):
    def killed(path, **kwargs):
        (Path(path) / "optimizer.pt").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        rotate(output, 2, None, 10)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(output)] == ["checkpoint-9", "checkpoint-10"]
    rotate(output, 1, None, 10)
    assert [path.name for path in output.iterdir()] == ["checkpoint-10"]


def test_what_a_link_leads_to_is_never_removed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    link = tmp_path / "unfinished"
    link.symlink_to(elsewhere)
    clear(link)
    assert not link.exists() and (elsewhere / "mine").read_text() == "mine"
    link.write_text("a file")
    clear(link)
    clear(link)
    shutil.copytree(elsewhere, link)
    clear(link)
    assert not link.exists()
