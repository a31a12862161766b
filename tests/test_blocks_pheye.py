"""The cross-attention block, against the formula of the paper."""

import math

import pytest
import torch
import torch.nn.functional as F

from tiny import tiny_model, tiny_vision_config
from tiny import tiny_pixels as pixels
from tiny import tiny_text as text


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


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_weights_are_given_by_every_implementation_on_request(implementation):
    block = tiny_model().model.cross_attention_blocks[0]
    block.config._attn_implementation = implementation
    x, m = torch.randn(4, 3, 128), torch.randn(2, 9, 32)
    states, weights = block(x, m, None, True)
    plain, nothing = block(x, m)
    assert nothing is None and torch.allclose(states, plain, atol=1e-5)
    value = block.to_v(m).unflatten(-1, (2, -1)).transpose(1, 2)  # (B, H, N, D)
    attended = (weights @ value.repeat_interleave(2, 0)).transpose(1, 2).flatten(2)
    h = x + block.to_out(attended)
    assert torch.allclose(states, h + block.mlp_out(F.gelu(block.mlp_in(block.mlp_norm(h)))), atol=1e-5)
