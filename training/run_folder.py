"""The folder of a run: who may write there, what a finished run leaves in it, and how that reaches the Hub."""

import os
from pathlib import Path
from typing import BinaryIO

from peft import LoraModel

from ..common.command import InputError
from ..common.files import LOCK_FILE, RUN_FILE, lock, read_folder_record, write_record
from ..common.machine import versions
from .checkpoints import clear
from .formats import Source
from .report import plot_log, write_model_card
from .skipped import SKIPPED_FILE
from .trained import TRAINED_FILE
from .trainer import UNFINISHED, PheyeTrainer


def claim(output: Path, settings: dict) -> bool:
    """Whether the run that began in `output` is finished; False, too, if none began there.

    Raises:
        InputError: if the folder holds something else, or a run with other settings.
    """
    record = read_folder_record(output, settings)
    written = any((output / name).is_file() for name in ("config.json", TRAINED_FILE))
    return record is not None and record.get("finished") is True and written


def begin(output: Path, settings: dict) -> BinaryIO:
    """Record that a run with `settings` goes on in `output`, which no other process may write to while what is
    returned is open.

    Raises:
        InputError: if another process writes there, or has finished another run there.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = (output / LOCK_FILE).open("ab")
    lock(file, output)
    try:
        if claim(output, settings):
            raise InputError(f"{output} was finished by another process just now. There is nothing to do.")
        note(output, settings, finished=False)
    except BaseException:
        file.close()
        raise
    return file


def note(output: Path, settings: dict, finished: bool):
    """Record that a run with `settings` began in `output`, or that it is finished."""
    write_record(output / RUN_FILE, settings, finished=finished, versions=versions())


def save_result(
    trainer: PheyeTrainer,
    processor,
    lora: LoraModel | None,
    sources: list[Source],
    *,
    base: str,
    revision: str | None,
    stage: str | None,
    trained_only: bool,
    repo: str | None = None,
):
    """Write what the run is for to its folder, file by file in one step each, and draw how it went.

    Args:
        base: the model that the run began with.
        trained_only: whether to write only what was trained, in the place of a whole model.
        repo: the repository that the model will be pushed to.
    """
    output = Path(trainer.args.output_dir)
    staging = output / UNFINISHED
    accelerator, model = trainer.accelerator, trainer.accelerator.unwrap_model(trainer.model)
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = accelerator.get_state_dict(trainer.model_wrapped) if is_sharded else None
    if trainer.args.should_save:
        clear(staging)
        try:
            if trained_only:
                trainer._save(str(staging), state)
            else:
                if lora is not None:
                    lora.merge_and_unload()
                model.save_pretrained(staging, state_dict=state)
            processor.save_pretrained(staging)
            plot_log(trainer.state.log_history, staging / "training.png")
            write_model_card(
                staging / "README.md", trainer, sources, base=base, revision=revision, stage=stage, repo=repo,
                trained_file=TRAINED_FILE if trained_only else None,
            )  # fmt: skip
        except Exception as error:  # of whatever kind: the libraries below have several of their own
            raise trainer.disk_error(error) from error
        # The file that makes the folder a model comes last.
        for path in sorted(staging.iterdir(), key=lambda path: path.name in ("config.json", TRAINED_FILE)):
            os.replace(path, output / path.name)
        staging.rmdir()
    accelerator.wait_for_everyone()


def open_repo(output: Path, name: str | None, private: bool | None, token: str | None) -> str:
    """The id of the repository `name`, or of the folder's name, on the Hub; it is made if it is not there."""
    from huggingface_hub import HfApi

    repo = HfApi(token=token).create_repo(name or output.resolve().name, private=private, exist_ok=True)
    return repo.repo_id


def push(output: Path, repo_id: str, token: str | None):
    """Upload the finished model, without checkpoints and logs."""
    from huggingface_hub import HfApi

    ignored = ["checkpoint-*", "runs/*", SKIPPED_FILE, RUN_FILE, LOCK_FILE, UNFINISHED]
    pushed = HfApi(token=token).upload_folder(repo_id=repo_id, folder_path=output, ignore_patterns=ignored)
    print("Pushed:", pushed)
