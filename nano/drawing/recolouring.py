"""Other pictures with the same letters: pages in other colours."""

import torch


def recoloured(
    pixels: torch.Tensor, is_page: torch.Tensor, generator: torch.Generator, inverted: float = 0.5
) -> torch.Tensor:
    """Pages with channels rolled and a share of them inverted: other pictures with the same letters. Scenes keep
    theirs, for their shapes are asked for their colours."""
    rows = len(pixels)
    shifts = torch.randint(0, 3, (rows, 1), generator=generator).to(pixels.device)
    inverts = (torch.rand(rows, generator=generator) < inverted).to(pixels.device)
    channels = (torch.arange(3, device=pixels.device) - shifts * is_page[:, None]) % 3  # (B, 3)
    rolled = pixels.gather(-1, channels[:, None, None].expand_as(pixels))
    return torch.where((inverts & is_page)[:, None, None, None], 255 - rolled, rolled)
