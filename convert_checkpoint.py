"""Published checkpoint (`config.json` and a pickled `checkpoint.pt`) to a folder that transformers loads.

    python -m pheye.convert_checkpoint miguelcarv/Pheye-x4-448 pheye-x4-448

The pickle is mapped into memory and written shard by shard, without building the model, so that memory use stays far
below the size of the weights. OUTPUT appears under its name only when it is whole.

transformers takes longer to import than torch, so it is imported inside the functions that need it: by then the
checkpoint is being hashed and written in threads of their own. What it then finds wrong takes the written part away.
"""

import argparse
import contextlib
import hashlib
import json
import math
import mmap
import os
import pickle
import re
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
)
from tqdm import tqdm

from pheye.reference import Reference, draw_test_picture

if TYPE_CHECKING:
    from pheye.configuration_pheye import PheyeConfig
    from pheye.processing_pheye import PheyeProcessor

# --- The mapping ---


class SameAs(NamedTuple):
    """A tensor of the source that another one must equal, bit for bit, to be dropped."""

    source: str


class Rule(NamedTuple):
    """What becomes of the source's tensors of one name.

    target: a name (renamed), several (split along the rows; None stands for rows that nothing uses), None (dropped),
    or `SameAs` (dropped once it is proved to be a copy). The fields in braces are those of `FIELDS`.
    """

    source: str
    target: str | tuple[str | None, ...] | SameAs | None
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
MODEL = "pheye."
BLOCK = MODEL + "cross_attention_blocks.{block}."

# The first rule that fits a name decides.
RULES = (
    Rule(VIT + "{path}.lora_{matrix}.first.weight", MODEL + "global_lora.{flat}.{matrix}", "LoRA of the global view"),
    Rule(VIT + "{path}.lora_{matrix}.second.weight", MODEL + "local_lora.{flat}.{matrix}", "LoRA of the crops"),
    Rule(
        VIT + "{path}.base_layer.{kind}", MODEL + "vision_tower.{path}.{kind}", "ViT, a weight that PEFT had wrapped"
    ),
    Rule(VIT + "{path}", MODEL + "vision_tower.{path}", "ViT, a weight without LoRA"),
    Rule(LEVEL + "1.{kind}", MODEL + "view_encoding.global_norm.{kind}", "norm of the global tokens"),
    Rule(LEVEL + "2.{kind}", MODEL + "view_encoding.local_norm.{kind}", "norm of the crops' tokens"),
    Rule(LEVEL + "3.{kind}", None, "norm of a third level that no model has"),
    Rule(
        "vision_encoder.connector.embedding.weight",
        (MODEL + "view_encoding.view_embedding.weight", None),
        "view vectors; it has rows for more views than the model sees",
    ),
    Rule(OLD_BLOCK + "attn.norm.{kind}", BLOCK + "attention_norm.{kind}", "block: norm before the attention"),
    Rule(OLD_BLOCK + "attn.to_q.{kind}", BLOCK + "to_q.{kind}", "block: queries"),
    Rule(OLD_BLOCK + "attn.to_kv.{kind}", (BLOCK + "to_k.{kind}", BLOCK + "to_v.{kind}"), "block: keys over values"),
    Rule(OLD_BLOCK + "attn.to_out.{kind}", BLOCK + "to_out.{kind}", "block: output of the attention"),
    Rule(OLD_BLOCK + "ff.norm.{kind}", BLOCK + "mlp_norm.{kind}", "block: norm before the MLP"),
    Rule(OLD_BLOCK + "ff.fc1.{kind}", BLOCK + "mlp_in.{kind}", "block: MLP, first half"),
    Rule(OLD_BLOCK + "ff.fc2.{kind}", BLOCK + "mlp_out.{kind}", "block: MLP, second half"),
    Rule(LM_LAYER, MODEL + "language_model.model.layers.{layer}.{rest}", "a layer of the language model"),
    Rule("lang_encoder.old_decoder_blocks.{layer}.{rest}", SameAs(LM_LAYER), "language model layers, once more"),
    Rule("lang_encoder.cross_attn_layers.{layer}.{rest}", SameAs(OLD_BLOCK + "{rest}"), "blocks, once more"),
    Rule("lang_encoder.{rest}", MODEL + "language_model.{rest}", "embeddings, last norm and head"),
)


