"""Canvases: geometry against slow loops, and images of several shapes, several images and none in one batch."""

import functools
import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import ConvNextConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from pheye import PheyeConfig, PheyeForConditionalGeneration, PheyeImageProcessor
from pheye.canvases_pheye import cells, choose_canvas, crop_boxes, fit, scale, view_table
from pheye.configuration_pheye import CANVASES, read_canvases
from pheye.image_processing_pheye import cut_views, resize
from pheye.layers_pheye import CACHE
from pheye.vision_pheye import join_tiles, view_maps

from tiny import randomize, tiny_config, tiny_image, tiny_pixels, tiny_text, tiny_vision_config

FILA = [[1, 2], [2, 1], [2, 2], [1, 3], [3, 1]]
MODEL = [[1, 2], [2, 2], [3, 1]]


def canvas_config(**kwargs) -> PheyeConfig:
    return tiny_config(**{"canvases": MODEL, "max_images": 2, **kwargs})


def canvas_model(seed: int = 0, **kwargs) -> PheyeForConditionalGeneration:
    return randomize(PheyeForConditionalGeneration(canvas_config(**kwargs)), seed).eval()


def canvas_processor(**kwargs) -> PheyeImageProcessor:
    return PheyeImageProcessor(**{"canvases": MODEL, "max_images": 2, "size": {"height": 32, "width": 32}, **kwargs})


# --- Geometry ---


@pytest.mark.parametrize(
    ("size", "canvas"),
    [
        ((640, 480), (2, 2)),
        ((1920, 1080), (2, 2)),
        ((1240, 1754), (2, 2)),
        ((2000, 500), (1, 3)),
        ((100, 100), (1, 2)),
        ((5000, 1), (1, 2)),
        ((1, 5000), (1, 2)),
        ((1, 1), (1, 2)),
    ],
)
def test_canvases_chosen_at_224_pixels_are_those_of_the_specification(size, canvas):
    assert choose_canvas(*size, FILA, (224, 224)) == canvas


def slow_fit(width, height, canvas_width, canvas_height):
    """The largest size with the aspect ratio, tried pixel by pixel."""
    best = None
    for new_width in range(1, canvas_width + 1):
        new_height = max(1, round(height * new_width / width))
        if new_height <= canvas_height:
            best = new_width, new_height
    return best


@pytest.mark.parametrize("size", [(64, 48), (190, 108), (21, 29), (500, 7), (10, 10), (3, 50), (1, 1)])
@pytest.mark.parametrize("canvas", [(64, 32), (32, 64), (64, 64), (96, 32)])
def test_an_image_fills_its_canvas_as_far_as_its_shape_allows(size, canvas):
    left, top, right, bottom = fit(*size, *canvas)
    assert 0 <= left < right <= canvas[0] and 0 <= top < bottom <= canvas[1]
    assert (right - left) == canvas[0] or (bottom - top) == canvas[1]  # one side binds
    slow_width, slow_height = slow_fit(*size, *canvas) or (1, canvas[1])
    assert abs((right - left) - slow_width) <= max(1, size[0] / size[1]) + 1
    assert abs((bottom - top) - slow_height) <= max(1, size[1] / size[0]) + 1
    assert abs(left - (canvas[0] - right)) <= 1 and abs(top - (canvas[1] - bottom)) <= 1  # in the middle


@pytest.mark.parametrize(("height", "fitted"), [(333, 298), (334, 299), (335, 300), (336, 301)])  # 298.4 to 301.1
def test_the_side_that_does_not_bind_is_rounded(height, fitted):
    left, top, right, bottom = fit(500, height, 448, 448)
    assert (right - left, bottom - top) == (448, fitted)
    left, top, right, bottom = fit(height, 500, 448, 448)
    assert (right - left, bottom - top) == (fitted, 448)


def test_a_box_is_the_same_place_at_every_size():
    assert scale((0, 14, 96, 82), (96, 96), (32, 32)) == (0, 5, 32, 27)
    assert scale((0, 0, 64, 64), (64, 64), (32, 32)) == (0, 0, 32, 32)
    assert scale((47, 0, 48, 96), (96, 96), (32, 32)) == (16, 0, 17, 32)  # one pixel stays
    assert scale((95, 0, 96, 96), (96, 96), (32, 32)) == (31, 0, 32, 32)


