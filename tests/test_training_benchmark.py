"""`python -m pheye.benchmarks.training`: its products and clock; and what a training step keeps and multiplies."""

import json
import math
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pheye.benchmarks import training
from pheye.benchmarks.training import (
    SETTINGS,
    PeakMemory,
    Products,
    Trainee,
    frozen_lora,
    kept_for_backward,
    run_alone,
)
from pheye.training.trained import add_language_model_lora, choose_trained

from tiny import tiny_config, tiny_model

aten = torch.ops.aten
VIEWS, TOKENS, WIDTH, MLP, HEADS, PIXELS = 5, 5, 32, 48, 2, 3 * 16 * 16  # the tiny vision tower; TOKENS of a view
TEXT = training.PROMPT_TOKENS + training.ANSWER_TOKENS


# What torch's counter leaves out, from shapes: products that add in place, attention on a CPU (two products), and its
# backward pass (five: one again, and two gradients for each).
LEFT_OUT = {
    aten.addmm_: lambda y, a, b, **kwargs: 2 * math.prod(a) * b[-1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: 4 * math.prod(q) * k[2],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, *args, **kwargs: (
        10 * math.prod(q) * k[2]
    ),
}


def trainee(config=None, **options) -> Trainee:
    defaults = {"device": "cpu", "dtype": "float32", "batch": 1, "attention": None}
    return Trainee(config or tiny_config(), **{**defaults, **options})


# --- The products ---


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_recorded_products_are_those_that_torch_counts(attention):
    small = trainee(attention=attention)
    calls, forward = small.record()
    with FlopCounterMode(display=False, custom_mapping=LEFT_OUT) as counter:
        loss = small.forward()
        before = counter.get_total_flops()
        loss.backward()
    assert sum(call.flops for call in calls[:forward]) == before > 0
    assert sum(call.flops for call in calls) == counter.get_total_flops() > 2 * before


def tower_flops(rank: dict[int, int], gradients: bool) -> int:
    """Of the tiny vision tower with eager attention by hand; `rank` of each view's LoRA."""
    linears = 4 * [(WIDTH, WIDTH)] + [(WIDTH, MLP), (MLP, WIDTH)]
    patches = TOKENS - 1
    frozen = 2 * VIEWS * TOKENS * sum(a * b for a, b in linears)
    attention = 2 * 2 * VIEWS * TOKENS * TOKENS * WIDTH  # two products
    ranks = sum(set(rank.values()))  # B's product has room for both in every row
    lora = sum(2 * TOKENS * (r * a + ranks * b) for r in rank.values() for a, b in linears)
    patch_lora = sum(2 * patches * (r * PIXELS + ranks * WIDTH) for r in rank.values())
    if not gradients:
        return 2 * (frozen + attention + lora) + 2 * VIEWS * patches * PIXELS * WIDTH + patch_lora
    # Each product has two gradients, but weights of the frozen parts have none, nor have the pixels.
    pixels = sum(2 * patches * r * PIXELS for r in rank.values())
    return 2 * (frozen + 2 * attention + 2 * lora) + 2 * patch_lora - pixels


def test_products_of_the_vision_tower_equal_a_count_by_hand():
    model = tiny_model().train()
    model.set_attn_implementation("eager")
    choose_trained(model)
    pixels = torch.randn(VIEWS, 3, 32, 32)
    rank = {0: 2, **dict.fromkeys(range(1, VIEWS), 4)}
    with Products(model) as products:
        output = model.pheye.vision_tower(pixels).last_hidden_state
        forward = len(products.calls)
        output.sum().backward()
    assert sum(call.flops for call in products.calls[:forward]) == tower_flops(rank, gradients=False)
    assert sum(call.flops for call in products.calls[forward:]) == tower_flops(rank, gradients=True)


def test_attention_counts_its_two_products_and_their_five_gradients():
    query = torch.randn(1, 2, 7, 8, requires_grad=True)
    with Products(torch.nn.Module()) as products:
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    one = 2 * 2 * 7 * 7 * 8
    assert [call.flops for call in products.calls] == [2 * one, 5 * one]  # the backward pass repeats one product


def test_products_run_alone_are_the_recorded_ones():
    small = trainee()
    calls, _ = small.record()
    before = {name: parameter.clone() for name, parameter in small.model.named_parameters()}
    with Products(small.model) as products:
        assert run_alone(calls) > 0
    # Weights stay weights, and all else has the same shape, stride and dtype.
    assert [(call.operator, call.flops, call.shapes) for call in products.calls] == [
        (call.operator, call.flops, call.shapes) for call in calls
    ]
    for again, call in zip(products.calls, calls, strict=True):
        for one, other in zip(again.args, call.args, strict=True):
            assert one is other or (one.data_ptr() == other.data_ptr() if torch.is_tensor(one) else one == other)
    assert any(torch.is_tensor(argument) for call in calls for argument in call.args)
    for name, parameter in small.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


# --- What a step keeps and multiplies ---


def test_frozen_vision_tower_runs_without_a_graph_and_keeps_nothing():
    model = tiny_model().train()
    choose_trained(model)
    pixels = torch.randn(VIEWS, 3, 32, 32)
    outputs = []
    with frozen_lora(model):
        kept = kept_for_backward(model, lambda: outputs.append(model.pheye.vision_tower(pixels)))
        assert kept == 0
        assert outputs[0].last_hidden_state.grad_fn is None
        features = model.get_image_features(pixels[None]).last_hidden_state
        assert features.grad_fn is not None  # its norms and view vectors train on
    kept = kept_for_backward(model, lambda: outputs.append(model.pheye.vision_tower(pixels)))
    assert kept > 0 and outputs[1].last_hidden_state.grad_fn is not None


def test_frozen_vision_tower_runs_without_a_graph_under_gradient_checkpointing_too():
    model = tiny_model().train()
    choose_trained(model)
    model.gradient_checkpointing_enable()
    with frozen_lora(model):
        assert model.pheye.vision_tower(torch.randn(VIEWS, 3, 32, 32)).last_hidden_state.grad_fn is None


def tower_activations() -> int:
    """Numbers that the tiny tower's backward pass needs, without dropout, by hand."""
    rows = VIEWS * TOKENS
    ranks = VIEWS * (2 + 4)  # summed over views, what LoRA's A gives for a token, with room for both sets
    linears = TOKENS * 6 * ranks  # for B of the six linears of a layer
    norms = 2 * (rows * WIDTH + 2 * rows)  # what goes into both norms, with mean and deviation
    attention = 4 * rows * WIDTH + VIEWS * HEADS * TOKENS  # queries, keys, values, result; a sum each
    mlp = 4 * rows * MLP  # before the activation, that times 1.702, its sigmoid; after it, for LoRA's A
    lora_inputs = 2 * rows * WIDTH  # what q, k and v share, and fc1's
    patches = VIEWS * 3 * 32 * 32 + (TOKENS - 1) * ranks  # pixels for A of the patch embedding, and for its B
    factors = (2 + 4) * (2 * (5 * WIDTH + MLP) + WIDTH)  # B of both sets, side by side
    return 2 * (linears + norms + attention + mlp + lora_inputs) + patches + factors


def test_vision_tower_keeps_only_what_gradients_need():
    model = tiny_model(lora_dropout=0.0).train()
    choose_trained(model)
    pixels = torch.randn(VIEWS, 3, 32, 32)
    kept = kept_for_backward(model, lambda: model.pheye.vision_tower(pixels))
    before_first_lora = 4 * (VIEWS * TOKENS * WIDTH + 2 * VIEWS * TOKENS)  # of the norm in front of the layers
    assert kept <= 4 * tower_activations() + before_first_lora


def weight_gradients(model, batch) -> Counter:
    """How many products of the backward pass give something of a weight's shape, by shape."""
    with Products(model) as products:
        loss = model(**batch).loss
        forward = len(products.calls)
        loss.backward()
    made = Counter(tuple(sorted(shape)) for call in products.calls[forward:] for shape in call.shapes)
    return Counter({shape: made[shape] for shape in weights(model) if made[shape]})


def weights(model, trained: bool | None = None) -> Counter:
    """How many matrices there are of each shape; those that are looked up are not multiplied."""
    chosen = [p for name, p in model.named_parameters() if trained in (None, p.requires_grad) and "embed" not in name]
    return Counter(tuple(sorted(p.shape)) for p in chosen if p.ndim == 2)


@pytest.mark.parametrize("text_lora", [False, True])
def test_backward_pass_makes_no_weight_gradient_for_a_frozen_weight(text_lora):
    model = tiny_model().train()
    if text_lora:
        add_language_model_lora(model, rank=3)
    choose_trained(model)
    batch = training.random_batch(model.config, 1, torch.device("cpu"))
    made, trained = weight_gradients(model, batch), weights(model, trained=True)
    assert (WIDTH, WIDTH) not in made and (WIDTH, MLP) not in made  # the vision tower's own
    assert {shape: made[shape] for shape in weights(model, trained=False)} == {
        shape: trained[shape] for shape in weights(model, trained=False)
    }
    # The check can see such a product: unfreeze one weight, and there is one more.
    model.pheye.vision_tower.get_parameter("encoder.layers.1.mlp.fc1.weight").requires_grad_(True)
    assert weight_gradients(model, batch)[WIDTH, MLP] == 1


# --- The command ---


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_last_for_a_step_and_give_plain_gradients(name):
    small = trainee(tiny_config(lora_dropout=0.0))
    trained = [name for name, parameter in small.model.named_parameters() if parameter.requires_grad]

    def gradients():
        small.forward().backward()
        found = {key: p.grad.clone() for key, p in small.model.named_parameters() if p.grad is not None}
        small.optimizer.zero_grad()
        return found

    expected = gradients()
    with SETTINGS[name](small.model):
        got = gradients()
    assert all(torch.allclose(got[key], expected[key], rtol=1e-4, atol=1e-7) for key in got)
    assert len(got) == len(trained) if name != "LoRA frozen" else not any("lora" in key for key in got)
    assert [name for name, parameter in small.model.named_parameters() if parameter.requires_grad] == trained
    assert not small.model.is_gradient_checkpointing
    with frozen_lora(small.model):  # no setting leaves a hook behind that asks for gradients
        assert small.model.pheye.vision_tower(small.batch["pixel_values"][0]).last_hidden_state.grad_fn is None
    with Products(small.model) as plain:
        small.forward().backward()
    assert sum(call.flops for call in plain.calls) == sum(call.flops for call in small.record()[0])


def test_a_step_trains_and_its_parts_add_up():
    small = trainee()
    before = small.model.pheye.cross_attention_blocks[0].to_k.weight.clone()
    seconds = small.step()
    assert not torch.equal(small.model.pheye.cross_attention_blocks[0].to_k.weight, before)
    assert seconds["step"] == pytest.approx(sum(seconds[part] for part in ("forward", "backward", "optimizer")))
    assert 0 < seconds["vision forward"] < seconds["forward"]


def test_peak_memory_is_that_of_the_block():
    with PeakMemory(0, torch.device("cpu")) as before:
        pass
    with PeakMemory(0, torch.device("cpu")) as peak:
        torch.ones(1 << 26).sum()
    if before.bytes is not None:
        assert (1 << 28) * 0.95 < peak.bytes - before.bytes < (1 << 28) * 1.3


def test_command_prints_a_row_for_each_setting_and_one_line_of_json_last(capsys):
    training.main(["--repeats", "1", "--profile"], tiny_config())
    output = capsys.readouterr().out
    last = json.loads(output.splitlines()[-1])
    assert list(last["settings"]) == [*SETTINGS, "matrix products of a plain step"]
    assert all(f"| {name} |" in output for name in last["settings"])
    for name in SETTINGS:
        row = last["settings"][name]
        assert row["tokens/s"] == pytest.approx(TEXT / row["step"]["median"])
        assert row["images/s"] == pytest.approx(1 / row["step"]["median"])
        assert row["backward FLOP"] > 0 and row["peak"] != 0
    plain, alone = (last["settings"][name]["step"]["median"] for name in ("plain", "matrix products of a plain step"))
    assert last["step / matrix products"] == pytest.approx(plain / alone, rel=0.05)
    model = tiny_model()
    choose_trained(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    held = last["memory"]
    assert (held["frozen weights"], held["trained weights"], held["gradients"]) == (
        2 * frozen,
        4 * trained,
        4 * trained,
    )
    assert 8 * trained <= held["optimizer"] <= 8 * trained + 1000  # two moments, and the number of steps of each
    assert 0 < held["activations, LoRA frozen"] < held["activations"]
    rows = last["settings"]
    assert len({rows[name]["forward FLOP"] for name in SETTINGS}) == 1
    backward = [rows[name]["backward FLOP"] for name in SETTINGS]
    assert (
        backward[1] > backward[2] > backward[0] > backward[3]
    )  # computed twice: all, the tower, nothing; LoRA frozen
    assert "Self CPU" in output


def test_settings_can_be_chosen(capsys):
    training.main(["--repeats", "1", "--settings", "LoRA frozen"], tiny_config())
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(last["settings"]) == ["LoRA frozen", "matrix products of a plain step"]
    assert "step / matrix products" not in last
