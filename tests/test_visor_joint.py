"""The joint form against the sequence [image; text], read by a language model of transformers that has one layer."""

import copy
import math

import pytest
import torch
from accelerate import cpu_offload
from test_visor import LAYERS, close, visor_config
from transformers import AutoModel, GPTNeoXConfig, LlamaConfig, MistralConfig, OPTConfig, Qwen2Config

from pheye import PheyeForConditionalGeneration

from tiny import randomize, tiny_pixels, tiny_text, tiny_text_config

SIZES = {
    "vocab_size": 257,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FAMILIES = {
    "phi": tiny_text_config(num_hidden_layers=6),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
}


def joint_model(family: str, attention: str = "sdpa") -> PheyeForConditionalGeneration:
    config = visor_config("joint", text_config=copy.deepcopy(FAMILIES[family]), lora_dropout=0.0)
    model = randomize(PheyeForConditionalGeneration(config)).eval()
    model.set_attn_implementation(attention)
    return model


def one_layer(model: PheyeForConditionalGeneration, layer: int) -> torch.nn.Module:
    """A language model of the same family with this layer alone, and nothing behind it."""
    config = copy.deepcopy(model.config.text_config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    reference = AutoModel.from_config(config, attn_implementation="eager").eval()
    reference.layers[0].load_state_dict(model.model.decoder_layers()[layer].state_dict())
    for name in ("norm", "final_layernorm"):
        if hasattr(reference, name):
            setattr(reference, name, torch.nn.Identity())
    return reference


class Seen:
    """What goes into and comes out of the first joint layer in a call of a model."""

    def __init__(self, model: PheyeForConditionalGeneration, monkeypatch):
        joint, number = model.model.joint_attention, LAYERS["joint"][0]
        self.text = self.both = self.image = None
        see_text, see_both = joint.see_text, joint.see_both

        def before(layer, args):
            if self.text is None:
                self.text = args[0]

        def recorded_text(layer, hidden_states, *args):
            found = see_text(layer, hidden_states, *args)
            self.both = found if self.both is None else self.both
            return found

        def recorded_both(*args):
            image, found = see_both(*args)
            self.both = found if self.both is None else self.both
            return image, found

        def after(layer, args):
            self.image = args[0] if self.image is None else self.image

        monkeypatch.setattr(joint, "see_text", recorded_text)
        monkeypatch.setattr(joint, "see_both", recorded_both)
        model.model.decoder_layers()[number].register_forward_pre_hook(before)
        # What it gave for the image, which is refined before the next block reads it.
        block = model.config.cross_attention_layers.index(number + 1)
        model.model.cross_attention_blocks[block].register_forward_pre_hook(lambda block, args: after(block, args[1:]))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_joint_layer_is_the_layer_on_image_and_text_in_one_sequence(
    family, attention, padded, checkpointed, monkeypatch
):
    model, text, pixels = joint_model(family, attention), tiny_text(), tiny_pixels()
    mask = torch.ones_like(text)
    if padded:
        mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask, "position_ids": positions, "vision_budget": 1}
    seen = Seen(model, monkeypatch)
    if checkpointed:
        model.train().gradient_checkpointing_enable()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    image = model(text, pixels, **inputs).image_hidden_states
    joint = model.model.joint_attention
    states = joint.visual_up(image)
    tokens = states.shape[1]
    expected = one_layer(model, LAYERS["joint"][0])(
        inputs_embeds=torch.cat([states, seen.text], dim=1),
        attention_mask=torch.cat([torch.ones(2, tokens, dtype=torch.long), mask], dim=1),
        position_ids=torch.cat([torch.zeros(2, tokens, dtype=torch.long), positions], dim=1),
    ).last_hidden_state
    close(seen.image, image + joint.visual_down(expected[:, :tokens] - states))
    close(seen.both[mask.bool()], expected[:, tokens:][mask.bool()])


@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways_to_compute_it_have_the_same_loss_and_gradients(family):
    found = []
    for checkpointed in (False, True):
        model, text = joint_model(family).train(), tiny_text()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        output = model(text, tiny_pixels(), labels=text, vision_budget=torch.tensor([3, 1]))
        output.loss.backward()
        found.append((output.loss, {name: weight.grad for name, weight in model.named_parameters()}))
    close(*(loss for loss, _ in found))
    for name, gradient in found[0][1].items():
        if gradient is None:
            assert found[1][1][name] is None, name
        else:
            close(found[1][1][name], gradient)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_states_and_weights_on_request_are_one_of_each_layer(checkpointed):
    model, text = joint_model("llama", "eager"), tiny_text()
    if checkpointed:
        model.train().gradient_checkpointing_enable()
    output = model(text, tiny_pixels(), vision_budget=3, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == len(model.model.decoder_layers()) + 1
    assert {weights.shape[-1] for weights in output.attentions} == {text.shape[1]}
    assert len(output.attentions) == len(model.model.decoder_layers())
    generated = model.eval().generate(
        text, pixel_values=tiny_pixels(), max_new_tokens=2, return_dict_in_generate=True, output_hidden_states=True
    )
    assert {len(states) for states in generated.hidden_states} == {len(output.hidden_states)}


def test_an_offloaded_model_gives_the_same():
    model, text = joint_model("llama"), tiny_text()
    offloaded = cpu_offload(copy.deepcopy(model), torch.device("cpu"))
    close(offloaded(text, tiny_pixels(), vision_budget=3).logits, model(text, tiny_pixels(), vision_budget=3).logits)


def test_text_gets_by_the_gate_what_it_saw_with_its_image(monkeypatch):
    model, number, runs, after = joint_model("llama"), LAYERS["joint"][0], [], []
    seen, config = Seen(model, monkeypatch), model.config
    model.model.decoder_layers()[number].register_forward_hook(lambda layer, args, output: runs.append(output))
    block = model.model.cross_attention_blocks[config.cross_attention_layers.index(number + 1)]
    block.register_forward_pre_hook(lambda block, args: after.append(args[0]))
    model(tiny_text(), tiny_pixels(), vision_budget=1)
    alone = runs[0][0] if isinstance(runs[0], tuple) else runs[0]
    gate = model.model.joint_attention.gates[0].item()
    assert abs(gate) > 0.1
    close(after[0], alone + math.tanh(gate) * (seen.both - alone))


def test_the_image_never_sees_the_text():
    model = joint_model("llama")
    states = []
    model.model.cross_attention_blocks[-1].register_forward_pre_hook(lambda block, args: states.append(args[1]))
    for text in (tiny_text(2, 7), tiny_text(2, 4).flip(0)):
        model(text, tiny_pixels(), vision_budget=3)
    close(*states)


@pytest.mark.parametrize(
    ("text_config", "words"),
    [
        (OPTConfig(**{**SIZES, "ffn_dim": 96}), "OPTModel.*position_embeddings.*block"),
        (GPTNeoXConfig(**SIZES), "GPTNeoXModel.*block"),
        (MistralConfig(**SIZES, sliding_window=8, num_key_value_heads=2), "MistralModel.*sliding window"),
    ],
)
def test_language_models_that_cannot_are_refused_by_name(text_config, words):
    with pytest.raises(ValueError, match=words):
        PheyeForConditionalGeneration(visor_config("joint", text_config=text_config))


def test_a_language_model_with_sinks_is_refused(monkeypatch):
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaAttention.sinks", 1, raising=False)
    with pytest.raises(ValueError, match=r"LlamaModel.*sinks"):
        joint_model("llama")


def test_attention_that_cannot_be_masked_is_refused():
    model = joint_model("llama")
    model.config.text_config._attn_implementation = "flex_attention"
    with torch.no_grad(), pytest.raises(ValueError, match=r"joint.*flex_attention.*sdpa"):
        model(tiny_text(), tiny_pixels(), vision_budget=3)
