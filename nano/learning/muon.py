"""Muon in single precision where a processor does not compute in bfloat16: torch's own takes far longer there.

Matrices of one shape are orthogonalized together, which is faster again where there are many small ones.
"""

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from .checkpoints import autocast

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the Newton-Schulz iteration that torch.optim.Muon takes
ITERATIONS = 5


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (count, rows, columns) with their singular values brought near 1."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if is_tall else x


class Muon(Optimizer):
    """As torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"`; in bfloat16 where the device computes in it."""

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape: dict[torch.Size, list] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                self._step_together(group, shape, parameters)

    def _step_together(self, group: dict, shape: torch.Size, parameters: list):
        momentum, updates = group["momentum"], []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
            updates.append(parameter.grad.lerp(buffer, momentum))
        rate = group["lr"] * 0.2 * max(shape) ** 0.5
        with autocast(parameters[0].device.type):
            matrices = orthogonalized(torch.stack(updates))
        for parameter, update in zip(parameters, matrices, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)


def optimizers_for(model: nn.Module, layers: nn.ModuleList, matrix_rate: float, rate: float) -> tuple[Optimizer, ...]:
    """Muon for the matrices in `layers`, the transformer layers of `model`, if there are any; AdamW for everything
    else."""
    matrices = [parameter for parameter in layers.parameters() if parameter.ndim == 2]
    held = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in held]
    optimizers = (AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.02),)
    if matrices:
        optimizers = (Muon(matrices, lr=matrix_rate, weight_decay=0.02), *optimizers)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: tuple[Optimizer, ...], share: float):
    """Bring the learning rates to `share` of what they were given."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["full_lr"]
