"""Answers to many prompts about many images: in batches, on every device, and whole again after a kill.

Each process answers a share of the requests and appends rows, lines of JSON, to a part file of its own beside the
output; when all have finished, the parts become the output, in the order of the requests. A row counts as soon as its
line is whole, so the same call after a kill goes on where the rows end, with any number of processes.
"""

import argparse
import contextlib
import errno
import importlib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

import pheye

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

if TYPE_CHECKING:
    from accelerate import PartialState

PATIENCE = timedelta(days=1)  # of a process for slower ones; the usual minutes would end a run with unequal machines
NETWORK_DELAY = 90  # seconds until a file written on one machine must be seen by the others


class InputError(ValueError):
    """Something that the user can mend; the message says how."""


@dataclass
class Request:
    """One prompt about one image.

    id: text or integer, unique within a run; image: whatever the processor opens, or a function without arguments that
    gives it; prompt: the user's turn, without the template; fields: copied into the row.
    """

    id: str | int
    image: object
    prompt: str
    fields: dict = field(default_factory=dict)


def exit_status(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run a command; errors that the user can mend become a line on standard error and the status 1."""
    try:
        run(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"error: {error}\nGive the same command with a smaller --batch_size to go on.", file=sys.stderr)
        return 1
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def require(package: str):
    """A package of the extra `eval`, imported.

    Raises:
        InputError: if it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise InputError(f'This needs {package}: run pip install "pheye[eval]".') from error


def process_state(cpu: bool = False) -> "PartialState":
    """Which of how many processes this is, and its device; the first call in a process decides.

    Raises:
        InputError: if accelerate is not installed, or does not see the processes that were launched.
    """
    accelerate = require("accelerate")
    # Without an accelerator, accelerate takes each of several processes for the only one unless it is told.
    cpu = cpu or accelerate.utils.parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = accelerate.PartialState(cpu=cpu, timeout=PATIENCE)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != launched:
        raise InputError(f"{launched} processes were launched, but accelerate sees {state.num_processes}; check both.")
    return state


def open_model(
    model: str, revision: str | None, dtype: str, device: torch.device | str
) -> tuple[str | None, Callable[[], tuple]]:
    """The commit of a model's repository, None for a folder; and a function that loads the model onto `device`, and
    its processor. The classes are this package's: no code of the repository is run.

    Raises:
        InputError: if it is another kind of model.
    """
    from transformers.utils import cached_file

    file = Path(cached_file(model, "config.json", revision=revision))
    commit = file.parent.name if file.parent.parent.name == "snapshots" else None
    kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    if kind != "pheye":
        raise InputError(f"{model} is a {kind} model; give the folder or Hub id of a Pheye.")
    where = {"revision": commit or revision}

    def load() -> tuple:
        loaded = pheye.PheyeForConditionalGeneration.from_pretrained(model, dtype=dtype, **where)
        return loaded.to(device), pheye.PheyeProcessor.from_pretrained(model, **where)

    return commit, load


def answer(
    load: Callable[[], tuple],
    requests: Sequence[Request],
    output: str | os.PathLike,
    *,
    batch_size: int,
    generate_kwargs: dict,
    settings: dict,
    workers: int = 0,
    answer_name: str = "answer",
) -> Path:
    """Write one line of JSON per request into `output`: `id`, its `fields`, and the answer, or `error` if the image
    cannot be read. Every process of a launch makes this call.

    Args:
        load: gives the model, on its device, and the processor; called only where something is left to answer.
        generate_kwargs: decoding arguments, one answer per request.
        settings: what else the answers depend on, recorded in `<output>.run.json`; rows of a run with other settings
            are never continued.
        workers: processes that open and preprocess images while the model computes.
        answer_name: key of the answer in a row.

    Raises:
        InputError: if ids are not unique, or the files beside `output` belong to another run.
        OSError: if a row cannot be written; the rows before it are whole.
    """
    check_requests(requests)
    if batch_size < 1 or workers < 0:
        raise InputError(f"batch_size={batch_size} must be at least 1 and workers={workers} at least 0.")
    if generate_kwargs.get("num_return_sequences", 1) != 1:
        raise InputError("num_return_sequences must be 1: a row holds one answer.")
    state = process_state()
    run = Run(Path(output))
    settings = {**settings, "generate_kwargs": generate_kwargs}
    run.start(state, settings, {"versions": versions(), "batch_size": batch_size, "processes": state.num_processes})
    rows, ends = run.read()
    pending = [index for index, request in enumerate(requests) if request.id not in rows]
    # Prompts of like length need little padding; the longest come first, so that memory runs out early if at all.
    pending.sort(key=lambda index: -len(requests[index].prompt))
    share = pending[state.process_index :: state.num_processes]
    state.wait_for_everyone()  # all have read before anybody writes
    if share:
        path = run.part(state.process_index)
        with Part(path, ends.get(path, 0)) as part:
            model, processor = load()
            asked = [requests[index] for index in share]
            with progress(len(share), run.output, state) as bar:
                for answered in answer_batches(model, processor, asked, batch_size, workers, generate_kwargs):
                    part.append([row(request, answer_name, *result) for request, *result in answered])
                    bar.update(len(answered))
    state.wait_for_everyone()
    if state.is_main_process:
        if pending or run.parts():
            run.merge(requests, state.num_processes)
        else:
            print(f"{run.output} is finished: {len(requests)} rows; nothing to do.", file=sys.stderr)
    state.wait_for_everyone()
    return run.output


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


def default_device() -> str:
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def versions() -> dict[str, str]:
    import transformers

    return {"pheye": pheye.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def progress(images: int, output: Path, state: "PartialState") -> tqdm:
    """A bar over the main process's own share: what the others have done is known only at the end."""
    others = f", process 1 of {state.num_processes}" if state.num_processes > 1 else ""
    return tqdm(total=images, desc=output.name + others, unit=" images", disable=not state.is_main_process)


# --- Images to answers ---


class Pictures(torch.utils.data.Dataset):
    """`pixel_values` (V, 3, height, width) of each request's image, or a text: what is wrong with it."""

    def __init__(self, processor, requests: Sequence[Request]):
        self.processor, self.requests = processor, requests

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            image = self.requests[index].image
            image = image() if callable(image) else image
            if image is None:
                raise ValueError("There is no image.")
            return self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        except (OSError, RuntimeError, TypeError, ValueError) as error:  # RuntimeError: Pillow, for a broken AVIF
            # Without addresses, which would make the row of a broken image another one in each run.
            return re.sub(r"<_io.BytesIO object at \w+>", "the data", str(error)) or type(error).__name__


def collate(pictures: list[torch.Tensor | str]) -> tuple[list[str | None], torch.Tensor | None]:
    """Per picture what is wrong with it, or None; and the others' `pixel_values` (B, V, 3, height, width), if any."""
    errors = [picture if isinstance(picture, str) else None for picture in pictures]
    whole = [picture for picture in pictures if not isinstance(picture, str)]
    return errors, torch.stack(whole) if whole else None


def answer_batches(
    model, processor, requests: Sequence[Request], batch_size: int, workers: int, generate_kwargs: dict
) -> Iterator[list[tuple[Request, str | None, str | None]]]:
    """Batch by batch: each request with its answer or its image's error, the other being None."""
    loader = torch.utils.data.DataLoader(
        Pictures(processor, requests),
        batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=model.device.type == "cuda",
    )
    start = 0
    for errors, pixel_values in loader:
        batch = requests[start : start + len(errors)]
        start += len(errors)
        prompts = [request.prompt for request, error in zip(batch, errors, strict=True) if error is None]
        answers = iter(generate(model, processor, prompts, pixel_values, generate_kwargs) if prompts else [])
        yield [
            (request, next(answers) if error is None else None, error)
            for request, error in zip(batch, errors, strict=True)
        ]


def generate(model, processor, prompts: list[str], pixel_values: torch.Tensor, generate_kwargs: dict) -> list[str]:
    """One answer per prompt and image."""
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    inputs = processor(text=texts, return_tensors="pt").to(model.device)
    pixel_values = pixel_values.to(model.device, non_blocking=True)
    ids = model.generate(**inputs, pixel_values=pixel_values, **generate_kwargs, return_dict_in_generate=False)
    answers = processor.post_process_image_text_to_text(ids[:, inputs["input_ids"].shape[1] :])
    return [answer.lstrip() for answer in answers]


# --- Rows and files ---


def row(request: Request, answer_name: str, text: str | None, error: str | None) -> dict:
    result = {answer_name: text} if error is None else {"error": error}
    return {"id": request.id, **request.fields, **result}


def encode(row: dict) -> bytes:
    """`row` as a line."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # from a file name that is not UTF-8
        return json.dumps(row).encode() + b"\n"


def scan(path: Path) -> tuple[dict[str | int, int], int]:
    """Where the row of each id begins, and where the whole rows end: a kill may have torn the last line."""
    offsets, end = {}, 0
    with path.open("rb") as file:
        for line in file:
            try:
                row_id = json.loads(line)["id"] if line.endswith(b"\n") else None
            except (KeyError, TypeError, ValueError):
                break
            if row_id is None:
                break
            offsets[row_id] = end
            end += len(line)
    return offsets, end


def explained(error: OSError, path: Path) -> OSError:
    """`error` of writing `path`, with what to do."""
    remedy = "Mend this and run the same command again; the rows written so far are whole and kept."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "Free some space and run the same command again; the rows written so far are whole and kept."
    return OSError(f"{path} could not be written: {error.strerror or error}. {remedy}")


def write_atomically(path: Path, chunks: Iterable[bytes]):
    """`path` with this content, or as it was before."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise explained(error, path) from error


class Part:
    """The file that one process appends rows to, from `end` on; what stands behind is cut off."""

    def __init__(self, path: Path, end: int):
        self.path, self.end = path, end

    def __enter__(self) -> "Part":
        # Unbuffered, so that nothing is left to be written after an error.
        self.file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        self._lock()
        self.file.truncate(self.end)
        self.file.seek(self.end)
        return self

    def __exit__(self, *exception):
        self.file.close()

    def _lock(self):
        """Until the process ends, however it does; its children do not hold it."""
        if fcntl is None:
            return
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self.file.close()
            raise InputError(
                f"Another process is still writing {self.path}; wait until it has ended, or end it."
            ) from error
        except OSError:  # a file system without locks
            pass

    def append(self, rows: list[dict]):
        """All of `rows`, on disk when this returns; none of them if writing fails."""
        left = memoryview(b"".join(map(encode, rows)))
        size = len(left)
        try:
            while left:
                left = left[self.file.write(left) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            self.file.truncate(self.end)
            raise explained(error, self.path) from error
        self.end += size


class Run:
    """The files of one run: the output, its parts, and the record of its settings."""

    def __init__(self, output: Path):
        self.output = output
        self.record = output.with_name(f"{output.name}.run.json")

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
        remedy = f"Choose another output, or remove {self.output} and the files beside it whose names begin so."
        if self.output.is_dir():
            raise InputError(f"{self.output} is a folder; give the name of a file.")
        if not self.record.exists():
            if self.output.exists() or self.parts():
                raise InputError(
                    f"{self.output} has no {self.record.name}, so that nobody knows its settings. {remedy}"
                )
            return
        try:
            recorded = json.loads(self.record.read_bytes())["settings"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.record} is not a record of settings. {remedy}") from error
        if changed := differences(recorded, settings):
            raise InputError(f"{self.output} was begun with other settings: {changed}. {remedy}")

    def begin(self, settings: dict, details: dict):
        """Record what this run depends on; if that is done, warn where details differ, which should not matter."""
        if self.record.exists():
            recorded = json.loads(self.record.read_bytes()).get("details", {})
            if changed := differences(recorded, details):
                message = f"{self.output} was begun differently: {changed}; answers may differ a little."
                warnings.warn(message, stacklevel=3)
        else:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"settings": settings, "details": details}, indent=2, default=str)
            write_atomically(self.record, [text.encode() + b"\n"])

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
                offsets, ends[path] = scan(path)
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
            path.unlink()
        with self.output.open("rb") as file:
            errors = sum("error" in json.loads(line) for line in file)
        print(f"Wrote {self.output}: {len(requests)} rows, {errors} of them errors.", file=sys.stderr)


def lines(places: list[tuple[Path, int]]) -> Iterator[bytes]:
    """The lines that begin at these offsets of these files."""
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb")) for path in {path for path, _ in places}}
        for path, offset in places:
            files[path].seek(offset)
            yield files[path].readline()


def differences(old: dict, new: dict) -> str:
    """What differs between two records, in words; empty if nothing does."""
    new = json.loads(json.dumps(new, default=str))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)!r} and is now {new.get(name)!r}" for name in names)
