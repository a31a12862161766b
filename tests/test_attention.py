import gc
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pheye import modeling_pheye
from pheye.common.command import InputError
from pheye.evaluation import attention
from pheye.evaluation.attention import (
    Answer,
    answer,
    draw_tiles,
    explain,
    heat_maps,
    main,
    read_samples,
    recording,
    split_words,
    to_pixels,
    token_attention,
    view_shares,
    word_attention,
)

from tiny import END, tiny_image, tiny_model, tiny_processor, tiny_tokenizer, tiny_vision_config

WIDE, TALL = (120, 37), (33, 110)


def force_attention(monkeypatch, weights):
    """Make every head of every block attend so; weights: (N,)."""

    def attend(module, query, key, value, mask, scaling, **kwargs):
        row = torch.as_tensor(weights, dtype=query.dtype).expand(*query.shape[:3], -1)  # (B, H, T, N)
        return torch.matmul(row, value).transpose(1, 2).contiguous(), row

    monkeypatch.setattr(modeling_pheye, "eager_attention", attend)


def one_hot(size, index):
    weights = np.zeros(size)
    weights[index] = 1
    return weights


# --- Pure functions ---


def test_share_per_view_is_the_sum_over_its_tokens():
    weights = np.random.default_rng(0).random((2, 3, 5 * 7))
    shares = view_shares(weights, 5)
    for block in range(2):
        for token in range(3):
            for view in range(5):
                expected = sum(weights[block, token, view * 7 + place] for place in range(7))
                assert shares[block, token, view] == pytest.approx(expected)


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


# --- Words ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" a cat", [("a", [0, 1]), ("cat", [2, 3, 4, 5])]),
        ("no\n\n 7 ", [("no", [0, 1]), ("7", [2, 3, 4, 5])]),
        (" é ñu", [("é", [0, 1, 2]), ("ñu", [3, 4, 5, 6])]),  # two bytes, and so two tokens, for é and ñ
        (f"yes{END}", [("yes", [0, 1, 2])]),
        (f" {END}", []),
        (END, []),
    ],
)
def test_tokens_are_joined_to_words(text, words):
    tokenizer = tiny_tokenizer()
    assert split_words(tokenizer, tokenizer(text)["input_ids"]) == words


def test_bytes_that_are_no_character_are_kept_in_their_word():
    tokenizer = tiny_tokenizer()
    broken = tokenizer("é")["input_ids"][:1]
    ids = [*tokenizer("ab")["input_ids"], *broken, *tokenizer(" c")["input_ids"]]
    assert split_words(tokenizer, ids) == [("ab\ufffd", [0, 1, 2]), ("c", [3, 4])]


def test_a_token_of_two_words_is_named_after_both():
    class Tokenizer:
        all_special_ids = []

        def decode(self, ids, **kwargs):
            return "".join([" New York", " is", " big"][index] for index in ids)

    assert split_words(Tokenizer(), [0, 1, 2]) == [("New York", [0]), ("is", [1]), ("big", [2])]


def test_attention_of_a_word_is_the_mean_over_its_tokens():
    weights = np.random.default_rng(0).random((6, 2, 5))
    found = Answer("one two", [("one", [0, 1, 2]), ("two", [3, 4])], iter(weights))  # the last token ends the text
    (one, count, first), (two, _, second) = word_attention(found)
    assert (one, count, two) == ("one", 3, "two")
    assert first == pytest.approx(weights[:3].mean(0))
    assert second == pytest.approx(weights[3:5].mean(0))


# --- The model's attention ---


@pytest.mark.parametrize("chunk", [3, 16])
def test_attention_is_that_of_the_positions_that_predict_the_answer(monkeypatch, model, processor, chunk):
    monkeypatch.setattr(attention, "CHUNK", chunk)
    prompt = processor.apply_chat_template([{"role": "user", "content": "What?"}], add_generation_prompt=True)
    inputs = processor(images=tiny_image(), text=prompt, return_tensors="pt")
    ids = torch.randint(1, 257, (1, 10), generator=torch.Generator().manual_seed(1))
    image = model.get_image_features(inputs["pixel_values"]).last_hidden_state
    found = np.stack(list(token_attention(model, inputs["input_ids"], image, ids)))  # (T, L, N)

    whole = torch.cat([inputs["input_ids"], ids], dim=1)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            outputs = model(whole, pixel_values=inputs["pixel_values"], output_attentions=True, use_cache=False)
    finally:
        model.set_attn_implementation("sdpa")
    first = inputs["input_ids"].shape[1] - 1
    expected = [block[0, :, first:-1].mean(0).numpy() for block in outputs.cross_attentions]  # (T, N) each
    assert found == pytest.approx(np.stack(expected, axis=1), abs=1e-6)
    assert found.std() > 1e-4  # not merely the same everywhere
    assert found.sum(-1) == pytest.approx(1, abs=1e-5)


