"""The high-resolution branch (after FILA): a model without it is what it was, a new one changes nothing, and what it
adds reaches the views that show it."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import nn
from transformers import (
    AutoBackbone,
    ConvNextConfig,
    ConvNextV2Config,
    Dinov2WithRegistersConfig,
    ResNetConfig,
    SiglipVisionConfig,
    SwinConfig,
)

from pheye import (
    PheyeConfig,
    PheyeForConditionalGeneration,
    PheyeImageProcessor,
    PheyeModel,
    PheyeProcessor,
    modeling_pheye,
)
from pheye.training.trained import choose_trained
from pheye.vision_pheye import PheyeFusionBlock, join_tiles, view_maps

from tiny import (
    randomize,
    tiny_config,
    tiny_image,
    tiny_model,
    tiny_pixels,
    tiny_text,
    tiny_tokenizer,
    tiny_vision_config,
)

WIDTHS = {"hidden_sizes": [4, 6, 8, 10], "depths": [1, 1, 1, 1]}
BACKBONES = {
    "convnext": ConvNextConfig(**WIDTHS),
    "convnextv2": ConvNextV2Config(**WIDTHS),
    "swin": SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4),
    "resnet": ResNetConfig(embedding_size=4, layer_type="basic", **WIDTHS),
}
TWO_STAGES = ConvNextConfig(hidden_sizes=[4, 6], depths=[1, 1], num_stages=2)
LAYERS = [1, 2, 3, 4]
VIT = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}


def hybrid_config(backbone: str = "convnext", **kwargs) -> PheyeConfig:
    """A vision tower of five layers, four of which have a fusion block before them; tiles of 64 pixels."""
    defaults = {
        "vision_config": tiny_vision_config(num_hidden_layers=5),
        "high_res_vision_config": copy.deepcopy(BACKBONES[backbone]),
        "high_res_fusion_layers": LAYERS,
    }
    return tiny_config(**{**defaults, **kwargs})


def hybrid_model(seed: int = 0, **kwargs) -> PheyeForConditionalGeneration:
    return randomize(PheyeForConditionalGeneration(hybrid_config(**kwargs)), seed).eval()


def tiles(images: int = 2, tiles_per_side: int = 2, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, tiles_per_side**2, 3, size, size, generator=generator)


def test_new_fusion_blocks_begin_as_the_specification_says():
    model = PheyeForConditionalGeneration(
        hybrid_config(vision_config=tiny_vision_config(hidden_size=256, num_hidden_layers=5))
    )
    for block in model.model.fusion_blocks:
        assert block.mlp_in.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert not (block.mlp_in.bias.any() or block.mlp_out.weight.any() or block.mlp_out.bias.any())
        assert block.state_norm.eps == block.map_norm.eps == 1e-5


def fresh_pair(tiles_per_side: int = 2, dtype: torch.dtype = torch.float32):
    """A plain model, and a hybrid one with its weights and a new branch."""
    vision = tiny_vision_config(num_hidden_layers=5)
    plain = tiny_model(vision_config=vision, tiles_per_side=tiles_per_side).to(dtype)
    hybrid = PheyeForConditionalGeneration(hybrid_config(tiles_per_side=tiles_per_side)).to(dtype).eval()
    missing, unexpected = hybrid.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing
    assert all(name.startswith(("pheye.high_res_tower.", "pheye.fusion_blocks.")) for name in missing)
    return plain, hybrid


# --- Without it, and new ---


def test_a_model_without_a_branch_has_no_part_or_setting_of_one(tmp_path):
    model = tiny_model()
    assert not any("high_res" in name or "fusion" in name for name in model.state_dict())
    processor = PheyeImageProcessor(tiles_per_side=2, size={"height": 32, "width": 32})
    assert processor.model_input_names == ["pixel_values"]
    assert processor(tiny_image(), return_tensors="pt").keys() == {"pixel_values"}
    processor.save_pretrained(tmp_path)
    assert "high_res" not in (tmp_path / "preprocessor_config.json").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiles_per_side", [1, 2, 3])
def test_a_new_branch_changes_no_bit(tiles_per_side, dtype):
    plain, hybrid = fresh_pair(tiles_per_side, dtype)
    pixels = {"pixel_values": tiny_pixels(views=1 + tiles_per_side**2).to(dtype)}
    both = {**pixels, "high_res_pixel_values": tiles(tiles_per_side=tiles_per_side).to(dtype)}
    text = {"input_ids": tiny_text(), "attention_mask": torch.ones_like(tiny_text())}
    with torch.no_grad():
        features = hybrid.get_image_features(**both).last_hidden_state
        assert torch.equal(features, plain.get_image_features(**pixels).last_hidden_state)
        assert torch.equal(hybrid(**text, **both).logits, plain(**text, **pixels).logits)
    generated = hybrid.generate(**text, **both, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, plain.generate(**text, **pixels, max_new_tokens=6, do_sample=False))


def test_an_old_checkpoint_becomes_a_hybrid_model_and_only_the_new_parts_are_new(tmp_path):
    plain, _ = fresh_pair()
    plain.save_pretrained(tmp_path)
    hybrid, info = PheyeForConditionalGeneration.from_pretrained(
        tmp_path, config=hybrid_config(), output_loading_info=True
    )
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(".high_res_tower." in name or ".fusion_blocks." in name for name in info["missing_keys"])
    text, pixels = tiny_text(), tiny_pixels()
    assert torch.equal(hybrid(text, pixels, high_res_pixel_values=tiles()).logits, plain(text, pixels).logits)


def test_gradients_begin_at_the_last_linear_and_none_reach_a_frozen_tower():
    _, hybrid = fresh_pair()
    hybrid.pheye.high_res_tower.requires_grad_(False)
    hybrid.train()
    assert not hybrid.pheye.high_res_tower.training  # its statistics stay
    trained = [parameter for parameter in hybrid.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    text, inputs = tiny_text(), {"pixel_values": tiny_pixels(), "high_res_pixel_values": tiles()}

    def reached() -> set[str]:
        hybrid.zero_grad()
        hybrid(text, **inputs, labels=text).loss.backward()
        blocks = hybrid.pheye.fusion_blocks.named_parameters()
        return {name.split(".", 1)[1] for name, parameter in blocks if parameter.grad.abs().sum() > 0}

    assert reached() == {"mlp_out.weight", "mlp_out.bias"}
    optimizer.step()
    assert reached() == {name for name, _ in hybrid.pheye.fusion_blocks[0].named_parameters()}
    assert all(parameter.grad is None for parameter in hybrid.pheye.high_res_tower.parameters())


def test_after_two_steps_the_features_are_others():
    plain, hybrid = fresh_pair()
    choose_trained(hybrid, freeze=["cross_attention_blocks", "lora", "view_encoding"])
    optimizer = torch.optim.SGD([one for one in hybrid.parameters() if one.requires_grad], lr=0.5)
    text, inputs = tiny_text(), {"pixel_values": tiny_pixels(), "high_res_pixel_values": tiles()}
    for _ in range(2):
        optimizer.zero_grad()
        hybrid.train()(text, **inputs, labels=text).loss.backward()
        optimizer.step()
    features = hybrid.eval().get_image_features(**inputs).last_hidden_state
    assert (features - plain.get_image_features(tiny_pixels()).last_hidden_state).abs().max() > 1e-3


def test_fusion_blocks_train_and_the_branch_only_if_asked():
    parts = {name.split(".")[1] for name in choose_trained(hybrid_model())}
    assert parts == {"cross_attention_blocks", "global_lora", "local_lora", "view_encoding", "fusion_blocks"}
    assert any(".high_res_tower." in name for name in choose_trained(hybrid_model(), train=["high_res_tower"]))


# --- What it adds ---


def test_the_fusion_block_is_its_formula_and_leaves_prefix_tokens_alone():
    block = randomize(PheyeFusionBlock(8, 5))
    states, maps = torch.randn(3, 6, 8), torch.randn(3, 4, 5)  # two prefix tokens
    fused = block(states, maps)
    assert torch.equal(fused[:, :2], states[:, :2])
    x = F.layer_norm(states[:, 2:], (8,), block.state_norm.weight, block.state_norm.bias, 1e-5)
    z = F.layer_norm(maps, (5,), block.map_norm.weight, block.map_norm.bias, 1e-5)
    inside = block.mlp_in(torch.cat([x, z], -1))
    gelu = 0.5 * inside * (1 + torch.erf(inside / 2**0.5))
    assert torch.allclose(fused[:, 2:], states[:, 2:] + block.mlp_out(gelu), atol=1e-5)


@pytest.mark.parametrize("tiles_per_side", [1, 2, 3])
def test_tiles_joined_and_cut_again_are_the_image(tiles_per_side):
    size = 4 * tiles_per_side
    whole = torch.arange(2.0 * 3 * size * size).reshape(2, 3, size, size)
    cut = [
        whole[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        for column in range(tiles_per_side)
        for row in range(tiles_per_side)
    ]
    assert torch.equal(join_tiles(torch.stack(cut, dim=1), tiles_per_side, tiles_per_side), whole)


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("tiles_per_side", [1, 2, 3])
def test_windows_are_those_of_a_slow_loop(tiles_per_side, scale):
    patches, side = 3, 3 * scale * tiles_per_side
    whole = torch.randn(2, 5, side, side)
    found = view_maps(whole, tiles_per_side, tiles_per_side, patches).unflatten(0, (2, -1))  # (B, V, G * G, C)
    for image in range(2):
        views = [whole[image]]
        window = side // tiles_per_side
        for column in range(tiles_per_side):
            for row in range(tiles_per_side):
                top, left = row * window, column * window
                views.append(whole[image, :, top : top + window, left : left + window])
        for view, shown in enumerate(views):
            cell = shown.shape[-1] // patches
            for row in range(patches):
                for column in range(patches):
                    part = shown[:, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
                    assert torch.allclose(found[image, view, row * patches + column], part.mean((1, 2)), atol=1e-5)


def test_the_processors_tiles_are_the_image_at_high_resolution_in_the_crops_order():
    options = {"tiles_per_side": 2, "size": {"height": 32, "width": 32}, "high_res_tile_size": 64}
    processor = PheyeImageProcessor(**options, high_res_image_mean=[0.0] * 3, high_res_image_std=[1.0] * 3)
    assert processor.model_input_names == ["pixel_values", "high_res_pixel_values"]
    image = tiny_image(width=128, height=128)
    found = processor(image, return_tensors="pt")["high_res_pixel_values"]
    assert found.shape == (1, 4, 3, 64, 64)
    whole = join_tiles(found, 2, 2)[0]
    expected = torch.tensor(list(image.getdata())).reshape(128, 128, 3).permute(2, 0, 1) / 255
    assert torch.allclose(whole, expected, atol=1e-6)


class Pointwise(nn.Module):
    """A backbone without a field across cells."""

    def __init__(self, maps: list[tuple[int, int]]):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(3, channels, stride, stride) for channels, stride in maps)

    def forward(self, pixels):
        return type("Maps", (), {"feature_maps": [convolution(pixels) for convolution in self.convolutions]})


def changed_views(model, tile: int) -> list[bool]:
    """Which views' features a change inside one tile moves."""
    pixels, high = tiny_pixels(1), tiles(1)
    other = high.clone()
    other[:, tile, :, 20:40, 20:40] += 1
    with torch.no_grad():
        before = model.get_image_features(pixels, high).last_hidden_state.unflatten(1, (5, -1))
        after = model.get_image_features(pixels, other).last_hidden_state.unflatten(1, (5, -1))
    return [not torch.equal(before[:, view], after[:, view]) for view in range(5)]


