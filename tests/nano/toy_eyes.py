"""The configuration of small eyes, with or without a branch."""

from transformers import CLIPVisionConfig, ConvNextConfig

from pheye import PheyeConfig
from pheye.nano.learning import backbones

from tiny import tiny_text_config


def toy_config(branch: str = "whole") -> PheyeConfig:
    kinds = {"whole": ConvNextConfig, "tiles": backbones.TileConvNextConfig}
    sizes = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "layer_scale_init_value": 0.0}
    return PheyeConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=2, patch_size=14
        ),
        text_config=tiny_text_config(),
        high_res_vision_config=kinds[branch](**sizes) if branch in kinds else None,
        tiles_per_side=3,
    )
