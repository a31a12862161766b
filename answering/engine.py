"""Answers to many prompts about many images: in batches, on every device, and whole again after a kill.

Each process answers a share of the requests and appends rows, lines of JSON, to a part file of its own beside the
output; when all have finished, the parts become the output, in the order of the requests. A row counts as soon as its
line is whole, so the same call after a kill goes on where the rows end, with any number of processes.
"""

import os
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

if TYPE_CHECKING:
    from accelerate import PartialState
from ..common.command import InputError, Interrupted, process_state
from ..common.images import tried
from ..common.machine import versions
from ..common.models import find_model
from ..image_processing_pheye import pad_rows
from ..layers_pheye import CACHE
from .rows import Part, Request, Run, check_requests, row


def open_model(
    model: str, revision: str | None, dtype: str, device: torch.device | str
) -> tuple[str, Callable[[], tuple]]:
    """What tells this model from others of its name (`find_model`); and a function that loads it onto `device`, and
    its processor. The classes are this package's: no code of the repository is run.

    Raises:
        InputError: if it is no Pheye.
    """
    identity = find_model(model, revision)
    where = {} if os.path.isdir(model) else {"revision": identity}

    def load() -> tuple:
        from .. import PheyeForConditionalGeneration, PheyeProcessor

        loaded = PheyeForConditionalGeneration.from_pretrained(model, dtype=dtype, **where)
        return loaded.to(device), PheyeProcessor.from_pretrained(model, **where)

    return identity, load


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
    """Write one line of JSON per request into `output`: `id`, its `fields`, and the answer, or `error` if an image
    cannot be read or there are more than the model takes; where the model has budgets, also `vision_budget`, the one
    taken. Every process of a launch makes this call.

    Args:
        load: gives the model, on its device, and the processor; called only where something is left to answer.
        batch_size: requests at once.
        generate_kwargs: decoding arguments, one answer per request.
        settings: what else the answers depend on, recorded in `<output>.run.json`; rows of a run with other settings
            are never continued.
        workers: processes that open and preprocess images while the model computes.
        answer_name: key of the answer in a row.

    Raises:
        InputError: if ids are not unique, a number is out of range, or the files beside `output` are of another run.
        OSError: if a row cannot be written; the rows before it are whole.
        Interrupted: if the user stops it; the rows before are kept.
    """
    check_requests(requests)
    if batch_size < 1 or workers < 0:
        raise InputError(f"batch_size={batch_size} must be at least 1 and workers={workers} at least 0.")
    if generate_kwargs.get("num_return_sequences", 1) != 1:
        raise InputError("num_return_sequences must be 1: a row holds one answer.")

    def rows_of(model, processor, asked: list[Request]) -> Iterator[list[dict]]:
        for answered in answer_batches(model, processor, asked, batch_size, workers, generate_kwargs):
            yield [row(request, answer_name, *result) for request, *result in answered]

    run, settings = Run(Path(output), answer_name), {**settings, "generate_kwargs": generate_kwargs}
    return write_rows(load, requests, run, rows_of, settings, batch_size, in_order(requests))


def in_order(requests: Sequence[Request]) -> list[Request]:
    """The order in which requests are taken: those about one image together, so that it is encoded once; of these the
    longest prompts first, so that memory runs out early if at all, and little is padded."""
    longest: dict[Hashable, int] = {}
    for request in requests:
        longest[request.subject] = max(longest.get(request.subject, 0), len(request.prompt))
    first = {subject: number for number, subject in enumerate(longest)}

    def place(request: Request) -> tuple[int, int, int]:
        return -longest[request.subject], first[request.subject], -len(request.prompt)

    return sorted(requests, key=place)


def write_rows(
    load: Callable[[], tuple],
    requests: Sequence[Request],
    run: Run,
    rows_of: Callable[..., Iterator[list[dict]]],
    settings: dict,
    batch_size: int,
    ordered: Sequence[Request] | None = None,
    facts: dict | None = None,
) -> Path:
    """Write the row of each request, those that are not written yet, and join what all processes wrote.

    Args:
        rows_of: given model, processor and requests, gives their rows, some at a time.
        settings: what the rows depend on.
        batch_size: how many neighbours go to one process.
        ordered: the requests in the order in which they are taken, if it is another.
        facts: what else is recorded of the run.
    """
    state = process_state()
    facts = {"versions": versions(), **(facts or {}), "batch_size": batch_size, "processes": state.num_processes}
    run.start(state, settings, facts)
    try:
        write_rest(load, requests, run, state, rows_of, batch_size, ordered or requests)
    except KeyboardInterrupt as stop:
        raise Interrupted(run.kept(requests)) from stop
    return run.output


