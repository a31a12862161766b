"""Other ways to join the two frozen parts and to compress an image: those of the paper's appendix B, and some since.

Every way reads what Pheye's own blocks read, the states of all views behind the view encoding, with LoRA or without;
so ways differ in the join alone. Each function below takes a new Pheye and gives the model that joins its way.

Sources:
- FROMAGe, "Grounding Language Models to Images for Multimodal Inputs and Outputs", arXiv 2301.13823.
- LLaVA-1.5, "Improved Baselines with Visual Instruction Tuning", arXiv 2310.03744.
- SmallCap, arXiv 2209.15323.
- Flamingo, arXiv 2204.14198: the tanh gate and the Perceiver resampler.
- Monkey, arXiv 2311.06607, whose resampler is that of Qwen-VL, arXiv 2308.12966.
- CASA, arXiv 2512.19535 in its first version.

What our sources leave open is chosen as plainly as it can be: "our choice" in the docstrings.

Shapes: B images, N image tokens, M image tokens that the text reads, R text rows, T text tokens, D width.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ... import PheyeConfig, PheyeForConditionalGeneration
from ...blocks_pheye import PheyeAttentionBlock, PheyeCrossAttentionBlock, PheyeImageCache
from ...configuration_pheye import HEAD_WIDTH
from ...layers_pheye import CALL, TextCall
from ...modeling_pheye import PheyeModel
from ...training.collator import IGNORED
from ...visor_pheye import open_keys

QUERIES = 257  # of a resampler, for all views of an image together: as many as the tokens of one view
DEPTH = 6  # layers of the Perceiver resampler


class Connected(nn.Module):
    """In the place of a view encoding: that one, and then a module that maps or compresses its tokens."""

    def __init__(self, view_encoding: nn.Module, connector: nn.Module):
        super().__init__()
        self.view_encoding, self.connector = view_encoding, connector

    def forward(self, hidden_states: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """The vision tower's states (B * V, N, D) to (B, M, D)."""
        return self.connector(self.view_encoding(hidden_states, table))


def connected(model: PheyeForConditionalGeneration, connector: nn.Module) -> PheyeForConditionalGeneration:
    """`model` with this connector behind its view encoding."""
    model.pheye.view_encoding = Connected(model.pheye.view_encoding, connector)
    return model


def keys_per_image(model: nn.Module) -> int:
    """How many tokens of an image the text reads, M."""
    config, like = model.pheye.config, next(model.parameters())
    with torch.no_grad():
        states = like.new_zeros(config.views_per_image, config.tokens_per_view, config.vision_config.hidden_size)
        return model.pheye.view_encoding(states).shape[1]


# --- Before the text ---


class Prefix(nn.Module):
    """The image's tokens, brought to the width of the text, stand before the text. There are no blocks.

    They take positions like text. So all tokens of one crop and the global view, 514, use up more positions than the
    512 that Pheye-nano's language model has learnt; its rotary positions go on behind them.
    """

    def __init__(self, model: PheyeForConditionalGeneration, connector: nn.Module):
        super().__init__()
        self.pheye = connected(model, connector).pheye
        self.pheye.cross_attention_blocks = nn.ModuleList()

    @property
    def device(self) -> torch.device:
        return self.pheye.device

    def get_image_features(self, **image_inputs: torch.Tensor) -> BaseModelOutputWithPooling:
        return self.pheye.get_image_features(**image_inputs)

    def joined(self, input_ids, attention_mask, image_hidden_states=None, **image_inputs) -> dict[str, torch.Tensor]:
        """Embeddings (B, M + T, D) and their mask."""
        prefix = image_hidden_states
        if prefix is None:
            prefix = self.get_image_features(**image_inputs).last_hidden_state
        embeddings = torch.cat([prefix, self.pheye.language_model.get_input_embeddings()(input_ids)], 1)
        mask = torch.cat([attention_mask.new_ones(prefix.shape[:2]), attention_mask], 1)
        return {"inputs_embeds": embeddings, "attention_mask": mask}

    def forward(self, input_ids, attention_mask, labels, **image_inputs):
        inputs = self.joined(input_ids, attention_mask, **image_inputs)
        ignored = labels.new_full((len(labels), inputs["inputs_embeds"].shape[1] - labels.shape[1]), IGNORED)
        return self.pheye.language_model(**inputs, labels=torch.cat([ignored, labels], 1))

    def generate(
        self,
        input_ids,
        attention_mask,
        image_hidden_states=None,
        pixel_values=None,
        high_res_pixel_values=None,
        **kwargs,
    ) -> GenerateDecoderOnlyOutput:
        images = {"pixel_values": pixel_values, "high_res_pixel_values": high_res_pixel_values}
        inputs = self.joined(input_ids, attention_mask, image_hidden_states, **images)
        ids = self.pheye.language_model.generate(**inputs, **{**kwargs, "return_dict_in_generate": False})
        return GenerateDecoderOnlyOutput(sequences=torch.cat([input_ids, ids], 1))