def test_the_answer_is_that_of_generate(model, processor):
    prompt = processor.apply_chat_template([{"role": "user", "content": "What?"}], add_generation_prompt=True)
    inputs = processor(images=tiny_image(), text=prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    expected = processor.post_process_image_text_to_text(ids)[0].strip()
    found = answer(model, processor, tiny_image(), "What?", 8)
    assert found.text == expected
    assert " ".join(word for word, _ in found.words) == " ".join(expected.split())


def test_recording_leaves_the_model_as_it_was(model, processor):
    model.set_attn_implementation("sdpa")
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), recording(model):
        assert model.config._attn_implementation == "eager"
        assert model.config.text_config._attn_implementation == "sdpa"
        assert model.config.vision_config._attn_implementation == "sdpa"
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sdpa"
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_no_weights_per_head_outlive_their_block_and_no_pass_is_longer_than_a_chunk(monkeypatch):
    model = tiny_model(cross_attention_interval=1)  # more blocks than heads, so that sizes tell what a tensor is
    original, seen = modeling_pheye.eager_attention, []
    monkeypatch.setattr(attention, "CHUNK", 4)

    def spy(module, query, *args, **kwargs):
        heads, length = query.shape[1:3]
        size = heads * length * model.config.tokens_per_image
        seen.append((length, sum(type(x) is torch.Tensor and x.numel() == size for x in gc.get_objects())))
        return original(module, query, *args, **kwargs)

    ids = torch.randint(1, 257, (1, 11), generator=torch.Generator().manual_seed(1))
    image = torch.randn(1, model.config.tokens_per_image, 32)
    monkeypatch.setattr(modeling_pheye, "eager_attention", spy)
    for _ in token_attention(model, torch.tensor([[5, 6, 7]]), image, ids):
        pass
    assert seen == [(length, 0) for length in (4, 4, 3) for _ in range(4)]


@pytest.mark.parametrize("size", [WIDE, TALL])
@pytest.mark.parametrize("place", [(0.8, 0.15), (0.3, 0.9), (0.55, 0.6)])
def test_attention_on_the_patches_that_show_a_spot_peaks_at_the_spots_pixels(monkeypatch, size, place):
    """The patches come from the processor's own pixels, so that order, stretch and places of crops are put to test."""
    tiles, patches = 3, 4
    model = tiny_model(tiles_per_side=tiles, vision_config=tiny_vision_config(patch_size=8))
    processor = tiny_processor(model.config)
    width, height = size
    centre = int(place[0] * width), int(place[1] * height)
    picture = Image.new("RGB", size)
    half_width, half_height = max(1, width // 30), max(1, height // 30)
    spot = (centre[0] - half_width, centre[1] - half_height, centre[0] + half_width + 1, centre[1] + half_height + 1)
    picture.paste("white", spot)
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"][0].mean(1)  # (V, 32, 32)
    brightness = pixels.unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2)).flatten(1)  # (V, 16)
    in_crops = torch.argmax(brightness[1:])
    view, patch = 1 + in_crops // patches**2, in_crops % patches**2
    tokens = model.config.tokens_per_view
    weights = 0.25 * one_hot(model.config.tokens_per_image, 1 + int(brightness[0].argmax()))
    weights += 0.75 * one_hot(model.config.tokens_per_image, int(view * tokens + 1 + patch))
    force_attention(monkeypatch, weights)

    found = answer(model, processor, picture, "What?", 2)
    _, _, attended = next(word_attention(found))
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
    picture, result = explain(model, processor, tiny_image(), "What?", 6)
    views, blocks = config.views_per_image, len(config.cross_attention_layers)
    assert result["views"] == ["global", "column 1 row 1", "column 1 row 2", "column 2 row 1", "column 2 row 2"]
    assert result["layers"] == [1, 3]
    for entry in (result["overall"], *result["words"]):
        assert entry["by_view"] == pytest.approx([1 / views] * views, abs=1e-5)
        assert np.array(entry["by_block"]) == pytest.approx(np.full((blocks, views), 1 / views), abs=1e-5)
    assert result["words"][0]["unplaced"] == pytest.approx(1 / config.tokens_per_view, abs=1e-5)
    assert picture.width > 0 and json.dumps(result)


