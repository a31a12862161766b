"""Processor: images and prompts to model inputs, and the only copy of the prompt template (appendix A)."""

from .image_processing_pheye import PheyeImageProcessor  # first, because it refuses a transformers that is too old

# isort: split
from transformers import AutoTokenizer
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import TextInput

# Text parts of a message are joined; image parts leave no trace, since no image token enters the text. The answer
# keeps its leading space inside the generation block, because byte-pair tokens carry the space in front of a word.
CHAT_TEMPLATE = """\
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}
            {{- part['text'] -}}
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
        {%- generation -%}{{- ' ' ~ text_of(message) ~ eos_token -}}{%- endgeneration -%}
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


class PheyeProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: ImagesKwargs
    _defaults = {"text_kwargs": {"padding": True}}


class PheyeProcessor(ProcessorMixin):
    """Joins an image processor and a tokenizer; without `chat_template`, the published prompt is used.

    The tokenizer is made to pad on the left and, if it has no padding token, with its end-of-text token.
    """

    valid_processor_kwargs = PheyeProcessorKwargs

    def __init__(self, image_processor, tokenizer, chat_template: str | None = None):
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"  # prompts end together, and generation goes on right after each
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.auto_map = {"AutoProcessor": "processing_pheye.PheyeProcessor"}  # saving sets it, loading drops it

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # The Auto classes would ask whether to trust the folder's code, which is not needed: ours is here.
        image_processor = PheyeImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        kwargs["trust_remote_code"] = kwargs.get("trust_remote_code") or False
        return [image_processor, AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)]

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        **kwargs: Unpack[PheyeProcessorKwargs],
    ) -> BatchFeature:
        """Model inputs for one image per text; the text is taken as it is (see `apply_chat_template` for the prompt).

        Args:
            images: an image, or a list of as many images as texts; one bare image serves any number of texts.
            text: a prompt or a list of prompts, padded on the left.

        Returns:
            `pixel_values` (images, views, 3, height, width), `input_ids` and `attention_mask` (texts, tokens).

        Raises:
            ValueError: if the lists differ in length, a text is empty or has two images, or nothing is given.
        """
        if getattr(images, "ndim", None) == 4:
            images = list(images)
        is_list = isinstance(images, (list, tuple))
        if is_list:
            images = _one_per_text(images)
        if text is not None:
            # Always a batch, as the library's own image-text processors give it.
            text = list(text) if isinstance(text, (list, tuple)) else [text]
            _check_texts(text)
            if is_list and len(images) != len(text):
                raise ValueError(
                    f"There are {len(images)} images and {len(text)} texts; give one image per text, or one "
                    "image that is not in a list to ask all the texts about it."
                )
        if is_list and not images:
            raise ValueError("`images` is an empty list; leave it out for text without an image.")
        return super().__call__(images=images, text=text, **kwargs)

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens: bool = True, **kwargs):
        """Decode generated ids (rows, tokens) to a list of texts."""
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)


def _one_per_text(images: list) -> list:
    """`images` with the one-element lists opened in which chat templates hand over each conversation's image."""
    flat = []
    for row, image in enumerate(images):
        if isinstance(image, (list, tuple)):
            if len(image) != 1:
                raise ValueError(
                    f"Prompt {row} has {len(image)} images, but Pheye sees exactly one; ask about them one by one."
                )
            image = image[0]
        flat.append(image)
    return flat


def _check_texts(texts: list):
    if not texts:
        raise ValueError("`text` is an empty list; give the model something to answer.")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"`text` must be a string or a list of strings; item {row} is a {type(text).__name__}.")
        if not text:
            raise ValueError(f"Text {row} is empty; give the model something to answer.")


PheyeProcessor.register_for_auto_class()
