"""The Trainer: checkpoints that are whole or absent, and what stops a run."""

import dataclasses
import errno
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from pheye import PheyeForConditionalGeneration
from pheye.training import train
from pheye.training.checkpoints import checkpoints, last_checkpoint
from pheye.training.collator import PheyeCollator
from pheye.training.mixture import FixedMixture, Mixture, MixtureSampler, read_mixture
from pheye.training.skipped import read_skipped
from pheye.training.trained import choose_trained, trained_state
from pheye.training.trainer import PheyeTrainer

from budget_runs import model_with_budgets
from tiny import tiny_model, tiny_processor
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
from pheye.training.collator import PheyeCollator
from pheye.training.mixture import Mixture, MixtureSampler, read_mixture
from pheye.training.skipped import read_skipped
from pheye.training.trained import choose_trained, trained_state
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


def test_pretrained_parts_learn_at_their_own_rate_and_go_on_at_it(base, data, tmp_path):
    options = [*STEPS, "--train", "vision_tower"]
    found = {}
    for name, rate in {"same": "1e-2", "none": "0", "tenth": "1e-3"}.items():
        arguments = command(base, data, tmp_path / name, *options, "--pretrained_learning_rate", rate)
        found[name] = train.run(arguments)
    train.run(command(base, data, tmp_path / "one rate", *options))
    file = "model.safetensors"
    assert (tmp_path / "same" / file).read_bytes() == (tmp_path / "one rate" / file).read_bytes()

    old, new = load_file(base / file), load_file(tmp_path / "none" / file)
    changed = {name.split(".")[1] for name in new if not torch.equal(old[name], new[name])}
    assert changed == {"global_lora", "local_lora", "view_encoding", "cross_attention_blocks"}
    moved = load_file(tmp_path / "tenth" / file)
    assert any("vision_tower" in name and not torch.equal(old[name], moved[name]) for name in moved)
    assert "| learning rate of pretrained parts | 0.001 |" in (tmp_path / "tenth" / "README.md").read_text()
    rates = [row["learning_rate"] for row in found["tenth"].state.log_history if "learning_rate" in row]
    assert max(rates) == 1e-2

    (tmp_path / "tenth" / "config.json").unlink()  # as if the run had been killed
    shutil.rmtree(tmp_path / "tenth" / "checkpoint-8")
    train.run(arguments)
    again = load_file(tmp_path / "tenth" / file)
    assert all(torch.equal(again[name], moved[name]) for name in moved)


def test_a_rate_that_deepspeeds_own_optimizer_would_not_get_is_refused(data, tmp_path):
    trainer = python_trainer(tmp_path, data, PheyeTrainer, model=tiny_model())
    trainer.pretrained_learning_rate = 0.1
    trainer.args.hf_deepspeed_config = SimpleNamespace(config={})
    trainer._check_options()
    trainer.args.hf_deepspeed_config.config["optimizer"] = {"type": "AdamW"}
    with pytest.raises(ValueError, match=r"--pretrained_learning_rate 0\.1 does not reach"):
        trainer._check_options()


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


def unreadable(folder: Path, count: int, *places: int) -> Path:
    """A set of `count` samples, of which those that are drawn at `places` have no image."""
    data = write_data(folder, count)
    mixture = Mixture(read_mixture([str(data)]), 42)  # the command's default seed
    order = [mixture[index]["id"] for index in MixtureSampler(mixture)]
    for place in places:
        (folder / f"{order[place].split()[1]}.png").unlink()
    return data


@pytest.mark.once
def test_the_share_of_skipped_images_is_judged_over_the_whole_run_and_not_over_its_beginning(base, tmp_path):
    data = unreadable(tmp_path, 200, 1, 2)  # 1 %, all of them at once
    options = ["--effective_batch_size", "10", "--per_device_train_batch_size", "10"]
    trainer = train.run(command(base, data, tmp_path / "out", *options))
    assert trainer.skipped == 2 and trainer.samples == 200


