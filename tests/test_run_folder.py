"""The folder of a run: who may write there, what is left in it, and what reaches the Hub."""

from pathlib import Path

import pytest
import torch

from pheye import PheyeForConditionalGeneration
from pheye.training import train
from pheye.training.trained import load_trained

from hub_server import FakeHub
from tiny import tiny_model
from training_runs import command, run_alone, save_base, write_data


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), lora_dropout=0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """16 samples with answers of unequal length."""
    return write_data(tmp_path_factory.mktemp("data"), 16)


# --- Whose it is ---


def test_an_output_folder_that_holds_something_else_is_refused(base, data, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"is not empty and holds no run.*another --output"):
        train.run(command(base, data, tmp_path))


@pytest.mark.parametrize(
    "change", [["--learning_rate", "1e-3"], ["--seed", "1"], ["--freeze", "global_lora"], ["--prompt", "Why?"]]
)
def test_going_on_with_other_settings_is_refused(base, data, tmp_path, change):
    arguments = command(base, data, tmp_path / "out", "--effective_batch_size", "4", "--max_steps", "1")
    train.run(arguments)
    with pytest.raises(ValueError, match=rf"other settings: (\w+, )*{change[0][2:]}\b"):
        train.run([*arguments, *change])
    assert train.run([*arguments, "--logging_steps", "3"]) is None  # does not matter to the result


def test_a_finished_run_is_left_as_it_is(base, data, tmp_path, capsys):
    arguments = command(base, data, tmp_path / "out", "--max_steps", "1", "--effective_batch_size", "4")
    train.run(arguments)
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert train.run(arguments) is None
    assert "finished" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before


# --- What is left in it ---


@pytest.mark.parametrize("lora", [False, True])
def test_trained_weights_alone_go_onto_the_base_model(base, data, tmp_path, lora):
    options = ["--max_steps", "2", "--effective_batch_size", "4", "--learning_rate", "1e-2"]
    options += ["--language_model_lora"] if lora else []
    train.run(command(base, data, tmp_path / "whole", *options))
    train.run(command(base, data, tmp_path / "alone", *options, "--trained_only"))
    assert not (tmp_path / "alone" / "model.safetensors").exists()
    whole = PheyeForConditionalGeneration.from_pretrained(tmp_path / "whole")
    loaded = load_trained(PheyeForConditionalGeneration.from_pretrained(base), tmp_path / "alone")
    changed = 0
    for (name, a), (_, b), c in zip(
        whole.named_parameters(), loaded.named_parameters(), tiny_model(lora_dropout=0.1).parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)
        changed += not torch.equal(a, c)
    in_language_model = 24 if lora else 0
    assert changed == in_language_model + sum(
        "language" not in n and "tower" not in n for n, _ in whole.named_parameters()
    )


# --- The Hub ---


PUSH = """
import sys
from pheye.training import train
from pheye.training.collator import PheyeCollator
from pheye.training.mixture import Mixture
assert train.main(sys.argv[1:]) == 0
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("me/tuned", trust_remote_code=True)
AutoProcessor.from_pretrained("me/tuned", trust_remote_code=True)
print("loaded", sum(p.double().sum().item() for p in model.parameters()))
"""


def test_the_finished_model_is_pushed_and_loads_from_the_hub(base, data, tmp_path):
    script, output = tmp_path / "push.py", tmp_path / "out"
    script.write_text(PUSH)
    options = ["--max_steps", "1", "--effective_batch_size", "4", "--push_to_hub", "--hub_model_id", "me/tuned"]
    with FakeHub() as hub:
        environment = hub.environment(tmp_path / "cache")
        result = run_alone([str(script), *command(base, data, output, *options)], **environment)
        files = hub.repos["me/tuned"].commits[hub.repos["me/tuned"].branches["main"]].files
    assert {"model.safetensors", "config.json", "README.md", "training.png", "modeling_pheye.py"} <= set(files)
    assert not any(name.startswith(("checkpoint", "run", "skipped", "unfinished")) for name in files)
    model = PheyeForConditionalGeneration.from_pretrained(output)
    assert f"loaded {sum(p.double().sum().item() for p in model.parameters())}" in result.stdout
