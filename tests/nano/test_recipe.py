"""A sitting of the recipe, seconds long, and the next from what the first packed."""

import io
import tarfile
from pathlib import Path

import pytest
import torch

from pheye import PheyeForConditionalGeneration, PheyeProcessor
from pheye.common.json_lines import read_rows
from pheye.nano import recipe
from pheye.nano.learning import commands

from tiny import tiny_image

pytestmark = pytest.mark.once

NANO = Path(__file__).parents[2] / "checkpoints" / "pheye-nano"


def unpack(folder: Path, into: Path):
    pieces = sorted((folder / "packed").iterdir(), key=lambda path: int(path.suffix[1:]))
    with tarfile.open(fileobj=io.BytesIO(b"".join(path.read_bytes() for path in pieces))) as archive:
        archive.extractall(into, filter="data")


@pytest.mark.slow
def test_a_sitting_gives_a_model_whose_blocks_have_learnt(tmp_path):
    # In no time, the eyes' learning rate has fallen to 0 before their first step. The blocks learn for some seconds.
    options = ["--minutes", "0.001", "--model", str(NANO), "--pictures", "3", "--output", str(tmp_path / "run")]
    assert recipe.main(options) == 0
    sizes = [path.stat().st_size for path in (tmp_path / "run" / "packed").iterdir()]
    assert len(sizes) <= 8 and max(sizes) <= 16_000_000
    unpack(tmp_path / "run", tmp_path / "new")
    assert read_rows(tmp_path / "new" / "eyes" / "log.jsonl")[-1]["step"] > 0
    before, after = (
        PheyeForConditionalGeneration.from_pretrained(folder).state_dict() for folder in (NANO, tmp_path / "new/model")
    )
    assert any(not torch.equal(before[name], after[name]) for name in before if ".cross_attention_blocks." in name)
    assert all(torch.equal(before[name], after[name]) for name in before if ".language_model." in name)
    processor = PheyeProcessor.from_pretrained(tmp_path / "new" / "model")
    assert "high_res_pixel_values" in processor(images=tiny_image(), text="What?", return_tensors="pt")


def test_a_sitting_goes_on_where_the_one_before_ended(tmp_path, monkeypatch):
    began = []

    def begin(command: str, **options):
        began.append((command, options))
        options["output"].mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(recipe, "begin", begin)
    monkeypatch.setattr(recipe, "finish", lambda process: None)
    options = ["--minutes", "1", "--model", str(NANO), "--output"]
    assert recipe.main([*options, str(tmp_path / "first")]) == 0
    unpack(tmp_path / "first", tmp_path / "second")
    assert recipe.main([*options, str(tmp_path / "second")]) == 0
    assert [row["sitting"] for row in read_rows(tmp_path / "second" / "log.jsonl")] == [1, 2]
    counting = tmp_path / "second" / "global_view" / "eyes.safetensors"
    assert [options["eyes"] for command, options in began if command == "join"][1] == counting
    models = [options["model"] for command, options in began if command == "join"]
    assert models == [NANO, tmp_path / "second" / "model"]
    eyes = [options for command, options in began if command == "eyes"]
    assert eyes[0] | {"output": None} == eyes[1] | {"output": None}  # the command itself goes on in its folder
    seeds = [options["seed"] for command, options in began if command in ("draw_data", "replay")]
    assert seeds == [0, 0, 0, 1, 1, 1]  # other pictures in every sitting


def test_what_is_packed_comes_in_small_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "PIECE_BYTES", 10_000)
    for name, size in (("eyes/checkpoint.pt", 25_000), ("model/model.safetensors", 7), ("base/model.safetensors", 9)):
        (tmp_path / "run" / name).parent.mkdir(parents=True)
        (tmp_path / "run" / name).write_bytes(bytes([size % 251]) * size)
    recipe.pack(tmp_path / "run")
    assert max(path.stat().st_size for path in (tmp_path / "run" / "packed").iterdir()) == 10_000
    (tmp_path / "run" / "eyes" / "checkpoint.pt").write_bytes(b"less")
    recipe.pack(tmp_path / "run")  # no piece of the longer archive stays
    unpack(tmp_path / "run", tmp_path / "new")
    assert (tmp_path / "new" / "eyes" / "checkpoint.pt").read_bytes() == b"less"
    assert (tmp_path / "new" / "model" / "model.safetensors").read_bytes() == bytes([7]) * 7
    assert not (tmp_path / "new" / "base").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--model", "nowhere"], "nowhere holds no model.safetensors"), (["--device", "none"], "pheye.nano.eyes failed")],
)
def test_a_sitting_that_cannot_be_held_says_why(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands.subprocess.Popen, "wait", lambda process: 1)
    monkeypatch.setattr(commands.sys, "executable", "/bin/echo")
    arguments = ["--minutes", "1", "--model", str(NANO), "--output", str(tmp_path / "run"), *options]
    assert recipe.main(arguments) != 0
    assert message in capsys.readouterr().err