def write_rest(load, requests, run: Run, state: "PartialState", rows_of, batch_size: int, ordered: Sequence[Request]):
    rows, ends = run.read()
    pending = [request for request in ordered if request.id not in rows]
    share = share_of(pending, batch_size, state)
    state.wait_for_everyone()  # all have read before anybody writes
    if share:
        path = run.part(state.process_index)
        with Part(path, ends.get(path, 0)) as part:
            model, processor = load()
            with progress(len(share_of(requests, batch_size, state)), len(share), run.output, state) as bar:
                for written in rows_of(model, processor, share):
                    part.append(written)
                    if state.is_main_process:
                        run.record_again()
                    bar.update(len(written))
            part.restore()
    state.wait_for_everyone()
    if state.is_main_process:
        if pending or run.parts() or not run.is_clean:
            run.record_again()
            run.merge(requests, state.num_processes)
        else:
            print(run.finished(requests, rows), file=sys.stderr)
    state.wait_for_everyone()


def share_of(requests: Sequence[Request], batch_size: int, state: "PartialState") -> list[Request]:
    """Every so many-th batch, as there are processes."""
    return [
        request
        for number, request in enumerate(requests)
        if number // batch_size % state.num_processes == state.process_index
    ]


def progress(share: int, left: int, output: Path, state: "PartialState") -> tqdm:
    """A bar over the main process's own share, which goes on where the last run ended: what the others have done is
    known only at the end.

    left: what is left of the share.
    """
    others = f", process 1 of {state.num_processes}" if state.num_processes > 1 else ""
    return tqdm(
        total=share,
        initial=share - left,
        desc=output.name + others,
        unit=" images",
        disable=not state.is_main_process,
    )


# --- Images to answers ---


def default_workers(device: torch.device | str) -> int:
    """How many processes open images beside the model; none on a CPU, whose cores the model itself keeps busy."""
    return 0 if torch.device(device).type == "cpu" else 4


class ImageInputs(torch.utils.data.Dataset):
    """What the image processor makes of each request's images, one tensor by name each, nothing where there are none,
    or a text: what is wrong."""

    def __init__(self, processor, requests: Sequence[Request]):
        self.processor, self.requests = processor, requests

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor] | str:
        inputs, error = tried(partial(self.read, self.requests[index]))
        return inputs if error is None else error

    def read(self, request: Request) -> dict[str, torch.Tensor]:
        images, image_processor = request.images(), self.processor.image_processor
        if any(image is None for image in images):
            raise ValueError("There is no image.")
        if len(images) > image_processor.max_images:
            raise ValueError(
                f"It has {len(images)} images, and the model takes {image_processor.max_images} (max_images)."
            )
        if not images:
            return {}
        inputs = self.processor(images=[images], return_tensors="pt")
        return {name: inputs[name][0] for name in image_processor.model_input_names}


def collate(
    rows: list[dict[str, torch.Tensor] | str], tiles_per_side: int
) -> tuple[list[str | None], dict[str, torch.Tensor]]:
    """Per row what is wrong with its images, or None; and the tensors of the others as a batch, empty if none of them
    has an image."""
    errors = [row if isinstance(row, str) else None for row in rows]
    whole = [row for row in rows if not isinstance(row, str)]
    some = next((row for row in whole if row), None)
    if some is None:
        return errors, {}
    if not all(whole):  # then grids say which rows have an image; an image that comes without is a square
        square = {"image_grids": torch.tensor([[tiles_per_side, tiles_per_side]])}
        none = {name: values[:0] for name, values in {**square, **some}.items()}
        whole = [{**square, **row} if row else none for row in whole]
    return errors, pad_rows(whole)


