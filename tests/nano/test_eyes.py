"""Stage 0 with the branch, shortened: what it trains, that it goes on, and that a Pheye takes its weights."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pheye import PheyeForConditionalGeneration, PheyeImageProcessor
from pheye.common.command import InputError
from pheye.nano import eyes
from pheye.nano.learning import picture_labels, probes
from pheye.nano.learning.backbones import TILE
from pheye.nano.learning.configs import EYES
from pheye.nano.learning.labels import CLASSES

from toy_eyes import toy_config

pytestmark = pytest.mark.once


@pytest.fixture
def toy(monkeypatch):
    """Small eyes and pictures, and the same learning rate at all times."""
    monkeypatch.setattr(eyes, "nano_config", toy_config)
    monkeypatch.setattr(eyes, "SIZES", (300, 320))
    monkeypatch.setattr(eyes, "TEST_PICTURES", 1)
    monkeypatch.setattr(eyes, "learning_rate_share", lambda *_: 1.0)
    monkeypatch.setattr(eyes, "SAVE_EVERY", 0)
    monkeypatch.setattr(eyes, "ALONE", 1)
    eyes.test_pictures.cache_clear()
    yield
    eyes.test_pictures.cache_clear()


@pytest.fixture
def draws(monkeypatch):
    """A run that ends after so many draws: `draws(2)`."""
    real = eyes.drawn

    def end_after(last):
        def some(first, *args):
            return (arrays for arrays, _ in zip(real(first, *args), range(first, last), strict=False))

        monkeypatch.setattr(eyes, "drawn", some)

    return end_after


def batch(index: int = 0) -> list[torch.Tensor]:
    return [torch.from_numpy(array)[None] for array in eyes.Drawn(0, 0)[index]]


@pytest.mark.parametrize("is_alone", [True, False])
def test_eyes_learn_a_picture_by_heart(is_alone, toy):
    torch.manual_seed(0)
    model = probes.Eyes(eyes.nano_config())
    views, tiles, letters, maps, counts, _ = batch()
    views, tiles = probes.towers_pixels(views, tiles)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        found = probes.losses_of(model(None if is_alone else views, tiles), letters, maps, counts)
        loss = sum(found.values())
        loss.backward()
        losses.append(loss.item())
        learnt = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    if is_alone:
        assert {name.rsplit("high_res_tower")[0] for name in learnt} == {
            "pheye.",
            "branch_heads.weight",
            "branch_heads.bias",
        }
    else:
        left_out = {name for name, _ in model.named_parameters()} - learnt
        assert all("post_layernorm" in name for name in left_out)  # Pheye takes the states before it


def test_a_run_that_was_stopped_ends_like_one_that_was_not(toy, draws, tmp_path, monkeypatch):
    monkeypatch.setattr(eyes, "accuracies", lambda *_: {})
    draws(2)
    eyes.train(tmp_path / "whole", 1e9, echoes=1)
    draws(1)
    eyes.train(tmp_path / "stopped", 1e9, echoes=1)
    assert json.loads((tmp_path / "stopped" / "log.jsonl").read_text())["step"] == 1
    draws(2)
    eyes.train(tmp_path / "stopped", 1e9, echoes=1)
    whole, stopped = (load_file(tmp_path / run / probes.WEIGHTS) for run in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    with pytest.raises(InputError, match="other settings: echoes was 1 and is now 3"):
        eyes.train(tmp_path / "stopped", 1e9, echoes=3)


def test_it_stops_when_its_minutes_are_over_and_scores_held_out_pictures(toy, tmp_path):
    eyes.train(tmp_path, 1e-9)
    [entry] = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert entry["pictures"] == 1 and 0 <= entry["letter"] <= 1 and 0 <= entry["branch_place"] <= 1


def test_a_pheye_with_these_weights_has_the_states_that_were_trained(toy, tmp_path):
    torch.manual_seed(0)
    model = probes.Eyes(eyes.nano_config()).eval()
    torch.nn.init.normal_(model.pheye.fusion_blocks[0].mlp_out.weight, std=0.1)
    without_lora = model(*probes.towers_pixels(*batch()[:2]))[1]
    for name, parameter in model.named_parameters():
        if "_lora." in name and name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.1)
    probes.save(tmp_path, model, (), 1)
    weights = load_file(tmp_path / probes.WEIGHTS)
    assert all(weight.dtype == torch.bfloat16 for weight in weights.values())
    whole = PheyeForConditionalGeneration(eyes.nano_config()).eval()
    lacking = whole.load_state_dict(weights, strict=False)
    assert not lacking.unexpected_keys
    assert not {name.split(".")[1] for name in lacking.missing_keys} & set(EYES)
    assert probes.begin_with(model, tmp_path / probes.WEIGHTS)
    views, tiles = probes.towers_pixels(*batch()[:2])
    with torch.no_grad():
        expected = model.heads(whole.pheye.encode_views(views, tiles).last_hidden_state[:, 1:])
        assert torch.equal(model(views, tiles)[1], expected)
        assert not torch.allclose(expected, without_lora, atol=0.1)


@pytest.mark.parametrize("branch", ["whole", "tiles", "none"])
def test_each_branch_trains_as_many_pictures_as_one_says(branch, toy, tmp_path):
    eyes.train(tmp_path, pictures=2, echoes=1, branch=branch)
    entry = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert entry["pictures"] == 2 and ("branch_letter" in entry) == (branch != "none")
    whole = PheyeForConditionalGeneration(eyes.nano_config(branch))
    lacking = whole.load_state_dict(load_file(tmp_path / probes.WEIGHTS), strict=False)
    assert not lacking.unexpected_keys
    assert not {name.split(".")[1] for name in lacking.missing_keys} & set(EYES)
    with pytest.raises(InputError, match="branch was"):
        eyes.train(tmp_path, pictures=3, echoes=1, branch={"whole": "none"}.get(branch, "whole"))


def test_a_start_may_lack_the_branch_but_not_the_tower(toy, tmp_path):
    model = probes.Eyes(eyes.nano_config())
    parts = model.parts()
    tower = {name: 1 + weight for name, weight in parts.items() if "vision_tower" in name}
    save_file(tower, tmp_path / "tower.safetensors")
    assert not probes.begin_with(model, tmp_path / "tower.safetensors")
    assert all(torch.equal(model.parts()[name], tower.get(name, weight)) for name, weight in parts.items())
    save_file({"pheye.other": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(
        InputError, match="lacks weights of fusion_blocks, global_lora, high_res_tower, local_lora, vision_tower"
    ):
        probes.begin_with(model, tmp_path / "other.safetensors")
    name = next(iter(tower))
    save_file({key: weight for key, weight in tower.items() if key != name}, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match="vision_tower"):
        probes.begin_with(model, tmp_path / "part.safetensors")
    lora = {key: 1 + weight for key, weight in parts.items() if "_lora." in key}
    save_file({**tower, **lora}, tmp_path / "lora.safetensors")
    assert not probes.begin_with(model, tmp_path / "lora.safetensors")
    assert all(torch.equal(model.parts()[key], weight) for key, weight in lora.items())
    save_file({**tower, name: torch.ones(7)}, tmp_path / "larger.safetensors")
    with pytest.raises(InputError, match=rf"{name} is \(7,\)"):
        probes.begin_with(model, tmp_path / "larger.safetensors")


def test_a_tower_that_reads_learns_at_a_tenth_of_the_rates(toy):
    model = probes.Eyes(eyes.nano_config())
    rates = {
        id(parameter): group["full_lr"]
        for optimizer in eyes.optimizers_of(model, eyes.READING)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert rates.keys() == {id(parameter) for parameter in model.parameters()}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and (".layers." in name or "high_res" in name or "fusion" in name)
        share = 0.1 if "vision_tower" in name or "_lora." in name else 1
        assert rates[id(parameter)] == pytest.approx(share * eyes.RATES[0 if is_matrix else 1]), name


# --- Data ---


def test_the_towers_see_what_the_processor_gives():
    picture, _ = eyes.picture_of(0, 0, True, 0.0)
    processor = PheyeImageProcessor(tiles_per_side=picture_labels.TILES, high_res_tile_size=TILE)
    expected = processor(picture.image, return_tensors="pt")
    views, tiles = probes.towers_pixels(*(torch.from_numpy(array)[None] for array in probes.pixels_of(picture)))
    assert torch.allclose(views, expected["pixel_values"], atol=1e-5)
    assert torch.allclose(tiles, expected["high_res_pixel_values"], atol=1e-5)


def test_views_and_tiles_get_the_same_colours_and_scenes_keep_theirs():
    colour = torch.tensor([10, 100, 200], dtype=torch.uint8)
    views, tiles = colour.expand(6, 10, 4, 4, 3), colour.expand(6, 9, 8, 8, 3)
    is_page = torch.arange(6) < 5
    given = eyes.prepared(views, tiles, is_page, torch.Generator().manual_seed(1), 0.5)
    plain = probes.towers_pixels(views, tiles)
    assert torch.equal(given[0][5], plain[0][5]) and torch.equal(given[1][5], plain[1][5])
    statistics = (
        (probes.OPENAI_CLIP_MEAN, probes.OPENAI_CLIP_STD),
        (probes.IMAGENET_DEFAULT_MEAN, probes.IMAGENET_DEFAULT_STD),
    )
    shown = [
        (255 * (pixels[:, 0, :, 0, 0] * torch.tensor(std) + torch.tensor(mean))).round()
        for pixels, (mean, std) in zip(given, statistics, strict=True)
    ]
    assert torch.equal(*shown) and len(shown[0].unique(dim=0)) > 1


def test_pictures_become_harder():
    easy = [eyes.picture_of(index, 0, False, eyes.ease_of(0)) for index in range(8)]
    assert all(is_page for _, is_page in easy)
    least = min(picture_labels.heights(picture).min() for picture, _ in easy)
    assert least > 0.75 * eyes.EASY_CAP_HEIGHT
    assert eyes.ease_of(eyes.HARD) == 0
    assert not any(eyes.picture_of(index, 0, True, 0.0)[1] for index in range(8))


class Knowing(torch.nn.Module):
    """Eyes that answer from the labels, and off the branch always wrong."""

    def __init__(self, labels):
        super().__init__()
        self.answer = torch.nn.Parameter(torch.zeros(1))
        letters = torch.from_numpy(labels.letters).flatten(2).transpose(1, 2).long().clamp(max=CLASSES - 1)
        maps = torch.from_numpy(labels.maps).flatten(2).transpose(1, 2).long()
        told = [torch.nn.functional.one_hot(letters, CLASSES).flatten(2)]
        for index, classes in enumerate(picture_labels.HEADS.values()):
            told.append(torch.nn.functional.one_hot(maps[..., index].clamp(max=classes - 1), classes))
        self.logits = torch.cat(told, -1).float()

    def forward(self, views, tiles):
        return -self.logits, self.logits, None


def test_accuracies_are_shares_of_what_is_told_right(toy):
    [(_, labels, crosses, _)] = eyes.test_pictures(0)
    labels.maps[:, -1] = 0
    labels.maps[0, -1, 5, 6], labels.maps[4, -1, 7, 8] = 1, 4
    found = eyes.accuracies(Knowing(labels), 0)
    for name in ("letter", "before", "after", "place", "remaining", "word", "sign"):
        assert found[name] == 1 and found[f"branch_{name}"] == 0
    assert found["centre"] == 1
    told = Knowing(labels)
    labels.maps[0, -1, 2, 3] = 2  # a third centre, of which these eyes do not know
    assert eyes.accuracies(told, 0)["centre"] == pytest.approx(2 / 3, abs=1e-4)
    assert ("place_crossing" in found) == bool(crosses[np.unique(labels.which[1:])[1:]].any())


def test_drawing_is_a_function_of_the_number(toy):
    one, other = (eyes.Drawn(0, eyes.HARD)[5] for _ in range(2))
    assert all(np.array_equal(first, second) for first, second in zip(one, other, strict=True))
    first = next(eyes.drawn(5, eyes.Drawn(0, eyes.HARD), 1, 0))
    assert all(np.array_equal(array[0].numpy(), known) for array, known in zip(first, one, strict=True))


def test_the_learning_rate_warms_up_and_falls_at_the_end():
    share = probes.learning_rate_share
    assert share(0, 0.0) == 1 / probes.WARMUP and share(10**6, 0.5) == 1 and share(10**6, 1.01) == 0
    assert share(10**6, 1 - probes.FALL / 2) == pytest.approx(0.5)
