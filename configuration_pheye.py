"""Pheye's configuration: every number of the architecture, checked once.

Source: "Efficient Architectures for High Resolution Vision-Language Models", arXiv 2501.02584.
"""

import contextlib
from collections.abc import Sequence
from itertools import product

from transformers.utils.versions import require_version

require_version("transformers>=5.17.0", "Upgrade it: pip install --upgrade transformers")

from transformers import CONFIG_MAPPING, AutoConfig, CLIPVisionConfig, PhiConfig, PreTrainedConfig  # noqa: E402

# The paper's models (section 3): xN has a block before every Nth layer; 448 and 672 are 2 and 3 crops a side.
VARIANTS = {
    "x4-448": {"cross_attention_interval": 4, "tiles_per_side": 2},
    "x4-672": {"cross_attention_interval": 4, "tiles_per_side": 3},
    "x2-448": {"cross_attention_interval": 2, "tiles_per_side": 2},
    "x2-672": {"cross_attention_interval": 2, "tiles_per_side": 3},
}

# Vision transformers without a class token; all others have one, and register tokens if their config says so.
NO_CLASS_TOKEN = ("siglip_vision_model", "ijepa")

# Far above all that is of use; they keep a slip of the pen from taking all memory, or from numbers that overflow.
MOST_TILES = 64
MOST_LAYERS = 10_000
MOST_ROUTER_UNITS = 2**16
MOST_KERNEL = 255
HIGHEST_ALPHA = 1e6

# Where FILA joins its convolutional branch to a ViT of 24 layers, counted from 0 as "before this layer" (arXiv
# 2412.08378, by two accounts that agree); towers of other depths get the same shares.
FILA_LAYERS, FILA_DEPTH = (2, 6, 12, 20), 24

# Grids of crops, rows and columns: five after FILA (by second-hand accounts), and all of at most nine crops and four
# along a side.
CANVASES = {
    "fila": [[1, 2], [2, 1], [2, 2], [1, 3], [3, 1]],
    "wide": [[rows, columns] for rows, columns in product(range(1, 5), repeat=2) if rows * columns <= 9],
}

SELF_ATTENTION_KINDS = ("block", "joint")  # by blocks of its own, or by layers of the language model

HIGH_RES_STRIDE = 32  # of a backbone's last map, in pixels: one cell of it for each patch of a view

HEAD_WIDTH = 64  # nominal: the paper divides the wider of the two hidden sizes by 64 to count heads

