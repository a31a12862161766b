"""Heat maps: each weight at the pixels that it is about."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from pheye import PheyeForConditionalGeneration, blocks_pheye
from pheye.evaluation import heatmaps
from pheye.evaluation.heatmaps import (
    COLUMN_LABEL,
    ROW_LABEL,
    draw_crops,
    draw_heat,
    explain,
    heat_maps,
    to_pixels,
)
from pheye.evaluation.word_attention import AttendedAnswer, answer_with_attention, attention_by_word

from tiny import randomize, tiny_config, tiny_image, tiny_model, tiny_processor, tiny_vision_config

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


@pytest.mark.parametrize(("tiles", "patches", "extra"), [(1, 4, 1), (2, 3, 0), (3, 2, 5)])
def test_each_patch_has_its_weight_at_its_place(tiles, patches, extra):
    tokens = extra + patches**2
    weights = np.random.default_rng(tiles).random((1 + tiles**2) * tokens)
    global_map, crop_map = heat_maps(weights, (tiles, tiles), patches)
    assert (global_map.shape, crop_map.shape) == ((patches, patches), (tiles * patches, tiles * patches))
    for y in range(patches):
        for x in range(patches):
            assert global_map[y, x] == weights[extra + y * patches + x]
            for column in range(tiles):
                for row in range(tiles):
                    view = 1 + column * tiles + row  # column by column
                    found = crop_map[row * patches + y, column * patches + x]
                    assert found == weights[view * tokens + extra + y * patches + x]


@pytest.mark.parametrize("size", [WIDE, TALL])
@pytest.mark.parametrize("cells", [1, 4, 12])
def test_maps_are_smooth_as_torch_enlarges_them(size, cells):
    heat = np.random.default_rng(0).random((cells, cells)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.tensor(heat)[None, None], size[::-1], mode="bilinear")[0, 0]
    assert to_pixels(heat, size) == pytest.approx(expected.numpy(), abs=1e-5)


def test_where_patches_are_smaller_than_pixels_none_is_left_out():
    heat = np.zeros((64, 64))
    heat[21, 42] = 1
    small = to_pixels(heat, (8, 8))
    assert small.sum() == pytest.approx(1 / 64, rel=0.1)
    assert np.unravel_index(small.argmax(), small.shape) == (2, 5)


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
    for heat, cells, share in zip(
        heat_maps(attended.mean(0), (tiles, tiles), patches), (4, 12), (0.25, 0.75), strict=True
    ):
        assert heat.max() == pytest.approx(share)
        row, column = np.unravel_index(to_pixels(heat, size).argmax(), size[::-1])
        # The centre of the brightest patch, which holds a part of the spot.
        assert spot[0] - width / cells / 2 - 1 <= column <= spot[2] + width / cells / 2
        assert spot[1] - height / cells / 2 - 1 <= row <= spot[3] + height / cells / 2


@pytest.mark.parametrize("size", [WIDE, TALL])
@pytest.mark.parametrize("place", [(0.8, 0.15), (0.3, 0.9), (0.55, 0.6)])
def test_on_a_canvas_the_same_pixels_are_found_and_what_lies_around_the_image_is_left_out(monkeypatch, size, place):
    config = tiny_config(canvases=[[1, 3], [3, 1]], vision_config=tiny_vision_config(patch_size=8))
    model = randomize(PheyeForConditionalGeneration(config)).eval()
    processor = tiny_processor(config)
    image, side = Image.new("RGB", size), size[0] // 12
    centre = int(place[0] * size[0]), int(place[1] * size[1])
    image.paste("white", (centre[0] - 3, centre[1] - 3, centre[0] + 4, centre[1] + 4))
    where = processor.image_processor.place_of(image)
    grid, shares = (where.rows, where.columns), where.shares((32, 32))
    assert grid == ((1, 3) if size == WIDE else (3, 1)) and shares != (0, 0, 1, 1)
    pixels = processor(images=image, text="a", return_tensors="pt")["pixel_values"][0].mean(1)  # (V, 32, 32)
    brightness = pixels.unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2)).flatten(1)  # (V, 16)
    weights = np.zeros((4, config.tokens_per_view))
    weights[0, 1 + brightness[0].argmax()] = 0.25
    view, patch = divmod(int(brightness[1:].argmax()), 16)
    weights[1 + view, 1 + patch] = 0.75
    force_attention(monkeypatch, weights.flatten())
    found = answer_with_attention(model, processor, image, "What?", 2)
    _, _, attended = next(attention_by_word(found))
    for heat, patch_size in zip(heat_maps(attended.mean(0), grid, 4), (max(size) / 4, max(size) / 12), strict=True):
        row, column = np.unravel_index(to_pixels(heat, size, shares).argmax(), size[::-1])
        assert abs(column - centre[0]) <= patch_size + side and abs(row - centre[1]) <= patch_size + side
    drawing, result = explain(model, processor, image, "What?", 2)
    assert len(result["views"]) == 4 and drawing.width > 100


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

    def draw_heat(image, heat, shares):
        drawn.append((image.size, heat.argmax()))
        return original(image, heat, shares)

    monkeypatch.setattr(heatmaps, "draw_heat", draw_heat)
    canvas, _ = explain(model, processor, tiny_image(width=200, height=100), "What?")
    assert [place for _, place in drawn] == [3, 0] * 7  # last patch of the global view, first of the first crop
    width, height = drawn[0][0]
    assert width / height == pytest.approx(2, rel=0.02)  # as the image, not as the square views
    pixels = np.asarray(canvas).astype(int)
    yellow = (pixels[..., 0] > 190) & (pixels[..., 1] > 150) & (pixels[..., 2] < 140)
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
    assert canvas.height == pytest.approx(
        draw_crops(tiny_image(width=300, height=200), (2, 2), side=400).height, abs=40
    )
    assert (result["words"], result["overall"]) == ([], None)


# --- Fit to be shown ---


@pytest.mark.parametrize("size", [WIDE, TALL])
@pytest.mark.parametrize("colour", ["black", "white", "red", (127, 127, 127)])
def test_lines_between_crops_are_thin_seen_on_anything_and_all_that_lies_on_the_image(size, colour):
    image = Image.new("RGB", size, colour)
    drawn = np.asarray(draw_crops(image, (3, 3), side=240)).astype(int)[COLUMN_LABEL:, ROW_LABEL:]
    height, width = drawn.shape[:2]
    assert width / height == pytest.approx(size[0] / size[1], rel=0.05)
    changed = (drawn != np.asarray(image)[0, 0]).any(-1)  # (height, width)
    columns, rows = np.nonzero(changed.mean(0) > 0.9)[0], np.nonzero(changed.mean(1) > 0.9)[0]
    for found, length in ((columns, width), (rows, height)):
        assert 2 <= len(found) <= 2 * 3
        for third in (1, 2):
            assert np.abs(found - third * length / 3).min() <= 1
    assert not np.delete(np.delete(changed, columns, 1), rows, 0).any()
    line = drawn[:, columns].reshape(-1, 3).sum(-1)
    beside = drawn[0, 0].sum()
    assert max(abs(line - beside)) > 150  # all of white, or of the dark beside it


def test_columns_and_rows_are_named_beside_the_image():
    drawn = np.asarray(draw_crops(Image.new("RGB", (300, 300), "black"), (3, 3), side=300)).astype(int)
    for label in (drawn[:COLUMN_LABEL, ROW_LABEL:], drawn[COLUMN_LABEL:, :ROW_LABEL]):
        assert label.min() < 100 < label.max()
    assert drawn[:COLUMN_LABEL, :ROW_LABEL].min() == 255


def photograph(low: int, high: int) -> Image.Image:
    """Mostly from `low` to `high`, with a light in it."""
    pixels = np.random.default_rng(0).integers(low, high, (60, 80)).astype(np.uint8)
    pixels[:3, :3] = 255
    return Image.fromarray(pixels).convert("RGB")


@pytest.mark.parametrize(("low", "high"), [(0, 12), (0, 60), (200, 256), (0, 256)])
def test_an_image_can_be_seen_under_its_heat_however_dark_it_is(low, high):
    image = photograph(low, high)
    heat = np.zeros((4, 4))
    heat[:, 0] = 1
    drawn = np.asarray(draw_heat(image, heat).convert("L")).astype(int)
    plain = np.asarray(image.convert("L")).astype(int)
    for part, least in ((np.s_[:, 40:], 25), (np.s_[5:, :8], 8)):  # where no attention is, and under the most
        assert drawn[part].std() > least
        assert np.corrcoef(drawn[part].ravel(), plain[part].ravel())[0, 1] > 0.8
    assert 90 < np.median(drawn[:, 40:]) < 190


def test_an_even_image_is_gray_where_no_attention_is():
    drawn = np.asarray(draw_heat(Image.new("RGB", (40, 40)), np.eye(2)))
    assert drawn[1, 38].tolist() == pytest.approx([142] * 3, abs=2)


def test_an_answer_that_was_cut_ends_in_an_ellipsis_in_the_drawing_alone(model, processor, monkeypatch):
    def text(self, place, words, **kwargs):
        drawn.append(words)
        return original(self, place, words, **kwargs)

    drawn, original = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    for is_cut in (False, True):
        words = [("a-word-of-very-many-letters", [0])]
        weights = np.full((1, 2, model.config.tokens_per_image), 1 / model.config.tokens_per_image)
        found = AttendedAnswer("so long", words, iter(weights), is_cut)
        monkeypatch.setattr(heatmaps, "answer_with_attention", lambda *args, found=found: found)
        drawn.clear()
        _, result = explain(model, processor, tiny_image(), "What?")
        assert any("so long …" in text for text in drawn) == is_cut
        assert any(text.startswith("a-word-of-very-many…") for text in drawn)
        assert (result["answer"], result["words"][0]["word"]) == ("so long", "a-word-of-very-many-letters")


def test_an_answer_knows_whether_it_was_cut(model, processor):
    for count in (1, 200):
        found = answer_with_attention(model, processor, tiny_image(), "What?", count)
        assert found.is_cut == (len(list(found.attention)) == count)
