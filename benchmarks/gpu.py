"""What only a GPU shows, part by part: correctness first, then speed.

    python benchmarks/gpu.py --output FOLDER [--minutes 7] [--only PART ...] [--rehearse]

It needs Python with torch, transformers, accelerate, pillow and pytest, no network and no installation of this
package. Each part is a process of its own with a time limit of its own, so that one that fails or hangs costs only
itself. FOLDER gets `log.txt`, what the parts print, as they print it; and, anew after each part, `results.json` and
the table `results.md`. `--rehearse` runs every part on a CPU at toy size. docs/gpu.md says what was run where.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SIZES = ["--dtype", "bfloat16", "--tokens", "32"]


class Part(NamedTuple):
    """One process: its limit in seconds, what to run, and what a rehearsal gives in place of full sizes."""

    name: str
    limit: int
    command: list[str]
    rehearsed: list[str] = []


def tests(name: str, limit: int, pattern: str) -> Part:
    """Tests whose names match `pattern`, on several processes where pytest-xdist is there."""
    options = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    if importlib.util.find_spec("pytest_timeout"):
        options += [f"--timeout={limit // 2}", "--timeout-method=thread"]
    command = ["-m", "pytest", "-v", "-m", "gpu", "-rs", "--durations=0", *options, "tests/test_gpu.py", "-k", pattern]
    return Part(name, limit, command)


def benchmark(name: str, limit: int, module: str, *options: str) -> Part:
    toy = ["--variant", "toy", "--device", "cpu", "--repeats", "1"]
    if module == "generation":
        toy += ["--tokens", "3"]
    return Part(name, limit, ["-m", f"pheye.benchmarks.{module}", "--device", "cuda", *options], toy)


PARTS = [
    tests("golden", 90, "golden"),
    tests("attention and compilation", 150, "attention or compiled"),
    tests("generation, devices, training", 90, "not golden and not attention and not compiled"),
    benchmark("x4-672", 90, "generation", *SIZES, "--compare", "--batch", "1", "8", "64", "--repeats", "3"),
    benchmark(
        "x4-672, compiled", 150, "generation", *SIZES, "--compile", "--static", "--batch", "8", "--repeats", "5"
    ),
    benchmark("x2-672", 60, "generation", "--variant", "x2-672", *SIZES, "--compare", "--repeats", "3"),
    benchmark("high-resolution branch", 60, "generation", *SIZES, "--branch", "T", "B", "L", "--repeats", "5"),
    *(
        benchmark(
            f"training, batch {batch}", 45, "training", "--batch", str(batch), "--settings", "plain", "--repeats", "3"
        )
        for batch in (1, 4, 16)
    ),
]


def run(part: Part, seconds: float, rehearse: bool, environment: dict[str, str], log: Path) -> dict:
    """Run one part for at most `seconds`; its processes go with it."""
    command = [sys.executable, *part.command, *(part.rehearsed if rehearse else [])]
    start = time.monotonic()
    with log.open("a") as file:
        file.write(f"\n=== {part.name}: {' '.join(command[1:])}\n")
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "passed" if process.wait(seconds) == 0 else f"failed, exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # workers too, which may outlive it
            process.wait()
    result = {"part": part.name, "status": status, "seconds": round(time.monotonic() - start, 1)}
    with log.open(errors="replace") as file:
        file.seek(begin)
        lines = [line.strip() for line in file if line.strip()]
    for line in reversed(lines):
        if line.startswith("{"):  # a benchmark's last line
            return {**result, "figures": json.loads(line)}
    return {**result, "last line": lines[-1] if lines else ""}


def write(path: Path, text: str):
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def table(results: list[dict]) -> str:
    lines = ["| part | status | seconds |", "| --- | --- | --- |"]
    lines += [f"| {result['part']} | {result['status']} | {result['seconds']} |" for result in results]
    for result in results:
        figures = result.get("figures", {})
        single = {name: value for name, value in figures.items() if isinstance(value, float)}
        single |= figures.get("ratios", {}) | figures.get("rates", {})
        parts = figures.get("seconds", {})
        for size, costs in figures.get("branches", {}).items():
            single |= {f"{name}, ConvNeXt-{size}": row["median"] for name, row in costs["ratios"].items()}
            single |= {
                f"peak of {name}, ConvNeXt-{size}, MB": (peak or 0) / 1e6 for name, peak in costs["peaks"].items()
            }
            parts = {**parts, **{f"{name}, ConvNeXt-{size}": row for name, row in costs["seconds"].items()}}
        if single:
            lines += ["", f"{result['part']}: {figures['machine']}", "", "| figure | |", "| --- | --- |"]
            lines += [f"| {name} | {value:.4g} |" for name, value in single.items()]
        for setting, row in figures.get("settings", {}).items():
            parts = {**parts, f"{setting}, step": row["step"]}
        for name, row in parts.items():
            lines.append(f"| {name}, ms | {_milliseconds(row)} |")
    return "\n".join(lines) + "\n"


def _milliseconds(row: dict) -> str:
    median, fastest, slowest = (1000 * row[name] for name in ("median", "min", "max"))
    return f"{median:.4g} ({fastest:.4g} to {slowest:.4g})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=7, help="for all parts together (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="PART")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at toy size")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    log = args.output / "log.txt"
    end = time.monotonic() + 60 * args.minutes
    results = []
    with tempfile.TemporaryDirectory() as path:
        (Path(path) / "pheye").symlink_to(ROOT)  # the root is the package, whatever its folder is called
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "PHEYE_REHEARSE": str(int(args.rehearse)),
        }
        for part in PARTS:
            if args.only and part.name not in args.only:
                continue
            seconds = min(part.limit, end - time.monotonic())
            if seconds > 0:
                results.append(run(part, seconds, args.rehearse, environment, log))
            else:
                results.append({"part": part.name, "status": "not begun: no time was left", "seconds": 0})
            write(args.output / "results.json", json.dumps(results, indent=1) + "\n")
            write(args.output / "results.md", table(results))
            print(f"{results[-1]['part']}: {results[-1]['status']}, {results[-1]['seconds']} s", flush=True)
    return int(any(result["status"] != "passed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
