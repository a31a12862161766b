"""The processor of a converted folder, from files of which none may be missing: transformers would make them up."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.command import InputError
from .errors import one_line, refusing
from .reading import Conversion, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..image_processing_pheye import PheyeImageProcessor
    from ..processing_pheye import PheyeProcessor

SAMPLE = "What is written on the sign?"
LEAST_SHARE = 0.9  # of the language model's vocabulary that its tokenizer uses; the rest is padding


def write_processor(folder: Path, conversion: Conversion) -> "PheyeProcessor":
    """Tokenizer, chat template and image processor, with the encoder's own mean and std where it tells them."""
    from ..processing_pheye import PheyeProcessor

    tokenizer = read_tokenizer(conversion.folders["tokenizer"], conversion.config.vocab_size)
    processor = PheyeProcessor(read_image_processor(conversion), tokenizer)
    processor.save_pretrained(folder)
    return processor


def read_tokenizer(folder: Path, vocab_size: int) -> "PreTrainedTokenizerBase":
    """The tokenizer in `folder`, if it is whole and fits a language model of this vocabulary."""
    from transformers import AutoTokenizer

    remedy = "Download its files again, or give --tokenizer with the folder or Hub id of the language model."
    read_json(folder / "tokenizer_config.json", remedy)
    with refusing(f"{folder} holds no tokenizer that can be loaded", remedy):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        size = 1 + max(tokenizer.get_vocab().values(), default=-1)
        text = tokenizer.decode(tokenizer(SAMPLE)["input_ids"], skip_special_tokens=True).strip()
    problem = None
    if text.lower() != SAMPLE.lower():
        problem = f"turns {SAMPLE!r} into {one_line(repr(text))}"
    elif not LEAST_SHARE * vocab_size <= size <= vocab_size:
        problem = f"has {size:,} tokens where the language model has {vocab_size:,}"
    elif tokenizer.eos_token_id is None:
        problem = "has no token for the end of a text (eos_token)"
    if problem:
        raise InputError(f"The tokenizer in {folder} {problem}; it is not whole, or not this model's. {remedy}")
    return tokenizer


def read_image_processor(conversion: Conversion) -> "PheyeImageProcessor":
    """For views of the encoder's size, with its mean and std; a CLIP's may be left out, since they are known."""
    from ..image_processing_pheye import PheyeImageProcessor

    vision, path = conversion.config.vision_config, conversion.folders["encoder"] / "preprocessor_config.json"
    remedy = "Download it again, or give --encoder with the folder or Hub id of the encoder."
    known, published, statistics = vision.model_type.startswith("clip"), {}, {}
    if os.path.lexists(path) or not known:
        published = read_json(path, remedy)
    for name, least, words in (("image_mean", 0, "from 0"), ("image_std", 1e-6, "above 0")):
        if known and name not in published:
            continue
        statistics[name] = published.get(name)
        if not are_statistics(statistics[name], least):
            raise InputError(
                f"{path} has {name} {one_line(repr(statistics[name]))}, where pixels from 0 to 1 need three numbers "
                f"{words} to 1. {remedy}"
            )
    size = {"height": vision.image_size, "width": vision.image_size}
    return PheyeImageProcessor(tiles_per_side=conversion.config.tiles_per_side, size=size, **statistics)


def are_statistics(values: object, least: float) -> bool:
    """Whether it is a number from `least` to 1 for each of three channels; NaN is none."""
    return (
        isinstance(values, list)
        and len(values) == 3
        and all(type(value) in (int, float) and least <= value <= 1 for value in values)
    )