def test_overall_share_is_the_mean_over_tokens(model, processor, monkeypatch):
    rng = np.random.default_rng(0)
    weights = rng.random((5, 2, model.config.tokens_per_image))
    weights /= weights.sum(-1, keepdims=True)
    found = Answer("one two", [("one", [0]), ("two", [1, 2, 3, 4])], iter(weights))
    monkeypatch.setattr(attention, "answer", lambda *args: found)
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
    monkeypatch.setattr(attention, "answer", lambda *args: Answer("text", words, iter(weights)))
    drawn = []
    original = attention.draw_heat

    def draw_heat(picture, heat):
        drawn.append((picture.size, heat.argmax()))
        return original(picture, heat)

    monkeypatch.setattr(attention, "draw_heat", draw_heat)
    canvas, _ = explain(model, processor, tiny_image(width=200, height=100), "What?")
    assert [place for _, place in drawn] == [3, 0] * 7  # last patch of the global view, first of the first crop
    width, height = drawn[0][0]
    assert width / height == pytest.approx(2, rel=0.02)  # as the picture, not as the square views
    pixels = np.asarray(canvas).astype(int)
    yellow = (pixels[..., 0] > 200) & (pixels[..., 1] > 150) & (pixels[..., 2] < 180)
    last_rows = np.nonzero(yellow.any(1))[0].max()
    assert canvas.height - height < last_rows < canvas.height


def test_a_long_answer_is_drawn_in_part_and_counted_in_full(model, processor, monkeypatch):
    words = [(f"word{index}", [index]) for index in range(attention.DRAWN_WORDS + 1)]
    sizes = []
    for count in (len(words) - 1, len(words)):
        weights = iter(np.full((count, 2, model.config.tokens_per_image), 1 / model.config.tokens_per_image))
        found = Answer("text", words[:count], weights)
        monkeypatch.setattr(attention, "answer", lambda *args, found=found: found)
        canvas, result = explain(model, processor, tiny_image(), "What?")
        sizes.append(canvas.size)
        assert len(result["words"]) == count
    assert sizes[0] == sizes[1]


def test_an_answer_without_words_gives_the_crops_alone(model, processor, monkeypatch):
    monkeypatch.setattr(attention, "answer", lambda *args: Answer("", [], iter([])))
    canvas, result = explain(model, processor, tiny_image(width=300, height=200), "What?")
    assert canvas.height == pytest.approx(draw_tiles(tiny_image(width=300, height=200), 2, 400).height, abs=40)
    assert (result["words"], result["overall"]) == ([], None)


@pytest.mark.parametrize("size", [WIDE, TALL])
def test_the_grid_is_drawn_in_the_pictures_own_shape(size):
    canvas = draw_tiles(Image.new("RGB", size), 2, side=200)
    assert canvas.width / canvas.height == pytest.approx(size[0] / size[1], rel=0.05)
    red = (np.asarray(canvas)[..., 0] > 200).mean(0)
    assert red[canvas.width // 2] == pytest.approx(1, abs=0.05)  # the line between the columns
    assert red[canvas.width // 4] < 0.5


# --- Figure 4 ---


def samples_file(folder, rows):
    for index, row in enumerate(rows):
        name = f"{index}.png"
        tiny_image(index, 20, 20).save(folder / name)
        rows[index] = {"image": name, "prompt": f"question {index}", **row}
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_mean_share_of_the_global_view_per_block_and_tertile(monkeypatch, tmp_path, model, model_folder):
    areas = [0.5, 0.1, 0.2, 0.05, 0.9, 0.7, 0.6]
    path = samples_file(tmp_path, [{"boxes_area": area} for area in areas])
    shares = np.random.default_rng(0).random((7, 3, 2))  # (samples, tokens, blocks)
    size, tokens = model.config.tokens_per_image, model.config.tokens_per_view

    def fake_answer(model, processor, picture, prompt, max_new_tokens):
        index = int(prompt.split()[1])
        if index == 6:
            return Answer("", [], iter([]))
        weights = shares[index][..., None] * one_hot(size, 2) + (1 - shares[index][..., None]) * one_hot(size, tokens)
        return Answer("a b", [("a", [0]), ("b", [1, 2])], iter(weights))

    monkeypatch.setattr(attention, "answer", fake_answer)
    output = tmp_path / "figure" / "share.png"
    assert main(["--model", str(model_folder), "--data", str(path), "--output", str(output), "--device", "cpu"]) == 0
    result = json.loads(output.with_suffix(".json").read_text())
    groups = {"small": [3, 1, 2], "medium": [0], "large": [5, 4]}  # the last sample of the middle had no words
    assert [group["tertile"] for group in result["tertiles"]] == list(groups)
    for group, members in zip(result["tertiles"], groups.values(), strict=True):
        assert group["samples"] == len(members)
        assert group["global_share"] == pytest.approx(shares[members].mean((0, 1)), abs=1e-6)
    assert result["left_out"] == [{"line": 7, "error": "The answer has no words."}]
    assert Image.open(output).width > 300


def test_tertiles_may_be_given_or_left_out(tmp_path):
    given = read_samples(samples_file(tmp_path, [{"tertile": "large"}, {"tertile": "small"}]))
    assert [sample["tertile"] for sample in given] == ["large", "small"]
    plain = read_samples(samples_file(tmp_path, [{}]))
    assert plain[0]["tertile"] is None
    assert plain[0]["image"] == tmp_path / "0.png"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": ""}], "no `prompt`"),
        ([{"image": 5}], "no `image`"),
        ([{"image": "none.png"}], r"no image .*none\.png"),
        ([{"boxes_area": 0.1}, {}], "Line 2 .* has no `boxes_area`, but line 1 has"),
        ([{"boxes_area": 12}] * 3, "boxes_area is 12"),
        ([{"boxes_area": 0.1}] * 2, "at least 3"),
        ([{"tertile": "tiny"}], "'tiny', not one of small, medium, large"),
    ],
)
def test_samples_that_cannot_be_used_are_refused(tmp_path, rows, message):
    path = samples_file(tmp_path, rows)
    with pytest.raises(InputError, match=message):
        read_samples(path)


