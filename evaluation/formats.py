"""From a benchmark's official files, or the columns of a data set, to samples: picture, question and references.

Every reader checks what it needs before a model is loaded, and says what to do where something is missing.
"""

import argparse
import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..common.command import InputError, require
from ..common.tables import cell_image, open_dataset
from .tasks import Task, letters

LINES = (".jsonl", ".jsonlines")
SUFFIXES = (".json", *LINES)


@dataclass(frozen=True)
class Sample:
    """What is asked, and what counts as right.

    names: where the picture may be inside the folder of images, the likeliest first; image: its path, or a function
    that gives it; references: None if they are not public; split: None where the file does not say.
    """

    id: str | int
    names: tuple[str, ...] = ()
    image: Path | Callable | None = None
    question: str = ""
    options: tuple[str, ...] = ()
    references: tuple[str, ...] | None = None
    split: str | None = None
    image_id: str | int | None = None


@dataclass(frozen=True)
class Format:
    """`fits`: whether the parsed file looks like this format; `read`: its samples."""

    description: str
    fits: Callable[[object], bool]
    read: Callable[..., list[Sample]]


# --- Helpers of the readers ---


def first_of(value: object) -> dict:
    """The first entry of a list or an object, if it is an object, or an empty one."""
    values = list(value.values()) if isinstance(value, dict) else value
    return values[0] if isinstance(values, list) and values and isinstance(values[0], dict) else {}


def entry_under(data: object, key: str) -> dict:
    """The first entry of the list `data[key]`, or an empty one."""
    return first_of(data.get(key)) if isinstance(data, dict) else {}


def has(entry: dict, *keys: str) -> bool:
    return all(key in entry for key in keys)


def texts(answers: object) -> tuple[str, ...] | None:
    """References of the shapes in which files and data sets hold them: a text, a list, or objects with an `answer`."""
    if isinstance(answers, dict):  # a list of objects that `datasets` has turned into an object of lists
        answers = answers["answer"]
    if isinstance(answers, str):
        answers = [answers]
    found = tuple(answer["answer"] if isinstance(answer, dict) else answer for answer in answers or ())
    return found or None


def folders(name: str, *parents: str) -> tuple[str, ...]:
    """`name` by itself, and inside each of `parents`."""
    return (name, *(f"{parent}/{name}" for parent in parents))


def matching(asked: set, answered: set, asked_name: str, answered_name: str):
    """Raise InputError unless both sets of ids are the same."""
    for some, others, here, there in (
        (asked, answered, asked_name, answered_name),
        (answered, asked, answered_name, asked_name),
    ):
        if missing := some - others:
            example = min(missing, key=str)
            raise InputError(
                f"{len(missing)} of {len(some)} ids in the {here} are not in the {there}, {example!r} for example; "
                "give two files of the same split and version."
            )


# --- Official files ---


def read_vqa(data: dict, annotations: dict | None) -> list[Sample]:
    """VQAv2 and OK-VQA: a file of questions and one of annotations, about COCO's pictures of 2014 and 2015."""
    subtype = data["data_subtype"]  # such as val2014 or test-dev2015
    split, year = re.fullmatch(r"(.+?)(\d*)", subtype).groups()
    pictures = f"{'test' if split.startswith('test') else split}{year}"
    references = {}
    if annotations is not None:
        references = {entry["question_id"]: texts(entry["answers"]) for entry in annotations["annotations"]}
        matching({entry["question_id"] for entry in data["questions"]}, set(references), "questions", "annotations")
    return [
        Sample(
            entry["question_id"],
            folders(f"COCO_{pictures}_{entry['image_id']:012d}.jpg", pictures),
            question=entry["question"],
            references=references.get(entry["question_id"]),
            split=split,
            image_id=entry["image_id"],
        )
        for entry in data["questions"]
    ]


def read_textvqa(data: dict) -> list[Sample]:
    return [
        Sample(
            entry["question_id"],
            folders(f"{entry['image_id']}.jpg", "train_images", "test_images"),
            question=entry["question"],
            references=texts(entry.get("answers")),
            split=entry.get("set_name"),
            image_id=entry["image_id"],
        )
        for entry in data["data"]
    ]


def read_textcaps(data: dict) -> list[Sample]:
    """Several entries may be about one picture, each with a caption of its own and all references."""
    entries = {}
    for entry in data["data"]:
        entries.setdefault(entry["image_id"], entry)
    return [
        Sample(
            image_id,
            folders(f"{image_id}.jpg", "train_images", "test_images"),
            references=texts(entry.get("reference_strs")),
            split=entry.get("set_name"),
        )
        for image_id, entry in entries.items()
    ]


