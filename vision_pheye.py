"""How an image is seen: which views are which, LoRA for each kind of view, the encoding that tells views apart, and
the maps of a high-resolution branch that are fused into views.

Sources: "Efficient Architectures for High Resolution Vision-Language Models", arXiv 2501.02584, section 2.2; the
branch is after "FILA: Fine-Grained Vision Language Models", arXiv 2412.08378, whose details are not all known.

Shapes: B images, V views per image (the global view first), N tokens of a view, D width, k crops along each side of
an image, G patches along each side of a view, C channels of a map.
"""

import functools
import math
from collections.abc import Callable
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .canvases_pheye import COLUMN, COLUMNS, IMAGE, ROW, ROWS, VIEW
from .configuration_pheye import PheyeConfig

# Norms beside a tower's layers, by the names that they have in transformers.
FIRST_NORMS = ("pre_layrnorm", "pre_layernorm")
LAST_NORMS = ("post_layernorm", "layernorm", "norm")


# How many of the rows that the vision tower is called with are global views, where these stand before all crops; 0
# where each image's stands before its crops, all images having `views_per_image`. The hooks of LoRA see rows and
# nothing else. A module is shared by threads; a context is a thread's own. Compiled code cannot read it: it takes 0.
GLOBAL_VIEWS: ContextVar[int | None] = ContextVar("GLOBAL_VIEWS", default=None)


def run_with(global_views: int | None, call: Callable, *args, **kwargs):
    """What `call` gives while `GLOBAL_VIEWS` is this number."""
    token = GLOBAL_VIEWS.set(global_views)
    try:
        return call(*args, **kwargs)
    finally:
        GLOBAL_VIEWS.reset(token)


def checkpoint_in_context(checkpoint: Callable, call: Callable, *args):
    """A gradient checkpoint that runs a layer anew as it ran before: by then, its call of the tower is over."""
    return checkpoint(functools.partial(run_with, GLOBAL_VIEWS.get(), call), *args)


