"""A new Pheye from a pretrained vision transformer and a pretrained language model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    GenerationConfig,
    PhiForCausalLM,
    SiglipVisionConfig,
)

from pheye import PheyeForConditionalGeneration, PheyeProcessor
from pheye.image_processing_pheye import OPENAI_CLIP_MEAN

from tiny import randomize, tiny_image, tiny_text_config, tiny_tokenizer, tiny_vision_config

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
CONFIG = {"tiles_per_side": 2, "cross_attention_interval": 2}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts") / "lm"
    model = randomize(PhiForCausalLM(tiny_text_config())).to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0, max_new_tokens=7)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A whole CLIP, text tower included."""
    folder = tmp_path_factory.mktemp("parts") / "clip"
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=9,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config = CLIPConfig(text_config=text.to_dict(), vision_config=tiny_vision_config().to_dict(), projection_dim=8)
    randomize(CLIPModel(config), seed=1).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'
    )
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts") / "siglip"
    randomize(AutoModel.from_config(SiglipVisionConfig(intermediate_size=48, **VIT)), seed=1).save_pretrained(folder)
    return folder


def stored(folder) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_initial(model):
    """The trained parts are in the paper's initial state."""
    block = model.model.cross_attention_blocks[0]
    assert block.to_q.weight.float().std().item() == pytest.approx(0.01, rel=0.1)
    assert not block.to_q.bias.any()
    assert all(not lora.B.any() and lora.A.any() for lora in model.model.local_lora.values())


def test_parts_are_taken_as_they_are_and_the_rest_is_initial(clip, language_model):
    model = PheyeForConditionalGeneration.from_pretrained_parts(clip, language_model, dtype=torch.float32, **CONFIG)
    reference = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32).state_dict()
    for name, tensor in model.model.language_model.state_dict().items():
        assert torch.equal(tensor, reference[name]), name
    reference = CLIPModel.from_pretrained(clip).vision_model.state_dict()
    tower = model.model.vision_tower.state_dict()
    assert tower.keys() == reference.keys()
    for name, tensor in tower.items():
        assert torch.equal(tensor, reference[name]), name
    assert_initial(model)
    assert model.config.tiles_per_side == 2
    assert model.generation_config.max_new_tokens == 7


@pytest.mark.parametrize("name", ["revision", "torch_dtype", "tile_per_side", "token"])
def test_arguments_that_would_do_nothing_are_refused(clip, language_model, name):
    with pytest.raises(TypeError, match=f"has no argument {name}; it takes fields of PheyeConfig"):
        PheyeForConditionalGeneration.from_pretrained_parts(clip, language_model, **CONFIG, **{name: "x"})
    with pytest.raises(ValueError, match="one of high_res and high_res_vision_config"):
        PheyeForConditionalGeneration.from_pretrained_parts(clip, language_model, "x", high_res_vision_config={})


def test_the_language_model_gives_the_dtype_unless_one_is_named(clip, language_model):
    model = PheyeForConditionalGeneration.from_pretrained_parts(clip, language_model, **CONFIG)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    model = PheyeForConditionalGeneration.from_pretrained_parts(clip, language_model, dtype=torch.float16, **CONFIG)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_no_part_is_in_memory_twice(siglip, language_model, monkeypatch):
    loaded = {}
    for auto in (AutoModel, AutoModelForCausalLM):

        def spy(*args, auto=auto, load=auto.from_pretrained, **kwargs):
            part = load(*args, **kwargs)
            loaded[auto] = {name: tensor.data_ptr() for name, tensor in part.state_dict().items()}
            return part

        monkeypatch.setattr(auto, "from_pretrained", spy)
        monkeypatch.setattr(auto, "from_config", None)  # would make a second one
    model = PheyeForConditionalGeneration.from_pretrained_parts(siglip, language_model, **CONFIG).model
    for auto, part in ((AutoModel, model.vision_tower), (AutoModelForCausalLM, model.language_model)):
        assert {name: tensor.data_ptr() for name, tensor in part.state_dict().items()} == loaded[auto]


def test_new_model_saves_loads_and_answers_almost_as_its_language_model(siglip, language_model, tmp_path):
    model = PheyeForConditionalGeneration.from_pretrained_parts(siglip, language_model, dtype=torch.float32, **CONFIG)
    model.save_pretrained(tmp_path)
    reloaded, info = PheyeForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids, pixel_values = torch.arange(1, 9)[None], torch.randn(1, 5, 3, 32, 32)
    assert torch.equal(model(ids, pixel_values).logits, reloaded(ids, pixel_values).logits)
    bare = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)(ids).logits
    assert (model(ids, pixel_values).logits - bare).abs().max() < 0.05 * bare.abs().max()


def test_example_goes_from_two_folders_to_a_saved_trainable_model(clip, language_model, tmp_path):
    example = Path(__file__).parent.parent / "examples" / "new_model.py"
    arguments = ["--vision", clip, "--language_model", language_model, "--output", tmp_path]
    arguments += ["--tiles_per_side", "2", "--interval", "2"]
    result = subprocess.run([sys.executable, example, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    model = PheyeForConditionalGeneration.from_pretrained(tmp_path)
    processor = PheyeProcessor.from_pretrained(tmp_path)
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3] != list(OPENAI_CLIP_MEAN)
    assert f"{model.num_parameters():,} parameters" in result.stdout
    assert_initial(model)

    batch = processor(images=tiny_image(), text="What? A cat.", return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
