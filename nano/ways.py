"""Ways to join the two frozen parts that are compared: blocks of several kinds, and a LLaVA-style prefix."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from .. import PheyeForConditionalGeneration, PheyeImageProcessor, PheyeProcessor
from ..training.collator import IGNORED
from ..training.trained import choose_trained
from .crops import with_crops

NO_LORA = {"global_lora_rank": 0, "local_lora_rank": 0}


@dataclass(frozen=True)
class Way:
    """One way to join the two frozen parts; the defaults are Pheye-nano's own."""

    title: str
    tiles_per_side: int | None = None  # by default those of the command
    interval: int = 2
    lora_sets: int = 2
    is_prefix: bool = False

    @property
    def needs_new_blocks(self) -> bool:
        return self.is_prefix or self.interval != 2


WAYS = {
    "full": Way("Pheye-nano: blocks before every 2nd layer, two LoRA sets"),
    "k1": Way("k = 1", tiles_per_side=1),
    "one_lora": Way("one LoRA set for all views", lora_sets=1),
    "no_lora": Way("no LoRA", lora_sets=0),
    "every4th": Way("no LoRA, blocks before every 4th layer", interval=4, lora_sets=0),
    "prefix": Way("LLaVA-style prefix, no LoRA; its language model trains, too", lora_sets=0, is_prefix=True),
}


class Prefix(nn.Module):
    """A LLaVA-style model: all tokens of all views stand before the text, brought to its width by two linears.

    As in LLaVA's recipe the language model trains with them, and the vision tower is frozen.
    """

    def __init__(self, vision_tower: CLIPVisionModel, language_model: PreTrainedModel):
        super().__init__()
        self.vision_tower, self.language_model = vision_tower.requires_grad_(False), language_model
        width, text_width = vision_tower.config.hidden_size, language_model.config.hidden_size
        self.projector = nn.Sequential(nn.Linear(width, text_width), nn.GELU(), nn.Linear(text_width, text_width))

    @property
    def device(self) -> torch.device:
        return self.language_model.device

    def joined(self, input_ids, attention_mask, pixel_values) -> dict[str, torch.Tensor]:
        """Embeddings (B, V * N + T, D) and their mask."""
        states = self.vision_tower(pixel_values.flatten(0, 1)).last_hidden_state  # (B * V, N, D)
        prefix = self.projector(states.unflatten(0, (len(input_ids), -1)).flatten(1, 2))
        embeddings = torch.cat([prefix, self.language_model.get_input_embeddings()(input_ids)], 1)
        mask = torch.cat([attention_mask.new_ones(prefix.shape[:2]), attention_mask], 1)
        return {"inputs_embeds": embeddings, "attention_mask": mask}

    def forward(self, input_ids, attention_mask, pixel_values, labels):
        inputs = self.joined(input_ids, attention_mask, pixel_values)
        ignored = labels.new_full((len(labels), inputs["inputs_embeds"].shape[1] - labels.shape[1]), IGNORED)
        return self.language_model(**inputs, labels=torch.cat([ignored, labels], 1))

    def generate(self, input_ids, attention_mask, pixel_values, **kwargs) -> GenerateDecoderOnlyOutput:
        inputs = self.joined(input_ids, attention_mask, pixel_values)
        ids = self.language_model.generate(**inputs, **{**kwargs, "return_dict_in_generate": False})
        return GenerateDecoderOnlyOutput(sequences=torch.cat([input_ids, ids], 1))


def build(
    way: Way,
    seed: int,
    *,
    tiles_per_side: int,
    start: Path | None = None,
    vision: Path | None = None,
    language: Path | None = None,
) -> tuple[nn.Module, PheyeProcessor]:
    """A model with its trained parts chosen, and its processor.

    With `start`, a Pheye, it begins with the blocks of that one; otherwise with new ones between the parts `vision`
    and `language`.
    """
    torch.manual_seed(seed)
    tiles_per_side = way.tiles_per_side or tiles_per_side
    tokenizer = PheyeProcessor.from_pretrained(start).tokenizer if start else AutoTokenizer.from_pretrained(language)
    processor = PheyeProcessor(PheyeImageProcessor(tiles_per_side=tiles_per_side), tokenizer)
    if start:
        learnt = PheyeForConditionalGeneration.from_pretrained(start, dtype=torch.float32, **NO_LORA)
        model = with_crops(learnt, tiles_per_side, with_lora=way.lora_sets > 0)
    elif way.is_prefix:
        vision_tower = CLIPVisionModel.from_pretrained(vision)
        return Prefix(vision_tower, AutoModelForCausalLM.from_pretrained(language)), processor
    else:
        model = PheyeForConditionalGeneration.from_pretrained_parts(
            vision,
            language,
            tiles_per_side=tiles_per_side,
            cross_attention_interval=way.interval,
            **({} if way.lora_sets else NO_LORA),
        )
    if way.lora_sets == 1:
        model.pheye.global_lora = model.pheye.local_lora
    choose_trained(model)
    return model, processor