def test_a_change_inside_a_tile_reaches_its_crop_and_the_global_view():
    model = hybrid_model()
    model.pheye.high_res_tower = randomize(Pointwise([(4, 4), (6, 8), (8, 16), (10, 32)]))
    for tile in range(4):
        assert changed_views(model, tile) == [True, *(tile == view for view in range(4))]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_with_a_backbone_the_neighbours_see_it_too(backbone):
    model = hybrid_model(backbone=backbone)
    reached = changed_views(model, 0)
    assert reached[0] and reached[1]
    if backbone != "resnet":  # its field at this size ends before the border
        assert any(reached[2:])


@pytest.mark.parametrize(
    ("vision", "prefix"),
    [
        (tiny_vision_config(num_hidden_layers=5), 1),
        (SiglipVisionConfig(intermediate_size=48, **VIT), 0),
        (Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=3, **VIT), 4),
    ],
    ids=["clip", "siglip", "dinov2_with_registers"],
)
def test_prefix_tokens_of_every_tower_pass_unchanged(vision, prefix):
    model = hybrid_model(vision_config=vision).pheye
    seen = []
    for block in model.fusion_blocks:
        block.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    try:
        model.get_image_features(tiny_pixels(), tiles())
    except ValueError as error:  # Dinov2WithRegisters drops keywords in 5.17
        assert "does not pass keyword" in str(error) and Version(transformers.__version__) < Version("5.23")
        return
    assert len(seen) == 4
    for before, after in seen:
        assert torch.equal(before[:, :prefix], after[:, :prefix])
        assert before.shape[1] - prefix == 4 and not torch.equal(before[:, prefix:], after[:, prefix:])


