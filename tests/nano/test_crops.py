"""A Pheye of one crop becomes one of many."""

import pytest
import torch

from pheye.nano.learning.crops import SPREAD, with_crops

from tiny import tiny_image, tiny_model, tiny_processor

pytestmark = pytest.mark.once

VECTORS = "pheye.view_encoding.view_embedding.weight"


def test_weights_stay_and_new_crops_can_be_told_apart():
    before = tiny_model(tiles_per_side=2)
    after = with_crops(before, 3, with_lora=True)
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys() and len(new[VECTORS]) == 10
    assert all(torch.equal(old[name], new[name]) for name in old if name != VECTORS)
    assert torch.equal(new[VECTORS][0], old[VECTORS][0])
    moved = (new[VECTORS][1:] - old[VECTORS][1:].mean(0)).unflatten(0, (3, 3))  # rows, columns
    assert torch.pdist(moved.flatten(0, 1)).min() > SPREAD
    torch.testing.assert_close(moved.mean((0, 1)), torch.zeros(moved.shape[-1]))
    torch.testing.assert_close(moved[0] - moved[1], (moved[0, :1] - moved[1, :1]).expand(3, -1))


@torch.no_grad()
def test_new_crops_are_seen_as_the_global_view_was_that_showed_the_same():
    torch.manual_seed(0)
    before = tiny_model(tiles_per_side=1, local_lora_alpha=8.0)
    for name, parameter in before.named_parameters():
        if "lora" in name or "view_encoding" in name:
            parameter.normal_()
    after = with_crops(before, 2, with_lora=False)
    assert before.config.global_lora_rank < before.config.local_lora_rank
    view = torch.randn(1, 1, 3, *[before.config.vision_config.image_size] * 2)
    one = before.get_image_features(view.expand(-1, 2, -1, -1, -1)).last_hidden_state.unflatten(1, (2, -1))
    many = after.get_image_features(view.expand(-1, 5, -1, -1, -1)).last_hidden_state.unflatten(1, (5, -1))
    old, new = before.state_dict()[VECTORS], after.state_dict()[VECTORS]
    for crop in range(1, 5):
        torch.testing.assert_close(many[:, crop] - new[crop], one[:, 0] - old[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(new[0], old[1]) and not torch.allclose(one[:, 0], one[:, 1])
    torch.testing.assert_close(new[1:].mean(0), old[0])


def test_lora_of_the_global_view_that_does_not_fit_is_refused():
    model = tiny_model(tiles_per_side=1, global_lora_rank=4, local_lora_rank=2)
    with pytest.raises(ValueError, match="rank 4, which does not fit into the crops' 2"):
        with_crops(model, 2, with_lora=False)


def test_new_lora_changes_nothing_until_it_has_learnt():
    before = tiny_model(tiles_per_side=2, global_lora_rank=0, local_lora_rank=0)
    after = with_crops(before, 2, with_lora=True)
    assert not any("_lora." in name for name in before.state_dict())
    assert any("local_lora." in name for name in after.state_dict())
    inputs = tiny_processor()(images=tiny_image(), text="What?", return_tensors="pt")
    torch.testing.assert_close(after(**inputs).logits, before(**inputs).logits)
