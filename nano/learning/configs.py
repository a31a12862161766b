"""How large the parts of Pheye-nano are."""

from transformers import CLIPVisionConfig, ConvNextConfig, PhiConfig

from ... import PheyeConfig
from .backbones import TileConvNextConfig

VIEW = 224  # pixels along each side
TILES = 3  # crops along each side of a picture
VOCABULARY = 633  # tokens that the texts give
INITIALIZER_RANGE = 0.04  # of new blocks, four times the paper's: widths are a tenth of the paper's
EYES = (
    "vision_tower",
    "global_lora",
    "local_lora",
    "high_res_tower",
    "fusion_blocks",
)  # parts of a Pheye that `nano.eyes` trains
BRANCHES = {"whole": ConvNextConfig, "tiles": TileConvNextConfig, "none": None}
BRANCHES_HELP = "it sees the whole picture, or each crop's tile alone; or there is none (default: %(default)s)"


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        patch_size=14,
        image_size=VIEW,
        hidden_act="gelu",
    )


def language_config(vocabulary: int) -> PhiConfig:
    return PhiConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        initializer_range=0.07,  # about 1 / sqrt(hidden_size); with Phi's 0.02 attention begins, and long stays, even
        hidden_act="gelu_pytorch_tanh",  # Phi's own, in one kernel
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def nano_config(branch: str = "whole") -> PheyeConfig:
    """All of the model: what trains here, and the language model and its blocks; with one of BRANCHES."""
    backbone = BRANCHES[branch]
    sizes = {"depths": [1, 1, 3, 3], "hidden_sizes": [16, 32, 64, 128], "layer_scale_init_value": 0.0}
    return PheyeConfig(
        vision_config=vision_config(),
        text_config=language_config(VOCABULARY),
        high_res_vision_config=backbone and backbone(**sizes),
        tiles_per_side=TILES,
        cross_attention_interval=1,
        global_lora_rank=8,
        local_lora_rank=16,
    )
