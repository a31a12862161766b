"""What of a Pheye trains, and its weights by themselves."""

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from ..common.command import InputError
from ..modeling_pheye import PheyeForConditionalGeneration

if TYPE_CHECKING:
    from peft import LoraConfig, LoraModel

# The paper's choice: all that stands between the two pretrained models. Where there is a branch, what
# joins it to the vision tower belongs to this; the branch itself is pretrained, too. The router trains by itself.
PAPER_PARTS = ("cross_attention_blocks", "global_lora", "local_lora", "view_encoding", "fusion_blocks")
PAPER_PARTS += ("self_attention_blocks", "joint_attention", "visual_convolution")
PAPER_PATTERN = rf"pheye\.({'|'.join(PAPER_PARTS)})\."

LORA_NAME = "default"
LORA_PATTERN = rf"\.lora_[AB]\.{LORA_NAME}\."

PRETRAINED_PARTS = ("language_model", "vision_tower", "high_res_tower")
PRETRAINED_PATTERN = rf"\bpheye\.({'|'.join(PRETRAINED_PARTS)})\."

TRAINED_FILE = "trained.safetensors"


def add_language_model_lora(
    model: PheyeForConditionalGeneration,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.05,
    target: str | None = None,
) -> "LoraModel":
    """Put PEFT's LoRA on linears of the language model; `model` stays what it is.

    `merge_and_unload()` of what is returned adds the updates to the weights and takes LoRA away again.

    Args:
        target: a regular expression of the linears' full names; by default all linears of the language model's layers,
            as in the published code.

    Raises:
        InputError: if no linear matches, or for numbers that LoRA cannot have.
    """
    from peft import LoraConfig, LoraModel

    if not (rank >= 1 and math.isfinite(alpha) and alpha > 0 and 0 <= dropout < 1):
        raise InputError(
            f"LoRA with rank={rank}, alpha={alpha} and dropout={dropout} cannot be; the rank must be at least 1, "
            "alpha greater than 0, and dropout at least 0 and below 1."
        )
    names = language_model_linears(model) if target is None else target
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # PEFT sets it as it should be
        try:
            lora = LoraModel(model, {LORA_NAME: config}, LORA_NAME)
        except ValueError as error:
            raise InputError(str(error)) from error
    return lora


def language_model_linears(model: PheyeForConditionalGeneration) -> list[str]:
    """The full names of all linears in the layers of the language model."""
    inside = {id(module) for layer in model.pheye.decoder_layers() for module in layer.modules()}
    linears = (torch.nn.Linear, Conv1D)
    return [name for name, module in model.named_modules() if id(module) in inside and isinstance(module, linears)]


def choose_trained(
    model: PheyeForConditionalGeneration, train: list[str] | None = None, freeze: list[str] | None = None
) -> list[str]:
    """Let train the paper's parts and LoRA of the language model, also those that a pattern of `train` matches, and
    none that a pattern of `freeze` matches; what trains is held in float32. Patterns match anywhere in a full name.

    Returns:
        the names of what trains.

    Raises:
        InputError: for a pattern that is no regular expression or matches nothing, or if nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in (*(train or ()), *(freeze or ())):
        try:
            matches = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise InputError(f"The pattern {pattern!r} is no regular expression: {error}.") from error
        if not matches:
            raise InputError(f"The pattern {pattern!r} matches no parameter; a name looks like {names[-1]!r}.")
    wanted = [PAPER_PATTERN, LORA_PATTERN, *(train or ())]
    trained = []
    for name, parameter in model.named_parameters():
        is_trained = _any_matches(wanted, name) and not _any_matches(freeze or (), name)
        parameter.requires_grad_(is_trained)
        if is_trained:
            parameter.data = parameter.data.float()
            trained.append(name)
    if not trained:
        raise InputError(f"Nothing is left to train: freeze={freeze} matches all that would; name less.")
    return trained


def _any_matches(patterns, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def is_pretrained(name: str) -> bool:
    """Whether the parameter of this name comes with one of the pretrained models."""
    return bool(re.search(PRETRAINED_PATTERN, name)) and not re.search(LORA_PATTERN, name)


def set_rate_of_pretrained(optimizer: torch.optim.Optimizer, model: torch.nn.Module, rate: float):
    """Give what trains of the pretrained models this learning rate, in groups of their own behind the others.

    Raises:
        InputError: if nothing of them trains, or the optimizer holds it in another form.
    """
    named = model.named_parameters()
    pretrained = {id(parameter) for name, parameter in named if parameter.requires_grad and is_pretrained(name)}
    if not pretrained:
        raise InputError(
            f"--pretrained_learning_rate {rate} has no effect here: nothing of {', '.join(PRETRAINED_PARTS)} trains; "
            "give --train."
        )
    groups = list(optimizer.param_groups)
    held = {id(parameter) for group in groups for parameter in group["params"]}
    if not pretrained <= held:
        raise InputError(
            f"{type(optimizer).__name__} does not hold the parameters by themselves; leave --pretrained_learning_rate "
            f"{rate} out, or choose another --optim."
        )
    for group in groups:
        parts = {is_one: [p for p in group["params"] if (id(p) in pretrained) is is_one] for is_one in (False, True)}
        group["params"] = parts[False]
        if parts[True]:
            optimizer.add_param_group({**group, "params": parts[True], "lr": rate})


def describe_trained(model: PheyeForConditionalGeneration) -> str:
    """One line: how many parameters train, part by part, and how many do not."""
    counts, frozen = Counter(), 0
    for name, parameter in model.named_parameters():
        part = name.split(".")[1]
        if part == "language_model" and f".{LORA_NAME}." in name:
            part = "LoRA of the language model"
        if parameter.requires_grad:
            counts[part] += parameter.numel()
        else:
            frozen += parameter.numel()
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    return f"Trains {sum(counts.values()):,} parameters ({parts}); {frozen:,} are frozen."


def trained_state(model: PheyeForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Names and tensors of the parameters that train."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trained(state: dict[str, torch.Tensor], folder: str | os.PathLike, lora: "LoraConfig | None" = None):
    """Write `state`, which is that of `trained_state`, to `folder`, with the settings of the language model's LoRA."""
    metadata = {"format": "pt", "tensors": str(len(state))}
    if lora is not None:
        settings = {"rank": lora.r, "alpha": lora.lora_alpha, "dropout": lora.lora_dropout}
        if isinstance(lora.target_modules, str):  # and not the names of all linears
            settings["target"] = lora.target_modules
        metadata["language_model_lora"] = json.dumps(settings)
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(contiguous, Path(folder) / TRAINED_FILE, metadata=metadata)