def test_lora_and_fusion_together_give_each_view_its_own_set():
    model = hybrid_model().pheye
    pixels, high = tiny_pixels(), tiles()
    features = model.get_image_features(pixels, high).last_hidden_state.unflatten(1, (5, -1))
    for lora in model.local_lora.values():
        lora.B.data.zero_()
    without = model.get_image_features(pixels, high).last_hidden_state.unflatten(1, (5, -1))
    assert torch.equal(features[:, 0], without[:, 0]) and not torch.equal(features[:, 1:], without[:, 1:])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_are_the_same_with_checkpointing(use_reentrant):
    text, inputs = tiny_text(), {"pixel_values": tiny_pixels(), "high_res_pixel_values": tiles()}

    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        model = hybrid_model(lora_dropout=0.0)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.train()
        model(text, **inputs, labels=text, use_cache=False).loss.backward()
        return {name: part.grad for name, part in model.named_parameters() if part.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert any("fusion_blocks" in name for name in plain) and plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, checkpointed[name], rtol=1e-3, atol=1e-5), name


# --- Generation, saving, processors ---


OPTIONS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 3},
    "samples": {"num_return_sequences": 2, "do_sample": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_image_is_encoded_once_and_features_stand_in_for_it(options):
    model = hybrid_model()
    text = {"input_ids": tiny_text(), "attention_mask": torch.ones_like(tiny_text()), "max_new_tokens": 5, **options}
    calls = []
    model.pheye.high_res_tower.register_forward_hook(lambda *args: calls.append(1))
    torch.manual_seed(0)
    found = model.generate(**text, pixel_values=tiny_pixels(), high_res_pixel_values=tiles())
    assert len(calls) == 1
    features = model.get_image_features(tiny_pixels(), tiles()).last_hidden_state
    torch.manual_seed(0)
    assert torch.equal(model.generate(**text, image_hidden_states=features), found)


def test_saved_and_loaded_it_is_the_same_and_its_processor_feeds_it(tmp_path):
    model = hybrid_model()
    image_processor = PheyeImageProcessor(
        tiles_per_side=2, size={"height": 32, "width": 32}, high_res_tile_size=model.config.high_res_tile_size
    )
    PheyeProcessor(image_processor, tiny_tokenizer()).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded, processor = (
        PheyeForConditionalGeneration.from_pretrained(tmp_path),
        PheyeProcessor.from_pretrained(tmp_path),
    )
    assert loaded.config.high_res_fusion_layers == LAYERS
    inputs = processor(images=[tiny_image(), tiny_image(1)], text=["What?", "And this?"], return_tensors="pt")
    assert inputs["high_res_pixel_values"].shape == (2, 4, 3, 64, 64)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_a_pretrained_backbone_is_taken_as_it_is(tmp_path):
    from transformers import AutoModel, PhiForCausalLM

    from tiny import tiny_text_config

    randomize(PhiForCausalLM(tiny_text_config())).save_pretrained(tmp_path / "text")
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    AutoModel.from_config(tiny_vision_config(num_hidden_layers=5)).save_pretrained(tmp_path / "vision")
    backbone = randomize(AutoBackbone.from_config(copy.deepcopy(BACKBONES["convnext"])), 3)
    backbone.save_pretrained(tmp_path / "branch")
    model = PheyeForConditionalGeneration.from_pretrained_parts(
        tmp_path / "vision", tmp_path / "text", high_res=tmp_path / "branch", tiles_per_side=2,
        cross_attention_interval=2, high_res_fusion_layers=LAYERS,
    )  # fmt: skip
    ours = model.pheye.high_res_tower.state_dict()
    for name, weight in backbone.state_dict().items():
        assert torch.equal(ours[name], weight), name
    assert not any(block.mlp_out.weight.any() for block in model.pheye.fusion_blocks)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("backbone", ["convnext", "swin"])
def test_attention_is_chosen_for_all_parts_but_the_branch(attention, backbone, tmp_path):
    model = hybrid_model(backbone=backbone)
    model.save_pretrained(tmp_path)
    loaded = PheyeForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention)
    model.set_attn_implementation(attention)
    for one in (model, loaded):
        config = one.config
        assert config._attn_implementation == config.text_config._attn_implementation == attention
    inputs = {"pixel_values": tiny_pixels(), "high_res_pixel_values": tiles()}
    assert torch.allclose(model(tiny_text(), **inputs).logits, loaded(tiny_text(), **inputs).logits, atol=1e-4)


