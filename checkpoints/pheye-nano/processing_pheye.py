"""Processor: images and prompts to model inputs, and the only copy of the prompt template (appendix A)."""

import dataclasses
import os
import re
from collections.abc import Mapping

from .image_processing_pheye import (
    PheyeImageProcessor,
    check_images,
    load_image,
)  # first: it refuses a transformers that is too old

# isort: split
from transformers import AutoTokenizer
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import (
    AudioKwargs,
    ImagesKwargs,
    ProcessingKwargs,
    ProcessorMixin,
    TextKwargs,
    Unpack,
    VideosKwargs,
)
from transformers.tokenization_utils_base import TextInput

from .configuration_pheye import PheyeConfig

# Text parts of a message are joined. An image leaves no trace, since no image token enters the text; of several, each
# has its number where it stands. Only images that the processor has seen to are let pass, for a tokenizer that applies
# the template would lose them. The answer has one space before it inside the generation block, because byte-pair
# tokens carry the space in front of a word; what an answer brings of its own there is dropped, so that history has the
# tokens that were generated.
CHAT_TEMPLATE = """\
{%- macro text_of(message) -%}
    {%- set content = message['content'] -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is undefined or content is mapping or content is not sequence -%}
        {{- raise_exception('The content of a message is a text or a list of parts, not ' ~ content ~ '.') -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part is mapping and part['type'] == 'text' and part['text'] is string and not part['image'] -%}
                {{- part['text'] -}}
            {%- elif part is not mapping or part['type'] != 'image' -%}
                {{- raise_exception('A part of a message has the type text, with a text, or the type image, not '
                    ~ part ~ '.') -}}
            {%- elif not part['processor'] -%}
                {{- raise_exception("A tokenizer would lose the message's image; use the processor.") -}}
            {%- elif part['number'] -%}
                {{- '[image ' ~ part['number'] ~ '] ' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system = text_of(messages[0]) -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = 'You are an AI visual assistant and you are seeing a single image. You will receive an \
instruction regarding that image. Your goal is to follow the instruction as faithfully as you can.' -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- system -}}
{%- for message in turns -%}
    {%- if message['role'] != ('user' if loop.index0 is even else 'assistant') -%}
        {{- raise_exception('After an optional system message, user and assistant take turns, the user first; '
            ~ 'message ' ~ loop.index0 ~ ' has the role ' ~ message['role'] ~ '.') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {%- if system or not loop.first -%}{{- '\\n\\n' -}}{%- endif -%}
        {{- 'Instruction: ' ~ text_of(message) -}}
    {%- else -%}
        {{- '\\nOutput:' -}}
        {%- generation -%}{{- ' ' ~ text_of(message).lstrip() ~ eos_token -}}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\nOutput:' -}}{%- endif -%}
"""

# The paper's instructions (appendix A and section 3): the first three stand alone, the other two follow a question.
CAPTION_INSTRUCTION = "Provide a one-sentence caption for the provided image"
CAPTION_WITH_TEXT_INSTRUCTION = (
    "Generate a one-sentence caption for the provided image, incorporating textual elements visible in the image."
)
DESCRIPTION_INSTRUCTION = "Generate a highly detailed description for the provided image using multiple sentences"
ONE_WORD_INSTRUCTION = "Answer the question using a single word or phrase"
LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."


# Between these stands a question in what the template makes; one space behind them, the answer.
PROMPT_BEGIN, PROMPT_END = "Instruction: ", "\nOutput:"

# --- Messages ---

IMAGE_SOURCES = ("image", "path", "url", "base64")
BESIDE_CONTENT = ("image", "images", "video", "videos", "audio", "audios")
PARTS = '{"type": "text", "text": ...}, or {"type": "image", "image": ...} with an image, a path, a URL or base64 text'


class Prompt(str):
    """A text made of messages that speak of images: it needs them, though nothing in it says so."""

    images: int  # asked for instead of the class, which a folder's code and the package have one each of

    def __new__(cls, text: str, images: int):
        prompt = super().__new__(cls, text)
        prompt.images = images
        return prompt

    def __reduce__(self):
        return str, (str(self),)


