"""Rows that survive a kill: each process appends lines of JSON to a part file, and the parts become the output."""

import contextlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState
from ..common.command import InputError
from ..common.files import differences, explained, lock, read_record, write_atomically, write_record
from ..common.json_lines import parse_json

FIRST_NUMBER = "[image 1]"  # as the chat template writes it
NETWORK_DELAY = 90  # seconds until a file written on one machine must be seen by the others


@dataclass
class Request:
    """One prompt about one image, several or none.

    id: text or integer, unique within a run; image: whatever the processor opens, a function without arguments that
    gives it, or a list of either; an empty list is no image; prompt: the user's turn, without the template; fields:
    copied into the row; system: the system message, or None for the template's own.
    """

    id: str | int
    image: object
    prompt: str
    fields: dict = field(default_factory=dict)
    system: str | None = None

    @property
    def subject(self) -> Hashable:
        """The same for requests about one image, as far as can be told before it is opened."""
        if "image_id" in self.fields:
            return str(self.fields["image_id"])
        return str(self.image) if isinstance(self.image, (str, Path)) else id(self.image)

    def messages(self, images: int = 1) -> list[dict]:
        """The conversation so far, about so many images. Several stand in front of the prompt, where the chat template
        numbers them, unless the prompt has their numbers."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        content = self.prompt
        if images > 1 and FIRST_NUMBER not in self.prompt:
            content = [{"type": "image"}] * images + [{"type": "text", "text": self.prompt}]
        return [*system, {"role": "user", "content": content}]

    def images(self) -> list:
        """What the processor opens, in a list."""
        given = self.image() if callable(self.image) else self.image
        given = list(given) if isinstance(given, (list, tuple)) else [given]
        return [image() if callable(image) else image for image in given]


def check_requests(requests: Sequence[Request]):
    """Raise InputError unless there are requests, each with an id of its own and a prompt."""
    if not len(requests):
        raise InputError("There is nothing to answer: the list of requests is empty.")
    seen = set()
    for request in requests:
        if isinstance(request.id, bool) or not isinstance(request.id, (str, int)):
            raise InputError(
                f"The id {request.id!r} is a {type(request.id).__name__}; it must be a text or an integer."
            )
        if request.id in seen:
            raise InputError(f"The id {request.id!r} occurs more than once; give each request an id of its own.")
        if not request.prompt:
            raise InputError(f"The prompt of {request.id!r} is empty; give the model something to answer.")
        seen.add(request.id)


def row(
    request: Request, answer_name: str, text: str | None, error: str | None, vision_budget: int | None = None
) -> dict:
    result = {answer_name: text} if error is None else {"error": error}
    taken = {} if vision_budget is None else {"vision_budget": vision_budget}
    return {"id": request.id, **request.fields, **result, **taken}


def encode(row: dict) -> bytes:
    """`row` as a line."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # from a file name that is not UTF-8
        return json.dumps(row).encode() + b"\n"


