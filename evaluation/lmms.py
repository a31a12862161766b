"""Pheye as a model of lmms-eval, which finds it by the entry point `lmms_eval.models` of this package.

    lmms-eval --model pheye --model_args pretrained=FOLDER_OR_ID --tasks textvqa_val --batch_size 8 --output_path OUT

lmms-eval loads the data, deals the requests out to the processes, and scores; the answers are those of `answering`.
"""

import functools
import json
import logging
import multiprocessing
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from tqdm import tqdm
from transformers import GenerationConfig

from ..answering.engine import answer_batches, default_workers, open_model
from ..answering.rows import Request
from ..common.command import DTYPES, InputError, process_state
from ..common.images import tried
from ..pipeline_pheye import DEFAULT_MAX_NEW_TOKENS

try:
    from lmms_eval.api.model import lmms
except ModuleNotFoundError as error:
    if error.name != "lmms_eval":
        raise
    lmms = object  # so that all the rest can be tested without it

logger = logging.getLogger(__name__)  # not `warnings`: lmms-eval silences them all

IMAGE_TOKEN = "<image>"  # tasks put it where other models want an image; of one alone, Pheye's prompt has no trace
SAMPLING = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0}  # of no use to a greedy answer, with neutral values


class RefusedTask(InputError):
    """A task that Pheye cannot do. No other error, which would count as one broken image and an empty answer."""


def manifest():
    """What lmms-eval's registry asks an entry point for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="pheye", simple_class_path=f"{__name__}.{Pheye.__name__}")


# --- A task's words in ours ---


def prompt_of(context: str) -> str:
    """The user's turn about one image."""
    return context.replace(IMAGE_TOKEN, "").strip()


@dataclass
class Marked(Request):
    """A request whose prompt has a mark where each image stands: of several images, each gets its number there, or in
    front if the marks are not as many."""

    context: str = ""

    def messages(self, images: int = 1) -> list[dict]:
        texts = self.context.strip().split(IMAGE_TOKEN)
        if images < 2 or len(texts) != images + 1:
            return super().messages(images)
        parts = [{"type": "text", "text": texts[0]}]
        for text in texts[1:]:
            parts += [{"type": "image"}, {"type": "text", "text": text.removeprefix("\n").removeprefix(" ")}]
        return [{"role": "user", "content": parts}]


