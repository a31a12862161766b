"""A published checkpoint: its files, settings, tensors, and the configs that they go with."""

import math
import os
import pickle
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from huggingface_hub import snapshot_download

from ..common.command import InputError
from ..common.json_lines import parse_json
from .errors import one_line, refusing
from .rules import MODEL, TILES_PER_SIDE, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..configuration_pheye import PheyeConfig

PARTS = ("encoder", "decoder", "tokenizer")  # named in the published config.json
SETTINGS = (*PARTS, "first_level", "level", "cross_interval", "from_layer", "reduce")
MOST_LAYERS = 1000  # of an encoder or decoder, unless the checkpoint has as many tensors
CONFIG_FILES = ("config.json", "preprocessor_config.json")
TOKENIZER_FILES = (
    "config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
)


class Checkpoint(NamedTuple):
    """A published repo, or a folder like one."""

    folder: Path
    settings: dict  # the published config.json
    name: str  # Hub id, or the folder's own name
    revision: str | None  # commit on the Hub

    @property
    def weights(self) -> Path:
        return self.folder / "checkpoint.pt"


def find_checkpoint(source: str, replacements: dict[str, str]) -> Checkpoint:
    """A local folder, or what is needed of a Hub repo.

    replacements: folder or Hub id by part, in place of those that config.json names.
    """
    folder, revision, name = Path(source), None, source
    if os.path.isdir(source):
        name = folder.resolve().name
    else:
        folder = download(source, ["config.json"], "SOURCE")
        revision = folder.name  # the cache names a snapshot by its commit
    settings = read_settings(folder / "config.json", replacements)
    if revision is not None:
        inside = [
            f"{settings[part]}/{file}"
            for part in PARTS
            if part not in replacements
            for file in (*CONFIG_FILES, *TOKENIZER_FILES)
        ]
        folder = download(source, ["config.json", "checkpoint.pt", *inside], "SOURCE", revision)
    checkpoint = Checkpoint(folder, settings, name, revision)
    if not checkpoint.weights.is_file():
        raise InputError(f"{source} has no checkpoint.pt; give a published Pheye repo, or a folder like one.")
    return checkpoint


