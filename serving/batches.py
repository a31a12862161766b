"""Answers to requests that come at any time: those that wait are answered together, by one call of `generate`.

Each row has its own settings, its own draws and its own end, so an answer does not depend on what it was answered
with. One thread calls the model. The others give it jobs, and get pieces of text back.

Shapes: R rows of a batch, T tokens, N image tokens, D width.
"""

import hashlib
import sys
import threading
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ..image_processing_pheye import check_images, pad_rows
from ..visor_pheye import read_budgets
from .protocol import ChatRequest, RequestError

CACHED_BYTES = 256 * 2**20  # of images that were encoded
LONGEST_PROMPT = 2**18  # characters; the tokenizer takes seconds for millions
LONGEST_TEXT = 2**17  # tokens, of a language model whose positions have no end


@dataclass
class End:
    """How an answer ended: by "stop" or "length", after so many tokens; or by an error."""

    reason: str
    tokens: int = 0
    error: Exception | None = None


class Job:
    """A request on its way: its tokens, its image, and where its answer goes.

    send: called with each piece of text, and last with the `End`; by the thread that calls the model.
    images: what tells its images from others; None without any. image_inputs: what the image processor made of them;
    None where `features` are there.
    """

    def __init__(
        self,
        request: ChatRequest,
        ids: list[int],
        longest: int,
        images: str | None,
        image_inputs: dict[str, torch.Tensor] | None,
        features: dict[str, torch.Tensor] | None,
        send: Callable[[str | End], None],
    ):
        self.request, self.ids, self.longest, self.send = request, ids, longest, send
        self.images, self.image_inputs, self.features = images, image_inputs, features
        self.is_abandoned = False  # set by whoever no longer wants the answer

    @property
    def kind(self) -> tuple[bool, bool]:
        """What jobs of a batch have in common, because one call of `generate` has it for all rows or for none."""
        return self.images is None, self.request.vision_budget is None

    def fail(self, error: Exception):
        self.send(End("error", error=error))


class Answer:
    """The text of one row while it is made."""

    def __init__(self, job: Job, tokenizer, ends: set[int]):
        self.job, self.tokenizer, self.ends = job, tokenizer, ends
        self.ids: list[int] = []
        self.begin = self.read = 0  # tokens from `begin` to `read` are text already, and say how the next ones look
        self.kept = ""  # text that may be the beginning of a stop sequence
        self.has_begun = self.has_ended = False

    def add(self, token: int) -> bool:
        """Whether the answer has ended, with this token or before."""
        if self.has_ended or self.job.is_abandoned:
            return True
        self.ids.append(token)
        is_end = token in self.ends
        is_cut = len(self.ids) >= self.job.longest
        is_stopped = self.give(self.text_of_new(is_end or is_cut), is_end or is_cut)
        self.has_ended = is_end or is_cut or is_stopped
        if self.has_ended:
            self.job.send(End("stop" if is_end or is_stopped else "length", len(self.ids)))
        return self.has_ended

    def text_of_new(self, is_last: bool) -> str:
        """The text that the newest tokens add; empty while they are half a character."""
        before = self.tokenizer.decode(self.ids[self.begin : self.read], skip_special_tokens=True)
        text = self.tokenizer.decode(self.ids[self.begin :], skip_special_tokens=True)
        if len(text) <= len(before) or (text.endswith("\N{REPLACEMENT CHARACTER}") and not is_last):
            return ""
        self.begin, self.read = self.read, len(self.ids)
        text = text[len(before) :]
        text = text if self.has_begun else text.lstrip()
        self.has_begun |= bool(text)
        return text

    def give(self, text: str, is_last: bool) -> bool:
        """Send what cannot be the beginning of a stop sequence; whether one has come."""
        text = self.kept + text
        found = [place for stop in self.job.request.stop if (place := text.find(stop)) >= 0]
        keep = 0
        if found:
            text = text[: min(found)]
        elif not is_last:
            ends = (stop[:length] for stop in self.job.request.stop for length in range(1, len(stop)))
            keep = max((len(end) for end in ends if text.endswith(end)), default=0)
        now, self.kept = text[: len(text) - keep], text[len(text) - keep :]
        if now:
            self.job.send(now)
        return bool(found)


