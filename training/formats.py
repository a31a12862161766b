"""What a row of training data holds: several formats read as one."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import Field, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import NamedTuple, get_args

from ..common.command import InputError
from ..common.images import inside
from ..common.tables import FILES, IMAGE_SOURCES, as_list, encoded, folders_of
from ..image_opening_pheye import WEB, is_inside

JSON_SUFFIXES = (".json", ".jsonl")
TURNS_COLUMNS = ("conversations", "messages", "texts")
IMAGE_COLUMNS = ("image", "images")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


MARK = "<image>"  # says in a question where an image stands
PART_SOURCES = ("image", "path", "url", "base64", "image_url")  # of an image in a chat message
WORDS = {str: "a text", bool: "true or false", int: "an integer", float: "a number"}


@dataclass(frozen=True)
class Source:
    """One data set of a mixture.

    Args:
        path: a JSON or JSONL file; a folder that `save_to_disk` wrote; or what `load_dataset` takes: a folder, a table
            file, a Hub id.
        image_folder: where relative image paths begin; for JSON, by default, the file's own folder.
        image_sources: where the images' names may lead, for others may have written them: to files of the image folder
            ("folder"), to all files ("local"), or to URLs as well ("any"). A mixture file cannot say it.
        subset, split: of a data set; the split is "train" by default, where there are splits.
        streaming: read it while training, and do not download it first.
        image_column, question_column, answers_column: of a data set with other names.
        prompt: appended to every question that does not end with it.
        caption: whether one of ten instructions, drawn at random, takes the question's place.
        turns: how many turns of a row are shown at a time, drawn at random; None for all.
        samples: how many samples an epoch draws. By default, it draws every row once.
        weight: how often an epoch draws every row, in the place of `samples`.
        most: how many samples an epoch draws at most, unless `samples` is given.

    A stream has no size: the first that is given of `samples`, `most` and `weight` is its share of the mixture.

    Raises:
        InputError: if a field has a wrong kind or value, or two of them exclude each other.
    """

    path: str
    name: str = ""
    image_folder: str | None = None
    image_sources: str = "folder"
    subset: str | None = None
    split: str | None = None
    streaming: bool = False
    image_column: str | None = None
    question_column: str | None = None
    answers_column: str | None = None
    prompt: str = ""
    caption: bool = False
    turns: int | None = 1
    samples: int | None = None
    most: int | None = None
    weight: float | None = None

    def __post_init__(self):
        for option in fields(self):
            self._check_type(option)
        if not self.name:
            path = Path(self.path)
            parts = [path.stem if is_json(self.path) or path.suffix in FILES else path.name, self.subset]
            object.__setattr__(self, "name", "-".join(part for part in parts if part))
        if self.image_sources not in IMAGE_SOURCES:
            raise InputError(f"image_sources is {self.image_sources!r}; choose from {', '.join(IMAGE_SOURCES)}.")
        if self.samples is not None and self.weight is not None:
            raise InputError(f"{self.name} has samples={self.samples} and weight={self.weight}; give one of them.")
        for field in ("turns", "samples", "most"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise InputError(f"{self.name} has {field}={value!r}; it must be an integer of at least 1.")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise InputError(f"{self.name} has weight={self.weight!r}; it must be greater than 0, and finite.")
        if self.question_column and not self.answers_column:
            raise InputError(f"{self.name} has a question_column but no answers_column; name both.")

    def _check_type(self, option: Field):
        """Refuse a value of another kind, which would be read otherwise than it was written: "no" is not false."""
        value, kinds = getattr(self, option.name), get_args(option.type) or (option.type,)
        if float in kinds:
            kinds += (int,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            known = " or ".join(WORDS[kind] for kind in kinds if kind is not NoneType)
            raise InputError(f"{self.name or self.path} has {option.name}={value!r}; it must be {known}.")


class Row(NamedTuple):
    """A row of any format: each turn is a question and the answers to it that one may be drawn from; `error` says why
    it cannot be used, and then it has no images. Of several images, each has its mark in a question."""

    id: str
    images: list[str | bytes]
    system: str | None
    turns: list[tuple[str, list[str]]]
    error: str | None = None


def is_json(path: str) -> bool:
    return Path(path).suffix.lower() in JSON_SUFFIXES


# --- What a row holds ---


class TurnsOf:
    """Finds the turns in a row: the one place that knows the formats."""

    def __init__(self, columns: list[str], source: Source):
        self.columns, self.source = columns, source

    def __call__(self, row: dict, mark: str = "") -> tuple[str | None, list[tuple[str, list[str]]]]:
        """The system message, if there is one, and the turns; `mark` stands for parts that are images."""
        cells = [as_list(row.get(column)) for column in self.columns]
        match self.columns[0]:
            case _ if self.source.answers_column:
                return None, answered_turns(*([None, *cells] if len(cells) == 1 else cells))
            case "conversations":
                return paired([(part["from"], part["value"]) for part in cells[0]])
            case "messages":
                return paired([(part["role"], text_of(part["content"], mark)) for part in cells[0]])
            case "texts":
                return None, [(part["user"], [part["assistant"]]) for part in cells[0]]


def find_turns(columns: list[str], source: Source) -> TurnsOf:
    """The reader of rows with these columns."""
    if source.answers_column:
        wanted = [("question_column", source.question_column), ("answers_column", source.answers_column)]
        wanted = [(option, column) for option, column in wanted if column]
        for option, column in wanted:
            if column not in columns:
                raise InputError(unknown_column(option, column, columns, source))
        return TurnsOf([column for _, column in wanted], source)
    for column in TURNS_COLUMNS:
        if column in columns:
            return TurnsOf([column], source)
    raise InputError(
        f"{source.path} ({source.name}) has rows of {', '.join(columns) or 'nothing'}, but none of "
        f"{', '.join(TURNS_COLUMNS)}. Give the names of its columns with --image_column, --question_column and "
        "--answers_column, or bring it into LLaVA's format (docs/training.md)."
    )


def find_image_column(columns: list[str], source: Source) -> str:
    if source.image_column and source.image_column not in columns:
        raise InputError(unknown_column("image_column", source.image_column, columns, source))
    for column in (source.image_column,) if source.image_column else IMAGE_COLUMNS:
        if column in columns:
            return column
    raise InputError(
        f"{source.path} ({source.name}) has neither a column `image` nor `images`, but {', '.join(columns)}; name the "
        "one that holds the images with --image_column. Rows of text alone need a column `images` of empty lists."
    )


def unknown_column(option: str, column: str, columns: list[str], source: Source) -> str:
    return (
        f"{source.path} ({source.name}) has no column {column!r}, but {', '.join(columns)}; choose from these with "
        f"--{option}, or with {option!r} in a mixture file."
    )


def text_of(content: str | list[dict], mark: str = "") -> str:
    """The text of a message: a string, or the text parts of a list."""
    return "".join(text_of_part(part, mark) for part in content) if isinstance(content, list) else content


def text_of_part(part: dict, mark: str = "") -> str:
    """The text of a part of a message; `mark` if it only marks the place of an image of the row.

    Raises:
        ValueError: if it is anything else, which would be left out.
    """
    text, others = part.get("text"), [part.get(name) for name in PART_SOURCES]
    if part.get("type") == "text" and isinstance(text, str):
        return text
    if part.get("type") == "image" and not text and others == [None] * len(others):
        return mark
    raise ValueError(
        f"a message has the part {str(part)[:200]}, which is neither a text nor {{'type': 'image'}}, which stands for "
        "an image of the row"
    )


def paired(messages: list[tuple[str, str]]) -> tuple[str | None, list[tuple[str, list[str]]]]:
    """Messages (role, text) as a system message and turns."""
    roles = [ROLES.get(role, role) for role, _ in messages]
    system = messages[0][1] if roles[:1] == ["system"] else None
    start = int(system is not None)
    questions, answers = messages[start::2], messages[start + 1 :: 2]
    if len(answers) == 0 or roles[start:] != ["user", "assistant"] * len(answers):
        raise ValueError(f"its roles are {', '.join(map(str, roles)) or 'none'}; a question and its answer take turns")
    return system, [(question, [answer]) for (_, question), (_, answer) in zip(questions, answers, strict=True)]


def answered_turns(question, answers) -> list[tuple[str, list[str]]]:
    """Turns of a row with a question and people's answers, of which the most frequent is taken; with lists of as many
    questions as answers; or, without a question, with captions, of which any may be drawn."""
    if isinstance(answers, list):
        answers = [answer["answer"] if isinstance(answer, dict) else answer for answer in answers]
    if isinstance(question, list):
        if not isinstance(answers, list) or len(answers) != len(question):
            raise ValueError("it has a list of questions, but not as many answers")
        return [(one, [other]) for one, other in zip(question, answers, strict=True)]
    answers = answers if isinstance(answers, list) else [answers]
    if question is None:
        return [("", answers)]
    return [(question, [most_frequent(answers)])]


def most_frequent(answers: list[str]) -> str | None:
    """The most frequent of `answers`, the first of those that tie."""
    return Counter(answers).most_common(1)[0][0] if answers else None


def read_row(row: dict, number: int | str, turns_of: TurnsOf, source: Source, max_images: int = 1) -> Row:
    """A row of any format.

    Raises:
        InputError: as `read_turns`.
    """
    images, error = images_of(row, source)
    count = len(images) if error is None else 1
    row_id, system, turns = read_turns(row, number, turns_of, source, count)
    error = error or misfit(count, system, turns, max_images)
    if error is not None:
        turns = [(without_marks(question), answers) for question, answers in turns]
    elif count > 1:
        turns = with_all_marks(turns, count)
    return Row(row_id, [] if error else images, system, turns, error)


def misfit(images: int, system: str | None, turns: list[tuple[str, list[str]]], max_images: int) -> str | None:
    """Why a row with so many images cannot be used, if it cannot; its questions have their marks."""
    if images > max_images:
        return f"It has {images} images, and the model takes {max_images} (max_images)."
    marks = sum(question.count(MARK) for question, _ in turns)
    if images == 0:
        texts = [system or "", *(text for question, answers in turns for text in (question, *answers))]
        return "It speaks of an image, but has none." if any(MARK in text for text in texts) else None
    if images > 1 and marks not in (0, images):
        return f"Its questions have {marks} marks of an image ({MARK}), but it has {images} images."
    return None


def with_all_marks(turns: list[tuple[str, list[str]]], images: int) -> list[tuple[str, list[str]]]:
    """The turns with a mark for each of several images: without any, all are in front of the first question."""
    if any(MARK in question for question, _ in turns):
        return turns
    question, answers = turns[0]
    return [(MARK * images + question, answers), *turns[1:]]


def read_turns(
    row: dict, number: int | str, turns_of: TurnsOf, source: Source, images: int = 1
) -> tuple[str, str | None, list[tuple[str, list[str]]]]:
    """The id of a row of any format, its system message and its turns. Questions keep the marks of images unless the
    row has one image, which needs none.

    Raises:
        InputError: if it has no answer, or is not as its format says; the message names it.
    """
    row_id = str(number if row.get("id") is None else row["id"])
    try:
        try:
            system, turns = turns_of(row, "" if images == 1 else MARK)
        except (AttributeError, KeyError, TypeError) as error:
            cell = json.dumps({column: row.get(column) for column in turns_of.columns}, default=str)
            raise ValueError(f"it does not have the form that docs/training.md gives, but is {cell[:300]}") from error
        read = without_marks if images == 1 else with_marks
        turns = [(read(question), [check_answer(answer) for answer in answers]) for question, answers in turns]
        if not turns or not all(answers for _, answers in turns):
            raise ValueError("it has no answer")
        if not source.caption and not source.prompt and not all(without_marks(question) for question, _ in turns):
            raise ValueError("it has an empty question; `prompt` or `caption` can stand in its place")
    except ValueError as error:
        raise InputError(f"Sample {row_id!r} of {source.name} cannot be used: {error}.") from error
    return row_id, system, turns


def check_answer(answer: str) -> str:
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(
            f"it has the answer {answer!r}, which gives nothing to learn; correct it or leave the row out"
        )
    return check_text(answer.strip())


def check_text(text: str) -> str:
    """Refuse half a character, as JSON may hold it, of which a tokenizer makes nothing."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it has the text {text[:200]!r}, which holds a half of a character") from error
    return text


