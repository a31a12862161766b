"""Blocks that refine the image, budgets and the router: against the plain model, rows alone, and what was counted.

The plan of these tests is that of the specification: nothing changes while the new weights are zero, budgets are kept
through all ways to generate, and a mixed batch equals its rows alone.
"""

import itertools
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_canvases_pheye import shapes
from torch import nn
from transformers import CompileConfig, DynamicCache, Qwen2Config

from pheye import PheyeConfig, PheyeForConditionalGeneration, PheyeImageProcessor
from pheye.layers_pheye import CACHE
from pheye.visor_pheye import PheyeRouter, PheyeSelfAttentionBlock, last_states

from tiny import (
    randomize,
    tiny_config,
    tiny_model,
    tiny_pixels,
    tiny_text,
    tiny_text_config,
    tiny_vision_config,
)

LAYERS = {"block": [3, 5], "joint": [2, 4]}  # of 6, with cross-attention before 1, 3 and 5
OWN = re.compile(r"(?!vision_tower|language_model)").match  # names of Pheye's own modules
BUDGETS = 4  # none, one, the other, both
NEW = 4


def visor_config(kind: str = "block", **kwargs) -> PheyeConfig:
    one, other = LAYERS[kind]
    defaults = {
        "text_config": tiny_text_config(num_hidden_layers=6),
        "self_attention_kind": kind,
        "self_attention_layers": [one, other],
        "self_attention_budgets": [[], [one], [other], [one, other]],
    }
    return tiny_config(**{**defaults, **kwargs})


def visor_model(**kwargs) -> PheyeForConditionalGeneration:
    return tiny_model(visor_config(**kwargs))


def close(found: torch.Tensor, expected: torch.Tensor):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module", params=LAYERS)
def model(request) -> PheyeForConditionalGeneration:
    return visor_model(kind=request.param, router_size=8)


# --- The block, by itself ---


HEADS, WIDTH = 2, 64


