"""Published checkpoint (`config.json` and a pickled `checkpoint.pt`) to a folder that transformers loads.

    python -m pheye.convert_checkpoint miguelcarv/Pheye-x4-448 pheye-x4-448

The pickle is mapped into memory and written shard by shard, without building the model, so that memory use stays far
below the size of the weights. OUTPUT appears under its name only when it is whole.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import sys
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

try:
    import pheye
except ModuleNotFoundError as error:
    if error.name != "pheye":
        raise
    sys.exit("The package pheye is not installed; run `pip install .` in the folder of this script first.")

import torch
from huggingface_hub import (
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    snapshot_download,
    split_torch_state_dict_into_shards,
)
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from pheye.configuration_pheye import VARIANTS, PheyeConfig
from pheye.image_processing_pheye import PheyeImageProcessor
from pheye.modeling_pheye import PheyeForConditionalGeneration
from pheye.processing_pheye import PheyeProcessor

# --- The mapping ---


class SameAs(NamedTuple):
    """A tensor of the source that another one must equal, bit for bit, to be dropped."""

    source: str


class Rule(NamedTuple):
    """What becomes of the source's tensors of one name.

    target: a name (renamed), several (split along the rows; None stands for rows that nothing uses), None (dropped), or
    `SameAs` (dropped once it is proved to be a copy). The fields in braces are those of `FIELDS`.
    """

    source: str
    target: "str | tuple[str | None, ...] | SameAs | None"
    why: str

    @property
    def action(self) -> str:
        if isinstance(self.target, str):
            return "renamed"
        return "dropped" if self.target is None or isinstance(self.target, SameAs) else "split"


FIELDS = {
    "path": r"(?P<path>.+)",  # of a module in the vision tower
    "flat": r"(?P<flat>\w+)",  # the same with underscores for dots
    "matrix": r"(?P<matrix>[AB])",  # of a LoRA
    "layer": r"(?P<layer>\d+)",  # of the language model
    "block": r"(?P<block>\d+)",  # counts the layers that have a cross-attention block before them
    "kind": r"(?P<kind>weight|bias)",
    "rest": r"(?P<rest>.+)",
}

VIT = "vision_encoder.vision_model.base_model.model."
LEVEL = "vision_encoder.norm_lvl_"
LM_LAYER = "lang_encoder.model.layers.{layer}.decoder_layer.{rest}"
OLD_BLOCK = "lang_encoder.model.layers.{layer}.cross_attn_layer."
BLOCK = "model.cross_attention_blocks.{block}."

# The first rule that fits a name decides.
RULES = (
    Rule(VIT + "{path}.lora_{matrix}.first.weight", "model.global_lora.{flat}.{matrix}", "LoRA of the global view"),
    Rule(VIT + "{path}.lora_{matrix}.second.weight", "model.local_lora.{flat}.{matrix}", "LoRA of the crops"),
    Rule(VIT + "{path}.base_layer.{kind}", "model.vision_tower.{path}.{kind}", "ViT, a weight that PEFT had wrapped"),
    Rule(VIT + "{path}", "model.vision_tower.{path}", "ViT, a weight without LoRA"),
    Rule(LEVEL + "1.{kind}", "model.view_encoding.global_norm.{kind}", "norm of the global tokens"),
    Rule(LEVEL + "2.{kind}", "model.view_encoding.local_norm.{kind}", "norm of the crops' tokens"),
    Rule(LEVEL + "3.{kind}", None, "norm of a third level that no model has"),
    Rule(
        "vision_encoder.connector.embedding.weight",
        ("model.view_encoding.view_embedding.weight", None),
        "view vectors; it has rows for more views than the model sees",
    ),
    Rule(OLD_BLOCK + "attn.norm.{kind}", BLOCK + "attention_norm.{kind}", "block: norm before the attention"),
    Rule(OLD_BLOCK + "attn.to_q.{kind}", BLOCK + "to_q.{kind}", "block: queries"),
    Rule(OLD_BLOCK + "attn.to_kv.{kind}", (BLOCK + "to_k.{kind}", BLOCK + "to_v.{kind}"), "block: keys over values"),
    Rule(OLD_BLOCK + "attn.to_out.{kind}", BLOCK + "to_out.{kind}", "block: output of the attention"),
    Rule(OLD_BLOCK + "ff.norm.{kind}", BLOCK + "mlp_norm.{kind}", "block: norm before the MLP"),
    Rule(OLD_BLOCK + "ff.fc1.{kind}", BLOCK + "mlp_in.{kind}", "block: MLP, first half"),
    Rule(OLD_BLOCK + "ff.fc2.{kind}", BLOCK + "mlp_out.{kind}", "block: MLP, second half"),
    Rule(LM_LAYER, "model.language_model.model.layers.{layer}.{rest}", "a layer of the language model"),
    Rule("lang_encoder.old_decoder_blocks.{layer}.{rest}", SameAs(LM_LAYER), "language model layers, once more"),
    Rule("lang_encoder.cross_attn_layers.{layer}.{rest}", SameAs(OLD_BLOCK + "{rest}"), "blocks, once more"),
    Rule("lang_encoder.{rest}", "model.language_model.{rest}", "embeddings, last norm and head"),
)


def template_regex(template: str) -> re.Pattern:
    """A rule's name with its fields as named groups."""
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(FIELDS[part] if index % 2 else re.escape(part) for index, part in enumerate(parts)))


