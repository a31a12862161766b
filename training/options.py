"""The options of the training command: what they are, which do nothing and are refused, which a run is bound to."""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments, get_scheduler
from transformers.hf_argparser import HfArg
from transformers.integrations import get_reporting_integration_callbacks

from ..common.command import InputError, Parser, require
from ..common.tables import IMAGE_SOURCES
from ..configuration_pheye import SELF_ATTENTION_KINDS
from .formats import Source
from .stages import STAGES
from .vision_budgets import LARGEST, UNIVERSAL

EFFECTIVE_BATCH = 128  # the paper's
SAVE_STEPS = 500
MODEL_OPTIMIZERS = ("galore", "apollo", "lomo", "adalomo")  # that are made from the model

POSITIVE = ("effective_batch_size", "gradient_accumulation_steps", "per_device_train_batch_size", "num_train_epochs",
            "per_device_eval_batch_size", "save_steps", "save_total_limit", "eval_steps", "logging_steps",
            "early_stopping_patience")  # fmt: skip
NOT_NEGATIVE = ("learning_rate", "pretrained_learning_rate", "weight_decay", "max_grad_norm", "label_smoothing_factor",
                "dataloader_num_workers")  # fmt: skip

# Options of TrainingArguments without effect here, and why.
WITHOUT_EFFECT = {
    **dict.fromkeys(("do_train",), "this command always trains"),
    **dict.fromkeys(("do_eval", "do_predict"), "give --eval_data to evaluate while training"),
    "resume_from_checkpoint": "the same command goes on by itself, from the last whole checkpoint in --output",
    **dict.fromkeys(
        ("train_sampling_strategy", "length_column_name"), "the order is drawn from the seed, so that a run can go on"
    ),
    **dict.fromkeys(("remove_unused_columns", "label_names"), "the command makes its batches itself"),
    **dict.fromkeys(
        ("prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "eval_accumulation_steps",
         "eval_do_concat_batches", "eval_use_gather_object"), "evaluation computes the loss alone"
    ),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "evaluation computes as training does"),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "there are no Liger kernels for Pheye"),
    "use_cache": "training needs no cache",
    "logging_nan_inf_filter": "a loss that is NaN or infinite stops the run",
    "logging_first_step": "the first and the last step are logged always, unless by --logging_strategy no",
    **dict.fromkeys(
        ("hub_strategy", "hub_always_push", "hub_revision"), "--push_to_hub pushes the finished model, once"
    ),
    "enable_jit_checkpoint": "give a smaller --save_steps",
    "auto_find_batch_size": "it would change the effective batch; give a smaller --per_device_train_batch_size",
}  # fmt: skip

# A run may go on with other values of these: they change what is shown, saved or used of the machine, or where that
# goes, but not what the model learns. An option that is not here, or new in transformers, must stay as it was.
FREE = {
    "output_dir", "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level",
    "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "include_num_input_tokens_seen", "skip_memory_metrics", "debug",
    "save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node",
    "push_to_hub", "hub_model_id", "hub_private_repo", "hub_token",
    # The effective batch is bound; how it is split is not.
    "per_device_train_batch_size", "gradient_accumulation_steps",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "torch_empty_cache_steps", "use_cpu",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend",
    "ddp_timeout", "local_rank",
    # Names of files: what they hold is bound in `settings_that_matter`.
    "eval_data",
    # They follow from others.
    "do_eval",
}  # fmt: skip


@dataclass
class ModelArguments:
    """What the model is, and what of it trains: the arguments of `load_model`."""

    model: str = field(metadata={"help": "folder or Hub id of the Pheye to begin with"})
    revision: str | None = field(default=None, metadata={"help": "of the model on the Hub"})
    train: list[str] | None = field(default=None, metadata={"help": "patterns of parameters to train as well"})
    freeze: list[str] | None = field(default=None, metadata={"help": "patterns of parameters not to train"})
    language_model_lora: bool = field(
        default=False, metadata={"help": "train LoRA on all linears of the language model's layers as well"}
    )
    lora_rank: int | None = field(default=None, metadata={"help": "of --language_model_lora (default: 16)"})
    lora_alpha: float | None = field(default=None, metadata={"help": "of --language_model_lora (default: 32)"})
    lora_dropout: float | None = field(default=None, metadata={"help": "of --language_model_lora (default: 0.05)"})
    vision_gradient_checkpointing: bool = field(
        default=False, metadata={"help": "compute the vision tower's activations twice to save memory"}
    )
    attention: str | None = field(default=None, metadata={"help": "attention implementation, such as sdpa"})
    self_attention_layers: list[int] | None = field(
        default=None,
        metadata={"help": "add what refines the image before these layers, to a model that has nothing of it"},
    )
    self_attention_kind: str | None = field(
        default=None, metadata={"help": "of --self_attention_layers", "choices": list(SELF_ATTENTION_KINDS)}
    )


