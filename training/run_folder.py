"""The folder of a run: who may write there, what a finished run leaves in it, and how that reaches the Hub."""

import json
import os
import shutil
from pathlib import Path

from peft import LoraModel

from ..common.files import RUN_FILE, read_folder_record, write_record
from ..common.machine import versions
from .formats import Source
from .report import plot_log, write_model_card
from .trained import TRAINED_FILE
from .trainer import SKIPPED_FILE, UNFINISHED, PheyeTrainer


def claim(output: Path, settings: dict) -> bool:
    """Whether the run that began in `output` is finished; False, too, if none began there.

    Raises:
        InputError: if the folder holds something else, or a run with other settings.
    """
    record = read_folder_record(output, settings)
    return record is not None and record["finished"]


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
    stage: str | None,
    trained_only: bool,
):
    """Write what the run is for to its folder, file by file in one step each, and draw how it went.

    Args:
        base: the model that the run began with.
        trained_only: whether to write only what was trained, in the place of a whole model.
    """
    output = Path(trainer.args.output_dir)
    staging = output / UNFINISHED
    accelerator, model = trainer.accelerator, trainer.accelerator.unwrap_model(trainer.model)
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = accelerator.get_state_dict(trainer.model_wrapped) if is_sharded else None
    if trainer.args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
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
                staging / "README.md", trainer, base, stage, sources, TRAINED_FILE if trained_only else None
            )
        except (OSError, RuntimeError) as error:
            raise trainer.disk_error(error) from error
        # The file that makes the folder a model comes last.
        for path in sorted(staging.iterdir(), key=lambda path: path.name in ("config.json", TRAINED_FILE)):
            os.replace(path, output / path.name)
        staging.rmdir()
    accelerator.wait_for_everyone()


def print_skipped(output: Path):
    """List the samples whose image could not be read, once each."""
    path = output / SKIPPED_FILE
    if path.is_file():
        found = map(json.loads, path.read_text().splitlines())
        rows = {(row["source"], row["id"]): row["error"] for row in found}
        print(f"{len(rows)} samples were skipped, because their image could not be read (all are in {path}):")
        for (source, name), error in list(rows.items())[:10]:
            print(f"  {name} of {source}: {error}")


def push(output: Path, name: str | None, private: bool | None, token: str | None):
    """Upload the finished model, without checkpoints and logs, to the repository `name`, or that of the folder's
    name."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(name or output.resolve().name, private=private, exist_ok=True)
    ignored = ["checkpoint-*", "runs/*", SKIPPED_FILE, RUN_FILE, UNFINISHED]
    print("Pushed:", api.upload_folder(repo_id=repo.repo_id, folder_path=output, ignore_patterns=ignored))