SOURCE_REGEXES = tuple(template_regex(rule.source) for rule in RULES)


class Names:
    """Names of the source's tensors to names of the target's by `RULES`, and back."""

    def __init__(self, target_names, config: PheyeConfig):
        self.layers = config.cross_attention_layers
        self.paths = {}  # flat name of a ViT module: its path
        for name in target_names:
            if match := template_regex("model.vision_tower.{path}.{kind}").fullmatch(name):
                self.paths[match["path"].replace(".", "_")] = match["path"]
        self.adapted = {
            self.paths[match["flat"]]
            for name in target_names
            if (match := template_regex("model.local_lora.{flat}.A").fullmatch(name))
        }

    def find_rule(self, source: str) -> "tuple[Rule, dict] | None":
        """The rule for a name of the source, and what its fields are."""
        # Older transformers keep CLIP's vision transformer one module deeper.
        source = source.replace(VIT + "vision_model.", VIT, 1)
        for rule, regex in zip(RULES, SOURCE_REGEXES, strict=True):
            if match := regex.fullmatch(source):
                fields = match.groupdict()
                if "path" in fields:
                    fields["flat"] = fields["path"].replace(".", "_")
                if "layer" in fields:
                    layer = int(fields["layer"])
                    fields["block"] = self.layers.index(layer) if layer in self.layers else f"(before layer {layer})"
                return rule, fields
        return None

    def source_of(self, target: str) -> str:
        """The name in the source of what fills `target`."""
        for rule in RULES:
            templates = rule.target if rule.action == "split" else (rule.target,) if rule.action == "renamed" else ()
            for template in templates:
                match = template and template_regex(template).fullmatch(target)
                if not match:
                    continue
                fields = match.groupdict()
                if "flat" in fields:
                    fields["path"] = self.paths[fields["flat"]]
                if "block" in fields:
                    fields["layer"] = self.layers[int(fields["block"])]
                if ".base_layer." not in rule.source or fields["path"] in self.adapted:
                    return rule.source.format(**fields)
        raise AssertionError(f"no rule fills {target}")


class Piece(NamedTuple):
    """Where a tensor of the target comes from: these rows of a tensor of the source, or all of it (None)."""

    source: str
    rows: "slice | None"
    shape: tuple[int, ...]


@dataclass
class Plan:
    """What fills each tensor of the target, and how many tensors of the source each rule took."""

    pieces: dict[str, Piece]
    counts: Counter


class ConversionError(ValueError):
    """The source, or what was asked, cannot be converted; the message says what is wrong and what to do."""


