"""What the benchmarks share: clocks at the borders of a model's parts, and their summary."""

import statistics
import time

import torch
from torch import nn


def now(device: torch.device | str = "cpu") -> float:
    """Seconds, once everything given to the device so far is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def busy(device: torch.device | str = "cpu") -> float:
    """Seconds of work: on a CPU the processor's, which other work on the machine disturbs less than the clock's."""
    return time.process_time() if torch.device(device).type == "cpu" else now(device)


class Stamps:
    """The moments at which modules end, while a `with` block runs: `times` begins with its start.

    `start` holds the moment at which the first of `modules` began.
    """

    def __init__(self, *modules: nn.Module, device: torch.device | str = "cpu"):
        self.modules, self.device = modules, device

    def __enter__(self) -> "Stamps":
        self.hooks = [module.register_forward_hook(self._stamp) for module in self.modules]
        self.times = [now(self.device)]
        return self

    def _stamp(self, module: nn.Module, args: tuple, output: object):
        self.times.append(now(self.device))

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    @property
    def intervals(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def summary(values: list[float], digits: int = 4) -> dict:
    """Median, fastest and slowest."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "n": len(values),
    }
