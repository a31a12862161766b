"""What is said before the first step and logged at the ends; the steps themselves are tested in test_trainer.py."""

from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from pheye.training.callbacks import Ends, Plan, counted

pytestmark = pytest.mark.once


def arguments(**options) -> SimpleNamespace:
    defaults = {"train_batch_size": 2, "gradient_accumulation_steps": 4, "world_size": 3, "logging_strategy": "steps"}
    steps = {"logging_steps": 7, "eval_steps": None, "save_steps": 0.5}
    return SimpleNamespace(**{**defaults, **steps, **options})


def said(capsys, data, **state) -> str:
    plan = Plan(SimpleNamespace(train_dataset=data))
    plan.on_train_begin(arguments(), TrainerState(is_world_process_zero=True, **state), TrainerControl())
    return capsys.readouterr().out


def test_the_plan_names_samples_batch_and_steps_and_warns_of_few(capsys):
    assert said(capsys, range(1200), max_steps=50) == "1,200 samples, effective batch 24: 50 steps in all.\n"
    told = said(capsys, range(60), max_steps=1)
    assert told.startswith("60 samples, effective batch 24: 1 step in all.\nWarning: 1 step will hardly change")
    for option in ("--effective_batch_size", "--num_train_epochs", "--learning_rate"):
        assert option in told
    assert "Warning" in said(capsys, range(60), max_steps=19)
    assert "Warning" not in said(capsys, range(60), max_steps=20)
    assert "30 steps in all; 12 of them are done." in said(capsys, range(60), max_steps=30, global_step=12)
    assert said(capsys, iter(()), max_steps=30).startswith("Streamed samples, effective batch 24: 30 steps")


def test_one_process_alone_says_it(capsys):
    plan = Plan(SimpleNamespace(train_dataset=range(3)))
    plan.on_train_begin(arguments(), TrainerState(is_world_process_zero=False, max_steps=3), TrainerControl())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("strategy", ["steps", "epoch", "no"])
def test_the_first_and_the_last_step_are_logged_whatever_the_interval(strategy):
    logged = []
    for step in range(1, 6):
        control, state = TrainerControl(), TrainerState(global_step=step, max_steps=5)
        Ends().on_step_end(arguments(logging_strategy=strategy), state, control)
        logged += [step] if control.should_log else []
    assert logged == ([] if strategy == "no" else [1, 5])


@pytest.mark.parametrize("ends", [Ends.on_step_end, Ends.on_epoch_end])
def test_a_step_that_is_evaluated_may_be_the_last_and_is_logged(ends):
    control = TrainerControl(should_evaluate=True)
    ends(Ends(), arguments(), TrainerState(global_step=3, max_steps=5), control)
    assert control.should_log


def test_intervals_are_those_of_now_and_not_of_the_checkpoint():
    state = TrainerState(max_steps=20, logging_steps=500, save_steps=500, eval_steps=3)
    Ends().on_train_begin(arguments(), state, TrainerControl())
    assert (state.logging_steps, state.save_steps, state.eval_steps) == (7, 10, 3)


def test_words():
    assert [counted(number, "step") for number in (0, 1, 2, 1000)] == ["0 steps", "1 step", "2 steps", "1,000 steps"]
