"""Three ways to answer about an image with the same weights: ours, the published one, and a LLaVA-style model.

Each has `generate`, and the module at whose end an image is encoded (`encoded`). `readings` takes designs apart.

Shapes: B images, V views, N tokens of all views of an image, R text rows, T text tokens, D width.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from pheye import PheyeConfig, PheyeForConditionalGeneration
from pheye.configuration_pheye import HEAD_WIDTH
from pheye.layers_pheye import CACHE

from .full_size import fill, without_budgets

PLAIN, DENSE, HALF = "plain Pheye", "LLaVA-style", "LLaVA-style, half of the visual tokens"


def share_weights(model: PreTrainedModel, source: PreTrainedModel):
    """Give `model`, on the meta device, the parameters of `source` that it has by the same names."""
    names = {name for name, _ in model.named_parameters()}
    parameters = {name: parameter for name, parameter in source.named_parameters() if name in names}
    model.load_state_dict(parameters, assign=True, strict=False)


class Ours:
    """This package."""

    def __init__(self, model: PheyeForConditionalGeneration):
        self.generate, self.encoded = model.generate, model.pheye.view_encoding


class Published:
    """The way the published implementation computes: the global view and the crops in two passes of the vision tower,
    LoRA as separate products, eager attention, an image's keys and values again at every step in every block, and the
    image repeated for every row and beam."""

    def __init__(self, model: PheyeForConditionalGeneration):
        self.parts, config = model.pheye, copy.deepcopy(model.config)  # the library sets a model's attention there
        with torch.device("meta"):
            options = {"dtype": model.dtype, "attn_implementation": "eager"}
            self.vision_tower = AutoModel.from_config(config.vision_config, **options)
            self.step = AutoModelForCausalLM.from_config(config.text_config, **options)
        for part, source in ((self.vision_tower, model.pheye.vision_tower), (self.step, model.pheye.language_model)):
            share_weights(part, source)
            fill(part, model.device)
        self.encoded = nn.Identity()
        for name, module in self.vision_tower.named_modules():
            if name.replace(".", "_") in self.parts.local_lora:
                module.register_forward_hook(functools.partial(self._add_lora, name.replace(".", "_")))
        layers = self.step.base_model.layers
        for block, layer in zip(self.parts.cross_attention_blocks, config.cross_attention_layers, strict=True):
            layers[layer].register_forward_pre_hook(functools.partial(self._run_block, block))

    def _add_lora(self, name: str, module: nn.Module, args: tuple, y: torch.Tensor) -> torch.Tensor:
        if name not in self.lora:
            return y
        lora, (x,) = self.lora[name], args
        if lora.convolution is None:
            return y + F.linear(F.linear(x, lora.A), lora.B) * lora.scaling
        return y + F.conv2d(F.conv2d(x, lora.A, **lora.convolution), lora.B) * lora.scaling

    def _run_block(self, block: nn.Module, layer: nn.Module, args: tuple) -> tuple:
        x = args[0]  # (R, T, D)

        def heads(tokens: torch.Tensor) -> torch.Tensor:
            return tokens.unflatten(-1, (-1, block.head_size)).transpose(1, 2)  # (R, H, tokens, width of a head)

        q, k, v = (
            heads(block.to_q(block.attention_norm(x))),
            heads(block.to_k(self.features)),
            heads(block.to_v(self.features)),
        )
        attended = F.softmax(q @ k.transpose(2, 3) * HEAD_WIDTH**-0.5, dim=-1) @ v
        x = x + block.to_out(attended.transpose(1, 2).flatten(2))
        return (x + block.mlp_out(F.gelu(block.mlp_in(block.mlp_norm(x)))), *args[1:])

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, V, 3, height, width) to (B, N, D)."""
        encoding, views = self.parts.view_encoding, []
        for lora, pixels, norm in (
            (self.parts.global_lora, pixel_values[:, :1], encoding.global_norm),
            (self.parts.local_lora, pixel_values[:, 1:], encoding.local_norm),
        ):
            self.lora = lora
            states = self.vision_tower(pixels.flatten(0, 1), output_hidden_states=True).hidden_states[-1]
            views.append(norm(states).unflatten(0, (len(pixel_values), -1)))  # (B, views, tokens, D)
        return self.encoded((torch.cat(views, 1) + encoding.view_embedding.weight[:, None]).flatten(1, 2))

    @torch.no_grad()
    def generate(self, input_ids, pixel_values=None, image_hidden_states=None, num_beams: int = 1, **kwargs):
        features = self.encode(pixel_values) if image_hidden_states is None else image_hidden_states
        self.features = features.repeat_interleave(len(input_ids) // len(features) * num_beams, dim=0)
        return self.step.generate(input_ids, num_beams=num_beams, **kwargs)


class LlavaStyle:
    """transformers' LLaVA with the same vision tower, language model and image tokens, which stand in the text."""

    def __init__(self, model: PheyeForConditionalGeneration):
        config, self.image_tokens = copy.deepcopy(model.config), model.config.tokens_per_image
        text_config = type(config.text_config)(
            **config.text_config.to_dict() | {"max_position_embeddings": 4 * self.image_tokens}
        )
        with torch.device("meta"):
            llava_config = LlavaConfig(
                vision_config=config.vision_config,
                text_config=text_config,
                image_token_id=config.vocab_size - 1,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
            )
            llava = LlavaForConditionalGeneration._from_config(llava_config, dtype=model.dtype)
        share_weights(llava.model.vision_tower, model.pheye.vision_tower)
        share_weights(llava.model.language_model, model.pheye.language_model.base_model)
        self.step = fill(llava, model.device)
        self.encoded = llava.model.multi_modal_projector

    def generate(self, input_ids, pixel_values, **kwargs):
        prefix = input_ids.new_full((len(input_ids), self.image_tokens), self.step.config.image_token_id)
        return self.step.generate(
            input_ids=torch.cat([prefix, input_ids], dim=1), pixel_values=pixel_values.flatten(0, 1), **kwargs
        )


@dataclass
class Reading:
    """A design taken apart.

    encode: pixels (B, V, 3, height, width), and tiles where the model has a branch, to features (B, N, D).
    prefill: a prompt's ids (R, T) and the features to a cache that holds both.
    step: reads one more token (R, 1) with the cache.
    """

    encode: Callable[..., torch.Tensor]
    prefill: Callable[[torch.Tensor, torch.Tensor], Cache]
    step: Callable[[torch.Tensor, Cache], object]


def budget_name(config: PheyeConfig, budget: int) -> str:
    kind = "joint layers" if config.self_attention_kind == "joint" else "blocks before"
    return f"{kind} {config.self_attention_budgets[budget]}"


def readings(model: PheyeForConditionalGeneration) -> dict[str, Reading]:
    """Plain Pheye, `model` at each of its budgets, a LLaVA-style model, and that without every second visual token.

    All have the same weights. Those that encode alike share `encode`. To choose which tokens to drop would cost more.
    """
    with torch.device("meta"):
        plain = PheyeForConditionalGeneration._from_config(without_budgets(model.config), dtype=model.dtype)
    share_weights(plain, model)
    llava = LlavaStyle(model).step
    with_blocks, dense = _encoder(model), _dense_encoder(llava)
    budgets = {
        budget_name(model.config, budget): _reading(model, with_blocks, vision_budget=budget)
        for budget in range(len(model.config.self_attention_budgets))
    }
    return {
        PLAIN: _reading(fill(plain, model.device), _encoder(plain)),
        **budgets,
        DENSE: _dense(llava, dense, every=1),
        HALF: _dense(llava, dense, every=2),
    }


def _encoder(model: PheyeForConditionalGeneration) -> Callable[..., torch.Tensor]:
    return lambda **images: model.get_image_features(**images).last_hidden_state


def _dense_encoder(model: LlavaForConditionalGeneration) -> Callable[..., torch.Tensor]:
    def encode(pixel_values: torch.Tensor, high_res_pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        return torch.cat(model.get_image_features(pixel_values.flatten(0, 1)).pooler_output)[None]

    return encode


def _reading(model: PheyeForConditionalGeneration, encode: Callable[..., torch.Tensor], **options) -> Reading:
    def prefill(ids: torch.Tensor, features: torch.Tensor) -> Cache:
        outputs = model(ids, image_hidden_states=features, use_cache=True, logits_to_keep=1, **options)
        return getattr(outputs, CACHE)

    def step(ids: torch.Tensor, cache: Cache):
        return model(ids, **{CACHE: cache})

    return Reading(encode, prefill, step)


def _dense(model: LlavaForConditionalGeneration, encode: Callable[..., torch.Tensor], every: int) -> Reading:
    """A model that reads every such visual token in its text, for one image."""

    def prefill(ids: torch.Tensor, features: torch.Tensor) -> Cache:
        text = model.get_input_embeddings()(ids)
        embeds = torch.cat([features[:, ::every], text], dim=1)  # (1, N / every + T, D)
        return getattr(model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1), CACHE)

    def step(ids: torch.Tensor, cache: Cache):
        return model(ids, **{CACHE: cache})

    return Reading(encode, prefill, step)