def template_regex(template: str) -> re.Pattern:
    """A rule's name with its fields as named groups."""
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(FIELDS[part] if index % 2 else re.escape(part) for index, part in enumerate(parts)))


def canonical(source: str) -> str:
    """A name of the source as the rules have it; some keep CLIP's vision transformer one module deeper."""
    return source.replace(VIT + "vision_model.", VIT, 1)


SOURCE_REGEXES = tuple(template_regex(rule.source) for rule in RULES)


def find_rule(source: str) -> tuple[Rule, dict[str, str]] | None:
    """The rule for a canonical name of the source, and what its fields are."""
    for rule, regex in zip(RULES, SOURCE_REGEXES, strict=True):
        if match := regex.fullmatch(source):
            return rule, match.groupdict()
    return None


class Piece(NamedTuple):
    """Where a tensor of the target comes from: these rows of a tensor of the source, or all of it (None)."""

    source: str
    rows: slice | None
    shape: tuple[int, ...]
    dtype: torch.dtype  # in the source


class ConversionError(ValueError):
    """The source, or what was asked, cannot be converted; the message says what is wrong and what to do."""


class Plan:
    """What fills each tensor of the target, by `RULES` and the published settings.

    Attributes:
        pieces: a piece of the source by name of the target.
        counts: how many tensors of the source each rule took.
        problems: what is wrong, by canonical name of the source.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], settings: dict):
        self.pieces: dict[str, Piece] = {}
        self.counts, self.problems = Counter(), {}
        self.views = 1 + TILES_PER_SIDE[settings["level"]] ** 2
        for source, tensor in tensors.items():
            name = canonical(source)
            found = find_rule(name)
            if found is None:
                self.problems[name] = f"extra: {source}, which no rule knows"
                continue
            rule, fields = found
            self.counts[rule] += 1
            if not isinstance(tensor, torch.Tensor) or tensor.dtype not in SAFETENSORS_DTYPES:
                kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                problem = f"wrong: {source} is of type {kind}, not a floating-point tensor"
            elif isinstance(rule.target, SameAs):
                problem = check_copy(tensors, source, rule.target.source.format(**fields))
            else:
                problem = self.assign(rule, source, tensor, target_fields(fields, settings))
            if problem is not None:
                self.problems[name] = problem

    def assign(self, rule: Rule, source: str, tensor: torch.Tensor, fields: dict) -> str | None:
        """Give a tensor of the source to its target, or its rows to its targets; returns what is wrong with that."""
        shape, rows = tuple(tensor.shape), [None]
        if rule.action == "split":
            # Rows that nothing uses follow those of the views; all other splits are into equal parts.
            part = self.views if None in rule.target else shape[0] // len(rule.target) if shape else 0
            needed = part if None in rule.target else part * len(rule.target)
            if not shape or not part or (shape[0] < needed if None in rule.target else shape[0] != needed):
                of = f"at least {part} rows" if None in rule.target else f"rows for {len(rule.target)} equal parts"
                return f"misshapen: {source} is {shape} where {of} are needed"
            rows = [slice(start, start + part) for start in range(0, needed, part)]
            shape = (part, *shape[1:])
        targets = (rule.target,) if rule.action == "renamed" else rule.target or ()
        for template, part in zip(filter(None, targets), rows, strict=False):
            target = template.format(**fields)
            if target in self.pieces:
                return f"extra: {source} would fill {target}, which {self.pieces[target].source} fills already"
            self.pieces[target] = Piece(source, part, shape, tensor.dtype)
        return None

    def check(self, config: "PheyeConfig"):
        """Hold the plan against the model.

        Raises:
            ConversionError: with one line for each missing, extra or misshapen tensor, and each false copy.
        """
        shapes = target_shapes(config)
        names = Names(shapes, config)
        problems = dict(self.problems)
        for target, piece in self.pieces.items():
            if target not in shapes:
                problem = f"extra: {piece.source} has no place in the model ({target})"
            elif piece.shape != shapes[target]:
                problem = f"misshapen: {piece.source} gives {target} the shape {piece.shape}, not {shapes[target]}"
            else:
                continue
            problems.setdefault(canonical(piece.source), problem)
        for target in shapes.keys() - self.pieces.keys():
            source = names.source_of(target)
            problems.setdefault(source, f"missing: {source} (for {target})")
        if problems:
            listing = "\n  ".join(sorted(problems.values()))
            raise ConversionError(
                f"The checkpoint does not hold what its config.json describes; {len(problems)} of its tensors are "
                f"wrong (check the encoder and decoder, and that the file is whole):\n  {listing}"
            )


def target_fields(fields: dict[str, str], settings: dict) -> dict[str, str]:
    """The fields of a target's name, from those of the source's."""
    if "path" in fields:
        fields["flat"] = fields["path"].replace(".", "_")
    if "layer" in fields:
        layer, interval = int(fields["layer"]), settings["cross_interval"]
        has_block = (layer + 1) % interval == 0 and layer >= settings["from_layer"]
        # Layers with a block before them and below this one, less those before the start layer.
        block = (layer + 1) // interval - 1 - settings["from_layer"] // interval
        fields["block"] = str(block) if has_block else f"(before layer {layer})"
    return fields


def target_shapes(config: "PheyeConfig") -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model, without its memory."""
    from pheye.modeling_pheye import PheyeForConditionalGeneration

    with torch.device("meta"):
        model = PheyeForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class Names:
    """Names of a model's tensors back to those of the source."""

    def __init__(self, targets: Iterable[str], config: "PheyeConfig"):
        self.layers = config.cross_attention_layers
        tower, lora = (template_regex(MODEL + name) for name in ("vision_tower.{path}.{kind}", "local_lora.{flat}.A"))
        paths = [match["path"] for target in targets if (match := tower.fullmatch(target))]
        self.paths = {path.replace(".", "_"): path for path in paths}
        self.adapted = {self.paths[match["flat"]] for target in targets if (match := lora.fullmatch(target))}

    def source_of(self, target: str) -> str:
        """The name in the source of what fills `target`."""
        for rule in RULES:
            templates = rule.target if rule.action == "split" else (rule.target,) if rule.action == "renamed" else ()
            for template in filter(None, templates):
                if not (match := template_regex(template).fullmatch(target)):
                    continue
                fields = match.groupdict()
                if "flat" in fields:
                    fields["path"] = self.paths[fields["flat"]]
                if "block" in fields:
                    fields["layer"] = self.layers[int(fields["block"])]
                if ".base_layer." not in rule.source or fields["path"] in self.adapted:
                    return rule.source.format(**fields)
        raise AssertionError(f"no rule fills {target}")


