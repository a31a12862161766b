"""Budgets of a model that refines its images: which are worth having, which a question needs, a router that chooses.

    pheye budgets find --model FOLDER --data DATA
    pheye budgets label --model FOLDER --data DATA --output LABELS [--rule score|loss]
    pheye budgets route --model FOLDER --data DATA --labels LABELS --output FOLDER

`find` measures the loss of right answers, and writes the budgets into the folder's config.json. `label` asks at each
budget, and writes one line of JSON per question; `accelerate launch -m pheye.training.budgets label ...` does it on
several devices, and after a kill the same command goes on. `route` trains the router on these labels. The order of all
commands is in docs/training.md.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from ..answering.engine import default_workers, encoded, open_model
from ..answering.rows import Request
from ..common.command import DTYPES, InputError, Parser, at_least, exit_status, process_state
from ..common.files import write_atomically
from ..common.json_lines import read_lines, read_rows
from ..common.models import find_model
from ..configuration_pheye import PheyeConfig
from ..evaluation.sources import WHERE_IMAGES_ARE
from ..evaluation.tasks import METRICS, OWN, Task
from ..modeling_pheye import PheyeForConditionalGeneration
from ..processing_pheye import PheyeProcessor
from .labels import LOSS, Rule, check_budgets, make_labels, summary
from .questions import add_data_options, answered, batches, losses_of, read_questions, right_answer, tokens_of
from .router import held_out, labels_by_id, report, router_states, save_routed, train_router
from .vision_budgets import changed_config, measured_subsets, viable_budgets

SCORE = "score"
REPORT = "router.json"  # in the output folder of `route`


def folder_of(model: str) -> Path:
    """The folder of a model that is to be changed, or copied file by file."""
    if not Path(model).is_dir():
        raise InputError(f"{model} is no folder; download the model first, and give its folder.")
    find_model(model)
    return Path(model)


def alone(device: str | None) -> str:
    """The device of the only process."""
    state = process_state(device)
    if state.num_processes > 1:
        raise InputError(f"{state.num_processes} processes were launched; this command runs in one.")
    return device or str(state.device)


def open_folder(folder: Path, dtype: str, device: str, **config) -> tuple[PheyeForConditionalGeneration, object]:
    """Model and processor; `config` replaces fields."""
    model = PheyeForConditionalGeneration.from_pretrained(folder, dtype=dtype, **config)
    return model.to(device).eval(), PheyeProcessor.from_pretrained(folder)


# --- find ---


def loss_per_token(
    model, processor, requests: list[Request], subsets: list[tuple[int, ...]], batch_size: int, workers: int
) -> dict[tuple[int, ...], float]:
    """The loss per token of the right answers, with each of some subsets of the layers refining the image."""
    model.config.self_attention_budgets = [list(subset) for subset in subsets]
    sums, tokens, errors = torch.zeros(len(subsets), dtype=torch.float64), 0, {}
    with tqdm(total=len(requests), desc=f"{len(subsets)} subsets") as bar:
        for batch in batches(processor, requests, batch_size, workers):
            errors |= batch.errors
            bar.update(len(batch.requests) + len(batch.errors))
            if batch.requests:
                image = encoded(model, batch.image_inputs)
                answers = [right_answer(request) for request in batch.requests]
                text = answered(processor, batch.conversations, answers)
                tokens += int(tokens_of(text).sum())
                for number in range(len(subsets)):
                    sums[number] += losses_of(model, text, image, number).double().sum()
    if not tokens:
        raise InputError(f"No image could be read; the first: {next(iter(errors.values()))}")
    if errors:
        print(f"{len(errors)} of {len(requests)} samples were left out: their images could not be read.")
    return dict(zip(subsets, (sums / tokens).tolist(), strict=True))


def find(
    model: str, *, dtype: str, device: str | None, batch_size: int, workers: int | None, limit: int | None, **data
):
    """Measure, and write the viable budgets into the model's folder."""
    folder, device = folder_of(model), alone(device)
    config = PheyeConfig.from_pretrained(folder)
    if not config.self_attention_layers:
        raise InputError(f"{model} has no self_attention_layers, so there are no budgets to find.")
    if config.router_size:
        raise InputError(
            f"{model} has a router for its self_attention_budgets {config.self_attention_budgets}, which would not "
            "fit others; give the model from before its router."
        )
    _, requests = read_questions(**data)
    loaded, processor = open_folder(folder, dtype, device)
    workers = default_workers(device) if workers is None else workers
    losses = measured_subsets(
        config.self_attention_layers,
        lambda subsets: loss_per_token(loaded, processor, requests[:limit], subsets, batch_size, workers),
    )
    budgets = viable_budgets(losses)
    for subset, loss in sorted(losses.items(), key=lambda item: (len(item[0]), item[1])):
        kept = f"budget {budgets.index(list(subset))}" if list(subset) in budgets else "no budget"
        print(f"{list(subset)}: loss per answer token {loss:.4f}, {kept}")
    write_atomically(folder / "config.json", [changed_config(folder, self_attention_budgets=budgets)])
    print(f"{folder / 'config.json'}: self_attention_budgets {budgets}")