def _read_conversations(conversation) -> tuple[list[list[dict]], bool]:
    """The conversations in what a user gave, and whether they are a batch."""
    conversation = getattr(conversation, "messages", conversation)
    if isinstance(conversation, (str, bytes, Mapping)) or not hasattr(conversation, "__iter__"):
        raise ValueError(f"A conversation is a list of messages, not {_shown(conversation)}.")
    conversation = list(conversation)
    is_batch = bool(conversation) and (
        isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
    )
    conversations = [getattr(one, "messages", one) for one in conversation] if is_batch else [conversation]
    for one in conversations:
        if not isinstance(one, (list, tuple)) or not one:
            raise ValueError(f"A conversation is a list of one message or more, not {_shown(one)}.")
    read = [[_read_message(number, message) for number, message in enumerate(one)] for one in conversations]
    for one in read:
        parts = _image_parts(one)
        for number, part in enumerate(parts, start=1):
            part["number"] = number if len(parts) > 1 else None
    return read, is_batch


def _read_message(number: int, message) -> dict:
    """A message, its parts in the one form that the library reads on every release."""
    message = _as_dict(message)
    if not isinstance(message, Mapping):
        raise ValueError(f'Message {number} must be a dict with "role" and "content", not {_shown(message)}.')
    for name in BESIDE_CONTENT:
        value = message.get(name)
        if value is not None and not (hasattr(value, "__len__") and len(value) == 0):
            raise ValueError(f"Message {number} has {name!r} beside its content; make it a part of it: {PARTS}.")
    content = message.get("content")
    is_empty = message.get("role") == "user" and content in ("", [], ())
    if isinstance(content, str) and not is_empty:
        return dict(message)
    if is_empty or not isinstance(content, (list, tuple)):
        raise ValueError(
            f"The content of message {number} must be a text or a list of parts, not {_shown(content)}. A part is "
            f"{PARTS}."
        )
    return {**message, "content": [_read_part(number, _as_dict(part)) for part in content]}