def test_crops_are_counted_column_by_column():
    assert cells(2, 3) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert crop_boxes(2, 1, height=3, width=5) == [(0, 0, 5, 3), (0, 3, 5, 6)]


def test_a_view_table_by_hand():
    table = view_table([[[1, 2], [0, 0]], [[2, 2], [3, 1]], [[0, 0], [0, 0]]])
    nothing = [-1] * 6
    one = [[0, 0, 0, 1, 0, 1], [0, 1, 0, 1, 0, 2], [0, 2, 0, 1, 1, 2]]
    two = [[0, 0, 0, 1, 0, 1], [0, 1, 0, 2, 0, 2], [0, 2, 1, 2, 0, 2], [0, 3, 0, 2, 1, 2], [0, 4, 1, 2, 1, 2]]
    two += [[1, 0, 0, 1, 0, 1], [1, 1, 0, 3, 0, 1], [1, 2, 1, 3, 0, 1], [1, 3, 2, 3, 0, 1]]
    assert table.tolist() == [one + [nothing] * 6, two, [nothing] * 9]
    assert view_table([[[0, 0], [1, 2]]]).tolist() == [one]  # the first image that is there is number 0


@pytest.mark.parametrize("rows_columns", [(1, 2), (2, 2), (3, 1), (2, 3)])
def test_an_image_of_its_canvas_shape_is_cut_as_a_stretched_one(rows_columns):
    rows, columns = rows_columns
    image = tiny_image(width=columns * 40, height=rows * 40)
    box = fit(*image.size, columns * 32, rows * 32)
    assert box == (0, 0, columns * 32, rows * 32)
    kept = cut_views(image, rows_columns, (32, 32), box=box)
    np.testing.assert_array_equal(kept, cut_views(image, rows_columns, (32, 32)))
    whole = np.concatenate(
        [np.concatenate([kept[1 + column * rows + row] for row in range(rows)]) for column in range(columns)], axis=1
    )
    horizontal = image.resize((columns * 32, image.height), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(
        whole, np.asarray(horizontal.resize((columns * 32, rows * 32), Image.Resampling.BICUBIC))
    )


def test_around_the_image_is_black_in_every_view_at_the_same_place():
    image = Image.new("RGB", (64, 32), "white")  # on 2 x 2 crops of 32 pixels: lines 16 to 48
    views = cut_views(image, (2, 2), (32, 32), box=fit(64, 32, 64, 64))
    assert (views[0][8:24] == 255).all() and not views[0][:8].any() and not views[0][24:].any()
    upper, lower = views[[1, 3]], views[[2, 4]]
    assert (upper[:, 16:] == 255).all() and not upper[:, :16].any()
    assert (lower[:, :16] == 255).all() and not lower[:, 16:].any()


def test_presets_are_filas_five_and_all_of_at_most_nine_crops_and_four_a_side():
    assert read_canvases("fila") == FILA
    sides = range(1, 5)
    assert read_canvases("wide") == [[r, c] for r, c in itertools.product(sides, sides) if r * c <= 9]
    assert tiny_config(canvases="wide").canvases == CANVASES["wide"]


@pytest.mark.parametrize(
    ("canvases", "said"),
    [
        ([], r"canvases=\[\] must be a list"),
        ("square", r"'square' is no preset; there are fila, wide"),
        ([[2, 2], [2]], r"entry \[2\].*rows and columns, e.g. \[2, 2\]"),
        ([[2, 0]], r"entry \[2, 0\]"),
        ([[2, 2.0]], r"entry \[2, 2.0\]"),
        ([[True, 2]], r"entry \[True, 2\]"),
        ([[2, 65]], r"entry \[2, 65\]"),
        ([[2, 2], [1, 2], [2, 2]], r"entry \[2, 2\] twice"),
        (5, "canvases=5"),
    ],
)
def test_canvases_that_are_none_are_refused(canvases, said):
    for make in (tiny_config, PheyeImageProcessor):
        with pytest.raises(ValueError, match=said):
            make(canvases=canvases)


# --- The image processor ---


def test_without_canvases_no_name_or_setting_is_new(tmp_path):
    processor = PheyeImageProcessor(tiles_per_side=2, size={"height": 32, "width": 32})
    assert set(processor(tiny_image())) == {"pixel_values"}
    assert not {"canvases", "max_images"} & processor.to_dict().keys()
    tiny_config().save_pretrained(tmp_path)
    assert (
        not {"canvases", "max_images", "high_res_vision_config"}
        & json.loads((tmp_path / "config.json").read_text()).keys()
    )
    model = PheyeForConditionalGeneration(tiny_config())
    names = [name for name in model.state_dict() if "view_encoding" in name and name.endswith("embedding.weight")]
    assert names == ["pheye.view_encoding.view_embedding.weight"]


def shapes():
    """A wide image, a square one and a tall one: canvases 1 x 2, 2 x 2 and 3 x 1 of `MODEL`."""
    return [tiny_image(0, 80, 40), tiny_image(1, 50, 50), tiny_image(2, 30, 90)]


def test_images_of_several_shapes_are_filled_up_to_the_most_views():
    processor, images = canvas_processor(), shapes()
    inputs = processor(images, return_tensors="pt")
    assert inputs["image_grids"].tolist() == [[[1, 2]], [[2, 2]], [[3, 1]]]
    assert inputs["image_grids"].dtype == torch.int64
    assert inputs["pixel_values"].shape == (3, 5, 3, 32, 32)
    for row, (image, views) in enumerate(zip(images, (3, 5, 4), strict=True)):
        alone = processor(image, return_tensors="pt")["pixel_values"]
        assert alone.shape[1] == views and torch.equal(inputs["pixel_values"][row, :views], alone[0])
        assert not inputs["pixel_values"][row, views:].any()
    assert processor.model_input_names == ["pixel_values", "image_grids"]


def test_several_images_of_a_prompt_and_none():
    processor, (wide, square, tall) = canvas_processor(), shapes()
    inputs = processor([[wide, tall], None, [square], []], return_tensors="pt")
    assert inputs["image_grids"].tolist() == [[[1, 2], [3, 1]], [[0, 0]] * 2, [[2, 2], [0, 0]], [[0, 0]] * 2]
    assert inputs["pixel_values"].shape == (4, 7, 3, 32, 32)
    alone = [processor(image, return_tensors="pt")["pixel_values"][0] for image in (wide, tall)]
    assert torch.equal(inputs["pixel_values"][0], torch.cat(alone))
    assert not inputs["pixel_values"][[1, 3]].any()
    with pytest.raises(ValueError, match="Prompt 0 has 3 images, but this model takes 2"):
        processor([[wide, square, tall]])
    with pytest.raises(ValueError, match="No prompt has an image"):
        processor([None, []])


def test_a_square_model_takes_prompts_without_an_image_too():
    processor = canvas_processor(canvases=None, max_images=1, tiles_per_side=2)
    inputs = processor([tiny_image(), None], return_tensors="pt")
    assert inputs["image_grids"].tolist() == [[[2, 2]], [[0, 0]]]
    assert set(processor([tiny_image(), tiny_image()])) == {"pixel_values"}


def test_canvases_and_images_are_saved_and_loaded(tmp_path):
    canvas_processor().save_pretrained(tmp_path)
    loaded = PheyeImageProcessor.from_pretrained(tmp_path)
    assert loaded.canvases == MODEL and loaded.max_images == 2
    canvas_config().save_pretrained(tmp_path)
    config = PheyeConfig.from_pretrained(tmp_path)
    assert config.canvases == MODEL and config.max_images == 2 and config.views_per_image == 5


# --- The model: a batch of all kinds of rows against each row alone ---


def mixed_inputs():
    """Rows with a wide image, a square one, none, a tall one, and two; and the inputs of each alone."""
    wide, square, tall = shapes()
    prompts = [[wide], [square], [], [tall], [tall, square]]
    processor = canvas_processor()
    batch = dict(processor(prompts, return_tensors="pt"))
    alone = [dict(processor([prompt], return_tensors="pt")) if prompt else {} for prompt in prompts]
    return batch, alone


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_batch_of_all_kinds_equals_each_row_alone(attention):
    model, (batch, alone) = canvas_model(), mixed_inputs()
    model.set_attn_implementation(attention)
    text = tiny_text(5, 7)
    together = model(text, **batch, labels=text)
    losses = []
    for row, inputs in enumerate(alone):
        own = model(text[row : row + 1], **inputs, labels=text[row : row + 1])
        torch.testing.assert_close(together.logits[row : row + 1], own.logits, atol=2e-5, rtol=1e-4)
        losses.append(own.loss)
    torch.testing.assert_close(together.loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


GENERATION = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 2},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_generation_of_all_kinds_equals_each_row_alone(options):
    model, (batch, alone) = canvas_model(), mixed_inputs()
    text = tiny_text(5, 6)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    together = model.generate(text, attention_mask=torch.ones_like(text), **batch, **options)
    for row, inputs in enumerate(alone):
        own = text[row : row + 1]
        expected = model.generate(own, attention_mask=torch.ones_like(own), **inputs, **options)
        assert together[row].tolist() == expected[0].tolist(), row


def test_features_of_padding_are_not_read():
    model, (batch, _) = canvas_model(), mixed_inputs()
    text = tiny_text(5, 4)
    expected = model(text, **batch).logits
    views = (view_table(batch["image_grids"].tolist())[..., 0] < 0)[..., None, None, None]
    for value in (float("nan"), 1e9):
        pixels = batch["pixel_values"].masked_fill(views, value)
        assert torch.equal(model(text, pixel_values=pixels, image_grids=batch["image_grids"]).logits, expected)


def test_a_black_image_is_an_image():
    model = canvas_model()
    black = canvas_processor()(Image.new("RGB", (64, 32)), return_tensors="pt")
    text = tiny_text(1, 4)
    assert not torch.equal(model(text, **black).logits, model(text).logits)


def test_the_vision_tower_sees_the_views_that_are_there_and_no_others(monkeypatch):
    model, (batch, _) = canvas_model(), mixed_inputs()
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    features = model.get_image_features(**batch, output_hidden_states=True, output_attentions=True)
    assert seen == [21]
    assert all(len(states) == sum(seen) for states in (*features.hidden_states, *features.attentions))
    there = view_table(batch["image_grids"].tolist())[..., 0] >= 0
    tokens = features.last_hidden_state.unflatten(1, (-1, model.config.tokens_per_view))
    assert (tokens.flatten(2) != 0).any(-1).equal(there)
    in_order = model.model.encode_views(**batch).last_hidden_state
    alone = model.model.encode_views(batch["pixel_values"][3:4, :4], image_grids=torch.tensor([[[3, 1]]]))
    torch.testing.assert_close(in_order[8:12], alone.last_hidden_state)


@pytest.mark.parametrize("kind", ["global", "local"])
def test_each_view_has_the_lora_of_its_kind(kind):
    model, (batch, _) = canvas_model(), mixed_inputs()
    before = model.model.encode_views(**batch).last_hidden_state
    for lora in getattr(model.model, f"{kind}_lora").values():
        torch.nn.init.zeros_(lora.B)
    after = model.model.encode_views(**batch).last_hidden_state
    table = view_table(batch["image_grids"].tolist())
    is_global = table[table[..., 0] >= 0][:, 1] == 0
    changed = (before != after).flatten(1).any(1)
    assert changed.equal(is_global if kind == "global" else ~is_global)


def test_a_compiled_vision_tower_tells_views_apart():
    model, (batch, _) = canvas_model(), mixed_inputs()
    full = {"pixel_values": torch.rand(2, 5, 3, 32, 32), "image_grids": torch.tensor([[[2, 2]]] * 2)}
    expected = [model.get_image_features(**one).last_hidden_state for one in (batch, full)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.model.vision_tower.compile(backend="eager", fullgraph=True, dynamic=False)
    for one, value in zip((batch, full), expected, strict=True):
        torch.testing.assert_close(model.get_image_features(**one).last_hidden_state, value)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # of images of the full number of views


@pytest.mark.parametrize("outside", ["a call", "an activation checkpoint", "the tower's own"])
def test_a_vision_tower_that_cannot_know_its_views_is_refused(outside):
    model, (batch, _) = canvas_model().train(), mixed_inputs()
    layers = list(model.model.vision_layers())
    if outside == "a call":
        run = functools.partial(model.model.vision_tower, batch["pixel_values"][0])
    elif outside == "the tower's own":
        model.model.vision_tower.gradient_checkpointing_enable()
        run = model.get_image_features(**batch).last_hidden_state.sum().backward
    else:
        apply_activation_checkpointing(model, check_fn=lambda module: module in layers)
        run = model.get_image_features(**batch).last_hidden_state.sum().backward
    with pytest.raises(ValueError, match=r"encode_views.*gradient_checkpointing"):
        run()


@pytest.mark.parametrize("checkpointed", [None, "reentrant", "not reentrant", "vision tower"])
def test_gradients_are_those_of_rows_alone(checkpointed):
    batch, alone = mixed_inputs()
    text = tiny_text(5, 6)
    gradients = []
    for together in (True, False):
        model = canvas_model().train()
        model.config.lora_dropout = 0
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        if together and checkpointed == "vision tower":
            model.model.checkpoint_vision_tower()
        elif together and checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointed == "reentrant"})
            model.enable_input_require_grads()
        if together:
            (model(text, **batch, labels=text).loss * 5).backward()
        else:
            for row, inputs in enumerate(alone):
                model(text[row : row + 1], **inputs, labels=text[row : row + 1]).loss.backward()
        gradients.append({name: part.grad for name, part in model.named_parameters() if part.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-3, msg=name)


def test_a_row_without_an_image_sends_no_gradient_into_the_image():
    model, (batch, _) = canvas_model(), mixed_inputs()
    text = tiny_text(5, 6)
    labels = torch.where(torch.arange(5)[:, None] == 2, text, -100)
    model(text, **batch, labels=labels).loss.backward()
    parts = (model.model.cross_attention_blocks, model.model.view_encoding, model.model.local_lora)
    grads = [part.grad for module in parts for part in module.parameters() if part.grad is not None]
    assert all(not grad.any() for grad in grads)
    assert model.model.language_model.get_input_embeddings().weight.grad.any()


def test_images_of_a_prompt_are_told_apart_by_their_vectors_alone():
    model, processor = canvas_model(), canvas_processor()
    image = tiny_image(1, 50, 50)
    text = tiny_text(1, 4)
    twice = dict(processor([[image, image]], return_tensors="pt"))
    two = tiny_image(3, 50, 50)
    here, there = (dict(processor([pair], return_tensors="pt")) for pair in ([image, two], [two, image]))
    assert not torch.allclose(model(text, **here).logits, model(text, **there).logits)
    torch.nn.init.zeros_(model.model.view_encoding.image_embedding.weight)
    torch.testing.assert_close(model(text, **here).logits, model(text, **there).logits, atol=1e-5, rtol=1e-4)
    one = dict(processor([[image]], return_tensors="pt"))
    torch.testing.assert_close(model(text, **twice).logits, model(text, **one).logits, atol=1e-5, rtol=1e-4)


def test_a_second_turn_on_a_cache_keeps_the_mask():
    model, (batch, alone) = canvas_model(), mixed_inputs()
    text = tiny_text(5, 8)
    first = model(text[:, :5], **batch, use_cache=True)
    cache = getattr(first, CACHE)
    second = model(text[:, 5:], **{CACHE: cache})
    for row, inputs in enumerate(alone):
        own = model(text[row : row + 1], **inputs).logits[:, 5:]
        torch.testing.assert_close(second.logits[row : row + 1], own, atol=2e-5, rtol=1e-4)
    bare = model(text).logits  # nothing of it is left behind
    assert torch.equal(bare, canvas_model()(text).logits)


def test_weights_of_padding_and_of_rows_without_an_image_are_zero():
    model, (batch, _) = canvas_model(), mixed_inputs()
    outputs = model(tiny_text(5, 4), **batch, output_cross_attentions=True)
    there = view_table(batch["image_grids"].tolist())[..., 0] >= 0
    for weights in outputs.cross_attentions:
        views = weights.unflatten(-1, (-1, model.config.tokens_per_view)).sum(-1)  # (R, H, T, V)
        assert (views > 0).all(dim=(1, 2)).equal(there)
        torch.testing.assert_close(views.sum(-1).amin(dim=(1, 2)), there.any(1).float())


def test_features_stand_in_for_pixels_with_their_grids():
    model, (batch, _) = canvas_model(), mixed_inputs()
    text, grids = tiny_text(5, 4), batch["image_grids"]
    features = model.get_image_features(**batch).last_hidden_state
    expected = model(text, **batch).logits
    assert torch.equal(model(text, image_hidden_states=features, image_grids=grids).logits, expected)
    with pytest.raises(ValueError, match="image_grids is missing beside pixel_values or image_hidden_states"):
        model(text, image_hidden_states=features)


def test_vectors_of_places_begin_like_those_of_views_and_those_of_images_at_zero():
    config = canvas_config(canvases="wide", vision_config=tiny_vision_config(hidden_size=256))
    encoding = PheyeForConditionalGeneration(config).model.view_encoding
    for embedding in (encoding.row_embedding, encoding.column_embedding):
        assert embedding.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert not encoding.image_embedding.weight.any()


def test_without_grids_each_row_has_one_image_where_there_are_no_canvases():
    model = canvas_model(canvases=None)
    text, pixels = tiny_text(2, 4), tiny_pixels(2)
    grids = torch.full((2, 1, 2), 2)
    assert torch.equal(model(text, pixels).logits, model(text, pixels, image_grids=grids).logits)
    features = model.get_image_features(pixels).last_hidden_state
    assert torch.equal(model(text, image_hidden_states=features).logits, model(text, pixels).logits)
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 2}):
        asked = {"pixel_values": pixels, "max_new_tokens": 3, **options}
        assert torch.equal(model.generate(text, **asked), model.generate(text, image_grids=grids, **asked))


