"""What a finished run says of itself: the plot of its log, and the model's card."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from pheye.training.formats import Source
from pheye.training.report import plot_log, write_model_card

pytestmark = pytest.mark.once

LOG = [{"step": step, "loss": 4 / step, "learning_rate": 1e-3} for step in (1, 2, 3)] + [{"step": 3, "train_loss": 2}]


def card(folder, base: str, stage: str | None, trained_file: str | None = None) -> str:
    training = SimpleNamespace(
        output_dir=str(folder / "tuned"),
        effective_batch_size=16,
        learning_rate=0.003,
        lr_scheduler_type="cosine",
        bf16=True,
        seed=42,
    )
    state = SimpleNamespace(log_history=LOG, global_step=3)
    trainer = SimpleNamespace(args=training, state=state, train_dataset=range(64))
    sources = [Source("data.json", prompt="Briefly."), Source("org/set", caption=True, turns=None)]
    write_model_card(folder / "README.md", trainer, base, stage, sources, trained_file)
    return (folder / "README.md").read_text()


def test_the_card_has_what_the_model_was_made_of(tmp_path):
    text = card(tmp_path, "me/base", "tasks")
    assert text.startswith("---\n") and "\nbase_model: me/base\n" in text and "\n# tuned\n" in text
    for row in (
        "stage | tasks",
        "samples in an epoch | 64",
        "steps | 3",
        "effective batch | 16",
        "learning rate | 0.003",
        "precision | bfloat16, trained parts in float32",
        "last logged loss | 1.3333",
        "data | data.json | Briefly. | 1",
        "set | org/set | one of ten caption instructions | all",
    ):
        assert f"| {row} |" in text, row
    assert f"torch {torch.__version__}" in text and "load_trained" not in text


def test_the_card_of_weights_alone_says_how_they_are_used_and_a_folder_is_no_base_on_the_hub(tmp_path):
    text = card(tmp_path, str(tmp_path), None, "trained.safetensors")
    assert "base_model" not in text and "stage | none" in text
    assert "`trained.safetensors` holds only what was trained; `load_trained(model, folder)`" in text


def test_the_plot_is_an_image_also_of_a_run_without_a_log(tmp_path):
    for name, history in (("a.png", LOG), ("b.png", [])):
        plot_log(history, tmp_path / "new" / name)
        assert Image.open(tmp_path / "new" / name).size == (840, 480)
