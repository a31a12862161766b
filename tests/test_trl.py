"""TRL's SFTTrainer trains model and processor as they are, and learns what the assistant says and nothing else."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel

from pheye import PheyeForConditionalGeneration, PheyeProcessor
from pheye.training.collator import PheyeCollator
from pheye.training.trained import choose_trained

from tiny import END, tiny_config, tiny_image, tiny_model, tiny_processor

trl = pytest.importorskip("trl", reason="TRL is not installed")
from datasets import Dataset  # noqa: E402

TRAINED = ("global_lora", "local_lora", "view_encoding", "cross_attention_blocks")
EXAMPLE = Path(__file__).parent.parent / "examples" / "train_with_trl.py"

learns_assistant_only = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="TRL refuses assistant_only_loss for data with images before transformers 5.18",
)


def conversation(*turns: str, system: str = "") -> list[dict]:
    """Without the published system message, which is long in bytes."""
    roles = ["system", *("user", "assistant") * (len(turns) // 2)]
    return [{"role": role, "content": content} for role, content in zip(roles, (system, *turns), strict=True)]


# Each about the image whose seed is its number, and what is to be learnt of it.
CONVERSATIONS = [
    conversation("What is it?", "A cat."),
    conversation("Who?", "Me, with a hat."),
    conversation("How many?", "Two.", "Output: sure?", "Yes, two."),
    conversation("Where?", "Here", system="Be short."),
]
LEARNT = [f" A cat.{END}", f" Me, with a hat.{END}", f" Two.{END} Yes, two.{END}", f" Here{END}"]


def make_trainer(folder, model, rows: list[dict], max_steps: int = 1, peft_config=None, processor=None, **options):
    """One batch holds all rows, so that every step sees all of them; row n has image n."""
    defaults = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": len(rows),
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(max_steps=max_steps, **{**defaults, **options}),
        processing_class=processor or tiny_processor(),
        train_dataset=Dataset.from_list([{"images": [tiny_image(seed)], **row} for seed, row in enumerate(rows)]),
        peft_config=peft_config,
    )


@pytest.fixture
def assistant_trainer(tmp_path):
    def make(model, max_steps: int = 1, **options):
        rows = [{"messages": messages} for messages in CONVERSATIONS]
        return make_trainer(tmp_path, model, rows, max_steps, assistant_only_loss=True, **options)

    return make


def trainable_model():
    model = tiny_model(lora_dropout=0.0)
    choose_trained(model)
    return model


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def train_and_watch(trainer) -> list[dict]:
    """What the model was called with, step by step."""
    seen = []
    handle = trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True
    )
    trainer.train()
    handle.remove()
    return seen


def check_batch(batch: dict, numbers: list[int]):
    """Each row is the template's text of a conversation beside its own image, labelled by the template's mask."""
    processor = tiny_processor()
    images = processor(images=[tiny_image(n) for n in range(len(CONVERSATIONS))], return_tensors="pt").pixel_values
    left = list(numbers)
    columns = [batch[name] for name in ("input_ids", "labels", "attention_mask", "pixel_values")]
    for ids, labels, attention, pixels in zip(*columns, strict=True):
        number = next(n for n in left if torch.equal(pixels, images[n]))
        left.remove(number)
        template = processor.apply_chat_template(
            [CONVERSATIONS[number]],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
        )
        text, mask = template["input_ids"][0], template["assistant_masks"][0]
        is_text = attention.bool()
        assert torch.equal(ids[is_text], text)
        assert torch.equal(labels[is_text], text.masked_fill(mask == 0, -100))
        assert (labels[~is_text] == -100).all()
        assert processor.tokenizer.decode(labels[labels != -100]) == LEARNT[number]
    assert not left


def text_and_image(batch: dict) -> dict:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}


# --- assistant_only_loss=True, with TRL's own collator ---


@learns_assistant_only
def test_the_model_gets_each_image_and_labels_on_the_assistants_tokens_only(assistant_trainer):
    (batch,) = train_and_watch(assistant_trainer(trainable_model()))
    check_batch(batch, [0, 1, 2, 3])


@learns_assistant_only
def test_trls_loss_is_the_models_own_and_depends_on_the_images(assistant_trainer):
    trainer = assistant_trainer(trainable_model())
    (batch,) = train_and_watch(trainer)
    inputs = {**text_and_image(batch), "labels": batch["labels"]}
    with torch.no_grad():
        own = trainable_model()(**inputs).loss.item()
        others = trainable_model()(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}).loss.item()
    assert losses(trainer)[0] == pytest.approx(own, rel=1e-4)
    assert losses(trainer)[0] != pytest.approx(others, rel=1e-3)


@learns_assistant_only
def test_rows_with_two_images_one_and_none_train_together_as_by_the_command(tmp_path):
    config = tiny_config(max_images=2, lora_dropout=0.0)
    model, processor = tiny_model(config), tiny_processor(config)
    choose_trained(model)
    numbers = ["[image 1] [image 2] ", "", ""]
    images = [[tiny_image(0), tiny_image(1)], [tiny_image(2)], []]
    rows = [{"images": own, "messages": CONVERSATIONS[row]} for row, own in enumerate(images)]
    samples = [{"id": "0", "images": own, "messages": copy.deepcopy(CONVERSATIONS[n])} for n, own in enumerate(images)]
    for sample, number in zip(samples, numbers, strict=True):
        sample["messages"][1]["content"] = number + sample["messages"][1]["content"]
    batch = PheyeCollator(processor)(samples)
    with torch.no_grad():
        expected = model(**{name: value for name, value in batch.items() if name not in ("seen", "skipped")}).loss
    trainer = make_trainer(tmp_path, model, rows, processor=processor, assistant_only_loss=True)
    (seen,) = train_and_watch(trainer)
    assert sorted((grids != 0).any(dim=-1).sum().item() for grids in seen["image_grids"]) == [0, 1, 2]
    assert losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-4)


@pytest.fixture(scope="module")
def canvas_parts():
    config = tiny_config(canvases=[[1, 2], [2, 2], [3, 1]], max_images=2, lora_dropout=0.0)
    return lambda: (tiny_model(config), tiny_processor(config))


def loss_by_the_command(model, processor, images: list[list], conversations: list[list[dict]]) -> float:
    """Of a batch that `PheyeCollator` makes, which has tests of its own; numbers of images are written by hand."""
    samples = [
        {"id": str(row), "images": own, "messages": copy.deepcopy(messages)}
        for row, (own, messages) in enumerate(zip(images, conversations, strict=True))
    ]
    for sample in samples:
        if len(sample["images"]) > 1:
            numbers = "".join(f"[image {number}] " for number, _ in enumerate(sample["images"], start=1))
            sample["messages"][1]["content"] = numbers + sample["messages"][1]["content"]
    batch = PheyeCollator(processor)(samples)
    with torch.no_grad():
        return model(**{name: value for name, value in batch.items() if name not in ("seen", "skipped")}).loss.item()


@learns_assistant_only
def test_rows_of_two_images_of_any_shape_train_as_by_the_command(tmp_path, canvas_parts):
    model, processor = canvas_parts()
    choose_trained(model)
    sizes = [[(80, 40), (50, 50)], [(30, 90), (80, 40)], [(50, 50)]]
    images = [[tiny_image(place, *size) for place, size in enumerate(row)] for row in sizes]
    expected = loss_by_the_command(model, processor, images, CONVERSATIONS[:3])
    turned = loss_by_the_command(model, processor, [row[::-1] for row in images], CONVERSATIONS[:3])
    rows = [{"images": own, "messages": messages} for own, messages in zip(images, CONVERSATIONS, strict=False)]
    before = parameters(model)
    trainer = make_trainer(tmp_path, model, rows, processor=processor, assistant_only_loss=True)
    (seen,) = train_and_watch(trainer)
    grids = [[[1, 2], [2, 2]], [[2, 2], [0, 0]], [[3, 1], [1, 2]]]
    assert sorted(seen["image_grids"].tolist()) == grids
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-4)
    assert losses(trainer)[0] != pytest.approx(turned, rel=1e-4)
    name = "pheye.view_encoding.row_embedding.weight"
    assert not torch.equal(model.state_dict()[name], before[name])


@learns_assistant_only
@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_batch_of_text_alone_trains_the_language_model_and_nothing_else(tmp_path, canvas_parts, has_adapter):
    model, processor = canvas_parts()
    choose_trained(model)
    expected = loss_by_the_command(model, processor, [[], []], CONVERSATIONS[:2])
    rows = [{"images": [], "messages": messages} for messages in CONVERSATIONS[:2]]
    config = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=True)
    options = {"peft_config": config} if has_adapter else {}
    trainer = make_trainer(tmp_path, model, rows, processor=processor, assistant_only_loss=True, **options)
    before = parameters(trainer.model)
    (seen,) = train_and_watch(trainer)
    assert not {"pixel_values", "image_grids"} & seen.keys()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-4)
    changed = {name for name, value in parameters(trainer.model).items() if not torch.equal(value, before[name])}
    assert bool(changed) == has_adapter and all("lora_B" in name for name in changed)


@learns_assistant_only
def test_text_alone_without_checkpoints_has_nothing_to_train_but_a_language_model(tmp_path, canvas_parts):
    """As docs/training.md says."""
    model, processor = canvas_parts()
    choose_trained(model)
    rows = [{"images": [], "messages": messages} for messages in CONVERSATIONS[:2]]
    options = {"processor": processor, "assistant_only_loss": True, "gradient_checkpointing": False}
    with pytest.raises(RuntimeError, match="element 0 of tensors does not require grad"):
        make_trainer(tmp_path, model, rows, **options).train()


@learns_assistant_only
def test_training_lowers_the_loss_and_changes_what_trains_only(assistant_trainer):
    model = trainable_model()
    before = parameters(model)
    trainer = assistant_trainer(model, max_steps=25)
    trainer.train()
    assert losses(trainer)[-1] < 0.2 * losses(trainer)[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != any(part in name for part in TRAINED), name


@learns_assistant_only
def test_what_was_trained_is_saved_and_loads_to_the_same_logits(assistant_trainer, tmp_path):
    trainer = assistant_trainer(trainable_model(), max_steps=2)
    inputs = text_and_image(train_and_watch(trainer)[0])
    trainer.save_model(tmp_path / "saved")
    model = PheyeForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        logits = trainer.model.eval()(**inputs).logits
        assert torch.equal(model(**inputs).logits, logits)
        assert not torch.allclose(tiny_model()(**inputs).logits, logits, atol=1e-2)
    processor = PheyeProcessor.from_pretrained(tmp_path / "saved")
    assert processor.chat_template == tiny_processor().chat_template
    assert processor.tokenizer.padding_side == "left"


@learns_assistant_only
def test_gradient_checkpointing_trains_to_the_same_weights(assistant_trainer):
    plain, saving = trainable_model(), trainable_model()
    runs = []
    saving.model.cross_attention_blocks[0].to_q.register_forward_hook(lambda *args: runs.append(1))
    assistant_trainer(plain, max_steps=2, gradient_checkpointing=False, optim="sgd").train()
    assistant_trainer(saving, max_steps=2, gradient_checkpointing=True, optim="sgd").train()
    assert len(runs) == 4  # twice per step
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6), name
    before, after = (model.model.local_lora for model in (trainable_model(), saving))
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        assert not torch.allclose(one, other, rtol=1e-3, atol=1e-5)  # steps that the comparison above would see


@learns_assistant_only
def test_peft_config_trains_lora_on_the_language_model_only(assistant_trainer, tmp_path):
    config = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj|dense|fc1|fc2)")
    trainer = assistant_trainer(tiny_model(lora_dropout=0.0), max_steps=10, peft_config=config)
    before = parameters(trainer.model)
    batch = train_and_watch(trainer)[0]
    check_batch(batch, [0, 1, 2, 3])
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    changed = {name for name, value in parameters(trainer.model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_A" in name or "lora_B" in name}
    assert all("language_model" in name for name in changed)
    trainer.save_model(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(tiny_model(lora_dropout=0.0), tmp_path / "adapter").eval()
    inputs = text_and_image(batch)
    with torch.no_grad():
        assert torch.equal(reloaded(**inputs).logits, trainer.model.eval()(**inputs).logits)


def test_trl_finds_the_end_of_an_answer_among_what_is_learnt():
    """Otherwise SFTTrainer warns that the model may not learn to stop."""
    from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained

    assert has_generation_markers(tiny_processor().chat_template)
    assert is_chat_template_stop_token_trained(tiny_processor())


# --- Other forms of data ---


def test_prompts_and_completions_learn_the_completion(tmp_path):
    rows = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in CONVERSATIONS[:2]]
    (batch,) = train_and_watch(make_trainer(tmp_path, trainable_model(), rows))
    check_batch(batch, [0, 1])


def test_without_assistant_only_loss_the_whole_text_is_learnt(tmp_path):
    """TRL's default for conversations, of which docs/training.md warns."""
    rows = [{"messages": messages} for messages in CONVERSATIONS]
    (batch,) = train_and_watch(make_trainer(tmp_path, trainable_model(), rows))
    assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
    assert len(batch["pixel_values"]) == len(rows)


