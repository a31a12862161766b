"""A model with a high-resolution branch does all that a plain one does, and nobody is told of the second input."""

import contextlib
import copy
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from accelerate import PartialState, cpu_offload
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from test_high_res import BACKBONES, hybrid_config, hybrid_model
from test_quantization import TOLERANCES, difference, linears, quantized_modules
from test_quantization import load as load_quantized
from test_remote_code import HIDE, superfluous_packages
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, ConvNextBackbone, Trainer, TrainingArguments, pipeline

from pheye import PheyeConfig, PheyeForConditionalGeneration, PheyeImageProcessor, PheyeProcessor
from pheye.answering import ask, caption
from pheye.benchmarks import quantization
from pheye.evaluation import attention, evaluate
from pheye.evaluation.word_attention import answer_with_attention
from pheye.generation_pheye import PIXELS, PheyeGenerationMixin
from pheye.pipeline_pheye import PheyeImageToTextPipeline
from pheye.training import train
from pheye.training.checkpoints import last_checkpoint
from pheye.training.collator import PheyeCollator
from pheye.training.mixture import Mixture, read_mixture
from pheye.training.trained import choose_trained, load_trained
from pheye.training.trainer import PheyeTrainer

from hub_server import FakeHub
from tiny import randomize, tiny_image, tiny_model, tiny_text_config, tiny_tokenizer, tiny_vision_config
from training_runs import STEPS, command, weights, write_data

NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
PARTS = {"cross_attention_blocks", "global_lora", "local_lora", "view_encoding", "fusion_blocks"}


def hybrid_processor(tile_size: int | None = 64) -> PheyeProcessor:
    image_processor = PheyeImageProcessor(
        tiles_per_side=2, size={"height": 32, "width": 32}, high_res_tile_size=tile_size
    )
    return PheyeProcessor(image_processor, tiny_tokenizer())


def save(model, folder):
    model.save_pretrained(folder)
    hybrid_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hybrid():
    """Shared by tests that do not change it; with weights by which each picture gets an answer of its own."""
    return hybrid_model(seed=9)


@pytest.fixture(scope="module")
def processor():
    return hybrid_processor()


@pytest.fixture(scope="module")
def folder(hybrid, tmp_path_factory):
    return save(hybrid, tmp_path_factory.mktemp("hybrid"))


@pytest.fixture
def fresh_state():
    """accelerate keeps its state for the life of a process."""
    PartialState._reset_state()
    yield
    PartialState._reset_state()


def questions(*texts: str, images=None) -> dict[str, torch.Tensor]:
    images = [tiny_image(seed) for seed in range(len(texts))] if images is None else images
    return dict(hybrid_processor()(images=images, text=list(texts), return_tensors="pt"))


def learnt() -> dict[str, torch.Tensor]:
    batch = questions("What is it? A cat.", "Who? Me.")
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def by_hand(model, processor, image, prompt: str, max_new_tokens: int = NEW, **kwargs) -> str:
    text = processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    assert "high_res_pixel_values" in inputs
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **kwargs)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).lstrip()


def blind(model):
    """The same model, whose branch adds nothing."""
    model = copy.deepcopy(model)
    for block in model.pheye.fusion_blocks:
        for parameter in block.mlp_out.parameters():
            nn.init.zeros_(parameter)
    return model


# --- Generation ---


