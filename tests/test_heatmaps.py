"""Heat maps: each weight at the pixels that it is about."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pheye import blocks_pheye
from pheye.evaluation import heatmaps
from pheye.evaluation.heatmaps import (
    draw_crops,
    explain,
    heat_maps,
    to_pixels,
)
from pheye.evaluation.word_attention import AttendedAnswer, answer_with_attention, attention_by_word

from tiny import tiny_image, tiny_model, tiny_processor, tiny_vision_config

WIDE, TALL = (120, 37), (33, 110)


def force_attention(monkeypatch, weights):
    """Make every head of every block attend so; weights: (N,)."""

    def attend(module, query, key, value, mask, scaling, **kwargs):
        row = torch.as_tensor(weights, dtype=query.dtype).expand(*query.shape[:3], -1)  # (B, H, T, N)
        return torch.matmul(row, value).transpose(1, 2).contiguous(), row

    monkeypatch.setattr(blocks_pheye, "eager_attention", attend)


def one_hot(size, index):
    weights = np.zeros(size)
    weights[index] = 1
    return weights


@pytest.mark.parametrize("size", [WIDE, TALL])
@pytest.mark.parametrize(("tiles", "patches", "extra"), [(1, 4, 1), (2, 3, 0), (3, 2, 5)])
def test_each_pixel_gets_the_weight_of_the_patch_it_lies_in(size, tiles, patches, extra):
    tokens = extra + patches**2
    weights = np.random.default_rng(tiles).random((1 + tiles**2) * tokens)
    global_map, crop_map = (to_pixels(heat, size) for heat in heat_maps(weights, tiles, patches))
    width, height = size
    assert global_map.shape == crop_map.shape == (height, width)
    for y in range(height):
        for x in range(width):
            u, v = (x + 0.5) / width, (y + 0.5) / height
            patch = int(v * patches) * patches + int(u * patches)
            assert global_map[y, x] == np.float32(weights[extra + patch])
            column, row = int(u * tiles), int(v * tiles)
            patch = int((v * tiles - row) * patches) * patches + int((u * tiles - column) * patches)
            view = 1 + column * tiles + row  # column by column
            assert crop_map[y, x] == np.float32(weights[view * tokens + extra + patch])


def test_where_patches_are_smaller_than_pixels_their_mean_counts():
    heat = np.arange(16.0).reshape(4, 4)
    assert np.array_equal(to_pixels(heat, (2, 2)), heat.reshape(2, 2, 2, 2).mean((1, 3)))


@pytest.mark.parametrize("size", [WIDE, TALL])
@pytest.mark.parametrize("place", [(0.8, 0.15), (0.3, 0.9), (0.55, 0.6)])
def test_attention_on_the_patches_that_show_a_spot_peaks_at_the_spots_pixels(monkeypatch, size, place):
    """The patches come from the processor's own pixels, so that order, stretch and places of crops are put to test."""
    tiles, patches = 3, 4
    model = tiny_model(tiles_per_side=tiles, vision_config=tiny_vision_config(patch_size=8))
    processor = tiny_processor(model.config)
    width, height = size
    centre = int(place[0] * width), int(place[1] * height)
    image = Image.new("RGB", size)
    half_width, half_height = max(1, width // 30), max(1, height // 30)
    spot = (centre[0] - half_width, centre[1] - half_height, centre[0] + half_width + 1, centre[1] + half_height + 1)
    image.paste("white", spot)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"][0].mean(1)  # (V, 32, 32)
    brightness = pixels.unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2)).flatten(1)  # (V, 16)
    in_crops = torch.argmax(brightness[1:])
    view, patch = 1 + in_crops // patches**2, in_crops % patches**2
    tokens = model.config.tokens_per_view
    weights = 0.25 * one_hot(model.config.tokens_per_image, 1 + int(brightness[0].argmax()))
    weights += 0.75 * one_hot(model.config.tokens_per_image, int(view * tokens + 1 + patch))
    force_attention(monkeypatch, weights)

    found = answer_with_attention(model, processor, image, "What?", 2)
    _, _, attended = next(attention_by_word(found))
    for heat, cells, share in zip(heat_maps(attended.mean(0), tiles, patches), (4, 12), (0.25, 0.75), strict=True):
        heat = to_pixels(heat, size)
        rows, columns = np.nonzero(heat == heat.max())
        assert heat.max() == pytest.approx(share)
        assert len(rows) < (width / cells + 1) * (height / cells + 1)  # one patch
        # The brightest patch holds a part of the spot.
        assert columns.min() < spot[2] and columns.max() >= spot[0]
        assert rows.min() < spot[3] and rows.max() >= spot[1]


# --- The drawing and its numbers ---


