"""What a finished run says of itself: the plot of its log, and the model's card."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from PIL import Image

from pheye.training.formats import Source
from pheye.training.report import plot_log, write_model_card

pytestmark = pytest.mark.once

LOG = [{"step": step, "loss": 4 / step, "learning_rate": 1e-3} for step in (1, 2, 3)] + [{"step": 3, "train_loss": 2}]


class Data(list):
    """Samples as a `Mixture` has them."""


def card(folder: Path, base: str, log=LOG, best: str | None = "checkpoint-2", **options) -> str:
    training = SimpleNamespace(
        output_dir=str(folder / "tuned"),
        effective_batch_size=16,
        learning_rate=0.003,
        lr_scheduler_type="cosine",
        bf16=True,
        seed=42,
        load_best_model_at_end=True,
    )
    state = SimpleNamespace(log_history=log, global_step=3, best_global_step=2, best_model_checkpoint=best)
    data = Data([{"messages": [{"role": "user", "content": 'Which "word"?'}]}] * 64)
    trainer = SimpleNamespace(args=training, state=state, train_dataset=data, pretrained_learning_rate=None)
    (folder / "data.json").write_text("[]")
    sources = [
        Source(str(folder / "data.json"), prompt="Briefly."),
        Source("org/set", caption=True, turns=None),
    ]
    write_model_card(folder / "README.md", trainer, sources, base=base, **options)
    return (folder / "README.md").read_text()


def base_with_card(folder: Path, head: str) -> str:
    base = folder / "secret place" / "my base"
    base.mkdir(parents=True)
    (base / "README.md").write_text(f"---\n{head}\n---\n# Base\n")
    return str(base)


def test_the_card_has_what_the_model_was_made_of(tmp_path):
    text = card(tmp_path, "me/base", stage="tasks")
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
    assert f"torch {torch.__version__}" in text and "load_trained" not in text and "other data" not in text


def test_the_card_names_no_place_on_this_machine_but_licence_and_base_of_the_base(tmp_path):
    base = base_with_card(tmp_path, "license: cc-by-4.0\nbase_model:\n- org/tower\n- org/language")
    text = card(tmp_path, base)
    assert str(tmp_path) not in text and "secret place" not in text
    assert "`my base`" in text and "| data.json |" in text
    known = metadata_load(tmp_path / "README.md")
    assert known["license"] == "cc-by-4.0" and known["base_model"] == ["org/tower", "org/language"]
    assert known["library_name"] == "transformers" and known["pipeline_tag"] == "image-text-to-text"


@pytest.mark.parametrize("head", ["a: [", "- a list", "license: null", ""])
def test_a_card_of_the_base_that_says_nothing_is_passed_over(tmp_path, head):
    card(tmp_path, base_with_card(tmp_path, head))
    assert not {"license", "base_model"} & metadata_load(tmp_path / "README.md").keys()


def test_the_cards_code_asks_as_the_model_was_asked(tmp_path):
    text = card(tmp_path, "me/base", repo="me/signs")
    assert "# signs\n" in text
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(code, "card", "exec")
    assert 'model="me/signs", trust_remote_code=True' in code and r'prompt="Which \"word\"?"' in code


def test_the_card_of_weights_alone_says_how_they_are_used(tmp_path):
    text = card(tmp_path, str(tmp_path), trained_file="trained.safetensors")
    assert "base_model" not in text and "stage | none" in text
    assert "`trained.safetensors` holds only what was trained." in text
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(code, "card", "exec")
    assert "load_trained(" in code and 'PheyeProcessor.from_pretrained("tuned")' in code


def test_the_card_has_the_loss_of_the_model_that_was_kept(tmp_path):
    log = [*LOG, {"step": 2, "eval_loss": 0.5}, {"step": 3, "eval_loss": 0.75}]
    assert "| loss on other data | 0.5000, at step 2 |" in card(tmp_path, "me/base", log)
    assert "| loss on other data | 0.7500, at step 3 |" in card(tmp_path, "me/base", log, best=None)  # it was gone


def test_the_plot_is_an_image_also_of_a_run_without_a_log(tmp_path):
    evaluated = [{"step": 2, "eval_loss": 1.5}]
    for name, history in (("a.png", LOG), ("b.png", []), ("c.png", LOG[:1]), ("d.png", LOG + evaluated)):
        plot_log(history, tmp_path / "new" / name)
        assert Image.open(tmp_path / "new" / name).size == (840, 480)
    empty, one = (np.array(Image.open(tmp_path / "new" / name).convert("RGB")) for name in ("b.png", "c.png"))
    blue = [((picture[..., 2] > 150) & (picture[..., 0] < 100)).sum() for picture in (empty, one)]
    assert blue[0] == 0 and blue[1] > 10  # a single step shows
