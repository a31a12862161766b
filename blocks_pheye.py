"""How text reads an image: the image's keys and values in the cache, attention over them, and the block around it.

Source: "Efficient Architectures for High Resolution Vision-Language Models", arXiv 2501.02584, section 2.1.

Shapes: B images, N tokens of all views of an image, R text rows (a multiple of B: questions, beams or samples of one
image are adjacent), T text tokens, H heads, D width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, cache_utils
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_pheye import HEAD_WIDTH, PheyeConfig

# Being a DummyLayer keeps the image out of masks and prefetching; releases before 5.23 have none.
CacheLayer = getattr(cache_utils, "DummyLayer", cache_utils.CacheLayerMixin)


MASKED_ATTENTION = ("eager", "sdpa")  # what takes a mask of any form


class PheyeImageCache(CacheLayer):
    """Keys and values (B, H, N, D) of an image for one block, appended as a layer to the language model's cache; with
    them the mask (B, 1, 1, N) of the tokens that are there, None for all.

    It holds one row per image, however many text rows share it: repeating and reordering rows, cropping and offloading
    leave it alone.
    """

    supports_early_init = False
    is_compileable = True
    is_croppable = True
    is_sliding = False

    def __init__(self):
        self.reset()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, mask: torch.Tensor | None = None, *args, **kwargs
    ):
        self.keys, self.values, self.mask, self.is_initialized = key_states, value_states, mask, True
        return key_states, value_states

    def reset(self):
        self.keys, self.values, self.mask, self.is_initialized = None, None, None, False
        self.vision_budget: list[int] | None = None  # kept by the first of a model's

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
        if self.is_initialized:
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


def text_in(cache: Cache | None) -> int:
    """How many tokens of text a cache holds, as far as the CPU knows: on a GPU, a static cache counts as empty."""
    length = 0 if cache is None else cache.get_seq_length()
    return 0 if isinstance(length, torch.Tensor) and length.device.type != "cpu" else int(length)


def check_no_text_without_image(cache: Cache, caches: list[PheyeImageCache]):
    """Refuse to give an image to a cache whose text was read without one: its keys and values would be those of the
    bare language model, and the answer another one than that to the whole prompt."""
    if not caches[0].is_initialized and int(cache.get_seq_length()):
        raise ValueError(
            f"The cache holds {int(cache.get_seq_length())} tokens of text that were read without an image. Begin a "
            "new cache with the image and the whole text; other questions about the image may go on from a copy of it."
        )


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax(query key^T * scaling) value, over the keys of the mask (B, 1, 1, N): ((B, T, H, D), weights
    (B, H, T, N))."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, H, T, N)
    if mask is not None:
        weights = weights.masked_fill(~mask, torch.finfo(weights.dtype).min)
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class PheyeAttentionBlock(GradientCheckpointingLayer):
    """Attention over a memory, then an MLP: the parts of both kinds of block.

    Args:
        size: width of the states that attend.
        memory_size: width of what they attend to.
        inner_size: of queries, keys and values.
    """

    def __init__(
        self,
        config: PheyeConfig,
        size: int,
        memory_size: int,
        inner_size: int,
        heads: int,
        mlp_size: int,
        scaling: float,
    ):
        super().__init__()
        self.config = config
        self.head_size = inner_size // heads
        self.scaling = scaling
        self.is_causal = False
        self.attention_norm = nn.LayerNorm(size, eps=1e-5)
        self.to_q = nn.Linear(size, inner_size)
        self.to_k = nn.Linear(memory_size, inner_size)
        self.to_v = nn.Linear(memory_size, inner_size)
        self.to_out = nn.Linear(inner_size, size)
        self.mlp_norm = nn.LayerNorm(size, eps=1e-5)
        self.mlp_in = nn.Linear(size, mlp_size)
        self.mlp_out = nn.Linear(mlp_size, size)

    def project(self, image_hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, H, N, D) of an image's tokens (B, N, D).

        Contiguous, because every decoding step reads them whole, and strided ones are read more slowly.
        """
        key = self.to_k(image_hidden_states).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        value = self.to_v(image_hidden_states).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        return key.contiguous(), value.contiguous()

    def attend(
        self,
        hidden_states: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output_weights: bool,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of (R, T, D) over keys and values (B, H, N, D) and, unless None, their mask (B, 1, 1, N):
        ((R, T, D), weights (R, H, T, N) or None)."""
        rows, length = hidden_states.shape[:2]
        images = key.shape[0]
        if rows % images:
            raise ValueError(
                f"The text has {rows} rows and the image {images}; each image must serve the same number of rows."
            )
        # The rows of one image become one longer row, so that its keys and values are neither copied nor reordered.
        query = self.to_q(hidden_states).reshape(images, rows // images * length, -1, self.head_size).transpose(1, 2)
        implementation = "eager" if output_weights else self.config._attn_implementation
        # On a CPU, torch's kernel takes up to 12 times as long as two plain products for a single query in bfloat16.
        if implementation == "sdpa" and query.shape[2] == 1 and query.device.type == "cpu":
            implementation = "eager"
        if mask is not None:
            if implementation not in MASKED_ATTENTION:
                raise ValueError(
                    f"Images of several canvases, or rows without an image, cannot be masked by {implementation}; use "
                    'attn_implementation="sdpa", or images of one canvas.'
                )
            mask = mask | ~mask.any(dim=-1, keepdim=True)  # a row without an image attends somewhere, to no effect
        attention = eager_attention if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        attended, weights = attention(
            self, query, key, value, mask, dropout=0.0, scaling=self.scaling, is_causal=False
        )  # (B, R / B * T, H, D)
        weights = weights.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1) if output_weights else None
        return attended.reshape(rows, length, -1), weights

    def add_to(self, hidden_states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The block's result, from its input and what `attend` gave for it."""
        hidden_states = hidden_states + self.to_out(attended)
        return hidden_states + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(hidden_states))))


