"""Data sets for training: several formats read as one, and mixtures of them that can be drawn again from a seed.

A sample is a dict: `id` (text), `source` (name of its data set), `image` (path, URL or encoded bytes; None where the
row has no image or several) and `messages` (an optional system message, then user and assistant in turns).

Which row, turn, instruction and caption a sample shows is a function of seed, epoch and index and of nothing else, so
a run that goes on after a kill sees what it would have seen.
"""

import codecs
import functools
import json
import math
import os
import random
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

# For data whose questions are beside the point; the first is the one that detailed descriptions are evaluated with.
CAPTION_INSTRUCTIONS = (
    "Generate a highly detailed description for the provided image using multiple sentences",
    "Describe the image in detail.",
    "Write a thorough description of everything that can be seen in this image.",
    "What does this image show? Explain it in depth.",
    "Give a full account of the picture, its objects and its surroundings.",
    "Describe this picture for somebody who cannot see it, leaving nothing out.",
    "Provide a comprehensive caption of several sentences for the given image.",
    "Look at the image closely and report what you observe.",
    "Put the contents of this image into words as completely as possible.",
    "Explain the scene in the image, with its details and how they relate to each other.",
)
JSON_SUFFIXES = (".json", ".jsonl")
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
TURNS_COLUMNS = ("conversations", "messages", "texts")
IMAGE_COLUMNS = ("image", "images")
REMOTE = ("http://", "https://", "data:")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
IMAGES_CHECKED = 100  # of a data set, before the first step
STREAM_BUFFER = 1000  # rows that a stream is shuffled among; their pictures are held in memory
MIXTURE_BYTES = 2**20  # a longer file is no mixture and is not parsed to find out
CHUNK = 2**22
LONGEST_ROW = 2**28


@dataclass(frozen=True)
class Source:
    """One data set of a mixture.

    path: a JSON or JSONL file; a folder that `save_to_disk` wrote; or what `load_dataset` takes: a folder, a table
    file, a Hub id. `image_folder` is where relative image paths begin; for JSON, by default, the file's own folder.
    `prompt` is appended to every question; with `caption`, one of ten instructions at random takes the question's
    place. `turns` is the number of turns of a sample shown at a time, drawn at random; None for all. An epoch draws
    `samples`, or `weight` times the size, or every row once, but of these no more than `most`; of streams, the first
    that is given is a share of the mixture.
    """

    path: str
    name: str = ""
    image_folder: str | None = None
    subset: str | None = None
    split: str = "train"
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
        if not self.name:
            path = Path(self.path)
            parts = [path.stem if is_json(self.path) or path.suffix in TABLES else path.name, self.subset]
            object.__setattr__(self, "name", "-".join(part for part in parts if part))
        if self.samples is not None and self.weight is not None:
            raise ValueError(f"{self.name} has samples={self.samples} and weight={self.weight}; give one of them.")
        for field, least in (("turns", 1), ("samples", 1), ("most", 1)):
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{self.name} has {field}={value!r}; it must be an integer of at least {least}.")
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"{self.name} has weight={self.weight!r}; it must be greater than 0.")
        if self.question_column and not self.answers_column:
            raise ValueError(f"{self.name} has a question_column but no answers_column; name both.")


class Row(NamedTuple):
    """A row of any format: each turn is a question and the answers to it that one may be drawn from."""

    id: str
    image: str | bytes | None
    system: str | None
    turns: list[tuple[str, list[str]]]


def is_json(path: str) -> bool:
    return Path(path).suffix.lower() in JSON_SUFFIXES


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


# --- What `--data` stands for ---


def read_mixture(paths: list[str], **defaults) -> list[Source]:
    """The data sets that `paths` name: each is one by itself, or a JSON file with a mixture.

    A mixture is {"sources": [{field of Source: value, ...}, ...]}, or {"sources": {name: {field: value}, ...}}; its
    relative paths begin at the file. `defaults` hold for the fields that a source leaves out.
    """
    defaults = {field: value for field, value in defaults.items() if value is not None}
    sources = []
    for path in map(str, paths):
        mixture = load_mixture(path)
        entries = [{"path": path}] if mixture is None else [resolved(entry, Path(path)) for entry in mixture]
        sources += [Source(**{**defaults, **entry}) for entry in entries]
    check_names(sources)
    return sources