# --- Bad input ---


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"high_res_fusion_layers": [2, 1]}, "must be ascending integers from 1 to 4"),
        ({"high_res_fusion_layers": [0, 1]}, "must be ascending integers from 1 to 4"),
        ({"high_res_fusion_layers": [1, 5]}, "has 5 layers"),
        ({"high_res_fusion_layers": []}, "must be ascending"),
        ({"high_res_fusion_layers": 2}, "high_res_fusion_layers=2 must be ascending integers"),
        ({"high_res_fusion_layers": "12"}, "must be ascending integers"),
        ({"high_res_fusion_layers": [1.0, 2.0]}, "must be ascending integers"),
        ({"high_res_fusion_layers": [True, 2]}, "must be ascending integers"),
        ({"high_res_fusion_layers": [None, 2]}, "must be ascending integers"),
        ({"high_res_fusion_layers": [1, 1]}, "must be ascending integers"),
        ({"high_res_fusion_layers": [1, 2], "high_res_vision_config": None}, "needs a branch"),
        ({"high_res_vision_config": tiny_vision_config()}, "backbone with stages"),
        ({"high_res_vision_config": TWO_STAGES, "high_res_fusion_layers": [1, 2, 3]}, "has 2 stages"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        hybrid_config(**settings)


def test_fusion_layers_are_filas_scaled_to_the_depth():
    assert PheyeConfig(high_res_vision_config=ConvNextConfig()).high_res_fusion_layers == [3, 8, 16, 27]
    six = tiny_vision_config(num_hidden_layers=6)
    assert hybrid_config(vision_config=six, high_res_fusion_layers=None).high_res_fusion_layers == [1, 2, 3, 5]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("image_size", "patch_size"), [(224, 14), (224, 16), (384, 16), (32, 16)])
