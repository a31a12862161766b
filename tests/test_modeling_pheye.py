"""The architecture: against the published implementation's outputs, and against plain formulas."""

import copy
import io
import json
import logging
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DynamicCache, GPT2Config, StaticCache, Trainer, TrainingArguments

from pheye import PheyeForConditionalGeneration, PheyeModel, PheyeProcessor
from pheye.layers_pheye import CALL, Call, put_before

from tiny import randomize, tiny_config, tiny_model, tiny_text_config
from tiny import tiny_pixels as pixels
from tiny import tiny_text as text

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
GPT2 = {"text_config": GPT2Config(vocab_size=257, n_embd=128, n_layer=4, n_head=4, n_positions=16)}


def static_cache(model) -> StaticCache:
    return StaticCache(config=model.config.text_config, max_cache_len=32)


# --- Against the published implementation ---


@pytest.fixture(scope="module", params=["x2-448", "x4-672"])
def golden(request, tmp_path_factory):
    """Source folder, the converted one, and the recorded outputs."""
    from pheye.convert_checkpoint import main as convert_checkpoint

    source, folder = GOLDEN / request.param, tmp_path_factory.mktemp("golden") / request.param
    convert_checkpoint([str(source), str(folder)])
    return source, folder, load_file(source / "expected.safetensors")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_golden_outputs_in_float32(golden, attention):
    source, folder, expected = golden
    model = PheyeForConditionalGeneration.from_pretrained(folder, attn_implementation=attention).eval()
    processor = PheyeProcessor.from_pretrained(folder)
    images = processor.image_processor([source / f"image{i}.png" for i in range(2)], return_tensors="pt").pixel_values
    with torch.no_grad():
        features = model.get_image_features(images).last_hidden_state
    assert torch.allclose(features, expected["vision_features"], rtol=0, atol=2e-4)

    answers = json.loads((source / "expected.json").read_text())["texts"]
    for row in range(2):
        image = images[row : row + 1]
        input_ids = expected["input_ids"][row][expected["attention_mask"][row].bool()][None]
        labels = input_ids.clone()
        labels[:, :-6] = -100
        with torch.no_grad():
            outputs = model(input_ids, image, labels=labels)
        assert torch.allclose(outputs.logits, expected[f"logits_{row}"], rtol=0, atol=2e-3)
        assert torch.allclose(outputs.loss, expected[f"loss_{row}"][0], rtol=0, atol=1e-4)
        for beams in (1, 3):
            generated = model.generate(
                input_ids=input_ids, pixel_values=image, max_new_tokens=12, num_beams=beams, do_sample=False
            )
            assert torch.equal(generated, expected[f"generated_{row}_beams{beams}"])
            answer = processor.post_process_image_text_to_text(generated[:, input_ids.shape[1] :])[0]
            assert answer.lstrip() == answers[f"{row}_beams{beams}"]


def test_golden_outputs_in_bfloat16(golden):
    source, folder, expected = golden
    model = PheyeForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    same_weights = copy.deepcopy(model).float()  # rounding the weights alone moves the features by 0.014 on average
    processor = PheyeProcessor.from_pretrained(folder)
    images = processor.image_processor([source / f"image{i}.png" for i in range(2)], return_tensors="pt").pixel_values
    with torch.no_grad():
        features = model.get_image_features(images).last_hidden_state
        assert features.dtype == torch.bfloat16
        error = (features - same_weights.get_image_features(images).last_hidden_state).abs()
        assert error.max() < 0.3
        assert error.mean() < 0.02
        error = (features - expected["vision_features"]).abs()
        assert error.max() < 0.3
        assert error.mean() < 0.025
        for row in range(2):
            input_ids = expected["input_ids"][row][expected["attention_mask"][row].bool()][None]
            labels = input_ids.clone()
            labels[:, :-6] = -100
            outputs = model(input_ids, images[row : row + 1], labels=labels)
            assert (outputs.logits - expected[f"logits_{row}"]).abs().max() < 0.5
            assert (outputs.loss - expected[f"loss_{row}"][0]).abs() < 5e-2


# --- Against plain formulas ---


