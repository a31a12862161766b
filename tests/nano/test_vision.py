"""Pre-training of the vision tower, shortened: its batches, and what it begins with."""

import math

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel

from pheye.nano import vision
from pheye.nano.learning.labels import GRID, HEADS
from pheye.nano.learning.muon import optimizers_for

from tiny import tiny_model

pytestmark = pytest.mark.once


def parameters(folder, kind) -> dict[str, torch.Tensor]:
    return dict(kind.from_pretrained(folder).named_parameters())


def test_the_reader_learns_a_batch_by_heart(small):
    torch.manual_seed(0)
    reader = vision.Reader(vision.vision_config())
    pixels, maps, counts, is_page = map(torch.from_numpy, vision.batch(0))
    assert maps.shape == (4, len(HEADS), GRID, GRID) and is_page.tolist() == [True, True, False, False]
    optimizers = optimizers_for(reader, reader.vision.encoder.layers, 3e-3, 1.5e-3)
    held = [parameter for each in optimizers for group in each.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in reader.parameters()}
    assert len(held) == len(set(map(id, held)))
    losses = []
    for _ in range(30):
        loss = vision.loss_of(reader, vision.normalized(pixels), maps, counts)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_batches_drawn_by_other_processes_are_the_same_and_in_order(monkeypatch):
    monkeypatch.setattr(vision, "BATCHES_AT_ONCE", 1)
    expected = [vision.batch(index, 1, True) for index in (3, 4)]
    for arrays, known in zip(vision.drawn(range(3, 5), 1, True, workers=1, ahead=True), expected, strict=True):
        assert all(np.array_equal(one.numpy(), other) for one, other in zip(arrays, known, strict=True))
    (arrays,) = vision.drawn(range(3, 5), 1, True, workers=2, ahead=False, together=2)
    for one, *parts in zip(arrays, *expected, strict=True):
        assert np.array_equal(one.numpy(), np.concatenate(parts))


def test_training_goes_on_from_the_tower_of_a_pheye(small, tmp_path):
    model = tiny_model(vision_config=vision.vision_config())
    model.save_pretrained(tmp_path / "pheye")
    vision.train(tmp_path / "more", 0, start=tmp_path / "pheye")
    found = parameters(tmp_path / "more" / "vision", CLIPVisionModel)
    expected = dict(model.pheye.vision_tower.named_parameters())
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("goes_on", [False, True])
def test_easy_batches_are_for_a_tower_that_begins(goes_on, small, tmp_path, monkeypatch):
    tiny_model(vision_config=vision.vision_config()).save_pretrained(tmp_path / "pheye")
    orders = []
    monkeypatch.setattr(vision, "drawn", lambda indices, *_, **__: orders.append(indices) or [])
    vision.train(tmp_path / "more", 8, start=tmp_path / "pheye" if goes_on else None)
    assert vision.ease_of(orders[-1][0]) == (0 if goes_on else 1) and len(orders[-1]) == math.ceil(8 / vision.ECHOES)
