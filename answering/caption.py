"""Captions for a folder, a list or a dataset of images, as lines of JSON.

    pheye caption --model FOLDER_OR_ID --images FOLDER|LIST.txt|DATASET --output captions.jsonl
    accelerate launch --num_processes 8 -m pheye.answering.caption ...

A row holds `id`, `image` and `caption`, or `error` in place of the caption where an image cannot be read. After a
kill, the same command goes on where the rows end, with any number of processes. To try images with an error once
more, delete their rows from the output and give the same command again.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

import torch
from PIL import Image

from ..common.command import InputError, Parser, add_model_options, at_least, exit_status, process_state
from ..common.tables import encoded_image, images_of, is_saved, load_table
from ..pipeline_pheye import DEFAULT_MAX_NEW_TOKENS
from ..processing_pheye import CAPTION_INSTRUCTION
from .engine import answer, default_workers, open_model
from .rows import Request, check_requests

URL = ("http://", "https://")


# --- Where the images come from ---


def image_suffixes() -> set[str]:
    """Suffixes of the files that Pillow can open."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def stop(error: OSError):
    raise error


def folder_requests(folder: Path, prompt: str) -> list[Request]:
    """One request per image below `folder`, sorted; the id is the path inside the folder."""
    suffixes, names = image_suffixes(), []
    for parent, folders, files in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(parent, name) for name in files if not name.startswith(".")]
        names += [path.relative_to(folder).as_posix() for path in paths if path.suffix.lower() in suffixes]
    if not names:
        raise InputError(
            f"There are no images in {folder} (names that end in .jpg, .png and the like, hidden ones left out)."
        )
    return [Request(name, folder / name, prompt, {"image": str(folder / name)}) for name in sorted(names)]


def list_requests(file: Path, prompt: str) -> list[Request]:
    """One request per path or URL in the lines of `file`."""
    try:
        entries = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no text; give a folder, or a text file with a path or URL per line.") from error
    if not entries:
        raise InputError(f"{file} is empty; write a path or URL into each line.")
    if not any(entry.startswith(URL) or os.path.isfile(entry) for entry in entries):
        raise InputError(
            f"No line of {file} is a URL or an existing file, beginning with {entries[0]!r}; paths are looked up from "
            "the working directory."
        )
    return [
        Request(entry, entry if entry.startswith(URL) else Path(entry), prompt, {"image": entry}) for entry in entries
    ]


def dataset_requests(
    source: str, prompt: str, image_column: str | None, id_column: str | None, **where
) -> list[Request]:
    """One request per row of a data set; the id is the row's number, unless a column holds ids."""
    with process_state().main_process_first():  # the others find it downloaded
        table = load_table(source, **where)
    column = image_column or "image"
    for name in filter(None, (column, id_column)):
        if name not in table.column_names:
            raise InputError(f"{source} has no column {name!r}; its columns are {', '.join(table.column_names)}.")
    images = images_of(table, column, source)
    ids = list(table[id_column]) if id_column else range(len(table))
    return [
        Request(row_id, functools.partial(encoded_image, images, row), prompt, {"image": row})
        for row, row_id in enumerate(ids)
    ]


def find_requests(images: str, prompt: str, **dataset_options) -> list[Request]:
    """What `--images` stands for."""
    source = Path(images)
    is_files = source.is_file() or (source.is_dir() and not is_saved(source))
    if is_files:
        unused = [f"--{name}" for name, value in dataset_options.items() if value is not None]
        if unused:
            raise InputError(f"{images} is no dataset: leave {', '.join(unused)} out.")
        find = folder_requests if source.is_dir() else list_requests
        requests = find(source, prompt)
    elif not source.is_dir() and (source.suffix == ".txt" or source.is_absolute() or images.count("/") > 1):
        raise InputError(f"There is no {images}; give a folder, a list of paths and URLs, or a dataset.")
    else:
        requests = dataset_requests(images, prompt, **dataset_options)
    check_requests(requests)
    return requests


# --- The command ---


@torch.no_grad()
def compile_vision_tower(model, images: int):
    """Compile for batches of so many images; smaller ones, such as the last, are encoded as they would be without."""
    model.model.vision_tower.compile(dynamic=False)
    size = model.config.vision_config.image_size
    model.get_image_features(torch.zeros(images, model.config.views_per_image, 3, size, size, device=model.device))
    torch.compiler.set_stance("eager_on_recompile")


def caption(
    model: str,
    images: str,
    output: str,
    *,
    prompt: str,
    batch_size: int,
    max_new_tokens: int,
    num_beams: int,
    dtype: str,
    device: str | None,
    workers: int | None,
    compile: bool,
    revision: str | None,
    **dataset_options,
):
    """Write the captions; the arguments are the command's options."""
    state = process_state(device)
    requests = find_requests(images, prompt, **dataset_options)
    device = device or state.device
    identity, open_whole = open_model(model, revision, dtype, device)

    def load() -> tuple:
        loaded, processor = open_whole()
        if compile:
            compile_vision_tower(loaded, batch_size)
        return loaded, processor

    settings = {
        "model": model,
        "revision": identity,
        "dtype": dtype,
        "prompt": prompt,
        "images": images,
        **dataset_options,
        **({"compile": True} if compile else {}),  # rounds differently in half precision
    }
    answer(
        load,
        requests,
        output,
        batch_size=batch_size,
        generate_kwargs={"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False},
        settings=settings,
        workers=default_workers(device) if workers is None else workers,
        answer_name="caption",
    )


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(prog="pheye caption", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument(
        "--images",
        required=True,
        metavar="SOURCE",
        help="a folder, a text file with a path or URL per line, or a dataset: a folder made by save_to_disk, or "
        "what load_dataset takes",
    )
    parser.add_argument("--output", required=True, metavar="FILE.jsonl", help="a line of JSON per image")
    parser.add_argument("--prompt", default=CAPTION_INSTRUCTION, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=at_least(1), default=8, help="images at once (default: 8)")
    parser.add_argument(
        "--max_new_tokens", type=at_least(1), default=DEFAULT_MAX_NEW_TOKENS, help="(default: %(default)s)"
    )
    parser.add_argument("--num_beams", type=at_least(1), default=1, help="(default: 1, greedy)")
    parser.add_argument(
        "--workers", type=at_least(0), help="processes that open images, per device (default: 4; on a CPU none)"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the vision tower first: takes minutes, pays for many images",
    )
    dataset = parser.add_argument_group("datasets only")
    dataset.add_argument("--split", help="(default: train)")
    dataset.add_argument("--image_column", help="(default: image)")
    dataset.add_argument("--id_column", help="texts or integers, each once (default: the number of the row)")
    dataset.add_argument("--config", help="configuration of the dataset, where it has several")
    dataset.add_argument("--data_files", help="files or pattern, where SOURCE is a loader such as parquet")
    options = vars(parser.parse_args(argv))
    if not options["prompt"].strip():
        parser.error("--prompt is empty; leave it out for a one-sentence caption")
    return options


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(caption, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