def id_of(line: bytes, answer_name: str) -> str | int | None:
    """The id of the row in a line; None if it is no whole row."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get(answer_name, row.get("error")), str):
        return None
    row_id = row.get("id")
    return row_id if isinstance(row_id, (str, int)) and not isinstance(row_id, bool) else None


def scan(path: Path, answer_name: str) -> tuple[dict[str | int, int], int, bool]:
    """Where the row of each id begins; where the whole lines end, as a kill may have torn the last one; and whether
    there is nothing else. Lines that are no rows are passed over."""
    offsets, end, lines, torn = {}, 0, 0, False
    with path.open("rb") as file:
        for line in file:
            if torn := not line.endswith(b"\n"):
                break
            if (row_id := id_of(line, answer_name)) is not None:
                offsets[row_id] = end
            end += len(line)
            lines += 1
    return offsets, end, not torn and lines == len(offsets)


class Part:
    """The file that one process appends rows to, from `end` on; what stands behind is cut off."""

    def __init__(self, path: Path, end: int):
        self.path, self.end = path, end

    def __enter__(self) -> "Part":
        self.open()
        self.file.truncate(self.end)
        self.file.seek(self.end)
        return self

    def open(self):
        # Unbuffered, so that nothing is left to be written after an error.
        self.file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        lock(self.file, self.path)

    def __exit__(self, *exception):
        self.file.close()

    def append(self, rows: list[dict]):
        """All of `rows`, on disk when this returns; none of them if writing fails."""
        self.restore()
        self.write(b"".join(map(encode, rows)))

    def write(self, data: bytes):
        left = memoryview(data)
        try:
            while left:
                left = left[self.file.write(left) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            self.file.truncate(self.end)
            raise explained(error, self.path) from error
        self.end += len(data)

    def restore(self):
        """Write all rows anew if somebody has removed the file meanwhile."""
        if self.path.exists() and os.fstat(self.file.fileno()).st_nlink:
            return
        with self.file as removed:
            removed.seek(0)
            written = removed.read(self.end)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.open()
        self.file.truncate(0)
        self.end = 0
        self.write(written)
        warnings.warn(f"{self.path} was removed; its rows have been written to it once more.", stacklevel=3)


class Run:
    """The files of one run: the output, its parts, and the record of its settings."""

    def __init__(self, output: Path, answer_name: str):
        self.output, self.answer_name = output, answer_name
        self.record = output.with_name(f"{output.name}.run.json")
        self.is_clean = True  # the output, of all but rows; known once it was read

    def part(self, process: int) -> Path:
        return self.output.with_name(f"{self.output.name}.part-{process}")

    def parts(self) -> list[Path]:
        pattern = re.compile(re.escape(self.output.name) + r"\.part-\d+")
        if not self.output.parent.is_dir():
            return []
        return sorted(path for path in self.output.parent.iterdir() if pattern.fullmatch(path.name))

    def start(self, state: "PartialState", settings: dict, details: dict):
        """Take the files for this run in all processes, once it is sure that they belong to no other."""
        self.check(settings)
        state.wait_for_everyone()
        if state.is_main_process:
            self.begin(settings, details)
        state.wait_for_everyone()
        self.wait_until_begun()

    def check(self, settings: dict):
        """Raise InputError if rows are there that other settings made."""
        if self.output.is_dir():
            raise InputError(f"{self.output} is a folder; give the name of a file.")
        if read_record(self.record, settings, self.output) is None and (self.output.exists() or self.parts()):
            raise InputError(
                f"{self.output} has no {self.record.name}, so that nobody knows its settings. Choose another output, "
                "or remove it and the files beside it whose names begin so."
            )

    def begin(self, settings: dict, details: dict):
        """Record what this run depends on; if that is done, warn where details differ, which should not matter."""
        self.content = settings, details
        if self.record.exists():
            recorded = json.loads(self.record.read_bytes()).get("details")
            if changed := differences(recorded if isinstance(recorded, dict) else {}, details):
                message = f"{self.output} was begun differently: {changed}; answers may differ a little."
                warnings.warn(message, stacklevel=3)
        else:
            write_record(self.record, settings, details=details)

    def record_again(self):
        """Restore the record if somebody has removed it meanwhile."""
        if not self.record.exists():
            settings, details = self.content
            write_record(self.record, settings, details=details)

    def wait_until_begun(self):
        """Raise InputError if the main process's record does not appear, on another machine for example."""
        end = time.monotonic() + NETWORK_DELAY
        while not self.record.exists():
            if time.monotonic() > end:
                raise InputError(
                    f"{self.record}, which the main process wrote, is not here; the output must be on a file system "
                    "that all machines see."
                )
            time.sleep(0.5)

    def read(self, processes: int = 0) -> tuple[dict[str | int, tuple[Path, int]], dict[Path, int]]:
        """File and offset of each id's row, and where the whole rows of each file end."""
        # Asked for by name, because the listing of a network folder may be older than the parts of other machines.
        named = [self.part(process) for process in range(processes)]
        rows, ends = {}, {}
        for path in sorted({self.output, *self.parts(), *named}):
            if path.exists():
                offsets, ends[path], clean = scan(path, self.answer_name)
                self.is_clean &= clean or path != self.output
                rows.update((row_id, (path, offset)) for row_id, offset in offsets.items())
        return rows, ends

    def merge(self, requests: Sequence[Request], processes: int):
        """The rows of all parts to the output, in the order of `requests`; then the parts go."""
        rows, ends = self.read(processes)
        missing = sum(request.id not in rows for request in requests)
        if missing:
            raise InputError(
                f"{missing} of {len(requests)} rows are missing from the parts of {self.output}. It must be on a file "
                "system that all machines see; run the same command again for the rest."
            )
        if left_out := len(rows) - len(requests):
            warnings.warn(f"{left_out} rows were left out: their ids are no longer asked for.", stacklevel=3)
        write_atomically(self.output, lines([rows[request.id] for request in requests]))
        for path in ends.keys() - {self.output}:
            path.unlink(missing_ok=True)  # another process may be here too
        with self.output.open("rb") as file:
            errors = [row["id"] for row in map(json.loads, file) if "error" in row]
        first = f" (the first: {errors[0]!r})" if errors else ""
        print(f"Wrote {self.output}: {len(requests)} rows, {len(errors)} of them errors{first}.", file=sys.stderr)

    def finished(self, requests: Sequence[Request], rows: dict) -> str:
        """That nothing is left to do, in words."""
        others = len(rows) - len(requests)
        more = f" It holds {others} more, which are not asked for." if others else ""
        return f"{self.output} is finished: {len(requests)} rows; nothing to do.{more}"

    def kept(self, requests: Sequence[Request]) -> str:
        """What an interrupted run leaves, and how to go on, in words."""
        rows, _ = self.read()
        done = sum(request.id in rows for request in requests)
        if not done:
            return "No row was written yet; give the same command again."
        places = ", ".join(sorted({str(path) for path, _ in rows.values()}))
        return f"{done} of {len(requests)} rows are kept in {places}; give the same command again to go on from there."


def lines(places: list[tuple[Path, int]]) -> Iterator[bytes]:
    """The lines that begin at these offsets of these files."""
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb")) for path in {path for path, _ in places}}
        for path, offset in places:
            files[path].seek(offset)
            yield files[path].readline()
