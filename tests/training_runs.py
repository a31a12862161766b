"""Runs of the training command on a tiny model, for the tests of what it does and leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from pheye.training import train

from tiny import tiny_image, tiny_model, tiny_processor

WORDS = ("yes", "two cats", "a", "the quick brown fox", "no", "blue and red", "7", "stop it")
QUIET = ["--dataloader_num_workers", "0", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"]
# Eight steps of two batches each, and a checkpoint after each step.
STEPS = ["--num_train_epochs", "2", "--effective_batch_size", "4", "--per_device_train_batch_size", "2"]
STEPS += ["--learning_rate", "1e-2", "--save_steps", "1", "--save_total_limit", "10"]


def save_base(folder: Path, lora_dropout: float = 0.0) -> Path:
    """Write a tiny model to train; with dropout, a resumed run must restore the random state."""
    tiny_model(lora_dropout=lora_dropout).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def write_data(folder: Path, count: int, answer=lambda index: WORDS[index % len(WORDS)] * (1 + index % 3)) -> Path:
    rows = []
    for index in range(count):
        tiny_image(index).save(folder / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer(index)}]
        rows.append({"id": f"row {index}", "image": f"{index}.png", "conversations": turns})
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


def command(base: Path, data: Path, output: Path, *options: str) -> list[str]:
    given = ["--model", str(base), "--data", str(data), "--image_folder", str(data.parent), "--output", str(output)]
    return [*given, "--bf16", "false", *QUIET, *options]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(
        folder / ("trained.safetensors" if (folder / "trained.safetensors").exists() else "model.safetensors")
    )


def refusal(capsys, arguments: list[str]) -> str:
    """What the command prints when it fails."""
    assert train.main(arguments) == 1
    message = capsys.readouterr().err
    assert "error: " in message and "Traceback" not in message
    return message


def run_alone(arguments: list[str], expect: int = 0, **environment: str) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert result.returncode == expect, result.stdout + result.stderr
    return result