# --- label ---


def rule_of(rule: str, margin: float | None, metric: str | None, max_new_tokens: int | None, task: Task) -> Rule:
    """What the options say; those of the other rule are refused."""
    given = {"margin": margin} if rule == SCORE else {"metric": metric, "max_new_tokens": max_new_tokens}
    if unused := [f"--{name}" for name, value in given.items() if value is not None]:
        raise InputError(f"--rule {rule} has no use for {unused[0]}; leave it out.")
    if rule == LOSS:
        if not 0 <= (margin or 0.0) < float("inf"):
            raise InputError(f"--margin {margin} must be at least 0, and finite.")
        return Rule(margin=margin or 0.0)
    if metric is not None and task.name != OWN:
        raise InputError(f"--task {task.name} has a metric of its own: leave --metric out.")
    metric = METRICS[metric] if metric else task.metric
    if metric is METRICS["cider"]:
        raise InputError("The CIDEr of an answer depends on all others; give another --metric, or --rule loss.")
    return Rule(metric, max_new_tokens or task.max_new_tokens)


def label(
    model: str,
    output: str,
    *,
    rule: str,
    margin: float | None,
    metric: str | None,
    max_new_tokens: int | None,
    revision: str | None,
    dtype: str,
    device: str | None,
    batch_size: int,
    workers: int | None,
    limit: int | None,
    **data,
):
    """Label the questions; every process of a launch makes this call."""
    state = process_state(device)
    budgets = PheyeConfig.from_pretrained(model, revision=revision).self_attention_budgets
    check_budgets(budgets)
    task, requests = read_questions(**data)
    rule = rule_of(rule, margin, metric, max_new_tokens, task)
    device = device or state.device
    identity, load = open_model(model, revision, dtype, device)
    images = {name: value for name, value in data.items() if name in WHERE_IMAGES_ARE}
    make_labels(
        load, budgets, requests[:limit], Path(output), rule, batch_size=batch_size,
        workers=default_workers(device) if workers is None else workers,
        settings={"model": model, "files of the model": identity, "dtype": dtype, **images},
    )  # fmt: skip
    if state.is_main_process:
        print(summary(read_rows(Path(output)), budgets))


# --- route ---


def route(
    model: str,
    labels: str,
    output: str,
    *,
    router_size: int | None,
    share: float,
    epochs: int,
    learning_rate: float,
    seed: int,
    dtype: str,
    device: str | None,
    batch_size: int,
    workers: int | None,
    limit: int | None,
    **data,
):
    """Train the router on labels, and write a model with it."""
    folder, device = folder_of(model), alone(device)
    config = PheyeConfig.from_pretrained(folder)
    budgets = config.self_attention_budgets
    known = labels_by_id(read_lines(Path(labels)), budgets)
    if not (0 < share < 1 and 0 < learning_rate < float("inf")):
        raise InputError(
            f"--held_out {share} must be above 0 and below 1, and --learning_rate {learning_rate} above 0 and finite."
        )
    if config.router_size and router_size not in (None, config.router_size):
        raise InputError(f"{model} has a router of size {config.router_size}; leave --router_size out.")
    if Path(output).exists():
        raise InputError(f"{output} exists already; choose another --output.")
    _, requests = read_questions(**data)
    requests = [request for request in requests[:limit] if request.id in known]
    if not requests:
        raise InputError(f"No sample of {data['data']} has a label in {labels}; give the data that it was made of.")
    torch.manual_seed(seed)  # of a new router
    added = {"router_size": config.router_size or router_size or 512}
    loaded, processor = open_folder(folder, dtype, device, **added)
    workers = default_workers(device) if workers is None else workers
    found = router_states(loaded, processor, requests, batch_size, workers)
    rows = [known[row_id] for row_id in found.ids]
    target, tested = torch.tensor([row["label"] for row in rows]), held_out(found.pictures, share)
    router = loaded.model.router.float().cpu()
    train_router(
        router, found.states[~tested], target[~tested], epochs=epochs, learning_rate=learning_rate, batch_size=64,
        seed=seed,
    )  # fmt: skip
    result = {"budgets": budgets, "errors": len(found.errors)}
    for part, mask in (("test", tested), ("training", ~tested)):
        pictures = len({*picked(found.pictures, mask)})
        result[part] = {"pictures": pictures, **report(router, found.states[mask], picked(rows, mask), budgets)}
    save_routed(folder, loaded, processor, Path(output))
    write_atomically(Path(output) / REPORT, [json.dumps(result, indent=2).encode() + b"\n"])
    print(words_of(result["test"]))
    print(f"{output} holds the model with its router, and {REPORT}.")


