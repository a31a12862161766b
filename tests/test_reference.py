"""The reference against the golden cases: it must agree with the published implementation without any help of ours."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig

from pheye.benchmarks.conversion import published_state
from pheye.conversion.reference import Reference, attention, draw_test_picture, layer_norm

from tiny import tiny_config, tiny_text_config, tiny_vision_config

pytestmark = pytest.mark.once

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
CASES = ("x2-448", "x4-672")
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def load_case(case: str, change=None) -> tuple[Reference, dict]:
    """The reference on a golden checkpoint whose tensors `change` may alter, and what was recorded."""
    folder = GOLDEN / case
    tensors = torch.load(folder / "checkpoint.pt", weights_only=True)
    if change is not None:
        change(tensors)
    encoder, decoder = (AutoConfig.from_pretrained(folder / part) for part in ("encoder", "decoder"))
    settings = json.loads((folder / "config.json").read_text())
    return Reference(tensors, settings, encoder.vision_config, decoder), load_file(folder / "expected.safetensors")


def run(reference: Reference, expected: dict, case: str, number: int):
    pixels = reference.pixels(Image.open(GOLDEN / case / f"image{number}.png"), MEAN, STD)
    features = reference.features(pixels)
    ids = expected["input_ids"][number][expected["attention_mask"][number].bool()]
    return pixels, features, reference.logits(ids, features)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("number", [0, 1])
def test_reference_agrees_with_the_published_implementation(case, number):
    reference, expected = load_case(case)
    pixels, features, logits = run(reference, expected, case, number)
    torch.testing.assert_close(pixels[..., ::16, ::16], expected["pixel_values_probe"][number], atol=1e-6, rtol=0)
    torch.testing.assert_close(features, expected["vision_features"][number], atol=2e-4, rtol=0)
    torch.testing.assert_close(logits, expected[f"logits_{number}"][0], atol=2e-3, rtol=0)


def test_every_live_tensor_matters_and_no_dead_one_does():
    vision, text = tiny_vision_config(num_hidden_layers=1), tiny_text_config(num_hidden_layers=2)
    config, generator = tiny_config(vision_config=vision, text_config=text), torch.Generator().manual_seed(0)
    tensors = published_state(config, lambda name, shape: torch.randn(shape, generator=generator) * 0.3)
    settings = {"first_level": True, "level": 2, "cross_interval": 2, "from_layer": 0, "reduce": 1}
    reference = Reference(tensors, settings, vision, text)
    pixels, ids = torch.randn((5, 3, 32, 32), generator=generator), torch.arange(9)
    features = reference.features(pixels)
    logits = reference.logits(ids, features)
    unseen = set()
    for name, original in tensors.items():
        reference.tensors[name] = original + torch.linspace(0.5, 1.5, original.numel()).view(original.shape)
        if name.startswith("vision_encoder."):
            seen = not torch.equal(reference.features(pixels), features)
        else:
            seen = not torch.equal(reference.logits(ids, features), logits)
        if not seen:
            unseen.add(name)
        reference.tensors[name] = original
    copies = ("lang_encoder.old_decoder_blocks", "lang_encoder.cross_attn_layers")
    dead = (*copies, "vision_encoder.norm_lvl_3", "vision_encoder.vision_model.base_model.model.post_layernorm")
    assert unseen == {name for name in tensors if name.startswith(dead)}


def test_dead_view_rows_do_not_matter():
    def change(tensors):
        tensors["vision_encoder.connector.embedding.weight"][5:] += 1

    reference, expected = load_case("x2-448", change)
    _, features, _ = run(reference, expected, "x2-448", 0)
    torch.testing.assert_close(features, expected["vision_features"][0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_torch(causal):
    q, k, v = torch.randn(3, 7, 24)
    heads = [x.view(7, 3, 8).transpose(0, 1) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=causal, scale=0.3)
    torch.testing.assert_close(attention(q, k, v, 3, 0.3, causal), expected.transpose(0, 1).reshape(7, 24))


def test_layer_norm_equals_torch():
    x, weight, bias = torch.randn(5, 16) * 3 + 1, torch.randn(16), torch.randn(16)
    expected = torch.nn.functional.layer_norm(x, (16,), weight, bias, eps=1e-3)
    torch.testing.assert_close(layer_norm(x, weight, bias, eps=1e-3), expected)


def test_other_families_are_refused_by_name():
    text = tiny_text_config()
    text.model_type = "llama"
    with pytest.raises(ValueError, match="clip_vision_model with llama"):
        Reference({}, {"level": 2}, tiny_vision_config(), text)


def test_the_test_picture_is_always_the_same_and_not_square():
    assert draw_test_picture().tobytes() == draw_test_picture().tobytes()
    assert draw_test_picture().size == (390, 270)
