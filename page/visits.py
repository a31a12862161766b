"""What the page holds for each visitor: an image that is encoded once, and the last answer with its attention.

Shapes: L blocks, N image tokens.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from transformers import StoppingCriteria, TextIteratorStreamer

from ..answering.engine import is_cut
from ..common.machine import memory, reset_peak_memory
from ..evaluation.heatmaps import Shares, fit
from ..evaluation.word_attention import AttendedAnswer, attention_by_word, split_words, token_attention
from ..image_opening_pheye import MOST_PIXELS, load_image, name_of
from ..image_processing_pheye import resize, to_rgb
from ..layers_pheye import CACHE
from ..pipeline_pheye import DEFAULT_MAX_NEW_TOKENS

MOST_VISITORS = 32  # whose images are held; the longest unseen one's is encoded anew when he is back
SHOWN = 640  # side of the square whose area an image has under a heat map
LONGEST_QUESTION = 2000  # characters


class Looked:
    """An image as it is drawn under heat maps, and as the model takes it."""

    def __init__(self, processor, path: str, folder: str):
        """Open the file `path`, which must lie in `folder`.

        Raises:
            ValueError: if it holds no image that can be used; the message names no path.
        """
        self.path = path
        try:
            image = to_rgb(load_image(path, sources=folder))
            place = processor.image_processor.place_of(image)
            self.inputs = dict(processor(images=image, return_tensors="pt"))  # features in place of pixels, later
        except ValueError as error:
            raise ValueError(in_words(error, name_of(path))) from error
        view = processor.image_processor.size
        self.grid: tuple[int, int] = (place.rows, place.columns)
        self.shares: Shares = place.shares((view.height, view.width))
        self.shown: Image.Image = resize(image, fit(image.size, SHOWN), Image.Resampling.BICUBIC)
        self.lock = threading.Lock()

    @torch.no_grad()
    def encode(self, model) -> dict[str, torch.Tensor]:
        """What `generate` takes of the image; the first call encodes it."""
        with self.lock:
            if "image_hidden_states" not in self.inputs:
                inputs = {name: values.to(model.device) for name, values in self.inputs.items()}
                features = {"image_hidden_states": model.get_image_features(**inputs).last_hidden_state}
                if "image_grids" in inputs:
                    features["image_grids"] = inputs["image_grids"]
                self.inputs = features
            return self.inputs


def in_words(error: ValueError, name: str) -> str:
    """What is wrong with a picture, for a visitor who has neither its path, `name`, nor Python."""
    if isinstance(error.__cause__, Image.DecompressionBombError):
        return (
            f"The picture is too large: it may have up to {2 * MOST_PIXELS // 10**6} million pixels. Make it smaller."
        )
    text = str(error).replace(name, "The picture", 1).replace(f" {name}", "").replace("The image", "The picture")
    return text.replace(", or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it", "")


@dataclass
class Visit:
    """stop: whether the answer is to end; turn: held while one is made; opening: held while an image is opened;
    answered: the image of the last answer, and its words with their attention (L, N)."""

    stop: threading.Event = field(default_factory=threading.Event)
    turn: threading.Lock = field(default_factory=threading.Lock)
    opening: threading.Lock = field(default_factory=threading.Lock)
    looked: Looked | None = None
    answered: tuple[Looked, list[tuple[str, np.ndarray]]] | None = None


class Visits:
    """The visit of each open page, by its session."""

    def __init__(self):
        self.open, self.lock = OrderedDict(), threading.Lock()

    def of(self, session: str) -> Visit:
        with self.lock:
            visit = self.open.setdefault(session, Visit())
            self.open.move_to_end(session)
            if len(self.open) > MOST_VISITORS:
                # But not one that is being answered, and could no longer be stopped.
                del self.open[next(name for name, other in self.open.items() if not other.turn.locked())]
            return visit

    def close(self, session: str):
        """Free what a closed page held, and end its answer."""
        with self.lock:
            visit = self.open.pop(session, None)
        if visit is not None:
            visit.stop.set()


class Pace(StoppingCriteria):
    """Notes the moment of each token, and ends the answer when it is told to, or when nobody reads it any more."""

    def __init__(self, stop: threading.Event):
        self.stop, self.is_read, self.times = stop, True, []

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        self.times.append(time.perf_counter())
        return torch.full(input_ids.shape[:1], not self.is_read or self.stop.is_set(), device=input_ids.device)


class Answer:
    """An answer that is read while it is made; afterwards, what it has cost.

    vision_budget: to read the image at; None for the model's choice, and then the one taken, if it has budgets.
    encode_seconds: None if the image was encoded already. peak_memory: bytes, None where it cannot be measured.
    """

    def __init__(
        self,
        model,
        processor,
        looked: Looked,
        question: str,
        stop: threading.Event,
        vision_budget: int | None = None,
    ):
        self.model, self.processor, self.looked, self.stop = model, processor, looked, stop
        text = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        self.prompt = processor(text=text, return_tensors="pt").to(model.device)
        self.encode_seconds = self.first_seconds = self.tokens_per_second = self.peak_memory = None
        self.tokens, self.is_cut, self.vision_budget = 0, False, vision_budget

    def __iter__(self) -> Iterator[str]:
        """The text so far, longer each time.

        Raises:
            ValueError: if the question is too long for the model.
        """
        on_gpu = self.model.device.type == "cuda"
        torch.cuda.reset_peak_memory_stats() if on_gpu else reset_peak_memory()
        is_known, start = "image_hidden_states" in self.looked.inputs, time.perf_counter()
        self.image = dict(self.looked.encode(self.model))
        if self.vision_budget is not None:
            self.image["vision_budget"] = self.vision_budget
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        self.encode_seconds = None if is_known else begin - start
        pace, text = Pace(self.stop), ""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(self._generate, streamer, pace)
            try:
                for piece in streamer:
                    text += piece
                    yield text.lstrip()
                self.ids = made.result()
            finally:
                pace.is_read = False
        self.tokens, times = self.ids.shape[1], pace.times
        self.is_cut = is_cut(self.model, self.ids[0], DEFAULT_MAX_NEW_TOKENS)
        self.first_seconds = times[0] - begin
        if len(times) > 1:
            self.tokens_per_second = (len(times) - 1) / (times[-1] - times[0])
        self.peak_memory = torch.cuda.max_memory_allocated() if on_gpu else memory("VmHWM")

    def _generate(self, streamer: TextIteratorStreamer, pace: Pace) -> torch.LongTensor:
        try:
            output = self.model.generate(
                **self.prompt,
                **self.image,
                max_new_tokens=DEFAULT_MAX_NEW_TOKENS,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,
                streamer=streamer,
                stopping_criteria=[pace],
            )
            if budgets := self.model.model.vision_budget_of(getattr(output, CACHE)):
                self.vision_budget = self.image["vision_budget"] = budgets[0]
            return output.sequences[:, self.prompt["input_ids"].shape[1] :]
        finally:
            streamer.end()  # or its reader would wait for ever after an error

    def words(self) -> list[tuple[str, np.ndarray]]:
        """The words with their attention (L, N), from one more pass over the answer."""
        words = split_words(self.processor.tokenizer, self.ids[0].tolist())
        attention = token_attention(self.model, self.prompt["input_ids"], self.image, self.ids)
        return [(word, weights) for word, _, weights in attention_by_word(AttendedAnswer("", words, attention))]
