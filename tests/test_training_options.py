"""Options of the training command: what does nothing is refused, and what a run is bound to is recorded."""

import dataclasses

import pytest
from transformers import TrainingArguments

from pheye.common.files import differences
from pheye.training import train
from pheye.training.formats import Source
from pheye.training.options import (
    FREE,
    WITHOUT_EFFECT,
    DataArguments,
    PheyeTrainingArguments,
    settings_that_matter,
)

COMMON = ["--model", "m", "--data", "d.json", "--output", "out", "--use_cpu", "true", "--bf16", "false"]


def refused(options: list[str]) -> str:
    with pytest.raises(ValueError) as caught:
        train.parse([*COMMON, *options])
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["--resume_from_checkpoint", "nowhere"], "the same command goes on by itself"),
        (["--train_sampling_strategy", "group_by_length"], "drawn from the seed"),
        (["--do_train"], "always trains"),
        (["--do_eval"], "give --eval_data"),
        (["--do_predict"], "give --eval_data"),
        (["--hub_strategy", "end"], "pushes the finished model"),
        (["--hub_model_id", "me/mine"], "needs --push_to_hub"),
        (["--use_liger_kernel"], "no Liger kernels"),
        (["--logging_nan_inf_filter"], "stops the run"),
        (["--logging_first_step", "false"], "logged always"),
        (["--auto_find_batch_size"], "smaller --per_device_train_batch_size"),
        (["--remove_unused_columns"], "makes its batches itself"),
        (["--eval_strategy", "steps", "--eval_steps", "5"], "give --eval_data"),
        (["--eval_on_start"], "give --eval_data"),
        (["--load_best_model_at_end"], "give --eval_data"),
        (["--early_stopping_patience", "2"], "give --eval_data"),
        (["--save_strategy", "best"], "give --eval_data"),
        (["--eval_data", "e.json", "--eval_strategy", "no"], "evaluates never"),
        (["--eval_data", "e.json", "--eval_strategy", "epoch", "--eval_steps", "5"], "--eval_strategy is epoch"),
        (["--eval_data", "e.json", "--bf16_full_eval"], "as training does"),
        (["--eval_data", "e.json", "--metric_for_best_model", "cider"], "evaluation gives the loss"),
        (["--eval_data", "e.json", "--metric_for_best_model", "loss", "--greater_is_better", "true"], "worst model"),
        (["--eval_data", "e.json", "--eval_steps", "5", "--load_best_model_at_end", "--save_steps", "10"],
         "a checkpoint of each evaluation"),
        (["--save_steps", "5", "--save_strategy", "epoch"], "--save_strategy is epoch"),
        (["--save_total_limit", "5", "--save_strategy", "no"], "saves no checkpoints"),
        (["--logging_steps", "5", "--logging_strategy", "epoch"], "--logging_strategy is epoch"),
        (["--max_steps", "5", "--num_train_epochs", "2"], "--max_steps says where the run ends"),
        (["--warmup_steps", "5", "--lr_scheduler_type", "constant"], "constant has no warm-up"),
        (["--warmup_steps", "5", "--lr_scheduler_type", "greedy"], "greedy has no warm-up"),
        (["--lr_scheduler_kwargs", '{"x": 1}', "--lr_scheduler_type", "constant"], "takes no further arguments"),
        (["--optim_args", "rank=8"], "takes no further arguments"),
        (["--optim_args", "momentum=0.9", "--optim", "sgd"], "takes no further arguments"),
        (["--optim", "sgd", "--adam_beta1", "0.5"], "--optim is sgd"),
        (["--optim_target_modules", "all-linear"], "GaLore"),
        (["--run_name", "first"], "TensorBoard"),
        (["--gradient_checkpointing_kwargs", '{"use_reentrant": false}'], "needs --gradient_checkpointing"),
        (["--lora_rank", "8"], "needs --language_model_lora"),
        (["--dataloader_num_workers", "0", "--dataloader_persistent_workers"], "--dataloader_num_workers is 0"),
    ],
)  # fmt: skip
def test_an_option_that_would_do_nothing_is_refused_by_name(options, remedy):
    message = refused(options)
    assert remedy in message
    assert any(option in message for option in options if option.startswith("--"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_skipped_share", "1.5"], "must be a share"),
        (["--max_skipped_share", "nan"], "must be a share"),
        (["--eval_data", "e.json", "--early_stopping_patience", "0"], "greater than 0"),
        (["--effective_batch_size", "0"], "greater than 0"),
        (["--effective_batch_size", "-8"], "greater than 0"),
        (["--gradient_accumulation_steps", "0"], "greater than 0"),
        (["--per_device_train_batch_size", "0"], "greater than 0"),
        (["--num_train_epochs", "0"], "greater than 0"),
        (["--num_train_epochs", "inf"], "and finite"),
        (["--max_steps", "0"], "greater than 0, or left out"),
        (["--save_steps", "0"], "greater than 0"),
        (["--save_total_limit", "0"], "greater than 0"),
        (["--seed", "-1"], "at least 0"),
        (["--data_seed", str(2**32)], "below 2"),
        (["--learning_rate", "nan"], "and finite"),
        (["--learning_rate", "-1"], "at least 0"),
        (["--pretrained_learning_rate", "-1"], "at least 0"),
        (["--label_smoothing_factor", "1"], "below 1"),
        (["--max_length", "-5"], "at least 1"),
        (["--dataloader_num_workers", "-1"], "at least 0"),
        (["--inspect", "-1"], "must be a number of samples"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(options, message):
    assert message in refused(options)


def test_the_same_options_with_hyphens():
    with_underscores = train.parse([*COMMON, "--all_turns", "--max_steps", "3", "--eval_data", "e.json"])
    with_hyphens = train.parse([*COMMON, "--all-turns", "--max-steps=3", "--eval-data", "e.json"])
    for one, other in zip(with_underscores, with_hyphens, strict=True):
        assert vars(one).keys() == vars(other).keys() and str(one) == str(other)
    assert with_hyphens[2].all_turns and with_hyphens[3].eval_data == ["e.json"]


def test_every_option_about_data_reaches_the_sources():
    given = {"image_folder": "f", "image_sources": "any", "subset": "s", "split": "t", "streaming": True}
    given |= {"image_column": "i", "question_column": "q", "answers_column": "a", "prompt": "P", "caption": True}
    names = {option.name for option in dataclasses.fields(DataArguments)}
    assert names == {*given, "all_turns", "stage"}
    words = [word for name, value in given.items() for word in (f"--{name}", *([value] if value is not True else []))]
    _, _, data, _ = train.parse([*COMMON, *words, "--all_turns"])
    [source] = train.read_sources(["x"], **vars(data))
    assert source == Source("x", "x-s", turns=None, **given)


def test_evaluation_chooses_when_where_that_is_left_open():
    *_, training = train.parse([*COMMON, "--eval_data", "e.json"])
    assert (training.eval_strategy, training.save_strategy, training.save_steps) == ("epoch", "steps", 500)
    *_, training = train.parse([*COMMON, "--eval_data", "e.json", "--eval_steps", "7"])
    assert (training.eval_strategy, training.eval_steps, training.save_steps) == ("steps", 7, 500)
    *_, training = train.parse([*COMMON, "--eval_data", "e.json", "--eval_steps", "7", "--load_best_model_at_end"])
    assert (training.eval_strategy, training.save_strategy, training.save_steps) == ("steps", "steps", 7)
    *_, training = train.parse([*COMMON, "--eval_data", "e.json", "--load_best_model_at_end"])
    assert (training.eval_strategy, training.save_strategy) == ("epoch", "epoch")
    assert training.metric_for_best_model == "loss" and training.greater_is_better is False
    *_, training = train.parse(COMMON)
    assert (training.eval_strategy, training.save_strategy) == ("no", "steps")


def settings(*options: str, source: Source | None = None) -> dict:
    return settings_that_matter(*train.parse([*COMMON, *options]), [source or Source("d.json")])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("label_smoothing_factor", "0.3"), ("neftune_noise_alpha", "5"), ("dataloader_drop_last", "True"),
        ("learning_rate", "1e-3"), ("seed", "1"), ("data_seed", "1"), ("weight_decay", "0.1"),
        ("pretrained_learning_rate", "1e-4"),
        ("lr_scheduler_kwargs", '{"num_cycles": 2}'), ("max_steps", "5"), ("full_determinism", "True"),
        ("average_tokens_across_devices", "False"), ("ignore_data_skip", "True"), ("tf32", "False"),
        ("torch_compile", "True"), ("effective_batch_size", "64"), ("max_length", "50"), ("image_sources", "any"),
    ],
)  # fmt: skip
def test_a_run_is_bound_to_what_changes_its_outcome(option, value):
    assert option in differences(settings(), settings(f"--{option}", value))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("logging_steps", "3"), ("save_steps", "3"), ("save_total_limit", "7"), ("report_to", "none"),
        ("per_device_train_batch_size", "4"), ("gradient_checkpointing", "True"), ("dataloader_num_workers", "1"),
        ("vision_gradient_checkpointing", "True"), ("disable_tqdm", "True"), ("max_skipped_share", "0.5"),
    ],
)  # fmt: skip
def test_a_run_may_go_on_with_what_does_not_change_its_outcome(option, value):
    assert differences(settings(), settings(f"--{option}", value)) == ""