@pytest.mark.once
def test_a_run_that_goes_on_remembers_what_it_has_skipped(base, tmp_path, monkeypatch, capsys):
    data, output = unreadable(tmp_path, 120, 1, 70), tmp_path / "out"
    options = ["--effective_batch_size", "10", "--per_device_train_batch_size", "10", "--save_steps", "3"]
    arguments = command(base, data, output, *options)
    monkeypatch.setattr(PheyeTrainer, "training_step", stopping_at(5))
    with pytest.raises(KeyboardInterrupt):
        train.run(arguments)
    monkeypatch.undo()
    assert len(read_skipped(output)) == 1
    message = refusal(capsys, arguments)  # 1 before, 1 after, of 120
    assert "2 of the 120 samples of this run" in message
    trainer = train.run([*arguments, "--max_skipped_share", "0.02"])
    assert trainer.skipped == 2 and [row["step"] for row in read_skipped(output)] == [1, 8]


def stopping_at(step: int, error=KeyboardInterrupt, original=PheyeTrainer.training_step):
    """A `training_step` that is interrupted before this step."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            raise error
        return original(self, *args, **kwargs)

    return training_step


# --- The loss where the Trainer computes it ---


def python_trainer(folder: Path, data: Path | None = None, trainer_class=PheyeTrainer, **options) -> PheyeTrainer:
    """A trainer as it is made in Python, with the options of `TrainingArguments` and of the trainer."""
    model = options.pop("model", None) or tiny_model(lora_dropout=0.0)
    choose_trained(model)
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    of_training = {name: options.pop(name) for name in names & options.keys()}
    training = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **of_training)
    mixture = None if data is None else Mixture(read_mixture([str(data)]), 42)
    options = {"train_dataset": mixture, "data_collator": PheyeCollator(tiny_processor()), **options}
    return trainer_class(model=model, args=training, **options)


def batch_of(data: Path, count: int = 4) -> dict:
    mixture = Mixture(read_mixture([str(data)]), 42)
    batch = PheyeCollator(tiny_processor())([mixture[index] for index in range(count)])
    return {name: tensor for name, tensor in batch.items() if isinstance(tensor, torch.Tensor)}


def smoothed(logits, labels, epsilon: float, count: int | None = None) -> float:
    """The formula: the mean over answer tokens of (1 - epsilon) times the loss of the next token, and epsilon times
    the mean loss of all tokens."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels != -100
    log = logits[kept].float().log_softmax(-1)
    of_next = -log.gather(-1, labels[kept][:, None]).sum()
    return ((1 - epsilon) * of_next + epsilon * -log.mean(-1).sum()).item() / (count or int(kept.sum()))


@pytest.mark.parametrize("trainer_class", [PheyeTrainer, Trainer])
def test_label_smoothing_smooths_the_loss_of_the_next_token(data, tmp_path, trainer_class):
    trainer = python_trainer(tmp_path, data, trainer_class, label_smoothing_factor=0.1)
    batch = batch_of(data)
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        found = trainer.compute_loss(model, dict(batch)).item()
        assert found == pytest.approx(smoothed(logits, batch["labels"], 0.1), rel=1e-5)
        assert found != pytest.approx(smoothed(logits[:, 1:], batch["labels"][:, :-1], 0.1), rel=1e-2)
        found = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(50)).item()
        assert found == pytest.approx(smoothed(logits, batch["labels"], 0.1, 50), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_evaluation_takes_the_largest_budget_not_the_routers(data, tmp_path, smoothing):
    model = model_with_budgets(router_size=4)
    last = model.model.router.requires_grad_(False)
    options = {"label_smoothing_factor": smoothing, "eval_dataset": Mixture(read_mixture([str(data)]), 42)}
    trainer = python_trainer(tmp_path, data, PheyeTrainer, model=model, **options)
    calls = []
    last.register_forward_hook(lambda *_: calls.append(1))
    trainer.evaluate()
    assert not calls


def test_the_command_smooths_labels_too(data, tmp_path):
    base = save_base(tmp_path / "base")
    options = ["--per_device_train_batch_size", "16", "--effective_batch_size", "16", "--max_steps", "1"]
    trainer = train.run(command(base, data, tmp_path / "out", *options, "--label_smoothing_factor", "0.2"))
    model = PheyeForConditionalGeneration.from_pretrained(base)
    batch = batch_of(data, 16)
    with torch.no_grad():
        expected = smoothed(model(**batch).logits, batch["labels"], 0.2)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-3)