def test_threads_with_other_canvases_get_their_own_answers():
    model, processor = canvas_model(), canvas_processor()
    text = tiny_text(1, 4)
    inputs = [dict(processor(image, return_tensors="pt")) for image in shapes()] * 8
    expected = [model(text, **own).logits for own in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda own: model(text, **own).logits, inputs))
    assert all(map(torch.equal, found, expected))


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model, (batch, _) = canvas_model(), mixed_inputs()
    model.save_pretrained(tmp_path)
    loaded = PheyeForConditionalGeneration.from_pretrained(tmp_path)
    text = tiny_text(5, 4)
    assert torch.equal(loaded(text, **batch).logits, model(text, **batch).logits)


def test_canvases_begin_with_the_means_of_a_square_model(tmp_path, caplog):
    square = randomize(PheyeForConditionalGeneration(tiny_config()))
    square.save_pretrained(tmp_path)
    canvases = [[1, 2], [2, 2], [2, 3]]
    loaded, info = PheyeForConditionalGeneration.from_pretrained(tmp_path, canvases=canvases, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    table = square.model.view_encoding.view_embedding.weight
    encoding = loaded.model.view_encoding
    seen = view_table([[[2, 2]]])[0]
    mean = table[1:].mean(0)
    vectors = encoding.vectors(seen)
    torch.testing.assert_close(vectors[0], table[0])
    for view, (row, column) in enumerate(cells(2, 2), start=1):
        of_row = (table[1 + row] + table[3 + row]) / 2
        of_column = (table[1 + 2 * column] + table[2 + 2 * column]) / 2
        torch.testing.assert_close(vectors[view], of_row + of_column - mean)
    three = encoding.vectors(view_table([[[2, 3]]])[0])  # the middle one of three columns lies between both of two
    torch.testing.assert_close(three[3] - three[1], (vectors[3] - vectors[1]) / 2)
    same = {name: tensor for name, tensor in square.state_dict().items() if "view_embedding" not in name}
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in same.items())


