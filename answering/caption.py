"""Captions for a folder, a list or a dataset of images, as lines of JSON.

    python -m pheye.answering.caption --model FOLDER_OR_ID --images FOLDER|LIST.txt|DATASET --output captions.jsonl
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

from ..common.command import InputError, at_least, exit_status, process_state, require
from ..common.tables import cell_image, is_saved_dataset, open_dataset
from .engine import answer, open_model
from .rows import Request, check_requests

URL = ("http://", "https://")


DATASET_OPTIONS = ("split", "image_column", "id_column", "config", "data_files")


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


def dataset_requests(source: str, args: argparse.Namespace) -> list[Request]:
    """One request per row of a dataset; the id is the row's number, unless a column holds ids."""
    datasets = require("datasets")
    dataset = open_dataset(datasets, source, args)
    column = args.image_column or "image"
    for name in filter(None, (column, args.id_column)):
        if name not in dataset.column_names:
            raise InputError(f"{source} has no column {name!r}; its columns are {', '.join(dataset.column_names)}.")
    feature = dataset.features[column]
    if isinstance(feature, datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))  # so that a broken one can become a row
    elif getattr(feature, "dtype", None) not in ("string", "large_string", "binary", "large_binary"):
        raise InputError(f"Column {column!r} of {source} holds {feature}; it must hold images, paths, URLs or bytes.")
    ids = list(dataset[args.id_column]) if args.id_column else range(len(dataset))
    images = dataset.select_columns([column])
    return [
        Request(row_id, functools.partial(cell_image, images, column, row), args.prompt, {"image": row})
        for row, row_id in enumerate(ids)
    ]


def find_requests(args: argparse.Namespace) -> list[Request]:
    """What `--images` stands for."""
    source = Path(args.images)
    is_files = source.is_file() or (source.is_dir() and not is_saved_dataset(source))
    if is_files:
        unused = [f"--{name}" for name in DATASET_OPTIONS if getattr(args, name) is not None]
        if unused:
            raise InputError(f"{args.images} is no dataset: leave {', '.join(unused)} out.")
        find = folder_requests if source.is_dir() else list_requests
        requests = find(source, args.prompt)
    elif not source.is_dir() and (source.suffix == ".txt" or source.is_absolute() or args.images.count("/") > 1):
        raise InputError(f"There is no {args.images}; give a folder, a list of paths and URLs, or a dataset.")
    else:
        requests = dataset_requests(args.images, args)
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


def run(args: argparse.Namespace):
    """Write the captions."""
    state = process_state(cpu=args.device == "cpu")
    requests = find_requests(args)

    device = args.device or state.device
    commit, open_whole = open_model(args.model, args.revision, args.dtype, device)

    def load() -> tuple:
        model, processor = open_whole()
        if args.compile:
            compile_vision_tower(model, args.batch_size)
        return model, processor

    settings = {
        "model": args.model,
        "revision": commit or args.revision,
        "dtype": args.dtype,
        "prompt": args.prompt,
        **{name: getattr(args, name) for name in ("images", *DATASET_OPTIONS)},
        **({"compile": True} if args.compile else {}),  # rounds differently in half precision
    }
    decoding = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams, "do_sample": False}
    workers = args.workers
    if workers is None:  # on a CPU, the model itself keeps all cores busy
        workers = 0 if torch.device(device).type == "cpu" else 4
    answer(
        load,
        requests,
        args.output,
        batch_size=args.batch_size,
        generate_kwargs=decoding,
        settings=settings,
        workers=workers,
        answer_name="caption",
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    from ..pipeline_pheye import DEFAULT_MAX_NEW_TOKENS
    from ..processing_pheye import CAPTION_INSTRUCTION

    parser = argparse.ArgumentParser(prog="python -m pheye.answering.caption", description="Caption many images.")
    parser.add_argument("--model", required=True, metavar="FOLDER_OR_ID")
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
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", help="such as cpu or cuda (default: each process takes one of its own)")
    parser.add_argument(
        "--workers", type=at_least(0), help="processes that open images, per device (default: 4; on a CPU none)"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the vision tower first: takes minutes, pays for many images",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model's repository")
    dataset = parser.add_argument_group("datasets only")
    dataset.add_argument("--split", help="(default: train)")
    dataset.add_argument("--image_column", help="(default: image)")
    dataset.add_argument("--id_column", help="texts or integers, each once (default: the number of the row)")
    dataset.add_argument("--config", help="configuration of the dataset, where it has several")
    dataset.add_argument("--data_files", help="files or pattern, where SOURCE is a loader such as parquet")
    args = parser.parse_args(argv)
    if not args.prompt.strip():
        parser.error("--prompt is empty; leave it out for a one-sentence caption")
    if args.device and ":" in args.device and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error(f"--device {args.device} would put all processes on one device; leave it out")
    return args


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