def test_what_is_free_depends_on_other_options():
    streamed = Source("org/set", streaming=True)
    assert "workers" in differences(
        settings(source=streamed), settings("--dataloader_num_workers", "1", source=streamed)
    )
    batch = "--per_device_train_batch_size", "4"
    assert "batch" in differences(settings(source=streamed), settings(*batch, source=streamed))
    dropping = "--dataloader_drop_last", "True"
    assert "batch" in differences(settings(*dropping), settings(*dropping, *batch))


def test_lists_of_options_name_options_that_there_are():
    known = {option.name for option in dataclasses.fields(PheyeTrainingArguments)}
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # transformers 5.24
    assert FREE - newer <= known and set(WITHOUT_EFFECT) <= known
    assert {option.name for option in dataclasses.fields(TrainingArguments)} <= known


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--report_to", "wandb"], "wandb"),
        (["--optim", "lomo"], "lomo"),
        (["--optim", "adamw_bnb_8bit"], "bitsandbytes"),
        (["--adam_beta1", "1.5"], "beta"),
        (["--lr_scheduler_kwargs", '{"no_such": 1}'], "no_such"),
    ],
)
def test_what_is_wrong_with_packages_and_the_optimizer_is_said_before_anything_is_loaded(options, message):
    from pheye.training.options import check_installed

    *_, training = train.parse([*COMMON, *options])
    with pytest.raises(ValueError, match=message):
        check_installed(training)


def test_matplotlib_is_asked_for_before_the_run_and_not_at_its_end(monkeypatch):
    import builtins

    from pheye.training.options import check_installed

    def without(name, *args, original=builtins.__import__, **kwargs):
        if name == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return original(name, *args, **kwargs)

    *_, training = train.parse([*COMMON, "--report_to", "none"])
    check_installed(training)
    for schedule in ("linear", "cosine", "polynomial", "constant_with_warmup", "cosine_with_min_lr"):
        others = {"cosine_with_min_lr": ["--lr_scheduler_kwargs", '{"min_lr": 1e-6}']}.get(schedule, [])
        check_installed(train.parse([*COMMON, "--report_to", "none", "--lr_scheduler_type", schedule, *others])[3])
    monkeypatch.setattr("pheye.common.command.importlib.import_module", without)
    with pytest.raises(ValueError, match=r"needs matplotlib.*\.\[train\]"):
        check_installed(training)
