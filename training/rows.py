"""Rows of training data from the disk: JSON read once from end to end, and tables of `datasets`."""

import codecs
import functools
import json
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .formats import REMOTE, TABLES, Row, Source, find_image_column, find_turns, image_of, is_json, read_row

IMAGES_CHECKED = 100  # of a data set, before the first step
CHUNK = 2**22
LONGEST_ROW = 2**28


def require_datasets():
    """The package `datasets`, imported.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise ValueError('This data needs datasets: run pip install "pheye[train]".') from error
    return datasets


# --- JSON and JSONL: read once from end to end, and then row by row from the disk ---


def scan_json(path: str | Path) -> Iterator[tuple[int, int, dict]]:
    """Where each object of a JSON array, or of lines of JSON, begins and ends (in bytes), and the object, misread
    outside of ASCII: bytes are taken for characters, so that places in the text are places in the file.

    The file is never in memory as a whole, because as Python objects a million rows take several gigabytes.

    Raises:
        ValueError: if the file holds anything else, or is not whole.
    """
    decoder, separators = json.JSONDecoder(), re.compile(r"[\s,]*")
    with open(path, "rb") as file:
        head = re.match(rb"(?:%s)?\s*(\[?)" % codecs.BOM_UTF8, file.read(CHUNK))
        is_array, place = bool(head[1]), head.end()
        file.seek(place)
        text, position, more = "", 0, b"more"
        while more:
            more = file.read(max(CHUNK, len(text) - position))  # twice as much for a row that did not fit
            text, place, position = text[position:] + more.decode("latin-1"), place + position, 0
            while True:
                start = separators.match(text, position).end()
                if start == len(text) or (is_array and text[start] == "]"):
                    break
                try:
                    value, end = decoder.raw_decode(text, start)
                except json.JSONDecodeError as error:
                    if more and len(text) < LONGEST_ROW:
                        break
                    raise ValueError(f"{path} is no whole JSON: at byte {place + error.pos}, {error.msg}.") from error
                if not isinstance(value, dict):
                    raise ValueError(f"{path} holds {json.dumps(value)[:60]} where a row in braces is needed.")
                yield place + start, place + end, value
                position = end
    if is_array and text[position:].strip(" \t\r\n,") != "]":
        raise ValueError(f"{path} is no whole JSON: it does not end where its list ends.")


class JsonRows:
    """The rows of a JSON or JSONL file that have exactly one image; memory holds their places in the file only."""

    def __init__(self, source: Source):
        self.path, places, left_out = source.path, array("q"), 0
        read = None
        for number, (start, end, row) in enumerate(scan_json(source.path)):
            read = read or functools.partial(read_row, turns_of=find_turns(list(row), source), source=source)
            try:
                has_image = image_of(row, source) is not None
                if has_image:
                    read(row, number)
            except ValueError:
                read(self.row_at(start, end), number)  # once more for the message, with its characters right
                raise
            if has_image:
                places.extend((start, end, number))
            left_out += not has_image
        self.places = np.array(places, dtype=np.int64).reshape(-1, 3)
        self.read = read
        if left_out and not places:
            field = source.image_column or "image"
            raise ValueError(f"None of the {left_out} rows of {source.path} has exactly one image (field {field!r}).")
        if left_out:
            say(f"{source.name}: {left_out} of {left_out + len(self)} rows left out for not having exactly one image.")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        start, end, number = self.places[index].tolist()
        return self.read(self.row_at(start, end), number)

    def row_at(self, start: int, end: int) -> dict:
        with open(self.path, "rb") as file:
            file.seek(start)
            return json.loads(file.read(end - start))


def say(line: str):
    """Print `line`, once for all processes of a launch."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


# --- `datasets` ---


class TableRows:
    """The rows of a data set of `datasets`; pictures stay encoded, so that a broken one is found when it is drawn."""

    def __init__(self, source: Source):
        self.table, turns_of = open_table(source)
        self.read = functools.partial(read_row, turns_of=turns_of, source=source)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Row:
        return self.read(self.table[index], index)


def open_table(source: Source):
    """The columns that matter of a source, not decoded, and the function that finds the turns in a row of them."""
    table = load_table(source)
    names = table.column_names or list(next(iter(table), {}))
    turns_of = find_turns(names, source)
    image_column = find_image_column(names, source)
    needed = [image_column, *turns_of.columns, *({"id"} & set(names))]
    table = table.select_columns(list(dict.fromkeys(needed)))
    feature = table.features and undecoded(table.features[image_column])
    return table.cast_column(image_column, feature) if feature else table, turns_of


def undecoded(feature):
    """The feature of a column of images, or of lists of them, without decoding; None if it is neither."""
    datasets = require_datasets()
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, list):
        inner = undecoded(feature[0])
        return inner and [inner]
    inner = getattr(feature, "feature", None)
    inner = None if inner is None else undecoded(inner)
    return inner and type(feature)(inner)


def load_table(source: Source):
    """What `datasets` makes of the source's path: one split, streamed if the source is."""
    datasets = require_datasets()
    path, streaming = source.path, source.streaming
    is_saved = any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))
    try:
        if is_saved:
            table = datasets.load_from_disk(path)
            if isinstance(table, datasets.DatasetDict) and source.split not in table:
                raise ValueError(f"it has no split {source.split!r}, but {', '.join(table)}")
            table = table[source.split] if isinstance(table, datasets.DatasetDict) else table
            return table.to_iterable_dataset() if streaming else table.with_format(None)
        files = {"data_files": path} if Path(path).suffix.lower() in TABLES else {}
        if files and not os.path.isfile(path):
            raise ValueError("there is no such file")
        name = TABLES.get(Path(path).suffix.lower(), path)
        return datasets.load_dataset(name, source.subset, split=source.split, streaming=streaming, **files)
    except IndexError as error:  # raised for saved data without rows
        raise ValueError(f"{path} ({source.name}) is empty; give a data set with at least one row.") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{path!r} ({source.name}) cannot be read: {error}. Give a JSON or JSONL file, a folder that "
            "`save_to_disk` wrote, or what `load_dataset` takes; a mixture file can name `subset` and `split`."
        ) from error


def open_rows(source: Source) -> JsonRows | TableRows:
    """The rows of a source that is not streamed.

    Raises:
        ValueError: if there are none, or their images cannot be found; the message says what to change.
    """
    if source.streaming:
        raise ValueError(f"{source.name} is streamed, so every data set must be, and none may be a JSON file.")
    if is_json(source.path):
        if not os.path.isfile(source.path):
            raise ValueError(f"There is no file {os.path.abspath(source.path)} ({source.name}).")
        if source.subset:
            raise ValueError(f"{source.name} is a JSON file, which has no subset {source.subset!r}; leave it out.")
        rows = JsonRows(source)
    else:
        rows = TableRows(source)
    if len(rows) == 0:
        raise ValueError(f"{source.path} ({source.name}) is empty; give a data set with at least one row.")
    images = [rows[index].image for index in range(min(IMAGES_CHECKED, len(rows)))]
    paths = [image for image in images if isinstance(image, str) and not image.startswith(REMOTE)]
    if paths and len(paths) == len(images) and not any(map(os.path.isfile, paths)):
        raise ValueError(
            f"None of the first {len(paths)} images of {source.name} exists; the first is looked for at "
            f"{os.path.abspath(paths[0])}. Give the folder in which their paths begin with --image_folder, or as "
            "`image_folder` in a mixture file."
        )
    return rows
