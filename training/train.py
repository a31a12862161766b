"""Train a Pheye: the paper's stages, or fine-tuning on data of one's own.

    python -m pheye.training.train --model FOLDER_OR_ID --data DATA [--image_folder DIR] --output OUT
        [--stage describe|instruct|tasks] [any option of transformers' TrainingArguments]

`accelerate launch -m pheye.training.train ...` runs it on several devices and machines. docs/training.md has the data
formats, the recipes and what a run leaves behind. The same command again goes on from the last checkpoint.
"""

import copy
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from peft import LoraModel
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

import pheye
from pheye import PheyeForConditionalGeneration, PheyeProcessor

from .collator import PheyeCollator
from .formats import Source
from .inspection import show_samples
from .mixture import Mixture, read_mixture, streamed
from .report import plot_log, write_model_card
from .stages import STAGES, stage_sources
from .trained import TRAINED_FILE, add_language_model_lora, choose_trained, describe_trained
from .trainer import SKIPPED_FILE, UNFINISHED, PheyeTrainer, last_checkpoint

EFFECTIVE_BATCH = 128  # the paper's (spec section 8)
RUN_FILE = "run.json"

# Options of TrainingArguments that decide what comes out; a run does not go on with other values of these.
MATTER = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "num_train_epochs", "max_steps", "seed", "data_seed",
    "bf16", "fp16",
)  # fmt: skip


@dataclass
class Arguments:
    """What the command takes beside TrainingArguments."""

    model: str = field(metadata={"help": "folder or Hub id of the Pheye to begin with"})
    data: list[str] = field(metadata={"help": "data sets, or JSON files that list several (docs/training.md)"})
    image_folder: str | None = field(default=None, metadata={"help": "where a data set's image names are found"})
    stage: str | None = field(default=None, metadata={"help": "a stage of the paper", "choices": list(STAGES)})
    subset: str | None = field(default=None, metadata={"help": "configuration of a Hub data set"})
    split: str = field(default="train", metadata={"help": "split of a Hub data set"})
    streaming: bool = field(default=False, metadata={"help": "read a data set while training; needs --max_steps"})
    image_column: str | None = field(default=None, metadata={"help": "of a data set with questions and answers"})
    question_column: str | None = None
    answers_column: str | None = None
    prompt: str = field(default="", metadata={"help": "appended to every question"})
    caption: bool = field(default=False, metadata={"help": "put one of ten caption instructions for the question"})
    all_turns: bool = field(default=False, metadata={"help": "train on all turns of a conversation, not on one"})
    revision: str | None = field(default=None, metadata={"help": "of the model on the Hub"})
    train: list[str] | None = field(default=None, metadata={"help": "patterns of parameters to train as well"})
    freeze: list[str] | None = field(default=None, metadata={"help": "patterns of parameters not to train"})
    language_model_lora: bool = field(default=False, metadata={"help": "train LoRA on the language model as well"})
    vision_gradient_checkpointing: bool = field(
        default=False, metadata={"help": "compute the vision tower's activations twice to save memory"}
    )
    attention: str | None = field(default=None, metadata={"help": "attention implementation, such as sdpa"})
    max_length: int | None = field(default=None, metadata={"help": "tokens of a sample; what is longer is cut"})
    max_skipped_share: float = field(default=0.01, metadata={"help": "of samples without a readable picture"})
    trained_only: bool = field(default=False, metadata={"help": "write only what was trained, not a whole model"})
    inspect: int = field(
        default=0,
        metadata={"help": "show so many samples as the model will see them (pictures in OUT-samples), and stop"},
    )


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
            raise ValueError("Give --output, the folder of the run.")
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        steps, self.gradient_accumulation_steps = self.gradient_accumulation_steps, 1
        super().__post_init__()
        if steps is not None and self.effective_batch_size is not None:
            raise ValueError("Give one of --gradient_accumulation_steps and --effective_batch_size, not both.")
        if steps is None:
            size, per_step = self.effective_batch_size or EFFECTIVE_BATCH, self.train_batch_size * self.world_size
            if size % per_step:
                raise ValueError(
                    f"An effective batch of {size} is no multiple of {per_step} ({self.train_batch_size} samples on "
                    f"each of {self.world_size} processes); change --effective_batch_size or "
                    "--per_device_train_batch_size."
                )
            steps = size // per_step
        self.gradient_accumulation_steps = steps
        self.effective_batch_size = steps * self.train_batch_size * self.world_size