@dataclass
class RunArguments:
    """What the run does beside training."""

    data: list[str] = field(metadata={"help": "data sets, or JSON files that list several (docs/training.md)"})
    max_length: int | None = field(default=None, metadata={"help": "tokens of a sample; what is longer is cut"})
    max_skipped_share: float = field(
        default=0.01,
        metadata={"help": "of the samples without a readable image; more stop a run of 100 samples or more"},
    )
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
    image_sources: str = field(
        default="folder",
        metadata={
            "help": "where names in the data may lead: files of the image folder, all local files, or any (URLs too)",
            "choices": list(IMAGE_SOURCES),
        },
    )
    subset: str | None = field(default=None, metadata={"help": "configuration of a Hub data set"})
    split: str | None = field(default=None, metadata={"help": "split of a data set that has several (or train)"})
    streaming: bool = field(default=False, metadata={"help": "read a data set while training; needs --max_steps"})
    image_column: str | None = field(default=None, metadata={"help": "of a data set with questions and answers"})
    question_column: str | None = None
    answers_column: str | None = None
    prompt: str = field(default="", metadata={"help": "appended to every question that does not end with it"})
    caption: bool = field(default=False, metadata={"help": "put one of ten caption instructions for the question"})
    all_turns: bool = field(
        default=False, metadata={"help": "train on all turns of a conversation, not on one that is drawn"}
    )


