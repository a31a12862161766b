"""Ways to join the two frozen parts that are compared: what views go through, blocks of several kinds, and what stands
in the place of blocks."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ... import PheyeForConditionalGeneration, PheyeProcessor
from ...training.trained import choose_trained
from ..learning.configs import EYES, INITIALIZER_RANGE
from ..learning.crops import set_lora, with_crops
from . import connectors

NO_LORA = {"global_lora_rank": 0, "local_lora_rank": 0}
FROZEN = (*EYES, "language_model")  # parts of a Pheye that ways with new blocks have in common


@dataclass(frozen=True)
class Way:
    """One way to join the two frozen parts; the defaults are Pheye-nano's own."""

    title: str
    tiles_per_side: int | None = None  # by default those of the command
    lora_sets: int | None = None  # by default those of the command
    interval: int = 2
    initializer_range: float | None = None  # of blocks; by default that of the command
    refines: str | None = None  # the image, before every block but the first: its `self_attention_kind`
    join: Callable[[PheyeForConditionalGeneration], nn.Module] | None = None  # of `connectors`
    trains_language_model: bool = False

    @property
    def needs_new_blocks(self) -> bool:
        return self.join is not None or self.interval != 2 or bool(self.refines or self.initializer_range)


WAYS = {
    "full": Way("blocks before every 2nd layer"),
    "k1": Way("k = 1", tiles_per_side=1),
    "one_lora": Way("one LoRA set for all views", lora_sets=1),
    "no_lora": Way("LoRA does not train", lora_sets=0),
    "every_layer": Way("blocks before every layer", interval=1),
    "every4th": Way("blocks before every 4th layer", interval=4),
    "fromage": Way("FROMAGe-style: class tokens before the text", join=connectors.fromage),
    "prefix": Way(
        "LLaVA-style prefix; its language model trains, too", join=connectors.llava, trains_language_model=True
    ),
    "frozen_prefix": Way("LLaVA-style prefix; its language model is frozen", join=connectors.llava),
    "small_cap": Way("SmallCap-style: cross-attention inside every layer", interval=1, join=connectors.small_cap),
    "usual_start": Way("blocks that begin as torch's linears", join=connectors.usual_start),
    "paper_start": Way("blocks that begin as the paper's", initializer_range=0.01),
    "small_outputs": Way("blocks that begin near zero in their outputs alone", join=connectors.small_outputs),
    "tanh_gate": Way("blocks with Flamingo's tanh gates", join=connectors.tanh_gate),
    "casa": Way("blocks whose text attends to text, too (CASA)", join=connectors.casa),
    "refined": Way("blocks, and blocks over the image between them (after VISOR)", refines="block"),
    "refined_apart": Way(
        "the same, in which each view sees itself alone", refines="block", join=connectors.views_apart
    ),
    "refined_jointly": Way("blocks, and layers over image and text between them (after VISOR)", refines="joint"),
    "perceiver": Way("Perceiver resampler, 6 layers, before the blocks", join=connectors.perceiver),
    "monkey": Way("Monkey resampler, before the blocks", join=connectors.monkey),
}


def build(
    way: Way,
    seed: int,
    *,
    tiles_per_side: int,
    lora_sets: int,
    initializer_range: float = INITIALIZER_RANGE,
    start: Path | None = None,
    parts: Path | None = None,
) -> tuple[nn.Module, PheyeProcessor]:
    """A model with its trained parts chosen, and its processor.

    With `start`, a Pheye, it begins with the blocks of that one, without its LoRA; otherwise with new blocks between
    the eyes and the language model of `parts`, a Pheye whose LoRA stays. `tiles_per_side`, `lora_sets` that train
    (0 to 2) and `initializer_range` of new blocks are for ways that say nothing else.
    """
    torch.manual_seed(seed)
    tiles_per_side = way.tiles_per_side or tiles_per_side
    lora_sets = lora_sets if way.lora_sets is None else way.lora_sets
    processor = PheyeProcessor.from_pretrained(start or parts)
    processor.image_processor.tiles_per_side = tiles_per_side
    if start:
        learnt = PheyeForConditionalGeneration.from_pretrained(start, dtype=torch.float32, **NO_LORA)
        model = with_crops(learnt, tiles_per_side, with_lora=lora_sets > 0)
    else:
        fields = {"initializer_range": way.initializer_range or initializer_range}
        whole = PheyeForConditionalGeneration.from_pretrained(parts, dtype=torch.float32, **fields)
        model = with_new_blocks(whole, tiles_per_side, way, with_lora=lora_sets > 0)
    if lora_sets == 1:
        model.pheye.global_lora = model.pheye.local_lora
    if way.join is not None:
        model = way.join(model)
    frozen = [r"\.fusion_blocks\."] if lora_sets else [r"\.fusion_blocks\.", "_lora"]
    choose_trained(
        model,
        train=["language_model"] if way.trains_language_model else None,
        freeze=[part for part in frozen if any(re.search(part, name) for name, _ in model.named_parameters())],
    )
    return model, processor


def with_new_blocks(
    model: PheyeForConditionalGeneration, tiles_per_side: int, way: Way, with_lora: bool
) -> PheyeForConditionalGeneration:
    """The eyes and the language model of `model`, and between them what has learnt nothing: blocks of this way, and a
    view encoding for `tiles_per_side` x `tiles_per_side` crops."""
    config = copy.deepcopy(model.config)
    config.tiles_per_side, config.cross_attention_interval = tiles_per_side, way.interval
    if way.refines:
        # A joint layer has no block before it; the one before a block has none.
        layers = [layer - (way.refines == "joint") for layer in config.cross_attention_layers[1:]]
        config.self_attention_kind = way.refines
        config.self_attention_layers, config.self_attention_budgets = layers, [layers]
    if with_lora:
        set_lora(config)
    new = PheyeForConditionalGeneration(config)
    kept = {name: weight for name, weight in model.state_dict().items() if name.split(".")[1] in FROZEN}
    new.load_state_dict({**new.state_dict(), **kept})
    return new.eval()
