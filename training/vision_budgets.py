"""Budgets of a model that refines its images (visor_pheye.py): which one a step trains, which are worth having, and
which a sample needs.

After "VISion On Request", arXiv 2603.23495, as far as it is known; what is our choice stands in docs/architecture.md.
"""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from transformers import TrainingArguments

from ..common.command import InputError
from ..configuration_pheye import PheyeConfig

LARGEST, UNIVERSAL = "largest", "universal"  # what a step trains
STREAM = 3  # of random numbers; the mixture draws from 1 and 2
MOST_TRIED_WHOLE = 5  # layers of which all subsets are measured
SHARE = 0.99  # of the largest budget's score that is enough


# --- Training ---


def drawn_budget(seed: int, step: int, budgets: int) -> int:
    """One of so many budgets, all equally likely: the same in all processes and after a restart."""
    return int(np.random.default_rng((seed, STREAM, step)).integers(budgets))


def prepare_for_budgets(config: PheyeConfig, training: TrainingArguments, vision_budgets: str):
    """Let DDP wait for no gradients of blocks that are not in a step's budget.

    Args:
        vision_budgets: `LARGEST` or `UNIVERSAL`.

    Raises:
        InputError: if there is nothing to draw from, or for options that do not go with parameters without gradients.
    """
    budgets = config.self_attention_budgets
    if vision_budgets == UNIVERSAL and len(budgets) < 2:
        raise InputError(
            f"--vision_budgets {UNIVERSAL} has nothing to draw from: the model's self_attention_budgets are "
            f"{list(budgets)}. Leave it out, or give a model with several, or --self_attention_layers."
        )
    trained = budgets if vision_budgets == UNIVERSAL else budgets[-1:]
    if all(len(budget) == len(config.self_attention_layers) for budget in trained):
        return
    training.ddp_find_unused_parameters = True
    reentrant = training.gradient_checkpointing and (training.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    clashes = {"gradient_checkpointing_kwargs": reentrant, "ddp_static_graph": training.ddp_static_graph}
    for name, clash in clashes.items():
        if clash:
            raise InputError(
                f"--vision_budgets {vision_budgets} leaves blocks without a gradient, which does not go with --{name} "
                f"{getattr(training, name)}; leave that out."
            )


# --- Which budgets are worth having ---


def measured_subsets(
    layers: Sequence[int], measure: Callable[[list[tuple[int, ...]]], dict[tuple[int, ...], float]]
) -> dict[tuple[int, ...], float]:
    """The losses of subsets of `layers`: of all of them, or, of many layers, of nested ones, made by leaving out one
    layer after another, each time the one without which the loss is least.

    measure: gives the loss of each of some subsets.
    """
    if len(layers) <= MOST_TRIED_WHOLE:
        sizes = range(len(layers) + 1)
        return measure([subset for size in sizes for subset in itertools.combinations(layers, size)])
    kept = tuple(layers)
    losses = measure([kept])
    while kept:
        found = measure([tuple(layer for layer in kept if layer != left_out) for left_out in kept])
        kept = min(found, key=found.get)
        losses[kept] = found[kept]
    return losses


def viable_budgets(losses: dict[tuple[int, ...], float]) -> list[list[int]]:
    """The subsets that are cheaper or better than every other, cheapest first. All layers cost the same."""
    viable, least = [], math.inf
    for subset, loss in sorted(losses.items(), key=lambda item: (len(item[0]), item[1])):
        if loss < least:
            viable.append(list(subset))
            least = loss
    return viable


def changed_config(folder: Path, **fields: object) -> bytes:
    """The config.json of a model with other values of `fields`, and all else as it stands there.

    Raises:
        ValueError: if a model cannot have them.
    """
    config = {**json.loads((folder / "config.json").read_text(encoding="utf-8")), **fields}
    PheyeConfig.from_dict(dict(config))
    return json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"


# --- Which budget a sample needs ---


def label_by_score(scores: Sequence[float]) -> int:
    """The cheapest budget whose score reaches `SHARE` of that of the largest; `scores` are from cheap to large."""
    return next((budget for budget, score in enumerate(scores) if score >= SHARE * scores[-1]), len(scores) - 1)


def label_by_loss(losses: Sequence[float], margin: float) -> int:
    """The cheapest budget whose loss is at most by `margin` above that of the largest."""
    return next((budget for budget, loss in enumerate(losses) if loss <= losses[-1] + margin), len(losses) - 1)
