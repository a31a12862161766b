"""The Trainer for Pheye: transformers' own, with checkpoints that are whole or absent and hold what trains."""

import errno
import os
import shutil
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..common.command import InputError
from .callbacks import CountSkipped, Ends, Progress, StopAtBadLoss
from .checkpoints import UNFINISHED, clear, flaw_of, publish, rotate, whole_checkpoint
from .collator import IGNORED, PheyeCollator
from .mixture import Mixture, MixtureSampler
from .skipped import SKIPPED_FILE, append_skipped, keep_until
from .trained import (
    TRAINED_FILE,
    check_names,
    copy_state,
    nonfinite,
    read_trained,
    save_trained,
    set_rate_of_pretrained,
    trained_state,
)
from .vision_budgets import LARGEST, UNIVERSAL, drawn_budget

LEAST_JUDGED = 100  # samples of a run whose share of skipped ones is judged; one may be broken in a smaller one


class PheyeTrainer(Trainer):
    """Trains a Pheye whose trained parameters were chosen by `choose_trained`, with batches of `PheyeCollator`.

    The loss is transformers': summed over answer tokens and divided by their number in the whole effective batch, over
    accumulation steps and processes (`average_tokens_across_devices`). The loss of evaluation is summed over all
    answer tokens and divided by their number. A `compute_loss_func` gets labels that are not shifted, as with every
    causal language model.

    Args:
        language_model_lora: settings of `add_language_model_lora`, to be saved with the weights.
        max_skipped_share: of the run's samples whose image cannot be read; more raise an error.
        vision_budgets: what a step trains of a model with budgets: "largest", or "universal", one that is drawn. The
            arguments must have gone through `prepare_for_budgets`. Evaluation takes the largest.
        pretrained_learning_rate: of what trains of the pretrained models; by default that of all.
    """

    def __init__(
        self,
        *args,
        language_model_lora: LoraConfig | None = None,
        max_skipped_share: float = 0.01,
        vision_budgets: str = LARGEST,
        pretrained_learning_rate: float | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.language_model_lora = language_model_lora
        self.max_skipped_share = max_skipped_share
        self.vision_budgets = vision_budgets
        self.pretrained_learning_rate = pretrained_learning_rate
        self.staging: str | None = None
        self.skipped, self.samples = 0, float("inf")  # of this process and its main one's past; of the whole run
        self.tokens_seen = torch.zeros((), dtype=torch.long, device=self.args.device)  # read only when logged
        self.has_bad_loss = torch.zeros((), dtype=torch.bool, device=self.args.device)
        if isinstance(self.data_collator, PheyeCollator):
            self.args.remove_unused_columns = False  # the collator reads what the model does not take
        self._check_options()
        for callback in (Ends(), StopAtBadLoss(self), CountSkipped(self)):
            self.add_callback(callback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(Progress(self))

    def _check_options(self):
        if self.args.n_gpu > 1:
            raise InputError(
                f"{self.args.n_gpu} GPUs in one process would share the model by DataParallel, which Pheye does not "
                "support; start the script with accelerate launch, or set CUDA_VISIBLE_DEVICES to one of them."
            )
        deepspeed = getattr(self.args, "hf_deepspeed_config", None)
        if self.pretrained_learning_rate is not None and deepspeed is not None and "optimizer" in deepspeed.config:
            raise InputError(
                f"--pretrained_learning_rate {self.pretrained_learning_rate} does not reach the optimizer of "
                "DeepSpeed's configuration; leave that optimizer out, and the Trainer makes its own."
            )
        strategy = self.args.train_sampling_strategy
        if isinstance(self.train_dataset, Mixture) and strategy != "random":
            raise InputError(
                f"The order of a Mixture is drawn from its seed; leave train_sampling_strategy={strategy!r} out."
            )

    def _get_train_sampler(self, train_dataset=None):
        # accelerate tells either the sampler or the data set which epoch it is; this sampler tells the mixture.
        data = self.train_dataset if train_dataset is None else train_dataset
        return MixtureSampler(data) if isinstance(data, Mixture) else super()._get_train_sampler(data)

    def create_optimizer(self, model=None):
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.pretrained_learning_rate is not None:
            set_rate_of_pretrained(optimizer, self.model if model is None else model, self.pretrained_learning_rate)
        return optimizer

    # --- Steps ---

    def _run_epoch(self, *args, **kwargs):
        # Nothing is left to do for a run that was stopped after its last checkpoint; the loop would take a step more.
        stopped = any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
        )
        if (stopped and self.state.global_step) or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        skipped, seen = inputs.pop("skipped", []), inputs.pop("seen", len(inputs["input_ids"]))
        self.skipped += len(skipped)
        if skipped:
            append_skipped(self.args.output_dir, skipped, self.state.global_step + 1)
        if len(skipped) == seen:
            del inputs["labels"]
        if budgets := len(self.model.config.self_attention_budgets):
            drawn = self.vision_budgets == UNIVERSAL
            step = (self.args.seed, self.state.global_step)
            inputs["vision_budget"] = drawn_budget(*step, budgets) if drawn else budgets - 1
        self.tokens_seen += inputs["attention_mask"][:seen].sum() * self.args.world_size
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

    def recall_skipped(self):
        """Count the samples that were skipped up to the step that the run goes on from."""
        self.skipped = 0
        self._find_best()

        def recall():
            self.skipped = keep_until(self.args.output_dir, self.state.global_step)

        self._alone(recall)

    def check_skipped(self):
        [skipped] = self._summed(self.skipped)
        if self.samples >= LEAST_JUDGED and skipped > self.max_skipped_share * self.samples:
            raise InputError(
                f"{skipped:.0f} of the {self.samples:.0f} samples of this run have no readable image, more than the "
                f"share of {self.max_skipped_share} that is allowed; see "
                f"{Path(self.args.output_dir) / SKIPPED_FILE}, and mend the images or raise --max_skipped_share."
            )

    def _summed(self, *numbers: float) -> list[float]:
        """Each of `numbers`, summed over all processes."""
        if self.args.world_size == 1:
            return list(numbers)
        return self.accelerator.reduce(torch.tensor(numbers, device=self.args.device), "sum").tolist()

    # --- Evaluation ---

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self.evaluated, self.unread = [0.0, 0.0], 0  # sum of losses, and of answer tokens; samples without an image
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, tokens, unread = self._summed(*self.evaluated, float(self.unread))
        if unread and self.is_world_process_zero():
            print(f"{unread:.0f} samples of the evaluation data were left out: their image could not be read.")
        if f"{metric_key_prefix}_loss" in output.metrics:
            if tokens == 0:
                raise InputError("No image of the evaluation data could be read, so there is nothing to evaluate on.")
            output.metrics[f"{metric_key_prefix}_loss"] = loss / tokens
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, logits and labels; what else the model gives, such as the image's features, is not gathered."""
        self.unread += len(inputs.pop("skipped", []))
        seen = inputs.pop("seen", None)
        if "labels" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"] = self._once(inputs["labels"], seen or len(inputs["labels"]))
        if budgets := len(self.model.config.self_attention_budgets):
            inputs["vision_budget"] = budgets - 1  # said, for without labels a router would choose
        tokens = int((labels[:, 1:] != IGNORED).sum())
        if tokens == 0:  # no image of this batch could be read
            del inputs["labels"]
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, dict(inputs), return_outputs=True)
        loss = loss.detach().mean()
        self.evaluated = [self.evaluated[0] + float(loss) * tokens, self.evaluated[1] + tokens]
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
        return (loss, None, None) if prediction_loss_only else (loss, logits.detach(), labels)

    def _once(self, labels: torch.Tensor, samples: int) -> torch.Tensor:
        """Labels of a batch (B, T) of so many samples, without those of samples that stand in the data's last round a
        second time: accelerate fills it up from the beginning, so that all processes have batches of one size."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return labels
        count = max(0, state.remainder - self.accelerator.process_index * samples)
        return labels.index_fill(0, torch.arange(count, len(labels), device=labels.device), IGNORED)

    # --- Checkpoints: written aside, then moved to their place in one step ---

    def _get_output_dir(self, trial) -> str:
        return self.staging or super()._get_output_dir(trial)

    def check_finite(self):
        """Refuse to save weights that are spoilt."""
        bad = nonfinite(self.accelerator.unwrap_model(self.model))
        if bad:
            raise FloatingPointError(
                f"At step {self.state.global_step}, {len(bad)} trained tensors hold NaN or infinity ({bad[0]} first); "
                f"nothing was saved. {self.advice()}"
            )

    def _save_checkpoint(self, model, trial):
        self.check_finite()
        output, staging = Path(self.args.output_dir), Path(self.args.output_dir) / UNFINISHED
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._alone(lambda: clear(staging))
        self.staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
            self._find_best()
            if self.args.should_save:
                self.state.save_to_json(staging / name / "trainer_state.json")
        except Exception as error:  # of whatever kind: the libraries below have several of their own
            raise self.disk_error(error) from error
        finally:
            self.staging = None
        self._alone(lambda: publish(staging / name, output / name))
        self._alone(lambda: clear(staging))
        if self.args.should_save:
            rotate(output, self.args.save_total_limit, self.state.best_model_checkpoint, self.state.global_step)

    def _find_best(self):
        """Name the best checkpoint where it will stand, not where it is being written or stood in another run."""
        best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        folder = Path(self.args.output_dir) / best
        if folder.is_dir() or (self.staging and (Path(self.staging) / best).is_dir()):
            self.state.best_model_checkpoint = str(folder)

    def _alone(self, action):
        """Run `action` in the main process while the others wait."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            action()
        self.accelerator.wait_for_everyone()

    def disk_error(self, error: Exception) -> Exception:
        """`error` of writing to the output folder, in the user's words."""
        clear(Path(self.args.output_dir) / UNFINISHED)
        free = shutil.disk_usage(self.args.output_dir).free
        return OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"Step {self.state.global_step} could not be saved to {self.args.output_dir}, where {free / 1e9:.1f} GB "
            f"are free: {type(error).__name__}: {error}. {self.advice()}",
        )

    def advice(self) -> str:
        last, _ = whole_checkpoint(self.args.output_dir)
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
        model = self.accelerator.unwrap_model(model or self.model)
        state, _ = read_trained(resume_from_checkpoint)
        check_names(state, trained_state(model), resume_from_checkpoint)
        copy_state(model, state)

    def _load_best_model(self):
        best = Path(self.state.best_model_checkpoint)
        if flaw := flaw_of(best):
            raise InputError(
                f"{best.name} was the best, but {flaw}. Remove {best} to keep the model of the last step."
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        self._load_from_checkpoint(str(best))
