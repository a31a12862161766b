"""Muon in single precision, against that of torch."""

import pytest
import torch

from pheye.nano.learning.muon import Muon

pytestmark = pytest.mark.once


def test_muon_steps_like_that_of_torch_which_rounds():
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 8), (24, 8), (8, 24)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = [Muon(ours, **options), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)]
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        moved, error = (other - 1).norm(), (one - other).norm()
        assert moved > 0.05 and error < 0.02 * moved
