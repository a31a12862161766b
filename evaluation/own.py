"""Data of one's own: what training reads is asked here as it was learnt, one turn after another, each by itself.

LLaVA's files and columns of conversations are read by training's reader, so that a row means the same to both. Rows
without an image, or with several, are left out.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from ..common.command import InputError
from ..common.tables import ImageColumn
from ..training.formats import TURNS_COLUMNS, Source, find_turns, read_turns
from ..training.rows import ELSEWHERE, JsonRows, say, scan_json
from .formats import FORMATS, file_samples, load_json
from .samples import Sample
from .tasks import Task

LLAVA = (
    "LLaVA's: a list of objects, or a line of JSON each, with `image` and `conversations`, as training takes them "
    "(docs/training.md)"
)


def own_file_samples(
    path: Path, task: Task, *, images: str | None, annotations: str | None, image_sources: str | None
) -> list[Sample]:
    """The turns of a file of training data, or the samples of any benchmark's official file.

    images: where relative names begin, by default the file's own folder; annotations: for VQA's files.
    """
    if has_turns(path):
        if annotations is not None:
            raise InputError(f"{path} holds its answers: leave --annotations out.")
        return json_samples(path, task, images, image_sources)
    data = load_json(path)
    if image_sources is not None:
        raise InputError(f"The images of {path} are in the folder of --images: leave --image_sources out.")
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


def json_samples(path: Path, task: Task, images: str | None, image_sources: str | None) -> list[Sample]:
    rows = JsonRows(source_of(str(path), task, image_folder=images, image_sources=image_sources))
    opened = []
    for row in (rows[index] for index in range(len(rows))):
        if row.error is not None:
            raise InputError(f"Sample {row.id!r} of {path}: {row.error}")
        if not row.images:
            continue
        [image] = row.images
        elsewhere = not isinstance(image, str) or image.lower().startswith(ELSEWHERE)
        opened.append((row.id, image if elsewhere else Path(image), row.system, row.turns))
    if not opened:
        raise InputError(f"None of the {len(rows)} rows of {path} has an image, and each question is asked about one.")
    if len(opened) < len(rows):
        say(f"{len(rows) - len(opened)} of {len(rows)} rows of {path} have no image and are left out.")
    missing = [image for _, image, _, _ in opened if isinstance(image, Path) and not image.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(opened)} images are not there, {missing[0]} for example. Give the folder in "
            "which their names begin as --images."
        )
    return turn_samples(opened, split=path.stem)


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
    image_column, id_column = image_column or "image", id_column or "id"
    if image_column not in table.column_names:
        raise InputError(
            f"{source} has no column {image_column!r}; its columns are {', '.join(table.column_names)}. Name the one "
            "of the image by --image_column."
        )
    images = ImageColumn(table, image_column, source, image_sources)
    texts = table.select_columns([*turns_of.columns, *({id_column} & set(table.column_names))])
    opened = []
    for number, row in enumerate(texts):
        row_id, system, turns = read_turns({**row, "id": row.get(id_column)}, number, turns_of, described)
        opened.append((row_id, functools.partial(images.__getitem__, number), system, turns))
    return turn_samples(opened, split)


def turn_samples(
    rows: Iterable[tuple[str, str | bytes | Path | Callable, str | None, list]], split: str | None
) -> list[Sample]:
    """A sample per turn of rows (id, image, system message, turns). Ids that are not unique give way to numbers."""
    rows = list(rows)
    if max(Counter(row_id for row_id, *_ in rows).values(), default=0) > 1:
        rows = [(str(number), *rest) for number, (_, *rest) in enumerate(rows)]
    return [
        Sample(
            row_id if len(turns) == 1 else f"{row_id}-{number}",
            image=image,
            question=question,
            references=tuple(answers),
            split=split,
            system=system,
        )
        for row_id, image, system, turns in rows
        for number, (question, answers) in enumerate(turns)
    ]