def test_a_model_for_several_images_begins_as_the_one_for_one(tmp_path):
    square = randomize(PheyeForConditionalGeneration(tiny_config())).eval()
    square.save_pretrained(tmp_path)
    loaded, info = PheyeForConditionalGeneration.from_pretrained(tmp_path, max_images=2, output_loading_info=True)
    assert info["missing_keys"] == {"pheye.view_encoding.image_embedding.weight"}
    processor = canvas_processor(canvases=None, tiles_per_side=2)
    inputs = dict(processor(tiny_image(), return_tensors="pt"))
    text = tiny_text(1, 4)
    expected = square(text, pixel_values=inputs["pixel_values"]).logits
    torch.testing.assert_close(loaded(text, **inputs).logits, expected, atol=1e-6, rtol=1e-5)


def test_a_square_model_takes_rows_without_an_image_and_answers_the_others_as_before():
    model = randomize(PheyeForConditionalGeneration(tiny_config())).eval()
    processor = canvas_processor(canvases=None, max_images=1, tiles_per_side=2)
    batch = dict(processor([tiny_image(), None], return_tensors="pt"))
    text = tiny_text(2, 5)
    logits = model(text, **batch).logits
    with_image = model(text[:1], pixel_values=processor(tiny_image(), return_tensors="pt")["pixel_values"]).logits
    torch.testing.assert_close(logits[:1], with_image, atol=1e-6, rtol=1e-5)
    assert torch.equal(logits[1:], model(text[1:]).logits)