@pytest.mark.parametrize(
    ("interval", "start", "layers"), [(1, 0, (0, 1, 2, 3)), (2, 0, (1, 3)), (2, 2, (3,)), (3, 0, (2,)), (4, 1, (3,))]
)
def test_blocks_run_right_before_their_layers(interval, start, layers):
    model = tiny_model(cross_attention_interval=interval, cross_attention_start_layer=start).model
    assert model.config.cross_attention_layers == layers
    order = []
    for index, layer in enumerate(model.language_model.model.layers):
        layer.register_forward_hook(lambda module, args, output, index=index: order.append(f"layer {index}"))
    for index, block in zip(layers, model.cross_attention_blocks, strict=True):
        block.register_forward_hook(lambda module, args, output, index=index: order.append(f"block {index}"))
    model(text(), pixels())
    expected = []
    for index in range(4):
        expected += [f"block {index}"] * (index in layers) + [f"layer {index}"]
    assert order == expected


def test_initial_state_is_that_of_the_paper():
    config = tiny_config(
        text_config=tiny_text_config(hidden_size=256, num_hidden_layers=40), cross_attention_interval=20
    )
    model = PheyeForConditionalGeneration(config).model
    for block in model.cross_attention_blocks:
        for linear in (block.to_q, block.to_k, block.to_v, block.mlp_in):
            assert linear.weight.std().item() == pytest.approx(0.01, rel=0.05)
        for linear in (block.to_out, block.mlp_out):
            assert linear.weight.std().item() == pytest.approx(0.01 / math.sqrt(2 * 40), rel=0.05)
        for linear in (block.to_q, block.to_k, block.to_v, block.to_out, block.mlp_in, block.mlp_out):
            assert not linear.bias.any()
        assert (block.attention_norm.weight == 1).all()
    assert model.view_encoding.view_embedding.weight.std().item() == pytest.approx(0.02, rel=0.15)
    for lora in (model.global_lora, model.local_lora):
        for update in lora.values():
            assert not update.B.any()
            bound = math.sqrt(3) * math.sqrt(2 / 6 / update.A[0].numel())  # Kaiming uniform, a = sqrt(5)
            assert 0.8 * bound < update.A.abs().max() <= bound
    for spread in (0.01, 0.04):
        shallow = tiny_config(text_config=tiny_text_config(hidden_size=256), initializer_range=spread)
        block = PheyeModel(shallow).cross_attention_blocks[0]
        assert block.mlp_in.weight.std().item() == pytest.approx(spread, rel=0.05)
        assert block.mlp_out.weight.std().item() == pytest.approx(spread / math.sqrt(2 * 36), rel=0.05)


def test_fresh_model_answers_almost_as_its_language_model():
    torch.manual_seed(0)
    model = PheyeForConditionalGeneration(tiny_config()).eval()
    with_image, without = model(text(), pixels()).logits, model(text()).logits
    assert 0 < (with_image - without).abs().max() < 0.05 * without.abs().max()


# --- Inputs and outputs ---


def test_image_features_can_stand_in_for_pixels(model):
    outputs = model(text(), pixels())
    features = model.get_image_features(pixels()).last_hidden_state
    assert features.shape == (2, 5 * 5, 32)
    assert torch.equal(outputs.image_hidden_states, features)
    assert torch.equal(model(text(), image_hidden_states=features).logits, outputs.logits)


@pytest.mark.parametrize(("stored", "of_model"), [("float32", "bfloat16"), ("float16", "float32")])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 3}], ids=str)
def test_stored_features_of_another_dtype_are_taken_as_pixels_are(model, stored, of_model, options):
    asked = copy.deepcopy(model).to(getattr(torch, of_model))
    features = model.get_image_features(pixels()).last_hidden_state.to(getattr(torch, stored))
    expected = asked(text(), image_hidden_states=features.to(asked.dtype)).logits
    assert torch.equal(asked(text(), image_hidden_states=features).logits, expected)
    ids = asked.generate(text(), image_hidden_states=features, max_new_tokens=3, **options)
    assert torch.equal(ids, asked.generate(text(), image_hidden_states=features.to(asked.dtype), max_new_tokens=3))


@pytest.mark.parametrize("shape", [(2, 7, 32), (2, 50, 32), (2, 25, 64), (25, 32), (2, 5, 5, 32)], ids=str)
def test_stored_features_of_another_model_are_refused_with_both_shapes(model, shape):
    features = torch.zeros(shape)
    said = rf"image_hidden_states has shape \({', '.join(map(str, shape))}\).*reads \(images, 25, 32\)"
    with pytest.raises(ValueError, match=said):
        model(text(), image_hidden_states=features)
    with pytest.raises(ValueError, match=said):
        model.model(text(), image_hidden_states=features)
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"num_beams": 2}):
        with pytest.raises(ValueError, match=said):
            model.generate(text(), image_hidden_states=features, max_new_tokens=1, **options)