# --- Command ---


def test_command_draws_one_picture(tmp_path, model_folder, capsys):
    tiny_image().save(tmp_path / "photo.jpg")
    output = tmp_path / "out" / "attention.png"
    arguments = ["--image", str(tmp_path / "photo.jpg"), "--prompt", "What is it?", "--max_new_tokens", "5"]
    assert main(["--model", str(model_folder), *arguments, "--output", str(output), "--device", "cpu"]) == 0
    result = json.loads(output.with_suffix(".json").read_text())
    assert Image.open(output).width > 300
    assert (result["prompt"], result["model"]) == ("What is it?", str(model_folder))
    assert result["answer"] in capsys.readouterr().out
    for word in result["words"]:
        assert np.array(word["by_block"]).sum(1) == pytest.approx(1, abs=1e-4)


def test_command_draws_the_figure_and_goes_on_after_a_broken_image(tmp_path, model_folder):
    path = samples_file(tmp_path, [{}, {}, {}])
    (tmp_path / "1.png").write_bytes(b"broken")
    output = tmp_path / "share.png"
    arguments = ["--data", str(path), "--max_new_tokens", "3", "--output", str(output), "--device", "cpu"]
    assert main(["--model", str(model_folder), *arguments]) == 0
    result = json.loads(output.with_suffix(".json").read_text())
    assert [(group["tertile"], group["samples"]) for group in result["tertiles"]] == [("all", 2)]
    assert all(0 < share < 1 for share in result["tertiles"][0]["global_share"])
    assert [entry["line"] for entry in result["left_out"]] == [2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "a.png"], "--image and --prompt, or --data"),
        (["--prompt", "What?"], "--image and --prompt, or --data"),
        (["--image", "a.png", "--prompt", "What?", "--data", "b.jsonl"], "--image and --prompt, or --data"),
        (["--image", "a.png", "--prompt", " "], "--prompt is empty"),
        (["--data", "b.jsonl", "--output", "out.jpg"], "must end in .png"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["--model", "none", "--output", "out.png", *arguments])
    assert message in capsys.readouterr().err


def test_command_stops_before_it_loads_a_model(tmp_path, monkeypatch, capsys):
    tiny_image().save(tmp_path / "0.png")
    common = ["--model", str(tmp_path / "no-model"), "--output", str(tmp_path / "out.png")]
    assert main([*common, "--image", str(tmp_path / "none.png"), "--prompt", "What?"]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main([*common, "--data", str(tmp_path / "none.jsonl")]) == 1
    assert "There is no file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*common, "--data", str(samples_file(tmp_path, [{}]))]) == 1
    assert 'pip install "pheye[eval]"' in capsys.readouterr().err