@dataclass
class PheyeTrainingArguments(TrainingArguments):
    """TrainingArguments with the paper's recipe as defaults."""

    output_dir: str | None = HfArg(default=None, aliases=["--output"], help="folder of the run")
    effective_batch_size: int | None = field(
        default=None, metadata={"help": f"samples per step over all devices; {EFFECTIVE_BATCH} by default"}
    )
    learning_rate: float | None = field(default=None, metadata={"help": "by default that of the stage, or 5e-5"})
    pretrained_learning_rate: float | None = field(
        default=None, metadata={"help": "of what --train lets train of the pretrained models; by default that of all"}
    )
    lr_scheduler_type: str = "cosine"
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int | None = field(default=None, metadata={"help": "in place of the effective batch"})
    num_train_epochs: float = 1.0
    bf16: bool = True
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "data to evaluate on while training, given as --data is"}
    )
    eval_strategy: str | None = field(
        default=None, metadata={"help": "with --eval_data: steps if --eval_steps is given, or else epoch"}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop when so many evaluations in turn were no better than the best"}
    )
    vision_budgets: str = field(
        default=LARGEST,
        metadata={
            "help": "of a model with budgets: train the largest, or all of them, one drawn for each step",
            "choices": [LARGEST, UNIVERSAL],
        },
    )
    restore_callback_states_from_checkpoint: bool = True  # the patience that is left
    save_strategy: str | None = field(
        default=None, metadata={"help": "steps, or that of evaluation with --load_best_model_at_end"}
    )
    save_steps: float | None = field(
        default=None, metadata={"help": f"{SAVE_STEPS}, or --eval_steps with --load_best_model_at_end"}
    )
    save_total_limit: int | None = 2
    logging_steps: float = 10
    logging_first_step: bool = True  # and the last
    logging_nan_inf_filter: bool = False  # a NaN is to be seen, and stops the run
    report_to: None | str | list[str] = "tensorboard"  # noqa: RUF036 (the order that the parser understands)
    remove_unused_columns: bool | None = False
    dataloader_num_workers: int = 2
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self):
        if self.output_dir is None:
            raise InputError("Give --output, the folder of the run.")
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        check_numbers(self)
        self._choose_strategies()
        refuse_idle(self)
        self.save_steps = self.save_steps or SAVE_STEPS
        steps, self.gradient_accumulation_steps = self.gradient_accumulation_steps, 1
        super().__post_init__()
        self._n_gpu = min(1, self._n_gpu)  # several in one process would share the model by DataParallel
        self.gradient_accumulation_steps = self._accumulation(steps)
        self.effective_batch_size = self.gradient_accumulation_steps * self.train_batch_size * self.world_size

    def _choose_strategies(self):
        """When to evaluate and to save, where the user has left it open."""
        if self.eval_strategy is None:
            found = "no" if self.eval_data is None else "epoch" if self.eval_steps is None else "steps"
            self.eval_strategy = found
        if self.early_stopping_patience is not None and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.eval_strategy == "steps" and self.eval_steps is None:
            self.eval_steps = self.logging_steps
        if self.metric_for_best_model not in (None, "loss", "eval_loss"):
            raise InputError(
                f"--metric_for_best_model {self.metric_for_best_model} is not computed; evaluation gives the loss."
            )
        if self.greater_is_better:
            raise InputError("--greater_is_better would keep the worst model; evaluation gives the loss.")
        self.save_strategy = self.save_strategy or (self.eval_strategy if self.load_best_model_at_end else "steps")
        if self.load_best_model_at_end and self.save_strategy == "steps":
            if self.save_steps not in (None, self.eval_steps):
                raise InputError(
                    f"--load_best_model_at_end needs a checkpoint of each evaluation; leave --save_steps "
                    f"{self.save_steps} out, or give it the value of --eval_steps."
                )
            self.save_steps = self.eval_steps

    def _accumulation(self, steps: int | None) -> int:
        if steps is not None:
            if self.effective_batch_size is not None:
                raise InputError("Give one of --gradient_accumulation_steps and --effective_batch_size, not both.")
            return steps
        size, per_step = self.effective_batch_size or EFFECTIVE_BATCH, self.train_batch_size * self.world_size
        if size % per_step:
            raise InputError(
                f"An effective batch of {size} is no multiple of {per_step} ({self.train_batch_size} samples on "
                f"each of {self.world_size} processes); change --effective_batch_size or "
                "--per_device_train_batch_size."
            )
        return size // per_step


# --- Options that cannot be meant, or have no effect ---


def check_numbers(training: PheyeTrainingArguments):
    """Refuse numbers that would be read otherwise than they are written, such as 0 for the default."""
    for name in (*POSITIVE, *NOT_NEGATIVE):
        value, least = getattr(training, name), "greater than 0" if name in POSITIVE else "at least 0"
        if value is not None and not (0 < value < math.inf or (value == 0 and name in NOT_NEGATIVE)):
            raise InputError(f"--{name} {value} must be {least}, and finite.")
    if training.max_steps != -1 and training.max_steps < 1:
        raise InputError(f"--max_steps {training.max_steps} must be greater than 0, or left out.")
    for name in ("seed", "data_seed"):
        value = getattr(training, name)
        if value is not None and not 0 <= value < 2**32:
            raise InputError(f"--{name} {value} must be at least 0 and below 2 ** 32.")
    if training.label_smoothing_factor >= 1:
        raise InputError(f"--label_smoothing_factor {training.label_smoothing_factor} must be below 1.")


def default_of(option: dataclasses.Field):
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def refuse_idle(training: PheyeTrainingArguments):
    """Refuse options of `training`, as they were given, that would do nothing.

    Raises:
        InputError: for the first; the message says why, and what to do instead.
    """
    given = {
        option.name for option in dataclasses.fields(training) if getattr(training, option.name) != default_of(option)
    }
    for name, why in {**WITHOUT_EFFECT, **idle_beside_others(training)}.items():
        if name in given:
            raise InputError(f"--{name} has no effect here: {why}.")