def test_outputs_are_read_by_name_whatever_the_config_says():
    model = tiny_model()
    expected = model(text(), pixels()).logits
    ids = model.generate(text(), pixel_values=pixels(), max_new_tokens=2)
    model.config.return_dict = False
    assert torch.equal(model(text(), pixels())[0], expected)
    assert torch.equal(model(text(), pixels(), return_dict=True).logits, expected)
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 3}):
        assert torch.equal(model.generate(text(), pixel_values=pixels(), max_new_tokens=2, **options), ids)
    assert isinstance(model.get_image_features(pixels()), tuple)


def test_logits_to_keep(model):
    logits = model(text(), pixels()).logits
    assert torch.allclose(model(text(), pixels(), logits_to_keep=1).logits, logits[:, -1:], atol=1e-6)
    kept = torch.tensor([2, 5])
    assert torch.allclose(model(text(), pixels(), logits_to_keep=kept).logits, logits[:, kept], atol=1e-6)


def test_inputs_embeds_in_place_of_ids(model):
    embeds = model.get_input_embeddings()(text())
    assert torch.equal(model(inputs_embeds=embeds, pixel_values=pixels()).logits, model(text(), pixels()).logits)


def test_base_model_gives_the_hidden_states_of_the_language_model(model):
    states = model.model(text(), pixels()).last_hidden_state
    head = model.get_output_embeddings()
    assert torch.equal(head(states), model(text(), pixels()).logits)


def test_loss_is_the_mean_over_labelled_tokens_or_over_a_given_number(model):
    labels = text()
    labels[0, :4] = -100
    outputs = model(text(), pixels(), labels=labels)
    losses = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    assert outputs.loss.item() == pytest.approx(losses.sum().item() / 9, rel=1e-5)
    summed = model(text(), pixels(), labels=labels, num_items_in_batch=100).loss
    assert summed.item() == pytest.approx(losses.sum().item() / 100, rel=1e-5)


def test_left_padding_does_not_change_a_row(model):
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), text(1)], dim=1)
    mask = (torch.arange(10) >= 3).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, pixels(1), attention_mask=mask, position_ids=positions).logits[:, 3:]
    assert torch.allclose(logits, model(text(1), pixels(1)).logits, atol=1e-4)


def test_nothing_of_a_call_stays_on_the_model(model):
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    model(text(), pixels())
    model.generate(text(), pixel_values=pixels(), max_new_tokens=2, num_beams=2)
    for name, module in model.named_modules():
        assert set(vars(module)) == before[name], name
        assert not any(isinstance(value, torch.Tensor | DynamicCache) for value in vars(module).values()), name


def test_copied_and_pickled_models_give_the_same_and_are_independent():
    model = tiny_model()
    logits = model(text(), pixels()).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(text(), pixels()).logits, logits)
        randomize(other.model.cross_attention_blocks, seed=1)
        randomize(other.model.local_lora, seed=1)
        assert not torch.allclose(other(text(), pixels()).logits, logits)
    assert torch.equal(model(text(), pixels()).logits, logits)


def replica(network: nn.Module) -> nn.Module:
    """As `nn.DataParallel` makes it for another GPU."""
    copies = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, made in copies.items():
        made._modules.update({name: copies.get(child) for name, child in module._modules.items()})
        made._parameters.clear()
        made.__dict__.update(
            {name: None if parameter is None else parameter.clone() for name, parameter in module._parameters.items()}
        )
    return copies[network]


def copied_attributes(network: nn.Module) -> nn.Module:
    other = type(network).__new__(type(network))
    other.__dict__.update(network.__dict__)
    return other


@pytest.mark.parametrize("make", [replica, copied_attributes, copy.copy])
def test_copies_that_share_hooks_are_refused_with_the_remedy(model, make):
    remedy = "nn.DataParallel.*accelerate launch.*CUDA_VISIBLE_DEVICES.*deepcopy"
    other = make(model.model)
    for call in (lambda: other(text(), pixels()), lambda: other.get_image_features(pixels()), lambda: other(text())):
        with pytest.raises(ValueError, match=remedy):
            call()
    if make is replica:
        with pytest.raises(ValueError, match=remedy):
            replica(model)(text(), pixels())
    else:
        assert torch.equal(make(model)(text(), pixels()).logits, model(text(), pixels()).logits)  # the same parts
    assert torch.equal(copy.deepcopy(model)(text(), pixels()).logits, model(text(), pixels()).logits)