# --- What does not fit ---


def changed(**changes) -> dict:
    batch = dict(canvas_processor()([tiny_image(1, 50, 50), tiny_image(0, 80, 40)], return_tensors="pt"))
    return {**batch, **{name: change(batch[name]) for name, change in changes.items()}}


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"image_grids": lambda grids: None}, "image_grids is missing.*this model's own processor"),
        ({"image_grids": lambda grids: grids[0]}, r"image_grids has shape \(1, 2\).*\(2, images, 2\)"),
        ({"image_grids": lambda grids: grids[:1]}, r"image_grids has shape \(1, 1, 2\)"),
        ({"image_grids": lambda grids: grids.float()}, r"float32.*must hold integers"),
        ({"image_grids": lambda grids: grids.flip(2)}, r"Row 1 has an image of \[2, 1\] crops.*\[3, 1\]"),
        ({"image_grids": lambda grids: grids.repeat(1, 3, 1)}, r"Row 0 has 3 images, but this model takes 2"),
        ({"pixel_values": lambda pixels: pixels[:, :4]}, r"pixel_values has 4 views, but row 0 of image_grids has 5"),
        ({"image_grids": lambda grids: grids * 0}, r"pixel_values has 5 views, but row 0 of image_grids has 0"),
        ({"pixel_values": lambda pixels: pixels[..., :16]}, r"shape \(2, 5, 3, 32, 16\)"),
    ],
)
def test_grids_and_pixels_that_do_not_fit_are_refused(inputs, said):
    with pytest.raises(ValueError, match=said):
        canvas_model().get_image_features(**changed(**inputs))


