"""The training command: its loss, what it learns, its options and what it refuses before the first step."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from pheye import PheyeProcessor
from pheye.training import train
from pheye.training.collator import PheyeCollator
from pheye.training.mixture import Mixture
from pheye.training.trainer import PheyeTrainer

from tiny import tiny_image
from training_runs import command, refusal, run_alone, save_base, weights, write_data


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), lora_dropout=0.1)


@pytest.fixture(scope="module")
def base_without_dropout(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """16 samples with answers of unequal length."""
    return write_data(tmp_path_factory.mktemp("data"), 16)


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


def relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    difference = sum((a[name] - b[name]).square().sum() for name in a)
    return (difference / sum(tensor.square().sum() for tensor in b.values())).sqrt().item()


def test_the_gradient_is_that_of_the_whole_batch_over_accumulation_and_processes(base_without_dropout, data, tmp_path):
    base, held_out = base_without_dropout, data.with_name("held_out.json")
    held_out.write_text(json.dumps(json.loads(data.read_text())[:5]))  # of which accelerate makes eight
    evaluation = ["--eval_data", str(held_out), "--per_device_eval_batch_size", "2", "--eval_on_start"]
    whole = step_of_sgd(
        base, data, tmp_path / "a", "--per_device_train_batch_size", "16", "--effective_batch_size", "16", *evaluation
    )
    accumulated = step_of_sgd(
        base, data, tmp_path / "b", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "16"
    )
    sizes = ["--per_device_train_batch_size", "8", "--effective_batch_size", "16"]
    spread = step_of_sgd(base, data, tmp_path / "c", *sizes, *evaluation, processes=2)
    assert relative_difference(accumulated, whole) < 1e-5
    assert relative_difference(spread, whole) < 1e-5
    alone, shared = (
        json.loads((tmp_path / run / "checkpoint-1" / "trainer_state.json").read_text())["log_history"] for run in "ac"
    )
    losses = [next(row["eval_loss"] for row in log if "eval_loss" in row) for log in (alone, shared)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
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


# --- What is learnt ---


def test_vision_gradient_checkpointing_is_of_the_vision_tower_alone(base):
    for asked in (False, True):
        model, _ = train.load_model(base, bf16=False, vision_gradient_checkpointing=asked)
        assert {layer.gradient_checkpointing for layer in model.pheye.vision_layers()} == {asked}
        assert not any(layer.gradient_checkpointing for layer in model.pheye.decoder_layers())


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
    printed = capsys.readouterr().out
    assert printed.startswith("Trains ") and "64 samples, effective batch 16: 240 steps in all." in printed

    model = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    answers = [answer_of(model, processor, tiny_image(index)) for index in range(64)]
    assert answers == [code(index) for index in range(64)]

    before, after = load_file(base_without_dropout / "model.safetensors"), weights(output)
    frozen = [name for name in before if name.split(".")[1] in ("vision_tower", "language_model")]
    assert frozen and all(torch.equal(after[name], before[name]) for name in frozen)
    assert (output / "training.png").stat().st_size > 1000
    card = (output / "README.md").read_text()
    assert str(base_without_dropout) not in card
    for fact in (
        f"`{base_without_dropout.name}`",
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


# --- What is said ---


def test_a_run_says_what_it_will_do_and_how_to_try_what_it_has_made(base, data, tmp_path, capsys):
    output = tmp_path / "my model"
    trainer = train.run(command(base, data, output, "--logging_steps", "500", "--save_steps", "500"))
    printed = capsys.readouterr().out
    assert "16 samples, effective batch 128: 1 step in all.\nWarning: 1 step will hardly change the model" in printed
    loss = trainer.state.log_history[0]["loss"]
    assert f"{output} holds the model. Loss: {loss:.4g} at step 1.\n" in printed
    assert printed.rstrip().endswith(f"Try it: pheye ask '{output}' IMAGE \"question\"")
    steps = ["--effective_batch_size", "4", "--num_train_epochs", "6", "--logging_steps", "500"]
    trainer = train.run(command(base, data, tmp_path / "alone", *steps, "--trained_only"))
    printed = capsys.readouterr().out
    assert "24 steps in all.\n" in printed and "Warning" not in printed
    logged = [row["step"] for row in trainer.state.log_history if "loss" in row]
    assert logged == [1, 24] and " at step 1, " in printed and " at step 24." in printed
    assert f"load_trained(model, '{tmp_path / 'alone'}') of pheye.training.trained" in printed


def interrupted(arguments: list[str], capsys) -> str:
    assert train.main(arguments) == 130
    message = capsys.readouterr().err
    assert "interrupted." in message and "Traceback" not in message
    return message


def test_who_interrupts_a_run_is_told_what_is_kept(base, data, tmp_path, monkeypatch, capsys):
    output, step = tmp_path / "out", PheyeTrainer.training_step

    def interrupt_at(number: int):
        def training_step(self, *args, **kwargs):
            if self.state.global_step + 1 == number:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        monkeypatch.setattr(PheyeTrainer, "training_step", training_step)

    arguments = command(base, data, output, "--effective_batch_size", "4", "--save_steps", "2")
    interrupt_at(2)
    none = "There is no checkpoint to go on from, so the same command begins anew"
    assert none in interrupted(arguments, capsys)
    interrupt_at(4)
    assert f"{output / 'checkpoint-2'} is kept; the same command goes on from it." in interrupted(arguments, capsys)
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-2", "run.json", "run.lock"]
    without = command(base, data, tmp_path / "other", *arguments[-4:], "--save_only_model", "true")
    assert none in interrupted(without, capsys)  # what it saved has no optimizer
    monkeypatch.undo()
    assert train.run(arguments).state.global_step == 4


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_ctrl_c_in_the_terminal_prints_a_line_and_no_traceback(base, data, tmp_path, workers):
    """A terminal sends the signal to all processes of the command."""
    arguments = command(base, data, tmp_path / "out", "--effective_batch_size", "1", "--num_train_epochs", "1000")
    arguments += ["--save_steps", "1", "--dataloader_num_workers", workers]
    process = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
         "import sys; from pheye.training import train; sys.exit(train.main(sys.argv[1:]))", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "out" / "checkpoint-2").is_dir():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted." in errors and "the same command goes on from it" in errors and "Traceback" not in errors


# --- Options ---


def test_lora_of_the_language_model_has_the_numbers_that_were_given(base, data, tmp_path):
    options = ["--language_model_lora", "--lora_rank", "3", "--lora_alpha", "7", "--lora_dropout", "0.5"]
    *_, training = parsed = train.parse(command(base, data, tmp_path, *options))
    _, lora = train.load_model(**vars(parsed[0]), bf16=training.bf16)
    config = lora.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 7, 0.5)
    _, lora = train.load_model(base, language_model_lora=True, bf16=False)
    config = lora.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.05)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "processor_config.json"])
def test_a_base_that_is_not_whole_is_named_in_a_line(data, tmp_path, name, capsys):
    base = save_base(tmp_path / "base")
    (base / name).write_bytes((base / name).read_bytes()[:50])
    assert str(base) in refusal(capsys, command(base, data, tmp_path / "out"))


def test_a_streamed_run_ends_with_a_model(base, tmp_path):
    rows = {"image": [], "question": ["What is it?"] * 5, "answers": [["a cat"]] * 5}
    for index in range(5):
        tiny_image(index).save(tmp_path / f"{index}.png")
        rows["image"].append(str(tmp_path / f"{index}.png"))
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    options = ["--streaming", "--question_column", "question", "--answers_column", "answers", "--max_steps", "2"]
    options += ["--per_device_train_batch_size", "2", "--effective_batch_size", "2"]
    train.run(command(base, tmp_path / "rows.parquet", tmp_path / "out", *options))
    assert weights(tmp_path / "out").keys() == weights(base).keys()
    assert "What does the image show?" in (tmp_path / "out" / "README.md").read_text()  # a stream is not asked twice


def test_weights_that_the_last_step_spoilt_are_not_saved(base, data, tmp_path, monkeypatch, capsys):
    def spoil(self, *args, original=PheyeTrainer.training_step, **kwargs):
        loss = original(self, *args, **kwargs)
        parameter = next(one for one in self.model.parameters() if one.requires_grad)
        parameter.data.fill_(float("nan"))
        return loss

    monkeypatch.setattr(PheyeTrainer, "training_step", spoil)
    options = ["--max_steps", "1", "--effective_batch_size", "4", "--per_device_train_batch_size", "4"]
    options += ["--save_strategy", "no"]
    message = refusal(capsys, command(base, data, tmp_path / "out", *options))
    assert "trained tensors hold NaN or infinity" in message and not (tmp_path / "out" / "model.safetensors").exists()


def test_data_to_evaluate_on_is_not_streamed(base, data, tmp_path, capsys):
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps({"sources": [{"path": "org/set", "streaming": True}]}))
    message = refusal(capsys, command(base, data, tmp_path / "out", "--eval_data", str(mixture)))
    assert "its evaluation would not end" in message


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
        (["--attention", "no_such_attention"], "no_such_attention"),
        (["--no_such_option", "3"], "--no_such_option"),
    ],
)
def test_options_that_contradict_each_other_are_refused(base, data, tmp_path, options, message, capsys):
    assert message in refusal(capsys, command(base, data, tmp_path / "out", *options))


def test_memory_that_runs_out_is_an_error_with_the_option_that_helps(base, data, tmp_path, monkeypatch, capsys):
    def run_out(*args, **kwargs):
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB.")

    monkeypatch.setattr(PheyeTrainer, "training_step", run_out)
    message = refusal(capsys, command(base, data, tmp_path / "out", "--effective_batch_size", "4"))
    assert "Tried to allocate" in message and "smaller --per_device_train_batch_size" in message


def test_a_bug_shows_where_it_is(base, data, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("not for the user")

    monkeypatch.setattr(PheyeTrainer, "training_step", broken)
    with pytest.raises(ValueError, match="not for the user"):
        train.main(command(base, data, tmp_path / "out", "--effective_batch_size", "4"))


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