def parse(argv: list[str] | None = None) -> tuple[Arguments, PheyeTrainingArguments]:
    parser = HfArgumentParser([Arguments, PheyeTrainingArguments], description=__doc__)
    args, training = parser.parse_args_into_dataclasses(argv)
    if training.learning_rate is None:
        training.learning_rate = STAGES[args.stage or "tasks"].learning_rate
    if training.push_to_hub and args.trained_only:
        raise ValueError("--push_to_hub pushes a whole model; leave out --trained_only.")
    if args.language_model_lora and not args.trained_only and (training.fsdp or training.deepspeed):
        raise ValueError("Sharded weights cannot be merged with LoRA here; add --trained_only and merge afterwards.")
    return args, training


# --- The run's folder ---


def settings_that_matter(args: Arguments, training: TrainingArguments, sources: list[Source]) -> dict:
    """What a run must have in common with the one that it goes on with."""
    own = {name: value for name, value in asdict(args).items() if name not in ("data", "inspect", "max_skipped_share")}
    options = {name: getattr(training, name) for name in (*MATTER, "effective_batch_size")}
    return json.loads(json.dumps({**own, **options, "data": [asdict(source) for source in sources]}, default=str))


def claim_output(output: Path, settings: dict) -> bool:
    """Take `output` for this run, or go on with the run that began there; whether that one is finished.

    Raises:
        ValueError: if the folder holds something else, or a run with other settings.
    """
    record = output / RUN_FILE
    if record.is_file():
        before = json.loads(record.read_text())
        changed = [name for name in settings if before["settings"].get(name) != settings[name]]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{output} holds a run with other settings: {', '.join(changed)} ({name} was "
                f"{before['settings'].get(name)!r}, now {settings[name]!r}). Use the same, or another --output."
            )
        return before["finished"]
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and holds no run of this command; choose another --output.")
    return False


def write_record(output: Path, settings: dict, finished: bool):
    versions = {"pheye": pheye.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"finished": finished, "settings": settings, "versions": versions}, indent=1)
    (output / f"{RUN_FILE}.new").write_text(text)
    os.replace(output / f"{RUN_FILE}.new", output / RUN_FILE)


# --- Parts ---


def read_sources(args: Arguments) -> list[Source]:
    options = {
        "image_folder": args.image_folder,
        "subset": args.subset,
        "split": args.split,
        "streaming": args.streaming,
        "image_column": args.image_column,
        "question_column": args.question_column,
        "answers_column": args.answers_column,
        "prompt": args.prompt,
        "caption": args.caption,
        "turns": None if args.all_turns else 1,
    }
    defaults = {name: value for name, value in options.items() if value != getattr(Source("x"), name)}
    sources = read_mixture(args.data, **defaults)
    return stage_sources(STAGES[args.stage], sources) if args.stage else sources


def load_model(args: Arguments, bf16: bool) -> tuple[PheyeForConditionalGeneration, LoraModel | None]:
    """The model, ready to train: frozen parts in bfloat16 (if `bf16`), trained ones in float32."""
    # All in float32 at first, so that a trained part that an earlier stage saved in float32 keeps its digits.
    model = PheyeForConditionalGeneration.from_pretrained(
        args.model, revision=args.revision, dtype=torch.float32, attn_implementation=args.attention
    )
    lora = add_language_model_lora(model) if args.language_model_lora else None
    choose_trained(model, args.train, args.freeze)
    if bf16:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    if args.vision_gradient_checkpointing:
        model.pheye.vision_tower.gradient_checkpointing_enable()
    return model, lora