def test_rows_without_any_image_have_no_features():
    model, nothing = (
        canvas_model(),
        {"pixel_values": torch.zeros(2, 0, 3, 32, 32), "image_grids": torch.zeros(2, 1, 2).long()},
    )
    with pytest.raises(ValueError, match="no image in any row; give the text alone"):
        model.get_image_features(**nothing)
    text = tiny_text(2, 4)
    assert torch.equal(model(text, **nothing).logits, model(text).logits)


def test_grids_without_pixels_and_masks_without_a_kernel_are_refused():
    model, (batch, _) = canvas_model(), mixed_inputs()
    text = tiny_text(5, 4)
    with pytest.raises(ValueError, match="image_grids is given without pixel_values"):
        model(text, image_grids=batch["image_grids"])
    model.config._attn_implementation_internal = "flex_attention"  # of the blocks alone
    with pytest.raises(ValueError, match=r"cannot be masked by flex_attention; use .*sdpa"):
        model(text, **batch)


def test_a_square_model_refuses_the_canvases_of_another():
    model = PheyeForConditionalGeneration(tiny_config())
    batch = dict(canvas_processor()([tiny_image(0, 80, 40)], return_tensors="pt"))
    with pytest.raises(ValueError, match=r"Row 0 has an image of \[1, 2\] crops, but this model has .*\[\[2, 2\]\]"):
        model(tiny_text(1, 3), **batch)