def without_marks(question: str) -> str:
    """A question without the marks that say where other models put the image."""
    return re.sub(r"<image>\n|\n<image>|<image>", "", with_marks(question)).strip()


def with_marks(question: str) -> str:
    if not isinstance(question, str):
        raise ValueError(f"it has the question {question!r}, which is no text")
    return check_text(question.strip())


def image_columns(source: Source) -> tuple[str, ...]:
    return (source.image_column,) if source.image_column else IMAGE_COLUMNS


def named_images(row: dict, source: Source) -> list[str | bytes | None]:
    """What a row names as its images; None stands for one that is null, or no image. A row without images lacks the
    field, or has an empty list in it."""
    cells = [row[column] for column in image_columns(source) if column in row]
    cell = next((cell for cell in cells if cell), cells[0] if cells else [])
    try:
        cell = as_list(cell)
        return [encoded(image) or None for image in (cell if isinstance(cell, list) else [cell])]
    except ValueError:  # a list of several in the list, or lists that do not fit each other
        return [None]


def images_of(row: dict, source: Source) -> tuple[list[str | bytes], str | None]:
    """The paths, URLs or encoded bytes of the images of a row, if they may be opened; and if one may not, why."""
    found = [image_of(image, source) for image in named_images(row, source)]
    error = next((error for _, error in found if error is not None), None)
    return ([] if error else [image for image, _ in found]), error


