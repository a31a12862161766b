"""The image-to-text task: `pipeline("image-to-text", model=..., trust_remote_code=True)`."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from transformers import Pipeline

from .image_processing_pheye import pad_rows
from .processing_pheye import CAPTION_INSTRUCTION

DEFAULT_MAX_NEW_TOKENS = 256
QUESTIONS = ("question", "questions", "text", "texts", "prompts", "query")  # as other pipelines call a prompt
SINGLE = (str, bytes, Image.Image, np.ndarray, torch.Tensor)


class LazyImages(IterableDataset):
    """Images that are opened one by one, because the column of a dataset may not fit into memory at once."""

    def __init__(self, images: Iterable):
        self.images = images

    def __iter__(self):
        return iter(self.images)


class PheyeImageToTextPipeline(Pipeline):
    """Answers one prompt about one image or many.

    Call it with an image (PIL image, path, URL, base64 text, bytes, array or tensor), a sequence or column of them, a
    generator or a torch dataset, and optionally

    - `prompt`: the question or instruction; a one-sentence caption by default,
    - `max_new_tokens`: 256 by default, unless the generation config bounds the length,
    - `generate_kwargs`: anything else that `generate` takes,
    - `vision_budget`: how closely to read the image, where the model has budgets,
    - `batch_size`: images per call of the model.

    Returns, per image, a list with a dict `{"generated_text": answer}` for each returned sequence.

    Raises:
        TypeError: for options that it does not have. ValueError: for an image that cannot be used, an empty prompt, or
            an option that is given twice.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False

    def __init__(self, *args, image_processor=None, tokenizer=None, **kwargs):
        if image_processor is not None or tokenizer is not None:
            raise TypeError("The image-to-text pipeline of Pheye takes processor=..., which holds both of its parts.")
        super().__init__(*args, **kwargs)

    def _sanitize_parameters(
        self,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        vision_budget: int | None = None,
        generate_kwargs: dict | None = None,
        **others,
    ):
        for name, value in others.items():
            use = (
                "prompt=..." if name in QUESTIONS else f"generate_kwargs={{{name!r}: {value!r}}} if generate takes it"
            )
            raise TypeError(f"The image-to-text pipeline has no option {name}; use {use}.")
        if generate_kwargs is not None and not isinstance(generate_kwargs, dict):
            raise TypeError(f"generate_kwargs={generate_kwargs!r} must be a dict of what `generate` takes.")
        generate_kwargs = dict(generate_kwargs or {})
        for name, value in (("max_new_tokens", max_new_tokens), ("vision_budget", vision_budget)):
            if value is None:
                continue
            if name in generate_kwargs:
                raise ValueError(
                    f"{name} is given twice, as {value} and in generate_kwargs as {generate_kwargs[name]}; give it "
                    "once."
                )
            generate_kwargs[name] = value
        if prompt is not None and not (isinstance(prompt, str) and prompt):
            raise ValueError(f"prompt={prompt!r} must be a text that is not empty; leave it out for a caption.")
        return {} if prompt is None else {"prompt": prompt}, generate_kwargs, {}

    def __call__(self, images, **kwargs):
        """See the class."""
        if isinstance(images, list):
            return super().__call__(images, **kwargs) if images else []
        if isinstance(images, Sequence) and not isinstance(images, SINGLE):
            return list(super().__call__(LazyImages(images), **kwargs))
        if isinstance(images, Iterable) and not isinstance(images, (*SINGLE, Dataset)):
            return super().__call__(LazyImages(images), **kwargs)
        return super().__call__(images, **kwargs)

    def preprocess(self, image, prompt: str = CAPTION_INSTRUCTION) -> dict:
        if image is None:
            raise ValueError("The image is None; give an image to answer about.")
        conversation = [{"role": "user", "content": prompt}]
        text = self.processor.apply_chat_template(conversation, add_generation_prompt=True)
        inputs = self.processor(images=image, text=text, return_tensors="pt")
        # In a dict, which the library leaves as it is: it joins pixels as if all images had as many views.
        names = self.processor.image_processor.model_input_names
        image_inputs = {name: inputs.pop(name)[0] for name in names}
        return {**inputs, "image_inputs": image_inputs}

    def _forward(self, inputs: dict, **generate_kwargs) -> dict[str, torch.Tensor]:
        image_inputs = inputs.pop("image_inputs")
        inputs = {**inputs, **pad_rows(image_inputs if isinstance(image_inputs, list) else [image_inputs])}
        config = generate_kwargs.get("generation_config") or self.model.generation_config
        lengths = [config.max_new_tokens, config.max_length]
        if lengths == [None, None] and not {"max_new_tokens", "max_length"} & generate_kwargs.keys():
            generate_kwargs = {**generate_kwargs, "max_new_tokens": DEFAULT_MAX_NEW_TOKENS}
        images, prompt_length = inputs["input_ids"].shape
        sequences = self.model.generate(**inputs, **{**generate_kwargs, "return_dict_in_generate": False})
        return {"answer_ids": sequences[:, prompt_length:].unflatten(0, (images, -1))}

    def postprocess(self, outputs: dict[str, torch.Tensor]) -> list[dict[str, str]]:
        answers = self.processor.post_process_image_text_to_text(outputs["answer_ids"].flatten(0, -2))
        return [{"generated_text": answer.lstrip()} for answer in answers]