def read_trained(folder: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict | None]:
    """The tensors in `folder`, and the settings of the language model's LoRA if it had one."""
    path = Path(folder) / TRAINED_FILE
    if not path.is_file():
        raise InputError(
            f"{folder} holds no {TRAINED_FILE}; give a folder written with --trained_only, or a checkpoint."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors has an exception of its own, which is no OSError
        raise InputError(f"{path} is not whole: {error}. Copy it again, or give another checkpoint.") from error
    if metadata.get("tensors") != str(len(state)):
        raise InputError(
            f"{path} holds {len(state)} tensors, but was written with {metadata.get('tensors', 'another number')}; "
            "copy it again, or give another checkpoint."
        )
    settings = metadata.get("language_model_lora")
    return state, json.loads(settings) if settings else None


def load_trained(model: PheyeForConditionalGeneration, folder: str | os.PathLike) -> PheyeForConditionalGeneration:
    """Put what was trained onto the model that the training began with; LoRA of its language model is merged into it.

    Args:
        model: the base model; its dtypes stay.
        folder: an output folder of `--trained_only`, or a checkpoint.

    Raises:
        InputError: if `folder` has no such file, or a tensor is not part of `model` or has another shape.
    """
    state, settings = read_trained(folder)
    tuner = add_language_model_lora(model, **settings) if settings else None
    try:
        copy_state(model, state)
    except InputError:
        if tuner is not None:
            tuner.unload()
        raise
    if tuner is not None:
        tuner.merge_and_unload()
    return model


@torch.no_grad()
def copy_state(model: PheyeForConditionalGeneration, state: dict[str, torch.Tensor]):
    """Copy tensors into the parameters of the same names, all or none."""
    parameters = dict(model.named_parameters())
    for name, tensor in state.items():
        shape = tuple(parameters[name].shape) if name in parameters else None
        if shape != tuple(tensor.shape):
            found = f"of shape {shape}" if shape else "missing"
            raise InputError(
                f"{name} was trained with shape {tuple(tensor.shape)}, but is {found} in this model; give the model "
                "that the training began with."
            )
    for name, tensor in state.items():
        parameters[name].copy_(tensor)


def check_names(found: Iterable[str], wanted: Iterable[str], folder: str | os.PathLike):
    """Refuse a checkpoint in `folder` that does not hold exactly what trains."""
    missing, others = sorted({*wanted} - {*found}), sorted({*found} - {*wanted})
    if missing or others:
        what = f"lacks {missing[0]}" if missing else f"holds {others[0]}, which does not train"
        raise InputError(f"{folder} {what}; give a checkpoint of a run that trained the same parts.")


def nonfinite(model: PheyeForConditionalGeneration) -> list[str]:
    """Names of the parameters that train and hold NaN or infinity."""
    return [name for name, tensor in trained_state(model).items() if not torch.isfinite(tensor).all()]