def _read_part(number: int, part) -> dict:
    """A text, or an image with its one source; an image without any is a placeholder."""
    given = {name: value for name, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    kind = given.get("type")
    if kind == "text" and isinstance(given.get("text"), str) and not given.keys() & {*IMAGE_SOURCES, "image_url"}:
        return {"type": "text", "text": given["text"]}
    if kind not in ("image", "image_url"):
        raise ValueError(f"Message {number} has a part that Pheye does not read: {_shown(part)}. A part is {PARTS}.")
    sources = {name: given[name] for name in IMAGE_SOURCES if name in given}
    if kind == "image_url":  # as OpenAI's interface has it
        url = given.get("image_url")
        sources = {"url": url.get("url") if isinstance(url, Mapping) else url}
    is_placeholder = kind == "image" and not part.keys() & {*IMAGE_SOURCES, "image_url"}
    is_one = len(sources) == 1 and not isinstance(next(iter(sources.values())), (list, tuple, type(None)))
    if not is_one and not is_placeholder:
        raise ValueError(
            f"Message {number} speaks of an image, but does not say which one: {_shown(part)}. A part is {PARTS}."
        )
    return {"type": "image", "processor": True, **sources}


def _as_dict(value):
    """Messages and parts may be objects, such as those that OpenAI's client gives."""
    if hasattr(value, "model_dump"):
        return value.model_dump()
    return vars(value) if dataclasses.is_dataclass(value) else value


def _image_parts(conversation: list[dict]) -> list[dict]:
    contents = [message["content"] for message in conversation if not isinstance(message["content"], str)]
    return [part for content in contents for part in content if part["type"] == "image"]


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


# --- The processor ---


class PheyeProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: ImagesKwargs
    _defaults = {"text_kwargs": {"padding": True}}


class PheyeProcessor(ProcessorMixin):
    """Joins an image processor and a tokenizer; without `chat_template`, the published prompt is used.

    The tokenizer is made to pad on the left, to give ids and mask and nothing else, and, if it has no padding token,
    to pad with its end-of-text token.
    """

    valid_processor_kwargs = PheyeProcessorKwargs

    def __init__(self, image_processor, tokenizer, chat_template: str | None = None):
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"  # prompts end together, and generation goes on right after each
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.auto_map = {"AutoProcessor": "processing_pheye.PheyeProcessor"}  # saving sets it, loading drops it

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # The Auto classes would ask whether to trust the folder's code, which is not needed: ours is here. For the
        # same reason the tokenizer is given a config; it asks for the model's type and nothing else.
        kwargs.pop("backend", None)  # of transformers' own image processors
        image_processor = PheyeImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        of_images = image_processor.valid_kwargs.__annotations__  # a tokenizer would keep them, and save them
        kwargs = {name: value for name, value in kwargs.items() if name not in of_images}
        kwargs = {**kwargs, "config": PheyeConfig(), "trust_remote_code": kwargs.get("trust_remote_code") or False}
        return [image_processor, AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)]

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        **kwargs,
    ):
        """The prompt of a conversation, or of a list of conversations; with `tokenize` and `return_dict`, the model's
        inputs with the image that the messages hold. Arguments are those of transformers' processors.

        A message's content is a text, or a list of parts {"type": "text", "text": ...} and {"type": "image", ...}
        with "image", "path", "url" or "base64", or OpenAI's {"type": "image_url", "image_url": {"url": ...}}.

        Raises:
            ValueError: if the messages speak of an image that would not arrive, or hold what Pheye does not read.
            jinja2.TemplateError: if user and assistant do not take turns.
        """
        conversations, is_batch = _read_conversations(conversation)
        images = [_image_parts(one) for one in conversations]
        given = (kwargs.get("processor_kwargs") or {}).get("images", kwargs.get("images"))
        placeholders = sum(not part.keys() & {*IMAGE_SOURCES} for parts in images for part in parts)
        if given is not None and (not tokenize or placeholders < sum(map(len, images))):
            raise ValueError(
                "`images` goes with tokenize=True, and with messages that have no images of their own; or give it to "
                "the processor with the text."
            )
        if tokenize and given is None and placeholders:
            raise ValueError(f"The messages speak of an image, but do not have it. A part is {PARTS}.")
        if tokenize and any(images) and not return_dict:
            raise ValueError("Token ids alone would lose the messages' image; ask for all inputs by return_dict=True.")
        prompts = super().apply_chat_template(
            conversations if is_batch else conversations[0],
            chat_template,
            tokenize=tokenize,
            return_dict=return_dict,
            **kwargs,
        )
        if not tokenize:
            texts = prompts if is_batch else [prompts]
            texts = [Prompt(text, len(parts)) if parts else text for text, parts in zip(texts, images, strict=True)]
            return texts if is_batch else texts[0]
        return prompts

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        **kwargs: Unpack[PheyeProcessorKwargs],
    ) -> BatchFeature:
        """Model inputs for images and texts; the text is taken as it is (see `apply_chat_template` for the prompt).

        Args:
            images: an image, or a list with an image for each text, or a list of images for each (as many as the model
                takes, `max_images`), or None for a text without one; one bare image serves any number of texts.
            text: a prompt or a list of prompts, padded on the left.

        Returns:
            `input_ids` and `attention_mask` (texts, tokens), and what PheyeImageProcessor makes of the images:
            `pixel_values` (images, views, 3, height, width); `image_grids` where there are canvases, `max_images` is
            above 1, or a text has no image; `high_res_pixel_values` where the model has a branch.

        Raises:
            ValueError: if the lists differ in length, a text is empty, has more images than the model takes or others
                than it speaks of, or if nothing is given. TypeError: for arguments that have no meaning here.
        """
        self._check_arguments(kwargs)
        if getattr(images, "ndim", None) == 4:
            images = list(images)
        is_list = isinstance(images, (list, tuple))
        if is_list:
            images = self._images_of_texts(images, kwargs)
        if text is not None:
            # Always a batch, as the library's own image-text processors give it.
            text = list(text) if isinstance(text, (list, tuple)) else [text]
            _check_texts(text, list(map(len, images)) if is_list else [0 if images is None else 1] * len(text))
            if is_list and len(images) != len(text):
                raise ValueError(
                    f"There are {len(images)} images and {len(text)} texts; give one image per text, or one "
                    "image that is not in a list to ask all the texts about it."
                )
        if is_list and not images:
            raise ValueError("`images` is an empty list; leave it out for text without an image.")
        if is_list and not any(images):
            images = None
        return super().__call__(images=images, text=text, **kwargs)

    def _images_of_texts(self, images: list | tuple, arguments: dict) -> list[list]:
        """The images of each text, which may be given as one, as a list, or as None."""
        found = [
            [] if entry is None else list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in images
        ]
        given = (arguments.get("images_kwargs") or {}).get("max_images", arguments.get("max_images"))
        check_images(found, self.image_processor.max_images if given is None else given)
        return found

    def prepare_inputs_layout(self, images: ImageInput | None = None, **kwargs) -> tuple:
        """Images stay closed: the image processor opens each by itself, and knows what may be opened (`sources`)."""
        _, *others = super().prepare_inputs_layout(**kwargs)
        return images, *others

    def _check_arguments(self, arguments: dict):
        """The library would leave out what it does not know."""
        # Code for any processor gives options of videos and audio along, where there are none.
        kinds = (TextKwargs, self.image_processor.valid_kwargs, VideosKwargs, AudioKwargs, PheyeProcessorKwargs)
        known = {"common_kwargs"}.union(*(kind.__annotations__ for kind in kinds))
        nested = [arguments.get(group) or {} for group in ("text_kwargs", "images_kwargs", "common_kwargs")]
        given = {name for options in (arguments, *nested) for name, value in options.items() if value is not None}
        unknown = sorted(given - known)
        if unknown:
            raise TypeError(
                f"{unknown[0]} is no argument of PheyeProcessor, which takes images and texts: `images`, `text`, "
                "and options of the image processor and the tokenizer. A question goes into `text`, put into the "
                "prompt by apply_chat_template."
            )

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens: bool = True, **kwargs):
        """Decode generated ids (rows, tokens) to a list of answers, without the space that begins them.

        Rows may hold the prompt too, as transformers' pipeline has it; then one space stands before each answer, and
        behind the prompt, so that taking the prompt away leaves the answer.
        """
        texts = self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return [
            re.sub(rf"(?<={PROMPT_END})\s*", " ", text) if PROMPT_BEGIN in text else text
            for text in map(str.lstrip, texts)
        ]


