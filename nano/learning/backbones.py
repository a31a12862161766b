"""The control of what the branch is for: a backbone that sees each tile of the high-resolution picture alone.

It has ConvNeXt's parameters and sees the same pixels. What a tile shows depends on no other tile then, as with the
crops. `AutoBackbone` makes it from its config, wherever this module is imported.
"""

import torch
from transformers import AutoBackbone, AutoConfig, ConvNextBackbone, ConvNextConfig
from transformers.modeling_outputs import BackboneOutput

from ...vision_pheye import join_tiles

TILE = 512  # pixels of the high-resolution picture along each side of a crop


class TileConvNextConfig(ConvNextConfig):
    model_type = "pheye_nano_tile_convnext"


class TileConvNextBackbone(ConvNextBackbone):
    config_class = TileConvNextConfig

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BackboneOutput:
        """Maps (B, C, h, w) of pictures (B, 3, H, W) whose sides are multiples of TILE."""
        rows, columns = pixel_values.shape[2] // TILE, pixel_values.shape[3] // TILE
        tiles = pixel_values.unflatten(3, (columns, TILE)).unflatten(2, (rows, TILE))  # (B, 3, rows, T, columns, T)
        tiles = tiles.permute(0, 4, 2, 1, 3, 5).flatten(0, 2)  # column by column
        maps = super().forward(tiles, **kwargs).feature_maps
        return BackboneOutput(
            feature_maps=tuple(join_tiles(one.unflatten(0, (-1, rows * columns)), rows, columns) for one in maps)
        )


AutoConfig.register(TileConvNextConfig.model_type, TileConvNextConfig, exist_ok=True)
AutoBackbone.register(TileConvNextConfig, TileConvNextBackbone, exist_ok=True)
