"""Loading a converted folder of full size, over reading its bytes; and `import pheye`, over starting Python.

    python -m pheye.benchmarks.loading [--variant x4-672] [--dtype bfloat16] [--repeats 5] [--workdir DIR]

Converts a synthetic published checkpoint (needs 11 GB of disk), then loads it in fresh processes, in turn with reading
the same files through a buffer, with the files in the page cache and not. Weights are mapped rather than copied, so
every page of them is touched before the clock stops. Peak memory is that beyond the page cache, read from Linux's
/proc. Prints a table, and a line of JSON last.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .. import PheyeConfig
from ..common.command import Parser
from ..common.machine import machine
from ..convert_checkpoint import main as convert
from .conversion import POLL_SECONDS, evict, make_full_size, memory_beyond_page_cache
from .measuring import summary

# Imports are not part of loading; a line on standard output says when they are done, another what was measured.
LOAD = """
import sys, time, torch
from pheye import PheyeForConditionalGeneration as Pheye
print("ready", flush=True)
sys.stdin.readline()
start = time.perf_counter()
model = Pheye.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
for parameter in model.parameters():
    parameter.data.view(-1).view(torch.uint8)[::4096].sum()
print(time.perf_counter() - start, sum(p.nbytes for p in model.parameters()), flush=True)
"""


def read_bytes(files: list[Path]) -> float:
    """Seconds to read `files` into memory, one after another."""
    start = time.perf_counter()
    for file in files:
        buffer = bytearray(1 << 24)
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def load(folder: Path, dtype: str) -> tuple[float, float]:
    """Seconds to load `folder` in a fresh process, and its peak memory beyond its imports over that of the weights."""
    command = [sys.executable, "-c", LOAD, str(folder), dtype]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.readline()
    start = peak = memory_beyond_page_cache(process.pid)
    process.stdin.write(b"\n")
    process.stdin.close()
    while process.poll() is None:
        peak = max(peak, memory_beyond_page_cache(process.pid))
        time.sleep(POLL_SECONDS)
    seconds, weights = process.stdout.read().split()
    return float(seconds), (peak - start) / int(weights)


def measure_loading(work: Path, config: PheyeConfig, dtype: str, repeats: int) -> dict:
    """Medians with the files in the page cache and on the disk only."""
    make_full_size(work / "published", config)
    convert([str(work / "published"), str(work / "converted")])
    (work / "published" / "checkpoint.pt").unlink()
    files = sorted((work / "converted").glob("*.safetensors"))
    result = {"bytes": sum(file.stat().st_size for file in files)}
    for state in ("page cache", "disk"):
        reads, loads, peaks = [], [], []
        for _ in range(repeats):
            for measure, results in (
                (lambda: read_bytes(files), reads),
                (lambda: load(work / "converted", dtype), loads),
            ):
                if state == "disk":
                    for file in files:
                        evict(file)
                else:
                    read_bytes(files)
                results.append(measure())
        loads, peaks = zip(*loads, strict=True)
        result[state] = {
            "read": summary(reads),
            "load": summary(loads),
            "ratio": statistics.median(loads) / statistics.median(reads),
            "peak / weights": max(peaks),
        }
    return result


def time_command(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def measure_import(repeats: int) -> dict:
    """Milliseconds that `import pheye` adds to starting Python, start and import in turn."""
    time_command("import pheye")  # compiles
    extra = [1000 * (time_command("import pheye") - time_command("pass")) for _ in range(repeats)]
    return summary(extra, digits=1)


def main(argv: list[str] | None = None, config: PheyeConfig | None = None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="x4-672")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workdir", help="folder on the disk to measure (default: the temporary folder)")
    args = parser.parse_args(argv)
    result = {"import_ms": measure_import(4 * args.repeats)}
    with tempfile.TemporaryDirectory(prefix="pheye-loading-", dir=args.workdir) as work:
        config = config or PheyeConfig.from_variant(args.variant)
        result |= measure_loading(Path(work), config, args.dtype, args.repeats)
    print(f"\n{result['bytes'] / 1e9:.2f} GB loaded as {args.dtype}; {machine()}\n")
    print("| files in | read, s | load, s | load / read | peak memory / weights |\n| --- | --- | --- | --- | --- |")
    for state in ("page cache", "disk"):
        row = result[state]
        cells = [
            f"{row[part]['median']:.2f} ({row[part]['min']:.2f} to {row[part]['max']:.2f})"
            for part in ("read", "load")
        ]
        print(f"| {state} | {' | '.join(cells)} | {row['ratio']:.2f} | {row['peak / weights']:.2f} |")
    print(f"\n`import pheye` over starting Python: {result['import_ms']['median']} ms")
    print(json.dumps({"benchmark": "loading", **vars(args), "machine": machine(), **result}))


if __name__ == "__main__":
    main()