def load_mixture(path: str) -> list[dict] | None:
    """The entries of a mixture file; None where `path` is anything else."""
    if not is_json(path) or not os.path.isfile(path) or os.path.getsize(path) > MIXTURE_BYTES:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError:
        return None  # lines of JSON, or a broken file, which reading it as data reports
    if not isinstance(content, dict) or set(content) != {"sources"}:
        return None
    entries = content["sources"]
    if isinstance(entries, dict):
        entries = [{"name": name, **entry} for name, entry in entries.items()]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'"sources" of {path} must list at least one data set, each with a "path".')
    known = [field.name for field in fields(Source)]
    for entry in entries:
        unknown = sorted(entry.keys() - set(known)) if isinstance(entry, dict) else []
        if unknown:
            raise ValueError(f"{path} has the unknown field {unknown[0]!r}; a source has {', '.join(known)}.")
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise ValueError(f'A source of {path} has no "path": {json.dumps(entry)[:200]}.')
    return entries


def resolved(entry: dict, mixture: Path) -> dict:
    """`entry` with its relative paths taken from the folder of `mixture`, unless they are Hub ids."""
    beside = mixture.parent / entry["path"]
    looks_local = is_json(entry["path"]) or entry["path"].startswith(".") or Path(entry["path"]).suffix in TABLES
    if beside.exists() or looks_local:
        entry = {**entry, "path": str(beside)}
    if entry.get("image_folder") is not None:
        entry = {**entry, "image_folder": str(mixture.parent / entry["image_folder"])}
    return entry


def check_names(sources: list[Source]):
    if not sources:
        raise ValueError("There are no data; give at least one data set.")
    name, times = Counter(source.name for source in sources).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{times} data sets are called {name!r}; give each a `name` of its own in a mixture file.")


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


# --- Formats: what a row holds ---


class TurnsOf:
    """Finds the turns in a row: the one place that knows the formats."""

    def __init__(self, columns: list[str], source: Source):
        self.columns, self.source = columns, source

    def __call__(self, row: dict) -> tuple[str | None, list[tuple[str, list[str]]]]:
        """The system message, if there is one, and the turns."""
        cells = [as_list(row.get(column)) for column in self.columns]
        match self.columns[0]:
            case _ if self.source.answers_column:
                return None, answered_turns(*([None, *cells] if len(cells) == 1 else cells))
            case "conversations":
                return paired([(part["from"], part["value"]) for part in cells[0]])
            case "messages":
                return paired([(part["role"], text_of(part["content"])) for part in cells[0]])
            case "texts":
                return None, [(part["user"], [part["assistant"]]) for part in cells[0]]


def find_turns(columns: list[str], source: Source) -> TurnsOf:
    """The reader of rows with these columns."""
    if source.answers_column:
        wanted = [("question_column", source.question_column), ("answers_column", source.answers_column)]
        wanted = [(option, column) for option, column in wanted if column]
        for option, column in wanted:
            if column not in columns:
                raise ValueError(unknown_column(option, column, columns, source))
        return TurnsOf([column for _, column in wanted], source)
    for column in TURNS_COLUMNS:
        if column in columns:
            return TurnsOf([column], source)
    raise ValueError(
        f"{source.path} ({source.name}) has rows of {', '.join(columns) or 'nothing'}, but none of "
        f"{', '.join(TURNS_COLUMNS)}. Give the names of its columns with --image_column, --question_column and "
        "--answers_column, or bring it into LLaVA's format (docs/training.md)."
    )


def find_image_column(columns: list[str], source: Source) -> str:
    if source.image_column and source.image_column not in columns:
        raise ValueError(unknown_column("image_column", source.image_column, columns, source))
    for column in (source.image_column,) if source.image_column else IMAGE_COLUMNS:
        if column in columns:
            return column
    raise ValueError(
        f"{source.path} ({source.name}) has neither a column `image` nor `images`, but {', '.join(columns)}; name the "
        "one with the pictures with --image_column."
    )


def unknown_column(option: str, column: str, columns: list[str], source: Source) -> str:
    return (
        f"{source.path} ({source.name}) has no column {column!r}, but {', '.join(columns)}; choose from these with "
        f"--{option}, or with {option!r} in a mixture file."
    )


def as_list(cell):
    """A list of dicts where `datasets` made it a dict of lists; everything else as it is."""
    if isinstance(cell, dict) and all(isinstance(value, list) for value in cell.values()):
        return [dict(zip(cell, values, strict=True)) for values in zip(*cell.values(), strict=True)]
    return cell