class PheyeCrossAttentionBlock(PheyeAttentionBlock):
    """Dense cross-attention block: text attends over all image tokens, then an MLP, both residual (section 2.1)."""

    def __init__(self, config: PheyeConfig):
        text_size, vision_size = config.text_config.hidden_size, config.vision_config.hidden_size
        mlp_size = 4 * text_size // config.cross_attention_reduction
        scaling = HEAD_WIDTH**-0.5  # also where the reduction makes heads narrower
        inner_size, heads = config.cross_attention_size, config.cross_attention_heads
        super().__init__(config, text_size, vision_size, inner_size, heads, mlp_size, scaling)
        self.to_out.ends_residual = self.mlp_out.ends_residual = True  # start smaller, see `_init_weights`

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_hidden_states: torch.Tensor | None,
        image_cache: PheyeImageCache | None = None,
        output_weights: bool = False,
        image_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Condition `hidden_states` (R, T, D) on an image: on `image_hidden_states` (B, N, D), whose keys and values
        go into `image_cache`, or else on those in it. Returns the new states and, if asked for, the attention's
        weights (R, H, T, N): then it attends eagerly, whatever the implementation.

        image_mask: (B, 1, 1, N), the tokens that are there, None for all. A row without any stays as it is.
        """
        if image_hidden_states is None:
            key, value, image_mask = image_cache.keys, image_cache.values, image_cache.mask
        else:
            key, value = self.project(image_hidden_states)
            if image_cache is not None:
                image_cache.update(key, value, image_mask)
        attended, weights = self.attend(self.attention_norm(hidden_states), key, value, output_weights, image_mask)
        conditioned = self.add_to(hidden_states, attended)
        if image_mask is None:
            return conditioned, weights
        has_image = image_mask.flatten(1).any(dim=1).repeat_interleave(len(hidden_states) // len(image_mask))  # (R,)
        if weights is not None:
            weights = weights * has_image[:, None, None, None]
        return torch.where(has_image[:, None, None], conditioned, hidden_states), weights