AUTO_MAP = {
    "AutoConfig": "configuration_pheye.PheyeConfig",
    "AutoModel": "modeling_pheye.PheyeForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_pheye.PheyeForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_pheye.PheyeForConditionalGeneration",
    "AutoImageProcessor": "image_processing_pheye.PheyeImageProcessor",
    "AutoProcessor": "processing_pheye.PheyeProcessor",
}
CUSTOM_PIPELINES = {
    "image-to-text": {
        "impl": "pipeline_pheye.PheyeImageToTextPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}

# `transformers serve` looks into the first of these tables for what reads images, after loading a config and
# before the model. `Trainer` looks into the second for models whose labels it must shift when it smooths them.
with contextlib.suppress(ImportError):
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )

    for table in (MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        table.setdefault("pheye", "PheyeForConditionalGeneration")


class PheyeConfig(PreTrainedConfig):
    """Configuration of a Pheye model; the defaults are those of Pheye-x4-672.

    Args:
        vision_config: config (or its dict) of a vision transformer that outputs a token sequence, such as CLIP's or
            SigLIP's; a config that holds one beside a text tower (`CLIPConfig`) is accepted too.
        text_config: config (or its dict) of any causal language model.
        tiles_per_side: k; the image is stretched, and seen as one global view and k x k local crops.
        canvases: in place of k, grids of crops, [rows, columns]: each image is put onto the one that suits its shape,
            and keeps its aspect ratio; or "fila" or "wide", the names of two lists. None for k x k crops.
        max_images: how many images a prompt may have.
        cross_attention_interval: a cross-attention block stands before layer l (from 0) if (l + 1) % interval == 0 ...
        cross_attention_start_layer: ... and l is at least this.
        cross_attention_reduction: divides the inner width and the MLP width of the blocks.
        initializer_range: standard deviation with which the blocks' linears begin; the last ones begin smaller still.
            The default is the paper's, for a language model 2,048 wide. Narrow ones learn faster with more.
        global_lora_rank, global_lora_alpha: LoRA set of the global view; rank 0 leaves it to the bare vision tower.
        local_lora_rank, local_lora_alpha: LoRA set of the crops.
        lora_dropout: dropout on the input of both LoRA sets while training.
        high_res_vision_config: config (or its dict) of a backbone with stages, such as ConvNeXt's, that sees the whole
            image at high resolution beside the vision transformer (after FILA, arXiv 2412.08378); None for no branch.
        high_res_fusion_layers: before which layers of the vision transformer the maps of the backbone's last stages
            join it, one each, ascending; by default those after FILA, scaled to the transformer's depth.
        self_attention_kind: how an image is refined (after VISOR, arXiv 2603.23495): "block", by blocks of their own,
            or "joint", by layers of the language model on image and text together.
        self_attention_layers: "block": before which layers' cross-attention blocks the image is refined, but not
            before the first; "joint": by which layers, that have no block themselves. Ascending.
        self_attention_budgets: which of these layers refine it at each budget, cheapest first; by default none or all.
            `vision_budget` of `forward` and `generate` is an index into this list.
        router_size: inner width of the MLP that chooses a budget for each prompt; 0 for no router.
        visual_convolution_kernel: width of a convolution along the patches of each view; odd, or 0 for none.

    Raises:
        ValueError: if a number is out of range, or if numbers contradict each other; the message names them.
    """

    model_type = "pheye"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig, "high_res_vision_config": AutoConfig}
    # For Trainer, whose predictions are logits.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states", "vision_budget", "router_logits"]
    image_token_id = -1  # no token stands for the image; TRL's GRPO, RLOO and distillation keep this one from answers

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    tiles_per_side: int = 3
    canvases: list[list[int]] | str | None = None
    max_images: int = 1
    cross_attention_interval: int = 4
    cross_attention_start_layer: int = 0
    cross_attention_reduction: int = 1
    initializer_range: float = 0.01
    global_lora_rank: int = 8
    global_lora_alpha: float = 16.0
    local_lora_rank: int = 16
    local_lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    high_res_vision_config: dict | PreTrainedConfig | None = None
    high_res_fusion_layers: list[int] | tuple[int, ...] | None = None
    self_attention_kind: str = "block"
    self_attention_layers: list[int] | tuple[int, ...] = ()
    self_attention_budgets: list[list[int]] | tuple[tuple[int, ...], ...] = ()
    router_size: int = 0
    visual_convolution_kernel: int = 0

    def __post_init__(self, **kwargs):
        for name in kwargs:
            known = getattr(type(self), name, None)
            if callable(known) or (isinstance(known, property) and known.fset is None):
                raise ValueError(f"{name} is no field of PheyeConfig that can be set; leave it out.")
        if self.vision_config is None:
            self.vision_config = vit_h_14_config()
        if self.text_config is None:
            self.text_config = phi_1_5_config()
        self.vision_config = _resolve(self.vision_config, "vision_config")
        self.text_config = _resolve(self.text_config, "text_config")
        self.canvases = read_canvases(self.canvases)
        if self.high_res_vision_config is not None:
            self.high_res_vision_config = _resolve(self.high_res_vision_config, "high_res_vision_config")
            if self.high_res_fusion_layers is None:
                depth = self.vision_config.num_hidden_layers
                self.high_res_fusion_layers = sorted(
                    {min(max(1, round(layer * depth / FILA_DEPTH)), depth - 1) for layer in FILA_LAYERS}
                )
        if self.self_attention_layers and not self.self_attention_budgets:
            self.self_attention_budgets = [[], list(self.self_attention_layers)]
        super().__post_init__(**kwargs)
        # Both travel with every saved model, so that a fine-tuned one loads and runs in pipelines like its source.
        self.auto_map = {**AUTO_MAP, **(getattr(self, "auto_map", None) or {})}
        self.custom_pipelines = {**CUSTOM_PIPELINES, **(getattr(self, "custom_pipelines", None) or {})}
        self._check()
        if self.high_res_vision_config is not None:
            stages = self.high_res_vision_config.stage_names[-len(self.high_res_fusion_layers) :]
            self.high_res_vision_config.out_features = stages

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As the library's, which sets `kwargs` after all checks: Pheye's own fields are checked like those of the
        dict."""
        own = [name for name in cls.__annotations__ if name in kwargs]
        # A dict for a part changes some of its fields; the library sees to that.
        own = [name for name in own if not (isinstance(kwargs[name], dict) and config_dict.get(name) is not None)]
        return super().from_dict({**config_dict, **{name: kwargs.pop(name) for name in own}}, **kwargs)

    def to_dict(self) -> dict:
        return {**super().to_dict(), "tie_word_embeddings": self.tie_word_embeddings}

    def to_diff_dict(self) -> dict:
        """What is saved: without settings of what the model has not, or what stands in a part's."""
        parts = ("canvases", "high_res_vision_config", "high_res_fusion_layers", "self_attention_layers")
        parts += ("self_attention_budgets", "router_size", "visual_convolution_kernel")
        without = {name for name in parts if not getattr(self, name)} | {"tie_word_embeddings"}
        if self.max_images == 1:
            without.add("max_images")
        if not self.self_attention_layers:
            without.add("self_attention_kind")
        return {name: value for name, value in super().to_diff_dict().items() if name not in without}

    @classmethod
    def from_variant(cls, variant: str, **kwargs) -> "PheyeConfig":
        """The configuration of a published model: "x4-448", "x4-672", "x2-448" or "x2-672"; `kwargs` override it.

        Raises:
            ValueError: for any other name.
        """
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is not a published model; choose one of {', '.join(VARIANTS)}.")
        return cls(**{**VARIANTS[variant], **kwargs})

    @property
    def views_per_image(self) -> int:
        """One global view and the crops: k x k, or those of the largest canvas."""
        return 1 + max(rows * columns for rows, columns in self.grids)

    @property
    def grids(self) -> list[list[int]]:
        """The grids of crops, [rows, columns], that an image may have."""
        return self.canvases or [[self.tiles_per_side, self.tiles_per_side]]

    @property
    def tokens_per_view(self) -> int:
        """Tokens that the vision tower gives for one view: patches, class token and register tokens."""
        patches = self.patches_per_side**2
        if self.vision_config.model_type in NO_CLASS_TOKEN:
            return patches
        return patches + 1 + getattr(self.vision_config, "num_register_tokens", 0)

    @property
    def patches_per_side(self) -> int:
        """Patches along each side of a view."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def high_res_tile_size(self) -> int | None:
        """Pixels along each side of what the branch sees of a crop; None without a branch."""
        return None if self.high_res_vision_config is None else HIGH_RES_STRIDE * self.patches_per_side

    @property
    def tokens_per_image(self) -> int:
        """Length of the sequence that the cross-attention blocks read."""
        return self.views_per_image * self.tokens_per_view

    @property
    def cross_attention_layers(self) -> tuple[int, ...]:
        """Indices of the language model's layers that have a block before them (section 2.1)."""
        layers = range(self.cross_attention_start_layer, self.text_config.num_hidden_layers)
        return tuple(layer for layer in layers if (layer + 1) % self.cross_attention_interval == 0)

    @property
    def cross_attention_heads(self) -> int:
        """Heads of a block: the wider of the two hidden sizes over 64, whatever the reduction."""
        return max(self.text_config.hidden_size, self.vision_config.hidden_size) // HEAD_WIDTH

    @property
    def cross_attention_size(self) -> int:
        """Inner width of a block: the wider of the two hidden sizes over the reduction."""
        return max(self.text_config.hidden_size, self.vision_config.hidden_size) // self.cross_attention_reduction

    @property
    def text_positions(self) -> int | None:
        """Tokens that the language model has learned to hold, or None if nothing says so or its rotary positions are
        scaled."""
        is_scaled = (getattr(self.text_config, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
        return None if is_scaled else getattr(self.text_config, "max_position_embeddings", None)

    @property
    def modules_to_not_quantize(self) -> list[str]:
        """For transformers' quantization configs: full names of all but the language model's layers."""
        parts = ["vision_tower", "global_lora", "local_lora", "view_encoding", "cross_attention_blocks"]
        if self.high_res_vision_config is not None:
            parts += ["high_res_tower", "fusion_blocks"]
        if self.self_attention_layers:
            parts.append("joint_attention" if self.self_attention_kind == "joint" else "self_attention_blocks")
        parts += ["router"] * bool(self.router_size) + ["visual_convolution"] * bool(self.visual_convolution_kernel)
        return [f"pheye.{name}" for name in (*parts, "language_model.lm_head")]

    @property
    def vocab_size(self) -> int:
        """The language model's vocabulary; a property, so that resizing the embeddings keeps one number."""
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int):
        self.text_config.vocab_size = value

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the language model's head has the weights of its embeddings; PEFT asks for it here."""
        return getattr(self.text_config, "tie_word_embeddings", False)

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool):
        self.text_config.tie_word_embeddings = value

    def _check(self):
        """Raise ValueError where a number is out of range or two of them contradict each other."""
        for name, least, most in (
            ("tiles_per_side", 1, MOST_TILES),
            ("max_images", 1, MOST_TILES),
            ("cross_attention_interval", 1, None),
            ("cross_attention_start_layer", 0, None),
            ("cross_attention_reduction", 1, None),
            ("global_lora_rank", 0, None),
            ("local_lora_rank", 0, None),
        ):
            _check_integer(name, getattr(self, name), least, most)
        for name in ("global_lora_alpha", "local_lora_alpha"):
            if not (_is_number(value := getattr(self, name)) and 0 <= value <= HIGHEST_ALPHA):
                raise ValueError(f"{name}={value!r} must be a number from 0 to {HIGHEST_ALPHA:.0f}.")
        if not (_is_number(self.initializer_range) and 0 < self.initializer_range <= 1):
            raise ValueError(f"initializer_range={self.initializer_range!r} must be greater than 0, and at most 1.")
        if not (_is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1):
            raise ValueError(f"lora_dropout={self.lora_dropout!r} must be at least 0 and less than 1.")
        for name, config in (("vision_config", self.vision_config), ("text_config", self.text_config)):
            _check_integer(f"{name}.hidden_size", config.hidden_size, 1)
            _check_integer(f"{name}.num_hidden_layers", config.num_hidden_layers, 1, MOST_LAYERS)
        channels = getattr(self.vision_config, "num_channels", 3)
        if channels != 3:
            raise ValueError(f"vision_config.num_channels={channels!r} must be 3: views are RGB.")

        layers = self.text_config.num_hidden_layers
        if not self.cross_attention_layers:
            raise ValueError(
                f"cross_attention_interval={self.cross_attention_interval} and cross_attention_start_layer="
                f"{self.cross_attention_start_layer} leave no cross-attention block in a language model of {layers} "
                "layers; make one of them smaller."
            )
        width = max(self.text_config.hidden_size, self.vision_config.hidden_size)
        if width % HEAD_WIDTH:
            raise ValueError(
                f"The wider of the text and vision hidden sizes ({self.text_config.hidden_size} and "
                f"{self.vision_config.hidden_size}) must be a multiple of {HEAD_WIDTH}, the width of a head."
            )
        if HEAD_WIDTH % self.cross_attention_reduction:
            raise ValueError(
                f"cross_attention_reduction={self.cross_attention_reduction} must divide {HEAD_WIDTH}, the width of a "
                "head."
            )
        if 4 * self.text_config.hidden_size % self.cross_attention_reduction:
            raise ValueError(
                f"cross_attention_reduction={self.cross_attention_reduction} must divide the blocks' MLP width, "
                f"{4 * self.text_config.hidden_size}."
            )
        image_size, patch_size = self.vision_config.image_size, self.vision_config.patch_size
        if not (_is_integer(image_size) and _is_integer(patch_size) and 1 <= patch_size <= image_size):
            raise ValueError(
                f"vision_config needs one integer image_size and one patch_size no larger than it; "
                f"got image_size={image_size} and patch_size={patch_size}."
            )
        self._check_branch()
        self._check_refining()

    def _check_branch(self):
        """Raise ValueError where the high-resolution branch and its fusion layers contradict each other."""
        layers = self.high_res_fusion_layers
        if self.high_res_vision_config is None:
            if layers:
                raise ValueError(
                    f"high_res_fusion_layers={layers} needs a branch: give high_res_vision_config, or leave them out."
                )
            return
        depth = self.vision_config.num_hidden_layers
        is_integers = isinstance(layers, (list, tuple)) and all(map(_is_integer, layers))
        if not (is_integers and layers and list(layers) == sorted({*layers}) and 1 <= layers[0] <= layers[-1] < depth):
            raise ValueError(
                f"high_res_fusion_layers={layers} must be ascending integers from 1 to {depth - 1}, since the vision "
                f"transformer has {depth} layers."
            )
        stages = [name for name in self.high_res_vision_config.stage_names if name != "stem"]
        if len(layers) > len(stages):
            raise ValueError(
                f"high_res_fusion_layers={layers} are {len(layers)}, but the backbone has {len(stages)} stages; name "
                "no more layers than that."
            )

    def _check_refining(self):
        """Raise ValueError where self-attention layers, budgets and router contradict each other."""
        if self.self_attention_kind not in SELF_ATTENTION_KINDS:
            raise ValueError(
                f"self_attention_kind={self.self_attention_kind!r} must be one of {', '.join(SELF_ATTENTION_KINDS)}."
            )
        layers, budgets = self.self_attention_layers, self.self_attention_budgets
        crossed, allowed = self.cross_attention_layers, self.cross_attention_layers[1:]
        which = "each have a cross-attention block that is not the first"
        if self.self_attention_kind == "joint":
            allowed = [layer for layer in range(crossed[0] + 1, crossed[-1]) if layer not in crossed]
            which = "stand between cross-attention blocks without having one"
        if not _is_ascending(layers) or not set(layers) <= {*allowed}:
            raise ValueError(
                f"self_attention_layers={layers!r} must be ascending, and {which} "
                f'(self_attention_kind="{self.self_attention_kind}"): some of {list(allowed)}.'
            )
        if not isinstance(budgets, (list, tuple)):
            raise ValueError(f"self_attention_budgets={budgets!r} must be a list of lists of layers.")
        if budgets and not layers:
            raise ValueError(
                f"self_attention_budgets={budgets!r} has the entry {budgets[0]!r}, but there are no "
                "self_attention_layers to choose from."
            )
        for place, budget in enumerate(budgets):
            if not _is_ascending(budget) or not set(budget) <= {*layers} or budget in budgets[:place]:
                raise ValueError(
                    f"self_attention_budgets has the entry {budget!r}, which must be ascending layers of "
                    f"self_attention_layers={list(layers)}, and stand there once."
                )
            if place and len(budget) < len(budgets[place - 1]):
                raise ValueError(
                    f"self_attention_budgets has the entry {budget!r} behind {budgets[place - 1]!r}; sort them by "
                    "their number of layers, cheapest first."
                )
        size = self.vision_config.hidden_size
        if layers and size % max(1, size // HEAD_WIDTH):
            raise ValueError(f"vision_config.hidden_size={size} must be a multiple of {size // HEAD_WIDTH} heads.")
        _check_integer("router_size", self.router_size, 0, MOST_ROUTER_UNITS)
        if self.router_size and len(budgets) < 2:
            raise ValueError(
                f"router_size={self.router_size} needs budgets to choose from, but self_attention_budgets={budgets!r}."
            )
        kernel = self.visual_convolution_kernel
        _check_integer("visual_convolution_kernel", kernel, 0, MOST_KERNEL)
        if kernel and kernel % 2 == 0:
            raise ValueError(f"visual_convolution_kernel={kernel!r} must be odd, or 0 for none.")


def read_canvases(canvases: str | Sequence | None) -> list[list[int]] | None:
    """Canvases as lists, each once; a preset by its name.

    Raises:
        ValueError: if there is none, or an entry is no pair of numbers from 1 on, or stands there twice.
    """
    if canvases is None:
        return None
    if isinstance(canvases, str):
        if canvases not in CANVASES:
            raise ValueError(f"canvases={canvases!r} is no preset; there are {', '.join(CANVASES)}.")
        return [list(canvas) for canvas in CANVASES[canvases]]
    if not isinstance(canvases, (list, tuple)) or not canvases:
        raise ValueError(f"canvases={canvases!r} must be a list of rows and columns, e.g. [[1, 2], [2, 2]], or None.")
    read = []
    for canvas in canvases:
        is_pair = isinstance(canvas, (list, tuple)) and len(canvas) == 2
        if not is_pair or not all(type(count) is int and 1 <= count <= MOST_TILES for count in canvas):
            raise ValueError(
                f"canvases has the entry {canvas!r}, which must be rows and columns, e.g. [2, 2], each from 1 to "
                f"{MOST_TILES}."
            )
        if list(canvas) in read:
            raise ValueError(f"canvases has the entry {list(canvas)} twice; leave one of them out.")
        read.append(list(canvas))
    return read


def learned_positions(text_config: PreTrainedConfig) -> int | None:
    """Positions of a language model that has a vector for each and fails behind the last; rotary ones go on."""
    is_rotary = getattr(text_config, "rope_parameters", None) is not None
    return None if is_rotary else getattr(text_config, "max_position_embeddings", None)


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ascending(layers) -> bool:
    return isinstance(layers, (list, tuple)) and all(map(_is_integer, layers)) and list(layers) == sorted({*layers})


def _is_number(value) -> bool:
    return isinstance(value, float) or _is_integer(value)


def _check_integer(name: str, value, least: int, most: int | None = None):
    if not _is_integer(value) or value < least or (most is not None and value > most):
        limit = "" if most is None else f" and at most {most}"
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}{limit}.")


def vit_h_14_config() -> CLIPVisionConfig:
    """The published vision tower: CLIP ViT-H/14 at 224 px (DFN-5B)."""
    return CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
        projection_dim=1024,
    )


