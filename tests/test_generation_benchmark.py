"""`python -m pheye.benchmarks.generation`: what it compares with, its floors, and its clock."""

import itertools
import json
import mmap

import pytest
import torch
from test_high_res import hybrid_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pheye import PheyeForConditionalGeneration
from pheye.benchmarks import branch, budgets, complexity, generation, preprocessing
from pheye.benchmarks.designs import DENSE, HALF, PLAIN, LlavaStyle, Ours, Published, readings
from pheye.benchmarks.full_size import random_model, with_budgets
from pheye.benchmarks.measuring import Stamps

from tiny import tiny_config, tiny_image, tiny_model

TOKENS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture
def pixels():
    return torch.randn(1, 5, 3, 32, 32)


@pytest.fixture
def ids():
    return torch.randint(1, 256, (2, 9))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("lora", [{}, {"global_lora_rank": 0}])
def test_the_published_way_gives_our_answers(pixels, ids, beams, lora):
    model = tiny_model(**lora)
    published = Published(model)
    ours = model.get_image_features(pixels).last_hidden_state
    torch.testing.assert_close(published.encode(pixels), ours, atol=2e-6, rtol=0)
    inputs = {"input_ids": ids, "pixel_values": pixels, "num_beams": beams, **TOKENS}
    assert torch.equal(published.generate(**inputs), Ours(model).generate(**inputs))
    assert model.config._attn_implementation == "sdpa"


def test_the_llava_style_model_reads_the_same_image_tokens_in_its_text(model, pixels, ids):
    llava = LlavaStyle(model).step
    states = llava.model.vision_tower(pixels[0], output_hidden_states=True).hidden_states[-1]
    prefix = llava.model.multi_modal_projector(states).flatten(0, 1)[None]  # all tokens of all views
    assert prefix.shape[1] == model.config.tokens_per_image
    embeds = torch.cat([prefix, model.get_input_embeddings()(ids[:1])], dim=1)
    expected = model.pheye.language_model.base_model(inputs_embeds=embeds).last_hidden_state
    text = torch.cat([ids.new_full((1, prefix.shape[1]), llava.config.image_token_id), ids[:1]], dim=1)
    got = llava.model(input_ids=text, pixel_values=pixels[0]).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_floor_of_a_step_streams_the_weights_that_a_step_uses(model, pixels, ids):
    first = model(input_ids=ids[:1], pixel_values=pixels, use_cache=True)
    used = []
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [linear.register_forward_hook(lambda module, args, output: used.append(module)) for linear in linears]
    model(input_ids=ids[:1, :1], past_key_values=first.past_key_values)
    for hook in hooks:
        hook.remove()
    expected = generation.step_linears(model)
    assert len(used) == len(expected) and set(used) == set(expected)


