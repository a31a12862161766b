"""Pheye-nano is small in all its parts together."""

import pytest
import torch

from pheye import PheyeForConditionalGeneration
from pheye.nano import recipe
from pheye.nano.learning.backbones import TILE
from pheye.nano.learning.configs import nano_config
from pheye.nano.learning.probes import Eyes

pytestmark = pytest.mark.once


def test_the_whole_model_has_at_most_twelve_million_parameters_and_26_megabytes():
    with torch.device("meta"):
        model = PheyeForConditionalGeneration(nano_config())
        parts = Eyes(nano_config()).parts()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters <= 12_000_000 and 2 * parameters <= 26_000_000
    assert model.config.high_res_tile_size == TILE
    trained = sum(weight.numel() for weight in parts.values())
    # What `recipe.pack` keeps: eyes with two values of their optimizers, both in single precision; eyes and model.
    assert 12 * trained + 2 * trained + 2 * parameters <= 7 * recipe.PIECE_BYTES
