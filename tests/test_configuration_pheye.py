"""Configuration: the paper's numbers, and a clear word about numbers that contradict each other."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    BloomConfig,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    SiglipConfig,
    SiglipVisionConfig,
    ViTConfig,
)
from transformers.models.auto import modeling_auto

from pheye import PheyeConfig, PheyeForConditionalGeneration
from pheye.configuration_pheye import learned_positions

from tiny import tiny_config, tiny_model, tiny_text_config, tiny_vision_config

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
FIELDS = [
    "tiles_per_side",
    "cross_attention_interval",
    "cross_attention_start_layer",
    "cross_attention_reduction",
    "global_lora_rank",
    "global_lora_alpha",
    "local_lora_rank",
    "local_lora_alpha",
    "lora_dropout",
]


# --- The published models ---


def test_defaults_are_those_of_x4_672():
    assert PheyeConfig().to_dict() == PheyeConfig.from_variant("x4-672").to_dict()
    config = PheyeConfig()
    assert {name: getattr(config, name) for name in FIELDS} == {
        "tiles_per_side": 3,
        "cross_attention_interval": 4,
        "cross_attention_start_layer": 0,
        "cross_attention_reduction": 1,
        "global_lora_rank": 8,
        "global_lora_alpha": 16,
        "local_lora_rank": 16,
        "local_lora_alpha": 32,
        "lora_dropout": 0.05,
    }


def test_default_backbones_are_vit_h_14_and_phi_1_5():
    vision, text = PheyeConfig().vision_config, PheyeConfig().text_config
    assert (type(vision), type(text)) == (CLIPVisionConfig, PhiConfig)
    assert (vision.num_hidden_layers, vision.hidden_size, vision.num_attention_heads) == (32, 1280, 16)
    assert (vision.intermediate_size, vision.image_size, vision.patch_size) == (5120, 224, 14)
    assert (text.num_hidden_layers, text.hidden_size, text.num_attention_heads) == (24, 2048, 32)
    assert (text.vocab_size, text.max_position_embeddings, text.tie_word_embeddings) == (51200, 2048, False)


@pytest.mark.parametrize(
    "variant, blocks, views, tokens",
    [("x4-448", 6, 5, 1285), ("x4-672", 6, 10, 2570), ("x2-448", 12, 5, 1285), ("x2-672", 12, 10, 2570)],
)
def test_variants_have_the_papers_numbers(variant, blocks, views, tokens):
    config = PheyeConfig.from_variant(variant)
    interval = int(variant[1])
    assert config.cross_attention_layers == tuple(range(interval - 1, 24, interval))
    assert len(config.cross_attention_layers) == blocks
    assert (config.views_per_image, config.tokens_per_view, config.tokens_per_image) == (views, 257, tokens)
    assert (config.cross_attention_heads, config.cross_attention_size, config.vocab_size) == (32, 2048, 51200)


def test_a_variant_takes_overrides():
    config = PheyeConfig.from_variant("x4-448", tiles_per_side=4, global_lora_rank=0, text_config=LlamaConfig())
    assert (config.tiles_per_side, config.cross_attention_interval, config.global_lora_rank) == (4, 4, 0)
    assert config.text_config.model_type == "llama"


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'x3-448'.*x4-448, x4-672, x2-448, x2-672"):
        PheyeConfig.from_variant("x3-448")


# Section 7 of the specification, counted on the meta device: total, trained without the global LoRA set.
SIZES = {
    "x4-448": (2_350_063_136, 295_113_152),
    "x4-672": (2_350_069_536, 295_119_552),
    "x2-672": (None, 578_394_816),
}
GLOBAL_LORA = 5_913_184


@pytest.mark.parametrize("variant", SIZES)
def test_parameter_counts_are_the_papers(variant):
    with torch.device("meta"):
        model = PheyeForConditionalGeneration(PheyeConfig.from_variant(variant))

    def count(*modules) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    core = model.model
    total, trained = SIZES[variant]
    assert count(core.local_lora, core.view_encoding, core.cross_attention_blocks) == trained
    assert count(core.global_lora) == GLOBAL_LORA
    frozen = count(core.vision_tower, core.language_model)
    assert total in (None, count(model)) and count(model) == frozen + trained + GLOBAL_LORA
    assert {round(count(block) / 1e6, 1) for block in core.cross_attention_blocks} == {47.2}


# --- Derived numbers ---


@pytest.mark.parametrize(
    "layers, interval, start, expected",
    [
        (8, 4, 0, (3, 7)),
        (8, 4, 3, (3, 7)),
        (8, 4, 4, (7,)),
        (9, 2, 5, (5, 7)),
        (4, 1, 0, (0, 1, 2, 3)),
        (4, 4, 0, (3,)),
    ],
)
def test_which_layers_have_a_block(layers, interval, start, expected):
    config = tiny_config(
        text_config=tiny_text_config(num_hidden_layers=layers),
        cross_attention_interval=interval,
        cross_attention_start_layer=start,
    )
    assert config.cross_attention_layers == expected


@pytest.mark.parametrize(
    "text, vision, reduction, heads, size",
    [(128, 64, 1, 2, 128), (64, 192, 1, 3, 192), (128, 64, 2, 2, 64), (128, 64, 64, 2, 2)],
)
def test_heads_and_width_of_a_block(text, vision, reduction, heads, size):
    config = tiny_config(
        text_config=tiny_text_config(hidden_size=text),
        vision_config=tiny_vision_config(hidden_size=vision),
        cross_attention_reduction=reduction,
    )
    assert (config.cross_attention_heads, config.cross_attention_size) == (heads, size)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_views_and_tokens_follow_the_tiles(k):
    config = tiny_config(tiles_per_side=k)
    assert config.views_per_image == 1 + k * k
    assert config.tokens_per_image == (1 + k * k) * 5  # 4 patches and a class token


TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWERS = {
    "CLIP": CLIPVisionConfig(**TOWER, image_size=32, patch_size=16),
    "CLIP, patches do not fill the image": CLIPVisionConfig(**TOWER, image_size=40, patch_size=16),
    "SigLIP": SiglipVisionConfig(**TOWER, image_size=48, patch_size=16),
    "ViT": ViTConfig(**TOWER, image_size=32, patch_size=8),
    "DINOv2": Dinov2Config(**TOWER, image_size=32, patch_size=16),
    "DINOv2 with registers": Dinov2WithRegistersConfig(**TOWER, image_size=32, patch_size=16, num_register_tokens=3),
}


@pytest.mark.parametrize("name", TOWERS)
def test_tokens_per_view_are_those_that_the_vision_transformer_gives(name):
    config = tiny_config(vision_config=TOWERS[name])
    tower = AutoModel.from_config(TOWERS[name]).eval()
    size = TOWERS[name].image_size
    tokens = tower(torch.zeros(1, 3, size, size)).last_hidden_state.shape[1]
    assert config.tokens_per_view == tokens
    pixels = torch.zeros(1, config.views_per_image, 3, size, size)
    features = tiny_model(config).get_image_features(pixels).last_hidden_state
    assert features.shape == (1, config.tokens_per_image, 32) == (1, 5 * tokens, 32)


@pytest.mark.parametrize("has_head", [True, False])
def test_vocab_size_follows_a_resize(has_head):
    model = tiny_model()
    assert model.config.vocab_size == model.config.text_config.vocab_size == 257
    (model if has_head else model.base_model).resize_token_embeddings(300)
    assert model.config.vocab_size == model.config.text_config.vocab_size == 300
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (300, 128)
    reloaded = PheyeConfig.from_dict(model.config.to_dict())
    assert reloaded.vocab_size == 300


@pytest.mark.parametrize("is_tied", [False, True])
def test_whether_embeddings_are_tied_is_what_the_language_model_says(is_tied):
    config = tiny_config(text_config=tiny_text_config(tie_word_embeddings=is_tied))
    assert config.tie_word_embeddings is config.to_dict()["tie_word_embeddings"] is is_tied
    assert "tie_word_embeddings" not in config.to_diff_dict()  # what is saved says it once, of the language model
    assert PheyeConfig.from_dict(config.to_dict()).tie_word_embeddings is is_tied
    untied = PheyeConfig.from_dict(config.to_diff_dict(), tie_word_embeddings=False)
    assert not untied.text_config.tie_word_embeddings


# --- Sub-configs ---


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("composite", [CLIPConfig, SiglipConfig])
def test_of_a_config_with_two_towers_the_vision_tower_is_taken(composite, as_dict):
    whole = composite(vision_config={**TOWER, "image_size": 48, "patch_size": 16})
    config = tiny_config(vision_config=whole.to_dict() if as_dict else whole)
    assert config.vision_config.model_type == whole.vision_config.model_type
    assert type(config.vision_config) is type(whole.vision_config)
    assert (config.vision_config.hidden_size, config.vision_config.image_size) == (32, 48)


@pytest.mark.parametrize("case, patch", [("x2-448", 32), ("x4-672", 56)])
def test_configs_written_by_transformers_4_37_are_read(case, patch):
    vision = json.loads((GOLDEN / case / "encoder" / "config.json").read_text())
    text = json.loads((GOLDEN / case / "decoder" / "config.json").read_text())
    text["rope_theta"], text["partial_rotary_factor"] = 5000.0, 0.25  # not the defaults
    config = PheyeConfig(vision_config=vision, text_config=text)

    assert type(config.vision_config) is CLIPVisionConfig and type(config.text_config) is PhiConfig
    assert config.vision_config.patch_size == patch and config.vision_config.image_size == 224
    assert config.vision_config.num_hidden_layers == vision["vision_config"]["num_hidden_layers"]
    assert config.tokens_per_view == (224 // patch) ** 2 + 1
    assert config.text_config.hidden_size == text["hidden_size"]
    assert config.text_config.rope_parameters["rope_theta"] == 5000.0
    assert config.text_config.rope_parameters["partial_rotary_factor"] == 0.25


def test_sub_configs_may_be_objects_or_dicts():
    vision, text = tiny_vision_config(), tiny_text_config()
    by_dict = tiny_config(vision_config=vision.to_dict(), text_config=text.to_dict())
    by_object = tiny_config(vision_config=vision, text_config=text)
    assert by_dict.to_dict() == by_object.to_dict()
    assert type(by_dict.vision_config) is CLIPVisionConfig and type(by_dict.text_config) is PhiConfig


# --- What is refused ---


@pytest.mark.parametrize(
    "name, value, remedy",
    [
        ("tiles_per_side", 0, "at least 1"),
        ("tiles_per_side", 2.5, "an integer"),
        ("tiles_per_side", True, "an integer"),
        ("tiles_per_side", "3", "an integer"),
        ("tiles_per_side", 65, "at most 64"),
        ("cross_attention_interval", 0, "at least 1"),
        ("cross_attention_interval", 5, "language model of 4 layers; make one of them smaller"),
        ("cross_attention_start_layer", -1, "at least 0"),
        ("cross_attention_start_layer", 4, "language model of 4 layers; make one of them smaller"),
        ("cross_attention_reduction", 0, "at least 1"),
        ("cross_attention_reduction", 3, "must divide 64"),
        ("cross_attention_reduction", 128, "must divide 64"),
        ("global_lora_rank", -1, "at least 0"),
        ("local_lora_rank", -1, "at least 0"),
        ("local_lora_rank", 1.5, "an integer"),
        ("initializer_range", 0, "must be greater than 0"),
        ("initializer_range", 1.1, "at most 1"),
        ("initializer_range", "0.01", "must be greater than 0"),
        ("lora_dropout", 1.0, "at least 0 and less than 1"),
        ("lora_dropout", -0.1, "at least 0 and less than 1"),
        ("lora_dropout", float("nan"), "at least 0 and less than 1"),
        ("lora_dropout", "0.1", "at least 0 and less than 1"),
        ("lora_dropout", False, "at least 0 and less than 1"),
        ("lora_dropout", None, "at least 0 and less than 1"),
        *(
            (f"{kind}_lora_alpha", value, "a number from 0 to 1000000")
            for kind in ("global", "local")
            for value in (float("nan"), float("inf"), 1e308, -1.0, True, "16", None)
        ),
    ],
)
def test_numbers_out_of_range_are_refused_with_value_and_remedy(name, value, remedy):
    with pytest.raises(ValueError, match=rf"{name}={re.escape(repr(value))}.*{remedy}"):
        tiny_config(**{name: value})


def test_the_smallest_allowed_numbers_are_taken():
    config = tiny_config(
        tiles_per_side=1, cross_attention_interval=1, global_lora_rank=0, lora_dropout=0, local_lora_alpha=0
    )
    assert (config.views_per_image, config.global_lora_rank, config.local_lora_alpha) == (2, 0, 0)
    assert tiny_config(tiles_per_side=64).views_per_image == 4097


def test_the_parts_numbers_are_refused_by_name():
    with pytest.raises(ValueError, match=r"vision_config\.num_channels=1 must be 3"):
        tiny_config(vision_config=tiny_vision_config(num_channels=1))
    for layers in (0, 10**30):
        with pytest.raises(ValueError, match=rf"text_config\.num_hidden_layers={layers} must be an integer"):
            tiny_config(text_config={**tiny_text_config().to_dict(), "num_hidden_layers": layers})
    with pytest.raises(ValueError, match=r"vision_config\.hidden_size=0 must be an integer of at least 1"):
        tiny_config(vision_config={**tiny_vision_config().to_dict(), "hidden_size": 0, "num_attention_heads": 1})


@pytest.mark.parametrize("name", ["views_per_image", "cross_attention_layers", "to_dict", "_check", "from_variant"])
def test_what_is_no_field_cannot_be_set(name):
    with pytest.raises(ValueError, match=f"{name} is no field of PheyeConfig that can be set"):
        PheyeConfig.from_dict({**tiny_config().to_dict(), name: 5})
    assert PheyeConfig.from_dict({**tiny_config().to_dict(), "unheard_of": 5}).unheard_of == 5


@pytest.mark.parametrize("text, vision", [(72, 32), (64, 96)])
def test_a_width_that_is_no_multiple_of_a_heads_is_refused_with_both_widths(text, vision):
    with pytest.raises(ValueError, match=rf"{text} and {vision}\) must be a multiple of 64"):
        tiny_config(
            text_config=tiny_text_config(hidden_size=text), vision_config=tiny_vision_config(hidden_size=vision)
        )


def test_a_reduction_that_does_not_divide_the_mlp_is_refused_with_both():
    narrow = tiny_text_config(hidden_size=60, num_attention_heads=3)
    with pytest.raises(ValueError, match=r"cross_attention_reduction=32 must divide .*MLP width, 240"):
        tiny_config(text_config=narrow, vision_config=tiny_vision_config(hidden_size=64), cross_attention_reduction=32)


@pytest.mark.parametrize("image_size, patch_size", [(8, 16), ((32, 32), 16), (32, (16, 16)), (32, 0)])
def test_image_and_patch_sizes_that_make_no_grid_are_refused_with_both(image_size, patch_size):
    with pytest.raises(ValueError) as caught:
        tiny_config(vision_config=tiny_vision_config(image_size=image_size, patch_size=patch_size))
    assert f"image_size={image_size} and patch_size={patch_size}" in str(caught.value)


@pytest.mark.parametrize("name", ["vision_config", "text_config"])
@pytest.mark.parametrize("model_type", ["no_such_model", None])
def test_an_unknown_model_type_is_refused_by_name(name, model_type):
    config = {"hidden_size": 64} if model_type is None else {"model_type": model_type, "hidden_size": 64}
    with pytest.raises(ValueError, match=rf"{name} has model_type={model_type!r}.*known model_type"):
        tiny_config(**{name: config})


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("vision_config", {"model_type": "resnet"}),
        ("vision_config", {"model_type": "phi"}),
        ("text_config", {"model_type": "clip"}),
        ("vision_config", 5),
        ("text_config", "phi"),
    ],
    ids=str,
)
def test_a_config_of_another_kind_is_refused_by_name(name, wrong):
    with pytest.raises((TypeError, ValueError), match=name):
        tiny_config(**{name: wrong})


# --- Saving ---


def unusual_config() -> PheyeConfig:
    """No field has its default value."""
    config = tiny_config(
        vision_config=SiglipVisionConfig(**TOWER, image_size=48, patch_size=16),
        text_config=LlamaConfig(vocab_size=99, hidden_size=128, num_hidden_layers=6, num_attention_heads=2),
        tiles_per_side=4,
        cross_attention_interval=2,
        cross_attention_start_layer=3,
        cross_attention_reduction=2,
        global_lora_rank=0,
        global_lora_alpha=3.0,
        local_lora_rank=5,
        local_lora_alpha=7.0,
        lora_dropout=0.25,
    )
    assert all(getattr(config, name) != getattr(PheyeConfig, name) for name in FIELDS)
    return config


def check_equal(config, expected):
    place = "_name_or_path"  # where a config was loaded from
    assert {**config.to_dict(), place: ""} == {**expected.to_dict(), place: ""}
    assert {name: getattr(config, name) for name in FIELDS} == {name: getattr(expected, name) for name in FIELDS}
    assert type(config.vision_config) is type(expected.vision_config)
    assert type(config.text_config) is type(expected.text_config)
    assert config.cross_attention_layers == expected.cross_attention_layers == (3, 5)
    assert config.tokens_per_view == expected.tokens_per_view == 9


def test_to_dict_and_from_dict_are_a_round_trip():
    config = unusual_config()
    as_dict = json.loads(json.dumps(config.to_dict()))
    assert as_dict["model_type"] == "pheye" and as_dict["vision_config"]["model_type"] == "siglip_vision_model"
    check_equal(PheyeConfig.from_dict(as_dict), config)
    check_equal(PheyeConfig(**as_dict), config)


def test_save_and_reload_are_a_round_trip(tmp_path):
    config = unusual_config()
    config.save_pretrained(tmp_path)
    check_equal(PheyeConfig.from_pretrained(tmp_path), config)
    by_code_in_the_folder = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(by_code_in_the_folder).__name__ == "PheyeConfig"
    check_equal(by_code_in_the_folder, config)


def test_a_saved_config_names_the_code_of_every_auto_class_and_pipeline(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert set(saved["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoImageProcessor",
        "AutoProcessor",
    }
    pipelines = saved["custom_pipelines"]
    assert set(pipelines) == {"image-to-text"} and pipelines["image-to-text"]["pt"] == ["AutoModelForImageTextToText"]
    for target in [*saved["auto_map"].values(), pipelines["image-to-text"]["impl"]]:
        module, name = target.split(".")
        assert getattr(importlib.import_module(f"pheye.{module}"), name).__name__ == name
    models = {saved["auto_map"][name] for name in saved["auto_map"] if name.startswith("AutoModel")}
    assert models == {"modeling_pheye.PheyeForConditionalGeneration"}


def test_code_of_ones_own_stands_beside_the_preset():
    own = {"AutoModel": "my_model.Mine", "AutoTokenizer": "my_tokenizer.Mine"}
    config = tiny_config(auto_map=own, custom_pipelines={"ask": {"impl": "my_pipeline.Ask"}})
    assert own.items() <= config.auto_map.items() and config.auto_map["AutoConfig"]
    assert set(config.custom_pipelines) == {"image-to-text", "ask"}
    again = PheyeConfig.from_dict(config.to_dict())
    assert again.auto_map == config.auto_map and again.custom_pipelines == config.custom_pipelines


def test_clip_text_config_is_no_part_of_what_is_saved():
    whole = CLIPConfig(vision_config={**TOWER}, text_config=CLIPTextConfig(hidden_size=64).to_dict())
    saved = tiny_config(vision_config=whole).to_dict()
    assert saved["vision_config"]["model_type"] == "clip_vision_model" and "text_config" not in saved["vision_config"]


# --- What other libraries ask for ---


def test_positions_are_those_that_the_language_model_learned():
    def positions(text_config) -> int | None:
        return tiny_config(text_config=text_config).text_positions

    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0, "partial_rotary_factor": 0.5}
    gpt2 = GPT2Config(n_embd=64, n_layer=4, n_head=4, n_positions=24)
    assert positions(tiny_text_config(max_position_embeddings=16)) == 16
    assert positions(tiny_text_config(max_position_embeddings=16, rope_parameters=scaled)) is None
    assert positions(gpt2) == 24
    assert positions(BloomConfig(hidden_size=64, n_layer=4, n_head=4)) is None
    assert learned_positions(gpt2) == 24  # and it fails behind them
    assert learned_positions(tiny_text_config()) is None


def test_no_token_stands_for_an_image_and_one_that_was_set_stays():
    assert tiny_config().image_token_id == -1
    assert "image_token_id" not in tiny_config().to_dict()
    assert PheyeConfig.from_dict({**tiny_config().to_dict(), "image_token_id": 5}).image_token_id == 5


def test_transformers_serve_looks_where_the_model_is_named():
    """An internal name: this says when it is gone, and tests/test_remote_code.py what it is for."""
    assert modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["pheye"] == "PheyeForConditionalGeneration"
    server = Path(transformers.__file__).parent / "cli" / "serving" / "model_manager.py"
    assert "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES" in server.read_text()


def test_fields_that_override_a_saved_configuration_are_checked_like_it(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert PheyeConfig.from_pretrained(tmp_path, canvases="fila").canvases[0] == [1, 2]
    assert PheyeConfig.from_pretrained(tmp_path, text_config={"vocab_size": 300}).text_config.vocab_size == 300
    config, unused = PheyeConfig.from_pretrained(tmp_path, tiles_per_side=3, nothing=1, return_unused_kwargs=True)
    assert config.views_per_image == 10 and unused == {"nothing": 1}
    for wrong, said in (({"tiles_per_side": 0}, "tiles_per_side=0"), ({"canvases": [[0, 1]]}, r"entry \[0, 1\]")):
        with pytest.raises(ValueError, match=said):
            PheyeConfig.from_pretrained(tmp_path, **wrong)