def slow_greedy(model, batch: dict) -> torch.Tensor:
    """One row at a time, the whole text and the image again at every step."""
    rows = []
    for row in range(len(batch["input_ids"])):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        for _ in range(NEW):
            images = {name: batch[name][row : row + 1] for name in PIXELS}
            ids = torch.cat([ids, model(ids, **images, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        rows.append(ids[0, -NEW:])
    return torch.stack(rows)


def test_the_branch_matters_to_what_is_answered(hybrid):
    batch = questions("What is written on the sign?", "Why?")
    assert (hybrid(**batch).logits - blind(hybrid)(**batch).logits).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 5},
        {"prefill_chunk_size": 5, "cache_implementation": "static"},
    ],
    ids=str,
)
def test_greedy_of_unequal_prompts_is_the_plain_loop_of_each_alone(hybrid, options):
    batch = questions("What is written on the sign?", "Why?")
    assert torch.equal(hybrid.generate(**batch, **GREEDY, **options)[:, -NEW:], slow_greedy(hybrid, batch))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_beams_equal_those_of_repeated_images(hybrid, options, monkeypatch):
    arguments = {**questions("What is written?", "Why?"), **GREEDY, "num_beams": 3, "num_return_sequences": 2}
    beams = hybrid.generate(**arguments, **options)
    # The library's own expansion: one row of pixels per beam, encoded anew.
    monkeypatch.delattr(PheyeGenerationMixin, "_expand_inputs_for_generation")
    assert torch.equal(beams, hybrid.generate(**arguments, use_cache=False))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}, {"prefill_chunk_size": 4}], ids=str)