def save_result(trainer: PheyeTrainer, args: Arguments, processor, lora: LoraModel | None, sources: list[Source]):
    """Write what the run is for to its folder, file by file in one step each, and draw how it went."""
    output = Path(trainer.args.output_dir)
    staging = output / UNFINISHED
    accelerator, model = trainer.accelerator, trainer.accelerator.unwrap_model(trainer.model)
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = accelerator.get_state_dict(trainer.model_wrapped) if is_sharded else None
    if trainer.args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
        try:
            if args.trained_only:
                trainer._save(str(staging), state)
            else:
                if lora is not None:
                    lora.merge_and_unload()
                model.save_pretrained(staging, state_dict=state)
                processor.save_pretrained(staging)
            plot_log(trainer.state.log_history, staging / "training.png")
            write_model_card(
                staging / "README.md", trainer, args, sources, TRAINED_FILE if args.trained_only else None
            )
        except (OSError, RuntimeError) as error:
            raise trainer.disk_error(error) from error
        # The file that makes the folder a model comes last.
        for path in sorted(staging.iterdir(), key=lambda path: path.name in ("config.json", TRAINED_FILE)):
            os.replace(path, output / path.name)
        staging.rmdir()
    accelerator.wait_for_everyone()


def push(output: Path, training: TrainingArguments):
    """Upload the finished model, without checkpoints and logs."""
    from huggingface_hub import HfApi

    api = HfApi(token=training.hub_token)
    name = training.hub_model_id or output.resolve().name
    repo = api.create_repo(name, private=training.hub_private_repo, exist_ok=True)
    ignored = ["checkpoint-*", "runs/*", SKIPPED_FILE, RUN_FILE, UNFINISHED]
    print("Pushed:", api.upload_folder(repo_id=repo.repo_id, folder_path=output, ignore_patterns=ignored))


def print_skipped(output: Path, main_process: bool):
    """List the samples whose picture could not be read, once each."""
    path = output / SKIPPED_FILE
    if main_process and path.is_file():
        found = map(json.loads, path.read_text().splitlines())
        rows = {(row["source"], row["id"]): row["error"] for row in found}
        print(f"{len(rows)} samples were skipped, because their picture could not be read (all are in {path}):")
        for (source, name), error in list(rows.items())[:10]:
            print(f"  {name} of {source}: {error}")


def run(argv: list[str] | None = None) -> PheyeTrainer | None:
    """The command; the trainer after training, None if there was nothing to train."""
    args, training = parse(argv)
    output = Path(training.output_dir)
    sources = read_sources(args)
    settings = settings_that_matter(args, training, sources)
    is_finished = False if args.inspect else claim_output(output, settings)
    processor = PheyeProcessor.from_pretrained(args.model, revision=args.revision)
    if args.streaming:
        if training.max_steps <= 0:
            raise ValueError("A streamed data set has no length; give --max_steps.")
        training.accelerator_config.dispatch_batches = False  # every process opens its own pictures
        data = streamed(sources, training.seed)
    else:
        data = Mixture(sources, training.seed)
    if args.inspect:
        show_samples(data, processor, output.with_name(f"{output.name}-samples"), args.inspect, args.max_length)
        return None
    if is_finished:
        print(f"{output} holds this run, finished. There is nothing to do.")
        return None
    with training.main_process_first():
        if training.should_save:
            write_record(output, settings, finished=False)
    set_seed(training.seed)  # of new LoRA weights
    model, lora = load_model(args, training.bf16)
    if training.should_log:
        print(describe_trained(model))
    trainer = PheyeTrainer(
        model=model,
        args=_without_push(training),
        train_dataset=data,
        data_collator=PheyeCollator(processor, args.max_length),
        language_model_lora=None if lora is None else next(iter(lora.peft_config.values())),
        max_skipped_share=args.max_skipped_share,
    )
    checkpoint = last_checkpoint(output)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    print_skipped(output, training.should_save)
    save_result(trainer, args, processor, lora, sources)
    if training.should_save:
        write_record(output, settings, finished=True)
        if training.push_to_hub:
            push(output, training)
    return trainer


def _without_push(training: TrainingArguments) -> TrainingArguments:
    """The Trainer would push checkpoints; here the finished model is pushed, once."""
    training = copy.copy(training)
    training.push_to_hub = False
    return training


def main(argv: list[str] | None = None):
    try:
        run(argv)
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