def idle_beside_others(training: PheyeTrainingArguments) -> dict[str, str]:
    """Options that do nothing beside what else was given, and why."""
    idle = {}
    if training.eval_data is None:
        evaluation = ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size",
                      "load_best_model_at_end", "early_stopping_patience", "metric_for_best_model",
                      "greater_is_better")  # fmt: skip
        idle |= dict.fromkeys(evaluation, "there is nothing to evaluate on; give --eval_data")
        if training.eval_strategy == "no":
            del idle["eval_strategy"]
        if training.save_strategy == "best":
            idle["save_strategy"] = "there is nothing to evaluate on; give --eval_data"
    elif training.eval_strategy == "no":
        idle["eval_data"] = "--eval_strategy no evaluates never"
    for kind in ("eval", "save", "logging"):
        strategy = getattr(training, f"{kind}_strategy")
        if strategy != "steps":
            idle.setdefault(f"{kind}_steps", f"--{kind}_strategy is {strategy}")
    if training.metric_for_best_model is None:
        idle.setdefault("greater_is_better", "it needs --metric_for_best_model")
    if not training.push_to_hub:
        idle |= dict.fromkeys(("hub_model_id", "hub_private_repo", "hub_token"), "it needs --push_to_hub")
    if training.max_steps > 0:
        idle["num_train_epochs"] = "--max_steps says where the run ends"
    if training.lr_scheduler_type in ("constant", "reduce_lr_on_plateau", "greedy"):
        idle["warmup_steps"] = f"--lr_scheduler_type {training.lr_scheduler_type} has no warm-up"
    if training.lr_scheduler_type in ("constant", "constant_with_warmup"):
        idle["lr_scheduler_kwargs"] = f"--lr_scheduler_type {training.lr_scheduler_type} takes no further arguments"
    if not training.optim.startswith(("galore", "apollo")):
        idle["optim_target_modules"] = "only the optimizers of GaLore and APOLLO have target modules"
    if training.optim in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"):
        idle["optim_args"] = f"--optim {training.optim} takes no further arguments"
    if training.optim in ("adafactor", "sgd", "adagrad", "rmsprop"):
        idle |= dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), f"--optim is {training.optim}")
    if training.save_strategy == "no":
        idle |= dict.fromkeys(("save_total_limit", "save_only_model"), "--save_strategy no saves no checkpoints")
    if training.dataloader_num_workers == 0:
        workers = ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context")
        idle |= dict.fromkeys(workers, "--dataloader_num_workers is 0")
    if not (training.gradient_checkpointing or getattr(training, "activation_checkpointing", None)):
        kwargs = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
        idle |= dict.fromkeys(kwargs, "it needs --gradient_checkpointing")
    return {**idle, **idle_names(training.report_to)}


def idle_names(report_to: str | list[str] | None) -> dict[str, str]:
    """Options that name things for trackers that are not used."""
    trackers, idle = {report_to} if isinstance(report_to, str) else {*(report_to or ())}, {}
    if not trackers & {"all", "trackio"}:
        trackio = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
        idle |= dict.fromkeys(trackio, "it needs --report_to trackio")
    if trackers <= {"none", "tensorboard"}:
        idle["run_name"] = "the logs of TensorBoard stand in --output"
    return idle


def check_installed(training: PheyeTrainingArguments):
    """Refuse what would fail after the model was loaded, or when the run ends, for want of a package.

    Raises:
        InputError: with what to install.
    """
    require("matplotlib", "train")
    require("accelerate", "train")
    try:
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()  # says what is missing
    except (ImportError, RuntimeError, ValueError) as error:
        raise InputError(f"--report_to {' '.join(training.report_to)}: {error} Or give --report_to none.") from error
    with refused_options():
        check_optimizer(training)


def check_optimizer(training: PheyeTrainingArguments):
    """Make optimizer and schedule of one number, to raise what is wrong with their options or packages."""
    try:
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(training)
    except ImportError as error:
        raise InputError(f"--optim {training.optim.value}: {error}") from error
    except ValueError:
        if training.optim.startswith(MODEL_OPTIMIZERS):  # those say that there is no model yet
            return
        raise
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
        return
    optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **kwargs)
    try:
        get_scheduler(
            training.lr_scheduler_type, optimizer, num_warmup_steps=1, num_training_steps=2,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )  # fmt: skip
    except TypeError as error:
        raise InputError(f"--lr_scheduler_kwargs {training.lr_scheduler_kwargs}: {error}") from error


