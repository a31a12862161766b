"""What runs right before the layers of the two pretrained models, and what one call of them carries to it.

What the hooks amount to:

    for l, layer in enumerate(vision layers):
        x = fuse[l](x, maps) if l in high_res_fusion_layers else x
        x = layer(x)
    for l, layer in enumerate(text layers):
        image = refine[l](image) if l in self_attention_layers else image
        h = block[l](h, image) if l in cross_attention_layers else h
        h = layer(h)

They leave both models' names, tensor-parallel plan and initialisation alone, and any family will do.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .blocks_pheye import PheyeImageCache

# What models take and give back as their cache: "cache" since transformers 5.24, "past_key_values" before.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
CALL = "pheye_call"  # the keyword that carries a `Call` to the layers


class Call:
    """What one call of a tower gives to the steps before its layers, and what these give back.

    It travels as a keyword to the layers, so that nothing about a call is left on a module and threads may share a
    model. No dataclass: FSDP copies those on the way, and what steps give back would be lost.
    """

    kind: str  # of tower
    steps: str  # their name, and what they see

    def __init__(self, tower: PreTrainedModel, steps_due: int):
        self.tower, self.steps_due, self.steps_run = type(tower).__name__, steps_due, 0
        self.layer, self.layer_keywords = None, {}  # the layer that comes next, and what it is called with

    def check(self):
        """Some models drop keywords on the way to their layers, and the image with them; refuse those."""
        if self.steps_run < self.steps_due:
            raise ValueError(
                f"{self.tower} cannot be Pheye's {self.kind}: it does not pass keyword arguments on to its layers, so "
                f"{self.steps_due - self.steps_run} of {self.steps_due} {self.steps}."
            )


class ViewCall(Call):
    """Of the vision tower: `maps`, one (B * V, G * G, C) per fusion block."""

    kind, steps = "vision tower", "fusion blocks did not see the high-resolution image"

    def __init__(self, tower: PreTrainedModel, maps: list[torch.Tensor]):
        super().__init__(tower, steps_due=len(maps))
        self.maps = maps


class TextCall(Call):
    """Of the language model: features and caches of the image, and how closely to read it; the blocks' weights come
    back."""

    kind, steps = "language model", "cross-attention blocks did not see the image"

    def __init__(
        self,
        tower: PreTrainedModel,
        steps_due: int,
        image_hidden_states: torch.Tensor | None,
        image_mask: torch.Tensor | None,
        image_caches: list[PheyeImageCache] | None,
        cache: Cache | None,
        use_cache: bool,
        output_cross_attentions: bool,
        vision_budget: list[int] | None,
        attention_mask: torch.Tensor | None,
    ):
        super().__init__(tower, steps_due)
        # What goes in.
        self.image_hidden_states = image_hidden_states
        self.image_mask = image_mask
        self.vision_budget = vision_budget  # of each image; None until the router has chosen
        self.attention_mask = attention_mask  # of the text, for the router
        self.image_caches = image_caches
        self.cache = cache
        self.use_cache = use_cache
        self.output_cross_attentions = output_cross_attentions
        # What comes out, or changes from layer to layer.
        self.visual_states = image_hidden_states
        self.open_layer = None  # a layer that ran on the text alone, and is still to run on image and text
        self.cross_attentions: list[torch.Tensor] = []
        self.router_logits: torch.Tensor | None = None

    def keywords(self) -> dict:
        """What the language model is called with beside its text: the cache and, where there is an image, this."""
        in_cache = bool(self.image_caches and self.image_caches[0].is_initialized)
        carried = {CALL: self} if self.image_hidden_states is not None or in_cache else {}
        return {"use_cache": self.use_cache, CACHE: self.cache, **carried}

    def outputs(self) -> dict:
        """What came out, by the names that it has in the model's output."""
        image, budget = self.image_hidden_states, self.vision_budget
        return {
            "cross_attentions": tuple(self.cross_attentions) or None,
            "image_hidden_states": image,
            "vision_budget": None if budget is None else torch.tensor(budget, device=image.device),
            "router_logits": self.router_logits,
        }


Step = Callable[[int, torch.Tensor, Call], torch.Tensor]


def put_before(layers: nn.ModuleList, step: Step):
    """Run `step(index, states, call) -> states` right before each layer, in calls of the model that carry a `Call`;
    every layer drops the keyword that carries it."""
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(functools.partial(_take_step, step, index), with_kwargs=True)


def _take_step(step: Step, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    call = kwargs.pop(CALL, None)
    if call is None:
        return args, kwargs
    call.layer, call.layer_keywords = layer, kwargs
    states = step(index, args[0] if args else kwargs["hidden_states"], call)
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


CHECKPOINTS_CONTAIN_HOOKS = "__call__" in vars(GradientCheckpointingLayer)  # in releases before 5.23


def drops_cache(layer: nn.Module) -> bool:
    """Whether a call of this layer is a gradient checkpoint now, which takes no cache."""
    if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
        return False
    return CHECKPOINTS_CONTAIN_HOOKS or torch.is_grad_enabled()


def put_before_checkpoints(layers: nn.ModuleList, step: Step):
    """Keep steps out of their layers' gradient checkpoints in releases before 5.23, where those include hooks: the
    image would stand in a checkpoint's keywords, through which reentrant checkpointing sends no gradient."""
    if CHECKPOINTS_CONTAIN_HOOKS:
        for index, layer in enumerate(layers):
            layer._gradient_checkpointing_func = functools.partial(
                _checkpoint_after_step, step, index, layer, layer._gradient_checkpointing_func
            )


def _checkpoint_after_step(step: Step, index: int, layer: nn.Module, checkpoint: Callable, call: Callable, *args):
    args, kwargs = _take_step(step, index, layer, args, call.keywords)
    return checkpoint(functools.partial(call.func, **kwargs), *args)


def transformer_layers(model: nn.Module, count: int, kind: str) -> nn.ModuleList:
    """The list of `count` transformer layers inside a `kind` of model, wherever its family keeps it.

    Raises:
        ValueError: if there is none.
    """
    for module in model.modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) == count
        if is_list and all(isinstance(layer, GradientCheckpointingLayer) for layer in module):
            return module
    raise ValueError(
        f"{type(model).__name__} cannot be a Pheye {kind}: it has no list of {count} transformer layers "
        "(GradientCheckpointingLayer)."
    )
