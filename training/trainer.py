"""The Trainer for Pheye: transformers' own, with checkpoints that are whole or absent and hold what trains."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..common.command import InputError
from .mixture import Mixture, MixtureSampler
from .trained import TRAINED_FILE, copy_state, nonfinite, read_trained, save_trained, trained_state

UNFINISHED = "unfinished"  # folder in which files are written before they are moved to their place
SKIPPED_FILE = "skipped.jsonl"
LEAST_SEEN = 100  # samples before the share of skipped ones is judged


class PheyeTrainer(Trainer):
    """Trains a Pheye whose trained parameters were chosen by `choose_trained`, with batches of `PheyeCollator`.

    The loss is transformers': summed over answer tokens and divided by their number in the whole effective batch, over
    accumulation steps and processes (`average_tokens_across_devices`).

    Args:
        language_model_lora: settings of `add_language_model_lora`, to be saved with the weights.
        max_skipped_share: of samples whose image cannot be read; more raise an error.
    """

    def __init__(
        self, *args, language_model_lora: LoraConfig | None = None, max_skipped_share: float = 0.01, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.language_model_lora = language_model_lora
        self.max_skipped_share = max_skipped_share
        self.staging: str | None = None
        self.seen = self.skipped = 0
        self.tokens_seen = torch.zeros((), dtype=torch.long, device=self.args.device)  # read only when logged
        self.has_bad_loss = torch.zeros((), dtype=torch.bool, device=self.args.device)
        self.add_callback(StopAtBadLoss(self))
        if self.pop_callback(ProgressCallback):
            self.add_callback(Progress(self))

    def _get_train_sampler(self, train_dataset=None):
        # accelerate tells either the sampler or the data set which epoch it is; this sampler tells the mixture.
        data = self.train_dataset if train_dataset is None else train_dataset
        return MixtureSampler(data) if isinstance(data, Mixture) else super()._get_train_sampler(data)

    # --- Steps ---

    def training_step(self, model, inputs, num_items_in_batch=None):
        skipped, seen = inputs.pop("skipped", []), inputs.pop("seen", len(inputs["input_ids"]))
        self._note_skipped(skipped, seen)
        if len(skipped) == seen:
            del inputs["labels"]
        self.tokens_seen += inputs["attention_mask"].sum() * self.args.world_size
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.has_bad_loss |= ~torch.isfinite(loss)
        return loss

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        if "labels" not in inputs:
            # No image of this batch could be read. It must count for nothing, but all processes run a backward pass.
            outputs = model(**inputs)
            loss = outputs.logits.float().sum() * 0
            return (loss, outputs) if return_outputs else loss
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _note_skipped(self, skipped: list[dict], seen: int):
        self.seen, self.skipped = self.seen + seen, self.skipped + len(skipped)
        if skipped:
            with open(Path(self.args.output_dir) / SKIPPED_FILE, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in skipped)
        if self.seen >= LEAST_SEEN:
            self._check_skipped()

    def _check_skipped(self):
        if self.skipped > self.max_skipped_share * self.seen:
            raise InputError(
                f"{self.skipped} of {self.seen} samples have no readable image, more than the share of "
                f"{self.max_skipped_share} that is allowed; see {Path(self.args.output_dir) / SKIPPED_FILE}, and mend "
                "the data or raise --max_skipped_share."
            )

    # --- Checkpoints: written aside, then moved to their place in one step ---

    def _get_output_dir(self, trial) -> str:
        return self.staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        bad = nonfinite(self.accelerator.unwrap_model(self.model))
        if bad:
            raise FloatingPointError(
                f"At step {self.state.global_step}, {len(bad)} trained tensors hold NaN or infinity ({bad[0]} first); "
                f"nothing was saved. {self.advice()}"
            )
        output, staging = Path(self.args.output_dir), Path(self.args.output_dir) / UNFINISHED
        self._alone(lambda: shutil.rmtree(staging, ignore_errors=True))
        self.staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:
            raise self.disk_error(error) from error
        finally:
            self.staging = None
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._alone(lambda: publish(staging / name, output / name))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(
                output_dir=str(output), save_total_limit=self.args.save_total_limit, best_model_checkpoint=best
            )

    def _alone(self, action):
        """Run `action` in the main process while the others wait."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            action()
        self.accelerator.wait_for_everyone()

    def disk_error(self, error: Exception) -> Exception:
        """`error` of writing to the output folder, in the user's words."""
        staging = Path(self.args.output_dir) / UNFINISHED
        free = shutil.disk_usage(self.args.output_dir).free
        shutil.rmtree(staging, ignore_errors=True)
        return OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"Step {self.state.global_step} could not be saved to {self.args.output_dir}, where {free / 1e9:.1f} GB "
            f"were free: {error}. {self.advice()}",
        )

    def advice(self) -> str:
        last = last_checkpoint(self.args.output_dir)
        if last is None:
            return "There is no earlier checkpoint; run the same command again to begin anew once the cause is mended."
        return f"{last.name} is whole; run the same command again to go on from it once the cause is mended."

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        """Only what trains; the whole model is written once, at the end (`save_result`)."""
        if not self.args.should_save:
            return
        os.makedirs(output_dir, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        names = trained_state(model)
        state = names if state_dict is None else {name: state_dict[name] for name in names}
        save_trained(state, output_dir, self.language_model_lora)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        if self.is_fsdp_enabled or not (Path(resume_from_checkpoint) / TRAINED_FILE).is_file():
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        state, _ = read_trained(resume_from_checkpoint)
        copy_state(model or self.model, state)


def publish(source: Path, target: Path):
    """Move a written folder to its place, after all of it is on the disk."""
    for path in source.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)  # of an earlier run that went on from a checkpoint before it
    os.replace(source, target)


def last_checkpoint(output: str | os.PathLike) -> Path | None:
    """The checkpoint of most steps in an output folder. Each that is there is whole."""
    found = [path for path in Path(output).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class StopAtBadLoss(TrainerCallback):
    """Stops before a step that a NaN or infinite loss would spoil the weights with."""

    def __init__(self, trainer: PheyeTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.has_bad_loss:
            raise FloatingPointError(
                f"The loss of step {state.global_step + 1} is NaN or infinite, and nothing was saved after it. "
                f"{self.trainer.advice()} A lower learning rate or --max_grad_norm may help."
            )


class Progress(ProgressCallback):
    """transformers' progress bar, with loss, learning rate and tokens per second beside the time left."""

    def __init__(self, trainer: PheyeTrainer):
        super().__init__()
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.start = time.monotonic()
        if self.training_bar is not None:
            self.training_bar.update(state.global_step)  # of the run that this one goes on with
            self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            rate = int(self.trainer.tokens_seen) / (time.monotonic() - self.start)
            self.training_bar.set_postfix(
                {"loss": f"{logs['loss']:.4g}", "lr": f"{logs['learning_rate']:.3g}", "tokens/s": f"{rate:.0f}"}
            )
