"""The folder of a run: who may write there, what a finished run leaves in it, and how that reaches the Hub."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from peft import LoraModel

from ..common.command import InputError
from ..common.files import LOCK_FILE, RUN_FILE, fingerprint, lock, read_folder_record, write_record
from ..common.images import tried
from ..common.machine import versions
from ..image_opening_pheye import load_image
from .checkpoints import UNFINISHED, clear
from .formats import Row, Source
from .mixture import Mixture, Stream
from .report import plot_log, write_model_card
from .skipped import SKIPPED_FILE
from .trained import TRAINED_FILE
from .trainer import PheyeTrainer

IMAGES = 100  # of a run, that are looked at before it goes on
DIGITS = 16  # of a fingerprint, enough to tell by


def claim(output: Path, settings: dict) -> bool:
    """Whether the run that began in `output` is finished; False, too, if none began there.

    Raises:
        InputError: if the folder holds something else, or a run with other settings.
    """
    record = read_folder_record(output, settings)
    written = any((output / name).is_file() for name in ("config.json", TRAINED_FILE))
    return record is not None and record.get("finished") is True and written


def begin(output: Path, settings: dict, data: Mixture | Stream) -> BinaryIO:
    """Record that a run with `settings` goes on in `output`, which no other process may write to while what is
    returned is open.

    Raises:
        InputError: if another process writes there, or has finished the run, or if images have changed since it began.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = (output / LOCK_FILE).open("ab")
    lock(file, output)
    try:
        if claim(output, settings):
            raise InputError(f"{output} was finished by another process just now. There is nothing to do.")
        record = read_folder_record(output, settings) or {}
        images = dict(record.get("images") or some_images(data))
        check_unchanged(images, output)
        write_record(output / RUN_FILE, settings, finished=False, versions=versions(), images=images)
    except BaseException:
        file.close()
        raise
    return file


def some_images(data: Mixture | Stream) -> dict[str, str]:
    """Fingerprints of some images that are files and can be read, by their paths; broken ones may still be mended."""
    sources = data.rows if isinstance(data, Mixture) else []
    rows = [row for rows in sources for row in spread(rows, max(1, IMAGES // len(sources)))]
    images = [image for row in rows for image in row.images]
    paths = {image for image in images if isinstance(image, str) and os.path.isfile(image)}
    readable = [path for path in sorted(paths) if tried(partial(load_image, path))[1] is None]
    return {path: fingerprint(Path(path))[:DIGITS] for path in readable}


def spread(rows, most: int) -> Iterator[Row]:
    """At most so many rows, at even distances."""
    count = min(most, len(rows))
    return (rows[number * len(rows) // count] for number in range(count))


def check_unchanged(images: dict[str, str], output: Path):
    for path, known in images.items():
        if not os.path.isfile(path) or fingerprint(Path(path))[:DIGITS] != known:
            raise InputError(
                f"The image {path} has changed since the run in {output} began. Put the images back as they were, or "
                f"choose another output, or remove {output}."
            )


def finish(output: Path, settings: dict):
    """Record that the run in `output` is finished."""
    record = read_folder_record(output, settings) or {}
    write_record(output / RUN_FILE, **{**record, "settings": settings, "finished": True, "versions": versions()})


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

    Raises:
        FloatingPointError: if the weights hold NaN or infinity. OSError: if a file cannot be written.
    """
    trainer.check_finite()
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