def read_json(path: Path, remedy: str) -> dict:
    """The object in a JSON file of the source."""
    with refusing(f"{path} could not be read as JSON", remedy):
        if not path.is_file():  # nothing that would wait, as a pipe does
            raise FileNotFoundError("there is no such file")
        content = parse_json(path.read_bytes().decode("utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
    return content


def read_settings(path: Path, replacements: dict[str, str]) -> dict:
    """The published config.json, checked for what the conversion needs."""
    settings = read_json(path, "Give the folder or Hub id of a published Pheye.")
    missing = [name for name in SETTINGS if name not in settings and name not in replacements]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; it is not the config.json of a published Pheye.")

    def shown(name: str) -> str:
        return f"{path} has {name} {one_line(repr(settings[name]))}"

    for part in PARTS:
        if part not in replacements and not isinstance(settings[part], str):
            raise InputError(f"{shown(part)}, which is no name; give --{part}.")
    for name, least in (("cross_interval", 1), ("from_layer", 0), ("reduce", 1)):
        if type(settings[name]) is not int or settings[name] < least:
            raise InputError(f"{shown(name)}, which is no integer of at least {least}.")
    if not isinstance(settings["first_level"], bool):
        raise InputError(f"{shown('first_level')}, which is neither true nor false.")
    level = settings["level"]
    if type(level) is not int or level not in TILES_PER_SIDE:
        reason = (
            "exists in the published code as a number only and cannot run there" if level in (1, 4) else "is unknown"
        )
        raise InputError(
            f"{shown('level')}, which {reason}, so there is no model to reproduce; levels 2 (2 x 2 crops) "
            "and 3 (3 x 3 crops) can be converted."
        )
    return settings


def download(repo: str, files: list[str], what: str, revision: str | None = None) -> Path:
    """The folder in the cache with those `files` of a Hub repo that exist."""
    words = f"{what} {one_line(repr(repo))} is neither a folder nor a Hub repo that can be read"
    with refusing(words, "Check the name and the network."):
        return Path(snapshot_download(repo, allow_patterns=files, revision=revision))


def find_part(
    checkpoint: Checkpoint, part: str, replacement: str | None, files: tuple[str, ...]
) -> tuple[Path, str | None]:
    """Folder of the `part` ("encoder", ...), fetched if need be, and its Hub id where it has one.

    The name in config.json is taken as a folder beside it first, `replacement` as any folder.
    """
    if replacement:
        folder, name = Path(replacement), replacement
    else:
        name = checkpoint.settings[part]
        folder = checkpoint.folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:  # a repo names no folder outside itself
            folder = None
    if folder is not None and os.path.isdir(folder):
        # A folder given for a published name is that name's.
        published = checkpoint.settings.get(part) if replacement else None
        return folder, published if re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(published)) else None
    return download(name, list(files), f"--{part}" if replacement else part), name


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled state dict, mapped into memory. Nothing in the file can run."""
    remedy = "Download it again."
    with refusing(f"{path} is no whole checkpoint in torch's zip format", remedy):
        try:
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise InputError(
                f"{path} holds something other than tensors, which could run code when loaded, and is refused; "
                "nothing of it was run. Give the file of a published Pheye."
            ) from error
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise InputError(f"{path} holds no dict of named tensors, but a {type(tensors).__name__}.")
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in tensors.items()}


def read_config(folder: Path, part: str, tensors: dict[str, torch.Tensor]) -> "PreTrainedConfig":
    """The configuration of encoder or decoder.

    tensors: of the checkpoint, which bound the number of layers.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    remedy = f"Download it again, or give --{part} with the folder or Hub id of the {part}."
    if not isinstance(read_json(path, remedy).get("model_type"), str):  # transformers would guess it from the path
        raise InputError(f"{path} names no model_type. {remedy}")
    with refusing(f"{path} describes no {part}", remedy):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        layers = getattr(getattr(config, "vision_config", config), "num_hidden_layers", 0)
        if layers > max(MOST_LAYERS, len(tensors)):  # making so many would take for ever
            raise ValueError(f"it has {layers:,} layers, and the checkpoint only {len(tensors):,} tensors")
    return config


def make_config(settings: dict, encoder: Path, decoder: Path, tensors: dict[str, torch.Tensor]) -> "PheyeConfig":
    """The configuration; LoRA ranks come from the tensors, since config.json does not tell them."""
    from ..configuration_pheye import PheyeConfig

    vision_config, text_config = read_config(encoder, "encoder", tensors), read_config(decoder, "decoder", tensors)
    ranks = {}
    for name, tensor in tensors.items():
        match = re.search(r"\.lora_A\.(first|second)\.weight$", name)
        if match and isinstance(tensor, torch.Tensor) and tensor.ndim:
            ranks.setdefault(match[1], tensor.shape[0])
    # Where a set is missing, the published rank, so that the names of what is missing can be told.
    global_rank = ranks.get("first", 8) if settings["first_level"] else 0
    local_rank = ranks.get("second", 16)
    return PheyeConfig(
        vision_config=vision_config,
        text_config=text_config,
        tiles_per_side=TILES_PER_SIDE[settings["level"]],
        cross_attention_interval=settings["cross_interval"],
        cross_attention_start_layer=settings["from_layer"],
        cross_attention_reduction=settings["reduce"],
        global_lora_rank=global_rank,
        global_lora_alpha=2.0 * global_rank,
        local_lora_rank=local_rank,
        local_lora_alpha=2.0 * local_rank,
        architectures=["PheyeForConditionalGeneration"],
    )


@dataclass
class Conversion:
    """What is known about one run."""

    checkpoint: Checkpoint
    dtype: torch.dtype | None  # of all tensors; None keeps those of the source
    plan: Plan
    config: "PheyeConfig"
    folders: dict[str, Path]  # of the encoder's and decoder's configs and of the tokenizer
    hub_ids: dict[str, str | None]  # of the same, where they have one


def make_conversion(
    checkpoint: Checkpoint, tensors: dict, plan: Plan, replacements: dict[str, str], dtype: torch.dtype | None
) -> Conversion:
    """Find the configs, and hold the plan against the model that they describe."""
    folders, hub_ids = {}, {}
    files = {"encoder": CONFIG_FILES, "decoder": CONFIG_FILES, "tokenizer": TOKENIZER_FILES}
    for part, names in files.items():
        folders[part], hub_ids[part] = find_part(checkpoint, part, replacements.get(part), names)
    with refusing("The configs of encoder, decoder and checkpoint make no model", "Check that they belong together."):
        config = make_config(checkpoint.settings, folders["encoder"], folders["decoder"], tensors)
        plan.check(config)
    language_model = Counter()
    for name, piece in plan.pieces.items():
        if name.startswith(MODEL + "language_model."):
            language_model[dtype or piece.dtype] += math.prod(piece.shape)
    for part in (config, config.vision_config, config.text_config):
        part.dtype = language_model.most_common(1)[0][0]
        part.name_or_path = ""  # a folder of this machine
    return Conversion(checkpoint, dtype, plan, config, folders, hub_ids)