class ClassTokens(nn.Module):
    """FROMAGe's: the class token of each view through one linear map, in the order of the views."""

    def __init__(self, config: PheyeConfig):
        super().__init__()
        self.tokens_per_view = config.tokens_per_view
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, V * N, D) to (B, V, D)."""
        return self.linear(tokens[:, :: self.tokens_per_view])


def fromage(model: PheyeForConditionalGeneration) -> Prefix:
    return Prefix(model, ClassTokens(model.config))


def llava(model: PheyeForConditionalGeneration) -> Prefix:
    """All tokens through two linears with a GELU between them, as in LLaVA-1.5."""
    width, text_width = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
    return Prefix(model, nn.Sequential(nn.Linear(width, text_width), nn.GELU(), nn.Linear(text_width, text_width)))


# --- Blocks before layers ---


def with_blocks(
    model: PheyeForConditionalGeneration, block: Callable[[PheyeConfig], nn.Module], is_near_zero: bool = True
) -> PheyeForConditionalGeneration:
    """`model` with other blocks, in the paper's near-zero initial state or else in torch's own."""
    blocks = nn.ModuleList(block(model.config) for _ in model.config.cross_attention_layers)
    model.pheye.cross_attention_blocks = blocks.apply(model._init_weights) if is_near_zero else blocks
    return model


def usual_start(model: PheyeForConditionalGeneration) -> PheyeForConditionalGeneration:
    """Pheye's blocks, which begin as torch's linears do, and so change the language model from the first step."""
    return with_blocks(model, PheyeCrossAttentionBlock, is_near_zero=False)


def small_outputs(model: PheyeForConditionalGeneration) -> PheyeForConditionalGeneration:
    """Pheye's blocks, which begin as torch's linears do but for those that end in the text: these begin near zero."""
    for module in usual_start(model).pheye.cross_attention_blocks.modules():
        if getattr(module, "ends_residual", False):
            model._init_weights(module)
    return model


class TanhGatedBlock(PheyeCrossAttentionBlock):
    """Pheye's block with Flamingo's gates: what attention and MLP add is multiplied by tanh of a number that begins at
    0. Both begin as torch's linears do, since near-zero ones behind closed gates would hardly learn (our choice)."""

    def __init__(self, config: PheyeConfig):
        super().__init__(config)
        self.attention_gate, self.mlp_gate = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def add_to(self, hidden_states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.attention_gate.tanh() * self.to_out(attended)
        return hidden_states + self.mlp_gate.tanh() * self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(hidden_states))))


def tanh_gate(model: PheyeForConditionalGeneration) -> PheyeForConditionalGeneration:
    return with_blocks(model, TanhGatedBlock, is_near_zero=False)


# --- Inside layers ---


class SeeingLayer(GradientCheckpointingLayer):
    """A Phi layer and, as `see`, what the text sees of the image there."""

    def __init__(self, layer: nn.Module, see: Callable):
        super().__init__()
        self.layer, self.see = layer, see


