"""What the Trainer does beside its steps: says how many there are, logs and shows them, and stops at a bad loss."""

import math
import time

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

FEW_STEPS = 20  # below these a model hardly changes at a usual learning rate


class Plan(TrainerCallback):
    """Says before the first step how many there will be, and warns if they are few."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        data = self.trainer.train_dataset
        samples = f"{len(data):,} samples" if hasattr(data, "__len__") else "Streamed samples"
        done = f"; {state.global_step:,} of them are done" if state.global_step else ""
        print(f"{samples}, effective batch {batch:,}: {counted(state.max_steps, 'step')} in all{done}.", flush=True)
        if state.max_steps < FEW_STEPS:
            print(
                f"Warning: {counted(state.max_steps, 'step')} will hardly change the model. For few samples give a "
                "smaller --effective_batch_size, more --num_train_epochs, or a higher --learning_rate.",
                flush=True,
            )


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Ends(TrainerCallback):
    """Logs the first and the last step whatever the interval is, and those of evaluations, of which any may be the
    last."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # intervals as given now, not as in the checkpoint

    def on_step_end(self, args, state, control, **kwargs):
        is_end = state.global_step == 1 or state.global_step >= state.max_steps
        if args.logging_strategy != "no" and (is_end or control.should_evaluate):
            control.should_log = True

    on_epoch_end = on_step_end


class StopAtBadLoss(TrainerCallback):
    """Stops before a step that a NaN or infinite loss would spoil the weights with."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.has_bad_loss:
            raise FloatingPointError(
                f"The loss of step {state.global_step + 1} is NaN or infinite, and nothing was saved after it. "
                f"{self.trainer.advice()} A lower learning rate or --max_grad_norm may help."
            )


class CountSkipped(TrainerCallback):
    """Counts the samples that were skipped in all processes and before a restart; stops when they are too many."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        trainer, data = self.trainer, self.trainer.train_dataset
        trainer.recall_skipped()
        # Of the whole run, so that chance at its beginning does not stop it.
        if hasattr(data, "__len__"):
            steps = max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
            trainer.samples = len(data) * state.max_steps / steps
        else:
            batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            trainer.samples = state.max_steps * batch

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.check_skipped()


class Progress(ProgressCallback):
    """transformers' progress bar, with loss, learning rate and tokens per second beside the time left."""

    def __init__(self, trainer):
        super().__init__()
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.start = time.monotonic()
        if self.training_bar is not None:
            self.training_bar.update(state.global_step)  # of the run that this one goes on with
            self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            rate = int(self.trainer.tokens_seen) / (time.monotonic() - self.start)
            self.training_bar.set_postfix(
                {"loss": f"{logs['loss']:.4g}", "lr": f"{logs['learning_rate']:.3g}", "tokens/s": f"{rate:.0f}"}
            )
        elif "eval_loss" in logs:
            self.training_bar.write(f"step {state.global_step}: evaluation loss {logs['eval_loss']:.4g}")