# --- What a run is bound to ---


def settings_that_matter(
    of_model: ModelArguments,
    of_run: RunArguments,
    of_data: DataArguments,
    training: PheyeTrainingArguments,
    sources: list[Source],
    eval_sources: list[Source] = (),
) -> dict:
    """What a run must share with the run that it goes on with: all options but those that are free."""
    settings = {
        **vars(of_model),
        **vars(of_data),
        "max_length": of_run.max_length,
        "trained_only": of_run.trained_only,
        **bound_options(training),
        "data": [dataclasses.asdict(source) for source in sources],
        "eval_data": [dataclasses.asdict(source) for source in eval_sources],
    }
    del settings["vision_gradient_checkpointing"]  # as --gradient_checkpointing
    if any(source.streaming for source in sources):  # what was read is skipped by process, worker and batch
        bound = ("dataloader_num_workers", "per_device_train_batch_size")
        settings |= {"processes": training.world_size, **{name: getattr(training, name) for name in bound}}
    return settings


def bound_options(training: PheyeTrainingArguments) -> dict:
    """The options of `training` that a run is bound to, where they are not the default; others may be new in another
    release of transformers."""
    free = set(FREE)
    if training.load_best_model_at_end:
        free -= {"save_strategy", "save_steps"}
    if training.dataloader_drop_last:
        free -= {"per_device_train_batch_size"}
    values = training.to_dict()
    return {
        option.name: values[option.name]
        for option in dataclasses.fields(training)
        if option.name not in free and values[option.name] != default_of(option)
    }


# --- Parsing ---


class OptionParser(Parser, HfArgumentParser):
    """Of dataclasses, with hyphens understood as in all commands."""


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults but None, which stands for one that the help names; and the description as it is written."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


@contextlib.contextmanager
def refused_options() -> Iterator[None]:
    """transformers refuses options by a ValueError; it leaves this block as what the user can mend."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error


def parse_options(
    argv: list[str] | None, description: str
) -> tuple[ModelArguments, RunArguments, DataArguments, PheyeTrainingArguments]:
    kinds = [ModelArguments, RunArguments, DataArguments, PheyeTrainingArguments]
    usage = "%(prog)s --model FOLDER_OR_ID --data DATA --output OUT [OPTIONS]"  # the options are some 150
    parser = OptionParser(kinds, prog="pheye train", usage=usage, description=description, formatter_class=Help)
    with refused_options():
        of_model, of_run, of_data, training = parser.parse_args_into_dataclasses(argv)
    if training.learning_rate is None:
        training.learning_rate = STAGES[of_data.stage or "tasks"].learning_rate
    if training.push_to_hub and of_run.trained_only:
        raise InputError("--push_to_hub pushes a whole model; leave out --trained_only.")
    if of_model.language_model_lora and not of_run.trained_only and (training.fsdp or training.deepspeed):
        raise InputError("Sharded weights cannot be merged with LoRA here; add --trained_only and merge afterwards.")
    if of_model.self_attention_kind is not None and of_model.self_attention_layers is None:
        raise InputError("--self_attention_kind has no effect here: it needs --self_attention_layers.")
    if of_model.self_attention_layers is not None and of_run.trained_only:
        raise InputError(
            "--trained_only leaves a file for the model that the run began with, which lacks the "
            "--self_attention_layers; leave out one of them."
        )
    for name in ("lora_rank", "lora_alpha", "lora_dropout"):
        if getattr(of_model, name) is not None and not of_model.language_model_lora:
            raise InputError(f"--{name} has no effect here: it needs --language_model_lora.")
    if not 0 <= of_run.max_skipped_share <= 1:
        raise InputError(f"--max_skipped_share {of_run.max_skipped_share} must be a share, from 0 to 1.")
    if of_run.max_length is not None and of_run.max_length < 1:
        raise InputError(f"--max_length {of_run.max_length} must be at least 1.")
    if of_run.inspect < 0:
        raise InputError(f"--inspect {of_run.inspect} must be a number of samples.")
    return of_model, of_run, of_data, training
