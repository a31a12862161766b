"""What of a Pheye trains, and its weights by themselves."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..common.command import InputError
from ..modeling_pheye import PheyeForConditionalGeneration

if TYPE_CHECKING:
    from peft import LoraConfig, LoraModel

# The paper's choice (spec section 8): all that stands between the two pretrained models.
PAPER_PATTERN = r"pheye\.(cross_attention_blocks|global_lora|local_lora|view_encoding)\."

# The published code's choice for further fine-tuning: all linears of the language model's layers, and only there.
LANGUAGE_MODEL_LORA = r"pheye\.language_model\..*\.(q_proj|k_proj|v_proj|dense|fc1|fc2)"
LORA_NAME = "default"

TRAINED_FILE = "trained.safetensors"


def add_language_model_lora(
    model: PheyeForConditionalGeneration,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.05,
    target: str = LANGUAGE_MODEL_LORA,
) -> "LoraModel":
    """Put PEFT's LoRA on the linears of the language model whose full names match `target`; `model` stays what it is.

    `merge_and_unload()` of what is returned adds the updates to the weights and takes LoRA away again.

    Raises:
        InputError: if no linear matches.
    """  # fmt: skip
    from peft import LoraConfig, LoraModel

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target)
    try:
        return LoraModel(model, {LORA_NAME: config}, LORA_NAME)
    except ValueError as error:
        raise InputError(str(error)) from error


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
    wanted = [PAPER_PATTERN, rf"\.lora_[AB]\.{LORA_NAME}\.", *(train or ())]
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
    metadata = {"format": "pt"}
    if lora is not None:
        settings = {
            "rank": lora.r,
            "alpha": lora.lora_alpha,
            "dropout": lora.lora_dropout,
            "target": lora.target_modules,
        }
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
    with safe_open(path, "pt") as file:
        settings = (file.metadata() or {}).get("language_model_lora")
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return state, json.loads(settings) if settings else None


def load_trained(model: PheyeForConditionalGeneration, folder: str | os.PathLike) -> PheyeForConditionalGeneration:
    """Put what was trained onto the model that the training began with; LoRA of its language model is merged into it.

    Args:
        model: the base model; its dtypes stay.
        folder: an output folder of `--trained_only`, or a checkpoint.

    Raises:
        InputError: if a tensor is not part of `model` or has another shape.
    """
    state, settings = read_trained(folder)
    tuner = add_language_model_lora(model, **settings) if settings else None
    copy_state(model, state)
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


def nonfinite(model: PheyeForConditionalGeneration) -> list[str]:
    """Names of the parameters that train and hold NaN or infinity."""
    return [name for name, tensor in trained_state(model).items() if not torch.isfinite(tensor).all()]
