"""Pheye: a frozen language model that reads an image through dense cross-attention blocks put before its layers.

Source: "Efficient Architectures for High Resolution Vision-Language Models", arXiv 2501.02584, section 2.

Shapes: B images, V views per image, N tokens (of one view, or of all views of an image), R text rows (a multiple of B:
questions, beams or samples of one image are adjacent), T text tokens, H heads, D width.
"""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    cache_utils,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_pheye import HEAD_WIDTH, PheyeConfig

if TYPE_CHECKING:  # never run, but it makes every saved model carry these files too
    from .image_processing_pheye import PheyeImageProcessor  # noqa: F401
    from .pipeline_pheye import PheyeImageToTextPipeline  # noqa: F401
    from .processing_pheye import PheyeProcessor  # noqa: F401

IMAGE_INPUTS = ("pixel_values", "image_hidden_states")


# What models take and give back as their cache: "cache" since transformers 5.24, "past_key_values" before. Arguments
# here are called `cache` on every release, and `takes_cache` accepts the older name too, with the library's own
# warning where the library gives it; a version that has passed keeps it silent.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
END_OF_OLD_NAME = "5.40.0" if CACHE == "cache" else "5.0.0"
takes_cache = deprecate_kwarg("past_key_values", END_OF_OLD_NAME, new_name="cache", raise_if_both_names=True)


@dataclass
class PheyeModelOutputWithPast(BaseModelOutputWithPast):
    """Outputs of `PheyeModel`.

    last_hidden_state (R, T, D); cache (past_key_values before transformers 5.24): the language model's cache, with the
    image's keys and values behind its own; hidden_states, attentions: the language model's; cross_attentions: per
    block (R, H, T, N), with eager attention only; image_hidden_states (B, N, D), where this call encoded or was given
    an image.
    """

    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class PheyeCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Outputs of `PheyeForConditionalGeneration`: loss, logits (R, T, vocabulary), else as the base model's."""

    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None


# --- Views: which rows of the vision tower's batch are the global view and which are crops ---


