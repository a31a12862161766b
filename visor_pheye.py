"""How an image is read more closely: blocks that refine its tokens, budgets that say which of them run, and the router
that picks a budget.

After "VISion On Request: Enhanced VLLM efficiency with sparse, dynamically selected, vision-language interactions",
arXiv 2603.23495, whose details are not all known: which parts are our choice stands in docs/architecture.md.

Shapes: B images, N tokens of all views of an image, P patches of a view, R text rows (a multiple of B), T text tokens,
D width, K budgets.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .blocks_pheye import PheyeAttentionBlock
from .configuration_pheye import HEAD_WIDTH, PheyeConfig


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
    if attention_mask is None or attention_mask.ndim != 2:
        return hidden_states[:, -1]
    here = attention_mask[:, -hidden_states.shape[1] :] != 0
    places = torch.arange(here.shape[1], device=here.device)
    last = (here * places).argmax(dim=1).to(hidden_states.device)
    return hidden_states[torch.arange(len(last), device=last.device), last]


def images_there(image_mask: torch.Tensor | None, images: int) -> list[bool]:
    """Which rows have an image, by the mask (B, 1, 1, N) of the tokens that are there, None for all."""
    return [True] * images if image_mask is None else image_mask.flatten(1).any(dim=1).tolist()


def largest_choices(router_logits: torch.Tensor, there: list[bool]) -> list[int]:
    """The budget of each image: the largest that the router chose for any of its rows (R, K), which are adjacent; -1
    where there is no image."""
    budgets = router_logits.argmax(dim=-1)  # the first of equals: the cheapest
    chosen = budgets.view(len(there), -1).amax(dim=1).tolist()
    return [budget if has_image else -1 for budget, has_image in zip(chosen, there, strict=True)]


def read_budgets(vision_budget: int | torch.Tensor, there: list[bool], budgets: Sequence) -> list[int]:
    """The budget of each image, -1 where there is none.

    Args:
        vision_budget: one for all, or (B,).
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
    for budget, has_image in zip(given, there, strict=True):
        if has_image and (type(budget) is not int or not 0 <= budget < len(budgets)):
            raise ValueError(
                f"vision_budget={budget!r} must be an integer from 0 to {len(budgets) - 1}: this model has "
                f"{len(budgets)} budgets."
            )
    return [budget if has_image else -1 for budget, has_image in zip(given, there, strict=True)]
