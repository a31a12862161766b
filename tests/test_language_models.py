"""Any causal language model of transformers can be the decoder; one that would drop the image is refused."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pheye import PheyeForConditionalGeneration

from tiny import randomize, tiny_config, tiny_image, tiny_processor

SIZES = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LAYERS = 4
GPT2 = {"n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": 512}
FAMILIES = {
    "phi": {"num_key_value_heads": 4},
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "smollm3": {},
    "olmo2": {"num_key_value_heads": 4},
    "gpt2": GPT2,
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "granite": {},
    "phi3": {},
    "stablelm": {},
}
DROPPING_FAMILIES = {
    "bloom": {"n_head": 4, "n_layer": LAYERS},
    "falcon": {},
    "gpt_neo": {"num_layers": LAYERS, "attention_types": [[["global"], LAYERS]], "num_heads": 4},
    "mpt": {"d_model": 64, "n_layers": LAYERS, "n_heads": 4},
}
GPTJ = {"n_embd": 64, "n_layer": LAYERS, "n_head": 4, "rotary_dim": 8}


def text_config(family: str, kwargs: dict):
    # Families with names of their own for some sizes (GPT-2's n_embd) map the common names to them.
    config_class = CONFIG_MAPPING[family]
    derived = {name for name in SIZES if isinstance(getattr(config_class, name, None), property)}
    common = {name: SIZES[name] for name in SIZES.keys() - config_class.attribute_map.keys() - derived}
    return config_class(**{**common, **kwargs})


def build(family: str, kwargs: dict) -> PheyeForConditionalGeneration:
    config = tiny_config(text_config=text_config(family, kwargs))
    return randomize(PheyeForConditionalGeneration(config)).eval()


def inputs(images=(0, 1)):
    texts = ["What is written on the sign?", "Why?"][: len(images)]
    return tiny_processor()(images=[tiny_image(seed) for seed in images], text=texts, return_tensors="pt")


@pytest.mark.parametrize("family", FAMILIES)
def test_family_reads_the_image_and_generates_alike_with_every_cache(family):
    model = build(family, FAMILIES[family])
    batch = inputs()
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    dynamic = model.generate(**batch, **arguments)
    assert torch.equal(dynamic, model.generate(**batch, **arguments, use_cache=False))
    assert torch.equal(dynamic, model.generate(**batch, **arguments, cache_implementation="static"))
    beams = model.generate(**batch, **arguments, num_beams=3)
    assert torch.equal(beams, model.generate(**batch, **arguments, num_beams=3, use_cache=False))

    logits = model(**batch).logits
    batch["pixel_values"] = batch["pixel_values"].flip(0)
    assert (logits - model(**batch).logits).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_family_without_an_image_is_the_bare_language_model(family):
    model = build(family, FAMILIES[family])
    bare = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    bare.load_state_dict(model.model.language_model.state_dict())
    batch = inputs()
    batch.pop("pixel_values")
    assert torch.equal(model(**batch).logits, bare(**batch).logits)
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(**batch, **arguments), bare.generate(**batch, **arguments))


@pytest.mark.parametrize("family", FAMILIES)
def test_family_survives_saving_and_resizing(family, tmp_path):
    model = build(family, FAMILIES[family])
    batch = inputs()
    model.resize_token_embeddings(300)
    assert model.config.vocab_size == 300
    assert model(**batch).logits.shape[-1] == 300
    model.save_pretrained(tmp_path)
    reloaded, info = PheyeForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model(**batch).logits, reloaded.eval()(**batch).logits)
    model.resize_token_embeddings(310, mean_resizing=False)  # new rows are drawn, of heads with and without a bias
    assert model(**batch).logits.shape[-1] == 310


@pytest.mark.parametrize("family", DROPPING_FAMILIES)
def test_family_that_would_drop_the_image_is_refused_by_name(family):
    model = build(family, DROPPING_FAMILIES[family])
    name = type(model.model.language_model).__name__
    with pytest.raises(ValueError, match=f"{name} cannot be Pheye's language model.*2 of 2"):
        model(**inputs())
    with pytest.raises(ValueError, match=name):
        model.generate(**inputs(), max_new_tokens=2)


def test_family_that_began_to_pass_keywords_on_reads_the_image_or_is_refused():
    model = build("gptj", GPTJ)  # since transformers 5.24
    batch = inputs()
    try:
        logits = model(**batch).logits
    except ValueError as error:
        assert "GPTJForCausalLM cannot be Pheye's language model" in str(error)
    else:
        batch["pixel_values"] = batch["pixel_values"].flip(0)
        assert (logits - model(**batch).logits).abs().max() > 1e-2


def test_model_without_a_list_of_layers_is_refused_by_name():
    config = CONFIG_MAPPING["ctrl"](vocab_size=257, n_embd=64, n_layer=LAYERS, n_head=4)
    with pytest.raises(ValueError, match="CTRLLMHeadModel cannot be a Pheye language model"):
        PheyeForConditionalGeneration(tiny_config(text_config=config))
