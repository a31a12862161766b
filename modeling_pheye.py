"""Pheye: a frozen language model that reads an image through dense cross-attention blocks put before its layers.

Source: "Efficient Architectures for High Resolution Vision-Language Models", arXiv 2501.02584, section 2.

Shapes: B images, V views per image, N tokens (of one view, or of all views of an image), R text rows (a multiple of B:
questions, beams or samples of one image are adjacent), T text tokens, H heads, D width.
"""

import copy
import functools
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging
from transformers.utils.deprecation import deprecate_kwarg

from .blocks_pheye import (
    PheyeCrossAttentionBlock,
    PheyeImageCache,
    check_no_text_without_image,
    image_caches,
    text_in,
)
from .canvases_pheye import IMAGE, VIEW, images_in, view_table, views_in
from .configuration_pheye import HIGH_RES_STRIDE, PheyeConfig, learned_positions
from .generation_pheye import IMAGE_INPUTS, PheyeGenerationMixin
from .layers_pheye import CACHE, CALL, Step, TextCall, ViewCall, put_before, put_before_checkpoints, transformer_layers
from .vision_pheye import (
    GLOBAL_VIEWS,
    PheyeFusionBlock,
    PheyeLora,
    PheyeViewEncoding,
    add_view_lora,
    checkpoint_in_context,
    join_tiles,
    last_norms,
    place_vectors,
    run_with,
    view_maps,
)
from .visor_pheye import PheyeJointAttention, PheyeRefinementMixin

if TYPE_CHECKING:  # never run, but it makes every saved model carry these files too
    from .image_processing_pheye import PheyeImageProcessor  # noqa: F401
    from .pipeline_pheye import PheyeImageToTextPipeline  # noqa: F401
    from .processing_pheye import PheyeProcessor  # noqa: F401

MOST_BRANCH_PIXELS = 1536**2  # that the high-resolution branch sees at once: one image of 3 x 3 tiles of 512
MEDIA = ("pixel", "image", "video", "audio", "input_features")  # how names of inputs begin that text models pass over

logger = logging.get_logger(__name__)

# Arguments here are called `cache` on every release, and `takes_cache` accepts the older name too, with the library's
# own warning where the library gives it; a version that has passed keeps it silent.
END_OF_OLD_NAME = "5.40.0" if CACHE == "cache" else "5.0.0"
takes_cache = deprecate_kwarg("past_key_values", END_OF_OLD_NAME, new_name="cache", raise_if_both_names=True)


@dataclass
class PheyeModelOutputWithPast(BaseModelOutputWithPast):
    """Outputs of `PheyeModel`.

    last_hidden_state (R, T, D); cache (past_key_values before transformers 5.24): the language model's cache, with
    the image's keys and values behind its own; hidden_states, attentions: the language model's, of a joint layer
    those of the text alone; cross_attentions: per block (R, H, T, N), on request; image_hidden_states (B, N, D),
    where this call encoded or was given an image, and there, if the model has budgets, vision_budget (B,), the one
    taken; router_logits (R, budgets), where the router chose it.
    """

    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None
    vision_budget: torch.LongTensor | None = None
    router_logits: torch.FloatTensor | None = None


@dataclass
class PheyeCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Outputs of `PheyeForConditionalGeneration`: loss, logits (R, T, vocabulary), else as the base model's."""

    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None
    vision_budget: torch.LongTensor | None = None
    router_logits: torch.FloatTensor | None = None


