"""Mixtures of data sets that can be drawn again from a seed, and streams of them.

A sample is a dict: `id` (text), `source` (name of its data set), `images` (a list of paths, URLs or encoded bytes) and
`messages` (an optional system message, then user and assistant in turns). Where the row cannot be used, because an
image may not be opened for example, it has no images, and `error` says why.

Which row, turn, instruction and caption a sample shows is a function of seed, epoch and index and of nothing else, so
a run that goes on after a kill sees what it would have seen.
"""

import functools
import itertools
import json
import math
import os
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from ..common.command import InputError, require
from ..common.json_lines import parse_json
from ..common.tables import FILES
from ..processing_pheye import DESCRIPTION_INSTRUCTION
from .formats import MARK, Row, Source, TurnsOf, images_of, is_json, read_row, without_marks
from .rows import columns_of, open_rows, open_table

# For data whose questions are beside the point; the first is the paper's.
CAPTION_INSTRUCTIONS = (
    DESCRIPTION_INSTRUCTION,
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
STREAM_BUFFER = 1000  # rows that a stream is shuffled among; their images are held in memory
MOST_DRAWS = 10**8  # of a source in an epoch; their order is held in memory
MIXTURE_BYTES = 2**20  # a longer file is no mixture and is not parsed to find out


# --- What `--data` stands for ---


def read_mixture(paths: list[str], **defaults) -> list[Source]:
    """The data sets that `paths` name: each is one by itself, or a JSON file with a mixture.

    A mixture is {"sources": [{field of Source: value, ...}, ...]}, or {"sources": {name: {field: value}, ...}}; its
    relative paths begin at the file. `defaults` hold for the fields that a source leaves out.

    Raises:
        InputError: if there is none, a name is there twice, or a mixture has what is no field of a source.
    """
    return [source for source, _ in described_sources(paths, **defaults)]


def described_sources(paths: list[str], **defaults) -> list[tuple[Source, set[str]]]:
    """What `read_mixture` gives, each with the names of the fields that its mixture or `defaults` say."""
    found = []
    for path in map(str, paths):
        mixture = load_mixture(path)
        entries = [{"path": path}] if mixture is None else [resolved(entry, Path(path)) for entry in mixture]
        found += [(Source(**{**defaults, **entry}), {*defaults, *entry}) for entry in entries]
    check_names([source for source, _ in found])
    return found


def load_mixture(path: str) -> list[dict] | None:
    """The entries of a mixture file; None where `path` is anything else."""
    if not is_json(path) or not os.path.isfile(path) or os.path.getsize(path) > MIXTURE_BYTES:
        return None
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError:
        return None  # lines of JSON, or a broken file, which reading it as data reports
    if not isinstance(content, dict) or set(content) != {"sources"}:
        return None
    entries = content["sources"]
    if isinstance(entries, dict):
        entries = [{"name": name, **entry} if isinstance(entry, dict) else entry for name, entry in entries.items()]
    if not isinstance(entries, list) or not entries:
        raise InputError(f'"sources" of {path} must list at least one data set, each with a "path".')
    known = [field.name for field in fields(Source) if field.name != "image_sources"]  # which only the user decides
    for entry in entries:
        unknown = sorted(entry.keys() - set(known)) if isinstance(entry, dict) else []
        if unknown:
            raise InputError(f"{path} has the unknown field {unknown[0]!r}; a source has {', '.join(known)}.")
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise InputError(f'A source of {path} has no "path": {json.dumps(entry)[:200]}.')
    return entries


def resolved(entry: dict, mixture: Path) -> dict:
    """`entry` with its relative paths taken from the folder of `mixture`, unless they are Hub ids."""
    beside = mixture.parent / entry["path"]
    looks_local = is_json(entry["path"]) or entry["path"].startswith(".") or Path(entry["path"]).suffix in FILES
    if looks_local or os.path.exists(beside):
        entry = {**entry, "path": str(beside)}
    if isinstance(entry.get("image_folder"), str):  # anything else is refused by `Source`
        entry = {**entry, "image_folder": str(mixture.parent / entry["image_folder"])}
    return entry


def check_names(sources: list[Source]):
    if not sources:
        raise InputError("There are no data; give at least one data set.")
    name, times = Counter(source.name for source in sources).most_common(1)[0]
    if times > 1:
        raise InputError(f"{times} data sets are called {name!r}; give each a `name` of its own in a mixture file.")


# --- Choosing at random ---


def compose(row: Row, source: Source, key: str) -> dict:
    """What is shown of a row: the turns, instructions and captions that `key` draws."""
    draw = random.Random(key)
    turns = row.turns
    if source.turns is not None and source.turns < len(turns):
        turns = with_carried_marks(turns, draw.sample(range(len(turns)), source.turns))
    messages = [] if row.system is None else [{"role": "system", "content": row.system}]
    for question, answers in turns:
        if source.caption:
            question = MARK * question.count(MARK) + draw.choice(CAPTION_INSTRUCTIONS)
        if not question.endswith(source.prompt):  # data made for LLaVA-1.5 have it already
            question = f"{question} {source.prompt}".strip()
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": draw.choice(answers)})
    images = row.images if len(row.images) < 2 else row.images[: replace_marks(messages)]
    sample = {"id": row.id, "source": source.name, "images": images, "messages": messages}
    return sample if row.error is None else {**sample, "error": row.error}


def with_carried_marks(turns: list[tuple[str, list[str]]], shown: list[int]) -> list[tuple[str, list[str]]]:
    """The turns of the numbers `shown`. Images of a turn that is not shown stand before the next that is; those behind
    the last are left out."""
    kept, carried = [], ""
    for turn, (question, answers) in enumerate(turns):
        if turn in shown:
            kept.append((carried + question, answers))
            carried = ""
        else:
            carried += MARK * question.count(MARK)
    return kept


def replace_marks(messages: list[dict[str, str]]) -> int:
    """Put each image's number where its mark stands in the questions, as the chat template does; one alone has none.
    Returns how many images there are."""
    asked = [message for message in messages if message["role"] == "user"]
    count = sum(message["content"].count(MARK) for message in asked)
    numbers = itertools.count(1)
    for message in asked:
        if count == 1:
            message["content"] = without_marks(message["content"])
        else:
            message["content"] = re.sub(f"{MARK}[ \n]?", lambda _: f"[image {next(numbers)}] ", message["content"])
    return count


def epoch_rows(size: int, count: int, epoch: int, seed: tuple[int, ...]) -> np.ndarray:
    """The rows that an epoch draws: `count` of an endless sequence of whole permutations of `size` rows, which goes on
    where the epoch before ended. So no row comes again before all others had their turn."""
    first, last = epoch * count, (epoch + 1) * count
    rounds = range(first // size, (last - 1) // size + 1)
    rows = np.concatenate([np.random.default_rng((*seed, number)).permutation(size) for number in rounds])
    start = first - rounds.start * size
    return rows[start : start + count]


def draws_of(source: Source, size: int) -> int:
    """How many samples an epoch draws of a source of `size` rows."""
    wanted = source.samples or min(source.most or math.inf, max(1, (source.weight or 1) * size))
    if wanted > MOST_DRAWS:
        raise InputError(
            f"{source.name} draws {wanted:.3g} samples in an epoch of its {size:,} rows; give less than "
            f"{MOST_DRAWS:,} by `samples` or `weight`, and more epochs."
        )
    return round(wanted)


class Mixture(torch.utils.data.Dataset):
    """Data sets drawn as their sources say, one after another; `MixtureSampler` shuffles them.

    Rows with more than `max_images` images are left out. `counts` has the number of draws per epoch of each source, by
    name.

    Raises:
        InputError: if a source cannot be read, has no row that can be used, or two have one name.
    """

    def __init__(self, sources: list[Source], seed: int, max_images: int = 1):
        check_names(sources)
        self.sources, self.seed = sources, seed
        self.rows = [open_rows(source, max_images) for source in sources]
        self.counts = {
            source.name: draws_of(source, len(rows)) for source, rows in zip(sources, self.rows, strict=True)
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


class FixedMixture(Mixture):
    """A mixture to evaluate on: every pass shows the same, whatever epoch accelerate tells it."""

    def set_epoch(self, epoch: int):
        pass


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
        yield from map(int, np.random.default_rng(seed).permutation(len(self.mixture)))


# --- Streams ---


class Stream(torch.utils.data.IterableDataset):
    """Streamed data sets, interleaved at random and shuffled by a buffer; without a length.

    A resumed run gets the same samples by skipping those it has had, with as many processes and workers as before.
    Rows with more than `max_images` images are skipped when they are drawn.
    """

    def __init__(self, sources: list[Source], seed: int, max_images: int = 1):
        datasets = require("datasets", "train")
        check_names(sources)
        for source in sources:
            if not source.streaming or is_json(source.path):
                raise InputError(f"{source.name} is not streamed, so no data set may be; a JSON file cannot be.")
        self.sources, self.seed = sources, seed
        shares = stream_shares(sources)
        streams = [open_stream(source, number, max_images) for number, source in enumerate(sources)]
        rows = streams[0]
        if len(streams) > 1:
            rows = datasets.interleave_datasets(streams, shares, seed=seed, stopping_strategy="all_exhausted")
        self.rows = rows.shuffle(seed=seed, buffer_size=STREAM_BUFFER)

    def set_epoch(self, epoch: int):
        self.rows.set_epoch(int(epoch))

    def __iter__(self) -> Iterator[dict]:
        for packed in self.rows:
            source = self.sources[packed["source"]]
            row_id, system, turns, *error = json.loads(packed["text"])
            images = [data or path for data, path in zip(packed["bytes"], packed["paths"], strict=True)]
            row = Row(row_id, images, system, turns, *error)
            # Not by the place in the stream, which changes with the number of workers.
            key = f"{self.seed} {self.rows.epoch} {source.name} {zlib.crc32(packed['text'].encode())}"
            yield compose(row, source, key)


def stream_shares(sources: list[Source]) -> list[float]:
    """The share of each source, by its samples or its weight."""
    counts = [source.samples or source.most for source in sources]
    by_samples = [count is not None for count in counts]
    if any(by_samples) and not all(by_samples):
        raise InputError("The size of a stream is unknown: give all streamed sources `samples`, or none of them.")
    parts = [count or source.weight or 1 for count, source in zip(counts, sources, strict=True)]
    return [part / sum(parts) for part in parts]


def open_stream(source: Source, number: int, max_images: int):
    """The rows of a source in a form that is the same for all formats, so that streams can be interleaved."""
    datasets = require("datasets", "train")
    table, turns_of = open_table(source)
    features = {
        "source": datasets.Value("int32"),
        "text": datasets.Value("string"),
        "paths": [datasets.Value("string")],
        "bytes": [datasets.Value("binary")],
    }
    read = functools.partial(pack_row, source=source, turns_of=turns_of, number=number, max_images=max_images)
    return table.map(read, remove_columns=columns_of(table), features=datasets.Features(features))


def pack_row(row: dict, source: Source, turns_of: TurnsOf, number: int, max_images: int) -> dict:
    images, _ = images_of(row, source)
    name = images[0] if images and isinstance(images[0], str) else "without id"
    row = read_row(row, name, turns_of, source, max_images)
    error = [] if row.error is None else [row.error]
    return {
        "source": number,
        "text": json.dumps([row.id, row.system, row.turns, *error]),
        "paths": [image if isinstance(image, str) else None for image in row.images],
        "bytes": [image if isinstance(image, bytes) else None for image in row.images],
    }
