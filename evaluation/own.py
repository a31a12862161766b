"""Data of one's own: what training reads is asked here as it was learnt, one turn after another, each by itself.

LLaVA's files and columns of conversations are read by training's reader, so that a row means the same to both, with
one image, several or none. A turn is asked about the images up to it, as training shows it.
"""

import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from ..common.command import InputError
from ..common.tables import ImageColumn
from ..training.formats import (
    IMAGE_COLUMNS,
    TURNS_COLUMNS,
    Source,
    find_turns,
    misfit,
    read_turns,
    with_all_marks,
    with_marks,
    without_marks,
)
from ..training.mixture import replace_marks, with_carried_marks
from ..training.rows import ELSEWHERE, JsonRows, lengths_of, scan_json
from .formats import FORMATS, file_samples, load_json
from .samples import Sample
from .tasks import Task

LLAVA = (
    "LLaVA's: a list of objects, or a line of JSON each, with `image` and `conversations`, as training takes them "
    "(docs/training.md)"
)


def own_file_samples(
    path: Path,
    task: Task,
    *,
    images: str | None,
    annotations: str | None,
    image_column: str | None,
    image_sources: str | None,
) -> list[Sample]:
    """The turns of a file of training data, or the samples of any benchmark's official file.

    images: where relative names begin, by default the file's own folder; annotations: for VQA's files; image_column:
    the field of training data's images.
    """
    if has_turns(path):
        if annotations is not None:
            raise InputError(f"{path} holds its answers: leave --annotations out.")
        return json_samples(path, task, images, image_column, image_sources)
    data = load_json(path)
    for name, value in (("image_column", image_column), ("image_sources", image_sources)):
        if value is not None:
            raise InputError(
                f"{path} names its images as its benchmark does, in the folder of --images: leave --{name} out."
            )
    for form, known in FORMATS.items():
        if known.fits(data):
            return file_samples(path, task, annotations, form)
    raise InputError(
        f"{path} is not in the format of --task {task.name}, which is {LLAVA}; nor in that of any other task."
    )


def has_turns(path: Path) -> bool:
    """Whether the first row is one of training's data."""
    try:
        _, _, row = next(scan_json(path), (0, 0, {}))
    except InputError:
        return False  # which is said when the file is read as another format
    return any(column in row for column in TURNS_COLUMNS)


def source_of(path: str, task: Task, **fields) -> Source:
    """As training describes data; an empty question is allowed where the prompt has no place for it."""
    given = {name: value for name, value in fields.items() if value is not None}
    return Source(path, turns=None, caption=not task.asks, **given)


def json_samples(
    path: Path, task: Task, images: str | None, image_column: str | None, image_sources: str | None
) -> list[Sample]:
    source = source_of(str(path), task, image_folder=images, image_column=image_column, image_sources=image_sources)
    rows = JsonRows(source, max_images=sys.maxsize)  # how many the model takes is known when it is loaded
    opened = []
    for row in (rows[index] for index in range(len(rows))):
        if row.error is not None:
            raise InputError(f"Sample {row.id!r} of {path}: {row.error}")
        found = [image if is_elsewhere(image) else Path(image) for image in row.images]
        opened.append((row.id, found, row.system, row.turns))
    named = [image for _, found, _, _ in opened for image in found]
    missing = [image for image in named if isinstance(image, Path) and not image.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(named)} images are not there, {missing[0]} for example. Give the folder in "
            "which their names begin as --images."
        )
    return turn_samples(opened, split=path.stem)


def is_elsewhere(image: str | bytes) -> bool:
    """Whether it is no file."""
    return not isinstance(image, str) or image.lower().startswith(ELSEWHERE)


def table_samples(
    table,
    task: Task,
    source: str,
    split: str | None,
    *,
    image_column: str | None,
    id_column: str | None,
    image_sources: str | None,
) -> list[Sample]:
    """Of a data set with a column of conversations."""
    described = source_of(source, task, image_sources=image_sources)
    turns_of = find_turns(table.column_names, described)
    image_column = image_column or usual_image_column(table.column_names)
    for kind, name in (("image", image_column), ("id", id_column)):
        if name is not None and name not in table.column_names:
            raise InputError(
                f"{source} has no column {name!r}; its columns are {', '.join(table.column_names)}. Name the one of "
                f"the {kind} by --{kind}_column."
            )
    id_column = id_column or "id"
    images = images_in(ImageColumn(table, image_column, source, image_sources, several=True), image_column)
    texts = table.select_columns([*turns_of.columns, *({id_column} & set(table.column_names))])
    opened = []
    for number, row in enumerate(texts):
        found = images[number]
        row_id, system, turns = read_turns({**row, "id": row.get(id_column)}, number, turns_of, described, len(found))
        opened.append((row_id, *fitted(found, system, turns)))
    return turn_samples(opened, split)


def question_about(question: str, images: list) -> tuple[str, list]:
    """A question of a column of questions, and its images, as training shows them."""
    read = without_marks if len(images) == 1 else with_marks
    images, _, turns = fitted(images, None, [(read(question), [])])
    return shown(images, turns, 0)


def fitted(images: list, system: str | None, turns: list) -> tuple[list, str | None, list]:
    """Images, system message and turns of a row, with a mark for each of several images. Where those that the row has
    do not fit its images, opening them says so."""
    if (flaw := misfit(len(images), system, turns, len(images))) is not None:
        return [functools.partial(fail, flaw)], system, turns
    return images, system, with_all_marks(turns, len(images)) if len(images) > 1 else turns


def usual_image_column(columns: list[str]) -> str:
    return next((column for column in IMAGE_COLUMNS if column in columns), IMAGE_COLUMNS[0])


def images_in(column: ImageColumn, name: str) -> list[list[Callable]]:
    """Functions that give the images of each row."""
    lengths = lengths_of(column.images, name)
    if lengths is None:
        return [[functools.partial(column.__getitem__, row)] for row in range(len(column.images))]
    return [
        [functools.partial(column.one_of, row, place) for place in range(length)] for row, length in enumerate(lengths)
    ]


def fail(flaw: str):
    raise ValueError(flaw)


def turn_samples(
    rows: Iterable[tuple[str, list[str | bytes | Path | Callable], str | None, list]], split: str | None
) -> list[Sample]:
    """A sample per turn of rows (id, images, system message, turns). Ids that are not unique give way to numbers."""
    rows = list(rows)

    def ids_by(names: Iterable) -> list[str]:
        counts = [len(turns) for *_, turns in rows]
        named = zip(names, counts, strict=True)
        return [f"{name}-{number}" if count > 1 else name for name, count in named for number in range(count)]

    ids = ids_by(row_id for row_id, *_ in rows)
    if len({*ids}) < len(ids):
        ids = ids_by(map(str, range(len(rows))))
    samples = []
    for _, images, system, turns in rows:
        for number, (_, answers) in enumerate(turns):
            question, own = shown(images, turns, number)
            image = own[0] if len(own) == 1 else own
            asked = {"image": image, "question": question, "references": tuple(answers), "system": system}
            samples.append(Sample(ids[len(samples)], split=split, **asked))
    return samples


def shown(images: list, turns: list[tuple[str, list[str]]], number: int) -> tuple[str, list]:
    """The question of a turn and the images up to it, numbered if there are several, as training shows them."""
    question, _ = turns[number]
    if len(images) < 2:
        return question, images
    [(question, _)] = with_carried_marks(turns, [number])
    message = {"content": question, "role": "user"}
    count = replace_marks([message])
    return message["content"], images[:count]
