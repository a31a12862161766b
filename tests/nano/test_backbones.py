"""The control's backbone: ConvNeXt on each tile alone."""

import pytest
import torch
from transformers import AutoBackbone, ConvNextBackbone

from pheye import PheyeConfig, PheyeForConditionalGeneration
from pheye.nano.learning import backbones

from tiny import tiny_text_config, tiny_vision_config

pytestmark = pytest.mark.once

SIZES = {
    "depths": [1] * 4,
    "hidden_sizes": [4] * 4,
    "layer_scale_init_value": 0.0,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}


@pytest.fixture
def backbone(monkeypatch):
    monkeypatch.setattr(backbones, "TILE", 64)
    torch.manual_seed(0)
    return AutoBackbone.from_config(backbones.TileConvNextConfig(**SIZES)).eval()


@torch.no_grad()
def test_its_maps_are_those_of_the_tiles(backbone):
    assert isinstance(backbone, backbones.TileConvNextBackbone)
    pixels = torch.randn(2, 3, 64 * 2, 64 * 3)
    found = backbone(pixels).feature_maps
    plain = ConvNextBackbone(backbone.config).eval()
    plain.load_state_dict(backbone.state_dict())
    for stride, one in zip((4, 8, 16, 32), found, strict=True):
        side = 64 // stride
        assert one.shape == (2, 4, 2 * side, 3 * side)
    for row in range(2):
        for column in range(3):
            tile = pixels[:, :, 64 * row : 64 * (row + 1), 64 * column : 64 * (column + 1)]
            for expected, one in zip(plain(tile).feature_maps, found, strict=True):
                side = expected.shape[-1]
                window = one[:, :, side * row : side * (row + 1), side * column : side * (column + 1)]
                torch.testing.assert_close(window, expected)
    whole = plain(pixels).feature_maps[-1]
    assert not torch.allclose(whole, found[-1])  # its neighbours show


def test_a_pheye_with_it_is_saved_and_loaded(tmp_path):
    config = PheyeConfig(
        vision_config=tiny_vision_config(image_size=224, patch_size=14),
        text_config=tiny_text_config(),
        high_res_vision_config=backbones.TileConvNextConfig(**SIZES),
        high_res_fusion_layers=[1],
        tiles_per_side=2,
    )
    PheyeForConditionalGeneration(config).save_pretrained(tmp_path)
    loaded = PheyeForConditionalGeneration.from_pretrained(tmp_path)
    assert type(loaded.pheye.high_res_tower) is backbones.TileConvNextBackbone
