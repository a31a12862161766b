"""Each way to join the two parts or to compress an image, against a slow and obvious reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pheye import PheyeForConditionalGeneration
from pheye.nano.comparing.connectors import DEPTH, QUERIES, CasaBlock, Monkey, Perceiver, SmallCapLayer, keys_per_image
from pheye.nano.comparing.ways import WAYS, build

from tiny import randomize, tiny_model, tiny_text

pytestmark = pytest.mark.once

PREFIXES = ["fromage", "prefix", "frozen_prefix"]
OTHER_BLOCKS = ["small_cap", "usual_start", "small_outputs", "tanh_gate", "casa"]
REFINING = {"refined": "self_attention_blocks", "refined_apart": "self_attention_blocks"}
REFINING["refined_jointly"] = "joint_attention"  # and the parts that train
RESAMPLERS = ["perceiver", "monkey"]
ALL = [*PREFIXES, *OTHER_BLOCKS, *REFINING, *RESAMPLERS]
PIXELS = torch.randn(2, 2, 3, 224, 224, generator=torch.Generator().manual_seed(1))  # k = 1: two views


def made(name: str, parts, is_random: bool = True, lora_sets: int = 0) -> nn.Module:
    options = {"tiles_per_side": 1, "lora_sets": lora_sets, "initializer_range": 0.01}
    model, _ = build(WAYS[name], seed=0, **options, parts=parts)
    return (randomize(model) if is_random else model).eval()


def language_model(parts) -> nn.Module:
    return PheyeForConditionalGeneration.from_pretrained(parts).pheye.language_model.eval()


def logits(model: nn.Module, ids: torch.Tensor, pixels: torch.Tensor, mask: torch.Tensor | None = None):
    """Of the text, by one pass without a cache."""
    mask = torch.ones_like(ids) if mask is None else mask
    found = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=ids).logits
    return found[:, -ids.shape[1] :]


def by_hand(block: nn.Module, query: torch.Tensor, memory: list[torch.Tensor], scaling: float) -> torch.Tensor:
    """What one vector (D,) attends to among others, head by head."""
    size, heads = block.head_size, []
    for head in range(block.to_q.out_features // size):
        part = slice(head * size, (head + 1) * size)
        scores = [block.to_q(query)[part] @ block.to_k(one)[part] * scaling for one in memory]
        weights = torch.stack(scores).softmax(0)
        heads.append(sum(weight * block.to_v(one)[part] for weight, one in zip(weights, memory, strict=True)))
    return block.to_out(torch.cat(heads))


# --- What all ways share ---


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_what_the_way_trains_and_nothing_else(name, parts):
    model = made(name, parts, lora_sets=2).train()
    ids = tiny_text()
    model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=PIXELS, labels=ids).loss.backward()
    trains = ["pheye.view_encoding.", "pheye.global_lora.", "pheye.local_lora."]
    if name not in PREFIXES:
        trains.append("pheye.cross_attention_blocks.")
    if name == "prefix":
        trains.append("pheye.language_model.")
    if name in REFINING:
        trains.append(f"pheye.{REFINING[name]}.")
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == key.startswith(tuple(trains)), key
        assert (parameter.grad is not None) == parameter.requires_grad, key
    assert {key[: len(part)] for key, _ in model.named_parameters() for part in trains if key.startswith(part)} == {
        *trains
    }


@torch.no_grad()
@pytest.mark.parametrize("name", ["full", *ALL])
def test_padded_rows_and_a_cache_give_what_each_row_gives_alone(name, parts):
    model, length, pad = made(name, parts), 7, 3
    short, long = tiny_text(1, length - pad), tiny_text(1, length)
    for side in ("right", "left"):
        places = (0, pad) if side == "right" else (pad, 0)
        ids, mask = (torch.cat([F.pad(one, places), other]) for one, other in ((short, long), (short**0, long**0)))
        if side == "right":
            both = logits(model, ids, PIXELS, mask)
            alone = logits(model, short, PIXELS[:1]), logits(model, long, PIXELS[1:])
            assert torch.allclose(both[:1, : length - pad], alone[0], atol=1e-4)
            assert torch.allclose(both[1:], alone[1], atol=1e-4)
        else:
            given = {"input_ids": ids, "attention_mask": mask, "pixel_values": PIXELS}
            answers = model.generate(**given, min_new_tokens=4, max_new_tokens=4, do_sample=False)
            answers = getattr(answers, "sequences", answers)[:, length:]
            for row, prompt in enumerate((short, long)):
                for _ in range(4):
                    following = logits(model, prompt, PIXELS[row : row + 1])[:, -1]
                    following[:, 0] = -math.inf  # the end, which `min_new_tokens` rules out
                    prompt = torch.cat([prompt, following.argmax(-1, keepdim=True)], 1)
                assert torch.equal(answers[row], prompt[0, -4:])


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_the_answer_depends_on_every_view(name, parts):
    model, ids = made(name, parts), tiny_text()
    seen = logits(model, ids, PIXELS)
    for view in range(2):
        other = PIXELS.clone()
        other[:, view] += 1
        assert not torch.allclose(seen[:, -1], logits(model, ids, other)[:, -1], atol=1e-4)


@torch.no_grad()
def test_how_a_way_begins(parts):
    ids, expected = tiny_text(), language_model(parts)(tiny_text()).logits
    change = {
        name: (logits(made(name, parts, is_random=False), ids, PIXELS) - expected).std() / expected.std()
        for name in ("full", *ALL)
    }
    assert change["tanh_gate"] < 1e-6  # closed: the language model alone
    for name in ("full", "small_cap", "casa", *REFINING, *RESAMPLERS):  # near zero
        assert 0 < change[name] < 0.06, name
    for name in ("usual_start", *PREFIXES):
        assert change[name] > 0.3, name
    assert change["full"] < change["small_outputs"] < change["usual_start"] / 2


def test_keys_per_image(parts):
    for name, keys in {
        "full": 34,
        "fromage": 2,
        "frozen_prefix": 34,
        "casa": 34,
        "perceiver": 257,
        "monkey": 257,
    }.items():
        assert keys_per_image(made(name, parts)) == keys
    model, _ = build(WAYS["fromage"], seed=0, tiles_per_side=2, lora_sets=0, parts=parts)
    assert keys_per_image(model) == 5


# --- Before the text ---


@torch.no_grad()
@pytest.mark.parametrize("name", ["fromage", "frozen_prefix"])
def test_a_prefix_is_embeddings_before_those_of_the_text(name, parts):
    model, ids = made(name, parts), tiny_text()
    language_model, connected = model.pheye.language_model, model.pheye.view_encoding
    tokens = connected.view_encoding(model.pheye.encode_views(PIXELS).last_hidden_state)  # (B, 2 * 17, D)
    if name == "fromage":
        linear = connected.connector.linear
        prefix = [[linear(row[0]), linear(row[17])] for row in tokens]
    else:
        first, _, second = connected.connector
        prefix = [[second(F.gelu(first(token))) for token in row] for row in tokens]
    prefix = torch.stack([torch.stack(row) for row in prefix])
    given = torch.cat([prefix, language_model.get_input_embeddings()(ids)], 1)
    expected = language_model(inputs_embeds=given).logits[:, prefix.shape[1] :]
    assert torch.allclose(logits(model, ids, PIXELS), expected, atol=1e-4)


# --- Blocks ---


@torch.no_grad()
def test_small_cap_stands_between_self_attention_and_mlp(parts):
    model = made("small_cap", parts)
    pheye, ids = model.pheye, tiny_text()
    tokens, language_model = pheye.get_image_features(PIXELS).last_hidden_state, pheye.language_model.model
    assert [type(layer) for layer in language_model.layers] == [SmallCapLayer] * 4
    states = language_model.embed_tokens(ids)
    rotary = language_model.rotary_emb(states, torch.arange(ids.shape[1])[None])
    for wrapped, block in zip(language_model.layers, pheye.cross_attention_blocks, strict=True):
        layer = wrapped.layer
        attended, _ = layer.self_attn(layer.input_layernorm(states), rotary, None)
        normed = block.attention_norm(states + attended)
        seen = [
            [by_hand(block, one, [*image], 1 / 8) for one in row] for row, image in zip(normed, tokens, strict=True)
        ]
        seen = torch.stack([torch.stack(row) for row in seen])
        states = states + attended + seen + layer.mlp(layer.input_layernorm(states + seen))
    expected = pheye.language_model.lm_head(language_model.final_layernorm(states))
    assert torch.allclose(logits(model, ids, PIXELS), expected, atol=1e-4)
    assert not any("mlp" in name for name, _ in pheye.cross_attention_blocks.named_parameters())


@torch.no_grad()
def test_small_cap_without_an_image_is_the_language_model(parts):
    model, ids = made("small_cap", parts, is_random=False), tiny_text()
    assert torch.allclose(model(input_ids=ids).logits, language_model(parts)(ids).logits, atol=1e-5)


@torch.no_grad()
def test_tanh_gates_scale_what_attention_and_mlp_add(parts):
    model, states = made("tanh_gate", parts), torch.randn(2, 3, 128)
    block, tokens = model.pheye.cross_attention_blocks[0], torch.randn(2, 5, 32)
    normed = block.attention_norm(states)
    seen = [[by_hand(block, one, [*image], 1 / 8) for one in row] for row, image in zip(normed, tokens, strict=True)]
    middle = states + math.tanh(block.attention_gate) * torch.stack([torch.stack(row) for row in seen])
    added = block.mlp_out(F.gelu(block.mlp_in(block.mlp_norm(middle))))
    expected = middle + math.tanh(block.mlp_gate) * added
    assert torch.allclose(block(states, tokens)[0], expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 2])
def test_casa_attends_to_the_image_and_to_the_text_up_to_itself(padding):
    block, length = randomize(CasaBlock(tiny_model().config)), 5
    states, tokens = torch.randn(2, length, 128), torch.randn(2, 4, 32)
    mask = None
    if padding:  # on the left, of the first row, in the form of the language model's own mask
        there = torch.ones(2, length, dtype=torch.bool)
        there[0, :padding] = False
        mask = torch.ones(length, length, dtype=torch.bool).tril() & there[:, None, None]
    found = block(states, tokens, None, None, mask)
    for row, first in enumerate((padding, 0)):
        normed = block.attention_norm(states[row])
        for place in range(first, length):
            key = torch.cat([block.to_k(tokens[row]), block.text_to_k(normed[first : place + 1])])
            value = torch.cat([block.to_v(tokens[row]), block.text_to_v(normed[first : place + 1])])
            query, heads = block.to_q(normed[place]), []
            for part in (slice(0, 64), slice(64, 128)):
                heads.append((key[:, part] @ query[part] / 8).softmax(0) @ value[:, part])
            middle = states[row, place] + block.to_out(torch.cat(heads))
            expected = middle + block.mlp_out(F.gelu(block.mlp_in(block.mlp_norm(middle))))
            assert torch.allclose(found[row, place], expected, atol=1e-4)


@torch.no_grad()
def test_beams_of_casa_keep_their_own_text(parts):
    model, ids = made("casa", parts), tiny_text()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": PIXELS}
    given |= {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5}
    assert torch.equal(model.generate(**given), model.generate(**given, use_cache=False))


# --- Resamplers ---


@torch.no_grad()
def test_the_perceivers_queries_attend_to_tokens_and_queries(monkeypatch):
    resampler, tokens = randomize(Perceiver(tiny_model().config)), torch.randn(1, 3, 32)
    assert resampler.queries.shape == (QUERIES, 32) and QUERIES == 257 and len(resampler.layers) == DEPTH == 6
    resampler.queries = nn.Parameter(resampler.queries[:4])  # fewer, for the loops
    queries = [*resampler.queries]
    for layer in resampler.layers:
        normed = [layer.attention_norm(query) for query in queries]
        queries = [
            query + by_hand(layer, one, [*tokens[0], *normed], 32**-0.5)
            for query, one in zip(queries, normed, strict=True)
        ]
        queries = [query + layer.mlp_out(F.gelu(layer.mlp_in(layer.mlp_norm(query)))) for query in queries]
    assert torch.allclose(resampler(tokens)[0], resampler.norm(torch.stack(queries)), atol=1e-4)


@torch.no_grad()
def test_monkeys_queries_attend_once_without_residual_or_mlp():
    resampler, tokens = randomize(Monkey(tiny_model().config)), torch.randn(1, 3, 32)
    block = resampler.block
    normed = block.attention_norm(resampler.queries)
    expected = torch.stack([resampler.norm(by_hand(block, query, [*tokens[0]], 32**-0.5)) for query in normed])
    assert expected.shape == (257, 32) and torch.allclose(resampler(tokens)[0], expected, atol=1e-4)
    assert not any("mlp" in name for name, _ in resampler.named_parameters())
    block.to_v.weight.zero_()
    assert torch.allclose(resampler(tokens).std(1), torch.zeros(1, 32), atol=1e-5)  # nothing is left of the queries
