"""Rows of training data from the disk: JSON read once from end to end, and tables of `datasets`."""

import codecs
import functools
import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..common.command import InputError, require
from ..common.files import fingerprint
from ..common.tables import FILES, IMAGES_CHECKED, load_table, undecoded
from ..image_opening_pheye import WEB
from .formats import (
    MARK,
    Row,
    Source,
    TurnsOf,
    find_image_column,
    find_turns,
    image_columns,
    is_json,
    misfit,
    named_images,
    read_row,
    read_turns,
)

CHUNK_BYTES = 2**22  # read at a time
LONGEST_ROW_BYTES = 2**28  # a row that is not whole by then is broken
ELSEWHERE = (*WEB, "data:")  # how the name of an image begins that is no file
TABLES = (*FILES, ".json", ".jsonl", ".txt")  # files of which what they hold is part of a data set's fingerprint


# --- JSON and JSONL: read once from end to end, and then row by row from the disk ---


def scan_json(path: str | Path) -> Iterator[tuple[int, int, dict]]:
    """Where each object of a JSON array, or of lines of JSON, begins and ends (in bytes), and the object, misread
    outside of ASCII: bytes are taken for characters, so that places in the text are places in the file.

    The file is never in memory as a whole, because as Python objects a million rows take several gigabytes.

    Raises:
        InputError: if the file holds anything else, or is not whole.
    """
    decoder, separators = json.JSONDecoder(), re.compile(r"[\s,]*")
    with open(path, "rb") as file:
        head = re.match(rb"(?:%s)?\s*(\[?)" % codecs.BOM_UTF8, file.read(CHUNK_BYTES))
        is_array, place = bool(head[1]), head.end()
        file.seek(place)
        text, position, more = "", 0, b"more"
        while more:
            more = file.read(max(CHUNK_BYTES, len(text) - position))  # twice as much for a row that did not fit
            text, place, position = text[position:] + more.decode("latin-1"), place + position, 0
            while True:
                start = separators.match(text, position).end()
                if start == len(text) or (is_array and text[start] == "]"):
                    break
                try:
                    value, end = decoder.raw_decode(text, start)
                except json.JSONDecodeError as error:
                    if more and len(text) < LONGEST_ROW_BYTES:
                        break
                    raise InputError(f"{path} is no whole JSON: at byte {place + error.pos}, {error.msg}.") from error
                except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
                    raise InputError(f"{path} cannot be read in the row at byte {place + start}: {error}.") from error
                if not isinstance(value, dict):
                    raise InputError(f"{path} holds {json.dumps(value)[:60]} where a row in braces is needed.")
                yield place + start, place + end, value
                position = end
    if is_array and text[position:].strip(" \t\r\n,") != "]":
        raise InputError(f"{path} is no whole JSON: it does not end where its list ends.")


class JsonRows:
    """The rows of a JSON or JSONL file that a model may be trained on, with at most `max_images` images; memory holds
    their places in the file only."""

    def __init__(self, source: Source, max_images: int = 1):
        self.path, places, left_out = source.path, array("q"), Counter()
        check = self.read = None
        has_images = False
        for number, (start, end, row) in enumerate(scan_json(source.path)):
            if check is None:
                known = {"turns_of": find_turns(list(row), source), "source": source, "max_images": max_images}
                check, self.read = functools.partial(flaw_of, **known), functools.partial(read_row, **known)
            has_images |= any(column in row for column in image_columns(source))
            try:
                flaw = check(row, number)
            except InputError:
                check(self.row_at(start, end), number)  # once more for the message, with its characters right
                raise
            if flaw is None:
                places.extend((start, end, number))
            else:
                left_out[flaw] += 1
        self.places = np.array(places, dtype=np.int64).reshape(-1, 3)
        count = len(self) + left_out.total()
        if count and not has_images:
            field = source.image_column or "image"
            raise InputError(
                f"None of the {count} rows of {source.path} has an image (field {field!r}). Name the field by "
                '--image_column; if all rows are text alone, give one of them "images": [].'
            )
        report_left_out(source, left_out, count)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        start, end, number = self.places[index].tolist()
        return self.read(self.row_at(start, end), number)

    def row_at(self, start: int, end: int) -> dict:
        with open(self.path, "rb") as file:
            file.seek(start)
            text = file.read(end - start)
        try:
            return json.loads(text)
        except UnicodeDecodeError as error:  # only now, because the scan takes bytes for characters
            raise InputError(
                f"{self.path} is no UTF-8 in the row at byte {start}: {error}. Save it as UTF-8."
            ) from error


def flaw_of(row: dict, number: int, turns_of: TurnsOf, source: Source, max_images: int) -> str | None:
    """Why a row is left out, in words that follow "rows"; None if it is not.

    Raises:
        InputError: as `read_turns`.
    """
    images = named_images(row, source)
    if None in images:
        return "whose image is null"
    if len(images) > max_images:
        return too_many(max_images)
    _, system, turns = read_turns(row, number, turns_of, source, len(images))
    if misfit(len(images), system, turns, max_images) is not None:
        return f"whose marks of images ({MARK}) are not as many as their images"


def too_many(max_images: int) -> str:
    return f"with more images than the model takes (max_images={max_images})"


def report_left_out(source: Source, left_out: Counter, count: int):
    """Say how many of `count` rows are left out, and why; refuse a source that loses all."""
    reasons = "; ".join(f"{number} {flaw}" for flaw, number in left_out.items())
    if left_out and left_out.total() == count:
        raise InputError(f"None of the {count} rows of {source.path} can be used: {reasons}.")
    if left_out:
        say(f"{source.name}: {left_out.total()} of {count} rows left out: {reasons}.")


