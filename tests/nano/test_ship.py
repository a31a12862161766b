"""What ships of a trained Pheye-nano: half the bytes, one copy of the code, and the logs of all runs."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pheye
from pheye import PheyeForConditionalGeneration
from pheye.nano import ship

from tiny import tiny_model, tiny_processor

pytestmark = pytest.mark.once


def write_log(folder: Path, rows: list[dict]):
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_folder_has_weights_logs_and_the_code(tmp_path, monkeypatch):
    write_log(tmp_path / "vision", [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}, {"step": 2, "loss": 2.0}])
    stage, state = tmp_path / "stage", {"log_history": [{"step": 1, "loss": 1.0}, {"step": 1, "train_runtime": 5}]}
    (stage / "checkpoint-1").mkdir(parents=True)
    (stage / "checkpoint-1" / "trainer_state.json").write_text(json.dumps(state))
    monkeypatch.setattr(ship, "last_checkpoint", lambda run: run / "checkpoint-1")
    model = tiny_model()
    model.save_pretrained(stage)
    tiny_processor().save_pretrained(stage)

    output = tmp_path / "shipped"
    for _ in range(2):  # a better model later replaces the one that is there
        ship.ship([tmp_path / "vision", stage], output)
    ours = {file.name: file.read_bytes() for file in Path(pheye.__file__).parent.glob("*_pheye.py")}
    assert {file.name: file.read_bytes() for file in output.glob("*.py")} == ours
    shipped = PheyeForConditionalGeneration.from_pretrained(output)
    stored = load_file(output / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16} and shipped.dtype == torch.float32
    for name, weight in shipped.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].bfloat16().float()), name
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [(row["run"], row["step"], row["loss"]) for row in rows] == [
        ("vision", 1, 3.0), ("vision", 2, 2.0), ("stage", 1, 1.0),
    ]  # fmt: skip
    assert Image.open(output / "training.png").width >= 500


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="neither log"):
        ship.read_log(tmp_path)
