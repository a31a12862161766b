"""Train a Pheye: the paper's stages, or fine-tuning on data of one's own.

    pheye train --model FOLDER_OR_ID --data DATA [--image_folder DIR] --output OUT
        [--stage describe|instruct|tasks] [any option of transformers' TrainingArguments]

`accelerate launch -m pheye.training.train ...` runs it on several devices and machines. docs/training.md has the data
formats, the recipes and what a run leaves behind. The same command again goes on from the last checkpoint.
"""

import contextlib
import copy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraModel
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed

from ..common.command import InputError, Interrupted, exit_status
from ..common.models import find_model
from ..configuration_pheye import PheyeConfig
from ..modeling_pheye import PheyeForConditionalGeneration
from ..processing_pheye import PheyeProcessor
from .callbacks import Plan
from .checkpoints import rotate, whole_checkpoint
from .collator import PheyeCollator
from .formats import Source
from .inspection import show_samples
from .mixture import FixedMixture, Mixture, Stream, described_sources
from .options import PheyeTrainingArguments, check_installed, parse_options, refused_options, settings_that_matter
from .rows import fingerprint_of
from .run_folder import DIGITS, begin, claim, finish, open_repo, push, save_result
from .skipped import print_skipped
from .stages import STAGES, completed, stage_sources
from .trained import add_language_model_lora, choose_trained, describe_trained
from .trainer import PheyeTrainer
from .vision_budgets import prepare_for_budgets


def parse(argv: list[str] | None = None):
    return parse_options(argv, __doc__)


# --- Data and model ---


def read_sources(data: list[str], stage: str | None = None, **options) -> list[Source]:
    """The data sets that `data` names; options of the command, and then the stage, fill in what a mixture file leaves
    out."""
    described = described_sources(data, **said_of_sources(**options))
    return stage_sources(STAGES[stage], described) if stage else [source for source, _ in described]


def said_of_sources(all_turns: bool = False, **fields) -> dict[str, object]:
    """The fields of `Source` that options of the command say: those that are not at their default."""
    fields["turns"] = None if all_turns else 1
    return {name: value for name, value in fields.items() if value != getattr(Source("x"), name)}


def read_eval_sources(data: list[str] | None, stage: str | None = None, **options) -> list[Source]:
    """The data sets to evaluate on, as `read_sources` reads them; of a stage, as few as wanted."""
    if data is None:
        return []
    described = described_sources(data, **said_of_sources(**{**options, "streaming": False}))
    for source, _ in described:
        if source.streaming:
            raise InputError(f"{source.name} is streamed, so its evaluation would not end; leave `streaming` out.")
    records = STAGES[stage].sources if stage else {}
    return [completed(source, said, records.get(source.name)) for source, said in described]


def open_data(
    sources: list[Source], training: TrainingArguments, max_images: int, kind: type[Mixture] = Mixture
) -> Mixture | Stream:
    """The samples of `sources`, to be drawn by the seed."""
    seed = training.seed if training.data_seed is None else training.data_seed
    if not any(source.streaming for source in sources):
        return kind(sources, seed, max_images)
    if training.max_steps <= 0:
        raise InputError("A streamed data set has no length; give --max_steps.")
    training.accelerator_config.dispatch_batches = False  # every process opens its own images
    return Stream(sources, seed, max_images)


@contextlib.contextmanager
def loading(model: str) -> Iterator[None]:
    """Whatever is wrong with the files of `model` leaves this block as what the user can mend."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the libraries below have several of their own for a file that is not whole
        raise InputError(f"{model} could not be loaded: {error}") from error


def load_model(
    model: str,
    revision: str | None = None,
    train: list[str] | None = None,
    freeze: list[str] | None = None,
    language_model_lora: bool = False,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float | None = None,
    vision_gradient_checkpointing: bool = False,
    attention: str | None = None,
    self_attention_layers: list[int] | None = None,
    self_attention_kind: str | None = None,
    *,
    bf16: bool,
) -> tuple[PheyeForConditionalGeneration, LoraModel | None]:
    """The model, ready to train: frozen parts in bfloat16 (if `bf16`), trained ones in float32; and its LoRA."""
    with loading(model):
        added = {}
        if self_attention_layers is not None:
            there = PheyeConfig.from_pretrained(model, revision=revision).self_attention_layers
            if there:
                raise InputError(f"{model} has self_attention_layers={there}; leave --self_attention_layers out.")
            added = {"self_attention_layers": self_attention_layers}
            added |= {"self_attention_kind": self_attention_kind} if self_attention_kind else {}
        # All in float32 at first, so that a trained part that an earlier stage saved in float32 keeps its digits.
        loaded = PheyeForConditionalGeneration.from_pretrained(
            model, revision=revision, dtype=torch.float32, attn_implementation=attention, **added
        )
    numbers = {"rank": lora_rank, "alpha": lora_alpha, "dropout": lora_dropout}
    numbers = {name: number for name, number in numbers.items() if number is not None}
    lora = add_language_model_lora(loaded, **numbers) if language_model_lora else None
    choose_trained(loaded, train, freeze)
    if bf16:
        # Not of batch norms: their statistics, no parameters, stay in float32, and weights must be like them.
        for part in loaded.modules():
            for parameter in () if isinstance(part, torch.nn.BatchNorm2d) else part.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
    if vision_gradient_checkpointing:
        loaded.pheye.checkpoint_vision_tower()
    return loaded, lora


# --- The run ---


def make_trainer(
    model: PheyeForConditionalGeneration,
    training: PheyeTrainingArguments,
    processor: PheyeProcessor,
    data: Mixture | Stream,
    eval_data: Mixture | None,
    lora: LoraModel | None,
    max_length: int | None,
    max_skipped_share: float,
) -> PheyeTrainer:
    """The Trainer of the command, which says how many steps there will be, and does not push checkpoints."""
    training = copy.copy(training)
    training.push_to_hub = False  # the finished model is pushed, once
    prepare_for_budgets(model.config, training, training.vision_budgets)
    patience = training.early_stopping_patience
    with refused_options():
        trainer = PheyeTrainer(
            model=model,
            args=training,
            train_dataset=data,
            eval_dataset=eval_data,
            data_collator=PheyeCollator(processor, max_length),
            callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
            language_model_lora=None if lora is None else next(iter(lora.peft_config.values())),
            max_skipped_share=max_skipped_share,
            vision_budgets=training.vision_budgets,
            pretrained_learning_rate=training.pretrained_learning_rate,
        )
    trainer.callback_handler.callbacks.insert(0, Plan(trainer))  # before the progress bar
    return trainer


def train_to_end(trainer: PheyeTrainer):
    """Train, from the last whole checkpoint if there is one."""
    training = trainer.args
    found = [whole_checkpoint(training.output_dir) if training.should_save else None]
    if training.world_size > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(found)
    checkpoint, flaws = found[0]
    if training.should_save:
        for name, flaw in flaws.items():
            print(f"{name} is left out: {flaw}.")
        if flaws:
            print(f"The run goes on from {checkpoint.name}." if checkpoint else "The run begins anew.", flush=True)
    if checkpoint is not None:
        training.eval_on_start = False  # it has been; once more would be an evaluation that was no better
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except torch.OutOfMemoryError as error:
        remedy = "Give the same command with a smaller --per_device_train_batch_size to go on."
        raise InputError(f"{error}\n{remedy}") from error
    if training.should_save:  # once more, for a kill may have come before what a new checkpoint makes superfluous
        state = trainer.state
        rotate(training.output_dir, training.save_total_limit, state.best_model_checkpoint, state.global_step)


@contextlib.contextmanager
def interruptible(output: Path) -> Iterator[None]:
    """Ctrl-C leaves this block with what is kept, and how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        last, _ = whole_checkpoint(output)
        if last is None:
            kept = (
                "There is no checkpoint to go on from, so the same command begins anew; a smaller --save_steps saves "
                "sooner."
            )
        else:
            kept = f"{last} is kept; the same command goes on from it."
        raise Interrupted(kept) from error


