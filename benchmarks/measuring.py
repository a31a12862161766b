"""What the benchmarks share: clocks at the borders of a model's parts, memory, and the line about the machine."""

import datetime
import os
import platform
import re
import statistics
import subprocess
import time
from pathlib import Path

import torch
import transformers
from torch import nn


def now(device: torch.device | str = "cpu") -> float:
    """Seconds, once everything given to the device so far is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


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


def memory(name: str) -> int | None:
    """Bytes of this process by a name of /proc/self/status (VmRSS now, VmHWM at most), None where there is none."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return int(re.search(rf"^{name}:\s+(\d+) kB", status.read_text(), re.MULTILINE).group(1)) * 1024


def reset_peak_memory():
    """Begin VmHWM anew."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def commit() -> str:
    """The commit of this checkout, with a + where files differ from it; "unknown" outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=7", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: torch.device | str = "cpu") -> str:
    """Hardware, versions, commit and date, for a benchmark's output."""
    if torch.device(device).type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        cpu = Path("/proc/cpuinfo")
        found = re.search(r"^model name\s*: (.+)", cpu.read_text(), re.MULTILINE) if cpu.exists() else None
        hardware = f"{os.cpu_count()} CPUs ({found.group(1) if found else platform.processor()})"
    threads = torch.get_num_threads()
    return (
        f"{hardware}, {threads} thread{'s' if threads > 1 else ''}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; commit {commit()}; "
        f"{datetime.date.today()}"
    )