def read_coco_captions(data: dict) -> list[Sample]:
    """NoCaps and others: `images`, and unless they are secret `annotations`, a caption each."""
    references = {}
    for entry in data.get("annotations") or ():
        references.setdefault(entry["image_id"], []).append(entry["caption"])
    if references:
        matching({entry["id"] for entry in data["images"]}, set(references), "images", "annotations")
    return [
        Sample(
            entry["id"],
            folders(entry["file_name"], "images", "val", "test"),
            references=texts(references.get(entry["id"])),
        )
        for entry in data["images"]
    ]


def read_docci(data: list) -> list[Sample]:
    return [
        Sample(
            entry["example_id"],
            folders(entry["image_file"], "images"),
            references=texts(entry["description"]),
            split=entry["split"],
        )
        for entry in data
    ]


def read_aokvqa(data: list) -> list[Sample]:
    """About COCO's pictures of 2017."""
    return [
        Sample(
            entry["question_id"],
            folders(f"{entry['image_id']:012d}.jpg", f"{entry['split']}2017"),
            question=entry["question"],
            options=tuple(entry["choices"]),
            references=right_option(entry["choices"], entry.get("correct_choice_idx")),
            split=entry["split"],
        )
        for entry in data
    ]


def right_option(options: list[str], index: int | None) -> tuple[str, str] | None:
    """Letter and text of the right option; None if it is not public."""
    return None if index is None else (letters(len(options))[index], options[index])


def read_gqa(data: dict) -> list[Sample]:
    """The balanced questions, which are what GQA's own evaluation counts."""
    return [
        Sample(
            question_id,
            folders(f"{entry['imageId']}.jpg", "images"),
            question=entry["question"],
            references=texts(entry.get("answer")),
        )
        for question_id, entry in data.items()
        if entry.get("isBalanced", True)
    ]


def read_ocrvqa(data: dict) -> list[Sample]:
    """A book cover with several questions each; the id is the book's and the question's number."""
    splits = {1: "train", 2: "val", 3: "test"}
    samples = []
    for book, entry in data.items():
        suffix = os.path.splitext(entry["imageURL"])[1] or ".jpg"
        names = (*folders(f"{book}{suffix}", "images"), *folders(f"{book}.jpg", "images"))
        matching(set(range(len(entry["questions"]))), set(range(len(entry["answers"]))), "questions", "answers")
        for number, (question, answer) in enumerate(zip(entry["questions"], entry["answers"], strict=True)):
            references = texts(answer)
            split = splits[entry["split"]]
            samples.append(Sample(f"{book}-{number}", names, None, question, references=references, split=split))
    return samples


def read_stvqa(data: dict) -> list[Sample]:
    return [
        Sample(
            entry["question_id"],
            folders(entry["file_path"], "train_images", "train_imgs", "test_task3_images", "test_images"),
            question=entry["question"],
            references=texts(entry.get("answers")),
            split=entry.get("set_name"),
        )
        for entry in data["data"]
    ]


FORMATS = {
    "vqa": Format(
        "a question file of VQAv2 or OK-VQA: an object with `data_subtype` and `questions`, whose annotations are "
        "given by --annotations",
        lambda data: has(entry_under(data, "questions"), "question_id", "image_id", "question"),
        read_vqa,
    ),
    "textvqa": Format(
        "TextVQA's: an object with `data`, whose entries have `question_id`, `image_id`, `question` and `answers`",
        lambda data: has(entry_under(data, "data"), "question_id", "image_id", "question"),
        read_textvqa,
    ),
    "textcaps": Format(
        "TextCaps's: an object with `data`, whose entries have `image_id` and `reference_strs`",
        lambda data: has(entry_under(data, "data"), "image_id") and not has(entry_under(data, "data"), "question"),
        read_textcaps,
    ),
    "coco-captions": Format(
        "COCO's of captions: an object with `images` (`id`, `file_name`) and `annotations` (`image_id`, `caption`)",
        lambda data: has(entry_under(data, "images"), "id", "file_name"),
        read_coco_captions,
    ),
    "docci": Format(
        "DOCCI's: a line of JSON per picture with `example_id`, `image_file`, `split` and `description`",
        lambda data: isinstance(data, list) and has(first_of(data), "example_id", "image_file", "description"),
        read_docci,
    ),
    "aokvqa": Format(
        "A-OKVQA's: a list of objects with `question_id`, `image_id`, `question`, `choices` and `correct_choice_idx`",
        lambda data: isinstance(data, list) and has(first_of(data), "question_id", "image_id", "choices"),
        read_aokvqa,
    ),
    "gqa": Format(
        "GQA's: an object of questions by id, with `imageId`, `question` and `answer`",
        lambda data: isinstance(data, dict) and has(first_of(data), "imageId", "question"),
        read_gqa,
    ),
    "ocrvqa": Format(
        "OCR-VQA's: an object of books by id, with `imageURL`, `questions`, `answers` and `split`",
        lambda data: isinstance(data, dict) and has(first_of(data), "imageURL", "questions"),
        read_ocrvqa,
    ),
    "stvqa": Format(
        "ST-VQA's: an object with `data`, whose entries have `question_id`, `file_path`, `question` and `answers`",
        lambda data: has(entry_under(data, "data"), "question_id", "file_path", "question"),
        read_stvqa,
    ),
}


