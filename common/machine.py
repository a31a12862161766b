"""The machine and the versions that a result was made with, in one line."""

import contextlib
import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch
import transformers

from .. import __version__


def versions() -> dict[str, str]:
    import transformers

    return {"pheye": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def commit() -> str:
    """The commit of this checkout, with a + where files differ from it; "unknown" outside one."""
    root = Path(__file__).parent.parent  # its own repository, not that of a project whose environment holds it
    command = ["git", "--git-dir", root / ".git", "--work-tree", root]
    command += ["describe", "--always", "--abbrev=7", "--dirty=+"]
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


def memory(name: str) -> int | None:
    """Bytes of this process by a name of /proc/self/status (VmRSS now, VmHWM at most), None where there is none."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return int(re.search(rf"^{name}:\s+(\d+) kB", status.read_text(), re.MULTILINE).group(1)) * 1024


def reset_peak_memory():
    """Begin VmHWM anew, where the system lets a process do so."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