def last_words(trainer: PheyeTrainer, output: Path, base: str, trained_only: bool) -> str:
    """Where the model is, and how to try it."""
    losses = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
    told = ", ".join(f"{loss:.4g} at step {step}" for step, loss in dict.fromkeys(losses[:1] + losses[-1:]))
    lines = [f"{output} holds {'what was trained' if trained_only else 'the model'}. Loss: {told or 'not logged'}."]
    if trained_only:
        lines.append(f"load_trained(model, {str(output)!r}) of pheye.training.trained puts it onto {base}.")
    else:
        lines.append(f'Try it: pheye ask {shlex.quote(str(output))} IMAGE "question"')
    return "\n".join(lines)


# --- The command ---


def run(argv: list[str] | None = None) -> PheyeTrainer | None:
    """Train, or go on with the run that began in the output folder.

    Returns:
        the trainer after training; None if there was nothing to train.
    """
    of_model, of_run, of_data, training = parse(argv)
    output, base = Path(training.output_dir), of_model.model
    sources = read_sources(of_run.data, **vars(of_data))
    eval_sources = read_eval_sources(training.eval_data, **vars(of_data))
    settings = {
        **settings_that_matter(of_model, of_run, of_data, training, sources, eval_sources),
        "files of the model": find_model(base, of_model.revision)[:DIGITS],
        **{f"files of {source.name}": fingerprint_of(source)[:DIGITS] for source in sources},
        **{f"files of {source.name}, evaluation": fingerprint_of(source)[:DIGITS] for source in eval_sources},
    }
    pushes = training.push_to_hub and training.should_save
    repo_options = (training.hub_model_id, training.hub_private_repo, training.hub_token)
    if not of_run.inspect and claim(output, settings):
        print(f"{output} holds this run, finished. To train on, begin another run with --model {output}.")
        if pushes:  # this may have failed
            push(output, open_repo(output, *repo_options), training.hub_token)
        return None
    with loading(base):
        processor = PheyeProcessor.from_pretrained(base, revision=of_model.revision)
    max_images = processor.image_processor.max_images
    data = open_data(sources, training, max_images)
    if of_run.inspect:
        folder = output.with_name(f"{output.name}-samples")
        show_samples(data, processor, folder, of_run.inspect, of_run.max_length)
        return None
    eval_data = open_data(eval_sources, training, max_images, FixedMixture) if eval_sources else None
    check_installed(training)
    training.distributed_state.wait_for_everyone()  # all have looked into the folder before one writes there
    with training.main_process_first():
        held = begin(output, settings, data) if training.should_save else contextlib.nullcontext()
    with held, interruptible(output):
        repo = open_repo(output, *repo_options) if pushes else None
        set_seed(training.seed)  # of new LoRA weights
        model, lora = load_model(**vars(of_model), bf16=training.bf16)
        if training.should_log:
            print(describe_trained(model))
        trainer = make_trainer(
            model, training, processor, data, eval_data, lora, of_run.max_length, of_run.max_skipped_share
        )
        train_to_end(trainer)
        save_result(
            trainer, processor, lora, sources, base=base, revision=of_model.revision, stage=of_data.stage,
            trained_only=of_run.trained_only, repo=repo,
        )  # fmt: skip
        if training.should_save:
            finish(output, settings)
            print_skipped(output)
            print(last_words(trainer, output, base, of_run.trained_only))
        if repo is not None:
            push(output, repo, training.hub_token)
    return trainer


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(run, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
