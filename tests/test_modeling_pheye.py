"""The architecture: against the published implementation's outputs, and against plain formulas."""

import copy
import io
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DynamicCache,
    SiglipVisionConfig,
    ViTConfig,
)

from pheye import PheyeForConditionalGeneration, PheyeModel, PheyeProcessor
from pheye.modeling_pheye import PheyeLora, dropout

from tiny import randomize, tiny_config, tiny_model, tiny_text_config, tiny_vision_config

GOLDEN = Path(__file__).parent / "fixtures" / "golden"

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
VISION_CONFIGS = {
    "clip": tiny_vision_config(),
    "siglip": SiglipVisionConfig(intermediate_size=48, **VIT),
    "vit": ViTConfig(intermediate_size=48, **VIT),
    "dinov2": Dinov2Config(mlp_ratio=2, **VIT),
    "dinov2_with_registers": Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=3, **VIT),
}


def pixels(images: int = 2, views: int = 5, size: int = 32) -> torch.Tensor:
    return torch.randn(images, views, 3, size, size, generator=torch.Generator().manual_seed(0))


def text(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(1, 257, (rows, length), generator=torch.Generator().manual_seed(0))


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


def merged_tower(model: PheyeModel, lora: torch.nn.ModuleDict) -> torch.nn.Module:
    """The vision tower with one LoRA set added into its weights: W + B A * alpha / rank."""
    tower = AutoModel.from_config(model.config.vision_config).eval()
    tower.load_state_dict(model.vision_tower.state_dict())
    for name, module in tower.named_modules():
        if name.replace(".", "_") in lora:
            update = lora[name.replace(".", "_")]
            delta = update.B.flatten(1) @ update.A.flatten(1) * update.scaling
            module.weight.data += delta.reshape(module.weight.shape)
    return tower


def states_before_the_last_norm(tower: torch.nn.Module, views: torch.Tensor) -> torch.Tensor:
    seen = []
    layers = next(module for module in tower.modules() if isinstance(module, torch.nn.ModuleList))
    handle = layers[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    tower(views)
    handle.remove()
    return seen[0] if torch.is_tensor(seen[0]) else seen[0][0]


@pytest.mark.parametrize("family", VISION_CONFIGS)
@pytest.mark.parametrize("global_rank", [0, 3])
def test_image_features_are_those_of_two_passes_with_merged_lora(family, global_rank):
    model = tiny_model(vision_config=VISION_CONFIGS[family], global_lora_rank=global_rank).model
    images = pixels()
    features = model.get_image_features(images).last_hidden_state.unflatten(1, (5, -1))  # (B, V, N, D)

    encoding = model.view_encoding
    whole = states_before_the_last_norm(merged_tower(model, model.global_lora), images[:, 0])
    vectors = encoding.view_embedding.weight
    reference = F.layer_norm(whole, (32,), encoding.global_norm.weight, encoding.global_norm.bias, 1e-5) + vectors[0]
    assert torch.allclose(features[:, 0], reference, atol=1e-4)
    local_tower = merged_tower(model, model.local_lora)
    for view in range(1, 5):
        crop = states_before_the_last_norm(local_tower, images[:, view])
        norm = encoding.local_norm
        reference = F.layer_norm(crop, (32,), norm.weight, norm.bias, 1e-5) + vectors[view]
        assert torch.allclose(features[:, view], reference, atol=1e-4)


def test_lora_adapts_every_linear_of_the_encoder_and_the_patch_embedding_and_nothing_else():
    model = tiny_model(vision_config=VISION_CONFIGS["siglip"]).model
    layers = [
        f"encoder_layers_{layer}_{linear}"
        for layer in range(2)
        for linear in [*(f"self_attn_{name}_proj" for name in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2"]
    ]
    assert set(model.local_lora) == set(model.global_lora) == {"embeddings_patch_embedding", *layers}
    assert not any("head" in name for name in model.local_lora)  # the pooling head has linears of its own
    assert len(tiny_model(global_lora_rank=0).model.global_lora) == 0


@pytest.mark.parametrize("reduction", [1, 2, 4])
@pytest.mark.parametrize("vision_wider", [False, True])
def test_block_is_the_formula_of_the_paper(reduction, vision_wider):
    vision = tiny_vision_config(hidden_size=256 if vision_wider else 32)
    model = tiny_model(vision_config=vision, cross_attention_reduction=reduction).model
    block = model.cross_attention_blocks[0]
    width = max(128, vision.hidden_size)
    heads, inner = width // 64, width // reduction
    x, m = torch.randn(2, 6, 128), torch.randn(2, 9, vision.hidden_size)

    q = block.to_q(F.layer_norm(x, (128,), block.attention_norm.weight, block.attention_norm.bias))
    k, v = block.to_k(m), block.to_v(m)
    size = inner // heads
    attended = torch.zeros(2, 6, inner)
    for row in range(2):
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            for position in range(6):
                scores = k[row, :, part] @ q[row, position, part] / math.sqrt(64)
                attended[row, position, part] = (scores.exp() / scores.exp().sum()) @ v[row, :, part]
    h = x + block.to_out(attended)
    inside = block.mlp_in(F.layer_norm(h, (128,), block.mlp_norm.weight, block.mlp_norm.bias))
    assert block.mlp_in.out_features == 4 * 128 // reduction
    gelu = 0.5 * inside * (1 + torch.erf(inside / math.sqrt(2)))
    assert torch.allclose(block(x, m)[0], h + block.mlp_out(gelu), atol=1e-4)


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
    shallow = tiny_config(text_config=tiny_text_config(hidden_size=256))
    block = PheyeModel(shallow).cross_attention_blocks[0]
    assert block.mlp_out.weight.std().item() == pytest.approx(0.01 / math.sqrt(2 * 36), rel=0.05)


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


def test_vision_tower_states_and_attentions_on_request():
    model = tiny_model()
    model.set_attn_implementation("eager")
    outputs = model.get_image_features(pixels(), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(10, 5, 32)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(10, 2, 5, 5)] * 2
    assert len(model.get_image_features(pixels(), return_dict=False)) == 1


def test_logits_to_keep(model):
    logits = model(text(), pixels()).logits
    assert torch.allclose(model(text(), pixels(), logits_to_keep=1).logits, logits[:, -1:], atol=1e-6)
    kept = torch.tensor([2, 5])
    assert torch.allclose(model(text(), pixels(), logits_to_keep=kept).logits, logits[:, kept], atol=1e-6)


def test_inputs_embeds_in_place_of_ids(model):
    embeds = model.get_input_embeddings()(text())
    assert torch.equal(model(inputs_embeds=embeds, pixel_values=pixels()).logits, model(text(), pixels()).logits)


def test_cross_attentions_with_eager_attention():
    model = tiny_model()
    model.set_attn_implementation("eager")
    outputs = model(text(4), pixels(), output_attentions=True, output_hidden_states=True)
    assert [tuple(weights.shape) for weights in outputs.cross_attentions] == [(4, 2, 7, 25)] * 2  # (rows, H, T, N)
    assert len(outputs.attentions) == 4
    assert len(outputs.hidden_states) == 5
    assert torch.allclose(outputs.cross_attentions[0].sum(-1), torch.ones(4, 2, 7), atol=1e-5)

    # Each row's weights are its own: those of the row alone with its image.
    alone = model(text(4)[2:3], pixels()[1:], output_attentions=True).cross_attentions
    for weights, single in zip(outputs.cross_attentions, alone, strict=True):
        assert torch.allclose(weights[2:3], single, atol=1e-5)
    assert model(text(), pixels()).cross_attentions is None
    base = model.model(text(4), pixels(), output_attentions=True)
    assert torch.equal(base.cross_attentions[1], outputs.cross_attentions[1])


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
    with pytest.raises(ValueError, match="2 rows of text for 0 images"):
        model(text(2), pixels(0))
    with pytest.raises(ValueError, match="5 rows of text for 2 images"):
        model.generate(text(5), pixel_values=pixels(2), max_new_tokens=1)


def test_more_text_than_positions_is_refused():
    model = tiny_model(text_config=tiny_text_config(max_position_embeddings=16))
    model(text(1, 16), pixels(1))
    with pytest.raises(ValueError, match="17 tokens, but the language model has 16 positions; shorten"):
        model(text(1, 17), pixels(1))
    with pytest.raises(ValueError, match="17 tokens, but the language model has 16 positions; shorten"):
        model.generate(text(1, 17), pixel_values=pixels(1), max_new_tokens=1)
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0, "partial_rotary_factor": 0.5}
    tiny_model(text_config=tiny_text_config(max_position_embeddings=16, rope_parameters=scaled))(
        text(1, 17), pixels(1)
    )


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


def test_vision_tower_whose_linears_were_replaced_is_refused():
    model = tiny_model()
    layer = model.model.vision_tower.encoder.layers[0]
    layer.mlp.fc1 = torch.nn.Linear(32, 48)
    with pytest.raises(ValueError, match=r"lost their LoRA: encoder_layers_0_mlp_fc1 and 1 more.*to_not_quantize"):
        model(text(), pixels())


def test_vision_tower_without_one_token_per_patch_is_refused():
    model = tiny_model()
    model.config.vision_config.patch_size = 8
    with pytest.raises(ValueError, match="CLIPVisionModel gives 5 tokens a view where 17 were expected"):
        model(text(), pixels())


# --- LoRA's dropout ---


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_sets_its_share_to_zero_and_changes_nothing_else(p):
    x = torch.rand(1003, 333) + 1  # no multiple of the four entries that share a random number
    torch.manual_seed(0)
    y, scale = dropout(x, p)
    assert scale == 1 / (1 - p)
    dropped = y == 0
    assert torch.equal(y[~dropped], x[~dropped])
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(dropped.float().mean() - p) < 5 * deviation
    chances = dropped.flatten()
    for place in range(4):
        assert abs(chances[place::4].float().mean() - p) < 5 * 2 * deviation
        beside = (chances[place:-4:4] & chances[place + 1 : -3 : 4]).float().mean()  # neighbours are independent
        assert abs(beside - p * p) < 5 * 2 * (p * p * (1 - p * p) / x.numel()) ** 0.5
    torch.manual_seed(0)
    assert torch.equal(dropout(x, p)[0], y)
    assert not torch.equal(dropout(x, p)[0], y)


def test_gradient_of_dropout_is_zero_where_it_dropped():
    x = torch.randn(40, 50, requires_grad=True)
    y, _ = dropout(x, 0.3)
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0).float())


def test_update_in_training_is_on_average_that_of_evaluation():
    torch.manual_seed(0)
    lora = PheyeLora(nn.Linear(8, 6), rank=2, alpha=6.0, dropout=0.25)
    nn.init.normal_(lora.A), nn.init.normal_(lora.B)
    x = torch.randn(8).expand(1, 1, 200_000, 8)
    with torch.no_grad():
        low, up = lora.train()(x)
        trained = (low @ up)[0, 0]
        low, up = lora.eval()(x[:, :, :1])
    expected = lora.B @ lora.A @ x[0, 0, 0] * 3
    assert torch.allclose((low @ up).flatten(), expected, atol=1e-5)
    error = trained.std(0) / len(trained) ** 0.5
    assert error.min() > 0 and ((trained.mean(0) - expected).abs() < 5 * error).all()