def decoding(gen_kwargs: dict) -> tuple[dict, list[str]]:
    """Arguments of `generate`, and the texts that end an answer, from the `generation_kwargs` of a task.

    An answer is sampled if `do_sample` says so or, where nothing does, if there is a temperature; never at zero.
    """
    given = {name: value for name, value in gen_kwargs.items() if value is not None}
    until = given.pop("until", [])
    until = [until] if isinstance(until, str) else until
    if given.get("num_return_sequences", 1) != 1:
        raise InputError("num_return_sequences must be 1: a request has one answer.")
    temperature = given.get("temperature")
    samples = bool(given.get("do_sample", temperature)) and temperature != 0
    known = GenerationConfig()
    ignored = {name for name in given if not hasattr(known, name) and name != "vision_budget"}
    if not samples:
        ignored |= {name for name, neutral in SAMPLING.items() if given.get(name, neutral) != neutral}
        given = {name: value for name, value in given.items() if name not in SAMPLING}
    if ignored:
        logger.warning("%s in %s change nothing here.", ", ".join(sorted(ignored)), gen_kwargs)
    arguments = {name: value for name, value in given.items() if name not in ignored}
    if "max_length" not in arguments:
        arguments.setdefault("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
    return {**arguments, "do_sample": samples}, [text for text in until if text]


def cut(answer: str, until: Sequence[str]) -> str:
    """`answer` up to the first of the texts `until`."""
    for text in until:
        answer = answer.partition(text)[0]
    return answer


def only_images(visuals: Sequence | None, where: str, max_images: int = 1) -> list[Image.Image]:
    """The images in what a task shows, of which there is at least one; `where` names the document.

    Raises:
        RefusedTask: if it shows anything else, or more than the model takes.
    """
    visuals = list(visuals or [])
    if 0 < len(visuals) <= max_images and all(isinstance(visual, Image.Image) for visual in visuals):
        return visuals
    kinds = ", ".join(sorted({type(visual).__name__ for visual in visuals}))
    shown = f"{len(visuals)} objects ({kinds})" if visuals else "no image"
    takes, has = ("exactly one image", "a single image")
    if max_images > 1:
        takes, has = f"one image to {max_images} (max_images)", "as many images"
    raise RefusedTask(
        f"{where} shows {shown}, but this Pheye answers about {takes}: leave this task out, or give one of your own "
        f"by --include_path that has only the documents with {has}."
    )


def document_images(documents, doc_id: int, doc_to_visual, where: str, max_images: int) -> list[Image.Image]:
    return only_images(doc_to_visual(documents[doc_id]), where, max_images)


# --- The model ---


class Pheye(lmms):
    """What lmms-eval calls; the arguments are those of `--model_args`, `--batch_size` and `--device`.

    Args:
        pretrained: folder or Hub id.
        dtype: auto, float32, bfloat16 or float16.
        workers: processes that open and preprocess images; by default 4 beside an accelerator, and none on a CPU.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        workers: int | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"batch_size={batch_size} must be a number of at least 1; it is not chosen for you.")
        if max_batch_size is not None:
            logger.warning("max_batch_size=%s changes nothing: batches have batch_size.", max_batch_size)
        if dtype not in DTYPES:
            raise InputError(f"dtype={dtype} must be one of {', '.join(DTYPES)}.")
        state = process_state(device)
        self.batch_size = int(batch_size)
        self._device = torch.device(device or state.device)
        self._rank, self._world_size = state.process_index, state.num_processes
        if workers is None:  # what tasks define can only be inherited by a process, not sent to it
            inherited = multiprocessing.get_start_method() == "fork"
            workers = default_workers(self._device) if inherited else 0
        self.workers = workers
        revision = None if revision is None else str(revision)  # lmms-eval makes numbers of texts that look so
        _, load = open_model(pretrained, revision, dtype, self._device)
        self.model, self.processor = load()

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def chat_template(self):
        raise InputError("Leave --apply_chat_template out: Pheye's prompt is always put around the question.")

    def generate_until(self, requests: list) -> list[str]:
        """The answers, in the order of `requests`; empty where an image cannot be read, with a warning."""
        self.check(requests)
        groups = defaultdict(list)  # a batch has one set of decoding arguments
        for index, instance in enumerate(requests):
            groups[json.dumps(instance.args[1], sort_keys=True)].append(index)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="Model Responding", unit=" images", disable=self._rank != 0) as bar:
            for indices in groups.values():
                arguments, until = decoding(requests[indices[0]].args[1])
                # In the order of the documents: in most tasks, those about one image follow each other, and a batch
                # encodes equal images once.
                asked = [self.request(index, requests[index]) for index in indices]
                batches = answer_batches(self.model, self.processor, asked, self.batch_size, self.workers, arguments)
                for batch in batches:
                    for request, text, error, _ in batch:
                        if error is not None:
                            logger.warning("%s gets an empty answer: %s", where(requests[request.id]), error)
                        answers[request.id] = cut(text or "", until)
                    bar.update(len(batch))
        return answers

    def check(self, requests: list):
        """Raise RefusedTask before the first answer if a task begins with a document that Pheye cannot see."""
        first = {}
        for index, instance in enumerate(requests):
            first.setdefault(instance.args[4:], (index, instance))
        for index, instance in first.values():
            tried(self.request(index, instance).image)  # one broken image does not matter

    def request(self, index: int, instance) -> Request:
        context, _, doc_to_visual, doc_id, task, split = instance.args
        documents = self.task_dict[task][split]
        most = self.processor.image_processor.max_images
        images = functools.partial(document_images, documents, doc_id, doc_to_visual, where(instance), most)
        return Marked(index, images, prompt_of(context), context=context)

    def loglikelihood(self, requests: list):
        raise NotImplementedError(refusal(requests, "compares likelihoods"))

    def generate_until_multi_round(self, requests: list):
        raise NotImplementedError(refusal(requests, "asks in several rounds"))


def where(instance) -> str:
    """A document, for messages."""
    *_, doc_id, task, _ = instance.args
    return f"Document {doc_id} of {task}"


def refusal(requests: list, what: str) -> str:
    task = requests[0].args[-2] if requests else "The task"
    return f"{task} {what}, which is not implemented for Pheye: choose tasks whose output_type is generate_until."
