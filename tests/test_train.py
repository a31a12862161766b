"""The training command: its loss, its checkpoints, what it leaves behind and what it refuses."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from pheye import PheyeForConditionalGeneration, PheyeProcessor
from pheye.training import train
from pheye.training.collator import PheyeCollator
from pheye.training.mixture import Mixture
from pheye.training.trained import load_trained
from pheye.training.trainer import PheyeTrainer, last_checkpoint

from hub_server import FakeHub
from tiny import tiny_image, tiny_model, tiny_processor

WORDS = ("yes", "two cats", "a", "the quick brown fox", "no", "blue and red", "7", "stop it")
QUIET = ["--dataloader_num_workers", "0", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model folder; with dropout in its LoRA, so that a resumed run must restore the random state."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model(lora_dropout=0.1).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base_without_dropout(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny_model(lora_dropout=0.0).save_pretrained(folder)
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


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """16 samples with answers of unequal length."""
    return write_data(tmp_path_factory.mktemp("data"), 16)


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


# --- The loss ---


def step_of_sgd(base: Path, data: Path, output: Path, *options: str, processes: int = 1) -> dict[str, torch.Tensor]:
    """The change of each trained tensor by one step over all samples, which is the gradient times a constant."""
    sgd = ["--optim", "sgd", "--learning_rate", "10", "--max_grad_norm", "0", "--lr_scheduler_type", "constant"]
    arguments = command(base, data, output, *sgd, "--trained_only", *options)
    if processes > 1:
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
        launch += ["--dynamo_backend", "no", "--num_processes", str(processes)]
        run_alone([*launch, "-m", "pheye.training.train", *arguments])
    else:
        train.run(arguments)
    before = load_file(base / "model.safetensors")
    return {name: tensor - before[name] for name, tensor in weights(output).items()}


def run_alone(arguments: list[str], expect: int = 0, **environment: str) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert result.returncode == expect, result.stdout + result.stderr
    return result


def relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    difference = sum((a[name] - b[name]).square().sum() for name in a)
    return (difference / sum(tensor.square().sum() for tensor in b.values())).sqrt().item()


def test_the_gradient_is_that_of_the_whole_batch_over_accumulation_and_processes(base_without_dropout, data, tmp_path):
    base = base_without_dropout
    whole = step_of_sgd(
        base, data, tmp_path / "a", "--per_device_train_batch_size", "16", "--effective_batch_size", "16"
    )
    accumulated = step_of_sgd(
        base, data, tmp_path / "b", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "16"
    )
    spread = step_of_sgd(
        base, data, tmp_path / "c", "--per_device_train_batch_size", "8", "--effective_batch_size", "16", processes=2
    )
    assert relative_difference(accumulated, whole) < 1e-5
    assert relative_difference(spread, whole) < 1e-5
    assert relative_difference(mean_of_means(base, data), whole) > 0.05


def mean_of_means(base: Path, data: Path) -> dict[str, torch.Tensor]:
    """The step that would come out if every sample's mean loss weighed the same."""
    model, _ = train.load_model(base, bf16=False)
    samples = Mixture(train.read_sources([data], image_folder=str(data.parent)), seed=42)
    collate = PheyeCollator(PheyeProcessor.from_pretrained(base))
    model.train()
    for index in range(len(samples)):
        batch = {k: v for k, v in collate([samples[index]]).items() if isinstance(v, torch.Tensor)}
        (model(**batch).loss / len(samples)).backward()
    return {name: -10 * p.grad for name, p in model.named_parameters() if p.requires_grad}


# --- Overfitting, and what a run leaves behind ---


def answer_of(model, processor, image) -> str:
    text = processor.apply_chat_template([{"role": "user", "content": "What is it?"}], add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).lstrip()