def picked(items: list, mask: torch.Tensor) -> list:
    return [item for item, is_picked in zip(items, mask.tolist(), strict=True) if is_picked]


def words_of(test: dict) -> str:
    """The report on held-out pictures."""
    lines = [f"{test['samples']} questions about {test['pictures']} other pictures: accuracy {test['accuracy']:.3f}."]
    lines.append("Confusion, a row per label, a column per choice:")
    lines += ["  " + " ".join(f"{count:6d}" for count in row) for row in test["confusion"]]
    for name, means in test["ways"].items():
        (_, layers), (measure, value) = means.items()
        lines.append(f"{name}: {layers:.2f} layers a question, mean of the {measure} {value:.4f}")
    return "\n".join(lines)


# --- The command ---


def parse(argv: list[str] | None) -> dict:
    """The command's options by name; `run` is what to do with the others."""
    parser = Parser(prog="pheye budgets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(required=True, metavar="find|label|route", parser_class=Parser)
    finding, labelling, routing = (
        ways.add_parser(run.__name__, help=run.__doc__.split(";")[0]) for run in (find, label, route)
    )
    for way, run in ((finding, find), (labelling, label), (routing, route)):
        way.set_defaults(run=run)
        way.add_argument("--model", required=True, metavar="FOLDER_OR_ID" if way is labelling else "FOLDER")
        add_data_options(way)
        way.add_argument("--dtype", default="auto", choices=DTYPES, help="(default: as the model was saved)")
        way.add_argument("--device", help="such as cpu or cuda (default: an accelerator if there is one)")
        way.add_argument("--batch_size", type=at_least(1), default=8, help="questions at once (default: 8)")
        way.add_argument("--workers", type=at_least(0), help="processes that open images (default: 4; on a CPU none)")
        way.add_argument("--limit", type=at_least(1), help="only the first so many questions")
    labelling.add_argument("--revision", help="of a model on the Hub")
    labelling.add_argument("--output", required=True, metavar="LABELS")
    labelling.add_argument(
        "--rule", default=SCORE, choices=(SCORE, LOSS), help="score of greedy answers, or loss of the right answer"
    )
    labelling.add_argument("--metric", choices=METRICS, help="of --rule score (default: the task's, or exact_match)")
    labelling.add_argument("--max_new_tokens", type=at_least(1), help="of --rule score (default: the task's)")
    labelling.add_argument("--margin", type=float, help="of --rule loss, per answer token (default: 0)")
    routing.add_argument("--labels", required=True, metavar="LABELS", help="what label wrote")
    routing.add_argument("--output", required=True, metavar="FOLDER")
    routing.add_argument("--router_size", type=at_least(1), help="inner width of a new router (default: 512)")
    routing.add_argument("--held_out", type=float, default=0.1, dest="share", help="of the pictures (default: 0.1)")
    routing.add_argument("--epochs", type=at_least(1), default=20, help="(default: 20)")
    routing.add_argument("--learning_rate", type=float, default=1e-3, help="(default: 1e-3)")
    routing.add_argument("--seed", type=at_least(0), default=0, help="(default: 0)")
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(**parse(argv))


if __name__ == "__main__":
    sys.exit(main())