def slow_block(block: PheyeSelfAttentionBlock, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The equations of the specification, token by token and head by head."""
    y = states.clone()
    normed = block.attention_norm(states)
    q, k, v = block.to_q(normed), block.to_k(normed), block.to_v(normed)
    for image, token in itertools.product(range(len(states)), range(states.shape[1])):
        there = torch.ones(states.shape[1], dtype=torch.bool) if mask is None else mask[image, 0, 0]
        heads = []
        for head in range(HEADS):
            part = slice(head * WIDTH, (head + 1) * WIDTH)
            scores = k[image, there, part] @ q[image, token, part] / WIDTH**0.5
            heads.append(scores.softmax(0) @ v[image, there, part])
        y[image, token] = states[image, token] + block.to_out(torch.cat(heads))
    hidden = block.mlp_in(block.mlp_norm(y))
    gelu = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    return y + block.mlp_out(gelu)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_block_computes_its_equations(attention, masked):
    config = visor_config()
    config.vision_config.hidden_size = HEADS * WIDTH
    config._attn_implementation = attention
    block = randomize(PheyeSelfAttentionBlock(config))
    states = torch.randn(2, 6, HEADS * WIDTH)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])[:, None, None] if masked else None
    there = slice(None) if mask is None else mask[:, 0, 0]
    found, expected = block(states, mask), slow_block(block, states, mask)
    close(found[there], expected[there])


def test_sizes_are_those_of_the_specification():
    with torch.device("meta"):
        model = PheyeForConditionalGeneration(PheyeConfig(self_attention_layers=[7, 11], router_size=512))
    block = model.model.self_attention_blocks[0]
    assert sum(weight.numel() for weight in block.parameters()) / 1e6 == pytest.approx(19.7, abs=0.05)
    assert block.head_size == 64 and block.scaling == 1 / 8 and block.to_q.out_features == 1280
    assert model.model.router.mlp_out.out_features == 2  # none and all, by default


# --- A new model ---


def test_a_model_without_such_layers_is_what_it_was(tmp_path):
    model = tiny_model()
    assert not [name for name, _ in model.named_parameters() if "self_attention" in name or "router" in name]
    model.save_pretrained(tmp_path)
    saved = (tmp_path / "config.json").read_text()
    assert "self_attention" not in saved and "router" not in saved and "convolution" not in saved
    output = model(tiny_text(), tiny_pixels())
    assert output.vision_budget is None and output.router_logits is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", range(BUDGETS))
@pytest.mark.parametrize("kind", LAYERS)
def test_new_parts_change_nothing(kind, budget, dtype):
    torch.manual_seed(0)
    config = visor_config(kind, router_size=8, visual_convolution_kernel=7)
    fresh = PheyeForConditionalGeneration(config).to(dtype).eval()
    plain = PheyeForConditionalGeneration(tiny_config(text_config=tiny_text_config(num_hidden_layers=6))).to(dtype)
    plain.load_state_dict(fresh.state_dict(), strict=False)
    text, pixels = tiny_text(), tiny_pixels()
    output = fresh(text, pixels, vision_budget=budget)
    assert torch.equal(output.logits, plain.eval()(text, pixels).logits)
    assert output.vision_budget.tolist() == [budget] * 2


def gradients(model: PheyeForConditionalGeneration, budget: int) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    text = tiny_text()
    model(text, tiny_pixels(), labels=text, vision_budget=budget).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if re.search("self_attent|joint_at", name)}


@pytest.mark.parametrize("budget", range(BUDGETS))
def test_gradients_of_the_first_and_second_step(budget):
    torch.manual_seed(0)
    model = PheyeForConditionalGeneration(visor_config(lora_dropout=0.0)).train()
    model.model.vision_tower.requires_grad_(False)
    for step in (1, 2):
        for name, gradient in gradients(model, budget).items():
            block, part = name.split("self_attention_blocks.")[1].split(".", 1)
            if LAYERS["block"][int(block)] not in model.config.self_attention_budgets[budget]:
                assert gradient is None, name
            elif step == 1:
                assert gradient.any() == part.startswith(("to_out", "mlp_out")), name
            elif part != "to_k.bias":  # adds the same to all scores
                assert gradient.any(), name
        with torch.no_grad():
            for weight in model.model.self_attention_blocks.parameters():
                if weight.grad is not None:
                    weight -= 0.1 * weight.grad


def test_gradients_of_the_joint_form():
    torch.manual_seed(0)
    model = PheyeForConditionalGeneration(visor_config("joint", lora_dropout=0.0)).train()
    joint = model.model.joint_attention
    for step in (1, 2):
        gradients(model, 3)
        assert joint.gates.grad.all() and joint.visual_down.weight.grad.any()
        assert joint.visual_up.weight.grad.any() == (step == 2)
        with torch.no_grad():
            for weight in joint.parameters():
                weight -= 0.1 * weight.grad
    gradients(model, 1)
    assert joint.gates.grad.ne(0).tolist() == [True, False]
    assert all(gradient is None for gradient in gradients(model, 0).values())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("budget", [1, 3])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_with_checkpointing(kind, budget, use_reentrant):
    found = []
    for checkpointed in (False, True):
        model = visor_model(kind=kind, lora_dropout=0.0).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        gradients(model, budget)
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        close(found[1][name], gradient)


# --- Budgets ---


def image_caches(model, **inputs) -> list:
    cache = getattr(model(**inputs, use_cache=True), CACHE)
    return model.model.image_caches(cache)


@pytest.mark.parametrize(("budget", "unchanged"), [(0, 3), (1, 1), (2, 2), (3, 1)])
def test_blocks_before_the_first_refinement_keep_their_keys(model, budget, unchanged):
    plain = image_caches(model, input_ids=tiny_text(), pixel_values=tiny_pixels(), vision_budget=0)
    other = image_caches(model, input_ids=tiny_text(), pixel_values=tiny_pixels(), vision_budget=budget)
    same = [torch.equal(one.keys, two.keys) for one, two in zip(plain[:3], other[:3], strict=True)]
    assert same == [True] * unchanged + [False] * (3 - unchanged)


def test_the_image_does_not_depend_on_the_question(model):
    for budget in range(BUDGETS):
        one, two = (
            image_caches(model, input_ids=text, pixel_values=tiny_pixels(), vision_budget=budget)
            for text in (tiny_text(2, 7), tiny_text(4, 5).flip(0))
        )
        for first, second in zip(one, two, strict=True):
            close(first.keys, second.keys)
            close(first.values, second.values)


def test_a_batch_of_mixed_budgets_equals_each_image_alone(model):
    text, pixels, budgets = tiny_text(4), tiny_pixels(4), torch.tensor([3, 0, 1, 2])
    together = model(text, pixels, vision_budget=budgets)
    assert together.vision_budget.tolist() == budgets.tolist()
    answers = model.generate(text, pixel_values=pixels, vision_budget=budgets, max_new_tokens=NEW, min_new_tokens=NEW)
    for row in range(4):
        one = {"pixel_values": pixels[row : row + 1], "vision_budget": int(budgets[row])}
        close(together.logits[row : row + 1], model(text[row : row + 1], **one).logits)
        alone = model.generate(text[row : row + 1], **one, max_new_tokens=NEW, min_new_tokens=NEW)
        assert torch.equal(answers[row : row + 1], alone)


@pytest.mark.parametrize("kind", LAYERS)
def test_unequal_canvases_and_rows_without_an_image(kind):
    canvases = [[1, 2], [2, 2], [3, 1]]
    model = visor_model(kind=kind, canvases=canvases, max_images=2)
    wide, square, tall = shapes()
    prompts, budgets = [[wide], [square], [], [tall], [tall, square]], [3, 1, 3, 2, 3]
    processor = PheyeImageProcessor(canvases=canvases, max_images=2, size={"height": 32, "width": 32})
    batch, text = dict(processor(prompts, return_tensors="pt")), tiny_text(5)
    together = model(text, **batch, vision_budget=torch.tensor(budgets))
    assert together.vision_budget.tolist() == [3, 1, -1, 2, 3]
    again = model(text, **batch, vision_budget=together.vision_budget)  # as generation without a cache does
    assert torch.equal(again.logits, together.logits)
    for row, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True)):
        one = processor([prompt], return_tensors="pt") if prompt else {}
        options = {"vision_budget": budget} if prompt else {}
        close(together.logits[row : row + 1], model(text[row : row + 1], **one, **options).logits)


@pytest.mark.parametrize(
    ("budgets", "seen"), [([3, 0, 1, 2], [2, 2]), ([1, 1, 1, 1], [4]), ([0, 0, 0, 0], []), ([0, 2, 0, 0], [1])]
)
def test_each_block_sees_its_images_and_no_others(budgets, seen):
    model, found = visor_model(), []
    for block in model.model.self_attention_blocks:
        block.register_forward_pre_hook(lambda module, args: found.append(len(args[0])))
    model(tiny_text(4), tiny_pixels(4), vision_budget=torch.tensor(budgets))
    assert found == seen


def test_several_questions_about_an_image_at_one_budget(model):
    text, pixels = tiny_text(4), tiny_pixels(2)
    together = model(text, pixels, vision_budget=torch.tensor([1, 3])).logits
    for row in range(4):
        image, budget = pixels[row // 2 : row // 2 + 1], (1, 3)[row // 2]
        close(together[row : row + 1], model(text[row : row + 1], image, vision_budget=budget).logits)


def test_features_kept_are_asked_at_any_budget(model):
    text, pixels = tiny_text(), tiny_pixels()
    features = model.get_image_features(pixels).last_hidden_state
    answers = []
    for budget in range(BUDGETS):
        output = model(text, image_hidden_states=features, vision_budget=budget)
        expected = model(text, pixels, vision_budget=budget)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(expected.image_hidden_states, features)
        answers.append(output.logits)
    assert all(not torch.equal(one, two) for one, two in itertools.combinations(answers, 2))


def test_without_a_router_or_with_labels_the_largest_budget_is_taken(model):
    text, pixels = tiny_text(), tiny_pixels()
    assert visor_model()(text, pixels).vision_budget.tolist() == [3, 3]
    trained = model(text, pixels, labels=text)
    assert trained.vision_budget.tolist() == [3, 3] and trained.router_logits is None


def test_two_threads_with_two_budgets(model):
    text, pixels = tiny_text(), tiny_pixels()
    expected = [model(text, pixels, vision_budget=budget).logits for budget in (0, 3)]
    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(model, text, pixels, vision_budget=budget) for budget in (0, 3) * 8]
        for job, logits in zip(jobs, expected * 8, strict=True):
            assert torch.equal(job.result().logits, logits)


# --- Generation ---


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("budget", range(BUDGETS))
@pytest.mark.parametrize("way", GENERATION)
def test_ways_to_generate_agree(model, way, budget):
    text, pixels = tiny_text(1 if way == "prompt lookup" else 2), tiny_pixels(1 if way == "prompt lookup" else 2)
    options = {"pixel_values": pixels, "max_new_tokens": NEW, "min_new_tokens": NEW, "vision_budget": budget}

    def generate(**changed):
        torch.manual_seed(0)
        return model.generate(text, **{**options, **GENERATION[way], **changed})

    expected = generate()
    other_ways = [{}] if way == "prompt lookup" else [{"use_cache": False}, {"cache_implementation": "static"}]
    for changed in other_ways + ([{"prefill_chunk_size": 3}] if way == "greedy" else []):
        assert torch.equal(generate(**changed, disable_compile=True), expected), changed
    if way == "greedy":
        rows = text
        for _ in range(NEW):  # as a loop over the whole text does
            logits = model(rows, pixels, vision_budget=budget).logits[:, -1]
            logits[:, model.generation_config.eos_token_id] = -torch.inf
            rows = torch.cat([rows, logits.argmax(-1)[:, None]], dim=1)
        assert torch.equal(expected, rows)


def test_compiled_decoding(model):
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "cache_implementation": "static"}
    inputs = {"input_ids": tiny_text(), "pixel_values": tiny_pixels(), "vision_budget": torch.tensor([3, 1])}
    compiled = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    expected = model.generate(**inputs, **options, disable_compile=True)
    assert torch.equal(model.generate(**inputs, **options, compile_config=compiled), expected)


def test_a_router_reads_masks_that_are_made_by_kind_of_layer():
    text = Qwen2Config(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    routed = tiny_model(tiny_config(text_config=text, self_attention_layers=[3, 5], router_size=8))
    inputs = {"input_ids": tiny_text(), "pixel_values": tiny_pixels(), "max_new_tokens": NEW, "min_new_tokens": NEW}
    static = routed.generate(**inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, routed.generate(**inputs))


@pytest.mark.parametrize("sees", [False, True])
def test_an_assistant_reads_as_it_likes(model, sees):
    assistant = tiny_model(seed=1) if sees else tiny_model(seed=1).model.language_model
    options = {"pixel_values": tiny_pixels(1), "max_new_tokens": NEW, "min_new_tokens": NEW, "vision_budget": 1}
    expected = model.generate(tiny_text(1), **options)
    assert torch.equal(model.generate(tiny_text(1), **options, assistant_model=assistant), expected)


def counted(model) -> dict[str, int]:
    calls = {"block": 0, "router": 0}

    def count(name, module, args):
        calls[name] += 1

    for block in model.model.self_attention_blocks:
        block.register_forward_pre_hook(lambda module, args: count("block", module, args))
    model.model.router.register_forward_pre_hook(lambda module, args: count("router", module, args))
    return calls


def test_steps_call_neither_blocks_nor_router():
    model = visor_model(router_size=8)
    calls = counted(model)
    options = {"pixel_values": tiny_pixels(), "max_new_tokens": NEW, "min_new_tokens": NEW}
    model.generate(tiny_text(), **options, vision_budget=3)
    assert calls == {"block": 2, "router": 0}
    model.generate(tiny_text(), **options)
    assert calls["router"] == 1
    model.generate(tiny_text(), **options, use_cache=False)
    assert calls["router"] == 2  # decided once, though each step reads the image anew
    model(tiny_text())
    assert calls["router"] == 2


def second_turn(model, first, text, **inputs):
    """Logits behind a first call's cache."""
    cache = getattr(first, CACHE)
    mask = torch.ones(len(text), cache.get_seq_length() + text.shape[1], dtype=torch.long)
    return model(text, attention_mask=mask, cache=cache, **inputs)


def test_a_later_turn_keeps_the_budget(model):
    text, pixels, more = tiny_text(), tiny_pixels(), tiny_text(2, 3)
    for budget in range(BUDGETS):
        first = model(text, pixels, vision_budget=budget, use_cache=True)
        whole = model(torch.cat([text, more], dim=1), pixels, vision_budget=budget)
        second = second_turn(model, first, more)
        close(second.logits, whole.logits[:, -3:])
        assert model.model.vision_budget_of(getattr(second, CACHE)) == [budget] * 2
    with pytest.raises(ValueError, match=r"vision_budget=1.*give the image again"):
        second_turn(model, first, more, vision_budget=1)


def test_generate_tells_which_budget_it_took(model):
    inputs = {"input_ids": tiny_text(), "pixel_values": tiny_pixels(), "max_new_tokens": 2}
    output = model.generate(**inputs, vision_budget=torch.tensor([2, 0]), return_dict_in_generate=True)
    assert model.model.vision_budget_of(getattr(output, CACHE)) == [2, 0]


# --- The router ---


def route(model, scores: list[list[float]]):
    """Let the router give these scores, row after row."""
    rows = torch.tensor(scores)
    model.model.router.forward = lambda hidden_states: rows[: len(hidden_states)]


def test_the_largest_choice_of_an_images_rows_wins_and_ties_are_cheap():
    model = visor_model(router_size=8)
    text, pixels = tiny_text(4), tiny_pixels(2)
    route(model, [[0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    output = model(text, pixels)
    assert output.vision_budget.tolist() == [2, 0]
    close(output.logits, model(text, pixels, vision_budget=torch.tensor([2, 0])).logits)
    route(model, [[0, 0, 0, 1]] * 4)
    assert model(text, pixels, labels=text).vision_budget.tolist() == [3, 3]
    assert model(text, pixels, vision_budget=1).vision_budget.tolist() == [1, 1]


def test_a_new_image_is_decided_anew():
    model = visor_model(router_size=8)
    route(model, [[0, 0, 0, 1]] * 2)
    first = model(tiny_text(), tiny_pixels(), use_cache=True)
    route(model, [[0, 1, 0, 0]] * 2)
    assert model.model.vision_budget_of(getattr(second_turn(model, first, tiny_text(2, 3)), CACHE)) == [3, 3]
    again = model(tiny_text(), tiny_pixels().flip(0), use_cache=True)
    assert again.vision_budget.tolist() == [1, 1]


def test_the_router_reads_the_last_token_before_the_first_layer_that_may_be_skipped(model):
    text, pixels = tiny_text(), tiny_pixels()
    states = model(text, pixels, vision_budget=0, output_hidden_states=True).hidden_states
    states = states[model.config.self_attention_layers[0]]
    router = model.model.router
    hidden = torch.nn.functional.gelu(router.mlp_in(router.norm(states[:, -1])))
    close(model(text, pixels).router_logits, router.mlp_out(hidden))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_what_the_router_reads(model, side):
    text, pixels = tiny_text(2, 7), tiny_pixels()
    padding, ones = torch.zeros(2, 3, dtype=torch.long), torch.ones_like(text)
    parts = [(padding, padding), (text, ones)] if side == "left" else [(text, ones), (padding, padding)]
    ids, mask = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(ids, pixels, attention_mask=mask, position_ids=positions).router_logits
    close(found, model(text, pixels).router_logits)


def test_last_states_of_rows_of_unequal_length():
    states = torch.arange(2 * 4).view(2, 4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
    assert last_states(states, mask).flatten().tolist() == [1, 7]
    assert last_states(states, None).flatten().tolist() == [3, 7]
    assert last_states(states, torch.cat([torch.ones(2, 5), mask], dim=1)).flatten().tolist() == [1, 7]  # a later turn


def test_the_router_is_the_function_that_the_specification_gives():
    config = visor_config(router_size=8)
    router = randomize(PheyeRouter(config))
    states = torch.randn(3, 128)
    normed = (states - states.mean(1, keepdim=True)) / (states.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    hidden = (normed * router.norm.weight + router.norm.bias) @ router.mlp_in.weight.T + router.mlp_in.bias
    gelu = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    close(router(states), gelu @ router.mlp_out.weight.T + router.mlp_out.bias)


# --- The convolution ---


def test_the_convolution_stays_inside_a_view_and_leaves_class_tokens_alone():
    model = visor_model(visual_convolution_kernel=7)
    convolution, tokens = model.model.visual_convolution, model.config.tokens_per_view
    states = torch.randn(1, 2 * tokens, 32)
    changed = states.clone()
    changed[:, tokens - 1] += 1  # the last patch of the first view
    difference = (convolution(changed) - convolution(states) != 0).any(-1)[0]
    assert difference.tolist() == [False] + [True] * (tokens - 1) + [False] * tokens
    weight, expected = convolution.convolution.weight[:, 0], states.clone()
    for view, patch, offset in itertools.product(range(2), range(1, tokens), range(-3, 4)):
        if 1 <= patch + offset < tokens:
            place = view * tokens + patch
            expected[0, place] += weight[:, offset + 3] * states[0, place + offset]
    close(convolution(states), expected)


def test_the_convolution_is_the_last_of_what_encodes_an_image():
    model, pixels = visor_model(visual_convolution_kernel=3), tiny_pixels()
    encoded = model.model.view_encoding(model.model.encode_views(pixels).last_hidden_state)
    features = model.get_image_features(pixels).last_hidden_state
    close(features, model.model.visual_convolution(encoded))
    assert not torch.allclose(features, encoded, atol=1e-3)


# --- New parts ---


@pytest.mark.parametrize("kind", LAYERS)
def test_new_parts_begin_as_the_specification_says(kind):
    text = tiny_text_config(num_hidden_layers=6, hidden_size=256)
    vision = tiny_vision_config(hidden_size=256)
    config = visor_config(kind, text_config=text, vision_config=vision, router_size=256, visual_convolution_kernel=7)
    model = PheyeForConditionalGeneration(config).model
    drawn, zero = [model.router.mlp_in, model.router.mlp_out], [model.visual_convolution.convolution]
    if kind == "block":
        for block in model.self_attention_blocks:
            drawn += [block.to_q, block.to_k, block.to_v, block.mlp_in]
            zero += [block.to_out, block.mlp_out]
    else:
        drawn, zero = [*drawn, model.joint_attention.visual_up], [*zero, model.joint_attention.visual_down]
        assert not model.joint_attention.gates.any()
    for linear in drawn:
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.1) and not linear.bias.any()
    for linear in zero:
        assert not linear.weight.any()
    assert {
        module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm) and OWN(name)
    } == {1e-5}


@pytest.mark.parametrize("kind", LAYERS)
def test_quantizers_and_device_maps_leave_new_parts_whole(kind):
    model = visor_model(kind=kind, router_size=8, visual_convolution_kernel=3)
    parts = {f"pheye.{name}" for name, part in model.model.named_children() if any(True for _ in part.parameters())}
    assert {*model.config.modules_to_not_quantize} == (parts - {"pheye.language_model"}) | {
        "pheye.language_model.lm_head"
    }
    blocks = {type(module).__name__ for name, module in model.model.named_modules() if OWN(name)}
    whole = {name for name in blocks if name.endswith("Block")}
    assert len(whole) == (2 if kind == "block" else 1) and whole <= {*model._no_split_modules}


# --- Saving ---


def test_budgets_and_router_are_saved(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded = PheyeForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.self_attention_budgets == model.config.self_attention_budgets
    assert loaded.config.router_size == 8 and loaded.config.self_attention_kind == model.config.self_attention_kind
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    text, pixels = tiny_text(), tiny_pixels()
    assert torch.equal(loaded(text, pixels).logits, model(text, pixels).logits)


@pytest.mark.parametrize("kind", LAYERS)
def test_an_old_checkpoint_gets_parts_that_change_nothing(tmp_path, kind):
    plain = tiny_model(text_config=tiny_text_config(num_hidden_layers=6))
    plain.save_pretrained(tmp_path)
    loaded, report = PheyeForConditionalGeneration.from_pretrained(
        tmp_path,
        self_attention_kind=kind,
        self_attention_layers=LAYERS[kind],
        router_size=8,
        output_loading_info=True,
    )
    part = {"block": "self_attention_blocks", "joint": "joint_attention"}[kind]
    assert {name.split(".")[1] for name in report["missing_keys"]} == {part, "router"}
    text, pixels = tiny_text(), tiny_pixels()
    for budget in (0, 1):
        assert torch.equal(loaded(text, pixels, vision_budget=budget).logits, plain(text, pixels).logits)


# --- Bad input ---


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"self_attention_kind": "both"}, "self_attention_kind='both'.*block, joint"),
        ({"kind": "joint", "self_attention_layers": [3]}, r"\[3\].*without having one.*joint.*\[2, 4\]"),
        ({"kind": "joint", "self_attention_layers": [0]}, r"\[0\].*\[2, 4\]"),
        ({"self_attention_layers": [5, 3]}, r"\[5, 3\].*ascending.*\[3, 5\]"),
        ({"self_attention_layers": [3, 3]}, r"\[3, 3\]"),
        ({"self_attention_layers": [1]}, r"self_attention_layers=\[1\].*not the first.*\[3, 5\]"),
        ({"self_attention_layers": [4]}, r"\[4\].*\[3, 5\]"),
        ({"self_attention_layers": [7]}, r"\[7\].*\[3, 5\]"),
        ({"self_attention_layers": "3"}, "'3'"),
        ({"self_attention_layers": [3], "self_attention_budgets": [[], [5]]}, r"entry \[5\]"),
        ({"self_attention_budgets": [[], [3], [3]]}, r"entry \[3\].*once"),
        ({"self_attention_budgets": [[3, 5], [3]]}, r"\[3\] behind \[3, 5\].*cheapest first"),
        ({"self_attention_budgets": [3]}, "entry 3"),
        ({"self_attention_layers": [], "self_attention_budgets": [[3]]}, r"entry \[3\]"),
        ({"self_attention_layers": [], "self_attention_budgets": [[]]}, r"entry \[\], but there are no"),
        ({"self_attention_layers": [], "self_attention_budgets": [], "router_size": 8}, "router_size=8"),
        ({"self_attention_budgets": [[3, 5]], "router_size": 8}, r"router_size=8.*\[\[3, 5\]\]"),
        ({"router_size": -1}, "router_size=-1"),
        ({"visual_convolution_kernel": 4}, "visual_convolution_kernel=4"),
        ({"visual_convolution_kernel": -1}, "visual_convolution_kernel=-1"),
    ],
)
def test_configurations_that_cannot_be(fields, words):
    with pytest.raises(ValueError, match=words):
        visor_config(**fields)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (4, "vision_budget=4.*0 to 3.*4 budgets"),
        (-1, "vision_budget=-1"),
        (1.0, "vision_budget=1.0"),
        (True, "vision_budget=True"),
        ("3", "vision_budget='3'"),
        (torch.tensor([1, 1, 1]), r"\(3,\) for 2 images"),
        ([1, 1, 1], "3 entries for 2 images"),
        (torch.tensor([[1, 1]]), r"\(1, 2\) for 2 images"),
        (torch.tensor([0.0, 1.0]), r"vision_budget=0.0"),
        (torch.tensor([0, 9]), "vision_budget=9"),
        (torch.tensor([0, -1]), "vision_budget=-1"),
    ],
)
def test_budgets_that_cannot_be(model, budget, words):
    with pytest.raises(ValueError, match=words):
        model(tiny_text(), tiny_pixels(), vision_budget=budget)
    with pytest.raises(ValueError, match=words):
        model.generate(tiny_text(), pixel_values=tiny_pixels(), vision_budget=budget, max_new_tokens=2)


def test_a_budget_without_anything_to_choose():
    with pytest.raises(ValueError, match=r"vision_budget=1.*no self_attention_layers"):
        tiny_model()(tiny_text(), tiny_pixels(), vision_budget=1)


def test_routing_needs_the_whole_prompt(model):
    options = {"pixel_values": tiny_pixels(), "max_new_tokens": 2, "prefill_chunk_size": 3}
    with pytest.raises(ValueError, match=r"prefill_chunk_size.*give vision_budget"):
        model.generate(tiny_text(), **options)
    cache = DynamicCache(config=model.config.text_config)
    model.model.fill_image_caches(cache, model.get_image_features(tiny_pixels()).last_hidden_state, None, 2)
    assert model.model.vision_budget_of(cache) == [2, 2]
