"""Train a Pheye: the paper's stages, or fine-tuning on data of one's own.

    pheye train --model FOLDER_OR_ID --data DATA [--image_folder DIR] --output OUT
        [--stage describe|instruct|tasks] [any option of transformers' TrainingArguments]

`accelerate launch -m pheye.training.train ...` runs it on several devices and machines. docs/training.md has the data
formats, the recipes and what a run leaves behind. The same command again goes on from the last checkpoint.
"""

import argparse
import contextlib
import copy
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import LoraModel
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

from ..common.command import InputError, exit_status
from ..modeling_pheye import PheyeForConditionalGeneration
from ..processing_pheye import PheyeProcessor
from .collator import PheyeCollator
from .formats import Source
from .inspection import show_samples
from .mixture import Mixture, Stream, read_mixture
from .run_folder import claim, note, print_skipped, push, save_result
from .stages import STAGES, stage_sources
from .trained import add_language_model_lora, choose_trained, describe_trained
from .trainer import PheyeTrainer, last_checkpoint

EFFECTIVE_BATCH = 128  # the paper's (spec section 8)

# Options of TrainingArguments that decide what comes out; a run does not go on with other values of these.
MATTER = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "num_train_epochs", "max_steps", "seed", "data_seed",
    "bf16", "fp16", "effective_batch_size",
)  # fmt: skip


@dataclass
class ModelArguments:
    """What the model is, and what of it trains: the arguments of `load_model`."""

    model: str = field(metadata={"help": "folder or Hub id of the Pheye to begin with"})
    revision: str | None = field(default=None, metadata={"help": "of the model on the Hub"})
    train: list[str] | None = field(default=None, metadata={"help": "patterns of parameters to train as well"})
    freeze: list[str] | None = field(default=None, metadata={"help": "patterns of parameters not to train"})
    language_model_lora: bool = field(default=False, metadata={"help": "train LoRA on the language model as well"})
    vision_gradient_checkpointing: bool = field(
        default=False, metadata={"help": "compute the vision tower's activations twice to save memory"}
    )
    attention: str | None = field(default=None, metadata={"help": "attention implementation, such as sdpa"})


@dataclass
class RunArguments:
    """What the run does beside training."""

    data: list[str] = field(metadata={"help": "data sets, or JSON files that list several (docs/training.md)"})
    max_length: int | None = field(default=None, metadata={"help": "tokens of a sample; what is longer is cut"})
    max_skipped_share: float = field(default=0.01, metadata={"help": "of samples without a readable image"})
    trained_only: bool = field(default=False, metadata={"help": "write only what was trained, not a whole model"})
    inspect: int = field(
        default=0,
        metadata={"help": "show so many samples as the model will see them (images in OUT-samples), and stop"},
    )


@dataclass
class DataArguments:
    """What holds for data sets of which a mixture file does not say it: the arguments of `read_sources`."""

    stage: str | None = field(default=None, metadata={"help": "a stage of the paper", "choices": list(STAGES)})
    image_folder: str | None = field(default=None, metadata={"help": "where a data set's image names are found"})
    subset: str | None = field(default=None, metadata={"help": "configuration of a Hub data set"})
    split: str | None = field(default=None, metadata={"help": "split of a data set that has several (or train)"})
    streaming: bool = field(default=False, metadata={"help": "read a data set while training; needs --max_steps"})
    image_column: str | None = field(default=None, metadata={"help": "of a data set with questions and answers"})
    question_column: str | None = None
    answers_column: str | None = None
    prompt: str = field(default="", metadata={"help": "appended to every question"})
    caption: bool = field(default=False, metadata={"help": "put one of ten caption instructions for the question"})
    all_turns: bool = field(default=False, metadata={"help": "train on all turns of a conversation, not on one"})


@dataclass
class PheyeTrainingArguments(TrainingArguments):
    """TrainingArguments with the paper's recipe as defaults (spec section 8)."""

    output_dir: str | None = HfArg(default=None, aliases=["--output"], help="folder of the run")
    effective_batch_size: int | None = field(
        default=None, metadata={"help": f"samples per step over all devices; {EFFECTIVE_BATCH} by default"}
    )
    learning_rate: float | None = field(default=None, metadata={"help": "by default that of the stage, or 5e-5"})
    lr_scheduler_type: str = "cosine"
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int | None = field(default=None, metadata={"help": "in place of the effective batch"})
    num_train_epochs: float = 1.0
    bf16: bool = True
    save_steps: float = 500
    save_total_limit: int | None = 2
    logging_steps: float = 10
    logging_nan_inf_filter: bool = False  # a NaN is to be seen, and stops the run
    report_to: None | str | list[str] = "tensorboard"  # noqa: RUF036 (the order that the parser understands)
    remove_unused_columns: bool | None = False
    dataloader_num_workers: int = 2
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self):
        if self.output_dir is None:
            raise InputError("Give --output, the folder of the run.")
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        steps, self.gradient_accumulation_steps = self.gradient_accumulation_steps, 1
        super().__post_init__()
        if steps is not None and self.effective_batch_size is not None:
            raise InputError("Give one of --gradient_accumulation_steps and --effective_batch_size, not both.")
        if steps is None:
            size, per_step = self.effective_batch_size or EFFECTIVE_BATCH, self.train_batch_size * self.world_size
            if size % per_step:
                raise InputError(
                    f"An effective batch of {size} is no multiple of {per_step} ({self.train_batch_size} samples on "
                    f"each of {self.world_size} processes); change --effective_batch_size or "
                    "--per_device_train_batch_size."
                )
            steps = size // per_step
        self.gradient_accumulation_steps = steps
        self.effective_batch_size = steps * self.train_batch_size * self.world_size


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is written."""


@contextlib.contextmanager
def refused_options() -> Iterator[None]:
    """transformers refuses options by a ValueError; it leaves this block as what the user can mend."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error