class CrossAttentionAlone(PheyeCrossAttentionBlock):
    """SmallCap's: text attends over the image's tokens. No MLP of its own; the caller adds the result."""

    def __init__(self, config: PheyeConfig):
        super().__init__(config)
        del self.mlp_norm, self.mlp_in, self.mlp_out

    def add_to(self, hidden_states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return self.to_out(attended)


class SmallCapLayer(SeeingLayer):
    """A Phi layer with cross-attention between its self-attention and its MLP.

    SmallCap's layers run one after the other: h = x + A(LN x), h' = h + C(h), y = h' + M(LN h'). Phi runs A and M side
    by side, so that nothing stands between them: y = x + A(LN x) + M(LN x). Here C reads what self-attention has made,
    as there, and the MLP reads the layer's own input together with what C adds (our choice):

        c = C(x + A(LN x))        y = x + A(LN x) + c + M(LN(x + c))

    So the MLP sees the image, and where c = 0 this is Phi's layer.
    """

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        layer, call = self.layer, kwargs.pop(CALL, None)
        after = hidden_states + layer.self_attn(layer.input_layernorm(hidden_states), **kwargs)[0]
        seen = 0 if call is None else self.see(after, call)
        return after + seen + layer.mlp(layer.input_layernorm(hidden_states + seen))


def small_cap(model: PheyeForConditionalGeneration) -> PheyeForConditionalGeneration:
    """Heads as wide as in Pheye's blocks and Pheye's initial state (our choice: SmallCap narrows its heads, and begins
    as GPT-2 does)."""
    pheye, layers = with_blocks(model, CrossAttentionAlone).pheye, model.pheye.decoder_layers()
    for number in model.config.cross_attention_layers:
        layers[number] = SmallCapLayer(layers[number], functools.partial(pheye.run_block, number))
    return model


class CasaBlock(PheyeCrossAttentionBlock):
    """Pheye's block, in which text attends over the image's tokens and, under the same softmax, over the text since
    the image up to itself: here all of the text, for the image stands before it.

    Text gets keys and values by linears of its own, as it may have another width than the image, and no positions, as
    nothing in Pheye's blocks has; the MLP stays (our choice).
    """

    def __init__(self, config: PheyeConfig):
        super().__init__(config)
        self.text_to_k = nn.Linear(config.text_config.hidden_size, config.cross_attention_size)
        self.text_to_v = nn.Linear(config.text_config.hidden_size, config.cross_attention_size)

    def project_text(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (R, H, T, D) of text (R, T, D)."""
        both = (linear(normed) for linear in (self.text_to_k, self.text_to_v))
        key, value = (one.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for one in both)
        return key, value

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_hidden_states: torch.Tensor | None,
        image_cache: PheyeImageCache | None,
        text_cache: DynamicLayer | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The new states of `hidden_states` (R, T, D); attention_mask: that of the language model's layers."""
        if image_hidden_states is None:
            key, value = image_cache.keys, image_cache.values
        else:
            key, value = self.project(image_hidden_states)
            if image_cache is not None:
                image_cache.update(key, value)
        normed = self.attention_norm(hidden_states)
        text_key, text_value = self.project_text(normed)
        if text_cache is not None:
            text_key, text_value = text_cache.update(text_key, text_value)
        rows, length = hidden_states.shape[:2]
        image_key, image_value = (one.repeat_interleave(rows // len(one), dim=0) for one in (key, value))
        text = open_keys(attention_mask, length, text_key.shape[2], normed.device)  # (R or 1, 1, T, text)
        mask = F.pad(text.expand(rows, -1, -1, -1), (key.shape[2], 0), value=True)  # (R, 1, T, N + text)
        key, value = torch.cat([image_key, text_key], 2), torch.cat([image_value, text_value], 2)
        return self.add_to(hidden_states, self.attend(normed, key, value, False, mask)[0])


class CasaLayer(SeeingLayer):
    """A layer and the CASA block before it."""

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        call = kwargs.pop(CALL, None)
        if call is not None:
            hidden_states = self.see(hidden_states, call, kwargs["attention_mask"])
        return self.layer(hidden_states, **kwargs)


def run_casa(
    pheye: PheyeModel, number: int, hidden_states: torch.Tensor, call: TextCall, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """What `PheyeModel.run_block` does, for CASA block `number`."""
    call.steps_run += 1
    image_cache = None if call.image_caches is None else call.image_caches[number]
    text_cache = None if call.cache is None else text_cache_of(pheye, call.cache, number)
    block = pheye.cross_attention_blocks[number]
    return block(hidden_states, call.visual_states, image_cache, text_cache, attention_mask)


def text_cache_of(pheye: PheyeModel, cache: Cache, number: int) -> DynamicLayer:
    """The text's keys and values of CASA block `number`, behind the language model's and the image's in the cache."""
    first = pheye.config.text_config.num_hidden_layers + len(pheye.cross_attention_blocks)
    while len(cache.layers) <= first + number:
        cache.layers.append(DynamicLayer())
    return cache.layers[first + number]


def casa(model: PheyeForConditionalGeneration) -> PheyeForConditionalGeneration:
    pheye, layers = with_blocks(model, CasaBlock).pheye, model.pheye.decoder_layers()
    for number, layer in enumerate(model.config.cross_attention_layers):
        layers[layer] = CasaLayer(layers[layer], functools.partial(run_casa, pheye, number))
    return model


# --- Blocks over the image ---


def within_views(forward: Callable, views: int) -> Callable:
    """A block's `forward` on each view by itself."""

    def apart(states: torch.Tensor, mask: None = None) -> torch.Tensor:
        return forward(states.unflatten(1, (views, -1)).flatten(0, 1)).unflatten(0, (-1, views)).flatten(1, 2)

    return apart


def views_apart(model: PheyeForConditionalGeneration) -> PheyeForConditionalGeneration:
    """Blocks over the image in which tokens of different views do not see each other."""
    for block in model.pheye.self_attention_blocks:
        block.forward = within_views(block.forward, model.config.views_per_image)
    return model


# --- Resamplers: the blocks read queries in place of the image's tokens ---


def new_queries(config: PheyeConfig, spread: float) -> nn.Parameter:
    return nn.Parameter(spread * torch.randn(QUERIES, config.vision_config.hidden_size))


def query_block(config: PheyeConfig) -> PheyeAttentionBlock:
    """Queries attend in the width of the image, with heads as wide as those of Pheye's blocks; they are normed first,
    and the image's tokens, which are normed already, are not (our choice). It begins as torch's linears do."""
    size = config.vision_config.hidden_size
    heads = max(1, size // HEAD_WIDTH)
    return PheyeAttentionBlock(config, size, size, size, heads, 4 * size, scaling=(size // heads) ** -0.5)


class Perceiver(nn.Module):
    """Flamingo's Perceiver resampler: in each layer, queries attend over the image's tokens and the queries together,
    then an MLP, both residual.

    Its MLP is Pheye's, with a GELU; and a last norm gives the blocks states of the size that they read otherwise (our
    choice).
    """

    def __init__(self, config: PheyeConfig):
        super().__init__()
        self.queries = new_queries(config, 1.0)  # as in open implementations
        self.layers = nn.ModuleList(query_block(config) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(config.vision_config.hidden_size, eps=1e-5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) to (B, QUERIES, D)."""
        queries = self.queries.expand(len(tokens), -1, -1)
        for layer in self.layers:
            normed = layer.attention_norm(queries)
            memory = torch.cat([tokens, normed], 1)  # (B, N + QUERIES, D)
            attended, _ = layer.attend(normed, *layer.project(memory), False, None)
            queries = layer.add_to(queries, attended)
        return self.norm(queries)


class Monkey(nn.Module):
    """Monkey's resampler: queries attend over the image's tokens once, without a residual and without an MLP; then the
    norm that Qwen-VL has behind it.

    Monkey has as many queries for each view; here they serve all views together, as the Perceiver's do. Qwen-VL adds
    the patches' positions in their grid to queries and keys. The tokens here carry their own and those of their view,
    and the queries have no grid, so nothing is added (our choice).
    """

    def __init__(self, config: PheyeConfig):
        super().__init__()
        self.queries, self.block = new_queries(config, 0.02), query_block(config)
        del self.block.mlp_norm, self.block.mlp_in, self.block.mlp_out
        self.norm = nn.LayerNorm(config.vision_config.hidden_size, eps=1e-5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, D) to (B, QUERIES, D)."""
        normed = self.block.attention_norm(self.queries).expand(len(tokens), -1, -1)
        attended, _ = self.block.attend(normed, *self.block.project(tokens), False, None)
        return self.norm(self.block.to_out(attended))


def resampled(model: PheyeForConditionalGeneration, resampler: nn.Module) -> PheyeForConditionalGeneration:
    model.pheye.tokens_read = lambda views: QUERIES
    return connected(model, resampler)


def perceiver(model: PheyeForConditionalGeneration) -> PheyeForConditionalGeneration:
    return resampled(model, Perceiver(model.config))


def monkey(model: PheyeForConditionalGeneration) -> PheyeForConditionalGeneration:
    return resampled(model, Monkey(model.config))
