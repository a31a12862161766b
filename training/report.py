"""What a finished run says of itself: a plot of its log, and the model's card."""

import os
from dataclasses import asdict
from pathlib import Path

from ..common.machine import versions
from .formats import Source


def plot_log(history: list[dict], path: str | os.PathLike):
    """Loss and learning rate over the steps, as a PNG."""
    from matplotlib.figure import Figure

    rows = [row for row in history if "loss" in row]
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    left.plot(steps, [row["loss"] for row in rows], label="loss")
    right.plot(steps, [row["learning_rate"] for row in rows], color="gray", linestyle="--", label="learning rate")
    left.set(xlabel="step", ylabel="loss per answer token")
    left.set_ylim(bottom=0)
    right.set(ylabel="learning rate (dashed)")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def write_model_card(
    path: Path, trainer, base: str, stage: str | None, sources: list[Source], trained_file: str | None
):
    """README.md of a trained model: what it began with, data, arguments, versions and the last loss.

    Args:
        base: the model that the run began with.
        trained_file: the one file of weights, if only what was trained is written.
    """
    training = trainer.args
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    size = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else "streamed"
    options = {
        "stage": stage or "none",
        "samples in an epoch": size,
        "steps": trainer.state.global_step,
        "effective batch": training.effective_batch_size,
        "learning rate": training.learning_rate,
        "schedule": getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type),
        "precision": "bfloat16, trained parts in float32" if training.bf16 else "float32",
        "seed": training.seed,
        "last logged loss": f"{losses[-1]:.4f}" if losses else "none",
    }
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text"]
    lines += [] if Path(base).exists() else [f"base_model: {base}"]
    lines += ["tags:", "- pheye", "---", "", f"# {Path(training.output_dir).resolve().name}", ""]
    lines += [f"A Pheye, trained from `{base}` by `pheye train`.", ""]
    if trained_file:
        lines += [
            f"`{trained_file}` holds only what was trained; `load_trained(model, folder)` of pheye.training.trained "
            "puts it onto that model.",
            "",
        ]
    lines += ["![loss and learning rate](training.png)", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in options.items()]
    lines += ["", "## Data", "", "| source | path | prompt | turns |", "| --- | --- | --- | --- |"]
    for source in map(asdict, sources):
        turns = "all" if source["turns"] is None else source["turns"]
        prompt = "one of ten caption instructions" if source["caption"] else source["prompt"] or "-"
        lines.append(f"| {source['name']} | {source['path']} | {prompt} | {turns} |")
    made_with = ", ".join(f"{package} {version}" for package, version in versions().items())
    lines += ["", "## Versions", "", made_with, ""]
    path.write_text("\n".join(lines))
