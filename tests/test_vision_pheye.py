"""How an image is seen: the views' LoRA and encoding against plain formulas, and towers that are refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModel,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from pheye import PheyeModel
from pheye.layers_pheye import transformer_layers
from pheye.vision_pheye import PheyeLora, add_view_lora, dropout, last_norms

from tiny import randomize, tiny_config, tiny_model, tiny_vision_config
from tiny import tiny_pixels as pixels
from tiny import tiny_text as text

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}


VISION_CONFIGS = {
    "clip": tiny_vision_config(),
    "siglip": SiglipVisionConfig(intermediate_size=48, **VIT),
    "vit": ViTConfig(intermediate_size=48, **VIT),
    "dinov2": Dinov2Config(mlp_ratio=2, **VIT),
    "dinov2_with_registers": Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=3, **VIT),
}


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


def test_vision_tower_states_and_attentions_on_request():
    model = tiny_model()
    model.set_attn_implementation("eager")
    outputs = model.get_image_features(pixels(), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(10, 5, 32)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(10, 2, 5, 5)] * 2
    assert len(model.get_image_features(pixels(), return_dict=False)) == 1


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


def test_frozen_lora_drops_nothing():
    lora = PheyeLora(nn.Linear(8, 6), rank=2, alpha=6.0, dropout=0.25).train()
    nn.init.normal_(lora.A), nn.init.normal_(lora.B)
    x = torch.randn(1, 1, 40, 8)
    trained = lora(x)[0]
    frozen = lora.requires_grad_(False)(x)
    expected = lora.eval()(x)
    assert not torch.equal(trained, expected[0])
    assert all(torch.equal(*factors) for factors in zip(frozen, expected, strict=True))


# --- LoRA for each kind of view, without a model ---


def lora_of(base: nn.Module, rank: int, seed: int) -> PheyeLora:
    return randomize(PheyeLora(base, rank, alpha=3.0 * rank, dropout=0.0), seed).eval()


@pytest.mark.parametrize("ranks", [(2, 3), (0, 3), (2, 0)])
@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("base", [nn.Linear(8, 6), nn.Conv2d(3, 6, 4, stride=4)], ids=["linear", "convolution"])
def test_view_lora_is_the_update_of_each_views_own_set(base, ranks, with_gradient):
    views, images = 3, 2
    x = torch.randn(images * views, 5, 8) if isinstance(base, nn.Linear) else torch.randn(images * views, 3, 8, 12)
    sets = [lora_of(base, rank, seed) if rank else None for seed, rank in enumerate(ranks)]
    expected = base(x).detach().clone()
    for row in range(images * views):
        lora = sets[0] if row % views == 0 else sets[1]
        if lora is None:
            continue
        changed = copy.deepcopy(base)
        changed.weight.data = (lora.B.flatten(1) @ lora.A.flatten(1) * 3.0).reshape(base.weight.shape)
        changed.bias.data.zero_()
        expected[row] += changed(x[row : row + 1])[0].detach()
    with torch.set_grad_enabled(with_gradient):
        found = add_view_lora(base(x).detach(), x, *sets, views)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)


# --- The states before the last norm ---


@pytest.mark.parametrize("family", VISION_CONFIGS)
def test_the_last_norm_of_each_family_is_known(family):
    model = tiny_model(vision_config=VISION_CONFIGS[family]).model
    layers = transformer_layers(model.vision_tower, 2, "vision tower")
    assert len(last_norms(model.vision_tower, layers)) == 1


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_vision_tower_whose_last_norm_is_not_known_is_refused_by_name(kind):
    tower = AutoModel.from_config(tiny_vision_config())
    del tower.post_layernorm
    tower.ln_final = kind(32)
    with pytest.raises(ValueError, match=r"CLIPVisionModel cannot be a Pheye vision tower.*'ln_final'"):
        PheyeModel(tiny_config(), vision_tower=tower)


def test_a_last_norm_of_another_kind_is_left_out_too():
    config = tiny_config(vision_config=VISION_CONFIGS["vit"])
    tower = AutoModel.from_config(config.vision_config)
    tower.layernorm = nn.RMSNorm(32)
    model = randomize(PheyeModel(config, vision_tower=tower)).eval()
    images = pixels()
    with torch.no_grad():
        features = model.encode_views(images).last_hidden_state
        nn.init.constant_(tower.layernorm.weight, 7.0)
        assert torch.equal(model.encode_views(images).last_hidden_state, features)


def test_encoded_views_and_view_encoding_make_the_image_features(model):
    images = pixels()
    views = model.model.encode_views(images).last_hidden_state
    assert views.shape == (10, 5, 32)
    features = model.model.view_encoding(views)
    assert torch.equal(features, model.get_image_features(images).last_hidden_state)
