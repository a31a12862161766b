"""Pre-training of both frozen parts of Pheye-nano, shortened: what comes out loads, and a run goes on as it was."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from pheye import PheyeForConditionalGeneration, PheyeImageProcessor, PheyeProcessor
from pheye.nano import language, questions, vision
from pheye.nano.labels import GRID, HEADS
from pheye.nano.muon import Muon, optimizers_for

from tiny import tiny_model, tiny_text_config

pytestmark = pytest.mark.once


@pytest.fixture
def small(monkeypatch):
    """Few pictures and texts to a batch, and small models."""
    monkeypatch.setattr(vision, "PAGES", 2)
    monkeypatch.setattr(vision, "SCENES", 1)
    monkeypatch.setattr(vision, "CROPS", 1)
    monkeypatch.setattr(vision, "WARMUP", 2)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=14
    )
    monkeypatch.setattr(vision, "vision_config", lambda: config)
    monkeypatch.setattr(language, "language_config", lambda size: tiny_text_config(vocab_size=size))
    monkeypatch.setattr(language, "BATCH", 2)
    monkeypatch.setattr(language, "TOKENIZER_TEXTS", 300)


def drawn_here(indices, seed, held_out, workers, ahead, together=1):
    """Without other processes, which would not know of the small batches."""
    return [tuple(map(torch.from_numpy, vision.batch(index, seed, held_out))) for index in indices[:4]]


def parameters(folder, kind) -> dict[str, torch.Tensor]:
    return dict(kind.from_pretrained(folder).named_parameters())


@pytest.mark.parametrize("part", ["vision", "language"])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(part, small, tmp_path, monkeypatch):
    module, kind = {"vision": (vision, CLIPVisionModel), "language": (language, AutoModelForCausalLM)}[part]
    monkeypatch.setattr(module, "SAVE_EVERY", 2)
    monkeypatch.setattr(vision, "drawn", drawn_here)
    module.train(tmp_path / "whole", 4)
    save = module.save_checkpoint

    def save_and_stop(output, model, optimizers, step):
        save(output, model, optimizers, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            module.train(tmp_path / "stopped", 4)
    assert not (tmp_path / "stopped" / part).exists()
    module.train(tmp_path / "stopped", 4)
    whole, stopped = (parameters(tmp_path / run / part, kind) for run in ("whole", "stopped"))
    for name, parameter in whole.items():
        assert torch.equal(parameter, stopped[name]), name
    assert json.loads((tmp_path / "stopped" / "log.jsonl").read_text().splitlines()[-1])["step"] == 4
    with pytest.raises(ValueError, match=r"other settings: seed \(seed was 0, now 1\)"):
        module.train(tmp_path / "stopped", 4, seed=1)


def test_the_reader_learns_a_batch_by_heart(small):
    torch.manual_seed(0)
    reader = vision.Reader(vision.vision_config())
    pixels, maps, counts, is_page = map(torch.from_numpy, vision.batch(0))
    assert maps.shape == (4, len(HEADS), GRID, GRID) and is_page.tolist() == [True, True, False, False]
    optimizers = optimizers_for(reader, reader.vision, 3e-3, 1.5e-3)
    held = [parameter for each in optimizers for group in each.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in reader.parameters()}
    assert len(held) == len(set(map(id, held)))
    losses = []
    for _ in range(30):
        loss = vision.loss_of(reader, vision.normalized(pixels), maps, counts)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_batches_drawn_by_other_processes_are_the_same_and_in_order(monkeypatch):
    monkeypatch.setattr(vision, "CHUNK", 1)
    expected = [vision.batch(index, 1, True) for index in (3, 4)]
    for arrays, known in zip(vision.drawn(range(3, 5), 1, True, workers=1, ahead=True), expected, strict=True):
        assert all(np.array_equal(one.numpy(), other) for one, other in zip(arrays, known, strict=True))
    (arrays,) = vision.drawn(range(3, 5), 1, True, workers=2, ahead=False, together=2)
    for one, *parts in zip(arrays, *expected, strict=True):
        assert np.array_equal(one.numpy(), np.concatenate(parts))


def test_training_goes_on_from_the_tower_of_a_pheye(small, tmp_path):
    model = tiny_model(vision_config=vision.vision_config())
    model.save_pretrained(tmp_path / "pheye")
    vision.train(tmp_path / "more", 0, start=tmp_path / "pheye")
    found = parameters(tmp_path / "more" / "vision", CLIPVisionModel)
    expected = dict(model.pheye.vision_tower.named_parameters())
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("goes_on", [False, True])
def test_easy_batches_are_for_a_tower_that_begins(goes_on, small, tmp_path, monkeypatch):
    tiny_model(vision_config=vision.vision_config()).save_pretrained(tmp_path / "pheye")
    orders = []
    monkeypatch.setattr(vision, "drawn", lambda indices, *_, **__: orders.append(indices) or [])
    vision.train(tmp_path / "more", 8, start=tmp_path / "pheye" if goes_on else None)
    assert vision.ease_of(orders[-1][0]) == (0 if goes_on else 1) and len(orders[-1]) == math.ceil(8 / vision.ECHOES)


def test_muon_steps_like_that_of_torch_which_rounds():
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 8), (24, 8), (8, 24)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = [Muon(ours, **options), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)]
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        moved, error = (other - 1).norm(), (one - other).norm()
        assert moved > 0.05 and error < 0.02 * moved


def test_recolouring_leaves_scenes_alone_and_pages_readable():
    pixels = torch.randint(0, 256, (8, 4, 4, 3), dtype=torch.uint8)
    is_page = torch.arange(8) < 6
    given = vision.recoloured(pixels, is_page, torch.Generator().manual_seed(0))
    assert torch.equal(given[6:], pixels[6:])
    for before, after in zip(pixels[:6], given[:6], strict=True):
        variants = [before.roll(shift, -1) for shift in range(3)]
        assert any(torch.equal(after, image) or torch.equal(after, 255 - image) for image in variants)
    assert not torch.equal(given[:6], pixels[:6])


def test_signs_are_written_letter_by_letter_and_everything_else_word_by_word(small):
    tokenizer = language.train_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(
        tokenizer("Instruction: How many circles are there? AIHOW 10")["input_ids"]
    )
    expected = ["Instruction", ":", "ĠHow", "Ġmany", "Ġcircles", "Ġare", "Ġthere", "?", "Ġ", *"AIHOW", "Ġ", *"10"]
    assert tokens == expected
    assert tokenizer.convert_ids_to_tokens(tokenizer("FRESH BREAD")["input_ids"]) == [*"FRESH", "Ġ", *"BREAD"]
    text = "A blue circle and a sign that says ÄÖ 7."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    processor = PheyeProcessor(PheyeImageProcessor(), tokenizer)
    prompt = processor.apply_chat_template([{"role": "user", "content": questions.SIGN}], add_generation_prompt=True)
    assert len(tokenizer(prompt)["input_ids"]) < len(prompt) / 3


def test_lessons_ask_one_question_about_few_shapes_that_they_tell():
    kinds = set()
    for seed in range(60):
        question, answer = language.lesson(random.Random(seed), most_shapes=1 + seed % 2)
        told, asked = question["content"].split(". ")
        shapes = told.lower().split(" and ")
        assert 1 <= len(shapes) <= 1 + seed % 2 and asked.endswith("?")
        kind = asked.rstrip("?").removesuffix("s are there").split()[-1]
        found = [shape.split()[1] for shape in shapes if shape.split()[2] == kind]
        expected = {"How": questions.NUMBERS[len(found)], "Is": "yes" if found else "no", "What": "".join(found)}
        assert answer["content"] == expected[asked.split()[0]]
        kinds.add(asked.split()[0])
    assert kinds == {"How", "Is", "What"}


def test_lessons_come_first_in_larger_batches(small, monkeypatch):
    monkeypatch.setattr(language, "LESSON", 1)
    processor = PheyeProcessor(PheyeImageProcessor(), language.train_tokenizer())
    for step in range(language.MOST_SHAPES):
        ids, labels = language.batch_of(processor, 0, step)
        assert ids.shape == labels.shape and len(ids) == language.SORTED * language.BATCH
        texts = [text.split("Instruction:")[1:] for text in processor.tokenizer.batch_decode(ids)]
        assert all(len(turns) == 1 for turns in texts) and len({turn for (turn,) in texts}) > 1
        told = [turn.split(". ")[0].replace(" and ", ", ").count(", ") + 1 for (turn,) in texts]
        assert max(told) <= step + 1 and (step == 0 or max(told) > 1)
    assert len(language.batch_of(processor, 0, language.MOST_SHAPES)[0]) == language.BATCH


@pytest.mark.parametrize("workers", [0, 2])
def test_texts_made_by_other_processes_are_the_same_and_in_order(workers, small):
    processor = PheyeProcessor(PheyeImageProcessor(), language.train_tokenizer())
    first = language.LESSON * language.MOST_SHAPES - 3  # in the middle of a group, and from lessons to conversations
    steps = range(first, first + 6)
    found = list(language.batches(processor, 0, steps, workers))
    assert len(found) == len(steps)
    for step, batch in zip(steps, found, strict=True):
        assert all(
            torch.equal(one, other) for one, other in zip(batch, language.batch_of(processor, 0, step), strict=True)
        )


def test_texts_give_many_answers_away(small):
    told = 0
    for seed in range(100):
        first, answer = language.conversation(random.Random(seed))[:2]
        word = answer["content"].removesuffix(".").split()[-1]
        told += word.isupper() and word in first["content"]
    assert 10 < told < 60


def test_both_parts_become_a_pheye_by_the_documented_command(small, tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "drawn", drawn_here)
    vision.train(tmp_path / "vision", 1)
    language.train(tmp_path / "language", 1)
    parts = ["--vision", tmp_path / "vision" / "vision", "--language-model", tmp_path / "language" / "language"]
    example = Path(__file__).parent.parent.parent / "examples" / "new_model.py"
    subprocess.run([sys.executable, example, *parts, "--output", tmp_path / "base", "--interval", "2"], check=True)
    model = PheyeForConditionalGeneration.from_pretrained(tmp_path / "base")
    processor = PheyeProcessor.from_pretrained(tmp_path / "base")
    assert model.config.views_per_image == 10 and model.config.cross_attention_layers == (1, 3)
    assert tuple(processor.image_processor.image_mean) == tuple(vision.OPENAI_CLIP_MEAN)
    assert processor.tokenizer.eos_token_id == model.config.text_config.eos_token_id
    assert len(processor.tokenizer) <= model.config.vocab_size
