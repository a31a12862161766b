"""How an image is read more closely: blocks that refine its tokens, budgets that say which of them run, and the router
that picks a budget.

After "VISion On Request: Enhanced VLLM efficiency with sparse, dynamically selected, vision-language interactions",
arXiv 2603.23495, whose details are not all known: which parts are our choice stands in docs/architecture.md.

Shapes: B images, N tokens of all views of an image, P patches of a view, R text rows (a multiple of B), T text tokens,
D width, K budgets.
"""

import inspect
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.utils.output_capturing import _active_collector

from .blocks_pheye import PheyeAttentionBlock, PheyeImageCache
from .configuration_pheye import HEAD_WIDTH, PheyeConfig
from .layers_pheye import CACHE, TextCall, drops_cache


class PheyeSelfAttentionBlock(PheyeAttentionBlock):
    """Refines an image: its tokens attend over those of all its views, then an MLP, both residual."""

    def __init__(self, config: PheyeConfig):
        size = config.vision_config.hidden_size
        heads = max(1, size // HEAD_WIDTH)
        super().__init__(config, size, size, size, heads, 4 * size, scaling=(size // heads) ** -0.5)
        self.to_out.starts_at_zero = self.mlp_out.starts_at_zero = True  # a new block changes nothing

    def forward(self, visual_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """visual_states (B, N, D); mask (B, 1, 1, N), the tokens that are there, None for all: the new states."""
        normed = self.attention_norm(visual_states)
        attended, _ = self.attend(normed, *self.project(normed), False, mask)
        return self.add_to(visual_states, attended)


class PheyeJointAttention(nn.Module):
    """Refines an image by layers of the language model, which run on image and text together as if the image stood
    before the text (the paper's own equation). One pair of linears for all layers, and a gate for each.

    With U an image in the text's width, T the text and TL a layer under its causal mask:

        U', T_joint = TL([U; T])        V' = V + down(U' - U)        T' = TL(T) + tanh(gate) (T_joint - TL(T))

    U never sees T, so that its keys and values are those of the image alone, and are kept with it.
    """

    def __init__(self, config: PheyeConfig):
        super().__init__()
        text_size, vision_size = config.text_config.hidden_size, config.vision_config.hidden_size
        self.config = config.text_config
        self.visual_up = nn.Linear(vision_size, text_size)
        self.visual_down = nn.Linear(text_size, vision_size)
        self.visual_down.starts_at_zero = True  # a new one changes nothing
        self.gates = nn.Parameter(torch.zeros(len(config.self_attention_layers)))

    def keywords(self, rotary: nn.Module, states: torch.Tensor, open_keys: torch.Tensor) -> dict:
        """What a layer is called with: all of the image at position 0, and the keys that are open to each query."""
        positions = torch.zeros(1, states.shape[1], dtype=torch.long, device=states.device)
        return {
            "attention_mask": self.mask(open_keys, states),
            "position_ids": positions,
            "position_embeddings": rotary(states, position_ids=positions),
        }

    def mask(self, open_keys: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """(R, 1, T, K) of bool, in the form that the language model's attention takes."""
        if self.config._attn_implementation == "sdpa":
            return open_keys
        if self.config._attn_implementation != "eager":
            raise ValueError(
                f'self_attention_kind="joint" cannot mask {self.config._attn_implementation}; use '
                'attn_implementation="sdpa" or "eager".'
            )
        mask = torch.zeros(open_keys.shape, dtype=states.dtype, device=open_keys.device)
        return mask.masked_fill(~open_keys, torch.finfo(states.dtype).min)

    def see_image(
        self, layer: nn.Module, rotary: nn.Module, visual_states: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The layer on images alone: their new states (B, N, D), and the layer's keys and values (B, H, N, D)."""
        states, recorder = self.visual_up(visual_states), RecordingCache()
        keywords = self.keywords(rotary, states, causal(states.shape[1], mask, states.device))
        seen = run_again(layer, states, **keywords, **{CACHE: recorder})
        return visual_states + self.visual_down(seen - states), recorder.keys, recorder.values

    def see_both(
        self,
        layer: nn.Module,
        rotary: nn.Module,
        visual_states: torch.Tensor,
        mask: torch.Tensor | None,
        hidden_states: torch.Tensor,
        keywords: dict,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer on images and text as one sequence: new states of the images (B, N, D) and of the text (R, T, D).

        The slow way, for gradient checkpoints, whose layers take no cache.
        """
        rows, length = hidden_states.shape[:2]
        each, tokens = rows // len(visual_states), visual_states.shape[1]
        states = self.visual_up(visual_states).repeat_interleave(each, dim=0)
        mask = None if mask is None else mask.repeat_interleave(each, dim=0)
        above = causal(tokens, mask, states.device).expand(rows, 1, tokens, tokens)
        above = F.pad(above, (0, length))  # the image does not see the text
        text = open_keys(keywords.get("attention_mask"), length, length, states.device).expand(rows, 1, length, length)
        image = torch.ones(rows, 1, 1, tokens, dtype=torch.bool, device=states.device) if mask is None else mask
        below = torch.cat([image.expand(rows, 1, length, tokens), text], dim=-1)
        own = self.keywords(rotary, states, torch.cat([above, below], dim=2))
        for name in ("position_ids", "position_embeddings"):
            own[name] = join(own[name], keywords[name], rows)
        both = run_again(layer, torch.cat([states, hidden_states], dim=1), **{**keywords, **own, CACHE: None})
        seen, joint = both.split([tokens, length], dim=1)
        return visual_states + self.visual_down((seen - states)[::each]), joint

    def see_text(
        self,
        layer: nn.Module,
        hidden_states: torch.Tensor,
        keywords: dict,
        recorder: "RecordingCache",
        image: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    ) -> torch.Tensor:
        """The layer on text (R, T, D) whose own keys and values are recorded, with those of its images and their mask
        before them: the text's new states."""
        rows, length = hidden_states.shape[:2]
        keys, values, mask = image
        each = rows // len(keys)
        image_keys, image_values = (part.repeat_interleave(each, dim=0) for part in (keys, values))
        there = torch.ones(len(keys), 1, 1, keys.shape[2], dtype=torch.bool, device=keys.device)
        there = (there if mask is None else mask).repeat_interleave(each, dim=0)
        text = open_keys(keywords.get("attention_mask"), length, recorder.keys.shape[2], keys.device)
        there, text = there.expand(-1, -1, length, -1), text.expand(rows, -1, -1, -1)
        both = RecordingCache(
            torch.cat([image_keys, recorder.keys], dim=2), torch.cat([image_values, recorder.values], dim=2)
        )
        mask = self.mask(torch.cat([there, text], dim=-1), hidden_states)
        return run_again(layer, hidden_states, **{**keywords, "attention_mask": mask, CACHE: both})

    def forward(
        self, hidden_states: torch.Tensor, joint: torch.Tensor, number: int, has_joint: torch.Tensor | None
    ) -> torch.Tensor:
        """The text's states (R, T, D) behind the layer: what it saw alone, and by the gate what it saw with its image,
        for rows of images (B) that this layer refines; None for all."""
        added = hidden_states + self.gates[number].tanh() * (joint.to(hidden_states.device) - hidden_states)
        if has_joint is None:
            return added
        rows = has_joint.repeat_interleave(len(hidden_states) // len(has_joint))
        return torch.where(rows[:, None, None].to(added.device), added, hidden_states)


class RecordingCache:
    """What one layer takes for its cache: it remembers the keys and values that the layer gets, those of the cache
    behind it, if there is one; or it gives the layer those that it holds already."""

    def __init__(
        self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None, cache: Cache | None = None
    ):
        self.keys, self.values, self.is_given, self.cache = keys, values, keys is not None, cache

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_given:
            if self.cache is not None:
                key_states, value_states = self.cache.update(key_states, value_states, *args, **kwargs)
            self.keys, self.values = key_states, value_states
        return self.keys, self.values


def run_again(layer: nn.Module, *args, **kwargs) -> torch.Tensor:
    """A layer's states in a run beside the language model's own, which `output_hidden_states` and `output_attentions`
    leave out. Some families give states in a tuple."""
    collector = None if torch.compiler.is_compiling() else _active_collector.set(None)
    try:
        output = layer(*args, **kwargs)
    finally:
        if collector is not None:
            _active_collector.reset(collector)
    return output[0] if isinstance(output, tuple) else output


def join(image, text, rows: int):
    """Positions (1 or R, T), or the tuple of their embeddings, of an image and a text, one behind another."""
    if isinstance(image, tuple):
        return tuple(join(*parts, rows) for parts in zip(image, text, strict=True))
    return torch.cat([part.expand(rows, *part.shape[1:]) for part in (image, text)], dim=1)


def causal(tokens: int, mask: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Keys of an image that are open to each of its tokens: (B or 1, 1, N, N); each sees itself at least."""
    below = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()[None, None]
    return below if mask is None else (below & mask) | torch.eye(tokens, dtype=torch.bool, device=device)


def open_keys(attention_mask: torch.Tensor | None, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Of a layer's mask, the keys that are open to each query, (R or 1, 1, T, K) of bool. Without a mask, a query sees
    the keys up to its own place from the beginning, and a single one sees all."""
    if attention_mask is None:
        ones = torch.ones(queries, keys, dtype=torch.bool, device=device)[None, None]
        return ones if queries == 1 else ones.tril()
    if attention_mask.dtype == torch.bool:
        return attention_mask
    return attention_mask > torch.finfo(attention_mask.dtype).min / 2


def check_joint_layer(layer: nn.Module, base_model: nn.Module):
    """Refuse language models whose layers cannot run on an image by themselves.

    Raises:
        ValueError: if their layers take no rotary embeddings or no cache by name, have a sliding window or sinks.
    """
    names, config = inspect.signature(layer.forward).parameters, base_model.config
    has_window = bool(getattr(config, "sliding_window", None))
    without = [name for name in ("position_embeddings", "position_ids", CACHE) if name not in names]
    if without or not hasattr(base_model, "rotary_emb"):
        why = f"its layers take no {', '.join(without)}" if without else "it has no rotary_emb for all layers"
    elif any(hasattr(module, "sinks") for module in layer.modules()):
        why = "its layers have attention sinks"
    elif "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"] * has_window):
        why = "its layers have a sliding window"
    else:
        return
    raise ValueError(
        f'{type(base_model).__name__} cannot have self_attention_kind="joint": {why}; use self_attention_kind="block".'
    )


class PheyeVisualConvolution(nn.Module):
    """Tells neighbouring patches apart: a depthwise convolution along the patches of each view in row order, added to
    them. Class and register tokens stay as they are."""

    def __init__(self, config: PheyeConfig):
        super().__init__()
        size, kernel = config.vision_config.hidden_size, config.visual_convolution_kernel
        self.patches, self.tokens = config.patches_per_side**2, config.tokens_per_view
        self.convolution = nn.Conv1d(size, size, kernel, padding=kernel // 2, groups=size, bias=False)
        self.convolution.starts_at_zero = True

    def forward(self, visual_states: torch.Tensor) -> torch.Tensor:
        """(B, N, D) to (B, N, D)."""
        views = visual_states.unflatten(1, (-1, self.tokens)).flatten(0, 1)
        prefix, patches = views.split([self.tokens - self.patches, self.patches], dim=1)
        patches = patches + self.convolution(patches.transpose(1, 2)).transpose(1, 2)
        return torch.cat([prefix, patches], dim=1).view_as(visual_states)


class PheyeRouter(nn.Module):
    """Scores the budgets by the state of a prompt's last token, which has read the question and, through the blocks
    before, the image."""

    def __init__(self, config: PheyeConfig):
        super().__init__()
        size = config.text_config.hidden_size
        self.norm = nn.LayerNorm(size, eps=1e-5)
        self.mlp_in = nn.Linear(size, config.router_size)
        self.mlp_out = nn.Linear(config.router_size, len(config.self_attention_budgets))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(R, D) to (R, K)."""
        return self.mlp_out(F.gelu(self.mlp_in(self.norm(hidden_states))))


def last_states(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The states (R, D) of each row's last token in (R, T, D); its mask (R, at least T) may be padded on any side."""
    if getattr(attention_mask, "ndim", None) != 2:  # none, or made already, by kind of layer in some models
        return hidden_states[:, -1]
    here = attention_mask[:, -hidden_states.shape[1] :] != 0
    places = torch.arange(here.shape[1], device=here.device)
    last = (here * places).argmax(dim=1).to(hidden_states.device)
    return hidden_states[torch.arange(len(last), device=last.device), last]


def put_rows(states: torch.Tensor, rows: list[int], new: torch.Tensor) -> torch.Tensor:
    """`states` with other ones in some rows."""
    if len(rows) == len(states):
        return new
    return states.index_copy(0, torch.tensor(rows, device=states.device), new.to(states.device))


def images_there(image_mask: torch.Tensor | None, images: int) -> list[bool]:
    """Which rows have an image, by the mask (B, 1, 1, N) of the tokens that are there, None for all."""
    return [True] * images if image_mask is None else image_mask.flatten(1).any(dim=1).tolist()


def largest_choices(router_logits: torch.Tensor, there: list[bool]) -> list[int]:
    """The budget of each image: the largest that the router chose for any of its rows (R, K), which are adjacent; -1
    where there is no image."""
    budgets = router_logits.argmax(dim=-1)  # the first of equals: the cheapest
    chosen = budgets.view(len(there), -1).amax(dim=1).tolist()
    return [budget if has_image else -1 for budget, has_image in zip(chosen, there, strict=True)]


def read_budgets(vision_budget: int | list[int] | torch.Tensor, there: list[bool], budgets: Sequence) -> list[int]:
    """The budget of each image, -1 where there is none.

    Args:
        vision_budget: one for all, or (B,) as a tensor or a list, such as `vision_budget_of` gives.
        there: which rows have an image.
        budgets: those that the model has; none without self-attention blocks.

    Raises:
        ValueError: if the model has no budgets, or `vision_budget` is no index of one, or not one per image.
    """
    if not budgets:
        raise ValueError(
            f"vision_budget={vision_budget} is given, but this model has no self_attention_layers to choose from."
        )
    if isinstance(vision_budget, torch.Tensor):
        if vision_budget.shape not in ((), (len(there),)):
            raise ValueError(
                f"vision_budget has shape {tuple(vision_budget.shape)} for {len(there)} images; give one for all, or "
                "one for each."
            )
        vision_budget = vision_budget.tolist()
    given = vision_budget if isinstance(vision_budget, list) else [vision_budget] * len(there)
    if len(given) != len(there):
        raise ValueError(f"vision_budget has {len(given)} entries for {len(there)} images; give one for each.")
    for budget, has_image in zip(given, there, strict=True):
        if has_image and (type(budget) is not int or not 0 <= budget < len(budgets)):
            raise ValueError(
                f"vision_budget={budget!r} must be an integer from 0 to {len(budgets) - 1}: this model has "
                f"{len(budgets)} budgets."
            )
    return [budget if has_image else -1 for budget, has_image in zip(given, there, strict=True)]


class PheyeRefinementMixin:
    """What a `PheyeModel` does to refine images: budgets, the router, blocks or joint layers."""

    def add_refinement(self, config: PheyeConfig):
        """Make the parts that the configuration names; the others are None."""
        self.self_attention_blocks = self.joint_attention = self.router = self.visual_convolution = None
        if config.self_attention_layers and config.self_attention_kind == "joint":
            check_joint_layer(self.decoder_layers()[0], self.language_model.base_model)
            self.joint_attention = PheyeJointAttention(config)
        elif config.self_attention_layers:
            self.self_attention_blocks = nn.ModuleList(
                PheyeSelfAttentionBlock(config) for _ in config.self_attention_layers
            )
        if config.router_size:
            self.router = PheyeRouter(config)
        if config.visual_convolution_kernel:
            self.visual_convolution = PheyeVisualConvolution(config)

    def run_refinement(self, layer: int, hidden_states: torch.Tensor, call: TextCall) -> torch.Tensor:
        """Before each layer of the language model: the end of a joint layer, the choice of budgets, and what refines
        the image there."""
        if call.open_layer is not None:
            hidden_states = self._end_joint_layer(hidden_states, call)
        if layer in self.config.self_attention_layers:
            if call.visual_states is not None and call.vision_budget is None:
                there = images_there(call.image_mask, len(call.visual_states))
                call.router_logits = self.router(last_states(hidden_states, call.attention_mask))
                call.vision_budget = largest_choices(call.router_logits, there)
            if self.joint_attention is not None:
                self._begin_joint_layer(layer, hidden_states, call)
            elif call.visual_states is not None:
                call.visual_states = self._refine(layer, call.visual_states, call.vision_budget, call.image_mask)
        return hidden_states

    def _budgets(
        self,
        vision_budget: int | torch.Tensor | None,
        image_hidden_states: torch.Tensor | None,
        image_mask: torch.Tensor | None,
        in_cache: bool = False,
        may_route: bool = False,
    ) -> list[int] | None:
        """The budget of each image of a call, -1 where there is no image; None where there is nothing to choose, or
        the router will."""
        budgets = self.config.self_attention_budgets
        if image_hidden_states is None:
            if vision_budget is not None and in_cache:
                raise ValueError(
                    f"vision_budget={vision_budget} is given for an image that the cache holds as it was read; give "
                    "the image again, with a new cache."
                )
            return None
        if vision_budget is None and (not budgets or (may_route and self.router is not None)):
            return None
        there = images_there(image_mask, len(image_hidden_states))
        return read_budgets(len(budgets) - 1 if vision_budget is None else vision_budget, there, budgets)

    def _active(self, layer: int, vision_budget: list[int]) -> list[int]:
        """Numbers of the images that a layer refines."""
        budgets = self.config.self_attention_budgets
        return [row for row, budget in enumerate(vision_budget) if budget >= 0 and layer in budgets[budget]]

    def _refine(
        self, layer: int, visual_states: torch.Tensor, vision_budget: list[int], image_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The tokens of images (B, N, D) behind the self-attention block before a layer: new ones for images whose
        budget has it."""
        rows = self._active(layer, vision_budget)
        if not rows:
            return visual_states
        block = self.self_attention_blocks[self.config.self_attention_layers.index(layer)]
        if len(rows) == len(visual_states):
            return block(visual_states, image_mask)
        refined = block(visual_states[rows], None if image_mask is None else image_mask[rows])
        return put_rows(visual_states, rows, refined)

    def _joint_cache(self, layer: int, caches: list[PheyeImageCache] | None) -> PheyeImageCache | None:
        number = self.config.self_attention_layers.index(layer)
        return None if caches is None else caches[len(self.cross_attention_blocks) + number]

    def _begin_joint_layer(self, layer: int, hidden_states: torch.Tensor, call: TextCall):
        """Keep what a joint layer is called with, and record its keys and values, until it has run on the text."""
        cache = self._joint_cache(layer, call.image_caches)
        if call.visual_states is None:
            is_active = cache is not None and cache.is_initialized
        else:
            is_active = bool(self._active(layer, call.vision_budget))
        if is_active:
            keywords, recorder = dict(call.layer_keywords), RecordingCache(cache=call.layer_keywords.get(CACHE))
            if not drops_cache(call.layer):
                call.layer_keywords[CACHE] = recorder
            call.open_layer = (layer, call.layer, hidden_states, keywords, recorder)

    def _end_joint_layer(self, hidden_states: torch.Tensor, call: TextCall) -> torch.Tensor:
        """From the states behind a layer that saw the text alone to those of image and text together."""
        number, layer, before, keywords, recorder = call.open_layer
        call.open_layer = None
        joint, rotary = self.joint_attention, self.language_model.base_model.rotary_emb
        cache, place = self._joint_cache(number, call.image_caches), self.config.self_attention_layers.index(number)
        if call.visual_states is None:
            has_joint = None if cache.mask is None else cache.mask.flatten(1).any(dim=1)
            both = joint.see_text(layer, before, keywords, recorder, (cache.keys, cache.values, cache.mask))
            return joint(hidden_states, both, place, has_joint)
        rows = self._active(number, call.vision_budget)
        images, has_joint = len(call.visual_states), None
        if len(rows) < images:
            has_joint = torch.tensor([row in rows for row in range(images)])
        if recorder.keys is None:
            seen, both = joint.see_both(layer, rotary, call.visual_states, call.image_mask, before, keywords)
            call.visual_states = put_rows(call.visual_states, rows, seen[rows])
        else:
            call.visual_states, image = self._see_image(layer, call.visual_states, rows, call.image_mask)
            if cache is not None:
                cache.update(*image)
            both = joint.see_text(layer, before, keywords, recorder, image)
        return joint(hidden_states, both, place, has_joint)

    def _see_image(
        self,
        layer: nn.Module,
        visual_states: torch.Tensor,
        rows: list[int],
        image_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """A joint layer on some images: the states of all (B, N, D), and keys, values and mask of all for the text, of
        which those of the others are closed."""
        rotary = self.language_model.base_model.rotary_emb
        mask = None if image_mask is None else image_mask[rows]
        seen, keys, values = self.joint_attention.see_image(layer, rotary, visual_states[rows], mask)
        if len(rows) == len(visual_states):
            return seen, (keys, values, image_mask)
        images, tokens = visual_states.shape[:2]
        there = torch.zeros(images, 1, 1, tokens, dtype=torch.bool, device=keys.device)
        there[rows] = True if image_mask is None else image_mask[rows]
        empty = keys.new_zeros(images, *keys.shape[1:])
        keys, values = (put_rows(empty, rows, part) for part in (keys, values))
        return put_rows(visual_states, rows, seen), (keys, values, there)

    def fill_image_caches(
        self,
        cache: Cache,
        image_hidden_states: torch.Tensor,
        image_mask: torch.Tensor | None,
        vision_budget: int | torch.Tensor | None,
    ):
        """Write into a cache, before any text, the keys and values that the blocks would make of an image."""
        if vision_budget is None and self.router is not None:
            raise ValueError(
                "The router needs the whole prompt, which prefill_chunk_size cuts into pieces; give vision_budget."
            )
        budgets, visual_states = self._budgets(vision_budget, image_hidden_states, image_mask), image_hidden_states
        caches = self.image_caches(cache)
        for number, layer in enumerate(self.decoder_layers()):
            rows = self._active(number, budgets or [])
            if rows and self.joint_attention is not None:
                visual_states, image = self._see_image(layer, visual_states, rows, image_mask)
                self._joint_cache(number, caches).update(*image)
            elif rows:
                visual_states = self._refine(number, visual_states, budgets, image_mask)
            block = self._block_before.get(number)
            if block is not None:
                keys_and_values = self.cross_attention_blocks[block].project(visual_states)
                caches[block].update(*keys_and_values, image_mask)
        caches[0].vision_budget = budgets

    def vision_budget_of(self, cache: Cache) -> list[int] | None:
        """The budget at which each image of a cache was read (-1: a row without an image), such as the one that
        `generate` returns; None if the model has none."""
        return self.image_caches(cache)[0].vision_budget