def counts_of(image_inputs: dict[str, torch.Tensor], rows: int) -> list[int]:
    """How many images each row of a batch has."""
    if "image_grids" in image_inputs:
        return image_inputs["image_grids"].all(-1).sum(-1).tolist()
    return [1 if image_inputs else 0] * rows


def same_images(image_inputs: dict[str, torch.Tensor]) -> list[int]:
    """For each row of a batch the first row that has the same images."""
    found: list[int] = []
    for number in range(len(next(iter(image_inputs.values()), []))):
        alike = (
            other
            for other in dict.fromkeys(found)
            if all(torch.equal(values[number], values[other]) for values in image_inputs.values())
        )
        found.append(next(alike, number))
    return found


@torch.no_grad()
def encoded(model, image_inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Images as features, which can be read at any budget. Those that several rows share are encoded once."""
    first = same_images(image_inputs)
    distinct = list(dict.fromkeys(first))
    images = {name: values[distinct].to(model.device) for name, values in image_inputs.items()}
    places = [distinct.index(row) for row in first]
    found = {"image_hidden_states": model.get_image_features(**images).last_hidden_state[places]}
    if "image_grids" in image_inputs:
        found["image_grids"] = image_inputs["image_grids"].to(model.device)
    return found


def answer_batches(
    model, processor, requests: Sequence[Request], batch_size: int, workers: int, generate_kwargs: dict
) -> Iterator[list[tuple[Request, str | None, str | None, int | None]]]:
    """Batch by batch: each request with its answer or the error of its images, the other being None, and the budget
    at which its images were read, if there is one."""
    loader = torch.utils.data.DataLoader(
        ImageInputs(processor, requests),
        batch_size,
        num_workers=workers,
        collate_fn=partial(collate, tiles_per_side=processor.image_processor.tiles_per_side),
        pin_memory=model.device.type == "cuda",
    )
    start = 0
    for errors, image_inputs in loader:
        batch = requests[start : start + len(errors)]
        start += len(errors)
        whole = [request for request, error in zip(batch, errors, strict=True) if error is None]
        counts = counts_of(image_inputs, len(whole))
        asked = [request.messages(count) for request, count in zip(whole, counts, strict=True)]
        first = same_images(image_inputs)
        if len(set(first)) < len(first):
            image_inputs = encoded(model, image_inputs)
        answers = iter(generate(model, processor, asked, image_inputs, generate_kwargs) if asked else [])
        answered = []
        for request, error in zip(batch, errors, strict=True):
            text, budget = next(answers) if error is None else (None, None)
            answered.append((request, text, error, budget))
        yield answered


def generate(
    model, processor, conversations: list[list[dict]], image_inputs: dict[str, torch.Tensor], generate_kwargs: dict
) -> list[tuple[str, int | None]]:
    """One answer per conversation, and the budget at which its images were read, if there is one."""
    # As plain texts, which do not ask for the images that come beside them.
    texts = [str(processor.apply_chat_template(messages, add_generation_prompt=True)) for messages in conversations]
    inputs = processor(text=texts, return_tensors="pt").to(model.device)
    image_inputs = {name: values.to(model.device, non_blocking=True) for name, values in image_inputs.items()}
    try:
        output = model.generate(**inputs, **image_inputs, **generate_kwargs, return_dict_in_generate=True)
    except ValueError as error:  # a prompt that is too long, or arguments that do not go together
        raise InputError(
            f"{error} The first prompt of the batch: {conversations[0][-1]['content'][:200]!r}"
        ) from error
    answers = processor.post_process_image_text_to_text(output.sequences[:, inputs["input_ids"].shape[1] :])
    cache = output.get(CACHE)
    budgets = None if cache is None else model.model.vision_budget_of(cache)
    return [
        (answer.lstrip(), None if budgets is None or budgets[row] < 0 else budgets[row])
        for row, answer in enumerate(answers)
    ]


def is_cut(model, ids: torch.Tensor, max_new_tokens: int) -> bool:
    """Whether an answer, the ids of its tokens, has been ended by its length alone."""
    ends = model.generation_config.eos_token_id
    return len(ids) == max_new_tokens and ids[-1].item() not in (ends if isinstance(ends, list) else [ends])