def load_json(path: Path) -> object:
    """What a file of JSON, or of a line of JSON per entry, holds."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in LINES:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text; unpack it if it is an archive.") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not whole JSON ({error}); download it again, or rename it to .jsonl if each line is an entry."
        ) from error


def file_samples(path: Path, task: Task, annotations: str | None) -> list[Sample]:
    """All samples of a benchmark's official file."""
    form, data = FORMATS[task.format], load_json(path)
    if not form.fits(data):
        likely = [name for name, other in FORMATS.items() if other.fits(data)]
        hint = f" It looks like the format {likely[0]!r}: choose the --task that reads it." if likely else ""
        raise InputError(f"{path} is not in the format of --task {task.name}, which is {form.description}.{hint}")
    arguments = [data]
    if task.format == "vqa":
        arguments.append(vqa_annotations(annotations))
    elif annotations is not None:
        raise InputError(f"The file of --task {task.name} holds its answers: leave --annotations out.")
    try:
        return form.read(*arguments)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        what = f"an entry has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path} cannot be read, because {what}; it should be {form.description}.") from error


def vqa_annotations(path: str | None) -> dict | None:
    if path is None:
        return None
    if not os.path.isfile(path):
        raise InputError(f"There is no file {path}; give VQA's annotation file as --annotations.")
    annotations = load_json(Path(path))
    if not has(entry_under(annotations, "annotations"), "question_id", "answers"):
        raise InputError(
            f"{path} is no annotation file of VQA: an object with `annotations`, whose entries have `question_id` and "
            "`answers`."
        )
    return annotations


def found_images(samples: list[Sample], folder: Path) -> list[Sample]:
    """`samples` with the paths of their pictures in `folder`."""
    paths, missing = {}, []
    for sample in samples:
        if sample.names not in paths:
            candidates = (folder / name for name in sample.names)
            paths[sample.names] = next((path for path in candidates if path.is_file()), None)
            if paths[sample.names] is None:
                missing.append(sample.names[0])
    if missing:
        raise InputError(
            f"{len(missing)} of {len(paths)} images are not in {folder}, {missing[0]} for example. Give the folder "
            "that holds them as --images."
        )
    return [replace(sample, image=paths[sample.names]) for sample in samples]


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


def check_samples(samples: list[Sample], split: str, source: str, task: Task):
    """Raise InputError unless there are samples whose questions and references are texts, with answers for all.

    A split whose name begins with `test` may have no answers at all, if there is a server that has them.
    """
    if not samples:
        raise InputError(f"{source} holds no samples; check that it was downloaded whole.")
    for sample in samples:
        given = (sample.question, *sample.options, *(sample.references or ()))
        if wrong := [text for text in given if not isinstance(text, str)]:
            raise InputError(f"Sample {sample.id!r} of {source} holds {wrong[0]!r} where a text belongs.")
        if task.asks and not sample.question.strip():
            raise InputError(f"The question of {sample.id!r} in {source} is empty; leave such samples out.")
    without = [sample.id for sample in samples if sample.references is None]
    secret = len(without) == len(samples) and split.startswith("test")
    if not without or (secret and task.server_keys):
        return
    if secret:
        raise InputError(
            f"{source} has no answers, and no server's file is known for --task {task.name}; choose a "
            "split with answers."
        )
    raise InputError(
        f"{len(without)} of {len(samples)} samples of {source} have no answers, {without[0]!r} for example. Give a "
        "file or column that has them (--annotations for VQAv2 and OK-VQA, --answers_column for a data set), or "
        "--split test if they are secret."
    )