def test_shares_of_even_attention_are_those_of_the_tokens(monkeypatch, model, processor):
    config = model.config
    force_attention(monkeypatch, np.full(config.tokens_per_image, 1 / config.tokens_per_image))
    canvas, result = explain(model, processor, tiny_image(), "What?", 6)
    views, blocks = config.views_per_image, len(config.cross_attention_layers)
    assert result["views"] == ["global", "column 1 row 1", "column 1 row 2", "column 2 row 1", "column 2 row 2"]
    assert result["layers"] == [1, 3]
    for entry in (result["overall"], *result["words"]):
        assert entry["by_view"] == pytest.approx([1 / views] * views, abs=1e-5)
        assert np.array(entry["by_block"]) == pytest.approx(np.full((blocks, views), 1 / views), abs=1e-5)
    assert result["words"][0]["unplaced"] == pytest.approx(1 / config.tokens_per_view, abs=1e-5)
    assert canvas.width > 0 and json.dumps(result)


def test_overall_share_is_the_mean_over_tokens(model, processor, monkeypatch):
    rng = np.random.default_rng(0)
    weights = rng.random((5, 2, model.config.tokens_per_image))
    weights /= weights.sum(-1, keepdims=True)
    found = AttendedAnswer("one two", [("one", [0]), ("two", [1, 2, 3, 4])], iter(weights))
    monkeypatch.setattr(heatmaps, "answer_with_attention", lambda *args: found)
    _, result = explain(model, processor, tiny_image(), "What?")
    expected = weights.mean(0).reshape(2, 5, -1).sum(-1)
    assert np.array(result["overall"]["by_block"]) == pytest.approx(expected, abs=1e-6)
    assert result["overall"]["by_view"] == pytest.approx(expected.mean(0), abs=1e-6)
    assert [word["tokens"] for word in result["words"]] == [1, 4]
    first = weights[0].reshape(2, 5, -1).sum(-1)
    assert np.array(result["words"][0]["by_block"]) == pytest.approx(first, abs=1e-6)


def test_every_word_gets_its_heat_maps(model, processor, monkeypatch):
    size = model.config.tokens_per_image
    tokens = model.config.tokens_per_view
    words = [(f"word{index}", [index]) for index in range(7)]
    weights = [np.tile(one_hot(size, tokens + 1) + one_hot(size, 4), (2, 1)) / 2 for _ in words]
    monkeypatch.setattr(heatmaps, "answer_with_attention", lambda *args: AttendedAnswer("text", words, iter(weights)))
    drawn = []
    original = heatmaps.draw_heat

    def draw_heat(image, heat):
        drawn.append((image.size, heat.argmax()))
        return original(image, heat)

    monkeypatch.setattr(heatmaps, "draw_heat", draw_heat)
    canvas, _ = explain(model, processor, tiny_image(width=200, height=100), "What?")
    assert [place for _, place in drawn] == [3, 0] * 7  # last patch of the global view, first of the first crop
    width, height = drawn[0][0]
    assert width / height == pytest.approx(2, rel=0.02)  # as the image, not as the square views
    pixels = np.asarray(canvas).astype(int)
    yellow = (pixels[..., 0] > 200) & (pixels[..., 1] > 150) & (pixels[..., 2] < 180)
    last_rows = np.nonzero(yellow.any(1))[0].max()
    assert canvas.height - height < last_rows < canvas.height


def test_a_long_answer_is_drawn_in_part_and_counted_in_full(model, processor, monkeypatch):
    words = [(f"word{index}", [index]) for index in range(heatmaps.DRAWN_WORDS + 1)]
    sizes = []
    for count in (len(words) - 1, len(words)):
        weights = iter(np.full((count, 2, model.config.tokens_per_image), 1 / model.config.tokens_per_image))
        found = AttendedAnswer("text", words[:count], weights)
        monkeypatch.setattr(heatmaps, "answer_with_attention", lambda *args, found=found: found)
        canvas, result = explain(model, processor, tiny_image(), "What?")
        sizes.append(canvas.size)
        assert len(result["words"]) == count
    assert sizes[0] == sizes[1]


def test_an_answer_without_words_gives_the_crops_alone(model, processor, monkeypatch):
    monkeypatch.setattr(heatmaps, "answer_with_attention", lambda *args: AttendedAnswer("", [], iter([])))
    canvas, result = explain(model, processor, tiny_image(width=300, height=200), "What?")
    assert canvas.height == pytest.approx(draw_crops(tiny_image(width=300, height=200), 2, 400).height, abs=40)
    assert (result["words"], result["overall"]) == ([], None)


@pytest.mark.parametrize("size", [WIDE, TALL])
def test_the_grid_is_drawn_in_the_images_own_shape(size):
    canvas = draw_crops(Image.new("RGB", size), 2, side=200)
    assert canvas.width / canvas.height == pytest.approx(size[0] / size[1], rel=0.05)
    red = (np.asarray(canvas)[..., 0] > 200).mean(0)
    assert red[canvas.width // 2] == pytest.approx(1, abs=0.05)  # the line between the columns
    assert red[canvas.width // 4] < 0.5