# --- With the high-resolution branch ---


def hybrid(seed: int = 0, **kwargs) -> PheyeForConditionalGeneration:
    branch = ConvNextConfig(hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 1, 1])
    vision = tiny_vision_config(num_hidden_layers=5)
    return canvas_model(seed, vision_config=vision, high_res_vision_config=branch, **kwargs)


def hybrid_inputs():
    wide, square, tall = shapes()
    prompts = [[wide], [square], [], [tall], [tall, square]]
    processor = canvas_processor(high_res_tile_size=64)
    batch = dict(processor(prompts, return_tensors="pt"))
    return batch, [dict(processor([prompt], return_tensors="pt")) if prompt else {} for prompt in prompts]


def test_the_branch_sees_the_same_canvas():
    batch, _ = hybrid_inputs()
    tiles = batch["high_res_pixel_values"]
    assert tiles.shape == (5, 7, 3, 64, 64)  # 3 tiles and 4
    whole = join_tiles(tiles[3:4, :3], 3, 1)[0]  # the tall image, 30 x 90, fills a third of 64 x 192 pixels' width
    assert whole.shape == (3, 192, 64)
    image = tiny_image(2, 30, 90)
    resized = resize(image, (64, 192), Image.Resampling.BICUBIC)
    expected = (np.asarray(resized) / 255 - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
    np.testing.assert_allclose(whole.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_a_batch_of_all_kinds_with_the_branch_equals_each_row_alone():
    model, (batch, alone) = hybrid(), hybrid_inputs()
    text = tiny_text(5, 6)
    together = model(text, **batch).logits
    for row, inputs in enumerate(alone):
        own = model(text[row : row + 1], **inputs).logits
        torch.testing.assert_close(together[row : row + 1], own, atol=3e-5, rtol=1e-4)
    fewer = {**batch, "high_res_pixel_values": batch["high_res_pixel_values"][:, :6]}
    with pytest.raises(ValueError, match=r"high_res_pixel_values has shape \(5, 6, 3, 64, 64\).*7 tiles of 64"):
        model(text, **fewer)


def test_a_new_branch_changes_nothing_on_canvases():
    batch, _ = hybrid_inputs()
    model = hybrid()
    torch.manual_seed(0)
    for block in model.model.fusion_blocks:
        torch.nn.init.zeros_(block.mlp_out.weight)
        torch.nn.init.zeros_(block.mlp_out.bias)
    plain = canvas_model(vision_config=tiny_vision_config(num_hidden_layers=5))
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    text = tiny_text(5, 4)
    pixels = {name: batch[name] for name in ("pixel_values", "image_grids")}
    assert torch.equal(model(text, **batch).logits, plain(text, **pixels).logits)


@pytest.mark.parametrize("grid", [(1, 2), (3, 1), (2, 3)])
def test_windows_of_any_canvas_are_those_of_a_slow_loop(grid):
    rows, columns = grid
    whole = torch.randn(1, 5, rows * 6, columns * 6)
    found = view_maps(whole, rows, columns, 3).unflatten(1, (3, 3))  # (V, G, G, C)
    views = [whole[0]]
    views += [whole[0, :, 6 * row : 6 * row + 6, 6 * column : 6 * column + 6] for row, column in cells(rows, columns)]
    for view, shown in zip(found, views, strict=True):
        height, width = shown.shape[1] // 3, shown.shape[2] // 3
        for row, column in itertools.product(range(3), repeat=2):
            part = shown[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
            torch.testing.assert_close(view[row, column], part.mean((1, 2)))