def target_shapes(config: PheyeConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model, without its memory."""
    with torch.device("meta"):
        model = PheyeForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def plan_conversion(tensors: dict[str, torch.Tensor], config: PheyeConfig) -> Plan:
    """Apply `RULES`: every tensor of the source is used or dropped, every tensor of the target is filled exactly once.

    Raises:
        ConversionError: with one line for each missing, extra or misshapen tensor, and each false copy.
    """
    shapes = target_shapes(config)
    names = Names(shapes, config)
    plan, problems = Plan({}, Counter()), []
    for source, tensor in tensors.items():
        found = names.find_rule(source)
        if found is None:
            problems.append(f"extra: {source}, which no rule knows")
            continue
        rule, fields = found
        plan.counts[rule] += 1
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in SAFETENSORS_DTYPES:
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            problems.append(f"wrong: {source} is of type {kind}, not a floating-point tensor")
        elif isinstance(rule.target, SameAs):
            problems += check_copy(tensors, source, rule.target.source.format(**fields))
        elif rule.target is not None:
            targets = (rule.target,) if isinstance(rule.target, str) else rule.target
            targets = [target and target.format(**fields) for target in targets]
            problems += assign(plan.pieces, source, tuple(tensor.shape), targets, shapes)
    # What a wrong tensor was meant for is not missing too.
    blamed = " ".join(problems)
    for target in shapes.keys() - plan.pieces.keys():
        source = names.source_of(target)
        if f": {source} " not in blamed:
            problems.append(f"missing: {source} (for {target})")
    if problems:
        listing = "\n  ".join(sorted(problems))
        raise ConversionError(
            f"The checkpoint does not hold what its config.json describes; {len(problems)} of its tensors are wrong "
            f"(check the encoder and decoder, and that the file is whole):\n  {listing}"
        )
    return plan


def assign(
    pieces: dict[str, Piece], source: str, shape: tuple[int, ...], targets: "list[str | None]", shapes: dict
) -> list[str]:
    """Give `source` to its target, or its rows to its targets one after another; returns what is wrong with that."""
    unknown = [target for target in targets if target is not None and target not in shapes]
    if unknown:
        return [f"extra: {source} has no place in the model ({', '.join(unknown)})"]
    if taken := [target for target in targets if target in pieces]:
        return [f"extra: {source} would fill {taken[0]}, which {pieces[taken[0]].source} fills already"]
    if len(targets) == 1:
        if shape != shapes[targets[0]]:
            return [f"misshapen: {source} is {shape} where {targets[0]} is {shapes[targets[0]]}"]
        pieces[targets[0]] = Piece(source, None, shape)
        return []
    wanted = [shapes[target] for target in targets if target is not None]
    rows = sum(part[0] for part in wanted)
    rows_fit = bool(shape) and (shape[0] >= rows if None in targets else shape[0] == rows)
    if not rows_fit or shape[1:] != wanted[0][1:]:
        at_least = "at least " if None in targets else ""
        return [f"misshapen: {source} is {shape} where {at_least}{(rows, *wanted[0][1:])} is needed"]
    start = 0
    for target, part in zip(targets, wanted, strict=False):
        pieces[target] = Piece(source, slice(start, start + part[0]), part)
        start += part[0]
    return []


def check_copy(tensors: dict[str, torch.Tensor], copy: str, original: str) -> list[str]:
    """What speaks against dropping `copy` as a copy of `original`."""
    if original not in tensors:
        return [f"extra: {copy} is not a copy, because there is no {original}"]
    a, b = tensors[copy], tensors[original]
    if isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape):
        if (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride()) or torch.equal(as_bytes(a), as_bytes(b)):
            return []
    return [f"wrong: {copy} differs from {original}, whose copy it should be"]


# --- Reading ---


class Source(NamedTuple):
    folder: Path
    settings: dict  # the published config.json
    name: str  # Hub id, or the folder's own name
    revision: "str | None"  # commit on the Hub


SETTINGS = ("encoder", "tokenizer", "decoder", "first_level", "level", "cross_interval", "from_layer", "reduce")
TILES_PER_SIDE = {2: 2, 3: 3}  # by level
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


def find_source(source: str, options: dict[str, "str | None"]) -> Source:
    """A local folder, or what is needed of a Hub repo."""
    folder, revision, name = Path(source), None, source
    if folder.is_dir():
        name = folder.resolve().name
    else:
        folder = download(source, ["config.json"], "SOURCE")
        revision = folder.name  # the cache names a snapshot by its commit
    settings = read_settings(folder / "config.json", options)
    if revision is not None:
        inside = [
            f"{settings[part]}/{file}"
            for part in ("encoder", "decoder", "tokenizer")
            if not options.get(part)
            for file in (*CONFIG_FILES, *TOKENIZER_FILES)
        ]
        folder = download(source, ["config.json", "checkpoint.pt", *inside], "SOURCE", revision)
    if not (folder / "checkpoint.pt").is_file():
        raise ConversionError(f"{source} has no checkpoint.pt; give a published Pheye repo, or a folder like one.")
    return Source(folder, settings, name, revision)


def read_settings(path: Path, options: dict[str, "str | None"]) -> dict:
    """The published config.json, checked for what the conversion needs."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} could not be read as JSON: {error}.") from error
    missing = [name for name in SETTINGS if not isinstance(settings, dict) or name not in settings]
    missing = [name for name in missing if not options.get(name)]
    if missing:
        raise ConversionError(f"{path} lacks {', '.join(missing)}; it is not the config.json of a published Pheye.")
    level = settings["level"]
    if isinstance(level, bool) or level not in TILES_PER_SIDE:
        reason = "exists in the published code as a number only and cannot run there" if level in (1, 4) else "is unknown"
        raise ConversionError(
            f"{path} has level {level!r}, which {reason}, so there is no model to reproduce; levels 2 (2 x 2 crops) and "
            "3 (3 x 3 crops) can be converted."
        )
    return settings


