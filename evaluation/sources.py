"""Where samples come from: a benchmark's official file, or the columns of a data set."""

import argparse
import functools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..common.command import InputError, require
from ..common.tables import cell_image, open_dataset
from .formats import FORMATS, SUFFIXES, file_samples
from .samples import Sample, check_samples, right_option, texts
from .tasks import Task

# --- Columns of a data set ---


def default_columns(task: Task) -> dict[str, str | None]:
    """Which column holds what; None where the task has no such thing."""
    answers = "correct_choice_idx" if task.has_options else "answers" if task.asks else "captions"
    return {
        "image": "image",
        "question": "question" if task.asks else None,
        "choices": "choices" if task.has_options else None,
        "answers": answers,
        "id": None,
    }


def chosen_columns(task: Task, args: argparse.Namespace) -> dict[str, str | None]:
    columns = default_columns(task)
    for kind in columns:
        name = getattr(args, f"{kind}_column")
        if name is not None and columns[kind] is None and kind != "id":
            raise InputError(f"--task {task.name} has no {kind}: leave --{kind}_column out.")
        columns[kind] = name or columns[kind]
    return columns


def dataset_samples(source: str, task: Task, args: argparse.Namespace) -> list[Sample]:
    """All rows of a data set; the id is the row's number, unless a column holds ids."""
    datasets = require("datasets")
    saved = os.path.isfile(os.path.join(source, "state.json"))  # by itself, so that there is no split to choose
    split = args.split or (None if saved else task.split)
    where = argparse.Namespace(split=split, config=args.config, data_files=args.data_files)
    dataset = open_dataset(datasets, source, where)
    split = split or (str(dataset.split) if dataset.split is not None else None)
    columns = chosen_columns(task, args)
    if args.answers_column is None and columns["answers"] not in dataset.column_names:
        columns["answers"] = None  # as in a test set without public answers
    for kind, name in columns.items():
        if name is not None and name not in dataset.column_names:
            raise InputError(
                f"{source} has no column {name!r}; its columns are {', '.join(dataset.column_names)}. Name the one of "
                f"the {kind} by --{kind}_column."
            )
    feature = dataset.features[columns["image"]]
    if isinstance(feature, datasets.Image):  # so that a broken one can become a row
        dataset = dataset.cast_column(columns["image"], datasets.Image(decode=False))
    elif getattr(feature, "dtype", None) not in ("string", "large_string", "binary", "large_binary"):
        raise InputError(
            f"Column {columns['image']!r} of {source} holds {feature}; it must hold images, paths, URLs or bytes. "
            "Name another by --image_column."
        )
    images = dataset.select_columns([columns["image"]])
    samples = []
    for row, entry in enumerate(text_rows(dataset, columns)):
        picture = functools.partial(cell_image, images, columns["image"], row)
        samples.append(replace(row_sample(entry, task), id=entry.get("id", row), image=picture, split=split))
    return samples


def text_rows(dataset, columns: dict[str, str | None]) -> Iterator[dict]:
    """What each row holds but for the picture, under the kinds' names."""
    kinds = {kind: name for kind, name in columns.items() if name is not None and kind != "image"}
    if not kinds:
        yield from ({} for _ in range(len(dataset)))
        return
    for row in dataset.select_columns(sorted(set(kinds.values()))):
        yield {kind: row[name] for kind, name in kinds.items()}


def row_sample(entry: dict, task: Task) -> Sample:
    try:
        if task.has_options:
            references = right_option(entry["choices"], entry.get("answers"))
        else:
            references = texts(entry.get("answers"))
    except (IndexError, KeyError, TypeError) as error:
        raise InputError(
            f"The answers of a row are {entry.get('answers')!r}; they must be a text, a list of texts or objects with "
            "an `answer`, or for options the number of the right one. Name another column by --answers_column."
        ) from error
    options = tuple(entry.get("choices") or ())
    return Sample(0, question=entry.get("question", ""), options=options, references=references)


# --- All sources ---


def read_samples(task: Task, args: argparse.Namespace) -> tuple[list[Sample], str]:
    """All samples of the split that is evaluated, and its name."""
    path = Path(args.data)
    if path.is_file():
        dataset_only = ("config", "data_files", *(f"{kind}_column" for kind in default_columns(task)))
        unused = [f"--{name}" for name in dataset_only if getattr(args, name) is not None]
        if unused:
            raise InputError(f"{args.data} is a file: leave {', '.join(unused)} out.")
        samples = file_samples(path, task, args.annotations)
    else:
        if path.is_dir() and not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            raise InputError(f"{args.data} is a folder; give {FORMATS[task.format].description}.")
        if not path.is_dir() and (path.suffix in SUFFIXES or path.is_absolute() or args.data.count("/") > 1):
            raise InputError(f"There is no {args.data}; give {FORMATS[task.format].description}; or a data set.")
        unused = [f"--{name}" for name in ("annotations", "images") if getattr(args, name) is not None]
        if unused:
            raise InputError(f"{args.data} is a data set: leave {', '.join(unused)} out.")
        samples = dataset_samples(args.data, task, args)
    samples, split = of_split(samples, args, task)
    check_samples(samples, split, args.data, task)
    return samples, split


def of_split(samples: list[Sample], args: argparse.Namespace, task: Task) -> tuple[list[Sample], str]:
    """The samples of the split that is asked for, or else of the only one, or else of the task's."""
    names = sorted({sample.split for sample in samples if sample.split is not None})
    if not names:
        return samples, args.split or task.split
    split = args.split or (names[0] if len(names) == 1 else task.split)
    if split not in names:
        raise InputError(f"{args.data} has no split {split!r}; choose --split from {', '.join(names)}.")
    return [sample for sample in samples if sample.split == split], split