def split_views(rows: torch.Tensor, views: int, global_views: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(B * V, ...) to the global views (B, 1, ...) and crops (B, V - 1, ...): the one place that tells them apart. If
    the first `global_views` rows are the global ones, (1, global views, ...) and (1, crops, ...)."""
    if global_views:
        return rows[None, :global_views], rows[None, global_views:]
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
        if self.training and self.dropout and self.A.requires_grad:  # frozen LoRA stays as it was trained
            x, rest = dropout(x, self.dropout)
            scaling *= rest
        A = self.A.to(x.dtype)
        if self.convolution is None:
            low = F.linear(x, A).flatten(2, -2)
        else:
            low = F.conv2d(x.flatten(0, 1), A, **self.convolution).flatten(2).transpose(1, 2).unflatten(0, x.shape[:2])
        return low, self.B.flatten(1).T * scaling  # a new tensor, for FSDP takes the parameter away again


def add_view_lora(
    output: torch.Tensor,
    x: torch.Tensor,
    global_lora: PheyeLora | None,
    local_lora: PheyeLora | None,
    views: int,
    global_views: int = 0,
) -> torch.Tensor:
    """Add the LoRA updates of a linear or convolution with input `x` to its output: (B * V, N, D), of a convolution
    (B * V, D, height, width); the global set's to global views, the local set's to crops.

    One product adds both, so that half precision rounds once and the large output is written once: it has room for
    both ranks, and each row's numbers in one of them, zeros in the other. Without gradients that of a linear changes.
    """
    is_map, rows = output.ndim == 4, output
    if is_map:
        rows = output.flatten(2).transpose(1, 2)  # (B * V, N, D)
    lows, ups = [], []
    for lora, seen in zip((global_lora, local_lora), split_views(x, views, global_views), strict=True):
        if lora is None:
            low, up = rows.new_zeros(*seen.shape[:2], rows.shape[1], 0), rows.new_zeros(0, rows.shape[2])
        else:
            low, up = (factor.to(rows) for factor in lora(seen))
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
    return (rows.transpose(1, 2) if is_map else rows).reshape(output.shape)


def last_norms(tower: nn.Module, layers: nn.ModuleList) -> list[nn.Module]:
    """The norms that a vision tower puts behind its layers.

    Raises:
        ValueError: if a norm stands beside the layers of which nobody knows whether it comes before or behind them.
    """
    found = []
    for parent in tower.modules():
        if all(module is not layers for module in parent.modules()):
            continue  # its norms belong to the embeddings, a layer or a pooler
        for name, module in parent.named_children():
            if not type(module).__name__.endswith("Norm") or name in FIRST_NORMS:
                continue
            if name not in LAST_NORMS:
                raise ValueError(
                    f"{type(tower).__name__} cannot be a Pheye vision tower: Pheye reads the states before the last "
                    f"norm, and does not know whether its {name!r} is that one."
                )
            found.append(module)
    return found


class PheyeViewEncoding(nn.Module):
    """Tells views apart: a LayerNorm for the global view and one for the crops, then a learned vector per view.

    On canvases, the vector is the sum of one for the row and one for the column of what the view shows: "upper of two"
    and "upper of three" are two vectors. Where a prompt may have several images, each adds a vector of its own.
    """

    def __init__(self, config: PheyeConfig):
        super().__init__()
        size = config.vision_config.hidden_size
        self.global_norm = nn.LayerNorm(size, eps=1e-5)
        self.local_norm = nn.LayerNorm(size, eps=1e-5)
        self.views = config.views_per_image
        if config.canvases is None:
            self.view_embedding = nn.Embedding(self.views, size)
        else:
            self.longest = max(map(max, config.canvases))  # rows or columns
            self.row_embedding = nn.Embedding(self.longest * (self.longest + 1) // 2, size)
            self.column_embedding = nn.Embedding(self.longest * (self.longest + 1) // 2, size)
        if config.max_images > 1:
            self.image_embedding = nn.Embedding(config.max_images, size)
            self.image_embedding.starts_at_zero = True

    def forward(self, hidden_states: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """The vision tower's states to (B, V * N, D).

        hidden_states: (B * V, N, D); with a `view_table` (B, V, 6) those of the views that are there. Where none is,
        the result is 0.
        """
        if table is not None:
            return self.encode_table(hidden_states, table)
        views = self.views
        global_view, crops = split_views(hidden_states, views)
        hidden_states = join_views(self.global_norm(global_view), self.local_norm(crops)).unflatten(0, (-1, views))
        vectors = self.view_embedding(torch.arange(views, device=hidden_states.device))  # (V, D)
        return (hidden_states + vectors[:, None]).flatten(1, 2)

    def encode_table(self, hidden_states: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        places = (table[..., IMAGE] >= 0).flatten().nonzero().flatten()  # of the views that are there
        views = table.flatten(0, 1)[places].to(hidden_states.device)
        is_global = (views[:, VIEW] == 0)[:, None, None]
        encoded = torch.where(is_global, self.global_norm(hidden_states), self.local_norm(hidden_states))
        encoded = encoded + self.vectors(views)[:, None]
        if len(places) < table.shape[0] * table.shape[1]:
            empty = encoded.new_zeros(table.shape[0] * table.shape[1], *encoded.shape[1:])
            encoded = empty.index_copy(0, places.to(encoded.device), encoded)
        return encoded.unflatten(0, table.shape[:2]).flatten(1, 2)

    def vectors(self, views: torch.Tensor) -> torch.Tensor:
        """Of views, rows of a `view_table` (n, 6): (n, D)."""
        if hasattr(self, "view_embedding"):
            vectors = self.view_embedding(views[:, VIEW])
        else:
            vectors = self.row_embedding(place_of(views[:, ROW], views[:, ROWS]))
            vectors = vectors + self.column_embedding(place_of(views[:, COLUMN], views[:, COLUMNS]))
        return vectors + self.image_embedding(views[:, IMAGE]) if hasattr(self, "image_embedding") else vectors


def place_of(number: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The index of place `number` of `count` in a table of all places of 1, of 2, ..."""
    return count * (count - 1) // 2 + number


def place_vectors(table: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of rows and of columns, each (longest * (longest + 1) / 2, D), to begin with instead of those of views
    (1 + k * k, D): the means of each row and column of crops, less half the mean of all; for another number of rows,
    those at their places, between two if need be. A row of one and a column of one are half the global view's."""
    side = math.isqrt(len(table) - 1)
    crops = table[1:].unflatten(0, (side, side))  # (columns, rows, D)
    found = []
    for means in (crops.mean(0), crops.mean(1)):
        means = means - crops.mean((0, 1)) / 2  # (k, D)
        places = [table[0] / 2]
        for count in range(2, longest + 1):
            for number in range(count):
                place = min(max((number + 0.5) / count * side - 0.5, 0), side - 1)
                low = min(int(place), max(side - 2, 0))
                high = min(low + 1, side - 1)
                places.append(torch.lerp(means[low], means[high], place - low))
        found.append(torch.stack(places))
    return tuple(found)


# --- The high-resolution branch (after FILA) ---


def join_tiles(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Tiles (B, rows * columns, C, T, T), column by column, to whole images (B, C, rows * T, columns * T)."""
    tiles = tiles.unflatten(1, (columns, rows))  # (B, columns, rows, C, T, T)
    return tiles.permute(0, 3, 2, 4, 1, 5).flatten(4, 5).flatten(2, 3)


def view_maps(whole: torch.Tensor, rows: int, columns: int, patches: int) -> torch.Tensor:
    """What of a map (B, C, rows * S, columns * S) of the whole image each view shows, as means over its patches.

    The global view shows all of it, a crop its window; no mean crosses a window's border.

    Returns: (B * V, G * G, C), in the views' order.
    """
    height, width = whole.shape[-2:]
    global_view = F.avg_pool2d(whole, (height // patches, width // patches))[:, None]  # (B, 1, C, G, G)
    fine = F.avg_pool2d(whole, height // (rows * patches))  # (B, C, rows * G, columns * G)
    crops = fine.unflatten(-1, (columns, patches)).unflatten(2, (rows, patches))
    crops = crops.permute(0, 4, 2, 1, 3, 5).flatten(1, 2)  # (B, columns * rows, C, G, G)
    return join_views(global_view, crops).flatten(2).transpose(1, 2)


class PheyeFusionBlock(GradientCheckpointingLayer):
    """Joins a map of the branch to the states of all views: both normed, concatenated along channels, and brought back
    to the vision tower's width by an MLP whose result is added. Class and register tokens stay as they are."""

    def __init__(self, size: int, channels: int):
        super().__init__()
        self.state_norm = nn.LayerNorm(size, eps=1e-5)  # apart, because some channels of a ViT are huge
        self.map_norm = nn.LayerNorm(channels, eps=1e-5)
        self.mlp_in = nn.Linear(size + channels, size)
        self.mlp_out = nn.Linear(size, size)
        self.mlp_out.starts_at_zero = True  # a new branch changes nothing

    def forward(self, hidden_states: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """hidden_states (B * V, N, D), maps (B * V, G * G, C): the new states (B * V, N, D)."""
        prefix, patches = hidden_states.split([hidden_states.shape[1] - maps.shape[1], maps.shape[1]], dim=1)
        joined = torch.cat([self.state_norm(patches), self.map_norm(maps)], dim=-1)  # (B * V, G * G, D + C)
        return torch.cat([prefix, patches + self.mlp_out(F.gelu(self.mlp_in(joined)))], dim=1)