def phi_1_5_config() -> PhiConfig:
    """The published language model: Phi-1.5, whose tokenizer uses one token for beginning, end and padding."""
    return PhiConfig(
        vocab_size=51200,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        max_position_embeddings=2048,
        bos_token_id=50256,
        eos_token_id=50256,
        pad_token_id=50256,
    )


PARTS = {
    "vision_config": "vision transformer",
    "text_config": "causal language model",
    "high_res_vision_config": "backbone with stages, such as ConvNeXt",
}


def _resolve(config: dict | PreTrainedConfig, name: str) -> PreTrainedConfig:
    """A sub-config as an object; where it holds a vision tower beside a text tower, the vision tower's."""
    if isinstance(config, dict):
        model_type = config.get("model_type")
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"{name} has model_type={model_type!r}, which this version of transformers does not know; "
                f"give a dict with a known model_type, or a config object."
            )
        config = AutoConfig.for_model(**config)
    if name == "vision_config" and hasattr(config, "vision_config"):
        config = config.vision_config
    needed = {
        "vision_config": ("hidden_size", "num_hidden_layers", "image_size", "patch_size"),
        "text_config": ("hidden_size", "num_hidden_layers", "vocab_size"),
        "high_res_vision_config": ("stage_names", "out_features"),
    }[name]
    missing = [number for number in needed if not hasattr(config, number)]
    if missing:
        raise ValueError(
            f"{name} is a {type(config).__name__}, which has no {', '.join(missing)}; give the config of a "
            f"{PARTS[name]}, or its dict."
        )
    return config


PheyeConfig.register_for_auto_class()
