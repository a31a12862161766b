"""Pages in other colours stay readable."""

import pytest
import torch

from pheye.nano.drawing.recolouring import recoloured

pytestmark = pytest.mark.once


def test_recolouring_leaves_scenes_alone_and_pages_readable():
    pixels = torch.randint(0, 256, (8, 4, 4, 3), dtype=torch.uint8)
    is_page = torch.arange(8) < 6
    given = recoloured(pixels, is_page, torch.Generator().manual_seed(0))
    assert torch.equal(given[6:], pixels[6:])
    for before, after in zip(pixels[:6], given[:6], strict=True):
        variants = [before.roll(shift, -1) for shift in range(3)]
        assert any(torch.equal(after, image) or torch.equal(after, 255 - image) for image in variants)
    assert not torch.equal(given[:6], pixels[:6])