class Draws(LogitsProcessor):
    """Draws the next token of each row that asks for it from the row's own generator, and makes it the likeliest."""

    def __init__(self, requests: list[ChatRequest]):
        self.rows = {}
        for row, request in enumerate(requests):
            if request.temperature > 0:
                warpers = LogitsProcessorList([TemperatureLogitsWarper(float(request.temperature))])
                if request.top_p < 1:
                    warpers.append(TopPLogitsWarper(float(request.top_p)))
                generator = torch.Generator()  # on the CPU, so that a seed means the same on every device
                generator.seed() if request.seed is None else generator.manual_seed(request.seed)
                self.rows[row] = warpers, generator

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:  # (R, T), (R, V)
        scores = scores.clone()
        for row, (warpers, generator) in self.rows.items():
            warped = warpers(input_ids[row : row + 1], scores[row : row + 1])
            token = torch.multinomial(warped.float().softmax(-1).cpu(), 1, generator=generator).item()
            scores[row] = -torch.inf
            scores[row, token] = 0
        return scores


class Follow(StoppingCriteria):
    """Gives each row's new token to its answer, and ends the rows that have ended."""

    def __init__(self, answers: list[Answer], is_closed: threading.Event):
        self.answers, self.is_closed = answers, is_closed

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        if self.is_closed.is_set():
            return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        tokens = input_ids[:, -1].tolist()
        ended = [answer.add(token) for answer, token in zip(self.answers, tokens, strict=True)]
        return torch.tensor(ended, device=input_ids.device)


