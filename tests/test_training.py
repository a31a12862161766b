"""What trains, gradients with and without checkpointing, PEFT on top, and weights spread over devices."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, PreTrainedModel

from pheye import PheyeForConditionalGeneration

from tiny import tiny_config, tiny_image, tiny_model, tiny_processor, tiny_text_config

TRAINED = ("global_lora", "local_lora", "view_encoding", "cross_attention_blocks")


@pytest.fixture
def batch():
    inputs = tiny_processor()(
        images=[tiny_image(0), tiny_image(1)], text=["What is it? A cat.", "Who? Me."], return_tensors="pt"
    )
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return dict(inputs)


def freeze_pretrained(model):
    """The paper's choice: only what stands between the vision tower and the language model trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED))
    return model.train()


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_step(model, batch):
    """One step large enough to change the logits."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**batch).loss.backward()
    optimizer.step()
    return model.eval()


# --- Gradients ---


def test_every_trained_parameter_gets_a_gradient_and_no_frozen_one_does(batch):
    model = freeze_pretrained(tiny_model())
    gradients(model, batch)
    for name, parameter in model.named_parameters():
        if any(part in name for part in TRAINED):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradient_checkpointing_gives_the_same_gradients(batch, reentrant, attention):
    model = freeze_pretrained(tiny_model(lora_dropout=0.0))
    model.set_attn_implementation(attention)
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    runs = []
    for block in model.model.cross_attention_blocks:
        block.to_q.register_forward_hook(lambda *args: runs.append(1))
    checkpointed = gradients(model, batch)
    assert len(runs) == 4  # each of the two blocks ran again in the backward pass
    for name, gradient in expected.items():
        assert torch.allclose(checkpointed[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.skipif(not hasattr(PreTrainedModel, "activation_checkpointing_enable"), reason="since transformers 5.24")
def test_checkpoints_of_every_second_layer_give_the_same_gradients(batch):
    model = freeze_pretrained(tiny_model(lora_dropout=0.0))
    expected = gradients(model, batch)
    model.activation_checkpointing_enable(every_n_layers=2)
    layers = [*model.model.decoder_layers(), *model.model.vision_layers()]
    assert {layer.gradient_checkpointing for layer in layers} == {True, False}
    for name, gradient in gradients(model, batch).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_vision_tower_whose_lora_is_frozen_runs_without_a_graph(batch, checkpointing):
    model = freeze_pretrained(tiny_model())
    for lora in (model.model.global_lora, model.model.local_lora):
        lora.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable()
    assert model.model.language_model.get_input_embeddings()(batch["input_ids"]).requires_grad == checkpointing
    states = model.model.vision_tower(batch["pixel_values"].flatten(0, 1)).last_hidden_state
    assert not states.requires_grad
    assert model.get_image_features(batch["pixel_values"]).last_hidden_state.requires_grad  # of the norms


def test_training_makes_no_cache_unless_asked(batch):
    model = freeze_pretrained(tiny_model())
    assert model(**batch).past_key_values is None
    assert model(**batch, use_cache=True).past_key_values is not None
    model.gradient_checkpointing_enable()
    assert model(**batch).past_key_values is None


def test_lora_dropout_is_active_in_training_only(batch):
    model = tiny_model(lora_dropout=0.5)
    first, second = (model(**batch).logits for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    first, second = (model(**batch).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_frozen_bfloat16_and_trained_float32_train_under_autocast(batch):
    model = freeze_pretrained(tiny_model())
    for part in (model.model.vision_tower, model.model.language_model):
        part.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    reference = freeze_pretrained(tiny_model())(**batch).loss
    assert abs(loss - reference) < 0.05 * reference
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_fine_tuned_model_saves_and_loads_to_the_same_logits(batch, tmp_path):
    model = trained_step(freeze_pretrained(tiny_model()), batch)
    assert not torch.allclose(model(**batch).logits, tiny_model()(**batch).logits, atol=1e-3)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    reloaded = PheyeForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(reloaded(**batch).logits, model(**batch).logits)


# --- PEFT on top ---


def adapted_modules(model) -> set[str]:
    return {name for name, module in model.named_modules() if hasattr(module, "lora_A")}


def test_peft_lora_on_the_language_model_and_the_vision_tower_with_whole_blocks_saved(batch, tmp_path):
    base = tiny_model()
    blocks = [f"cross_attention_blocks.{block}" for block in range(2)]
    config = LoraConfig(
        r=4,
        target_modules=r".*(language_model.*(q_proj|v_proj|dense|fc1|fc2)|vision_tower.*(q_proj|fc1))",
        modules_to_save=blocks,
        init_lora_weights=False,
    )
    model = get_peft_model(copy.deepcopy(base), config)
    assert len(adapted_modules(model)) == 4 * 5 + 2 * 2
    model = trained_step(model, batch)
    logits = model(**batch).logits
    assert not torch.allclose(logits, base(**batch).logits, atol=1e-3)
    trained_block = model.base_model.model.pheye.cross_attention_blocks[0].modules_to_save["default"]
    assert not torch.equal(trained_block.to_q.weight, base.model.cross_attention_blocks[0].to_q.weight)

    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(reloaded(**batch).logits, logits)
    merged = reloaded.merge_and_unload()
    assert torch.allclose(merged(**batch).logits, logits, atol=1e-4)
    generated = merged.generate(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], max_new_tokens=3)
    assert generated.shape[1] == batch["input_ids"].shape[1] + 3
    merged.save_pretrained(tmp_path / "merged")
    whole, info = PheyeForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.allclose(whole(**batch).logits, logits, atol=1e-4)


def test_peft_tokens_trained_in_tied_embeddings_are_merged_into_the_head_too(batch):
    sizes = {name: getattr(tiny_text_config(), name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    base = tiny_model(tiny_config(text_config=LlamaConfig(num_attention_heads=4, tie_word_embeddings=True, **sizes)))
    tokens = batch["input_ids"][0, -3:].tolist()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], trainable_token_indices=tokens))
    model = trained_step(model, batch)
    logits = model(**batch).logits
    merged = model.merge_and_unload()
    assert torch.allclose(merged(**batch).logits, logits, atol=1e-4)


def test_adapter_loads_by_transformers_own_methods(batch, tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(base), config).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    logits = adapted(**batch).logits
    assert not torch.allclose(base(**batch).logits, logits, atol=1e-3)
    base.load_adapter(tmp_path / "adapter")
    assert torch.allclose(base(**batch).logits, logits, atol=1e-5)
    loaded = PheyeForConditionalGeneration.from_pretrained(tmp_path / "adapter")
    assert torch.allclose(loaded(**batch).logits, logits, atol=1e-5)


@pytest.mark.parametrize(
    "target",
    [
        "all-linear",
        [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "out_proj",
            "dense",
            "fc1",
            "fc2",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        ["query", "key", "value", "q", "v", "A", "B", "lora_A", "lora_B"],
    ],
    ids=["all-linear", "usual names", "short names"],
)
def test_peft_does_not_take_the_built_in_lora_for_layers(target):
    model = tiny_model()
    config = LoraConfig(r=2, target_modules=target)
    if target[0] == "query":
        with pytest.raises(ValueError, match="not found"):
            get_peft_model(model, config)
        return
    adapted = adapted_modules(get_peft_model(model, config))
    assert not any("global_lora" in name or "local_lora" in name for name in adapted)
    assert any("vision_tower" in name for name in adapted)
    if target != "all-linear":
        assert not any("cross_attention_blocks" in name for name in adapted)


# --- Devices ---


def test_offloaded_to_disk_and_cpu_gives_the_same(batch, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    device_map = {
        "pheye.vision_tower": "disk",
        "pheye.global_lora": "cpu",
        "pheye.local_lora": "disk",
        "pheye.view_encoding": "disk",
        "pheye.cross_attention_blocks.0": "disk",
        "pheye.cross_attention_blocks.1": "cpu",
        "pheye.language_model": "cpu",
    }
    spread = PheyeForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert spread.model.vision_tower.encoder.layers[0].mlp.fc1.weight.device.type == "meta"
    with torch.no_grad():
        assert torch.allclose(spread(**batch).logits, model(**batch).logits, atol=1e-5)
    question = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    arguments = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    assert torch.equal(spread.generate(**question, **arguments), model.generate(**question, **arguments))


def test_device_map_auto_keeps_blocks_whole(batch, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    spread = PheyeForConditionalGeneration.from_pretrained(
        tmp_path,
        device_map="auto",
        max_memory={"cpu": int(model.get_memory_footprint() * 0.6)},
        offload_folder=tmp_path / "offload",
    )
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    whole = {"PheyeCrossAttentionBlock", "PheyeLora", "PheyeViewEncoding", "PhiDecoderLayer", "CLIPEncoderLayer"}
    assert whole <= set(spread._no_split_modules)
    inside = ("to_q", "mlp_in", "global_norm", "self_attn", ".A")
    assert not any(part in name for name in spread.hf_device_map for part in inside)
    with torch.no_grad():
        assert torch.allclose(spread(**batch).logits, model(**batch).logits, atol=1e-5)