def test_the_last_map_has_a_cell_for_each_patch_of_every_crop(backbone, image_size, patch_size):
    vision = tiny_vision_config(num_hidden_layers=5, image_size=image_size, patch_size=patch_size)
    patches = image_size // patch_size
    for tiles_per_side in (1, 2, 3):
        config = hybrid_config(backbone, vision_config=vision, tiles_per_side=tiles_per_side)
        assert config.high_res_tile_size == 32 * patches
        side = tiles_per_side * config.high_res_tile_size
        with torch.device("meta"):
            maps = PheyeModel(config).high_res_tower(torch.empty(1, 3, side, side)).feature_maps
        cells = [tiles_per_side * patches * scale for scale in (8, 4, 2, 1)]
        assert [tuple(one.shape[-2:]) for one in maps] == [(count, count) for count in cells]


def test_a_backbone_of_another_stride_is_refused_with_both_grids():
    three = ConvNextConfig(hidden_sizes=[4, 6, 8], depths=[1, 1, 1], num_stages=3)
    with pytest.raises(ValueError, match="4 x 4 cells for a tile of 64 pixels, but a view has 2 x 2 patches"):
        PheyeModel(hybrid_config(high_res_vision_config=three, high_res_fusion_layers=[1, 2, 3]))


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "high_res_pixel_values is missing"),
        ({"high_res_pixel_values": tiles(1)}, "holds 1 images, but this model's branch needs it for 2"),
        (
            {"high_res_pixel_values": tiles(2, 3)},
            r"\(2, 9, 3, 64, 64\), but this model takes \(images, 4, 3, 64, 64\)",
        ),
        ({"high_res_pixel_values": tiles(2, 2, 32)}, "4 tiles of 64|2 x 2 tiles of 64 pixels"),
    ],
)
def test_high_resolution_pixels_that_do_not_fit_are_refused(inputs, said):
    with pytest.raises(ValueError, match=said):
        hybrid_model()(tiny_text(), tiny_pixels(), **inputs)