# --- Trainers whose model answers ---


def answering_trainer(kind: str, model, folder):
    data = [{"image": tiny_image(seed), "prompt": conversation("What?", "")[:2]} for seed in range(4)]
    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "max_completion_length": 4,
        "learning_rate": 1e-2,
    }
    given = {"model": model, "processing_class": tiny_processor(), "train_dataset": Dataset.from_list(data)}
    if kind == "Distillation":
        return trl.DistillationTrainer(
            args=trl.DistillationConfig(**options), teacher_model=tiny_model(seed=1), **given
        )
    options |= {"num_generations": 2, "beta": 0.0}  # else RLOO loads the model again, from the folder it came from
    config, trainer = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    return trainer(
        args=config(**options), reward_funcs=lambda completions, **_: list(map(length_of, completions)), **given
    )


def length_of(completion: list[dict]) -> float:
    return float(len(completion[0]["content"].encode()))


@learns_assistant_only
@pytest.mark.parametrize("kind", ["GRPO", "RLOO", "Distillation"])
def test_trainers_whose_model_answers_see_the_image_and_train(kind, tmp_path, monkeypatch):
    model = trainable_model()
    before, seen, generate = parameters(model), [], model.generate

    def spy(*args, **kwargs):
        seen.append(kwargs["pixel_values"])
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", spy)
    answering_trainer(kind, model, tmp_path).train()
    images = tiny_processor()(images=[tiny_image(n) for n in range(4)], return_tensors="pt").pixel_values
    assert seen and all(any(torch.equal(image, known) for known in images) for batch in seen for image in batch)
    changed = {name for name, value in parameters(model).items() if not torch.equal(value, before[name])}
    assert changed and all(any(part in name for part in TRAINED) for name in changed)