def test_a_loss_function_of_the_users_gets_what_every_causal_model_gives_it(data, tmp_path):
    calls = []

    def loss_of(outputs, labels, num_items_in_batch=None):
        calls.append(labels)
        return torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )

    trainer, batch = python_trainer(tmp_path, data, compute_loss_func=loss_of), batch_of(data)
    model = trainer.model.eval()
    with torch.no_grad():
        assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert torch.equal(calls[0], batch["labels"])


# --- Evaluation ---


def evaluated(model, data: Path) -> float:
    """The formula: the loss of all answer tokens of a set, over their number."""
    total = tokens = 0
    with torch.no_grad():
        for index in range(len(json.loads(data.read_text()))):
            mixture = Mixture(read_mixture([str(data)]), 42)
            sample = PheyeCollator(tiny_processor())([mixture[index]])
            if sample["skipped"]:
                continue
            batch = {name: tensor for name, tensor in sample.items() if isinstance(tensor, torch.Tensor)}
            count = int((batch["labels"][:, 1:] != -100).sum())
            total, tokens = total + model(**batch).loss.item() * count, tokens + count
    return total / tokens


def test_every_evaluation_is_of_the_same_samples(tmp_path, data):
    rows = json.loads(data.read_text())
    for number, row in enumerate(rows):
        row["conversations"] += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "no " * (1 + number)}]
    several = data.with_name("several.json")
    several.write_text(json.dumps(rows))
    found = []
    for kind in (FixedMixture, Mixture):
        evaluation = kind(read_mixture([str(several)]), 42)
        workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
        trainer = python_trainer(tmp_path / kind.__name__, data, eval_dataset=evaluation, **workers)
        found.append([trainer.evaluate()["eval_loss"] for _ in range(3)])
    assert len({*found[0]}) == 1 and len({*found[1]}) > 1  # the loader stays, and is told an epoch each time


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_loss_of_evaluation_is_that_of_all_answer_tokens(data, tmp_path, size, capsys):
    held_out = write_data(tmp_path, 8)
    (tmp_path / "2.png").write_bytes(b"broken")
    evaluation = Mixture(read_mixture([str(held_out)]), 42)
    trainer = python_trainer(tmp_path / "out", data, eval_dataset=evaluation, per_device_eval_batch_size=size)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(evaluated(trainer.model.eval(), held_out), rel=1e-5)
    assert "1 samples of the evaluation data were left out: their image could not be read." in capsys.readouterr().out
    for index in range(8):
        (tmp_path / f"{index}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="No image of the evaluation data could be read"):
        trainer.evaluate()


def test_predictions_are_the_logits_alone_and_metrics_get_them(data, tmp_path):
    seen = []

    def metrics(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        right = (prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]).mean()
        return {"accuracy": right}

    mixture = Mixture(read_mixture([str(data)]), 42)
    trainer = python_trainer(tmp_path, data, eval_dataset=mixture, compute_metrics=metrics)
    assert trainer.evaluate()["eval_accuracy"] >= 0
    assert seen[0][0].shape[:2] == seen[0][1].shape and seen[0][0].ndim == 3
    predicted = trainer.predict(mixture)
    assert predicted.predictions.shape == seen[0][0].shape and predicted.metrics["test_loss"] > 0


BEST = ["--effective_batch_size", "4", "--num_train_epochs", "3", "--learning_rate", "1e-2"]
BEST += ["--lr_scheduler_type", "constant", "--load_best_model_at_end"]


def best_command(base: Path, data: Path, folder: Path, *options: str) -> tuple[list[str], Path]:
    """The command with data to evaluate on, which lie in `folder`, and these; training on `data` makes them worse."""
    held_out = write_data(folder, 8, answer=lambda index: "?!" * (1 + index % 3))
    arguments = command(base, data, folder / "out", *BEST, "--eval_data", str(held_out), *options)
    place = arguments.index("--image_folder")  # so that each set has its images beside it
    return arguments[:place] + arguments[place + 2 :], held_out


def losses(trainer) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}