def say(line: str):
    """Print `line`, once for all processes of a launch."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


# --- `datasets` ---


class TableRows:
    """The rows of a data set of `datasets` with at most `max_images` images; images stay encoded, so that a broken one
    is found when it is drawn."""

    def __init__(self, source: Source, max_images: int = 1):
        self.table, turns_of = open_table(source)
        self.read = functools.partial(read_row, turns_of=turns_of, source=source, max_images=max_images)
        lengths = lengths_of(self.table, find_image_column(columns_of(self.table), source))
        self.numbers = np.arange(len(self.table)) if lengths is None else np.flatnonzero(lengths <= max_images)
        if left_out := len(self.table) - len(self.numbers):
            report_left_out(source, Counter({too_many(max_images): left_out}), len(self.table))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Row:
        number = int(self.numbers[index])
        return self.read(self.table[number], number)


def lengths_of(table, column: str) -> np.ndarray | None:
    """How many entries each row of a column of lists has, without reading them; None if it is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = [np.zeros(0, int)]
    for part in table.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        cells = part.column(0)
        if not pa.types.is_list(cells.type) and not pa.types.is_large_list(cells.type):
            return None
        lengths.append(pc.fill_null(pc.list_value_length(cells), 0).to_numpy())
    return np.concatenate(lengths)


def open_table(source: Source):
    """The columns that matter of a source, not decoded, and the function that finds the turns in a row of them."""
    require("datasets", "train")
    try:
        table = load_table(source.path, config=source.subset, split=source.split, streaming=source.streaming)
    except InputError as error:
        raise InputError(f"Data set {source.name!r}: {error} See docs/training.md for what can be given.") from error
    names = columns_of(table)
    turns_of = find_turns(names, source)
    image_column = find_image_column(names, source)
    needed = [image_column, *turns_of.columns, *({"id"} & set(names))]
    return undecoded(table.select_columns(list(dict.fromkeys(needed))), image_column, source.path), turns_of


def columns_of(table) -> list[str]:
    """The names of the columns, which some streams know from their first row only."""
    return table.column_names or list(next(iter(table), {}))


# --- Of either kind ---


def fingerprint_of(source: Source) -> str:
    """Changes if the files of a source do, or its commit on the Hub. Of images that are files, only names and sizes
    are looked at, and of those that a JSON file names, nothing."""
    path = Path(source.path)
    if path.is_file():
        return fingerprint(path)
    if not path.is_dir():
        is_file = is_json(source.path) or path.suffix.lower() in TABLES
        return "" if is_file else commit_of(source)  # that there is no such file is said when it is read
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith((".", "cache-"))]
    digest = hashlib.sha256("".join(f"{file.relative_to(path)} {file.stat().st_size}\n" for file in files).encode())
    digest.update(fingerprint(*(file for file in files if file.suffix.lower() in TABLES)).encode())
    return digest.hexdigest()


def commit_of(source: Source) -> str:
    """The commit of a data set on the Hub."""
    datasets = require("datasets", "train")
    try:
        return str(datasets.load_dataset_builder(source.path, source.subset).hash)
    except Exception as error:  # of many kinds, for a mistyped name
        raise InputError(f"Data set {source.name!r} is neither here nor on the Hub: {error}") from error


def open_rows(source: Source, max_images: int = 1) -> JsonRows | TableRows:
    """The rows of a source that is not streamed, but for those with more than `max_images` images.

    Raises:
        InputError: if there are none, or their images cannot be found; the message says what to change.
    """
    if source.streaming:
        raise InputError(f"{source.name} is streamed, so every data set must be, and none may be a JSON file.")
    if is_json(source.path):
        if not os.path.isfile(source.path):
            raise InputError(f"There is no file {os.path.abspath(source.path)} ({source.name}).")
        for field in ("subset", "split"):
            if (value := getattr(source, field)) is not None:
                raise InputError(f"{source.name} is a JSON file, which has no {field} {value!r}; leave it out.")
        rows = JsonRows(source, max_images)
    else:
        rows = TableRows(source, max_images)
    if len(rows) == 0:
        raise InputError(f"{source.path} ({source.name}) is empty; give a data set with at least one row.")
    check_first(rows, source)
    return rows


def check_first(rows: JsonRows | TableRows, source: Source):
    """Refuse a source of whose first images none may be opened, or none exists; name those that will be skipped, and
    say if of conversations only a part is drawn."""
    first = [rows[index] for index in range(min(IMAGES_CHECKED, len(rows)))]
    longest = max(len(row.turns) for row in first)
    if source.turns is not None and source.turns < longest:
        of = f"up to {longest} turns, of which {source.turns} {'is' if source.turns == 1 else 'are'} drawn at a time"
        say(f"{source.name}: its conversations have {of}; --all_turns learns all of them.")
    errors = [row.error for row in first if row.error]
    if len(errors) == len(first):
        raise InputError(f"None of the first {len(first)} images of {source.name} may be opened: {errors[0]}")
    if errors:
        say(f"{source.name}: {len(errors)} of its first {len(first)} images will be skipped: {errors[0]}")
    images = [image for row in first for image in row.images]
    paths = [image for image in images if isinstance(image, str) and not image.lower().startswith(ELSEWHERE)]
    if paths and not errors and len(paths) == len(images) and not any(map(os.path.isfile, paths)):
        raise InputError(
            f"None of the first {len(paths)} images of {source.name} exists; the first is looked for at "
            f"{os.path.abspath(paths[0])}. Give the folder in which their paths begin with --image_folder, or as "
            "`image_folder` in a mixture file."
        )