def image_of(image: str | bytes | None, source: Source) -> tuple[str | bytes | None, str | None]:
    """The path, URL or encoded bytes of an image that a row names, if it may be opened; and if it may not, why."""
    if image is None:
        return None, "It names an image that is null; a row of text alone has no such field, or an empty list."
    if not isinstance(image, (str, bytes)):
        return None, f"{str(image)[:200]!r} is neither the name of an image nor its bytes."
    if not isinstance(image, str) or image[:5].lower() == "data:":
        return image, None
    if image[:8].lower().startswith(WEB):
        if source.image_sources != "any":
            return None, f"{image[:200]!r} is a URL; --image_sources any fetches images."
        return image, None
    folder, others = source.image_folder, ()
    if folder is None and is_json(source.path):
        folder = os.path.dirname(source.path)
    elif folder is None:
        folder, others = "", folders_of([source.path])
    path = os.path.join(folder, image)
    if source.image_sources == "folder":
        try:
            inside(folder, image)
        except InputError as error:
            if not lies_in(others, path):
                return None, f"{error} Or let names lead anywhere by --image_sources local."
    return path, None


def lies_in(folders: Iterable[str], path: str) -> bool:
    try:
        return any(is_inside(folder, path) for folder in folders)
    except (OSError, ValueError):  # it is no path
        return False