def test_the_floor_of_encoding_has_the_products_of_encoding(model, pixels):
    counted = complexity.count(lambda: model.get_image_features(pixels))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        generation.multiply_as_encoder(model)
    patch = 3 * 16 * 16  # the floor gives a row to the class token too, which the patch embedding and its LoRA do not
    extra = 2 * (5 * patch * 32 + 1 * 2 * (patch + 32) + 4 * 4 * (patch + 32))
    attention = 2 * 2 * 2 * 5 * 5 * 5 * 32  # two layers, two products; torch does not count its fused kernel's
    # B's product has room for both ranks in each row, and multiplies zeros that the floor does not.
    zeros = 2 * (1 * 4 + 4 * 2) * (5 * 2 * (4 * 32 + 48 + 32) + 4 * 32)
    assert counter.get_total_flops() == counted - zeros + extra + attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_random_model_is_whole_and_of_one_dtype(dtype, pixels, ids):
    model = random_model(tiny_config(), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    made = PheyeForConditionalGeneration._from_config(tiny_config(), dtype=dtype)
    for (name, buffer), (_, expected) in zip(model.named_buffers(), made.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    assert model(input_ids=ids[:1], pixel_values=pixels.to(dtype)).logits.isfinite().all()


def test_stamps_are_taken_where_modules_end():
    parts = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with Stamps(parts[0], parts) as stamps:
        parts(torch.ones(1, 2))
        parts(torch.ones(1, 2))
    assert len(stamps.times) == 5 and len(stamps.intervals) == 4
    assert stamps.times == sorted(stamps.times)
    parts(torch.ones(1, 2))
    assert len(stamps.times) == 5  # no hook is left


def test_command_prints_all_ratios_and_one_line_of_json_last(capsys):
    generation.main(["--repeats", "1", "--dtype", "float32", "--compare", "--questions"], tiny_config())
    output = capsys.readouterr().out
    last = json.loads(output.splitlines()[-1])
    assert last["same answers of 8"] == 8
    assert set(last["ratios"]) == {
        "step / weight streaming",
        "step, 4 beams / greedy",
        "encode / its matrix products",
        "8 questions / 8 single runs",
        "LLaVA-style prefill / ours",
        "published step / ours",
        "published encode / ours",
        "encode / that of the bare ViT (LLaVA-style)",
        "throughput of batch 8 / batch 1",
    }
    assert all(f"| {name} |" in output for name in last["ratios"])


def test_steps_can_be_measured_alone(capsys):
    generation.main(["--repeats", "1", "--dtype", "float32", "--only_steps"], tiny_config())
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"step / weight streaming", "step, 4 beams / greedy"} < set(last["ratios"])
    assert not any("encode" in part for part in last["seconds"])


def test_attention_and_cache_can_be_chosen(capsys, monkeypatch):
    caches = set()
    prepare = PheyeForConditionalGeneration._prepare_cache_for_generation

    def note(self, generation_config, *args, **kwargs):
        caches.add((generation_config.cache_implementation, self.config._attn_implementation))
        return prepare(self, generation_config, *args, **kwargs)

    monkeypatch.setattr(PheyeForConditionalGeneration, "_prepare_cache_for_generation", note)
    options = ["--repeats", "1", "--dtype", "float32", "--only_steps", "--static", "--attention", "eager"]
    generation.main(options, tiny_config())
    assert ("static", "eager") in caches
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["attention"] == "eager"


def test_encoding_with_a_branch_is_measured_beside_its_parts(capsys, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(branch, "now", lambda device: next(ticks))  # so that every call takes a second
    generation.main(["--repeats", "2", "--dtype", "float32", "--branch", "T"], tiny_config())
    output = capsys.readouterr().out
    costs = json.loads(output.splitlines()[-1])["branches"]["T"]
    assert set(costs["peaks"]) == {"encode", branch.VIT, branch.BACKBONE, branch.PRODUCTS}
    assert set(costs["seconds"]) == set(costs["peaks"])
    assert all(row == {"median": 1, "min": 1, "max": 1, "n": 2} for row in costs["seconds"].values())
    assert [row["median"] for row in costs["ratios"].values()] == [pytest.approx(1 / 3, abs=1e-3), 1]
    assert "| ConvNeXt-T | median |" in output and "| encode / ViT |" in output


def test_designs_taken_apart_are_the_designs_themselves(pixels, ids):
    model = random_model(with_budgets(tiny_config(), [3]), torch.float32)
    designs, first, more = readings(model), ids[:1, :-1], ids[:1, -1:]
    assert list(designs) == [PLAIN, "blocks before []", "blocks before [3]", DENSE, HALF]
    last = {}
    for name, design in designs.items():
        cache = design.prefill(first, design.encode(pixel_values=pixels))
        last[name] = design.step(more, cache).logits[0, -1]
    for budget in range(2):
        expected = model(ids[:1], pixels, vision_budget=budget).logits[0, -1]
        torch.testing.assert_close(last[f"blocks before {[3] * budget}"], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(last[PLAIN], last["blocks before []"])
    llava = LlavaStyle(model)
    text = torch.cat([ids.new_full((1, llava.image_tokens), llava.step.config.image_token_id), ids[:1]], dim=1)
    expected = llava.step(input_ids=text, pixel_values=pixels[0]).logits[0, -1]
    torch.testing.assert_close(last[DENSE], expected, atol=1e-5, rtol=1e-4)
    half = designs[HALF].prefill(first, designs[HALF].encode(pixel_values=pixels))
    assert half.get_seq_length() == (model.config.tokens_per_image + 1) // 2 + first.shape[1]


def test_budgets_are_measured_beside_the_other_designs(capsys, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(budgets, "busy", lambda device: next(ticks))  # so that every call takes a second
    generation.main(["--repeats", "2", "--dtype", "float32", "--tokens", "3", "--budget", "3"], tiny_config())
    output = capsys.readouterr().out
    last = json.loads(output.splitlines()[-1])
    names = list(last["operations"])
    assert names == [PLAIN, "blocks before []", "blocks before [3]", DENSE, HALF]
    assert {name: row["n"] for name, row in last["seconds"]["prefill"].items()} == dict.fromkeys(names, 2)
    assert {name: row["n"] for name, row in last["seconds"]["step"].items()} == dict.fromkeys(names, 6)
    assert all(row["median"] == 2 for row in last["seconds"]["with encoding"].values())
    assert set(last["step / plain"]) == set(names) - {PLAIN}
    assert last["mixed / predicted"] == {"median": 1, "min": 1, "max": 1, "n": 2}
    assert all(f"| {name} |" in output for name in (*names, "mixed", "mixed / predicted"))


def test_what_budgets_predict_of_a_mixed_batch(monkeypatch):
    model = random_model(with_budgets(tiny_config(), [3]), torch.float32)
    clock, costs = budgets.Clock(model.device), iter([0, 8, 8, 20, 20, 34])  # 8 and 12 seconds at its two budgets, 14
    monkeypatch.setattr(budgets, "busy", lambda device: next(costs))
    features = torch.zeros(3, model.config.tokens_per_image, 32)
    budgets.mixed_round(clock, model, torch.ones(3, 5, dtype=torch.long), features)
    assert clock.seconds["batch", "predicted"] == [pytest.approx((8 + 12 + 8) / 3)]
    assert clock.ratios("batch", "predicted")["mixed"]["median"] == pytest.approx(1.5)


def test_peaks_of_memory_are_those_of_a_call():
    size = 64 << 20

    def call():
        with mmap.mmap(-1, size) as pages:  # malloc may give pages that the process has already
            for page in range(0, size, mmap.PAGESIZE):
                pages[page] = 1

    if branch.memory("VmRSS") is not None:
        peak = branch.peak_of(call, torch.device("cpu"))
        assert size - (4 << 20) <= peak <= size + (4 << 20)


def test_the_floor_of_fusion_has_the_products_of_the_blocks():
    model = hybrid_model()
    counted = complexity.counted_branch(model.to("meta"), torch.empty(5, 3, 32, 32, device="meta"))["fusion blocks"]
    assert complexity.count(lambda: branch.multiply_as_fusion(model)) == counted > 0


@pytest.mark.once
def test_preprocessing_for_a_branch_is_measured_beside_its_resizes(monkeypatch):
    ticks, calls = itertools.count(), []
    monkeypatch.setattr(preprocessing, "now", lambda: next(ticks))
    monkeypatch.setattr(preprocessing, "SIZES", ((40, 30),))
    monkeypatch.setattr(preprocessing, "resizes", lambda picture, sides: calls.append((picture.size, sides)))
    rows = preprocessing.high_res_costs(tiny_image(), repeats=2)
    assert calls == 2 * [((40, 30), (224, 448, 1024))] + 2 * [((40, 30), (224, 672, 1536))]
    assert [(row["tiles"], row["width"], row["ratio"]["median"], row["ratio"]["n"]) for row in rows] == [
        (2, 40, 1, 2),
        (3, 40, 1, 2),
    ]


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--branch", "T", "--attention", "eager"], "--attention cannot be with --plot, --branch or --budget"),
        (["--budget", "3", "--compile", "--beams", "2"], "--beams, --compile cannot be"),
        (["--only_steps", "--compile"], "which --only_steps leaves out"),
        (["--joint"], "--joint needs --budget"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        generation.main(options, tiny_config())
    assert message in capsys.readouterr().err


def test_plot_is_drawn(tmp_path, capsys):
    path = tmp_path / "costs.png"
    generation.main(["--repeats", "1", "--dtype", "float32", "--tokens", "3", "--plot", str(path)], tiny_config())
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["answer_costs"]
    assert [(row["tiles"], row["design"]) for row in rows[:3]] == [(1, "ours"), (1, "published"), (1, "LLaVA-style")]
    assert len(rows) == 15 and path.stat().st_size > 1000