def test_several_questions_on_each_image_equal_single_ones(hybrid, options):
    pictures, texts = [tiny_image(0), tiny_image(1)], ["What?", "Who is it?", "When?", "How many of them?"]
    tokens = hybrid_processor()(text=texts, return_tensors="pt")
    images = {name: tensor for name, tensor in questions("a", "b").items() if name in PIXELS}
    together = hybrid.generate(**tokens, **images, **GREEDY, **options)
    for row, text in enumerate(texts):
        alone = hybrid.generate(**questions(text, images=[pictures[row // 2]]), **GREEDY, **options)
        assert torch.equal(together[row, -NEW:], alone[0, -NEW:])


def test_assistants_of_all_kinds_change_no_answer(hybrid):
    batch = questions("What is written on the sign?")
    expected = hybrid.generate(**batch, **GREEDY)
    assistants = {
        "hybrid": hybrid_model(seed=3),
        "plain": tiny_model(seed=3),
        "text": randomize(AutoModelForCausalLM.from_config(tiny_text_config())).eval(),
    }
    for name, assistant in assistants.items():
        assert torch.equal(hybrid.generate(**batch, **GREEDY, assistant_model=assistant), expected), name
    assert torch.equal(hybrid.generate(**batch, **GREEDY, prompt_lookup_num_tokens=2), expected)


def test_a_turn_on_a_returned_cache_needs_no_image_and_text_alone_is_the_language_model(hybrid):
    batch = questions("What is written?")
    first = hybrid.generate(**batch, **GREEDY, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, torch.tensor([[70, 71, 72]])], dim=1)
    expected = hybrid.generate(input_ids=turn, **{name: batch[name] for name in PIXELS}, **GREEDY)
    assert torch.equal(hybrid.generate(input_ids=turn, past_key_values=first.past_key_values, **GREEDY), expected)
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(hybrid.generate(**ids, **GREEDY), hybrid.pheye.language_model.generate(**ids, **GREEDY))


def test_threads_share_a_model(hybrid):
    batches = [questions("What is written?"), questions("Who is that?", images=[tiny_image(1)])]
    expected = [hybrid.generate(**batch, **GREEDY, num_beams=2) for batch in batches]
    results = {}

    def work(index: int):
        results[index] = [hybrid.generate(**batches[index % 2], **GREEDY, num_beams=2) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        assert all(torch.equal(result, expected[index % 2]) for result in results[index])


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_model_in_half_precision_takes_pixels_in_float32_and_answers_alike(backbone):
    model, batch = hybrid_model(backbone=backbone), questions("What is written?", "Why?")
    half = copy.deepcopy(model).to(torch.bfloat16)
    expected, found = model(**batch).logits, half(**batch).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.06 * expected.abs().max()


# --- Compilation ---


def short_model() -> PheyeForConditionalGeneration:
    """Tracing takes seconds per layer."""
    return hybrid_model(vision_config=tiny_vision_config(), high_res_fusion_layers=[1])


@pytest.mark.slow
@torch.no_grad()
def test_the_whole_forward_is_one_graph():
    torch._dynamo.reset()
    model, batch = short_model(), questions("What is written?")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for options in ({"use_cache": False}, {}):
        assert torch.allclose(compiled(**batch, **options).logits, model(**batch, **options).logits, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_vision_tower_is_one_graph_for_each_number_of_images(backend):
    torch._dynamo.reset()
    model = short_model()
    batches = [questions("x", "x"), questions("y", "y"), questions("z", images=[tiny_image(4)])]
    expected = [model(**batch).logits for batch in batches]
    torch._dynamo.utils.counters.clear()
    model.pheye.vision_tower.compile(fullgraph=True, dynamic=False, backend=backend)
    for batch, logits in zip(batches, expected, strict=True):
        assert torch.allclose(model(**batch).logits, logits, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


# --- Pipelines and commands ---

PICTURES = [tiny_image(seed, 60 + 9 * seed, 90 - 7 * seed) for seed in range(3)]


@pytest.fixture(scope="module")
def answers(hybrid, processor) -> list[str]:
    found = [by_hand(hybrid, processor, picture, "What is this?") for picture in PICTURES]
    assert len(set(found)) == len(found)
    assert found != [by_hand(blind(hybrid), processor, picture, "What is this?") for picture in PICTURES]
    return found


@pytest.mark.parametrize("batch_size", [1, 2])
def test_both_pipelines(hybrid, processor, answers, batch_size):
    own = PheyeImageToTextPipeline(model=hybrid, processor=processor, device="cpu")
    found = own(PICTURES, prompt="What is this?", max_new_tokens=NEW, batch_size=batch_size)
    assert [text["generated_text"] for (text,) in found] == answers
    native = pipeline("image-text-to-text", model=hybrid, processor=processor, device="cpu")
    text = {"type": "text", "text": "What is this?"}
    chats = [[{"role": "user", "content": [{"type": "image", "image": image}, text]}] for image in PICTURES]
    found = native(text=chats, max_new_tokens=NEW, return_full_text=False, batch_size=batch_size)
    assert [text["generated_text"] for (text,) in found] == answers


def test_the_ask_command(folder, answers, tmp_path, capsys):
    PICTURES[0].save(tmp_path / "a.png")
    arguments = [str(folder), str(tmp_path / "a.png"), "What is this?", "--max_new_tokens", str(NEW)]
    assert ask.main([*arguments, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{answers[0]}\n"


def photos(folder) -> str:
    for number, picture in enumerate(PICTURES):
        picture.save(folder / f"{number}.png")
    return str(folder)


def captions(folder, images, output, *options) -> list[str]:
    arguments = ["--model", str(folder), "--images", photos(images), "--output", str(output), *options]
    arguments += ["--prompt", "What is this?", "--max_new_tokens", str(NEW), "--batch_size", "2", "--device", "cpu"]
    assert caption.main(arguments) == 0
    return [json.loads(line)["caption"] for line in output.read_text().splitlines()]


def test_the_caption_command(folder, answers, tmp_path, fresh_state):
    assert captions(folder, tmp_path, tmp_path / "captions.jsonl") == answers


def test_captions_by_a_compiled_vision_tower(tmp_path, fresh_state, monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    folder, compiled = save(short_model(), tmp_path / "model"), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kwargs: compiled(self, **kwargs, backend="eager"))
    expected = captions(folder, tmp_path, tmp_path / "plain.jsonl")
    try:
        assert captions(folder, tmp_path, tmp_path / "compiled.jsonl", "--compile") == expected
    finally:
        torch.compiler.set_stance("default")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_evaluate_command(folder, answers, tmp_path, fresh_state):
    rows = [
        {
            "id": str(number),
            "image": f"{number}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": answer}
            ],
        }
        for number, answer in enumerate(answers)
    ]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(rows))
    arguments = ["--model", str(folder), "--task", "own", "--output", str(tmp_path / "out"), "--batch_size", "2"]
    arguments += ["--data", str(tmp_path / "data.json"), "--images", photos(tmp_path), "--max_new_tokens", str(NEW)]
    assert evaluate.main([*arguments, "--prompt", "{question}"]) == 0
    found = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in found] == answers


def test_the_attention_command_and_what_it_draws(hybrid, processor, folder, answers, tmp_path):
    found = answer_with_attention(hybrid, processor, PICTURES[0], "What is this?", NEW)
    assert found.text == answers[0].strip()
    of_blind = answer_with_attention(blind(hybrid), processor, PICTURES[0], "What is this?", NEW)
    first, other = next(found.attention), next(of_blind.attention)
    assert first.shape == (2, 25) and abs(first - other).max() > 1e-3
    arguments = ["--image", photos(tmp_path) + "/0.png", "--prompt", "What?", "--max_new_tokens", "3"]
    output = tmp_path / "attention.png"
    assert attention.main(["--model", str(folder), *arguments, "--output", str(output), "--device", "cpu"]) == 0
    assert Image.open(output).width > 300


# --- Training ---


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """With dropout, so that a run that goes on must restore the random state."""
    return save(hybrid_model(lora_dropout=0.1), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), 16)


def parts_that_moved(before, after) -> set[str]:
    state = after.state_dict()
    return {name.split(".")[1] for name, tensor in before.state_dict().items() if not torch.equal(tensor, state[name])}


def test_a_batch_has_the_second_input_and_a_broken_image_is_black_in_both(processor, data):
    samples = [Mixture(read_mixture([str(data)]), 42)[index] for index in range(3)]
    samples[1]["images"] = [b"broken"]
    batch = PheyeCollator(processor)(samples)
    assert batch["high_res_pixel_values"].shape == (3, 4, 3, 64, 64)
    assert len(batch["skipped"]) == 1 and (batch["labels"][1] == -100).all()
    black = processor.image_processor([Image.new("RGB", (8, 8))], return_tensors="pt")
    for name in PIXELS:
        assert torch.equal(batch[name][1], black[name][0]) and not torch.equal(batch[name][0], black[name][0])


def test_the_train_command_trains_fusion_blocks_and_its_result_loads_and_answers(base, data, tmp_path):
    trainer = train.run(command(base, data, tmp_path / "out", *STEPS, "--num_train_epochs", "1"))
    names = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[1] for name in names} == PARTS
    assert weights(tmp_path / "out" / "checkpoint-4").keys() == names
    before = PheyeForConditionalGeneration.from_pretrained(base)
    after, info = PheyeForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert parts_that_moved(before, after) == PARTS
    processor = PheyeProcessor.from_pretrained(tmp_path / "out")
    assert by_hand(after.eval(), processor, tiny_image(), "What is it?")


@pytest.mark.parametrize("backbone", ["convnext", "resnet"])
def test_the_branch_trains_if_asked_and_what_was_trained_is_whole_by_itself(backbone, data, tmp_path):
    folder = save(hybrid_model(backbone=backbone), tmp_path / "base")
    options = [*STEPS, "--num_train_epochs", "1", "--max_steps", "2", "--train", "high_res_tower"]
    arguments = command(folder, data, tmp_path / "out", *options)
    trainer = train.run([*arguments, "--trained_only"])
    before = PheyeForConditionalGeneration.from_pretrained(folder)
    loaded = load_trained(copy.deepcopy(before), tmp_path / "out").eval()
    assert parts_that_moved(before, loaded) == {*PARTS, "high_res_tower"}
    batch = questions("What is it?")
    assert torch.equal(loaded(**batch).logits, trainer.model.eval()(**batch).logits)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_everything_that_trains_gets_a_gradient_and_nothing_else(backbone):
    model = hybrid_model(backbone=backbone)
    names = choose_trained(model, train=["high_res_tower"])
    model.train()(**learnt()).loss.backward()
    for name, parameter in model.named_parameters():
        if "high_res_tower.swin.layernorm" not in name:  # which is part of Swin, but of no backbone
            assert (parameter.grad is not None) == (name in names), name


def stopping_at(step: int, original=PheyeTrainer.training_step):
    def training_step(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    return training_step


def test_a_run_that_was_stopped_ends_with_the_same_weights(base, data, tmp_path, monkeypatch):
    options = [*STEPS, "--num_train_epochs", "1", "--train", "high_res_tower"]
    train.run(command(base, data, tmp_path / "undisturbed", *options))
    monkeypatch.setattr(PheyeTrainer, "training_step", stopping_at(3))
    with pytest.raises(KeyboardInterrupt):
        train.run(command(base, data, tmp_path / "out", *options))
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-2"
    monkeypatch.undo()
    train.run(command(base, data, tmp_path / "out", *options))
    expected = (tmp_path / "undisturbed" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("also", [None, ["high_res_tower"]])
def test_frozen_bfloat16_and_trained_float32_train_under_autocast(backbone, also, tmp_path):
    reference, batch = hybrid_model(backbone=backbone, lora_dropout=0.0), learnt()
    model, _ = train.load_model(save(reference, tmp_path), train=also, bf16=True)
    frozen = {parameter.dtype for parameter in model.pheye.vision_tower.parameters()}
    assert frozen == {torch.bfloat16} and model.pheye.fusion_blocks[0].mlp_in.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(reference(**batch).loss.item(), rel=0.05)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "high_res_tower.swin.layernorm" not in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_gradient_checkpointing_of_the_vision_tower_alone():
    """`pheye train --vision_gradient_checkpointing`."""

    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        model = hybrid_model(lora_dropout=0.0)
        names = choose_trained(model, train=["high_res_tower"])
        if checkpointed:
            model.pheye.checkpoint_vision_tower()
        model.train()(**learnt()).loss.backward()
        return {name: model.get_parameter(name).grad for name in names}

    expected, found = gradients(False), gradients(True)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5), name


def test_transformers_own_trainer_with_a_collator_written_by_hand(processor, tmp_path):
    model = hybrid_model()
    choose_trained(model)
    before = copy.deepcopy(model)

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = processor(
            images=[row["image"] for row in rows], text=[row["text"] for row in rows], return_tensors="pt"
        )
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    rows = datasets.Dataset.from_list([{"image": tiny_image(seed), "text": f"What? {seed}"} for seed in range(4)])
    arguments = TrainingArguments(
        tmp_path, use_cpu=True, report_to="none", remove_unused_columns=False, max_steps=2, learning_rate=1e-2,
        per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows)
    trainer.train()
    assert parts_that_moved(before, model) == PARTS
    assert trainer.predict(rows).predictions.shape[-1] == 257  # logits


# --- PEFT ---


def test_peft_lora_on_the_language_model_with_blocks_and_branch_saved_whole(hybrid, tmp_path):
    kept = [f"cross_attention_blocks.{block}" for block in range(2)]
    kept += [f"fusion_blocks.{block}" for block in range(4)] + ["high_res_tower"]
    target = r".*language_model.*(q_proj|v_proj|dense|fc1|fc2)"
    config = LoraConfig(r=4, target_modules=target, modules_to_save=kept, init_lora_weights=False)
    model, batch = get_peft_model(copy.deepcopy(hybrid), config), learnt()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.5)
    model.train()(**batch).loss.backward()
    optimizer.step()
    logits = model.eval()(**batch).logits
    fused = model.base_model.model.pheye.fusion_blocks[0].modules_to_save["default"]
    assert not torch.equal(fused.mlp_out.weight, hybrid.pheye.fusion_blocks[0].mlp_out.weight)
    saved = model.base_model.model.pheye.high_res_tower.modules_to_save["default"].state_dict()
    assert any(
        not torch.equal(weight, hybrid.pheye.high_res_tower.state_dict()[name]) for name, weight in saved.items()
    )

    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(hybrid), tmp_path).eval()
    assert torch.equal(reloaded(**batch).logits, logits)
    merged = reloaded.merge_and_unload()
    assert torch.allclose(merged(**batch).logits, logits, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    whole, info = PheyeForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.allclose(whole(**batch).logits, logits, atol=1e-4)


# --- Devices ---


@torch.no_grad()
def test_spread_over_cpu_and_disk_it_answers_the_same(hybrid, folder, tmp_path):
    device_map = {
        "pheye.vision_tower": "disk",
        "pheye.global_lora": "cpu",
        "pheye.local_lora": "disk",
        "pheye.view_encoding": "disk",
        "pheye.high_res_tower": "disk",
        "pheye.fusion_blocks.0": "disk",
        **{f"pheye.fusion_blocks.{block}": "cpu" for block in (1, 2, 3)},
        "pheye.cross_attention_blocks": "cpu",
        "pheye.language_model": "cpu",
    }
    spread = PheyeForConditionalGeneration.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    batch = questions("What is written?", "Why?")
    assert spread.pheye.fusion_blocks[0].mlp_in.weight.device.type == "meta"
    assert torch.allclose(spread(**batch).logits, hybrid(**batch).logits, atol=1e-5)
    assert torch.equal(
        spread.generate(**batch, **GREEDY, num_beams=2), hybrid.generate(**batch, **GREEDY, num_beams=2)
    )


@torch.no_grad()
def test_a_device_map_keeps_fusion_blocks_whole_and_weights_may_be_offloaded(hybrid, folder, tmp_path):
    memory = {"cpu": int(hybrid.get_memory_footprint() * 0.6)}
    spread = PheyeForConditionalGeneration.from_pretrained(
        folder, device_map="auto", max_memory=memory, offload_folder=tmp_path
    )
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    assert not any(part in name for name in spread.hf_device_map for part in ("mlp_in", "state_norm", "dwconv"))
    batch = questions("What is written?")
    assert torch.allclose(spread(**batch).logits, hybrid(**batch).logits, atol=1e-5)
    offloaded = cpu_offload(copy.deepcopy(hybrid), torch.device("cpu"))
    assert torch.allclose(offloaded(**batch).logits, hybrid(**batch).logits, atol=1e-5)


# --- Quantization ---


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", quantization.METHODS)
def test_only_the_language_model_is_quantized_and_the_branch_still_matters(method, tmp_path):
    config = hybrid_config(
        vision_config=tiny_vision_config(hidden_size=64, intermediate_size=128, num_hidden_layers=5),
        text_config=tiny_text_config(intermediate_size=256),
    )
    plain, batch = tiny_model(config), questions("What is this, and why?")
    plain.save_pretrained(tmp_path)
    quantized = load_quantized(tmp_path, method)
    expected = linears(plain, "pheye.language_model.") - {"pheye.language_model.lm_head"}
    assert quantized_modules(quantized) == expected
    for name, parameter in plain.named_parameters():
        if name.rpartition(".")[0] not in expected:
            assert torch.equal(quantized.get_parameter(name), parameter), name
    logits = quantized(**batch).logits
    assert 0 < difference(logits, plain(**batch).logits) < TOLERANCES[method]
    other = {**batch, "high_res_pixel_values": batch["high_res_pixel_values"].flip(-1)}
    assert difference(quantized(**other).logits, logits) > 0.01
    ids = quantized.generate(**batch, max_new_tokens=6, min_new_tokens=6)
    assert torch.equal(quantized.generate(**batch, max_new_tokens=6, min_new_tokens=6, use_cache=False), ids)


# --- TRL ---


learns_assistant_only = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="TRL refuses assistant_only_loss for data with images before transformers 5.18",
)


def trl_trainer(kind: str, model, folder):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    rows = []
    for seed, answer in enumerate(("A cat.", "Me.", "Two.", "Here.")):
        prompt = [{"role": "system", "content": ""}, {"role": "user", "content": "What?"}]
        chat = (
            {"messages": [*prompt, {"role": "assistant", "content": answer}]} if kind == "SFT" else {"prompt": prompt}
        )
        rows.append({"images": [tiny_image(seed)], **chat})
    options = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 2}
    options |= {"save_strategy": "no", "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    given = {"model": model, "processing_class": hybrid_processor(), "train_dataset": datasets.Dataset.from_list(rows)}
    if kind == "SFT":
        return trl.SFTTrainer(args=trl.SFTConfig(**options, assistant_only_loss=True), **given)
    options["max_completion_length"] = 4
    if kind == "Distillation":
        args = trl.DistillationConfig(**options)
        return trl.DistillationTrainer(args=args, teacher_model=hybrid_model(seed=1), **given)
    args = getattr(trl, f"{kind}Config")(**options, num_generations=2, beta=0.0)
    return getattr(trl, f"{kind}Trainer")(
        args=args, reward_funcs=lambda completions, **_: [0.0, 1.0, 2.0, 3.0], **given
    )


@learns_assistant_only
def test_trls_trainer_for_conversations(tmp_path):
    model = hybrid_model(lora_dropout=0.0)
    choose_trained(model)
    before = copy.deepcopy(model)
    trl_trainer("SFT", model, tmp_path / "run").train()
    assert parts_that_moved(before, model) == PARTS


@learns_assistant_only
@pytest.mark.parametrize("kind", ["GRPO", "RLOO", "Distillation"])
def test_trls_trainers_whose_model_answers_know_inputs_by_names_of_their_own(kind, tmp_path):
    """They would train without the branch; docs/usage.md says so."""
    model = hybrid_model()
    choose_trained(model)
    with pytest.raises((ValueError, TypeError), match="high_res_pixel_values"):
        trl_trainer(kind, model, tmp_path).train()


# --- From nothing to an answer, and where processor and model disagree ---

STRANGER = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

source, hub = "folder", "me/hybrid.v1"
model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True)
model.push_to_hub(hub)
AutoProcessor.from_pretrained(source, trust_remote_code=True).push_to_hub(hub)
pipe = pipeline("image-to-text", model=hub, trust_remote_code=True)
[answer] = pipe("image.png", prompt="What is this?", max_new_tokens=NEW)
print(json.dumps({"answer": answer["generated_text"], "imported": "pheye" in sys.modules}))
"""


@pytest.mark.slow
def test_remote_code_loads_pushes_and_answers_where_only_transformers_is_installed(folder, answers, tmp_path):
    (tmp_path / "folder").symlink_to(folder)
    PICTURES[0].save(tmp_path / "image.png")
    with FakeHub() as hub:
        script = f"HIDDEN, NEW = {superfluous_packages()!r}, {NEW}\n{HIDE}{STRANGER}"
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, **hub.environment(tmp_path / "cache")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"answer": answers[0], "imported": False}


def test_a_plain_model_becomes_a_hybrid_one_that_learns(data, tmp_path):
    """The lines of docs/usage.md."""
    plain = tiny_model(vision_config=tiny_vision_config(num_hidden_layers=5))
    plain.save_pretrained(tmp_path / "plain")
    hybrid_processor(None).save_pretrained(tmp_path / "plain")

    old = PheyeConfig.from_pretrained(tmp_path / "plain")
    config = PheyeConfig.from_dict({**old.to_dict(), "high_res_vision_config": copy.deepcopy(BACKBONES["convnext"])})
    assert config.high_res_fusion_layers == [1, 2, 4]
    model = PheyeForConditionalGeneration.from_pretrained(tmp_path / "plain", config=config)
    trained = randomize(ConvNextBackbone(config.high_res_vision_config), seed=5)
    trained.save_pretrained(tmp_path / "backbone")
    loaded = ConvNextBackbone.from_pretrained(tmp_path / "backbone", config=config.high_res_vision_config)
    model.model.high_res_tower.load_state_dict(loaded.state_dict())
    processor = PheyeProcessor.from_pretrained(tmp_path / "plain")
    processor.image_processor.high_res_tile_size = config.high_res_tile_size
    model.save_pretrained(tmp_path / "hybrid")
    processor.save_pretrained(tmp_path / "hybrid")

    batch = PheyeProcessor.from_pretrained(tmp_path / "hybrid")(
        images=tiny_image(), text="What is it?", return_tensors="pt"
    )
    model = PheyeForConditionalGeneration.from_pretrained(tmp_path / "hybrid")
    without = {name: tensor for name, tensor in batch.items() if name != "high_res_pixel_values"}
    assert torch.equal(model(**batch).logits, plain(**without).logits)
    options = [*STEPS, "--num_train_epochs", "0.5"]
    train.run(command(tmp_path / "hybrid", data, tmp_path / "out", *options))
    tuned = PheyeForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert parts_that_moved(model, tuned) == PARTS
    for name, weight in trained.state_dict().items():
        assert torch.equal(tuned.pheye.high_res_tower.state_dict()[name], weight), name
    assert not torch.equal(tuned(**batch).logits, blind(tuned)(**batch).logits)


@pytest.mark.slow
def test_the_example_makes_a_hybrid_model_whose_pixels_are_the_backbones(tmp_path):
    randomize(AutoModel.from_config(tiny_vision_config(num_hidden_layers=5))).save_pretrained(tmp_path / "vision")
    (tmp_path / "vision" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", "image_mean": [0.1] * 3, "image_std": [0.2] * 3})
    )
    randomize(AutoModelForCausalLM.from_config(tiny_text_config())).save_pretrained(tmp_path / "text")
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    backbone = randomize(ConvNextBackbone(copy.deepcopy(BACKBONES["convnext"])))
    backbone.save_pretrained(tmp_path / "backbone")
    (tmp_path / "backbone" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ConvNextImageProcessor", "image_mean": [0.3] * 3, "image_std": [0.4] * 3})
    )
    example = Path(__file__).parent.parent / "examples" / "new_model.py"
    parts = {"--vision": "vision", "--language_model": "text", "--high_res": "backbone", "--output": "out"}
    options = [word for name, folder in parts.items() for word in (name, str(tmp_path / folder))]
    done = subprocess.run(
        [sys.executable, example, *options, "--tiles_per_side", "2", "--interval", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    model = PheyeForConditionalGeneration.from_pretrained(tmp_path / "out")
    processor = PheyeProcessor.from_pretrained(tmp_path / "out")
    assert list(processor.image_processor.high_res_image_mean) == [0.3] * 3
    assert list(processor.image_processor.image_mean) == [0.1] * 3
    trained = sum(model.get_parameter(name).numel() for name in choose_trained(model))
    assert f"of which {trained:,} train" in done.stdout
    weight = "embeddings.patch_embeddings.weight"
    assert torch.equal(model.pheye.high_res_tower.get_parameter(weight), backbone.get_parameter(weight))
    assert by_hand(model.eval(), processor, tiny_image(), "What?", max_new_tokens=2) is not None


@pytest.mark.parametrize(
    ("tile_size", "has_branch", "said"),
    [
        (None, False, None),
        (64, True, None),
        (64, False, "high_res_pixel_values is given, but this model has no high-resolution branch"),
        (
            None,
            True,
            "high_res_pixel_values is missing, but this model's branch needs it for 2. Make it with this mod",
        ),
        (32, True, "has shape (2, 4, 3, 32, 32), but this model takes (images, 4, 3, 64, 64): 2 x 2 tiles of 64 pixe"),
    ],
)
@pytest.mark.parametrize(
    "options", [None, {}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"num_beams": 2}], ids=str
)
def test_a_processor_and_a_model_that_disagree_are_told_apart(hybrid, tile_size, has_branch, said, options):
    model = hybrid if has_branch else tiny_model()
    images = [tiny_image(0), tiny_image(1)]
    batch = hybrid_processor(tile_size)(images=images, text=["What?", "And this?"], return_tensors="pt")
    with pytest.raises(ValueError, match=re.escape(said)) if said else contextlib.nullcontext():
        if options is None:
            model(**batch)
        else:
            model.generate(**batch, max_new_tokens=1, **options)


def test_an_image_smaller_than_its_tiles_is_enlarged_as_pillow_does():
    small = tiny_image(width=20, height=10)
    whole = small.resize((128, 128), Image.Resampling.BICUBIC)
    processor = hybrid_processor().image_processor
    found, expected = (processor(image, return_tensors="pt")["high_res_pixel_values"] for image in (small, whole))
    assert torch.equal(found, expected)
