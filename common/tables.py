"""Tables of images: what `datasets` reads, with the images left encoded."""

import argparse
import os
from pathlib import Path

from .command import InputError, process_state


def open_dataset(datasets, source: str, args: argparse.Namespace):
    """A folder that `save_to_disk` wrote, or whatever `load_dataset` knows."""
    try:
        if not os.path.isdir(source):
            with process_state().main_process_first():  # the others find it downloaded
                dataset = datasets.load_dataset(
                    source, args.config, data_files=args.data_files, split=args.split or "train"
                )
        else:
            dataset = datasets.load_from_disk(source)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{source!r} is neither a folder, nor a list, nor a dataset that loads: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        split = args.split or "train"
        if split not in dataset:
            raise InputError(f"{source} has no split {split!r}; choose --split from {', '.join(dataset)}.")
        dataset = dataset[split]
    elif os.path.isdir(source) and args.split not in (None, str(dataset.split)):
        raise InputError(f"{source} holds no splits; leave --split {args.split} out.")
    return dataset.with_format(None)


def is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def cell_image(dataset, column: str, row: int) -> str | bytes | None:
    """The encoded picture in a cell, or where it is."""
    cell = dataset[row][column]
    return (cell["bytes"] or cell["path"]) if isinstance(cell, dict) else cell