# --- Data that lack their image ---


@learns_assistant_only
@pytest.mark.parametrize("content", ["placeholder", "None"])
@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_data_that_speak_of_an_image_without_one_are_refused(form, content, tmp_path):
    part = {"type": "image"} if content == "placeholder" else {"type": "image", "image": None}
    prompt = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]
    row = {"messages": prompt + answer} if form == "messages" else {"prompt": prompt, "completion": answer}
    trainer = make_trainer(tmp_path, trainable_model(), [{**row, "images": []}])
    with pytest.raises(ValueError, match=r"speaks? of an image|Number of images provided \(0\)"):
        trainer.train()


# --- The example ---


@pytest.mark.slow
@learns_assistant_only
def test_the_example_trains_saves_reloads_and_answers(model_folder, tmp_path):
    lines = []
    for seed, messages in enumerate(CONVERSATIONS):
        tiny_image(seed).save(tmp_path / f"{seed}.png")
        lines.append(json.dumps({"images": [f"{seed}.png"], "messages": messages}) + "\n")
    (tmp_path / "data.jsonl").write_text("".join(lines))
    command = [sys.executable, EXAMPLE, "--model", model_folder, "--data", tmp_path / "data.jsonl"]
    command += ["--image_folder", tmp_path, "--output", tmp_path / "out", "--epochs", "30", "--learning_rate", "1e-2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "What is it?\n  answer: 'A cat.'" in result.stdout
    assert "Who?\n  answer: 'Me, with a hat.'" in result.stdout
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "modeling_pheye.py", "chat_template.jinja"} <= written
