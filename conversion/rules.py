"""The mapping: what becomes of each tensor of a published checkpoint."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..common.command import InputError
from .errors import one_line

if TYPE_CHECKING:
    from ..configuration_pheye import PheyeConfig

# What a weight may be, and what safetensors files call it.
SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
TILES_PER_SIDE = {2: 2, 3: 3}  # by the published level
LONGEST_LIST = 40  # of what is wrong with a checkpoint


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
    "layer": r"(?P<layer>[0-9]{1,9})",  # of the language model
    "block": r"(?P<block>[0-9]+)",  # counts the layers that have a cross-attention block before them
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
            if not is_plain(tensor):
                problem = f"wrong: {source} is {describe(tensor)}, not a plain floating-point tensor"
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
            InputError: with one line for each missing, extra or misshapen tensor, and each false copy.
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
            lines = sorted(problems.values())
            listing = "\n  ".join(map(one_line, lines[:LONGEST_LIST]))
            if len(lines) > LONGEST_LIST:
                listing += f"\n  and {len(lines) - LONGEST_LIST:,} more"
            raise InputError(
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
    from ..modeling_pheye import PheyeForConditionalGeneration

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


def is_plain(value: object) -> bool:
    """Whether it is a tensor whose values lie in memory as they are, in a dtype that a weight may have."""
    return (
        isinstance(value, torch.Tensor)
        and value.dtype in SAFETENSORS_DTYPES
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_neg()
    )


def describe(value: object) -> str:
    """What kind of thing a checkpoint holds, for an error."""
    if not isinstance(value, torch.Tensor):
        return f"of type {type(value).__name__}"
    kind = "" if value.layout is torch.strided else f" and {value.layout}"
    return f"of type {value.dtype}{kind}{' without values' if value.is_meta else ''}"


def check_copy(tensors: dict[str, torch.Tensor], copy: str, original: str) -> str | None:
    """What speaks against dropping `copy` as a copy of `original`."""
    if original not in tensors:
        return f"extra: {copy} is no copy, because there is no {original}"
    a, b = tensors[copy], tensors[original]
    alike = is_plain(b) and (a.dtype, a.shape) == (b.dtype, b.shape)
    # Values are read only where the two do not share their memory already.
    if alike and ((a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride()) or torch.equal(as_bytes(a), as_bytes(b))):
        return None
    return f"wrong: {copy} differs from {original}, whose copy it should be"


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor as one row of bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