def parse(
    argv: list[str] | None = None,
) -> tuple[ModelArguments, RunArguments, DataArguments, PheyeTrainingArguments]:
    kinds = [ModelArguments, RunArguments, DataArguments, PheyeTrainingArguments]
    usage = "%(prog)s --model FOLDER_OR_ID --data DATA --output OUT [OPTIONS]"  # the options are some 150
    parser = HfArgumentParser(kinds, prog="pheye train", usage=usage, description=__doc__, formatter_class=Help)
    with refused_options():
        of_model, of_run, of_data, training = parser.parse_args_into_dataclasses(argv)
    if training.learning_rate is None:
        training.learning_rate = STAGES[of_data.stage or "tasks"].learning_rate
    if training.push_to_hub and of_run.trained_only:
        raise InputError("--push_to_hub pushes a whole model; leave out --trained_only.")
    if of_model.language_model_lora and not of_run.trained_only and (training.fsdp or training.deepspeed):
        raise InputError("Sharded weights cannot be merged with LoRA here; add --trained_only and merge afterwards.")
    return of_model, of_run, of_data, training


# --- Data and model ---


def read_sources(data: list[str], stage: str | None = None, all_turns: bool = False, **fields) -> list[Source]:
    """The data sets that `data` names; `fields` of `Source`, and then the stage, fill in what a mixture file leaves
    out."""
    fields["turns"] = None if all_turns else 1
    given = {name: value for name, value in fields.items() if value != getattr(Source("x"), name)}
    sources = read_mixture(data, **given)
    return stage_sources(STAGES[stage], sources) if stage else sources


def open_data(sources: list[Source], training: TrainingArguments) -> Mixture | Stream:
    """The samples of `sources`, to be drawn by the seed."""
    if not any(source.streaming for source in sources):
        return Mixture(sources, training.seed)
    if training.max_steps <= 0:
        raise InputError("A streamed data set has no length; give --max_steps.")
    training.accelerator_config.dispatch_batches = False  # every process opens its own images
    return Stream(sources, training.seed)


def load_model(
    model: str,
    revision: str | None = None,
    train: list[str] | None = None,
    freeze: list[str] | None = None,
    language_model_lora: bool = False,
    vision_gradient_checkpointing: bool = False,
    attention: str | None = None,
    *,
    bf16: bool,
) -> tuple[PheyeForConditionalGeneration, LoraModel | None]:
    """The model, ready to train: frozen parts in bfloat16 (if `bf16`), trained ones in float32; and its LoRA."""
    with refused_options():
        # All in float32 at first, so that a trained part that an earlier stage saved in float32 keeps its digits.
        loaded = PheyeForConditionalGeneration.from_pretrained(
            model, revision=revision, dtype=torch.float32, attn_implementation=attention
        )
    lora = add_language_model_lora(loaded) if language_model_lora else None
    choose_trained(loaded, train, freeze)
    if bf16:
        for parameter in loaded.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    if vision_gradient_checkpointing:
        loaded.pheye.vision_tower.gradient_checkpointing_enable()
    return loaded, lora


# --- The command ---


def run(argv: list[str] | None = None) -> PheyeTrainer | None:
    """Train, or go on with the run that began in the output folder.

    Returns:
        the trainer after training; None if there was nothing to train.
    """
    of_model, of_run, of_data, training = parse(argv)
    output = Path(training.output_dir)
    sources = read_sources(of_run.data, **vars(of_data))
    settings = {
        **vars(of_model),
        **vars(of_data),
        "max_length": of_run.max_length,
        "trained_only": of_run.trained_only,
        **{name: getattr(training, name) for name in MATTER},
        "data": [asdict(source) for source in sources],
    }
    if not of_run.inspect and claim(output, settings):
        print(f"{output} holds this run, finished. There is nothing to do.")
        return None
    processor = PheyeProcessor.from_pretrained(of_model.model, revision=of_model.revision)
    data = open_data(sources, training)
    if of_run.inspect:
        folder = output.with_name(f"{output.name}-samples")
        show_samples(data, processor, folder, of_run.inspect, of_run.max_length)
        return None
    training.distributed_state.wait_for_everyone()  # all have looked into the folder before one writes there
    with training.main_process_first():
        if training.should_save:
            note(output, settings, finished=False)
    set_seed(training.seed)  # of new LoRA weights
    model, lora = load_model(**vars(of_model), bf16=training.bf16)
    if training.should_log:
        print(describe_trained(model))
    with refused_options():
        trainer = PheyeTrainer(
            model=model,
            args=_without_push(training),
            train_dataset=data,
            data_collator=PheyeCollator(processor, of_run.max_length),
            language_model_lora=None if lora is None else next(iter(lora.peft_config.values())),
            max_skipped_share=of_run.max_skipped_share,
        )
    checkpoint = last_checkpoint(output)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except torch.OutOfMemoryError as error:
        remedy = "Give the same command with a smaller --per_device_train_batch_size to go on."
        raise InputError(f"{error}\n{remedy}") from error
    if training.should_save:
        print_skipped(output)
    save_result(
        trainer, processor, lora, sources, base=of_model.model, stage=of_data.stage, trained_only=of_run.trained_only
    )
    if training.should_save:
        note(output, settings, finished=True)
        if training.push_to_hub:
            push(output, training.hub_model_id, training.hub_private_repo, training.hub_token)
    return trainer


def _without_push(training: TrainingArguments) -> TrainingArguments:
    """The Trainer would push checkpoints; here the finished model is pushed, once."""
    training = copy.copy(training)
    training.push_to_hub = False
    return training


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(run, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
