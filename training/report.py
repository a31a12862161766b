"""What a finished run says of itself: a plot of its log, and the model's card."""

import json
import os
from pathlib import Path

from huggingface_hub import ModelCardData, metadata_load
from transformers.utils import cached_file

from ..common.machine import versions
from .formats import Source

FEW_POINTS = 30  # that a line alone would not show
LONGEST_QUESTION = 100  # letters, in the card's example
ORIGIN = ("base_model", "license", "license_name", "license_link")  # what a card says of where a model comes from

WHOLE = """```python
from transformers import pipeline

pheye = pipeline("image-to-text", model={model}, trust_remote_code=True)
print(pheye("picture.jpg", prompt={question}))
```
"""
TRAINED_ONLY = """`{file}` holds only what was trained. This puts it onto the model that the training began with:

```python
from pheye import PheyeForConditionalGeneration, PheyeProcessor
from pheye.training.trained import load_trained

model = load_trained(PheyeForConditionalGeneration.from_pretrained({base}), {model})
processor = PheyeProcessor.from_pretrained({model})
```
"""


def plot_log(history: list[dict], path: str | os.PathLike):
    """Loss and learning rate over the steps, and the loss of evaluation, as a PNG."""
    from matplotlib.figure import Figure

    rows, evaluated = ([row for row in history if name in row] for name in ("loss", "eval_loss"))
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    marker = "o" if len(rows) < FEW_POINTS else None
    left.plot(steps, [row["loss"] for row in rows], marker=marker, label="training")
    if evaluated:
        losses = [row["eval_loss"] for row in evaluated]
        left.plot([row["step"] for row in evaluated], losses, marker="s", label="evaluation")
        left.legend()
    rates = [row["learning_rate"] for row in rows]
    right.plot(steps, rates, marker=marker and ".", color="gray", linestyle="--", label="learning rate")
    left.set(xlabel="step", ylabel="loss per answer token")
    left.set_ylim(bottom=0)
    right.set(ylabel="learning rate (dashed)")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def write_model_card(
    path: Path,
    trainer,
    sources: list[Source],
    *,
    base: str,
    revision: str | None = None,
    stage: str | None = None,
    repo: str | None = None,
    trained_file: str | None = None,
):
    """README.md of a trained model: how it is used, what it began with, data, arguments, versions and losses. It names
    no place on this machine.

    Args:
        base: the model that the run began with.
        repo: the repository that the model will be pushed to, if it will be.
        trained_file: the one file of weights, if only what was trained is written.
    """
    folder = Path(trainer.args.output_dir).resolve().name
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["pheye", "image-to-text", "custom_code"],
        **origin_of(base, revision),
    )
    model, base = json.dumps(repo or folder), public_name(base)
    if trained_file:
        usage = TRAINED_ONLY.format(file=trained_file, base=json.dumps(base), model=model)
    else:
        usage = WHOLE.format(model=model, question=json.dumps(question_of(trainer.train_dataset), ensure_ascii=False))
    lines = ["---", data.to_yaml(), "---", "", f"# {(repo or folder).split('/')[-1]}", ""]
    lines += [f"A Pheye, trained from `{base}` by `pheye train`.", "", usage]
    lines += ["![loss and learning rate](training.png)", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in facts_of(trainer, stage).items()]
    lines += ["", "## Data", "", "| source | path | prompt | turns |", "| --- | --- | --- | --- |"]
    for source in sources:
        turns = "all" if source.turns is None else source.turns
        prompt = "one of ten caption instructions" if source.caption else source.prompt or "-"
        lines.append(f"| {source.name} | {public_name(source.path)} | {prompt} | {turns} |")
    made_with = ", ".join(f"{package} {version}" for package, version in versions().items())
    lines += ["", "## Versions", "", made_with, ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def facts_of(trainer, stage: str | None) -> dict[str, object]:
    """What the run was, and how it went."""
    training, history, best = trainer.args, trainer.state.log_history, trainer.state.best_global_step
    losses, evaluated = (
        [(row["step"], row[name]) for row in history if name in row] for name in ("loss", "eval_loss")
    )
    size = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else "streamed"
    facts = {
        "stage": stage or "none",
        "samples in an epoch": size,
        "steps": trainer.state.global_step,
        "effective batch": training.effective_batch_size,
        "learning rate": training.learning_rate,
        "schedule": getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type),
        "precision": "bfloat16, trained parts in float32" if training.bf16 else "float32",
        "seed": training.seed,
        "last logged loss": f"{losses[-1][1]:.4f}" if losses else "none",
    }
    if trainer.pretrained_learning_rate is not None:
        facts["learning rate of pretrained parts"] = trainer.pretrained_learning_rate
    if evaluated:
        step, loss = evaluated[-1]
        if training.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
            step, loss = best, dict(evaluated).get(best, loss)
        facts["loss on other data"] = f"{loss:.4f}, at step {step}"
    return facts


def public_name(path: str) -> str:
    """A Hub id as it is; of a file or folder its name alone."""
    return Path(path).resolve().name if Path(path).exists() else path


def origin_of(base: str, revision: str | None) -> dict[str, object]:
    """The base model on the Hub, and the licence, as far as the card of `base` says."""
    try:
        card = cached_file(base, "README.md", revision=revision, _raise_exceptions_for_missing_entries=False)
        known = (card and metadata_load(card)) or {}
    except Exception:  # of many kinds, for a card that others wrote; a run does not fail for it
        known = {}
    found = {name: known[name] for name in ORIGIN if known.get(name)}
    return found if Path(base).exists() else {**found, "base_model": base}


def question_of(data) -> str:
    """A question as the model was asked in training."""
    if hasattr(data, "__len__") and len(data):  # a stream has no length
        question = next((turn["content"] for turn in data[0]["messages"] if turn["role"] == "user"), "")
        if 0 < len(question) <= LONGEST_QUESTION:
            return question
    return "What does the image show?"
