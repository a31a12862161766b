"""What trains, and its weights by themselves: chosen by pattern, saved, and put onto the base model."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_language_models import FAMILIES, build

from pheye import PheyeForConditionalGeneration
from pheye.training.trained import (
    add_language_model_lora,
    choose_trained,
    copy_state,
    describe_trained,
    load_trained,
    save_trained,
    set_rate_of_pretrained,
    trained_state,
)

from tiny import tiny_image, tiny_model, tiny_processor

LINEARS = ("Linear", "Conv1D")  # GPT-2 has the latter
PARTS = ("global_lora", "local_lora", "view_encoding", "cross_attention_blocks")


@pytest.fixture
def batch():
    inputs = tiny_processor()(images=tiny_image(), text="What is it? A cat.", return_tensors="pt")
    return {**inputs, "labels": inputs["input_ids"]}


def change(model, seed: int = 5):
    """Move everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_state(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_the_papers_parts_train_by_default_and_in_float32():
    model = tiny_model().to(torch.bfloat16)
    names = choose_trained(model)
    expected = [name for name, _ in model.named_parameters() if name.split(".")[1] in PARTS]
    assert names == expected and {name.split(".")[1] for name in names} == set(PARTS)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in names)
        assert parameter.dtype == (torch.float32 if name in names else torch.bfloat16), name


def test_the_published_sizes_train():
    """Spec section 7: 295,119,552 without the global LoRA set, which adds 5,913,184."""
    from pheye import PheyeConfig

    with torch.device("meta"):
        model = PheyeForConditionalGeneration(PheyeConfig.from_variant("x4-672"))
    line = describe_trained_after(model)
    assert sum(p.numel() for p in trained_state(model).values()) == 295_119_552 + 5_913_184
    assert line.startswith("Trains 301,032,736 parameters (") and "global_lora 5,913,184" in line
    assert line.endswith("2,049,036,800 are frozen.")


def describe_trained_after(model) -> str:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(f".{part}." in name for part in PARTS))
    return describe_trained(model)