def check_copy(tensors: dict[str, torch.Tensor], copy: str, original: str) -> str | None:
    """What speaks against dropping `copy` as a copy of `original`."""
    if original not in tensors:
        return f"extra: {copy} is no copy, because there is no {original}"
    a, b = tensors[copy], tensors[original]
    alike = isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
    # Values are read only where the two do not share their memory already.
    if alike and ((a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride()) or torch.equal(as_bytes(a), as_bytes(b))):
        return None
    return f"wrong: {copy} differs from {original}, whose copy it should be"


# --- Reading ---


class Source(NamedTuple):
    folder: Path
    settings: dict  # the published config.json
    name: str  # Hub id, or the folder's own name
    revision: str | None  # commit on the Hub


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


def find_source(source: str, options: dict[str, str | None]) -> Source:
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


def read_settings(path: Path, options: dict[str, str | None]) -> dict:
    """The published config.json, checked for what the conversion needs."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} could not be read as JSON: {error}.") from error
    missing = [name for name in SETTINGS if not isinstance(settings, dict) or name not in settings]
    missing = [name for name in missing if not options.get(name)]
    if missing:
        raise ConversionError(f"{path} lacks {', '.join(missing)}; it is not the config.json of a published Pheye.")
    for part in ("encoder", "decoder", "tokenizer"):
        if not options.get(part) and not isinstance(settings[part], str):
            raise ConversionError(f"{path} has {part} {settings[part]!r}, which is no name; give --{part}.")
    for name, least in (("cross_interval", 1), ("from_layer", 0), ("reduce", 1)):
        if type(settings[name]) is not int or settings[name] < least:
            raise ConversionError(f"{path} has {name} {settings[name]!r}, which is no integer of at least {least}.")
    level = settings["level"]
    if isinstance(level, bool) or level not in TILES_PER_SIDE:
        reason = (
            "exists in the published code as a number only and cannot run there" if level in (1, 4) else "is unknown"
        )
        raise ConversionError(
            f"{path} has level {level!r}, which {reason}, so there is no model to reproduce; levels 2 (2 x 2 crops) "
            "and 3 (3 x 3 crops) can be converted."
        )
    return settings


def download(repo: str, files: list[str], what: str, revision: str | None = None) -> Path:
    """The folder in the cache with those `files` of a Hub repo that exist."""
    try:
        return Path(snapshot_download(repo, allow_patterns=files, revision=revision))
    except (OSError, ValueError) as error:  # requests, missing repos and malformed names
        raise ConversionError(
            f"{what} {repo!r} is neither a folder nor a Hub repo that can be read ({error})."
        ) from error


def find_part(source: Source, part: str, option: str | None, files: tuple[str, ...]) -> tuple[Path, str | None]:
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
        return folder, published if re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(published)) else None
    return download(name, list(files), f"--{part}" if option else part), name


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled state dict, mapped into memory. Nothing in the file can run."""
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} holds something other than tensors, which could run code when loaded, and is refused; nothing of "
            f"it was run. ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ConversionError(
            f"{path} is no whole checkpoint in torch's zip format: {str(error).splitlines()[0]}. Download it again; "
            "if it was saved by torch before 1.6, load it with weights_only=True and save it anew."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ConversionError(f"{path} holds no dict of named tensors, but a {type(tensors).__name__}.")
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in tensors.items()}