def test_parts_take_the_dtype_of_the_whole():
    config = tiny_config(text_config=tiny_text_config(dtype="bfloat16"))
    assert {parameter.dtype for parameter in PheyeModel(config).parameters()} == {torch.float32}
    half = PheyeForConditionalGeneration._from_config(tiny_config(), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    outputs = half(text(), pixels())  # float32 pixels into a bfloat16 model
    assert outputs.logits.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(dtype):
    model = tiny_model()
    expected = model(text(), pixels()).logits
    logits = copy.deepcopy(model).to(dtype)(text(), pixels()).logits.float()
    assert (logits - expected).abs().max() < 0.06 * expected.abs().max()


def test_cross_attentions_of_one_call_change_nothing_else(model):
    """The model's own attention stays what it was, during the call for the language model and after it for all."""
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    expected = eager(text(4), pixels(), output_attentions=True)
    before = model.config._attn_implementation, model.model.language_model.config._attn_implementation
    plain = model(text(4), pixels())
    outputs = model(text(4), pixels(), output_cross_attentions=True)
    assert before == ("sdpa", "sdpa")
    assert (model.config._attn_implementation, model.model.language_model.config._attn_implementation) == before
    assert outputs.attentions is None and plain.cross_attentions is None
    for weights, others in zip(outputs.cross_attentions, expected.cross_attentions, strict=True):
        assert torch.allclose(weights, others, atol=1e-5)
    assert torch.allclose(outputs.logits, plain.logits, atol=1e-5)
    assert torch.equal(model(text(4), pixels()).logits, plain.logits)
    assert model(text(), pixels(), output_attentions=False, output_cross_attentions=True).cross_attentions
    assert eager(text(), pixels(), output_attentions=True, output_cross_attentions=False).cross_attentions is None
    assert model(text(), output_cross_attentions=True).cross_attentions is None  # no image, nothing to look at


def test_predictions_of_a_trainer_are_the_logits(tmp_path):
    rows = [{"input_ids": row, "labels": row, "pixel_values": pixels(1)[0]} for row in text()]
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none", remove_unused_columns=False)
    predictions = Trainer(tiny_model(), arguments).predict(rows).predictions
    assert predictions.shape == (2, 7, 257)


# --- Adapters ---


@pytest.fixture
def said(caplog):
    """What transformers reports, which does not go to the root."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_loading_an_adapter_calls_nothing_missing_that_is_there(tmp_path, said):
    tiny_model().save_pretrained(tmp_path / "base")
    base = PheyeForConditionalGeneration.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted(text(), pixels()).logits
    said.clear()
    model = PheyeForConditionalGeneration.from_pretrained(tmp_path / "base")
    info = model.load_adapter(tmp_path / "adapter")
    assert not info.missing_keys and not [record for record in said.records if "MISSING" in record.getMessage()]
    assert torch.equal(model.eval()(text(), pixels()).logits, expected)

    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = next(iter(kept))
    save_file(
        {other: kept[other] for other in kept if other != name}, tmp_path / "adapter" / "adapter_model.safetensors"
    )
    model = PheyeForConditionalGeneration.from_pretrained(tmp_path / "base")
    assert len(model.load_adapter(tmp_path / "adapter").missing_keys) == 1  # what is missing is still called so


def test_lora_that_a_model_lacks_is_called_missing(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "local_lora" in name)
    save_file(
        {name: weights[name] for name in weights if name != lost}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    _, info = PheyeForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {lost}


# --- What is put between layers ---


class Layer(nn.Module):
    def __init__(self, index: int, by_name: bool):
        super().__init__()
        self.index, self.by_name = index, by_name

    def forward(self, hidden_states, **kwargs):
        assert not kwargs, "the layer got what was meant for its step"
        return hidden_states * 10 + self.index


@pytest.mark.parametrize("by_name", [False, True])
def test_steps_are_taken_right_before_layers_in_calls_that_carry_a_call(by_name):
    layers, seen = nn.ModuleList(Layer(index, by_name) for index in range(3)), []

    def step(index, states, call):
        seen.append((index, call.added, list(layers).index(call.layer)))
        return states + call.added

    put_before(layers, step)

    def run(**kwargs):
        states = torch.zeros(1)
        for layer in layers:
            states = layer(hidden_states=states, **kwargs) if by_name else layer(states, **kwargs)
        return states.item()

    expected = 0
    for index in range(3):
        expected = (expected + 5) * 10 + index
    call = Call(nn.Identity(), steps_due=3)
    call.added = 5
    assert run(**{CALL: call}) == expected and seen == [(0, 5, 0), (1, 5, 1), (2, 5, 2)]
    assert run() == 12 and len(seen) == 3


# --- Bad input ---


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((5, 3, 32, 32), "(5, 3, 32, 32)"),
        ((1, 10, 3, 32, 32), "(1, 10, 3, 32, 32)"),
        ((1, 5, 3, 16, 32), "(1, 5, 3, 16, 32)"),
        ((1, 5, 1, 32, 32), "(1, 5, 1, 32, 32)"),
    ],
)
def test_pixel_values_of_another_shape_are_refused(model, shape, said):
    with pytest.raises(ValueError) as error:
        model(text(1), torch.zeros(shape))
    assert said in str(error.value)
    assert "(images, 5, 3, 32, 32)" in str(error.value)
    assert "processor" in str(error.value)


def test_rows_that_are_no_multiple_of_the_images_are_refused(model):
    with pytest.raises(ValueError, match="3 rows of text for 2 images"):
        model(text(3), pixels(2))
    with pytest.raises(ValueError, match="of one image or more"):
        model(text(2), pixels(0))
    features = model.get_image_features(pixels(2)).last_hidden_state
    with pytest.raises(ValueError, match="2 rows of text for 0 images"):
        model(text(2), image_hidden_states=features[:0])
    with pytest.raises(ValueError, match="5 rows of text for 2 images"):
        model.generate(text(5), pixel_values=pixels(2), max_new_tokens=1)


def test_more_text_than_positions_is_refused():
    model = tiny_model(text_config=tiny_text_config(max_position_embeddings=16))
    model(text(1, 16), pixels(1))
    with pytest.raises(ValueError, match="17 tokens, but the language model has 16 positions; shorten"):
        model(text(1, 17), pixels(1))
    with pytest.raises(ValueError, match="17 tokens, but the language model has 16 positions; shorten"):
        model.generate(text(1, 17), pixel_values=pixels(1), max_new_tokens=1)
    packed = torch.arange(10).repeat(2)[None]  # two texts in a row, with positions of their own
    assert model(text(1, 20), pixels(1), position_ids=packed).logits.shape[1] == 20
    with pytest.raises(ValueError, match="20 tokens, but the language model has 16 positions; shorten"):
        model(text(1, 20), pixels(1), position_ids=torch.arange(20)[None])
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0, "partial_rotary_factor": 0.5}
    tiny_model(text_config=tiny_text_config(max_position_embeddings=16, rope_parameters=scaled))(
        text(1, 17), pixels(1)
    )


@pytest.mark.parametrize("name", ["images", "pixel_value", "pixel_values_videos", "image_sizes", "input_features"])
def test_an_image_under_another_name_is_refused(model, name):
    for part in (model, model.model):
        with pytest.raises(ValueError, match=f"no input {name}; the image goes into pixel_values"):
            part(text(), **{name: pixels()})
        part(text(), **{name: None})


def test_text_in_the_cache_counts():
    for family in (GPT2, {"text_config": tiny_text_config(max_position_embeddings=16)}):
        model = tiny_model(**family)
        # The base model goes on where it can, as transformers' own do.
        for part in (model, model.model) if family is GPT2 else (model,):
            for cache in (DynamicCache(config=model.config.text_config), static_cache(model)):
                part(text(1, 6), pixels(1), cache=cache)
                part(text(1, 9), cache=cache)
                with pytest.raises(ValueError, match="18 tokens, but the language model has 16 positions; shorten"):
                    part(text(1, 3), cache=cache)


def test_labels_that_are_all_ignored_are_refused(model):
    labels = torch.full_like(text(), -100)
    labels[:, 0] = 5  # the first label has nothing before it to be predicted from
    with pytest.raises(ValueError, match=r"All labels \(shape \(2, 7\)\) are -100"):
        model(text(), pixels(), labels=labels)


def test_contradicting_arguments_are_refused(model):
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(pixel_values=pixels())
    with pytest.raises(ValueError, match="one of pixel_values and image_hidden_states"):
        model(text(), pixels(), image_hidden_states=torch.zeros(2, 25, 32))
