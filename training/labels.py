"""Which budget each question needs: it is asked at every budget, and the cheapest that is good enough is its label.

Rows are written as those of `answering`: each process appends to a part file of its own, a row counts as soon as its
line is whole, and the parts become the output at the end. So the same call after a kill goes on where the rows end,
with any number of processes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..answering.engine import encoded, generate, write_rows
from ..answering.rows import Request, Run, check_requests
from ..common.command import InputError
from ..evaluation.tasks import Metric
from .questions import answered, batches, digest_of, losses_of, right_answer, tokens_of
from .vision_budgets import label_by_loss, label_by_score

RULE = "rule"  # the field of a row that says how its label was made
LOSS = "loss"


@dataclass(frozen=True)
class Rule:
    """How a label is made: by the score of greedy answers, or, without a metric, by the loss of the right answer.

    metric: whose score of an answer depends on no other; max_new_tokens: of an answer; margin: by which the loss per
    token may be above that of the largest budget.
    """

    metric: Metric | None = None
    max_new_tokens: int = 32
    margin: float = 0.0

    @property
    def settings(self) -> dict:
        if self.metric is None:
            return {RULE: LOSS, "margin": self.margin}
        return {RULE: self.metric.name, "max_new_tokens": self.max_new_tokens}


def check_budgets(budgets: Sequence):
    """Raise InputError unless there is something to choose."""
    if len(budgets) < 2:
        raise InputError(
            f"There is nothing to choose: the model's self_attention_budgets are {list(budgets)}. Give a model with "
            "several; `pheye budgets find` finds them."
        )


def make_labels(
    load: Callable[[], tuple],
    budgets: Sequence,
    requests: Sequence[Request],
    output: Path,
    rule: Rule,
    *,
    batch_size: int,
    workers: int = 0,
    settings: dict,
) -> Path:
    """Write one line of JSON per request into `output`: `id`, its `fields`, `rule`, `scores` or `losses` (one per
    budget, cheapest first), `answers`, `label`; or `error` if an image cannot be read. Every process of a launch makes
    this call.

    Args:
        load: gives the model, on its device, and the processor; called only where something is left to do.
        budgets: those of the model.
        settings: what else the labels depend on; rows of a run with other settings are never continued.

    Raises:
        InputError: if there is nothing to choose, or the files beside `output` belong to another run.
        Interrupted: if the user stops it; the rows before are kept.
    """
    check_budgets(budgets)
    check_requests(requests)
    settings = {**settings, **rule.settings, "budgets": list(budgets), "samples": digest_of(requests)}
    rows_of = partial(labelled_rows, rule=rule, batch_size=batch_size, workers=workers)
    return write_rows(load, requests, Run(Path(output), RULE), rows_of, settings, batch_size)


def labelled_rows(
    model, processor, requests: Sequence[Request], rule: Rule, batch_size: int, workers: int
) -> Iterator[list[dict]]:
    """The rows of each batch."""
    measure = measured_losses if rule.metric is None else measured_scores
    for batch in batches(processor, requests, batch_size, workers):
        rows = [{"id": row_id, "error": error} for row_id, error in batch.errors.items()]
        if batch.requests:
            image = encoded(model, batch.image_inputs)
            found = measure(model, processor, batch.requests, batch.conversations, image, rule)
            for request, measured in zip(batch.requests, found, strict=True):
                rows.append({"id": request.id, **request.fields, RULE: rule.settings[RULE], **measured})
        yield rows


def measured_scores(model, processor, requests, conversations, image: dict, rule: Rule) -> Iterator[dict]:
    """Answers, their scores and the label of each request."""
    references = [request.fields["references"] for request in requests]
    answers, scores = [], []
    for budget in range(len(model.config.self_attention_budgets)):
        decoding = {"max_new_tokens": rule.max_new_tokens, "num_beams": 1, "do_sample": False}
        told = generate(model, processor, conversations, image, {**decoding, "vision_budget": budget})
        answers.append([answer for answer, _ in told])
        scores.append(rule.metric.scores(answers[-1], references))
    for own_answers, own_scores in zip(zip(*answers, strict=True), zip(*scores, strict=True), strict=True):
        yield {"answers": own_answers, "scores": own_scores, "label": label_by_score(own_scores)}


def measured_losses(model, processor, requests, conversations, image: dict, rule: Rule) -> Iterator[dict]:
    """Losses per token of the right answer, and the label of each request."""
    text = answered(processor, conversations, [right_answer(request) for request in requests])
    budgets, tokens = len(model.config.self_attention_budgets), tokens_of(text)
    losses = [(losses_of(model, text, image, budget) / tokens).tolist() for budget in range(budgets)]
    for own in zip(*losses, strict=True):
        yield {"losses": own, "label": label_by_loss(own, rule.margin)}


def summary(rows: list[dict], budgets: Sequence) -> str:
    """How often each budget is the label, and what it reaches by itself, in words."""
    labelled = [row for row in rows if "label" in row]
    lines = [f"{len(labelled)} samples have a label, {len(rows) - len(labelled)} an error."]
    for number, budget in enumerate(budgets):
        count = sum(row["label"] == number for row in labelled)
        measure = "scores" if labelled and "scores" in labelled[0] else "losses"
        mean = sum(row[measure][number] for row in labelled) / max(1, len(labelled))
        lines.append(f"budget {number} {list(budget)}: label of {count}, mean of its {measure} {mean:.4f}")
    return "\n".join(lines)