def code(index: int) -> str:
    return "abcdefgh"[index // 8] + "stuvwxyz"[index % 8]


@pytest.mark.slow
def test_a_toy_model_learns_64_images_by_heart(base_without_dropout, tmp_path, capsys):
    data, output = write_data(tmp_path, 64, answer=code), tmp_path / "out"
    options = ["--per_device_train_batch_size", "16", "--effective_batch_size", "16", "--learning_rate", "3e-3"]
    trainer = train.run(command(base_without_dropout, data, output, *options, "--num_train_epochs", "60"))
    assert trainer.state.log_history[-2]["loss"] < 0.05
    assert capsys.readouterr().out.startswith("Trains ")

    model = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    answers = [answer_of(model, processor, tiny_image(index)) for index in range(64)]
    assert answers == [code(index) for index in range(64)]

    before, after = load_file(base_without_dropout / "model.safetensors"), weights(output)
    frozen = [name for name in before if name.split(".")[1] in ("vision_tower", "language_model")]
    assert frozen and all(torch.equal(after[name], before[name]) for name in frozen)
    assert (output / "training.png").stat().st_size > 1000
    card = (output / "README.md").read_text()
    for fact in (
        str(base_without_dropout),
        "data.json",
        "effective batch | 16",
        "learning rate | 0.003",
        torch.__version__,
    ):
        assert fact in card, fact
    assert not (output / "unfinished").exists()


def test_frozen_parts_are_held_and_saved_in_bfloat16_and_trained_ones_in_float32(base, data, tmp_path):
    arguments = command(base, data, tmp_path / "out", "--max_steps", "1", "--effective_batch_size", "4")
    arguments[arguments.index("--bf16") + 1] = "true"
    trainer = train.run(arguments)
    dtypes = {(p.requires_grad, p.dtype) for p in trainer.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    saved = weights(tmp_path / "out")
    assert {t.dtype for name, t in saved.items() if "cross_attention" in name} == {torch.float32}
    assert {t.dtype for name, t in saved.items() if "vision_tower" in name} == {torch.bfloat16}
    # The next stage takes the trained parts up again with all their digits.
    model, _ = train.load_model(tmp_path / "out", bf16=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name]) and parameter.dtype == saved[name].dtype, name


def test_checkpoints_hold_what_trains_and_no_more(base, data, tmp_path):
    output = tmp_path / "out"
    trainer = train.run(command(base, data, output, "--effective_batch_size", "8", "--save_steps", "1"))
    names = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert weights(output / "checkpoint-2").keys() == names
    assert not list((output / "checkpoint-2").glob("model*"))
    final = weights(output)
    assert all(torch.equal(tensor, final[name]) for name, tensor in weights(output / "checkpoint-2").items())


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


# --- Runs that survive ---

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
STEPS = [
    "--num_train_epochs",
    "2",
    "--effective_batch_size",
    "4",
    "--per_device_train_batch_size",
    "2",
    "--save_steps",
    "1",
]
STEPS += ["--learning_rate", "1e-2", "--save_total_limit", "10"]  # 8 steps of two batches each


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


def test_a_finished_run_is_left_as_it_is(base, data, tmp_path, capsys):
    arguments = command(base, data, tmp_path / "out", "--max_steps", "1", "--effective_batch_size", "4")
    train.run(arguments)
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert train.run(arguments) is None
    assert "finished" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before


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
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-1", "run.json"]
    monkeypatch.undo()
    assert train.run(command(base, data, output, *STEPS)).state.global_step == 8


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
    with pytest.raises(ValueError, match=r"5 of 1\d0 samples have no readable image.*--max_skipped_share"):
        train.run(command(base, data, tmp_path / "out", *options))
    train.run(command(base, data, tmp_path / "more", *options, "--max_skipped_share", "0.1"))


# --- What is refused before the first step ---


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--effective_batch_size", "6", "--per_device_train_batch_size", "4"], "6 is no multiple of 4"),
        (
            ["--effective_batch_size", "4", "--gradient_accumulation_steps", "4"],
            "one of --gradient_accumulation_steps",
        ),
        (["--freeze", "no_such_part"], "matches no parameter"),
        (["--trained_only", "--push_to_hub"], "leave out --trained_only"),
        (["--streaming"], "give --max_steps"),
    ],
)
def test_options_that_contradict_each_other_are_refused(base, data, tmp_path, options, message, capsys):
    assert message in refusal(capsys, command(base, data, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists() or "matches no parameter" in message


def test_a_stages_missing_data_is_named(base, data, tmp_path, capsys):
    mixture = tmp_path / "mixture.json"
    mixture.write_text(
        json.dumps({"sources": [{"name": "llavar", "path": str(data), "image_folder": str(data.parent)}]})
    )
    arguments = ["--model", str(base), "--data", str(mixture), "--output", str(tmp_path / "o"), "--stage", "tasks"]
    assert "textvqa" in refusal(capsys, arguments)


@pytest.mark.parametrize(("stage", "rate"), [("describe", 2e-4), ("instruct", 1e-4), ("tasks", 5e-5), (None, 5e-5)])
def test_a_stage_sets_the_papers_learning_rate(base, data, tmp_path, stage, rate):
    *_, training = train.parse(command(base, data, tmp_path, *(["--stage", stage] if stage else [])))
    assert training.learning_rate == rate
    assert training.lr_scheduler_type == "cosine" and training.effective_batch_size == 128
    *_, training = train.parse(command(base, data, tmp_path, "--stage", stage or "tasks", "--learning_rate", "1e-3"))
    assert training.learning_rate == 1e-3


def test_samples_can_be_inspected_first(base, data, tmp_path, capsys):
    assert train.run(command(base, data, tmp_path / "look", "--inspect", "3")) is None
    printed = capsys.readouterr().out
    assert printed.count("Instruction: What is it?") == 3
    assert len(list((tmp_path / "look-samples").glob("*.png"))) == 3
    assert not (tmp_path / "look").exists()


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