def test_high_resolution_pixels_without_a_branch_or_without_views_are_refused(model):
    with pytest.raises(ValueError, match="this model has no high-resolution branch"):
        model(tiny_text(), tiny_pixels(), high_res_pixel_values=tiles())
    with pytest.raises(ValueError, match="without pixel_values; give both"):
        hybrid_model()(tiny_text(), high_res_pixel_values=tiles())


def test_a_vision_tower_that_drops_the_maps_is_refused_by_name():
    model = hybrid_model()
    forward = model.pheye.vision_tower.forward
    model.pheye.vision_tower.forward = lambda pixels, return_dict=True, **kwargs: forward(pixels, return_dict=True)
    with pytest.raises(ValueError, match=r"CLIPVisionModel cannot be Pheye's vision tower.*4 of 4 fusion blocks"):
        model(tiny_text(), tiny_pixels(), high_res_pixel_values=tiles())


# --- What it costs ---


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_branch_sees_a_few_images_at_a_time_and_gives_the_same(backbone, at_once, monkeypatch):
    model = hybrid_model(backbone=backbone).pheye
    whole = model.encode_high_res(tiles(3))
    seen = []
    model.high_res_tower.register_forward_pre_hook(lambda tower, args: seen.append(len(args[0])))
    monkeypatch.setattr(modeling_pheye, "MOST_BRANCH_PIXELS", at_once * 128**2 + 1)
    parts = model.encode_high_res(tiles(3))
    assert seen == {1: [1, 1, 1], 2: [2, 1], 3: [3]}[at_once]
    for part, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trains", [False, True])
def test_the_branch_keeps_nothing_for_gradients_where_nothing_in_it_trains(trains):
    model = hybrid_model()
    model.pheye.high_res_tower.requires_grad_(trains)
    model.train()
    kept, graphs = [], []
    for module in model.pheye.high_res_tower.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.LayerNorm)):
            module.register_forward_hook(lambda module, args, output: graphs.append(output.grad_fn))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        maps = model.pheye.encode_high_res(tiles())
    assert graphs and all((graph is not None) == trains for graph in graphs)
    assert bool(kept) == trains and all(one.requires_grad == trains for one in maps)
    text = tiny_text()
    model(text, tiny_pixels(), high_res_pixel_values=tiles(), labels=text).loss.backward()
    assert all(part.grad is not None for part in model.pheye.fusion_blocks.parameters())
    reached = [part.grad is not None for part in model.pheye.high_res_tower.parameters()]
    assert any(reached) == trains
