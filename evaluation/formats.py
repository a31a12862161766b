"""From a benchmark's official files to samples: names of the image, question and references.

Every reader checks what it needs before a model is loaded, and says what to do where something is missing.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..common.command import InputError
from ..common.images import inside
from ..common.json_lines import parse_json, split_lines
from .samples import Sample, right_option, texts
from .tasks import Task

LINES = (".jsonl", ".jsonlines")
SUFFIXES = (".json", *LINES)


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


def coco_number(image_id: object) -> str:
    """As it stands in the names of COCO's images."""
    if isinstance(image_id, bool) or not isinstance(image_id, int) or image_id < 0:
        raise ValueError(f"the image_id {image_id!r} is no number")
    return f"{image_id:012d}"


# --- Official files ---


def read_vqa(data: dict, annotations: dict | None) -> list[Sample]:
    """VQAv2 and OK-VQA: a file of questions and one of annotations, about COCO's images of 2014 and 2015."""
    subtype = data["data_subtype"]  # such as val2014 or test-dev2015
    split, year = re.fullmatch(r"(.+?)(\d*)", subtype).groups()
    folder = f"{'test' if split.startswith('test') else split}{year}"
    references = {}
    if annotations is not None:
        references = {entry["question_id"]: texts(entry["answers"]) for entry in annotations["annotations"]}
        matching({entry["question_id"] for entry in data["questions"]}, set(references), "questions", "annotations")
    return [
        Sample(
            entry["question_id"],
            folders(f"COCO_{folder}_{coco_number(entry['image_id'])}.jpg", folder),
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
    """Several entries may be about one image, each with a caption of its own and all references."""
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
    """About COCO's images of 2017."""
    return [
        Sample(
            entry["question_id"],
            folders(f"{coco_number(entry['image_id'])}.jpg", f"{entry['split']}2017"),
            question=entry["question"],
            options=tuple(entry["choices"]),
            references=right_option(entry["choices"], entry.get("correct_choice_idx")),
            split=entry["split"],
        )
        for entry in data
    ]


def read_gqa(data: dict) -> list[Sample]:
    """The balanced questions, which are what GQA's own evaluation counts."""
    for entry in data.values():
        if not isinstance(entry.get("isBalanced", True), bool):
            raise ValueError(f"isBalanced is {entry['isBalanced']!r}, neither true nor false")
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
        "DOCCI's: a line of JSON per image with `example_id`, `image_file`, `split` and `description`",
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
            return [parse_json(line) for line in split_lines(text) if line.strip()]
        return parse_json(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text; unpack it if it is an archive.") from error
    except ValueError as error:
        raise InputError(
            f"{path} is not whole JSON ({error}); download it again, or rename it to .jsonl if each line is an entry."
        ) from error


def file_samples(path: Path, task: Task, annotations: str | None, name: str | None = None) -> list[Sample]:
    """All samples of a benchmark's official file, in the format of the task or that of this name."""
    name = name or task.format
    form, data = FORMATS[name], load_json(path)
    if not form.fits(data):
        likely = [other for other, known in FORMATS.items() if known.fits(data)]
        hint = f" It looks like the format {likely[0]!r}: choose the --task that reads it." if likely else ""
        raise InputError(f"{path} is not in the format of --task {task.name}, which is {form.description}.{hint}")
    arguments = [data]
    if name == "vqa":
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
    """`samples` with the paths of their images in `folder`.

    Raises:
        InputError: if one is not there, or its name leads out of the folder.
    """
    paths, missing = {}, []
    for sample in samples:
        if sample.names not in paths:
            candidates = (inside(folder, name) for name in sample.names)
            paths[sample.names] = next((Path(path) for path in candidates if os.path.isfile(path)), None)
            if paths[sample.names] is None:
                missing.append(sample.names[0])
    if missing:
        raise InputError(
            f"{len(missing)} of {len(paths)} images are not in {folder}, {missing[0]} for example. Give the folder "
            "that holds them as --images."
        )
    return [replace(sample, image=paths[sample.names]) for sample in samples]
