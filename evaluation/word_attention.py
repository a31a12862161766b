"""A model's answer with the attention of each word, and the mean share of the global view.

The attention of a word is that of the positions which predict its tokens, averaged over them and over the heads.

Shapes: L blocks, T tokens of the answer, N image tokens, V views.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import DynamicCache

from ..answering.engine import is_cut
from ..common.command import InputError
from ..image_opening_pheye import load_image
from ..image_processing_pheye import to_rgb
from ..layers_pheye import CACHE
from .tertiles import TERTILES

TOKENS_PER_PASS = 16  # of the answer, so that memory does not grow with it


def view_shares(weights: np.ndarray, tokens_per_view: int) -> np.ndarray:
    """Attention on each view, class and register tokens included: (..., N) to (..., V)."""
    return weights.reshape(*weights.shape[:-1], -1, tokens_per_view).sum(-1)


# --- The model's answer and its attention ---


def split_words(tokenizer, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The words of an answer, each with the places in `ids` of the tokens that begin in it.

    White space and half characters belong to what follows. Special tokens belong to no word.
    """

    def decode(count: int) -> str:
        return tokenizer.decode(ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    special = set(tokenizer.all_special_ids)
    text, begin, places = decode(len(ids)), 0, {}
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    for place, token in enumerate(ids):
        word = next((index for index, (_, end) in enumerate(spans) if end > begin), None)
        if word is not None and token not in special:
            places.setdefault(word, []).append(place)
        begin = max(begin, common_length(decode(place + 1), text))  # without half a character at the end
    starts = [spans[word][0] for word in places] + [len(text)]
    return [
        (text[start:end].strip(), found)
        for start, end, found in zip(starts[:-1], starts[1:], places.values(), strict=True)
    ]


def common_length(first: str, second: str) -> int:
    """Number of characters in which two texts begin alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


@dataclass
class AttendedAnswer:
    """An answer, its words with the places of their tokens, and the attention (L, N) of each token, one after another;
    and whether its length alone has ended it.

    The attention is computed while it is read, and can be read once.
    """

    text: str
    words: list[tuple[str, list[int]]]
    attention: Iterator[np.ndarray]
    is_cut: bool = False


@torch.no_grad()
def answer_with_attention(model, processor, image: Image.Image, prompt: str, max_new_tokens: int) -> AttendedAnswer:
    """The model's answer, greedy."""
    text = processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt").to(model.device, model.dtype)
    image_inputs = {name: inputs[name] for name in processor.image_processor.model_input_names}
    image_hidden_states = model.get_image_features(**image_inputs).last_hidden_state  # (1, N, D)
    encoded = {"image_hidden_states": image_hidden_states}
    if "image_grids" in image_inputs:
        encoded["image_grids"] = image_inputs["image_grids"]
    prompt_ids = inputs["input_ids"]
    output = model.generate(
        prompt_ids,
        attention_mask=inputs["attention_mask"],
        **encoded,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
    )
    ids = output.sequences[:, prompt_ids.shape[1] :]
    if budgets := model.model.vision_budget_of(getattr(output, CACHE)):
        encoded["vision_budget"] = budgets[0]
    words = split_words(processor.tokenizer, ids[0].tolist())
    return AttendedAnswer(
        processor.post_process_image_text_to_text(ids)[0].strip(),
        words,
        token_attention(model, prompt_ids, encoded, ids),
        is_cut(model, ids[0], max_new_tokens),
    )


@torch.no_grad()
def token_attention(
    model, prompt_ids: torch.Tensor, encoded: dict[str, torch.Tensor], answer_ids: torch.Tensor
) -> Iterator[np.ndarray]:
    """Attention (L, N) at the position that predicts each token of the answer, given the ones before it.

    The prompt is read without its last token, which predicts the answer's first; ids have one row.

    encoded: the image's features, its grid where the model has canvases, and its budget where it has budgets.
    """
    cache = DynamicCache(config=model.config.text_config)
    model(prompt_ids[:, :-1], **encoded, cache=cache, use_cache=True, logits_to_keep=1)
    predicting = torch.cat([prompt_ids[:, -1:], answer_ids[:, :-1]], dim=1)  # (1, T)
    for tokens in predicting.split(TOKENS_PER_PASS, dim=1):
        yield from mean_over_heads(model, tokens, cache).numpy()


def mean_over_heads(model, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Attention (T, L, N) of some tokens (1, T) that go on behind the cache; no weights per head outlive this call."""
    outputs = model(tokens, cache=cache, use_cache=True, logits_to_keep=1, output_cross_attentions=True)
    blocks = [block[0].mean(0, dtype=torch.float32).cpu() for block in outputs.cross_attentions]  # (T, N) each
    weights = torch.stack(blocks, dim=1)  # (T, L, N)
    return weights / weights.sum(-1, keepdim=True)  # rows of half precision do not quite add up


def attention_by_word(answer: AttendedAnswer) -> Iterator[tuple[str, int, np.ndarray]]:
    """Each word with the number of its tokens and their mean attention (L, N)."""
    words = iter(answer.words)
    text, places = next(words, ("", []))
    total = 0
    for place, weights in enumerate(answer.attention):
        if place in places:
            total = total + weights
            if place == places[-1]:
                yield text, len(places), total / len(places)
                text, places = next(words, ("", []))
                total = 0


# --- Many samples ---


def global_shares(model, processor, samples: Iterable[dict], max_new_tokens: int) -> dict:
    """Mean share of the global view per block and tertile; every sample counts the same, whatever its length.

    `image` is an image or its path. Samples whose image cannot be read, or whose answer has no words, are listed and
    left out.
    """
    sums, counts, left_out = {}, {}, []
    for sample in tqdm(samples, unit=" images"):
        try:
            image = sample["image"]
            image = to_rgb(image if isinstance(image, Image.Image) else load_image(image))
            answer = answer_with_attention(model, processor, image, sample["prompt"], max_new_tokens)
            total, tokens = 0, 0
            for _, count, weights in attention_by_word(answer):
                total, tokens = (
                    total + count * view_shares(weights, model.config.tokens_per_view)[:, 0],
                    tokens + count,
                )
            if not tokens:
                raise InputError("The answer has no words.")
        except ValueError as error:  # which all faults of an image are
            left_out.append({"line": sample["_line"], "error": str(error)})
            continue
        group = sample["tertile"] or "all"
        sums[group] = sums.get(group, 0) + total / tokens
        counts[group] = counts.get(group, 0) + 1
    if not counts:
        raise InputError(f"No sample could be used; the first: {left_out[0]['error']}")
    groups = [
        {
            "tertile": name,
            "samples": counts[name],
            "global_share": (sums[name] / counts[name]).astype(float).round(6).tolist(),
        }
        for name in (*TERTILES, "all")
        if name in counts
    ]
    return {"layers": list(model.config.cross_attention_layers), "tertiles": groups, "left_out": left_out}