@pytest.mark.parametrize("limit", ["1", "2"])
def test_the_best_model_is_kept_and_written(base, data, tmp_path, limit):
    output = tmp_path / "out"
    arguments, held_out = best_command(base, data, tmp_path, "--eval_steps", "2", "--save_total_limit", limit)
    trainer = train.run(arguments)
    found = losses(trainer)
    best = min(found, key=found.get)
    assert list(found) == [2, 4, 6, 8, 10, 12] and best < 12
    assert trainer.state.best_model_checkpoint == str(output / f"checkpoint-{best}")
    kept, final = weights(output / f"checkpoint-{best}"), weights(output)
    assert all(torch.equal(tensor, final[name]) for name, tensor in kept.items())
    model = PheyeForConditionalGeneration.from_pretrained(output)
    assert evaluated(model, held_out) == pytest.approx(found[best], rel=1e-4)
    assert f"at step {best} |" in (output / "README.md").read_text()


def test_the_best_model_is_found_in_python_as_well(data, tmp_path):
    mixture = Mixture(read_mixture([str(data)]), 42)
    trainer = python_trainer(
        tmp_path / "out", data, eval_dataset=mixture, eval_strategy="steps", eval_steps=1, save_steps=1, max_steps=4,
        save_total_limit=1, load_best_model_at_end=True, learning_rate=0.3, per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path / "out" and best.is_dir()
    state = weights(best)
    assert all(torch.equal(parameter, state[name]) for name, parameter in trained_state(trainer.model).items())


def test_training_stops_early_and_a_restart_does_not_go_further(base, data, tmp_path):
    output = tmp_path / "out"
    arguments, _ = best_command(base, data, tmp_path, "--eval_steps", "1", "--early_stopping_patience", "3")
    trainer = train.run(arguments)
    found = losses(trainer)
    best = min(found, key=found.get)
    assert list(found)[-1] == best + 3 < 12
    assert [row["step"] for row in trainer.state.log_history if "loss" in row][-1] == best + 3
    expected = (output / "model.safetensors").read_bytes()
    (output / "config.json").unlink()  # as if it had been stopped before
    again = train.run(arguments)
    assert again.state.global_step == best + 3 and losses(again) == found
    assert (output / "model.safetensors").read_bytes() == expected


def test_evaluation_before_the_first_step_costs_no_patience_when_a_run_goes_on(base, data, tmp_path, monkeypatch):
    options = ["--eval_steps", "1", "--early_stopping_patience", "3", "--eval_on_start"]
    arguments, _ = best_command(base, data, tmp_path, *options)
    expected = losses(train.run(arguments))
    assert 0 in expected
    last = max(expected)
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(PheyeTrainer, "training_step", stopping_at(last))
    assert train.main(arguments) == 130
    monkeypatch.undo()
    assert losses(train.run(arguments)) == expected


# --- Nothing is left to do ---


@pytest.mark.parametrize("length", [["--max_steps", "6"], ["--num_train_epochs", "0.5"], ["--num_train_epochs", "2"]])
@pytest.mark.parametrize("times", [1, 2])
def test_a_run_that_was_stopped_after_its_last_checkpoint_takes_no_further_step(base, data, tmp_path, length, times):
    options = ["--effective_batch_size", "4", "--learning_rate", "1e-2", "--lr_scheduler_type", "constant"]
    arguments = command(base, data, tmp_path / "out", *options, *length, "--save_steps", "2")
    steps = train.run(arguments).state.global_step
    expected = (tmp_path / "out" / "model.safetensors").read_bytes()
    kept = checkpoints(tmp_path / "out")
    assert kept[-1].name == f"checkpoint-{steps}"
    for _ in range(times):
        (tmp_path / "out" / "config.json").unlink()
        (tmp_path / "out" / "model.safetensors").unlink()
        if len(kept) == 2:  # as if it had been stopped before the oldest was removed
            shutil.copytree(kept[0], tmp_path / "out" / "checkpoint-1")
        trainer = train.run(arguments)
        assert trainer.state.global_step == steps
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected
        assert checkpoints(tmp_path / "out") == kept
    assert f"| steps | {steps} |" in (tmp_path / "out" / "README.md").read_text()


# --- Checkpoints that are not whole ---


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_torn_checkpoint_is_named_and_the_run_ends_as_if_nothing_had_happened(base, data, tmp_path, name, capsys):
    output = tmp_path / "out"
    arguments = command(base, data, output, *STEPS, "--lr_scheduler_type", "constant")
    train.run(arguments)
    expected = (output / "model.safetensors").read_bytes()
    (output / "config.json").unlink()
    path = output / "checkpoint-8" / name
    path.write_bytes(path.read_bytes()[:-20])
    (output / "checkpoint-best").mkdir()
    capsys.readouterr()
    assert train.run(arguments).state.global_step == 8
    printed = capsys.readouterr().out
    assert f"checkpoint-8 is left out: its {name} is not as it was written." in printed
    assert "The run goes on from checkpoint-7." in printed and "7 of them are done" in printed
    assert (output / "model.safetensors").read_bytes() == expected


def test_a_run_without_a_whole_checkpoint_begins_anew_and_says_so(base, data, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = command(base, data, output, *STEPS, "--save_total_limit", "1")
    train.run(arguments)
    expected = (output / "model.safetensors").read_bytes()
    (output / "config.json").unlink()
    (output / "checkpoint-8" / "trained.safetensors").unlink()
    train.run(arguments)
    printed = capsys.readouterr().out
    assert "its trained.safetensors is missing" in printed and "The run begins anew." in printed
    assert (output / "model.safetensors").read_bytes() == expected


def test_a_checkpoint_of_other_parts_is_refused(data, tmp_path):
    trainer = python_trainer(tmp_path / "out", data, max_steps=1)
    trainer.train()
    other = python_trainer(tmp_path / "other", data, max_steps=2)
    choose_trained(other.model, freeze=["global_lora"])
    with pytest.raises(ValueError, match=r"checkpoint-1 holds .*global_lora.*, which does not train"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    choose_trained(other.model, train=["lm_head"])
    with pytest.raises(ValueError, match=r"checkpoint-1 lacks .*lm_head"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_whatever_goes_wrong_while_saving_is_said_in_a_line(base, data, tmp_path, monkeypatch, capsys):
    class RustError(Exception):
        """Neither an OSError nor a RuntimeError, as safetensors' and tokenizers' own."""

    def full(*args, **kwargs):
        raise RustError("No space left on device (os error 28)")

    output = tmp_path / "out"
    arguments = command(base, data, output, "--effective_batch_size", "8", "--save_steps", "1")
    monkeypatch.setattr("pheye.training.trainer.save_trained", full)
    message = refusal(capsys, arguments)
    assert "Step 1 could not be saved" in message and "RustError: No space left" in message
    monkeypatch.undo()
    monkeypatch.setattr(PheyeForConditionalGeneration, "save_pretrained", full)
    message = refusal(capsys, arguments)
    assert "No space left" in message and "checkpoint-2 is whole" in message
    assert not (output / "unfinished").exists()
    monkeypatch.undo()
    assert train.main(arguments) == 0


# --- Options that the trainer refuses ---


def test_a_mixture_has_an_order_of_its_own(data, tmp_path):
    with pytest.raises(ValueError, match="leave train_sampling_strategy='group_by_length' out"):
        python_trainer(tmp_path, data, train_sampling_strategy="group_by_length")


def test_several_gpus_in_one_process_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="accelerate launch"):
        python_trainer(tmp_path, data)


# --- Hooks of the library that this relies on ---


def test_the_trainers_private_methods_that_are_overridden_still_exist_and_are_used():
    for name in (
        "_get_output_dir",
        "_save_checkpoint",
        "_save",
        "_load_from_checkpoint",
        "_load_best_model",
        "_run_epoch",
        "training_step",
        "compute_loss",
        "prediction_step",
        "evaluation_loop",
    ):
        assert callable(getattr(Trainer, name)), name
    source = Path(sys.modules[Trainer.__module__].__file__).read_text()
    for call in (
        "self._get_output_dir(trial=trial)",
        "self._save_checkpoint(model, trial)",
        "self._save(output_dir",
        "self._run_epoch(",
        "self._load_best_model()",
        "self.prediction_step(",
        "self.label_smoother(",
    ):
        assert call in source, call