def text_of(content: str | list[dict]) -> str:
    """The text of a message: a string, or the text parts of a list."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if part.get("type") == "text")
    return content


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


def read_row(row: dict, number: int | str, turns_of: TurnsOf, source: Source) -> Row:
    """A row of any format.

    Raises:
        ValueError: if it has no answer, or is not as its format says; the message names it.
    """
    row_id = str(number if row.get("id") is None else row["id"])
    try:
        try:
            system, turns = turns_of(row)
        except (AttributeError, KeyError, TypeError) as error:
            cell = json.dumps({column: row.get(column) for column in turns_of.columns}, default=str)
            raise ValueError(f"it does not have the form that docs/training.md gives, but is {cell[:300]}") from error
        turns = [
            (without_marks(question), [check_answer(answer) for answer in answers]) for question, answers in turns
        ]
        if not turns or not all(answers for _, answers in turns):
            raise ValueError("it has no answer")
        if not source.caption and not source.prompt and not all(question for question, _ in turns):
            raise ValueError("it has an empty question; `prompt` or `caption` can stand in its place")
    except ValueError as error:
        raise ValueError(f"Sample {row_id!r} of {source.name} cannot be used: {error}.") from error
    return Row(row_id, image_of(row, source), system, turns)


def check_answer(answer: str) -> str:
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(
            f"it has the answer {answer!r}, which gives nothing to learn; correct it or leave the row out"
        )
    return answer.strip()


def without_marks(question: str) -> str:
    """A question without the marks that say where other models put the image."""
    if not isinstance(question, str):
        raise ValueError(f"it has the question {question!r}, which is no text")
    return re.sub(r"<image>\n|\n<image>|<image>", "", question).strip()


def image_of(row: dict, source: Source) -> str | bytes | None:
    """The path, URL or encoded bytes of the one image of a row; None where it has none, or several."""
    columns = (source.image_column,) if source.image_column else IMAGE_COLUMNS
    image = next((row[column] for column in columns if row.get(column)), None)
    if isinstance(image, list):
        image = image[0] if len(image) == 1 else None
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if not isinstance(image, str) or image.startswith(REMOTE):
        return image or None
    folder = source.image_folder
    if folder is None:
        folder = os.path.dirname(source.path) if is_json(source.path) else ""
    return os.path.join(folder, image)


# --- Choosing at random ---


def compose(row: Row, source: Source, key: str) -> dict:
    """What is shown of a row: the turns, instructions and captions that `key` draws."""
    draw = random.Random(key)
    turns = row.turns
    if source.turns is not None and source.turns < len(turns):
        turns = [turns[turn] for turn in sorted(draw.sample(range(len(turns)), source.turns))]
    messages = [] if row.system is None else [{"role": "system", "content": row.system}]
    for question, answers in turns:
        if source.caption:
            question = draw.choice(CAPTION_INSTRUCTIONS)
        if not question.endswith(source.prompt):  # data made for LLaVA-1.5 have it already
            question = f"{question} {source.prompt}".strip()
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": draw.choice(answers)})
    return {"id": row.id, "source": source.name, "image": row.image, "messages": messages}


def epoch_rows(size: int, count: int, epoch: int, seed: tuple[int, ...]) -> np.ndarray:
    """The rows that an epoch draws: `count` of an endless sequence of whole permutations of `size` rows, which goes on
    where the epoch before ended. So no row comes again before all others had their turn."""
    first, last = epoch * count, (epoch + 1) * count
    rounds = range(first // size, (last - 1) // size + 1)
    rows = np.concatenate([np.random.default_rng((*seed, number)).permutation(size) for number in rounds])
    start = first - rounds.start * size
    return rows[start : start + count]


class Mixture(torch.utils.data.Dataset):
    """Data sets drawn as their sources say, one after another; `MixtureSampler` shuffles them.

    `counts` has the number of draws per epoch of each, by name.
    """

    def __init__(self, sources: list[Source], seed: int):
        check_names(sources)
        self.sources, self.seed = sources, seed
        self.rows = [open_rows(source) for source in sources]
        self.counts = {
            source.name: source.samples
            or min(source.most or math.inf, max(1, round((source.weight or 1) * len(rows))))
            for source, rows in zip(sources, self.rows, strict=True)
        }
        self.ends = np.cumsum(list(self.counts.values())).tolist()
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that persist see it change
        self._drawn = (None, [])
        self.drawn()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int):
        """Draw anew, as `epoch` has it."""
        self._epoch.fill_(int(epoch))
        self.drawn()

    def drawn(self) -> list[np.ndarray]:
        """The rows of each source in this epoch."""
        epoch = self.epoch
        if self._drawn[0] != epoch:
            counts = self.counts.values()
            self._drawn = (
                epoch,
                [
                    epoch_rows(len(rows), count, epoch, (self.seed, 1, number))
                    for number, (rows, count) in enumerate(zip(self.rows, counts, strict=True))
                ],
            )
        return self._drawn[1]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a mixture of {len(self)}")
        index %= len(self)
        number = int(np.searchsorted(self.ends, index, side="right"))
        start = self.ends[number] - self.counts[self.sources[number].name]
        row = self.rows[number][int(self.drawn()[number][index - start])]
        return compose(row, self.sources[number], f"{self.seed} {self.epoch} {index}")


class MixtureSampler(torch.utils.data.Sampler):
    """The indices of a mixture in an order that is a function of its seed and epoch."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture

    def set_epoch(self, epoch: int):
        self.mixture.set_epoch(epoch)  # accelerate tells the sampler and then not the data set

    def __len__(self) -> int:
        return len(self.mixture)

    def __iter__(self) -> Iterator[int]:
        seed = (self.mixture.seed, 2, self.mixture.epoch)
        yield from np.random.default_rng(seed).permutation(len(self.mixture)).tolist()


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