def _check_texts(texts: list, images: list[int]):
    """images: how many are given for each text, if the lists fit each other."""
    if not texts:
        raise ValueError("`text` is an empty list; give the model something to answer.")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"`text` must be a string or a list of strings; item {row} is a {type(text).__name__}.")
        if not text:
            raise ValueError(f"Text {row} is empty; give the model something to answer.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Text {row} has a half of a character, which no tokenizer takes: {_shown(text)}."
            ) from error
        given, needed = images[row] if row < len(images) else 0, getattr(text, "images", 0)
        if given and needed not in (0, given):
            raise ValueError(
                f"Text {row} was made of messages that speak of {needed} images, but {given} are given for it; give "
                "as many as the messages have."
            )
        if given:
            continue
        if needed:
            raise ValueError(
                f"Text {row} was made of messages that speak of an image, but no image is given: give `images`, or "
                "let apply_chat_template make all inputs by tokenize=True and return_dict=True. If the model gets the "
                "image in another way, leave the image out of the messages."
            )
        if _names_image(text):
            raise ValueError(
                f"Text {row} is the place of an image, not a question: {_shown(text)}. Give it as `images`; where "
                'transformers made image-text-to-text of pipeline("image-to-text", model=<a loaded model>), use '
                "PheyeImageToTextPipeline(model=..., processor=...)."
            )


def _names_image(text: str) -> bool:
    """Whether a text is a path, URL or base64 text of an image."""
    if os.path.isfile(text):
        return True
    if re.search(r"\s", text):
        return False
    if re.match("(?i)https?://|data:image/", text) or re.search(
        r"(?i)\.(jpe?g|png|webp|gif|bmp|tiff?|avif|hei[cf])$", text
    ):
        return True
    try:
        return len(text) > 100 and load_image(text, sources="data") is not None
    except ValueError:
        return False


PheyeProcessor.register_for_auto_class()