def split_views(rows: torch.Tensor, views: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B * V, ...) to the global views (B, 1, ...) and crops (B, V - 1, ...): the one place that tells them apart."""
    rows = rows.unflatten(0, (-1, views))  # (B, V, ...)
    return rows[:, :1], rows[:, 1:]


def join_views(global_view: torch.Tensor, crops: torch.Tensor) -> torch.Tensor:
    """The inverse of `split_views`."""
    return torch.cat([global_view, crops], dim=1).flatten(0, 1)  # (B * V, ...)


def dropout(x: torch.Tensor, p: float) -> tuple[torch.Tensor, float]:
    """x with a share `p` of its entries set to zero, and the factor by which the rest is still to be scaled.

    torch draws each entry's chance by itself, one after another on a CPU: a sixth of a training step. There four come
    from one random number, which makes `p` a multiple of 2 ** -16.
    """
    if x.device.type != "cpu":
        return F.dropout(x, p), 1.0
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return x.masked_fill(bits[: x.numel()].view(x.shape) < round(p * 2**16) - 2**15, 0), 1 / (1 - p)


class PheyeLora(nn.Module):
    """Low-rank update B(A(x)) * alpha / rank of one frozen linear or convolution (section 2.2), in its two factors.

    A and B are plain parameters, not modules, so that PEFT's target names and "all-linear" do not take them for
    layers of the vision tower.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.scaling = alpha / rank
        self.dropout = dropout
        if isinstance(base, nn.Conv2d):
            self.convolution = {"stride": base.stride, "padding": base.padding}
            self.A = nn.Parameter(torch.empty(rank, base.in_channels, *base.kernel_size))
            self.B = nn.Parameter(torch.empty(base.out_channels, rank, 1, 1))
        else:
            self.convolution = None
            self.A = nn.Parameter(torch.empty(rank, base.in_features))
            self.B = nn.Parameter(torch.empty(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For the frozen module's input (B, views, ...), A(x) as (B, views, N, rank) and B, scaled, as (rank, D)."""
        scaling = self.scaling
        if self.training and self.dropout:
            x, rest = dropout(x, self.dropout)
            scaling *= rest
        A = self.A.to(x.dtype)
        if self.convolution is None:
            low = F.linear(x, A).flatten(2, -2)
        else:
            low = F.conv2d(x.flatten(0, 1), A, **self.convolution).flatten(2).transpose(1, 2).unflatten(0, x.shape[:2])
        return low, self.B.flatten(1).T * scaling  # a new tensor, for FSDP takes the parameter away again


# --- Cross-attention ---


# Being a DummyLayer keeps the image out of masks and prefetching; releases before 5.23 have none.
CacheLayer = getattr(cache_utils, "DummyLayer", cache_utils.CacheLayerMixin)


class PheyeImageCache(CacheLayer):
    """Keys and values (B, H, N, D) of an image for one block, appended as a layer to the language model's cache.

    It holds one row per image, however many text rows share it: repeating and reordering rows, cropping and offloading
    leave it alone.
    """

    supports_early_init = False
    is_compileable = True
    is_croppable = True
    is_sliding = False

    def __init__(self):
        self.reset()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states

    def reset(self):
        self.keys, self.values, self.is_initialized = None, None, False

    def lazy_initialization(self, *args): ...

    def get_max_length(self) -> int:
        return -1

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def offload(self): ...

    def prefetch(self): ...

    def crop(self, *args): ...

    def reorder_cache(self, beam_idx: torch.LongTensor): ...

    def batch_repeat_interleave(self, repeats: int): ...

    def batch_select_indices(self, indices: torch.Tensor):
        raise NotImplementedError(
            "Rows of a cache that holds an image cannot be selected: they share the image's row."
        )


def image_caches(cache: Cache, text_layers: int, blocks: int) -> list[PheyeImageCache]:
    """The image caches of `cache`, one per block; appended behind the language model's own layers at first use."""
    found = [layer for layer in cache.layers if isinstance(layer, PheyeImageCache)]
    if not found:
        # A cache that grows layer by layer would take ours for its own, so its layers are made beforehand.
        while cache.layer_class_to_replicate is not None and len(cache.layers) < text_layers:
            cache.layers.append(cache.layer_class_to_replicate())
        found = [PheyeImageCache() for _ in range(blocks)]
        cache.layers.extend(found)
    return found


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax(query key^T * scaling) value, unmasked: ((B, T, H, D), weights (B, H, T, N))."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, H, T, N)
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class PheyeCrossAttentionBlock(GradientCheckpointingLayer):
    """Dense cross-attention block: text attends over all image tokens, then an MLP, both residual (section 2.1)."""

    def __init__(self, config: PheyeConfig):
        super().__init__()
        text_size, vision_size = config.text_config.hidden_size, config.vision_config.hidden_size
        mlp_size = 4 * text_size // config.cross_attention_reduction
        self.config = config
        self.head_size = config.cross_attention_size // config.cross_attention_heads
        self.scaling = HEAD_WIDTH**-0.5  # also where the reduction makes heads narrower
        self.is_causal = False
        self.attention_norm = nn.LayerNorm(text_size, eps=1e-5)
        self.to_q = nn.Linear(text_size, config.cross_attention_size)
        self.to_k = nn.Linear(vision_size, config.cross_attention_size)
        self.to_v = nn.Linear(vision_size, config.cross_attention_size)
        self.to_out = nn.Linear(config.cross_attention_size, text_size)
        self.mlp_norm = nn.LayerNorm(text_size, eps=1e-5)
        self.mlp_in = nn.Linear(text_size, mlp_size)
        self.mlp_out = nn.Linear(mlp_size, text_size)
        self.to_out.ends_residual = self.mlp_out.ends_residual = True  # start smaller, see `_init_weights`

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_hidden_states: torch.Tensor | None,
        image_cache: PheyeImageCache | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Condition `hidden_states` (R, T, D) on an image: on `image_hidden_states` (B, N, D), whose keys and values
        go into `image_cache`, or else on those in it. Returns the new states and weights (R, H, T, N) or None."""
        if image_hidden_states is None:
            key, value = image_cache.keys, image_cache.values
        else:
            key, value = self.project(image_hidden_states)
            if image_cache is not None:
                image_cache.update(key, value)
        attended, weights = self.attend(self.attention_norm(hidden_states), key, value, output_attentions)
        hidden_states = hidden_states + self.to_out(attended)
        return hidden_states + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(hidden_states)))), weights

    def project(self, image_hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, H, N, D) of image features (B, N, D).

        Contiguous, because every decoding step reads them whole, and strided ones are read more slowly.
        """
        key = self.to_k(image_hidden_states).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        value = self.to_v(image_hidden_states).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        return key.contiguous(), value.contiguous()

    def attend(
        self, hidden_states: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of (R, T, D) over keys and values (B, H, N, D): ((R, T, D), weights (R, H, T, N) or None)."""
        rows, length = hidden_states.shape[:2]
        images = key.shape[0]
        if rows % images:
            raise ValueError(
                f"The text has {rows} rows and the image {images}; each image must serve the same number of rows."
            )
        # The rows of one image become one longer row, so that its keys and values are neither copied nor reordered.
        query = self.to_q(hidden_states).reshape(images, rows // images * length, -1, self.head_size).transpose(1, 2)
        implementation = self.config._attn_implementation
        # On a CPU, torch's kernel takes up to 12 times as long as two plain products for a single query in bfloat16.
        is_cpu_step = implementation == "sdpa" and query.shape[2] == 1 and query.device.type == "cpu"
        attention = eager_attention
        if implementation != "eager" and not is_cpu_step:
            attention = ALL_ATTENTION_FUNCTIONS[implementation]
        attended, weights = attention(
            self, query, key, value, None, dropout=0.0, scaling=self.scaling, is_causal=False,
            output_attentions=output_attentions,
        )  # (B, R / B * T, H, D)  # fmt: skip
        if not output_attentions or implementation != "eager":
            weights = None
        else:
            weights = weights.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)  # (R, H, T, N)
        return attended.reshape(rows, length, -1), weights


class ImageContext:
    """What one call gives to its blocks. It travels as a keyword through the language model's layers, so that nothing
    about a call is left on a module and threads may share a model. No dataclass: FSDP copies those on the way, and
    what blocks note would be lost."""

    def __init__(
        self,
        image_hidden_states: torch.Tensor | None = None,
        image_caches: list[PheyeImageCache] | None = None,
        cross_attentions: list[torch.Tensor] | None = None,
    ):
        self.image_hidden_states = image_hidden_states
        self.image_caches = image_caches
        self.cross_attentions = cross_attentions
        self.blocks_run = 0


# --- The model ---


def given_text(input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """The ids or embeddings of the text, whichever is given."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    return input_ids if inputs_embeds is None else inputs_embeds


def transformer_layers(model: nn.Module, count: int, kind: str) -> nn.ModuleList:
    """The list of `count` transformer layers inside a `kind` of model, wherever its family keeps it."""
    for module in model.modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) == count
        if is_list and all(isinstance(layer, GradientCheckpointingLayer) for layer in module):
            return module
    raise ValueError(
        f"{type(model).__name__} cannot be a Pheye {kind}: it has no list of {count} transformer layers "
        "(GradientCheckpointingLayer)."
    )


class PheyePreTrainedModel(PreTrainedModel):
    config: PheyeConfig
    base_model_prefix = "pheye"  # not "model": transformers 5.23 renames `model.language_model.model` on loading
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["PheyeCrossAttentionBlock", "PheyeViewEncoding", "PheyeLora"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs):
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        if enable:
            self.base_model._set_block_free_checkpoints()

    # Gradient checkpointing asks for these. In the vision tower they would keep the activations of frozen layers for
    # a gradient that nobody needs; where LoRA trains there, the patch embedding's begins the graph.

    def enable_input_require_grads(self):
        self.base_model.language_model.enable_input_require_grads()

    def disable_input_require_grads(self):
        self.base_model.language_model.disable_input_require_grads()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """The paper's initial state (section 2.1): blocks that hardly change the language model, LoRA that is zero."""
        super()._init_weights(module)
        if isinstance(module, PheyeLora):
            init.kaiming_uniform_(module.A, a=math.sqrt(5))
            init.zeros_(module.B)
        elif isinstance(module, nn.Linear):
            depth = max(self.config.text_config.num_hidden_layers, 36)
            scale = math.sqrt(2 * depth) if getattr(module, "ends_residual", False) else 1
            init.normal_(module.weight, std=0.01 / scale)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)


class PheyeViewEncoding(nn.Module):
    """Tells views apart: a LayerNorm for the global view and one for the crops, then a learned vector per view."""

    def __init__(self, config: PheyeConfig):
        super().__init__()
        self.global_norm = nn.LayerNorm(config.vision_config.hidden_size, eps=1e-5)
        self.local_norm = nn.LayerNorm(config.vision_config.hidden_size, eps=1e-5)
        self.view_embedding = nn.Embedding(config.views_per_image, config.vision_config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B * V, N, D) to (B, V * N, D)."""
        views = self.view_embedding.num_embeddings
        global_view, crops = split_views(hidden_states, views)
        hidden_states = join_views(self.global_norm(global_view), self.local_norm(crops)).unflatten(0, (-1, views))
        vectors = self.view_embedding(torch.arange(views, device=hidden_states.device))  # (V, D)
        return (hidden_states + vectors[:, None]).flatten(1, 2)


class PheyeModel(PheyePreTrainedModel):
    """Vision tower, language model and the trained parts between them; gives hidden states (see the generation class).

    The trained parts stand beside the two pretrained models, whose own names and layouts stay as they are: forward
    hooks add the LoRA updates inside the vision tower and run a block before a layer of the language model.
    """

    def __init__(
        self,
        config: PheyeConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        dtype = torch.get_default_dtype()  # one for all parts, whatever their own configs were saved with
        self.vision_tower = vision_tower or AutoModel.from_config(config.vision_config, dtype=dtype)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config, dtype=dtype)
        self.global_lora = nn.ModuleDict()
        self.local_lora = nn.ModuleDict()
        self.view_encoding = PheyeViewEncoding(config)
        self.cross_attention_blocks = nn.ModuleList(
            PheyeCrossAttentionBlock(config) for _ in config.cross_attention_layers
        )
        self._hook_vision_tower()
        self._hook_language_model()
        self.post_init()

    def _hook_vision_tower(self):
        """Give LoRA to the patch embedding and to all linears of the encoder layers, and read out the last layer."""
        config, tower = self.config, self.vision_tower
        layers = transformer_layers(tower, config.vision_config.num_hidden_layers, "vision tower")
        adapted = {module for module in layers.modules() if isinstance(module, nn.Linear)}
        adapted.add(next(module for module in tower.modules() if isinstance(module, nn.Conv2d)))
        for name, module in tower.named_modules():
            if module in adapted:
                name = name.replace(".", "_")  # flat, so that no target name of PEFT is its last part
                for lora, rank, alpha in (
                    (self.global_lora, config.global_lora_rank, config.global_lora_alpha),
                    (self.local_lora, config.local_lora_rank, config.local_lora_alpha),
                ):
                    if rank:
                        lora[name] = PheyeLora(module, rank, alpha, config.lora_dropout)
                module.register_forward_hook(functools.partial(self._add_lora, name))
        for name, module in tower.named_children():
            if isinstance(module, nn.LayerNorm) and name in ("post_layernorm", "layernorm", "norm"):
                # The features are the states before the last norm (section 2.2), so it passes them on as they are.
                module.register_forward_hook(_pass_on)

    def _decoder_layers(self) -> list[tuple[int | None, nn.Module]]:
        """The language model's layers, each with the index of the block before it."""
        layers = transformer_layers(self.language_model, self.config.text_config.num_hidden_layers, "language model")
        blocks = {layer: block for block, layer in enumerate(self.config.cross_attention_layers)}
        return [(blocks.get(index), layer) for index, layer in enumerate(layers)]

    def _hook_language_model(self):
        """Run each block right before its layer; every layer drops the keyword that carries the image."""
        for block, layer in self._decoder_layers():
            layer.register_forward_pre_hook(functools.partial(self._run_block, block), with_kwargs=True)

    # Hooks find LoRA and blocks through their owner when they run, not when they are made, so that what has replaced
    # them since (PEFT's copies of `modules_to_save`) is used.

    def _add_lora(self, name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Add the LoRA updates to the output of a module of the vision tower: (B * V, N, D), of a convolution
        (B * V, D, height, width); the global set's to global views, the local set's to crops.

        One product adds both, so that half precision rounds once and the large output is written once: it has room for
        both ranks, and each row's numbers in one of them, zeros in the other.
        """
        if name not in self.global_lora and name not in self.local_lora:
            return output
        views, rows = self.config.views_per_image, output
        if isinstance(module, nn.Conv2d):
            rows = output.flatten(2).transpose(1, 2)
        lows, ups = [], []
        for lora, x in zip((self.global_lora, self.local_lora), split_views(args[0], views), strict=True):
            if name in lora:
                low, up = (factor.to(rows) for factor in lora[name](x))
            else:
                low, up = rows.new_zeros(*x.shape[:2], rows.shape[1], 0), rows.new_zeros(0, rows.shape[2])
            lows.append(low)
            ups.append(up)
        (global_low, local_low), (global_up, local_up) = lows, ups
        low = join_views(F.pad(global_low, (0, len(local_up))), F.pad(local_low, (len(global_up), 0)))
        low, up = low.flatten(0, 1), torch.cat(ups)  # (B * V * N, ranks) and (ranks, D)
        if rows is output and not torch.is_grad_enabled():
            rows.view(-1, rows.shape[-1]).addmm_(low, up)
            return rows
        # Not in place: autograd would copy the gradient of what was changed.
        rows = torch.addmm(rows.flatten(0, 1), low, up).view_as(rows)
        return (rows.transpose(1, 2) if isinstance(module, nn.Conv2d) else rows).reshape(output.shape)

    def _run_block(self, block: int | None, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        context = kwargs.pop("image_context", None)
        if block is None or context is None:
            return args, kwargs
        image_cache = None if context.image_caches is None else context.image_caches[block]
        hidden_states = args[0] if args else kwargs["hidden_states"]
        context.blocks_run += 1
        # Positional arguments: reentrant checkpointing sees no gradient through keywords.
        hidden_states, weights = self.cross_attention_blocks[block](
            hidden_states, context.image_hidden_states, image_cache, context.cross_attentions is not None
        )
        if weights is not None:
            context.cross_attentions.append(weights)
        if args:
            return (hidden_states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden_states}

    def _set_block_free_checkpoints(self):
        """Keep blocks out of their layers' checkpoints in releases before 5.23, where those include a layer's hooks:
        the image would stand in a checkpoint's keywords, through which reentrant checkpointing sends no gradient."""
        if "__call__" in vars(GradientCheckpointingLayer):
            for block, layer in self._decoder_layers():
                checkpoint = layer._gradient_checkpointing_func
                layer._gradient_checkpointing_func = functools.partial(
                    self._checkpoint_layer, block, layer, checkpoint
                )

    def _checkpoint_layer(self, block: int | None, layer: nn.Module, checkpoint: Callable, call: Callable, *args):
        args, kwargs = self._run_block(block, layer, args, call.keywords)
        return checkpoint(functools.partial(call.func, **kwargs), *args)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encode images: all views in one pass of the vision tower, each with the LoRA set of its kind (section 2.2).

        Args:
            pixel_values: (B, V, 3, height, width), global view first.

        Returns:
            `last_hidden_state` (B, V * N, D); with `output_hidden_states` and `output_attentions` also the vision
            tower's own, whose rows are views (B * V).

        Raises:
            ValueError: if `pixel_values` has another rank, number of views or size.
        """
        self._check_pixel_values(pixel_values)
        if not torch.compiler.is_compiling():
            self._check_lora_hooks()
        outputs = self.vision_tower(pixel_values.flatten(0, 1), return_dict=True, **kwargs)
        hidden_states = outputs.last_hidden_state  # (B * V, N, D)
        if hidden_states.shape[1] != self.config.tokens_per_view:
            raise ValueError(
                f"{type(self.vision_tower).__name__} gives {hidden_states.shape[1]} tokens a view where "
                f"{self.config.tokens_per_view} were expected; Pheye needs a ViT with one token per patch."
            )
        return BaseModelOutputWithPooling(
            last_hidden_state=self.view_encoding(hidden_states),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def run_language_model(
        self,
        language_model: Callable[..., ModelOutput],
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_hidden_states: torch.Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
        **kwargs,
    ) -> tuple[ModelOutput, ImageContext]:
        """Call the language model, with or without its head, on text and the image of this call or of its cache."""
        if pixel_values is not None and image_hidden_states is not None:
            raise ValueError("Give one of pixel_values and image_hidden_states, not both.")
        images = pixel_values if image_hidden_states is None else image_hidden_states
        if pixel_values is not None:
            self._check_pixel_values(pixel_values)
        if images is not None:
            self._check_rows(len(given_text(input_ids, inputs_embeds)), len(images))
        if pixel_values is not None:
            image_hidden_states = self.get_image_features(pixel_values).last_hidden_state
        if use_cache is None:
            use_cache = getattr(self.config.text_config, "use_cache", True) and not self.training
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config.text_config)
        context = self._image_context(image_hidden_states, cache, kwargs)
        outputs = language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **{CACHE: cache},
            **({} if context is None else {"image_context": context}),
            **kwargs,
        )
        if context is not None:
            self._check_blocks_ran(context)
        return outputs, context or ImageContext()

    def image_caches(self, cache: Cache) -> list[PheyeImageCache]:
        """The part of a cache that holds the image, one layer per block."""
        return image_caches(cache, self.config.text_config.num_hidden_layers, len(self.cross_attention_blocks))

    def _image_context(
        self, image_hidden_states: torch.Tensor | None, cache: Cache | None, kwargs: dict
    ) -> ImageContext | None:
        """The context for this call, or None where neither the call nor its cache has an image."""
        caches = None if cache is None else self.image_caches(cache)
        if image_hidden_states is None and not (caches and caches[0].is_initialized):
            return None
        output_attentions = kwargs.get("output_attentions")
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        return ImageContext(image_hidden_states, caches, [] if output_attentions else None)

    def _check_pixel_values(self, pixel_values: torch.Tensor):
        size = self.config.vision_config.image_size
        views, tiles = self.config.views_per_image, self.config.tiles_per_side
        if pixel_values.ndim != 5 or pixel_values.shape[1:] != (views, 3, size, size):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, but this model takes (images, {views}, 3, "
                f"{size}, {size}): one global view and {tiles} x {tiles} crops of {size} pixels. Make it with this "
                "model's own processor."
            )

    def _check_lora_hooks(self):
        """Quantizers put other modules in the place of linears, without the hooks; refuse to run without LoRA."""
        hooks = [hook for module in self.vision_tower.modules() for hook in module._forward_hooks.values()]
        hooked = {hook.args[0] for hook in hooks if getattr(hook, "func", None) == self._add_lora}
        lost = [name for name in (*self.global_lora, *self.local_lora) if name not in hooked]
        if lost:
            raise ValueError(
                f"Modules of the vision tower were replaced after the model was made, and lost their LoRA: {lost[0]} "
                f"and {len(lost) - 1} more. Leave the vision tower as it is: give the quantization config the list "
                '`modules_to_not_quantize` of this model\'s config ("pheye.vision_tower" and others).'
            )

    def _check_rows(self, rows: int, images: int):
        if images == 0 or rows % images:
            raise ValueError(
                f"There are {rows} rows of text for {images} images; give each image the same number of rows, one "
                "after another."
            )

    def _check_blocks_ran(self, context: ImageContext):
        """Some language models drop keywords on the way to their layers, and the image with them; refuse those."""
        skips_layers = self.training and getattr(self.config.text_config, "layerdrop", 0) > 0
        if context.blocks_run < len(self.cross_attention_blocks) and not skips_layers:
            raise ValueError(
                f"{type(self.language_model).__name__} cannot be Pheye's language model: it does not pass keyword "
                f"arguments on to its layers, so {len(self.cross_attention_blocks) - context.blocks_run} of "
                f"{len(self.cross_attention_blocks)} cross-attention blocks did not see the image."
            )

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_hidden_states: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PheyeModelOutputWithPast:
        """Hidden states of text that may have an image; for the arguments see `PheyeForConditionalGeneration`."""
        outputs, context = self.run_language_model(
            self.language_model.base_model,
            input_ids,
            inputs_embeds,
            pixel_values,
            image_hidden_states,
            cache,
            use_cache,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )
        return PheyeModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=tuple(context.cross_attentions) if context.cross_attentions else None,
            image_hidden_states=context.image_hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )


def _pass_on(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return args[0]


class PheyeForConditionalGeneration(PheyePreTrainedModel, GenerationMixin):
    """Pheye with the language model's head: answers questions about images, and trains."""

    def __init__(self, config: PheyeConfig, **parts: PreTrainedModel):
        super().__init__(config)
        self.pheye = PheyeModel(config, **parts)
        self.post_init()

    @classmethod
    def from_pretrained_parts(
        cls, vision: str | os.PathLike, language_model: str | os.PathLike, dtype: torch.dtype | None = None, **config
    ) -> "PheyeForConditionalGeneration":
        """An untrained Pheye from a pretrained vision transformer and language model, each held in memory once.

        Args:
            vision: folder or Hub id of a vision transformer, or of a model such as CLIP that also has a text tower.
            language_model: folder or Hub id of a causal language model.
            dtype: of all parts; by default that in which the language model was saved.
            config: fields of `PheyeConfig`, such as `tiles_per_side`.
        """
        language_model = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype or "auto")
        vision_config = AutoConfig.from_pretrained(vision)
        vision_tower = AutoModel.from_pretrained(
            vision, config=getattr(vision_config, "vision_config", vision_config), dtype=language_model.dtype
        )
        config = cls.config_class(vision_config=vision_tower.config, text_config=language_model.config, **config)
        model = cls._from_config(
            config, dtype=language_model.dtype, vision_tower=vision_tower, language_model=language_model
        )
        # Making the config has cleared this setting of the parts, and their masks go by it.
        model.set_attn_implementation(model.config._attn_implementation)
        model.generation_config = language_model.generation_config
        return model.eval()

    @property
    def model(self) -> PheyeModel:
        """The model without the head, by the name it has in most of transformers."""
        return self.pheye

    def get_output_embeddings(self) -> nn.Module:
        return self.pheye.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.pheye.language_model.set_output_embeddings(new_embeddings)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """See `PheyeModel.get_image_features`."""
        return self.pheye.get_image_features(pixel_values, **kwargs)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_hidden_states: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PheyeCausalLMOutputWithPast:
        """Logits, and the loss where there are labels.

        Args:
            input_ids: (R, T); R is a multiple of the number of images, rows of one image adjacent. Without an image,
                here or in the cache, this is the bare language model.
            pixel_values: (B, V, 3, height, width), from the processor.
            image_hidden_states: (B, N, D), from `get_image_features`, in place of `pixel_values`.
            labels: (R, T), -100 where there is nothing to learn.
            logits_to_keep: number of last positions, or the positions, to compute logits of; 0 for all.

        Raises:
            ValueError: if text, image and labels do not fit each other or the model; the message names the numbers.
        """
        if labels is not None and not torch.compiler.is_compiling() and not (labels[:, 1:] != -100).any():
            raise ValueError(
                f"All labels (shape {tuple(labels.shape)}) are -100 after the first position, so there is nothing to "
                "learn; was the answer cut off or masked whole?"
            )
        self._check_length(given_text(input_ids, inputs_embeds).shape[1])
        outputs, context = self.pheye.run_language_model(
            self.pheye.language_model,
            input_ids,
            inputs_embeds,
            pixel_values,
            image_hidden_states,
            cache,
            use_cache,
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=outputs.logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return PheyeCausalLMOutputWithPast(
            loss=loss,
            logits=outputs.logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=tuple(context.cross_attentions) if context.cross_attentions else None,
            image_hidden_states=context.image_hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _check_length(self, length: int):
        config = self.config.text_config
        positions = getattr(config, "max_position_embeddings", None)
        is_scaled = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
        if positions is not None and length > positions and not is_scaled:
            raise ValueError(
                f"The text has {length} tokens, but the language model has {positions} positions; shorten the prompt."
            )

    # --- generate: the image is encoded once and keeps one row, and only the first forward pass of a turn sees it ---

    def _expand_inputs_for_generation(self, expand_size: int = 1, input_ids=None, **model_kwargs):
        images = {name: model_kwargs.pop(name) for name in IMAGE_INPUTS if name in model_kwargs}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **images}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        chunked = generation_config.prefill_chunk_size is not None
        if model_kwargs.get("pixel_values") is not None and (chunked or generation_config.use_cache is False):
            # Without a cache every step needs the image, and prefill in chunks takes no pixels: encode it beforehand.
            pixel_values = model_kwargs.pop("pixel_values")
            model_kwargs["image_hidden_states"] = self.get_image_features(pixel_values).last_hidden_state
        if model_kwargs.get("image_hidden_states") is not None and chunked:
            image_hidden_states = model_kwargs.pop("image_hidden_states")
            caches = self.pheye.image_caches(model_kwargs[CACHE])
            for block, cache in zip(self.pheye.cross_attention_blocks, caches, strict=True):
                cache.update(*block.project(image_hidden_states))

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` reads the names that it may take
    def prepare_inputs_for_generation(self, input_ids, *args, is_first_iteration: bool = False, **kwargs):
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and inputs.get("use_cache", True):
            for name in IMAGE_INPUTS:
                inputs.pop(name, None)
        return inputs

    def _get_candidate_generator(self, model_kwargs, assistant_model=None, **kwargs):
        if assistant_model is not None and "image" not in assistant_model.input_modalities:
            # An assistant that only reads text guesses without the image; this model corrects it.
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in IMAGE_INPUTS}
        return super()._get_candidate_generator(model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs)


PheyeModel.register_for_auto_class("AutoModel")
PheyeForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