def test_patterns_add_and_take_away():
    model = tiny_model()
    names = choose_trained(model, train=[r"language_model\.lm_head", "layer_norm1"], freeze=["global_lora"])
    parts = {name.split(".")[1] for name in names}
    assert parts == {"vision_tower", "language_model", *PARTS} - {"global_lora"}
    assert "pheye.language_model.lm_head.weight" in names
    assert not any(name.startswith("pheye.vision_tower") and "layer_norm1" not in name for name in names)
    names = choose_trained(model, freeze=["cross_attention_blocks", "_lora", r"\.global_norm"])
    assert names == [name for name in names if "view_embedding" in name or "local_norm" in name] and len(names) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": ["vision_twoer"]}, "'vision_twoer' matches no parameter"),
        ({"freeze": ["(unclosed"]}, "no regular expression"),
        ({"freeze": ["pheye"]}, "Nothing is left to train"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_trained(tiny_model(), **arguments)


def adamw(model, rate: float) -> torch.optim.Optimizer:
    """With decay of matrices alone, as the Trainer makes it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if (p.ndim > 1) is has], "weight_decay": 0.1 * has} for has in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=rate)


def test_what_is_pretrained_gets_a_rate_of_its_own():
    model = tiny_model()
    add_language_model_lora(model)
    choose_trained(model, train=["vision_tower", r"language_model\.lm_head"])
    optimizer = adamw(model, rate=1.0)
    set_rate_of_pretrained(optimizer, model, 0.1)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == len(trained) == sum(len(group["params"]) for group in optimizer.param_groups)
    slow = {name for name, p in trained.items() if found[id(p)][0] == 0.1}
    assert slow == {name for name in trained if "vision_tower" in name or "lm_head" in name}
    assert any("lora_A" in name for name in trained) and {rate for rate, _ in found.values()} == {0.1, 1.0}
    assert all(found[id(p)][1] == 0.1 * (p.ndim > 1) for p in trained.values())
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0, 0.1, 0.1]


def test_a_rate_that_reaches_nothing_is_refused():
    model = tiny_model()
    choose_trained(model)
    with pytest.raises(ValueError, match=r"--pretrained_learning_rate 0\.1 has no effect here: .* give --train"):
        set_rate_of_pretrained(adamw(model, 1.0), model, 0.1)
    flat = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=1.0)
    choose_trained(model, train=["vision_tower"])
    with pytest.raises(ValueError, match="SGD does not hold the parameters by themselves"):
        set_rate_of_pretrained(flat, model, 0.1)


def test_the_line_says_part_by_part_what_trains():
    model = tiny_model()
    choose_trained(model)
    line = describe_trained(model)
    for part in PARTS:
        count = sum(p.numel() for p in getattr(model.pheye, part).parameters())
        assert f"{part} {count:,}" in line
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in trained_state(model).values())
    assert f"Trains {trained:,} " in line and f"{total - trained:,} are frozen" in line


def test_lora_of_the_language_model_is_put_on_its_linears_only(batch):
    model = tiny_model()
    before = model(**batch).logits
    lora = add_language_model_lora(model)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 4 * 6 and all(name.startswith("pheye.language_model.") for name in adapted)
    torch.testing.assert_close(model.eval()(**batch).logits, before, atol=1e-5, rtol=0)  # B is zero
    names = choose_trained(model)
    assert sum("lora_A.default" in name for name in names) == 24
    assert {name.split(".")[1] for name in names} == {*PARTS, "language_model"}
    assert "LoRA of the language model" in describe_trained(model)
    change(model)
    trained = model.eval()(**batch).logits
    lora.merge_and_unload()
    assert not any(hasattr(module, "lora_A") for module in model.modules())
    torch.testing.assert_close(model(**batch).logits, trained, atol=1e-4, rtol=1e-4)
    assert (trained - before).abs().max() > 1e-2


PUBLISHED = r"pheye\.language_model\..*\.(q_proj|k_proj|v_proj|dense|fc1|fc2)"


def test_lora_of_phi_is_the_published_one_to_the_last_bit():
    states = []
    for target in (None, PUBLISHED):
        torch.manual_seed(3)
        model = tiny_model()
        lora = add_language_model_lora(model, target=target)
        states.append(model.state_dict())
        assert isinstance(lora.peft_config["default"].target_modules, (set, str))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_on_all_linears_of_the_layers_of_any_language_model(family, batch, tmp_path):
    model = build(family, FAMILIES[family])
    base = copy.deepcopy(model)
    layers = model.pheye.decoder_layers()
    linears = [module for layer in layers for module in layer.modules() if module.__class__.__name__ in LINEARS]
    before = model(**batch).logits
    lora = add_language_model_lora(model, rank=3, alpha=6, dropout=0)
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert len(adapted) == len(linears) >= 4 * len(layers)
    assert {id(module.base_layer) for module in adapted} == {id(module) for module in linears}
    choose_trained(model)
    change(model)
    expected = model(**batch).logits
    assert (expected - before).abs().max() > 1e-3
    save_trained(trained_state(model), tmp_path, lora.peft_config["default"])
    loaded = load_trained(base, tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "numbers", [{"rank": 0}, {"alpha": 0}, {"alpha": float("nan")}, {"dropout": 1}, {"dropout": -0.1}]
)
def test_numbers_that_lora_cannot_have_are_refused(numbers):
    with pytest.raises(ValueError, match=r"cannot be; the rank must be at least 1"):
        add_language_model_lora(tiny_model(), **numbers)


def test_a_target_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="no_such_linear"):
        add_language_model_lora(tiny_model(), target="no_such_linear")


@pytest.mark.parametrize("with_lora", [False, True])
def test_saved_and_put_onto_the_base_model_it_gives_the_same_logits(batch, tmp_path, with_lora):
    base = tiny_model()
    model = copy.deepcopy(base)
    lora = add_language_model_lora(model) if with_lora else None
    names = choose_trained(model)
    change(model)
    expected = model.eval()(**batch).logits
    config = lora.peft_config["default"] if with_lora else None
    save_trained(trained_state(model), tmp_path, config)
    assert [path.name for path in tmp_path.iterdir()] == ["trained.safetensors"]
    loaded = load_trained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-4 if with_lora else 0, rtol=0)
    assert not any(hasattr(module, "lora_A") for module in loaded.modules())
    untouched = set(dict(base.named_parameters())) - set(names)
    if not with_lora:
        assert all(torch.equal(loaded.get_parameter(name), base.get_parameter(name)) for name in untouched)


def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path):
    model = tiny_model()
    choose_trained(model)
    save_trained(trained_state(model), tmp_path)
    other = tiny_model(cross_attention_interval=4, seed=3)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"cross_attention_blocks\.1.*missing in this model"):
        load_trained(other, tmp_path)
    other = tiny_model(local_lora_rank=8, seed=3)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"local_lora.*shape \(4, .*of shape \(8, "):
        load_trained(other, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(ValueError, match=r"holds no trained\.safetensors"):
        load_trained(other, tmp_path / "nothing")


def fewer(path: Path):
    save_file(dict(list(load_file(path).items())[:3]), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 100),
        fewer,
    ],
    ids=["cut", "empty", "garbage", "three tensors"],
)
def test_weights_that_are_not_whole_are_refused_with_their_file(tmp_path, harm):
    model = tiny_model()
    choose_trained(model)
    save_trained(trained_state(model), tmp_path)
    harm(tmp_path / "trained.safetensors")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"trained\.safetensors (is not whole|holds 3 tensors)"):
        load_trained(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_refusal_leaves_no_lora_on_the_model(tmp_path):
    model = tiny_model()
    lora = add_language_model_lora(model)
    choose_trained(model)
    save_trained(trained_state(model), tmp_path, lora.peft_config["default"])
    other = tiny_model(cross_attention_interval=4)
    with pytest.raises(ValueError, match="missing in this model"):
        load_trained(other, tmp_path)
    assert not any(hasattr(module, "lora_A") for module in other.modules())


def test_copying_keeps_the_models_dtypes():
    source, target = tiny_model(seed=1), tiny_model(seed=2).to(torch.bfloat16)
    choose_trained(source)
    copy_state(target, trained_state(source))
    name = "pheye.cross_attention_blocks.0.to_q.weight"
    assert target.get_parameter(name).dtype == torch.bfloat16
    assert torch.equal(target.get_parameter(name), source.get_parameter(name).bfloat16())
    assert not torch.equal(
        target.get_parameter("pheye.language_model.lm_head.weight").float(),
        source.get_parameter("pheye.language_model.lm_head.weight"),
    )