def download(repo: str, files: list[str], what: str, revision: "str | None" = None) -> Path:
    """The folder in the cache with those `files` of a Hub repo that exist."""
    try:
        return Path(snapshot_download(repo, allow_patterns=files, revision=revision))
    except (OSError, ValueError) as error:  # requests, missing repos and malformed names
        raise ConversionError(
            f"{what} {repo!r} is neither a folder nor a Hub repo that can be read ({error})."
        ) from error


def find_part(source: Source, part: str, option: "str | None", files: tuple[str, ...]) -> tuple[Path, "str | None"]:
    """Folder of the `part` ("encoder", ...), fetched if need be, and its Hub id where it has one.

    The name in config.json is taken as a folder beside it first, `option` as any folder.
    """
    if option:
        folder, name = Path(option), option
    else:
        name = source.settings[part]
        folder = source.folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:  # a repo names no folder outside itself
            folder = None
    if folder is not None and folder.is_dir():
        # A folder given for a published name is that name's.
        published = source.settings.get(part) if option else None
        return folder, published if published and published.count("/") == 1 else None
    return download(name, list(files), f"--{part}" if option else part), name


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled state dict, mapped into memory. Nothing in the file can run."""
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} holds something other than tensors, which could run code when loaded, and is refused; nothing of it "
            f"was run. ({str(error).splitlines()[0]})"
        ) from error
    except RuntimeError as error:
        raise ConversionError(
            f"{path} is not a whole checkpoint of torch's zip format: {str(error).splitlines()[0]}. Download it again; if "
            "it was saved by torch before 1.6, load it with weights_only=True and save it anew."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ConversionError(f"{path} holds no dict of named tensors, but a {type(tensors).__name__}.")
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in tensors.items()}


def make_config(settings: dict, encoder: Path, decoder: Path, tensors: dict[str, torch.Tensor]) -> PheyeConfig:
    """The configuration; LoRA ranks come from the tensors, since config.json does not tell them."""
    ranks = {}
    for name, tensor in tensors.items():
        if (match := re.search(r"\.lora_A\.(first|second)\.weight$", name)) and isinstance(tensor, torch.Tensor):
            ranks.setdefault(match[1], tensor.shape[0])
    # Where a set is missing, the published rank, so that the names of what is missing can be told.
    global_rank = ranks.get("first", 8) if settings["first_level"] else 0
    local_rank = ranks.get("second", 16)
    try:
        return PheyeConfig(
            vision_config=AutoConfig.from_pretrained(encoder, trust_remote_code=False),
            text_config=AutoConfig.from_pretrained(decoder, trust_remote_code=False),
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
    except (OSError, ValueError) as error:
        raise ConversionError(f"The configs of encoder, decoder and checkpoint make no model: {error}") from error


# --- Writing ---

SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
CHUNK = 1 << 24  # elements written at a time; bounds the memory that a change of dtype takes


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor as one row of bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def write_weights(folder: Path, checkpoint: Path, plan: Plan, dtype: "torch.dtype | None", max_shard_size: str):
    """Write the tensors of `plan` as safetensors shards with their index; `dtype` None keeps each tensor's own."""
    tensors = read_checkpoint(checkpoint)
    layout = {
        name: torch.empty(piece.shape, dtype=dtype or tensors[piece.source].dtype, device="meta")
        for name, piece in plan.pieces.items()
    }
    shards = list(
        split_torch_state_dict_into_shards(layout, max_shard_size=max_shard_size).filename_to_tensors.values()
    )
    total = sum(tensor.nbytes for tensor in layout.values())
    if (free := shutil.disk_usage(folder).free) < total:
        raise ConversionError(f"The weights take {total} bytes, but the disk of OUTPUT has {free} left; make room.")
    weight_map = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing weights") as progress:
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map.update(dict.fromkeys(names, file))
            # Mapped anew for each shard, so that the pages which the last one read are let go.
            tensors = None
            tensors = read_checkpoint(checkpoint)
            write_shard(folder / file, {name: layout[name] for name in names}, plan, tensors, progress)
    index = {
        "metadata": {"total_parameters": sum(tensor.numel() for tensor in layout.values()), "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_shard(
    path: Path, layout: dict[str, torch.Tensor], plan: Plan, tensors: dict[str, torch.Tensor], progress: tqdm
):
    """One safetensors file: length of the header, header, tensors. (The library's own writer wants it all in memory.)"""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in layout.items():
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with open(path, "wb", buffering=0) as file:
        write_all(file, len(text).to_bytes(8, "little") + text)
        for name, tensor in layout.items():
            piece = plan.pieces[name]
            values = tensors[piece.source] if piece.rows is None else tensors[piece.source][piece.rows]
            values = values.contiguous().reshape(-1)
            for start in range(0, values.numel(), CHUNK):
                chunk = cast(values[start : start + CHUNK], tensor.dtype, piece.source)
                write_all(file, chunk.view(torch.uint8).numpy())
                progress.update(chunk.nbytes)


def write_all(file, data):
    """Write all of `data`; an unbuffered file may take less at once."""
    data = memoryview(data)
    while data:
        data = data[file.write(data) :]


def cast(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    if values.dtype == dtype:
        return values
    result = values.to(dtype)
    if not torch.equal(result.isfinite(), values.isfinite()):
        raise ConversionError(f"{name} holds values beyond the range of {dtype}; choose another --dtype.")
    return result


def write_processor(folder: Path, config: PheyeConfig, encoder: Path, tokenizer: Path) -> PheyeProcessor:
    """Tokenizer, chat template and image processor, with the encoder's own mean and std where it tells them."""
    size = config.vision_config.image_size
    options = {"tiles_per_side": config.tiles_per_side, "size": {"height": size, "width": size}}
    preprocessor = encoder / "preprocessor_config.json"
    if preprocessor.is_file():
        published = json.loads(preprocessor.read_text(encoding="utf-8"))
        options |= {name: published[name] for name in ("image_mean", "image_std") if name in published}
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{tokenizer} holds no tokenizer that can be loaded: {error}") from error
    processor = PheyeProcessor(PheyeImageProcessor(**options), tokenizer)
    processor.save_pretrained(folder)
    return processor


def write_configs(folder: Path, config: PheyeConfig, dtype: torch.dtype, tokenizer):
    """Configuration, generation configuration and the code that they name."""
    for part in (config, config.vision_config, config.text_config):
        part.dtype = dtype
    config.save_pretrained(folder)
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else config.text_config.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.text_config.bos_token_id
    GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad).save_pretrained(folder)
    for file in Path(pheye.__file__).parent.glob("*_pheye.py"):
        shutil.copyfile(file, folder / file.name)


# --- The model card ---

# Table 1 of the paper.
SCORES = ("VQAv2 test-dev accuracy", "NoCaps val CIDEr", "TextVQA val accuracy", "TextCaps test CIDEr")
PUBLISHED_SCORES = {
    "x4-448": (75.2, 110.1, 45.9, 106.4),
    "x4-672": (75.5, 110.8, 49.2, 111.9),
    "x2-448": (76.0, 111.8, 47.3, 108.9),
    "x2-672": (76.4, 110.5, 50.5, 115.9),
}
PAPER = "https://arxiv.org/abs/2501.02584"
PUBLISHED_SIZES = (2048, 24, 1280, 32)  # width and layers of language model and ViT

CARD = """\
---
{card_data}
---

# {title}

[Pheye]({paper}): a frozen language model that reads an image through dense cross-attention blocks, at
{pixels} x {pixels} pixels: one global view and {tiles} x {tiles} crops. Converted from {source}.

```python
from transformers import pipeline

pheye = pipeline("image-to-text", model="{model}", trust_remote_code=True)
print(pheye("picture.jpg", prompt="What is written on the sign?"))
```

`AutoModelForImageTextToText.from_pretrained("{model}", trust_remote_code=True)` and
`AutoProcessor.from_pretrained("{model}", trust_remote_code=True)` give model and processor. Pin `revision=` to a commit: it
holds for the code as for the weights.

## Published scores

{scores}

## How it was made

`pheye.convert_checkpoint` (pheye {version}) renamed and split the tensors of the published checkpoint; their values
{values}.

| | |
| --- | --- |
| source | {source} |
| source revision | {revision} |
| sha256 of `checkpoint.pt` | `{sha256}` |
| vision encoder (configuration) | {encoder} |
| language model (configuration, tokenizer) | {decoder} |
| parameters | {parameters:,} |

## Dtypes

{dtypes}

## Licence

The source states no licence for its weights, and neither does this copy: ask its authors before you use it for more than
the law grants you anyway. The code files come from the package pheye and are under Apache-2.0.
"""


def find_variant(config: PheyeConfig) -> "str | None":
    for variant, numbers in VARIANTS.items():
        if all(getattr(config, name) == value for name, value in numbers.items()):
            return variant
    return None


def describe_scores(config: PheyeConfig, variant: "str | None") -> str:
    if variant is None:
        return "The paper reports no model with these numbers."
    rows = "| model | " + " | ".join(SCORES) + " |\n| --- " * 1 + "| --- " * len(SCORES) + "|\n"
    rows += f"| Pheye-{variant} | " + " | ".join(map(str, PUBLISHED_SCORES[variant])) + " |\n"
    text, vision = config.text_config, config.vision_config
    sizes = (text.hidden_size, text.num_hidden_layers, vision.hidden_size, vision.num_hidden_layers)
    note = "They were not measured again after the conversion."
    if sizes != PUBLISHED_SIZES:
        note = "This model has other sizes than the published one, so they are not its own."
    return f"The paper reports, for the published model:\n\n{rows}\n{note}"


def describe_dtypes(plan: Plan, tensors: dict, stored: "torch.dtype | None", dtype: torch.dtype) -> str:
    """What is stored in which dtype, and what loading makes of it."""
    counts = Counter()
    for piece in plan.pieces.values():
        counts[str(stored or tensors[piece.source].dtype).removeprefix("torch.")] += math.prod(piece.shape)
    held = ", ".join(f"{count:,} parameters in {name}" for name, count in counts.most_common())
    name = str(dtype).removeprefix("torch.")
    kept = "Every tensor is stored as in the source" if stored is None else f"All tensors were cast to {name}"
    return (
        f"{kept}: {held}. `config.dtype` is that of the language model's weights, {name}, so a plain load casts all of it "
        f"to {name} and takes {sum(counts.values()) * dtype.itemsize / 1e9:.1f} GB; `dtype=torch.float32` gets every stored "
        "bit back."
    )


def card_data(source: Source, parts: "list[str | None]", variant: "str | None", title: str) -> ModelCardData:
    results = None
    if variant is not None and source.name == f"miguelcarv/Pheye-{variant}":
        results = [
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=score.split()[0].lower(),
                dataset_name=score.split()[0],
                dataset_split=score.split()[1],
                metric_type=score.split()[2].lower(),
                metric_value=value,
                source_name="Efficient Architectures for High Resolution Vision-Language Models",
                source_url=PAPER,
            )
            for score, value in zip(SCORES, PUBLISHED_SCORES[variant], strict=True)
        ]
    return ModelCardData(
        language="en",
        license="other",
        license_name="none-stated-by-the-source",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=list(dict.fromkeys(part for part in parts if part)) or None,
        tags=["pheye", "vision-language-model", "image-to-text", "visual-question-answering", "custom_code"],
        model_name=title if results else None,
        eval_results=results,
    )


def write_card(folder: Path, model: str, source: Source, parts: dict, config: PheyeConfig, sha256: str, dtypes: str,
               plan: Plan, kept: bool):  # fmt: skip
    """README.md; `parts` are the Hub ids of encoder and decoder."""
    variant = find_variant(config)
    title = model.split("/")[-1]
    named = f"[{source.name}](https://huggingface.co/{source.name})" if source.revision else f"the folder `{source.name}`"
    card = ModelCard.from_template(
        card_data(source, list(parts.values()), variant, title),
        template_str=CARD.replace("{{", "{").replace("}}", "}"),
    )
    del card, named, kept, dtypes, plan, sha256