def given_text(input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """The ids or embeddings of the text, whichever is given."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    return input_ids if inputs_embeds is None else inputs_embeds


class PheyePreTrainedModel(PreTrainedModel):
    config: PheyeConfig
    base_model_prefix = "pheye"  # not "model": transformers 5.23 renames `model.language_model.model` on loading
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "PheyeCrossAttentionBlock",
        "PheyeSelfAttentionBlock",
        "PheyeFusionBlock",
        "PheyeViewEncoding",
        "PheyeLora",
    ]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _tied_weights_keys = {}  # none beside the language model's own; PEFT looks for those where there is a dict
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs):
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        if enable:
            self.base_model.keep_views_in_checkpoints()
            self.base_model.put_before_all(put_before_checkpoints)

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs):
        if isinstance(attn_implementation, str):  # of all parts but the branch: most backbones refuse any but eager
            parts = dict.fromkeys(("", "vision_config", "text_config"), attn_implementation)
            attn_implementation = {**parts, "high_res_vision_config": "eager"}
        super().set_attn_implementation(attn_implementation, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs):
        loading_info, offload_index = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, *args, **kwargs
        )
        if model._hf_peft_config_loaded:
            # `load_adapter` takes every name with "lora" for the adapter's, and would call these missing and new.
            own = re.compile(r"(global|local)_lora\.\w+\.(original_module\.)?[AB]$")
            loading_info.missing_keys = {name for name in loading_info.missing_keys if not own.search(name)}
        encodings = {name: part for name, part in model.named_modules() if isinstance(part, PheyeViewEncoding)}
        for name, encoding in encodings.items():
            _begin_with_square(f"{name}.", encoding, loading_info, state_dict, checkpoint_files)
        return loading_info, offload_index

    # Gradient checkpointing asks for these. In the vision tower they would keep the activations of frozen layers for
    # a gradient that nobody needs; where LoRA trains there, the patch embedding's begins the graph.

    def enable_input_require_grads(self):
        self.base_model.language_model.enable_input_require_grads()

    def disable_input_require_grads(self):
        self.base_model.language_model.disable_input_require_grads()

    # Also the model without the head has the language model's: what resizes its embeddings must resize that one too.

    def get_output_embeddings(self) -> nn.Module:
        return self.base_model.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.base_model.language_model.set_output_embeddings(new_embeddings)

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
            spread = 0 if getattr(module, "starts_at_zero", False) else self.config.initializer_range / scale
            init.normal_(module.weight, std=spread)
            if module.bias is not None:  # as of a new head of the language model
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0 if getattr(module, "starts_at_zero", False) else 0.02)
        elif getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
        elif isinstance(module, PheyeJointAttention):
            init.zeros_(module.gates)


def _begin_with_square(prefix: str, encoding: PheyeViewEncoding, loading_info, state_dict, checkpoint_files):
    """Where a model with canvases loads a checkpoint with k x k crops, let its vectors begin with that one's means."""
    square, own = f"{prefix}view_embedding.weight", {f"{prefix}{axis}_embedding.weight" for axis in ("row", "column")}
    if square not in loading_info.unexpected_keys or not own <= loading_info.missing_keys:
        return
    table = (state_dict or {}).get(square)
    for file in checkpoint_files or () if table is None else ():
        with safe_open(file, framework="pt") as tensors:
            if square in tensors.keys():  # noqa: SIM118 - it is no dict
                table = tensors.get_tensor(square)
    like = encoding.global_norm.weight
    for embedding, values in zip(
        (encoding.row_embedding, encoding.column_embedding),
        place_vectors(table.float(), encoding.longest),
        strict=True,
    ):
        embedding.weight = nn.Parameter(values.to(like), requires_grad=embedding.weight.requires_grad)
        embedding.weight._is_hf_initialized = True
    loading_info.missing_keys -= own
    loading_info.unexpected_keys.discard(square)


def check_grids(config: PheyeConfig) -> list[int]:
    """Channels of the maps that the branch gives to each fusion block.

    Raises:
        ValueError: if its last map has not one cell per patch of a view, or another does not divide into patches.
    """
    size, patches = config.high_res_tile_size, config.patches_per_side
    with torch.device("meta"):
        backbone = AutoBackbone.from_config(copy.deepcopy(config.high_res_vision_config), attn_implementation="eager")
        maps = backbone(torch.empty(1, 3, size, size)).feature_maps
    grids = [tuple(one.shape[-2:]) for one in maps]
    if grids[-1] != (patches, patches) or any(side % patches for grid in grids for side in grid):
        raise ValueError(
            f"The backbone's last map has {grids[-1][0]} x {grids[-1][1]} cells for a tile of {size} pixels, but a "
            f"view has {patches} x {patches} patches (all maps: {grids}); take a backbone whose last stride is "
            f"{HIGH_RES_STRIDE}."
        )
    return [one.shape[1] for one in maps]


class PheyeModel(PheyePreTrainedModel, PheyeRefinementMixin):
    """Vision tower, language model and the trained parts between them; gives hidden states (see the generation class).

    The trained parts stand beside the two pretrained models, whose own names and layouts stay as they are: hooks add
    the LoRA updates inside the vision tower and run a block before a layer of the language model. They find LoRA and
    blocks through this model when they run, not when they are made, so that what has replaced them since (PEFT's
    copies of `modules_to_save`) is used.
    """

    def __init__(
        self,
        config: PheyeConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
        high_res_tower: PreTrainedModel | None = None,
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
        self.high_res_tower = self.fusion_blocks = None
        if config.high_res_vision_config is not None:
            channels = check_grids(config)
            self.high_res_tower = high_res_tower or AutoBackbone.from_config(
                config.high_res_vision_config, dtype=dtype, attn_implementation="eager"
            )
            self.fusion_blocks = nn.ModuleList(
                PheyeFusionBlock(config.vision_config.hidden_size, channels) for channels in channels
            )
            self._fusion_before = {layer: block for block, layer in enumerate(config.high_res_fusion_layers)}
        self.add_refinement(config)
        self._block_before = {layer: block for block, layer in enumerate(config.cross_attention_layers)}
        self._adapt_vision_tower()
        self.put_before_all(put_before)
        self._hooked = [self]  # whom the hooks call; in a list, so that it is no part of itself
        self.post_init()

    def put_before_all(self, put: Callable[[nn.ModuleList, Step], None]):
        """`put` the steps before the layers of both towers."""
        put(self.decoder_layers(), self.run_block)
        if self.high_res_tower is not None:
            put(self.vision_layers(), self.run_fusion)

    def train(self, mode: bool = True) -> "PheyeModel":
        """A frozen branch stays as it was trained, and drops nothing. Statistics of batch norms stay in any case: they
        are no parameters, so what trains would be saved without them."""
        super().train(mode)
        if self.high_res_tower is not None:
            is_frozen = not any(part.requires_grad for part in self.high_res_tower.parameters())
            for part in self.high_res_tower.modules():
                if is_frozen or isinstance(part, nn.BatchNorm2d):
                    part.training = False
        return self

    # --- Image: views through the vision tower ---

    def vision_layers(self) -> nn.ModuleList:
        """The vision tower's layers."""
        return transformer_layers(self.vision_tower, self.config.vision_config.num_hidden_layers, "vision tower")

    def checkpoint_vision_tower(self):
        """Make gradient checkpoints of the vision tower's layers alone; `gradient_checkpointing_enable` makes those of
        all parts."""
        tower = self.vision_tower
        # The second is its name before transformers 5.24.
        enable = getattr(tower, "activation_checkpointing_enable", None) or tower.gradient_checkpointing_enable
        enable()
        self.keep_views_in_checkpoints()

    def keep_views_in_checkpoints(self):
        """Let the vision tower's checkpoints know which views are global when they run again."""
        for layer in self.vision_layers():
            layer._gradient_checkpointing_func = functools.partial(
                checkpoint_in_context, layer._gradient_checkpointing_func
            )

    def _adapt_vision_tower(self):
        """Give LoRA to the patch embedding and to all linears of the encoder layers, and read out the last layer."""
        config, tower = self.config, self.vision_tower
        layers = self.vision_layers()
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
                module.view_lora = name  # a module that a quantizer puts in its place lacks this mark, and the hook
        for norm in last_norms(tower, layers):
            # The features are the states before the last norm (section 2.2), so it passes them on as they are.
            norm.register_forward_hook(_pass_on)

    def _add_lora(self, name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        global_lora = self.global_lora[name] if self.config.global_lora_rank else None
        local_lora = self.local_lora[name] if self.config.local_lora_rank else None
        if global_lora is None and local_lora is None:
            return output
        config = self.config
        global_views = 0 if torch.compiler.is_compiling() else GLOBAL_VIEWS.get()
        if global_views is None:
            if config.canvases is not None or config.max_images > 1:
                raise ValueError(
                    "The vision tower runs outside of this model's own call, and cannot know which views are global. "
                    "Call get_image_features or encode_views; checkpoint it by this model's own "
                    "gradient_checkpointing_enable (in Trainer, gradient_checkpointing) or checkpoint_vision_tower, "
                    "not by those of the tower or of another library."
                )
            global_views = 0
        return add_view_lora(output, args[0], global_lora, local_lora, config.views_per_image, global_views)

    def _check_hooks(self):
        """A copy of a module's attributes shares its hooks, which go on to use the original's LoRA and blocks; refuse
        to run as such a copy."""
        if self._hooked[0] is not self:
            raise ValueError(
                "This model is a copy that would compute with the weights of the model it was copied from. If "
                "nn.DataParallel made it, as Trainer does in one process with several GPUs, start a process per GPU "
                "(`accelerate launch`, `torchrun`), or let the process see one GPU by CUDA_VISIBLE_DEVICES. In other "
                "cases use copy.deepcopy."
            )

    def _check_lora(self):
        """Quantizers put other modules in the place of linears, without the hooks; refuse to run without LoRA."""
        marked = {getattr(module, "view_lora", None) for module in self.vision_tower.modules()}
        lost = [name for name in (*self.global_lora, *self.local_lora) if name not in marked]
        if lost:
            raise ValueError(
                f"Modules of the vision tower were replaced after the model was made, and lost their LoRA: {lost[0]} "
                f"and {len(lost) - 1} more. Leave the vision tower as it is: give the quantization config the list "
                '`modules_to_not_quantize` of this model\'s config ("pheye.vision_tower" and others).'
            )

    def run_fusion(self, layer: int, hidden_states: torch.Tensor, call: ViewCall) -> torch.Tensor:
        """The step before each layer of the vision tower: the fusion block that stands there, if one does."""
        block = self._fusion_before.get(layer)
        if block is None:
            return hidden_states
        call.steps_run += 1
        return self.fusion_blocks[block](hidden_states, call.maps[block])

    def encode_high_res(
        self, high_res_pixel_values: torch.Tensor, table: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """The branch on whole images: for each fusion block what each view shows of its map, (views, G * G, C).

        Args:
            high_res_pixel_values: (B, C, 3, T, T), images as tiles in the crops' order.
            table: the view table (B, V, 6) of images that may have any number of crops.

        Raises:
            ValueError: if they have another rank, number of tiles or size.
        """
        config, size, tiles = self.config, self.config.high_res_tile_size, self.config.views_per_image - 1
        images, grid = [], f"{config.tiles_per_side} x {config.tiles_per_side}"
        if table is not None:
            images = images_in(table)
            grid = tiles = max(image.first_tile + image.rows * image.columns for image in images)
        shape = tuple(high_res_pixel_values.shape)
        if shape[1:] != (tiles, 3, size, size):
            raise ValueError(
                f"high_res_pixel_values has shape {shape}, but this model takes (images, {tiles}, 3, {size}, {size}): "
                f"{grid} tiles of {size} pixels. Make it with this model's own processor."
            )
        pixels = high_res_pixel_values.to(next(self.high_res_tower.parameters()).dtype)  # as vision transformers do
        if table is None:
            # A few images at a time: without a graph, their large maps are gone before the next ones come.
            groups = pixels.split(max(1, MOST_BRANCH_PIXELS // (tiles * size**2)))
            grids = [(config.tiles_per_side, config.tiles_per_side)] * len(groups)
        else:
            grids = [(image.rows, image.columns) for image in images]
            groups = [pixels[image.row, image.first_tile :][None, : image.rows * image.columns] for image in images]
        found = [self._maps_of(group, *grid) for group, grid in zip(groups, grids, strict=True)]
        return [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _maps_of(self, tiles: torch.Tensor, rows: int, columns: int) -> list[torch.Tensor]:
        maps = self.high_res_tower(join_tiles(tiles, rows, columns)).feature_maps
        return [view_maps(whole, rows, columns, self.config.patches_per_side) for whole in maps]

    def views_of(self, image_grids: torch.Tensor | None, rows: int, views: int | None) -> torch.Tensor | None:
        """The view table (B, V, 6) of the images of a call; None if each row has one image of k x k crops, as all can.

        Args:
            image_grids: (B, I, 2), or None: one image of k x k crops for each row.
            rows: B, for which there are pixels or features.
            views: V of the pixels, if there are any.

        Raises:
            ValueError: if the grids are missing, none of this model's, or do not fit.
        """
        config = self.config
        if image_grids is None and config.canvases is None:
            if config.max_images == 1:
                return None
            image_grids = torch.tensor(config.grids).expand(rows, 1, 2)
        elif image_grids is None:
            raise ValueError(
                "image_grids is missing beside pixel_values or image_hidden_states: this model has canvases. "
                "Make it with this model's own processor."
            )
        shape = tuple(image_grids.shape)
        if len(shape) != 3 or shape[0] != rows or shape[2] != 2 or image_grids.is_floating_point():
            raise ValueError(
                f"image_grids has shape {shape} ({image_grids.dtype}), but must hold integers ({rows}, images, 2). "
                "Make it with this model's own processor."
            )
        grids = image_grids.tolist()
        counts = []
        for row, images in enumerate(grids):
            images = [grid for grid in images if grid != [0, 0]]
            if wrong := [grid for grid in images if grid not in config.grids]:
                raise ValueError(
                    f"Row {row} has an image of {wrong[0]} crops, but this model has the canvases {config.grids}. "
                    "Make it with this model's own processor."
                )
            if len(images) > config.max_images:
                raise ValueError(
                    f"Row {row} has {len(images)} images, but this model takes {config.max_images} (max_images)."
                )
            counts.append(sum(map(views_in, images)))
        most = max(counts)
        if views not in (None, most):
            raise ValueError(
                f"pixel_values has {views} views, but row {counts.index(most)} of image_grids has {most}. Make both "
                "with this model's own processor."
            )
        return view_table(grids)

    def _branch_maps(
        self, images: int, high_res_pixel_values: torch.Tensor | None, table: torch.Tensor | None
    ) -> list[torch.Tensor] | None:
        """What `encode_high_res` gives, where the model has a branch."""
        if self.high_res_tower is None:
            if high_res_pixel_values is not None:
                raise ValueError("high_res_pixel_values is given, but this model has no high-resolution branch.")
            return None
        if high_res_pixel_values is None or len(high_res_pixel_values) != images:
            found = "is missing" if high_res_pixel_values is None else f"holds {len(high_res_pixel_values)} images"
            raise ValueError(
                f"high_res_pixel_values {found}, but this model's branch needs it for {images}. Make it with this "
                "model's own processor."
            )
        return self.encode_high_res(high_res_pixel_values, table)

    def _call_vision_tower(
        self, views: torch.Tensor, maps: list[torch.Tensor] | None, eagerly: bool = False, **kwargs
    ) -> BaseModelOutput:
        """One call of the tower on views, with what `encode_high_res` gave for them; `eagerly` even if compiled."""
        run = self.vision_tower._call_impl if eagerly else self.vision_tower
        if maps is None:
            return run(views, return_dict=True, **kwargs)
        call = ViewCall(self.vision_tower, maps)
        outputs = run(views, return_dict=True, **{CALL: call}, **kwargs)
        call.check()
        return outputs

    def encode_views(
        self,
        pixel_values: torch.Tensor,
        high_res_pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """The vision tower on all views at once, each with the LoRA set of its kind (section 2.2): what the view
        encoding begins with, and all that depends on the image alone while LoRA does not train.

        Args:
            pixel_values: (B, V, 3, height, width), global view first.
            high_res_pixel_values: (B, crops, 3, T, T), where the model has a branch: the image as tiles.
            image_grids: (B, I, 2), rows and columns of each image's crops, where the model has canvases, or rows have
                several images or none.

        Returns:
            `last_hidden_state` (B * V, N, D), and what else the tower gives on request; with `image_grids` those of
            the views that are there, in their order.

        Raises:
            ValueError: if `pixel_values` has another rank, number of views or size, or an input is missing that this
                model needs beside it.
        """
        table = self._table_of(pixel_values, image_grids)
        return self._encode_views(pixel_values, high_res_pixel_values, table, **kwargs)

    def _table_of(self, pixel_values: torch.Tensor, image_grids: torch.Tensor | None) -> torch.Tensor | None:
        """`views_of` the images in `pixel_values`, whose shape is checked."""
        shape, size = tuple(pixel_values.shape), self.config.vision_config.image_size
        if image_grids is None and self.config.canvases is None:
            views, tiles = self.config.views_per_image, self.config.tiles_per_side
            what = f"of one image or more: one global view and {tiles} x {tiles} crops of {size} pixels"
        else:
            views, what = shape[1] if len(shape) > 1 else "views", f"of one row or more: views of {size} pixels"
        if pixel_values.ndim != 5 or not len(pixel_values) or shape[1:] != (views, 3, size, size):
            raise ValueError(
                f"pixel_values has shape {shape}, but this model takes (images, {views}, 3, {size}, {size}) {what}. "
                "Make it with this model's own processor."
            )
        table = self.views_of(image_grids, len(pixel_values), views)
        if table is not None and not table.shape[1]:
            raise ValueError("image_grids has no image in any row; give the text alone.")
        return table

    def _encode_views(
        self,
        pixel_values: torch.Tensor,
        high_res_pixel_values: torch.Tensor | None,
        table: torch.Tensor | None,
        **kwargs,
    ) -> BaseModelOutput:
        if not torch.compiler.is_compiling():
            self._check_hooks()
            self._check_lora()
        views = pixel_values.flatten(0, 1)
        maps = self._branch_maps(len(pixel_values), high_res_pixel_values, table)
        if table is None:
            outputs = self._call_vision_tower(views, maps, **kwargs)
        else:
            there = (table[..., IMAGE] >= 0).flatten().to(views.device)
            outputs = self._encode_images(views[there], maps, table, **kwargs)
        tokens = outputs.last_hidden_state.shape[1]
        if tokens != self.config.tokens_per_view:
            raise ValueError(
                f"{type(self.vision_tower).__name__} gives {tokens} tokens a view where "
                f"{self.config.tokens_per_view} were expected; Pheye needs a ViT with one token per patch."
            )
        return outputs

    def _encode_images(
        self, views: torch.Tensor, maps: list[torch.Tensor] | None, table: torch.Tensor, **kwargs
    ) -> BaseModelOutput:
        """The vision tower on images of any number of views (those that are there, one image after another): one call,
        as processes that share a sharded model must make equally many."""
        kinds = table[..., VIEW].flatten()
        is_crop = kinds[kinds >= 0] > 0
        global_views = int((~is_crop).sum())
        if len(is_crop) == global_views * self.config.views_per_image:
            return run_with(0, self._call_vision_tower, views, maps, **kwargs)
        order = is_crop.argsort(stable=True)
        back, order = order.argsort().to(views.device), order.to(views.device)
        maps = None if maps is None else [level[order] for level in maps]
        # Not a part of what compiles the whole model: compiled code cannot tell LoRA how many views are global.
        run = torch.compiler.disable(run_with) if torch.compiler.is_compiling() else run_with
        outputs = run(global_views, self._call_vision_tower, views[order], maps, eagerly=True, **kwargs)

        def put_back(value: torch.Tensor | tuple | None):
            if isinstance(value, tuple):
                return tuple(map(put_back, value))
            return None if value is None else value[back]

        return BaseModelOutput(
            **{name: put_back(outputs.get(name)) for name in ("last_hidden_state", "hidden_states", "attentions")}
        )

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        high_res_pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode images: `encode_views`, then the view encoding.

        Args:
            pixel_values: (B, V, 3, height, width), global view first.
            high_res_pixel_values: (B, crops, 3, T, T), where the model has a branch: the image as tiles.
            image_grids: (B, I, 2), as for `encode_views`.

        Returns:
            `last_hidden_state` (B, V * N, D), 0 where there is no view; with `output_hidden_states` and
            `output_attentions` also the vision tower's own, whose rows are views (B * V).

        Raises:
            ValueError: if `pixel_values` has another rank, number of views or size, or an input is missing that this
                model needs beside it.
        """
        table = self._table_of(pixel_values, image_grids)
        outputs = self._encode_views(pixel_values, high_res_pixel_values, table, **kwargs)
        features = self.view_encoding(outputs.last_hidden_state, table)
        if self.visual_convolution is not None:
            features = self.visual_convolution(features)
        return BaseModelOutputWithPooling(
            last_hidden_state=features,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    # --- Text: the language model with blocks before its layers ---

    def decoder_layers(self) -> nn.ModuleList:
        """The language model's layers."""
        return transformer_layers(self.language_model, self.config.text_config.num_hidden_layers, "language model")

    def run_block(self, layer: int, hidden_states: torch.Tensor, call: TextCall) -> torch.Tensor:
        """The step before each layer of the language model: what refines the image there, and the block."""
        hidden_states = self.run_refinement(layer, hidden_states, call)
        block = self._block_before.get(layer)
        if block is None:
            return hidden_states
        image_cache = None if call.image_caches is None else call.image_caches[block]
        call.steps_run += 1
        # Positional arguments: reentrant checkpointing sees no gradient through keywords.
        hidden_states, weights = self.cross_attention_blocks[block](
            hidden_states, call.visual_states, image_cache, call.output_cross_attentions, call.image_mask
        )
        if weights is not None:
            call.cross_attentions.append(weights)
        return hidden_states

    def image_caches(self, cache: Cache) -> list[PheyeImageCache]:
        """The part of a cache that holds the image: a layer per block, then one per joint layer."""
        joint = 0 if self.joint_attention is None else len(self.config.self_attention_layers)
        return image_caches(cache, self.config.text_config.num_hidden_layers, len(self.cross_attention_blocks) + joint)

    def image_features(
        self,
        cache: Cache | None,
        pixel_values: torch.Tensor | None = None,
        high_res_pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        image_hidden_states: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The features (B, N, D) of the image that a call is given, if it is: as pixels, or encoded beforehand; and
        the mask (B, 1, 1, N) of those that are there, None for all.

        Raises:
            ValueError: if both are given, or what goes with pixels without them; if the features are not of this
                model's shape, or if `cache` holds text that was read without an image.
        """
        if pixel_values is None and high_res_pixel_values is not None:
            raise ValueError("high_res_pixel_values is given without pixel_values; give both.")
        if pixel_values is None and image_hidden_states is None:
            if image_grids is not None:
                raise ValueError("image_grids is given without pixel_values; give both.")
            return None, None
        if cache is not None and not torch.compiler.is_compiling():
            check_no_text_without_image(cache, self.image_caches(cache))
        if image_hidden_states is not None and pixel_values is not None:
            raise ValueError("Give one of pixel_values and image_hidden_states, not both.")
        rows = len(image_hidden_states if pixel_values is None else pixel_values)
        table = self.views_of(image_grids, rows, None)
        if table is not None and not table.shape[1]:
            return None, None  # no row has an image
        if image_hidden_states is None:
            outputs = self.get_image_features(pixel_values, high_res_pixel_values, image_grids, return_dict=True)
            features = outputs.last_hidden_state
            return features, self._mask_of(table, features.device)
        views = self.config.views_per_image if table is None else table.shape[1]
        tokens, width = self.tokens_read(views), self.config.vision_config.hidden_size
        if image_hidden_states.ndim != 3 or image_hidden_states.shape[1:] != (tokens, width):
            raise ValueError(
                f"image_hidden_states has shape {tuple(image_hidden_states.shape)}, but this model reads (images, "
                f"{tokens}, {width}). Make it with this model's own get_image_features."
            )
        # As if it had been encoded here.
        features = image_hidden_states.to(next(self.view_encoding.parameters()).dtype)
        return features, self._mask_of(table, features.device)

    def tokens_read(self, views: int) -> int:
        """How many tokens the text reads of so many views."""
        return views * self.config.tokens_per_view

    def _mask_of(self, table: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        there = None if table is None else table[..., IMAGE] >= 0  # (B, V)
        if there is None or there.all():
            return None
        return there.repeat_interleave(self.config.tokens_per_view, dim=1)[:, None, None].to(device)

    def call_language_model(
        self, tower: nn.Module, inputs: dict, may_route: bool = True
    ) -> tuple[ModelOutput, TextCall]:
        """Call the language model, or its base model, with the image.

        Args:
            tower: the one of both to call.
            inputs: arguments of `forward`; what is not Pheye's own goes on to the language model.
            may_route: if no budget is given, let the router choose it where there is one; else the largest is taken.

        Returns:
            What the language model gives, and the call, which has collected what the blocks give.

        Raises:
            ValueError: if text and image do not fit each other or the model.
        """
        images = {name: inputs.pop(name, None) for name in IMAGE_INPUTS}
        cache, use_cache, vision_budget, output_cross_attentions = (
            inputs.pop(name, None) for name in ("cache", "use_cache", "vision_budget", "output_cross_attentions")
        )
        text = given_text(inputs["input_ids"], inputs["inputs_embeds"])
        self._check_arguments(text, cache, inputs)
        image_hidden_states, image_mask = self.image_features(cache, **images)
        if image_hidden_states is not None and (not len(image_hidden_states) or len(text) % len(image_hidden_states)):
            raise ValueError(
                f"There are {len(text)} rows of text for {len(image_hidden_states)} images; give each image the same "
                "number of rows, one after another."
            )
        if use_cache is None:
            use_cache = getattr(self.config.text_config, "use_cache", True) and not self.training
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config.text_config)
        caches = None if cache is None else self.image_caches(cache)
        in_cache = bool(caches and caches[0].is_initialized)
        if output_cross_attentions is None:
            wanted = inputs.get("output_attentions")
            wanted = self.config.output_attentions if wanted is None else wanted
            output_cross_attentions = wanted and self.config._attn_implementation == "eager"
        skips_layers = self.training and getattr(self.config.text_config, "layerdrop", 0) > 0
        has_image = image_hidden_states is not None or in_cache
        call = TextCall(
            self.language_model,
            len(self.cross_attention_blocks) if has_image and not skips_layers else 0,
            image_hidden_states,
            image_mask,
            caches,
            cache,
            use_cache,
            output_cross_attentions,
            self._budgets(vision_budget, image_hidden_states, image_mask, in_cache, may_route),
            inputs.get("attention_mask"),
        )
        outputs = tower(return_dict=True, **call.keywords(), **inputs)
        call.check()
        if caches and call.vision_budget is not None:
            caches[0].vision_budget = call.vision_budget
        return outputs, call

    def _check_arguments(self, text: torch.Tensor, cache: Cache | None, others: dict):
        unknown = [name for name, value in others.items() if value is not None and name.startswith(MEDIA)]
        if unknown:
            raise ValueError(f"Pheye has no input {unknown[0]}; the image goes into pixel_values.")
        if torch.compiler.is_compiling():
            return
        self._check_hooks()
        if learned_positions(self.config.text_config) is not None:
            self.check_positions(text, cache, others.get("position_ids"))

    def check_positions(self, text: torch.Tensor, cache: Cache | None, position_ids: torch.LongTensor | None):
        """Refuse a text that has more tokens than the language model has positions; with positions of its own, as of
        padded or packed texts, one that goes behind the last."""
        length, most = text.shape[1] + text_in(cache), self.config.text_positions
        if position_ids is not None and most is not None and length > most:  # asked then alone: a device would wait
            length = int(position_ids.max()) + 1
        self.positions_left(length)

    def positions_left(self, length: int) -> int | None:
        """The language model's positions behind a text of this length, whether cached or not; None if all are left.

        Raises:
            ValueError: if the text alone has too many tokens.
        """
        positions = self.config.text_positions
        if positions is not None and length > positions:
            raise ValueError(
                f"The text has {length} tokens, but the language model has {positions} positions; shorten the prompt."
            )
        return None if positions is None else positions - length

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
        output_cross_attentions: bool | None = None,
        high_res_pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        vision_budget: int | torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PheyeModelOutputWithPast:
        """Hidden states of text that may have an image; for the arguments see `PheyeForConditionalGeneration`."""
        outputs, call = self.call_language_model(
            self.language_model.base_model,
            {
                "input_ids": input_ids,
                "pixel_values": pixel_values,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "cache": cache,
                "inputs_embeds": inputs_embeds,
                "image_hidden_states": image_hidden_states,
                "use_cache": use_cache,
                "output_cross_attentions": output_cross_attentions,
                "high_res_pixel_values": high_res_pixel_values,
                "image_grids": image_grids,
                "vision_budget": vision_budget,
                **kwargs,
            },
        )
        return PheyeModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **call.outputs(),
            **{CACHE: getattr(outputs, CACHE)},
        )


def _pass_on(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return args[0]


class PheyeForConditionalGeneration(PheyePreTrainedModel, PheyeGenerationMixin):
    """Pheye with the language model's head: answers questions about images, and trains."""

    def __init__(self, config: PheyeConfig, **parts: PreTrainedModel):
        super().__init__(config)
        self.pheye = PheyeModel(config, **parts)
        self.post_init()

    @classmethod
    def from_pretrained_parts(
        cls,
        vision: str | os.PathLike,
        language_model: str | os.PathLike,
        high_res: str | os.PathLike | None = None,
        dtype: torch.dtype | None = None,
        **config,
    ) -> "PheyeForConditionalGeneration":
        """An untrained Pheye from a pretrained vision transformer and language model, each held in memory once.

        Args:
            vision: folder or Hub id of a vision transformer, or of a model such as CLIP that also has a text tower.
            language_model: folder or Hub id of a causal language model.
            high_res: folder or Hub id of a backbone for the high-resolution branch, such as ConvNeXt.
            dtype: of all parts; by default that in which the language model was saved.
            config: fields of `PheyeConfig`, such as `tiles_per_side`, and `attn_implementation`.

        Raises:
            TypeError: for any other argument. ValueError: if the parts do not fit each other or the fields.
        """
        if unknown := config.keys() - {*cls.config_class.__annotations__, "attn_implementation"}:
            raise TypeError(
                f"from_pretrained_parts has no argument {min(unknown)}; it takes fields of PheyeConfig, such as "
                "tiles_per_side. For another revision of a part, give its folder."
            )
        if high_res is not None and "high_res_vision_config" in config:
            raise ValueError("Give one of high_res and high_res_vision_config, not both.")
        language_model = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype or "auto")
        vision_config = AutoConfig.from_pretrained(vision)
        vision_tower = AutoModel.from_pretrained(
            vision, config=getattr(vision_config, "vision_config", vision_config), dtype=language_model.dtype
        )
        if high_res is not None:
            config["high_res_vision_config"] = AutoConfig.from_pretrained(high_res)
        config = cls.config_class(vision_config=vision_tower.config, text_config=language_model.config, **config)
        parts = {"vision_tower": vision_tower, "language_model": language_model}
        if high_res is not None:
            # Not by `AutoBackbone.from_pretrained`, which takes Hub ids but no folders.
            with torch.device("meta"):
                backbone = type(AutoBackbone.from_config(copy.deepcopy(config.high_res_vision_config)))
            parts["high_res_tower"] = backbone.from_pretrained(
                high_res, config=config.high_res_vision_config, dtype=language_model.dtype
            )
            config.high_res_vision_config = parts["high_res_tower"].config  # one object, as of the other parts
        model = cls._from_config(config, dtype=language_model.dtype, **parts)
        # Making the config has cleared this setting of the parts, and their masks go by it.
        model.set_attn_implementation(model.config._attn_implementation)
        model.generation_config = language_model.generation_config
        return model.eval()

    @property
    def model(self) -> PheyeModel:
        """The model without the head, by the name it has in most of transformers."""
        return self.pheye

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        high_res_pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """See `PheyeModel.get_image_features`."""
        return self.pheye.get_image_features(pixel_values, high_res_pixel_values, image_grids, **kwargs)

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
        output_cross_attentions: bool | None = None,
        high_res_pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        vision_budget: int | torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PheyeCausalLMOutputWithPast:
        """Logits, and the loss where there are labels.

        Args:
            input_ids: (R, T); R is a multiple of the number of images, rows of one image adjacent. Without an image,
                here or in the cache, this is the bare language model.
            pixel_values: (B, V, 3, height, width), from the processor.
            high_res_pixel_values: (B, crops, 3, T, T), from the processor, where the model has a branch.
            image_grids: (B, I, 2), from the processor, where the model has canvases, or rows have several images or
                none.
            attention_mask, position_ids, inputs_embeds, use_cache: as of the language model.
            cache: of the language model; it also holds the image's keys and values. `past_key_values` is the same.
            image_hidden_states: (B, N, D), from `get_image_features`, in place of `pixel_values`.
            vision_budget: how closely to read the images, where the model has budgets: an index into
                `config.self_attention_budgets`, one for all images or a list or tensor (B,). By default the router's
                choice where there is a router and no labels, else the largest.
            labels: (R, T), -100 where there is nothing to learn.
            output_cross_attentions: give the blocks' weights; for this call they attend eagerly, and the language
                model as it always does. By default where `output_attentions` is asked for and all attention is eager.
            logits_to_keep: number of last positions, or the positions, to compute logits of; 0 for all.

        Raises:
            ValueError: if text, image and labels do not fit each other or the model; the message names the numbers.
        """
        if labels is not None and not torch.compiler.is_compiling() and not (labels[:, 1:] != -100).any():
            raise ValueError(
                f"All labels (shape {tuple(labels.shape)}) are -100 after the first position, so there is nothing to "
                "learn; was the answer cut off or masked whole?"
            )
        if not torch.compiler.is_compiling():
            self.pheye.check_positions(given_text(input_ids, inputs_embeds), cache, position_ids)
        outputs, call = self.pheye.call_language_model(
            self.pheye.language_model,
            {
                "input_ids": input_ids,
                "pixel_values": pixel_values,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "cache": cache,
                "inputs_embeds": inputs_embeds,
                "image_hidden_states": image_hidden_states,
                "use_cache": use_cache,
                "output_cross_attentions": output_cross_attentions,
                "high_res_pixel_values": high_res_pixel_values,
                "image_grids": image_grids,
                "vision_budget": vision_budget,
                "logits_to_keep": logits_to_keep,
                **kwargs,
            },
            may_route=labels is None,
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
            **call.outputs(),
            **{CACHE: getattr(outputs, CACHE)},
        )


PheyeModel.register_for_auto_class("AutoModel")
PheyeForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
