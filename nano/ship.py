"""Put a trained Pheye-nano into the repository.

    python -m pheye.nano.ship --output checkpoints/pheye-nano \
        --runs nano-runs/vision nano-runs/language nano-runs/stage1 nano-runs/stage2 nano-runs/stage3

The model is that of the last run, stored in bfloat16 and loaded in float32, in which every processor computes. Beside
it go the code files, `log.jsonl` with every logged step of all runs, and their losses as a picture, training.png.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from .. import PheyeForConditionalGeneration, PheyeProcessor
from ..common.command import InputError, Parser, exit_status
from ..common.files import write_atomically
from ..common.json_lines import read_rows
from ..training.checkpoints import last_checkpoint
from .learning.checkpoints import LOG

COLUMNS = 4  # of the plot


def read_log(run: Path) -> list[dict]:
    """What a run logged, step by step; of steps that it took twice, after a kill, the second time.

    Raises:
        InputError: if `run` is no folder of a run.
    """
    if (run / LOG).is_file():
        rows = read_rows(run / LOG)
    elif (checkpoint := last_checkpoint(run)) is not None:
        rows = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    else:
        raise InputError(f"{run} holds neither {LOG} nor a checkpoint; give the folders of runs.")
    by_step = {row["step"]: {"run": run.name, **row} for row in rows if "loss" in row}
    return [by_step[step] for step in sorted(by_step)]


def plot(logs: list[list[dict]], path: Path):
    """The loss of each run over its steps, side by side."""
    columns = min(len(logs), COLUMNS)
    lines = math.ceil(len(logs) / columns)
    figure = Figure(figsize=(3 * columns, 3 * lines), layout="constrained")
    places = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in places[len(logs) :]:
        axes.remove()
    for axes, rows in zip(places, logs, strict=False):
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows])
        axes.set(title=rows[0]["run"], xlabel="step")
        axes.set_ylim(bottom=0)
    figure.suptitle("loss")
    figure.savefig(path, dpi=100)


def ship(runs: list[Path], output: Path):
    """Write everything but the model card, which is written by hand."""
    logs = [read_log(run) for run in runs]
    model = PheyeForConditionalGeneration.from_pretrained(runs[-1], dtype=torch.float32)
    model.save_pretrained(output, state_dict={name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    PheyeProcessor.from_pretrained(runs[-1]).save_pretrained(output)
    write_atomically(output / LOG, (f"{json.dumps(row)}\n".encode() for rows in logs for row in rows))
    plot(logs, output / "training.png")
    size = (output / "model.safetensors").stat().st_size
    print(f"{output}: {model.num_parameters():,} parameters, {size / 1e6:.1f} MB")


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.ship", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders, in order")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(ship, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
