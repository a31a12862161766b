"""Where samples come from: a benchmark's official file, or the columns of a data set.

Everything is checked here, before a model is loaded, and what is missing is said with its remedy.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..common.command import InputError, process_state
from ..common.tables import FILES as TABLE_FILES
from ..common.tables import ImageColumn, holds_tables, load_split
from ..training.formats import TURNS_COLUMNS
from .formats import FORMATS, SUFFIXES, file_samples
from .own import LLAVA, images_in, own_file_samples, question_about, table_samples, usual_image_column
from .samples import Sample, check_samples, right_option, texts
from .tasks import OWN, Task

# Options that say which images are asked about; answers about others are never taken for theirs.
WHERE_IMAGES_ARE = ("data", "images", "image_column", "image_sources", "config", "data_files")

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


def chosen_columns(task: Task, named: dict[str, str | None]) -> dict[str, str | None]:
    """named: columns that the user has named, by option: `image_column` and so on."""
    columns = default_columns(task)
    for kind in columns:
        name = named.get(f"{kind}_column")
        if name is not None and columns[kind] is None and kind != "id":
            raise InputError(f"--task {task.name} has no {kind}: leave --{kind}_column out.")
        columns[kind] = name or columns[kind]
    return columns


def dataset_samples(
    task: Task,
    source: str,
    *,
    split: str | None = None,
    config: str | None = None,
    data_files: str | None = None,
    image_sources: str | None = None,
    **named: str | None,
) -> list[Sample]:
    """All rows of a data set; the id is the row's number, unless a column holds ids.

    named: columns that the user has named, by option: `image_column` and so on.
    """
    with process_state().main_process_first():  # the others find it downloaded
        where = {"config": config, "data_files": data_files}
        table, split, _ = load_split(source, split=split, usual_split=task.split, **where)
    named_turns = named.get("question_column") or named.get("answers_column")
    if task.format == OWN and not named_turns and any(column in table.column_names for column in TURNS_COLUMNS):
        where = {name: named.pop(name, None) for name in ("image_column", "id_column")}
        refuse_unused(f"{source} has conversations", named)
        return table_samples(table, task, source, split, image_sources=image_sources, **where)
    columns = chosen_columns(task, named)
    if task.format == OWN and named.get("image_column") is None:
        columns["image"] = usual_image_column(table.column_names)
    if named.get("answers_column") is None and columns["answers"] not in table.column_names:
        columns["answers"] = None  # as in a test set without public answers
    for kind, name in columns.items():
        if name is not None and name not in table.column_names:
            raise InputError(
                f"{source} has no column {name!r}; its columns are {', '.join(table.column_names)}. Name the one of "
                f"the {kind} by --{kind}_column."
            )
    images = ImageColumn(table, columns["image"], source, image_sources, several=task.format == OWN)
    rows = images_in(images, columns["image"]) if task.format == OWN else None
    samples = []
    for row, entry in enumerate(text_rows(table, columns)):
        sample, image = row_sample(entry, task), functools.partial(images.__getitem__, row)
        if rows is not None and isinstance(sample.question, str):
            question, shown = question_about(sample.question, rows[row])
            sample, image = replace(sample, question=question), shown[0] if len(shown) == 1 else shown
        samples.append(replace(sample, id=entry.get("id", row), image=image, split=split))
    return samples


def text_rows(table, columns: dict[str, str | None]) -> Iterator[dict]:
    """What each row holds but for the image, under the kinds' names."""
    kinds = {kind: name for kind, name in columns.items() if name is not None and kind != "image"}
    if not kinds:
        yield from ({} for _ in range(len(table)))
        return
    for row in table.select_columns(sorted(set(kinds.values()))):
        yield {kind: row[name] for kind, name in kinds.items()}


def row_sample(entry: dict, task: Task) -> Sample:
    try:
        if task.has_options:
            references = right_option(entry["choices"], entry.get("answers"))
        else:
            references = texts(entry.get("answers"))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"The answers of a row are {entry.get('answers')!r} ({error}); they must be a text, a list of texts or "
            "objects with an `answer`, or for options the number of the right one. Name another column by "
            "--answers_column."
        ) from error
    options = tuple(entry.get("choices") or ())
    return Sample(0, question=entry.get("question", ""), options=options, references=references)


# --- All sources ---


def read_samples(
    task: Task,
    source: str,
    *,
    split: str | None = None,
    annotations: str | None = None,
    images: str | None = None,
    **dataset_options: str | None,
) -> tuple[list[Sample], str]:
    """All samples of the split that is evaluated, and its name.

    Args:
        annotations: for the official files of VQAv2 and OK-VQA.
        images: whether a folder of images was named, which a data set has no use for.
        dataset_options: as `dataset_samples` takes them.
    """
    path = Path(source)
    wanted = LLAVA if task.format == OWN else FORMATS[task.format].description
    if path.is_file() and path.suffix.lower() not in TABLE_FILES:
        samples = file_samples_of(path, task, annotations, images, dataset_options)
    else:
        if path.is_dir() and not holds_tables(path):
            raise InputError(f"{source} is a folder; give {wanted}.")
        if not path.exists() and (path.suffix in SUFFIXES or path.is_absolute() or source.count("/") > 1):
            raise InputError(f"There is no {source}; give {wanted}; or a data set.")
        refuse_unused(f"{source} is a data set", {"annotations": annotations, "images": images})
        samples = dataset_samples(task, source, split=split, **dataset_options)
    samples, split = of_split(samples, split, source, task)
    check_samples(samples, split, source, task)
    return samples, split


def file_samples_of(
    path: Path, task: Task, annotations: str | None, images: str | None, dataset_options: dict
) -> list[Sample]:
    """All samples of a file that is no table."""
    others = dict(dataset_options)
    own = {name: others.pop(name, None) for name in ("image_column", "image_sources")} if task.format == OWN else {}
    refuse_unused(f"{path} is a file", others)
    if task.format == OWN:
        return own_file_samples(path, task, images=images, annotations=annotations, **own)
    return file_samples(path, task, annotations)


def refuse_unused(reason: str, options: dict[str, str | None]):
    """Raise InputError if one of `options` was given."""
    if unused := [f"--{name}" for name, value in options.items() if value is not None]:
        raise InputError(f"{reason}: leave {', '.join(unused)} out.")


def of_split(samples: list[Sample], split: str | None, source: str, task: Task) -> tuple[list[Sample], str]:
    """The samples of the split that is asked for, or else of the only one, or else of the task's."""
    if wrong := [sample for sample in samples if not isinstance(sample.split, str | None)]:
        raise InputError(f"The split of sample {wrong[0].id!r} in {source} is {wrong[0].split!r}, which is no text.")
    names = sorted({sample.split for sample in samples if sample.split is not None})
    if not names:
        return samples, split or task.split
    split = split or (names[0] if len(names) == 1 else task.split)
    if split not in names:
        raise InputError(f"{source} has no split {split!r}; choose --split from {', '.join(names)}.")
    return [sample for sample in samples if sample.split == split], split