class Worker:
    """The thread that calls the model.

    Args:
        batch_size: the most rows of a call.
    """

    def __init__(self, model, processor, batch_size: int):
        self.model, self.processor, self.batch_size = model, processor, batch_size
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.waiting: deque[Job] = deque()
        self.features: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()  # the latest last
        self.tokenizing = threading.Lock()  # fast tokenizers refuse a second caller while one sets their options
        self.changed = threading.Condition()
        self.is_closed = threading.Event()
        self.thread = threading.Thread(target=self.run, name="model")
        self.thread.start()

    # --- Called by other threads ---

    def prepare(self, request: ChatRequest, send: Callable[[str | End], None]) -> Job:
        """A job; its images are opened and cut here, unless they were encoded lately.

        Raises:
            RequestError: if an image cannot be read, or the messages or the budget do not fit the model.
        """
        if request.vision_budget is not None:
            self.check_budget(request)
        try:
            with self.tokenizing:
                text = str(self.processor.apply_chat_template(request.messages, add_generation_prompt=True))
                if len(text) > LONGEST_PROMPT:
                    raise ValueError(f"The text has {len(text)} characters; shorten the prompt.")
                text.encode()  # says in words what is wrong with half a character
                ids = self.processor.tokenizer(text)["input_ids"]
            longest = request.max_tokens
            left = self.model.model.positions_left(len(ids))
            if left is None:  # positions without an end
                left = LONGEST_TEXT - len(ids)
            longest = min(longest, max(left, 1))
            images = image_inputs = features = None
            if request.images:
                check_images([request.images], self.processor.image_processor.max_images)
                images = hashlib.sha256(b"".join(hashlib.sha256(one).digest() for one in request.images)).hexdigest()
                features = self.features.get(images)
                if features is None:
                    inputs = self.processor.image_processor([request.images], return_tensors="pt")
                    image_inputs = {name: values[0] for name, values in inputs.items()}
        except (ValueError, TypeError, TemplateError) as error:
            raise RequestError(str(error), param="messages") from error
        return Job(request, ids, longest, images, image_inputs, features, send)

    def check_budget(self, request: ChatRequest):
        if not request.images:
            raise RequestError("vision_budget is given without an image; leave it out.", param="vision_budget")
        try:
            read_budgets(request.vision_budget, [True], self.model.config.self_attention_budgets)
        except ValueError as error:
            raise RequestError(str(error), param="vision_budget") from error

    def put(self, job: Job):
        with self.changed:
            self.waiting.append(job)
            self.changed.notify()

    def close(self):
        """End all answers, and the thread."""
        self.is_closed.set()
        with self.changed:
            self.changed.notify()
        self.thread.join()

    # --- The thread ---

    @torch.inference_mode()
    def run(self):
        while batch := self.take():
            try:
                self.answer(batch)
            except Exception as error:  # the server goes on
                traceback.print_exc(file=sys.stderr)
                for job in batch:
                    job.fail(error)

    def take(self) -> list[Job]:
        """The next batch, when there is one; an empty one at the end."""
        with self.changed:
            while not self.is_closed.is_set():
                wanted = [job for job in self.waiting if not job.is_abandoned]
                batch: list[Job] = []
                for job in wanted:
                    if len(batch) < self.batch_size and self.fits(job, batch):
                        batch.append(job)
                self.waiting = deque(job for job in wanted if job not in batch)
                if batch:
                    return batch
                self.changed.wait()
            return []

    def fits(self, job: Job, batch: list[Job]) -> bool:
        """Whether the job has images and a budget as the others have or has not, and none of them would be cut short:
        all prompts of a batch are padded to the longest, and take its positions."""
        if batch and job.kind != batch[0].kind:
            return False
        jobs = [*batch, job]
        longest = max(len(one.ids) for one in jobs) + max(one.longest for one in jobs)
        positions = self.model.config.text_positions
        return not batch or positions is None or longest <= positions

    def answer(self, batch: list[Job]):
        for job in batch:
            if job.images is not None and not job.is_abandoned and not self.is_closed.is_set():
                self.encode(job)
        batch = [job for job in batch if not job.is_abandoned]
        answers = [Answer(job, self.processor.tokenizer, self.ends) for job in batch]
        if batch and not self.is_closed.is_set():
            self.model.generate(
                **self.text_inputs(batch),
                **self.image_inputs(batch),
                max_new_tokens=max(job.longest for job in batch),
                logits_processor=LogitsProcessorList([Draws([job.request for job in batch])]),
                stopping_criteria=StoppingCriteriaList([Follow(answers, self.is_closed)]),
                do_sample=False,
                num_beams=1,
            )
        for answer in answers:
            if not answer.has_ended:
                answer.job.fail(RequestError("The server is shutting down.", status=503))

    def text_inputs(self, batch: list[Job]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` (R, T), padded on the left."""
        width = max(len(job.ids) for job in batch)
        pad = self.processor.tokenizer.pad_token_id
        ids = [[pad] * (width - len(job.ids)) + job.ids for job in batch]
        mask = [[0] * (width - len(job.ids)) + [1] * len(job.ids) for job in batch]
        return {
            "input_ids": torch.tensor(ids, device=self.model.device),
            "attention_mask": torch.tensor(mask, device=self.model.device),
        }

    def image_inputs(self, batch: list[Job]) -> dict[str, torch.Tensor]:
        """`image_hidden_states` (R, N, D), or (1, N, D) where all rows are about one image and read it as closely;
        `image_grids`, where the model has them; and `vision_budget` (R,) or (1,), where the requests have one."""
        if batch[0].images is None:
            return {}
        different = {(job.images, job.request.vision_budget): job for job in batch}
        has_budget = batch[0].request.vision_budget is not None
        # Rows about one image would get the largest budget that a router chooses for any of them.
        is_shared = len(different) == 1 and (has_budget or self.model.model.router is None)
        jobs = list(different.values()) if is_shared else batch
        inputs = pad_rows([job.features for job in jobs])
        if has_budget:
            budgets = [job.request.vision_budget for job in jobs]
            inputs["vision_budget"] = torch.tensor(budgets, device=self.model.device)
        return inputs

    def encode(self, job: Job):
        """Give a job the features of its images, which are encoded once. One job goes after the other: the views of an
        image are a batch already, and those of several would need the memory of all."""
        features = job.features or self.features.get(job.images)
        if features is None:
            inputs = {name: values[None].to(self.model.device) for name, values in job.image_inputs.items()}
            features = {"image_hidden_states": self.model.get_image_features(**inputs).last_hidden_state[0]}
            if "image_grids" in inputs:
                features["image_grids"] = inputs["image_grids"][0]
        job.features, job.image_inputs = features, None
        self.features[job.images] = features
        self.features.move_to_end(job.images)
        while sum(one["image_hidden_states"].nbytes for one in self.features.values()) > CACHED_BYTES:
            self.features.popitem(last=False)