# --- Streams ---


class Stream(torch.utils.data.IterableDataset):
    """Streamed data sets, interleaved at random and shuffled by a buffer; without a length.

    A resumed run gets the same samples by skipping those it has had, with as many processes and workers as before.
    """

    def __init__(self, sources: list[Source], seed: int):
        datasets = require_datasets()
        check_names(sources)
        for source in sources:
            if not source.streaming or is_json(source.path):
                raise ValueError(f"{source.name} is not streamed, so no data set may be; a JSON file cannot be.")
        self.sources, self.seed = sources, seed
        shares = stream_shares(sources)
        streams = [open_stream(source, number) for number, source in enumerate(sources)]
        rows = streams[0]
        if len(streams) > 1:
            rows = datasets.interleave_datasets(streams, shares, seed=seed, stopping_strategy="all_exhausted")
        self.rows = rows.shuffle(seed=seed, buffer_size=STREAM_BUFFER)

    def set_epoch(self, epoch: int):
        self.rows.set_epoch(int(epoch))

    def __iter__(self) -> Iterator[dict]:
        for packed in self.rows:
            source = self.sources[packed["source"]]
            row_id, system, turns = json.loads(packed["text"])
            row = Row(row_id, packed["bytes"] or packed["path"], system, turns)
            # Not by the place in the stream, which changes with the number of workers.
            key = f"{self.seed} {self.rows.epoch} {source.name} {zlib.crc32(packed['text'].encode())}"
            yield compose(row, source, key)


def stream_shares(sources: list[Source]) -> list[float]:
    """The share of each source, by its samples or its weight."""
    counts = [source.samples or source.most for source in sources]
    by_samples = [count is not None for count in counts]
    if any(by_samples) and not all(by_samples):
        raise ValueError("The size of a stream is unknown: give all streamed sources `samples`, or none of them.")
    parts = [count or source.weight or 1 for count, source in zip(counts, sources, strict=True)]
    return [part / sum(parts) for part in parts]


def open_stream(source: Source, number: int):
    """The rows of a source in a form that is the same for all formats, so that streams can be interleaved."""
    datasets = require_datasets()
    table, turns_of = open_table(source)
    features = {name: datasets.Value(kind) for name, kind in
                {"source": "int32", "text": "string", "path": "string", "bytes": "binary"}.items()}  # fmt: skip
    read = functools.partial(pack_row, source=source, turns_of=turns_of, number=number)
    columns = table.column_names or list(next(iter(table), {}))
    return table.map(read, remove_columns=columns, features=datasets.Features(features))


def pack_row(row: dict, source: Source, turns_of: TurnsOf, number: int) -> dict:
    where = image_of(row, source)
    row = read_row(row, where if isinstance(where, str) else "without id", turns_of, source)
    return {
        "source": number,
        "text": json.dumps([row.id, row.system, row.turns]),
        "path": row.image if isinstance(row.image, str) else None,
        "bytes": row.image if isinstance(row.image, bytes) else None,
    }


def streamed(sources: list[Source], seed: int) -> Stream:
    """A data set to iterate over, of sources that are all streamed."""
    return Stream(sources, seed)