def make_config(settings: dict, encoder: Path, decoder: Path, tensors: dict[str, torch.Tensor]) -> "PheyeConfig":
    """The configuration; LoRA ranks come from the tensors, since config.json does not tell them."""
    from transformers import AutoConfig

    from pheye.configuration_pheye import PheyeConfig

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


def write_weights(
    folder: Path, checkpoint: Path, plan: Plan, dtype: torch.dtype | None, max_shard_size: int, stop: threading.Event
):
    """Write the model's tensors as safetensors shards, and the index that says which tensor is where.

    dtype: of all tensors, None for each one's own. stop: when set, the writing ends and leaves what there is.
    """
    layout = {
        name: torch.empty(piece.shape, dtype=dtype or piece.dtype, device="meta")
        for name, piece in plan.pieces.items()
    }
    shards = split_into_shards({name: tensor.nbytes for name, tensor in layout.items()}, max_shard_size)
    total = sum(tensor.nbytes for tensor in layout.values())
    if (free := shutil.disk_usage(folder).free) < total:
        raise ConversionError(
            f"The weights take {total:,} bytes, but the disk of OUTPUT has {free:,} left; make room."
        )
    weight_map, tensors = {}, {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing weights") as progress:
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map.update(dict.fromkeys(names, file))
            # Mapped anew for each shard, so that the pages which the last one read are let go.
            tensors.clear()
            tensors.update(read_checkpoint(checkpoint))
            for size in write_shard(folder / file, {name: layout[name] for name in names}, plan, tensors):
                progress.update(size)
                if stop.is_set():
                    return
    parameters = sum(tensor.numel() for tensor in layout.values())
    index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def split_into_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in their order, in groups of at most `limit` bytes; a larger tensor is alone in its group."""
    shards, room = [], 0
    for name, size in sizes.items():
        if size > room or not shards:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def write_shard(
    path: Path, layout: dict[str, torch.Tensor], plan: Plan, tensors: dict[str, torch.Tensor]
) -> Iterator[int]:
    """One safetensors file: length of the header, header, tensors; yields bytes of tensors as they are written.

    The library's own writer wants the whole file in memory.
    """
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
                yield chunk.nbytes


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


def write_processor(folder: Path, conversion: "Conversion") -> "PheyeProcessor":
    """Tokenizer, chat template and image processor, with the encoder's own mean and std where it tells them."""
    from transformers import AutoTokenizer

    from pheye.image_processing_pheye import PheyeImageProcessor
    from pheye.processing_pheye import PheyeProcessor

    config, tokenizer = conversion.config, conversion.folders["tokenizer"]
    size = config.vision_config.image_size
    options = {"tiles_per_side": config.tiles_per_side, "size": {"height": size, "width": size}}
    preprocessor = conversion.folders["encoder"] / "preprocessor_config.json"
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


def write_configs(folder: Path, config: "PheyeConfig", tokenizer):
    """Configuration, generation configuration and the code that they name."""
    from transformers import GenerationConfig

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

CARD = """
# {title}

[Pheye]({paper}): a frozen language model that reads an image through dense cross-attention blocks, at
{pixels} x {pixels} pixels: one global view and {tiles} x {tiles} crops. Converted from {source}.

```python
from transformers import pipeline

pheye = pipeline("image-to-text", model="{model}", trust_remote_code=True)
print(pheye("picture.jpg", prompt="What is written on the sign?"))
```

`AutoModelForImageTextToText.from_pretrained("{model}", trust_remote_code=True)` and
`AutoProcessor.from_pretrained("{model}", trust_remote_code=True)` give model and processor. Pin `revision=` to a
commit: it holds for the code as for the weights.

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

The source states no licence for its weights, and neither does this copy: ask its authors before you use it for more
than the law grants you anyway. The code files come from the package pheye and are under Apache-2.0.
"""


def find_variant(config: "PheyeConfig") -> str | None:
    from pheye.configuration_pheye import VARIANTS

    for variant, numbers in VARIANTS.items():
        if all(getattr(config, name) == value for name, value in numbers.items()):
            return variant
    return None


def describe_scores(config: "PheyeConfig", variant: str | None) -> str:
    if variant is None:
        return "The paper reports no model with these numbers."
    rows = [("model", *SCORES), ("---",) * (1 + len(SCORES)), (f"Pheye-{variant}", *PUBLISHED_SCORES[variant])]
    table = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
    text, vision = config.text_config, config.vision_config
    sizes = (text.hidden_size, text.num_hidden_layers, vision.hidden_size, vision.num_hidden_layers)
    note = "They were not measured again after the conversion."
    if sizes != PUBLISHED_SIZES:
        note = "This model has other sizes than the published one, so they are not its own."
    return f"The paper reports, for the published model:\n\n{table}\n\n{note}"


def describe_dtypes(conversion: "Conversion") -> str:
    """What is stored in which dtype, and what loading makes of it."""
    counts = Counter()
    for piece in conversion.plan.pieces.values():
        counts[dtype_name(conversion.dtype or piece.dtype)] += math.prod(piece.shape)
    held = ", ".join(f"{count:,} parameters in {name}" for name, count in counts.most_common())
    loaded = dtype_name(conversion.config.dtype)
    size = sum(counts.values()) * conversion.config.dtype.itemsize / 1e6
    size = f"{size / 1e3:.1f} GB" if size >= 1e3 else f"{size:.1f} MB"
    widest = "float64" if "float64" in counts else "float32"
    kept = (
        "Every tensor is stored as in the source" if conversion.dtype is None else f"All tensors were cast to {loaded}"
    )
    return (
        f"{kept}: {held}. `config.dtype` is that of the language model's weights, {loaded}, so a plain load casts all "
        f"of it to {loaded} and takes {size}; `dtype=torch.{widest}` gets every stored bit back."
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_card_data(conversion: "Conversion", variant: str | None, title: str) -> ModelCardData:
    """The card's metadata; the scores are among them only for the published repo itself."""
    results = None
    if variant is not None and conversion.source.name == f"miguelcarv/Pheye-{variant}":
        results = [
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=dataset.lower(),
                dataset_name=dataset,
                dataset_split=split,
                metric_type=metric.lower(),
                metric_value=value,
                source_name="Efficient Architectures for High Resolution Vision-Language Models",
                source_url=PAPER,
            )
            for (dataset, split, metric), value in zip(map(str.split, SCORES), PUBLISHED_SCORES[variant], strict=True)
        ]
    base_models = [conversion.hub_ids[part] for part in ("encoder", "decoder") if conversion.hub_ids[part]]
    return ModelCardData(
        language="en",
        license="other",
        license_name="none-stated-by-the-source",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=base_models or None,
        tags=["pheye", "vision-language-model", "image-to-text", "visual-question-answering", "custom_code"],
        model_name=title if results else None,
        eval_results=results,
    )


def write_card(folder: Path, model: str, conversion: "Conversion", sha256: str):
    """README.md; `model` is what the reader will load, a Hub id or a folder."""
    source, config = conversion.source, conversion.config
    variant, title = find_variant(config), model.split("/")[-1]
    on_hub = source.revision is not None
    body = CARD.format(
        title=title,
        paper=PAPER,
        pixels=config.tiles_per_side * config.vision_config.image_size,
        tiles=config.tiles_per_side,
        source=f"[{source.name}](https://huggingface.co/{source.name})" if on_hub else f"the folder `{source.name}`",
        model=model,
        scores=describe_scores(config, variant),
        version=pheye.__version__,
        values="are untouched" if conversion.dtype is None else f"were cast to {dtype_name(config.dtype)}",
        revision=f"`{source.revision}`" if on_hub else "unknown (a local folder)",
        sha256=sha256,
        encoder=conversion.hub_ids["encoder"] or "a local folder",
        decoder=conversion.hub_ids["decoder"] or "a local folder",
        parameters=sum(math.prod(piece.shape) for piece in conversion.plan.pieces.values()),
        dtypes=describe_dtypes(conversion),
    )
    data = make_card_data(conversion, variant, title)
    ModelCard(f"---\n{data.to_yaml()}\n---\n{body}").save(folder / "README.md")


# --- Putting it together ---


@dataclass
class Conversion:
    """What is known about one run."""

    source: Source
    dtype: torch.dtype | None  # of all tensors; None keeps those of the source
    plan: Plan
    config: "PheyeConfig"
    folders: dict[str, Path]  # of the encoder's and decoder's configs and of the tokenizer
    hub_ids: dict[str, str | None]  # of the same, where they have one


def make_conversion(
    source: Source, tensors: dict, plan: Plan, options: dict[str, str | None], dtype: torch.dtype | None
) -> Conversion:
    """Find the configs, and hold the plan against the model that they describe."""
    folders, hub_ids = {}, {}
    files = {"encoder": CONFIG_FILES, "decoder": CONFIG_FILES, "tokenizer": TOKENIZER_FILES}
    for part, names in files.items():
        folders[part], hub_ids[part] = find_part(source, part, options.get(part), names)
    config = make_config(source.settings, folders["encoder"], folders["decoder"], tensors)
    plan.check(config)
    language_model = Counter()
    for name, piece in plan.pieces.items():
        if name.startswith(MODEL + "language_model."):
            language_model[dtype or piece.dtype] += math.prod(piece.shape)
    for part in (config, config.vision_config, config.text_config):
        part.dtype = language_model.most_common(1)[0][0]
        part.name_or_path = ""  # a folder of this machine
    return Conversion(source, dtype, plan, config, folders, hub_ids)


class Background(threading.Thread):
    """A call in a thread of its own, which does not keep the program from ending."""

    def __init__(self, call: Callable, *args):
        super().__init__(daemon=True)
        self.call, self.args, self.value, self.error = call, args, None, None
        self.start()

    def run(self):
        try:
            self.value = self.call(*self.args)
        except BaseException as error:
            self.error = error

    def result(self):
        """What the call returned or raised, when it is done."""
        self.join()
        if self.error is not None:
            raise self.error
        return self.value


@contextlib.contextmanager
def appear_whole(output: Path, force: bool):
    """A folder beside `output` that gets its name when the block is done, and is removed when the block fails.

    What a killed run left behind is cleaned up first.
    """
    prefix, replaced = f".{output.name}.converting-", output.with_name(f".{output.name}.replaced")
    output.parent.mkdir(parents=True, exist_ok=True)
    if replaced.exists() and not output.exists():
        os.rename(replaced, output)  # that run was killed between the two renames below
    for leftover in [replaced, *output.parent.iterdir()]:
        if leftover == replaced or leftover.name.startswith(prefix):
            shutil.rmtree(leftover, ignore_errors=True)
    if output.exists() and not (force and output.is_dir()):
        remedy = (
            "give --force to replace it" if output.is_dir() else "it is no folder, so even --force leaves it alone"
        )
        raise ConversionError(f"{output} exists already; choose another OUTPUT, or {remedy}.")
    folder = output.with_name(f"{prefix}{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        if output.exists():
            os.rename(output, replaced)
        os.rename(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if replaced.exists() and not output.exists():
            os.rename(replaced, output)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def sha256_of(path: Path) -> str:
    # In one call on the mapped file, which leaves the interpreter to other threads all the while.
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return hashlib.sha256(data).hexdigest()


def report(plan: Plan):
    """How many tensors each rule took, and what became of them."""
    for rule in RULES:
        if plan.counts[rule]:
            print(f"{plan.counts[rule]:5} {rule.action:8}{rule.source}: {rule.why}")
    totals = Counter()
    for rule, count in plan.counts.items():
        totals[rule.action] += count
    parts = ", ".join(f"{totals[action]} {action}" for action in ("renamed", "split", "dropped"))
    print(f"{totals.total()} tensors of the source: {parts}; {len(plan.pieces)} of the model, each filled once.")


def convert(
    source: str,
    output: str,
    *,
    encoder: str | None = None,
    decoder: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "keep",
    max_shard_size: int = 2_000_000_000,
    force: bool = False,
    verify: bool = False,
    model: str | None = None,
) -> Plan:
    """Convert `source` to the folder `output`; see the command's help. `model` is the name that the card shows.

    Raises:
        ConversionError: if the source is refused, with the reason. OSError: if reading or writing fails.
    """
    output = Path(output).resolve()
    options = {"encoder": encoder, "decoder": decoder, "tokenizer": tokenizer}
    for used in (source, *filter(None, options.values())):
        if Path(used).resolve().is_relative_to(output):
            raise ConversionError(f"{output} holds {used}, which the conversion reads; choose another OUTPUT.")
    stored = None if dtype == "keep" else getattr(torch, dtype)
    with appear_whole(output, force) as folder:
        found = find_source(source, options)
        checkpoint = found.folder / "checkpoint.pt"
        sha256 = Background(sha256_of, checkpoint)
        tensors = read_checkpoint(checkpoint)
        plan, stop = Plan(tensors, found.settings), threading.Event()
        writing = Background(write_weights, folder, checkpoint, plan, stored, max_shard_size, stop)
        try:
            conversion = make_conversion(found, tensors, plan, options, stored)
            processor = write_processor(folder, conversion)
            write_configs(folder, conversion.config, processor.tokenizer)
            writing.result()
        finally:
            stop.set()
            writing.join()
        report(plan)
        write_card(folder, model or output.name, conversion, sha256.result())
        if verify:
            verify_folder(folder, conversion, processor)
    return plan


# Differences that rounding in float32 explains; a wrong mapping makes them a thousand times larger.
BOUNDS = {"pixels": 1e-6, "features": 2e-4, "logits": 2e-3}


def verify_folder(folder: Path, conversion: Conversion, processor: "PheyeProcessor"):
    """Compare the converted model with the formulas applied to the source's own tensors, both in float32."""
    from pheye.modeling_pheye import PheyeForConditionalGeneration

    config, source = conversion.config, conversion.source
    model = PheyeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tensors = read_checkpoint(source.folder / "checkpoint.pt")
    reference = Reference(tensors, source.settings, config.vision_config, config.text_config)
    image = draw_test_picture()
    conversation = [{"role": "user", "content": "Describe the image."}]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    image_processor = processor.image_processor
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"]).last_hidden_state
        ours = {"pixels": inputs["pixel_values"], "features": features, "logits": model(**inputs).logits}
        pixels = reference.pixels(image, image_processor.image_mean, image_processor.image_std)
        features = reference.features(pixels)
        theirs = {"pixels": pixels, "features": features, "logits": reference.logits(inputs["input_ids"][0], features)}
    differences = {name: (ours[name][0] - theirs[name]).abs().max().item() for name in BOUNDS}
    listing = ", ".join(f"{name} {difference:.2g}" for name, difference in differences.items())
    print(f"Largest differences from the reference: {listing}")
    exact = conversion.dtype is None or config.dtype == torch.float32
    if exact and not all(differences[name] <= bound for name, bound in BOUNDS.items()):
        bounds = ", ".join(f"{name} {bound:g}" for name, bound in BOUNDS.items())
        raise ConversionError(
            f"The converted model differs from the source: {listing}; rounding explains {bounds}. This is a fault of "
            "the converter; please report it."
        )


def push(output: str, repo: str, private: bool, revision: str | None):
    """Upload the folder to the Hub; weights that an earlier push left there go."""
    api = HfApi()
    repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo,
        folder_path=output,
        revision=revision,
        commit_message="Convert the published checkpoint",
        delete_patterns=["*.safetensors", "*.safetensors.index.json"],
    )
    print(f"Pushed to {commit.commit_url}")


def size_in_bytes(text: str) -> int:
    """ "500MB" or "2GB" as a number; a bare number is one of bytes."""
    match = re.fullmatch(r"([1-9]\d*)([KMGT]?)B?", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500MB or 2GB")
    return int(match[1]) * 1000 ** " KMGT".index(match[2] or " ")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint",
        description="Turn a published Pheye checkpoint into a folder that transformers loads.",
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of a published checkpoint")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; it appears when it is whole")
    for part in ("encoder", "decoder", "tokenizer"):
        parser.add_argument(f"--{part}", help=f"folder or Hub id, in place of the {part} that config.json names")
    dtypes = ("keep", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="keep", help="of the weights (default: as in the source)")
    parser.add_argument("--max-shard-size", type=size_in_bytes, default="2GB", help="of a weights file (default: 2GB)")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")
    parser.add_argument(
        "--verify", action="store_true", help="compare the model with a slow reference on a test picture"
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload OUTPUT to this Hub repo")
    parser.add_argument("--private", action="store_true", help="make that repo private if it is new")
    parser.add_argument("--revision", help="branch of that repo to push to (default: main)")
    args = parser.parse_args(argv)
    if not args.push_to_hub and (args.private or args.revision):
        parser.error("--private and --revision say how to push; give --push-to-hub REPO too")
    return args


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parse_arguments(argv)
    try:
        convert(
            args.source,
            args.output,
            encoder=args.encoder,
            decoder=args.decoder,
            tokenizer=args.tokenizer,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            force=args.force,
            verify=args.verify,
            model=args.push_to_hub,
        )
    except (ConversionError, OSError) as error:
        print(f"error: {error}\nNothing was written to {args.output}.", file=sys.stderr)
        return 1
    print(f"Wrote {args.output}")
    if args.push_to_hub:
        try:
            push(args.output, args.push_to_hub, args.private, args.revision)
        except (OSError, ValueError) as error:
            print(f"error: {args.output} is whole, but pushing it failed: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.setswitchinterval(0.0005)  # or the writing thread waits 5 ms for every tensor while imports run
    sys.exit(main())
