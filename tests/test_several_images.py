"""Training on rows with no image, one and several: each is learnt as it would be alone, or left out and counted."""

import copy
import json

import pytest
import torch
from accelerate import cpu_offload
from PIL import Image

from pheye import PheyeForConditionalGeneration, PheyeProcessor
from pheye.training import train
from pheye.training.collator import IGNORED, PheyeCollator
from pheye.training.formats import Source
from pheye.training.inspection import show_samples
from pheye.training.mixture import Mixture, Stream, compose
from pheye.training.rows import open_rows

from tiny import randomize, tiny_config, tiny_image, tiny_processor
from toy_data import by_id, conversation, image_table, images, messages, with_images, write_json
from training_runs import QUIET

pytestmark = pytest.mark.once
NUMBERS = ("input_ids", "attention_mask", "labels", "pixel_values", "image_grids")


@pytest.fixture(scope="module")
def parts():
    config = tiny_config(max_images=2)
    return randomize(PheyeForConditionalGeneration(config)).eval(), tiny_processor(config)


def llava_rows() -> list[dict]:
    return [
        {"id": "one", "image": "a.png", "conversations": conversation(("<image>\nWhat?", "A cat."))},
        {"id": "text", "conversations": conversation(("Two and two?", "Four, I think."))},
        {"id": "two", "image": ["a.png", "b.png"], "conversations": conversation(("<image>\n<image>\nWhich?", "B."))},
    ]


def tables(folder) -> str:
    return image_table(
        folder,
        image_column="images",
        is_list=True,
        images=[[], images(2), images(1, 0)],
        messages=[messages(("Why?", "So.")), messages(("Who?", "Me.")), messages(("Both?", "Yes, both."))],
    )


@torch.no_grad()
def test_an_offloaded_model_has_its_mask_where_the_features_are(parts):
    model, processor = parts
    batch = processor(images=[[tiny_image(0), tiny_image(1)], None], text=["one", "another text"], return_tensors="pt")
    offloaded = cpu_offload(copy.deepcopy(model), torch.device("cpu"))
    assert torch.allclose(offloaded(**batch).logits, model(**batch).logits, atol=1e-5)


@pytest.fixture
def folder(tmp_path):
    """A mixture of both forms, of three rows each."""
    write_json(with_images(tmp_path), llava_rows())
    tables(tmp_path)
    (tmp_path / "mixture.json").write_text(json.dumps({"sources": [{"path": "data.json"}, {"path": "table"}]}))
    return tmp_path


def read(folder, max_images: int) -> list[dict]:
    sources = train.read_sources([str(folder / "mixture.json")])
    return list(Mixture(sources, 0, max_images))


def loss_of(model, batch: dict) -> torch.Tensor:
    return model(**{name: batch[name] for name in NUMBERS}).loss


def gradients(model, loss: torch.Tensor) -> list[torch.Tensor]:
    trained = [*model.pheye.cross_attention_blocks.parameters(), *model.pheye.view_encoding.parameters()]
    return torch.autograd.grad(loss, trained)


def test_the_loss_of_a_mixed_batch_is_that_of_its_rows_alone(parts, folder):
    model, processor = parts
    collator, samples = PheyeCollator(processor), read(folder, 2)
    assert sorted(len(sample["images"]) for sample in samples) == [0, 0, 1, 1, 2, 2]
    batch = collator(samples)
    assert batch["skipped"] == [] and len(batch["labels"]) == batch["seen"] == 6
    together, total = loss_of(model, batch), int((batch["labels"] != IGNORED).sum())
    weighted, summed = 0.0, None
    for sample in samples:
        own = collator([sample])
        share = loss_of(model, own) * int((own["labels"] != IGNORED).sum()) / total
        weighted += share.detach()
        own_gradients = gradients(model, share)
        if not sample["images"]:
            assert all((gradient == 0).all() for gradient in own_gradients)  # there, and nothing
        summed = own_gradients if summed is None else [a + b for a, b in zip(summed, own_gradients, strict=True)]
    torch.testing.assert_close(together.detach(), weighted, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients(model, together), summed, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_a_text_is_learnt_as_the_language_model_would(parts, folder):
    model, processor = parts
    sample = next(sample for sample in read(folder, 2) if sample["id"] == "text")
    batch = PheyeCollator(processor)([sample])
    assert batch["seen"] == 1 and batch["input_ids"].shape[0] == 2 and (batch["labels"][1] == IGNORED).all()
    alone = model(**{name: batch[name][:1] for name in ("input_ids", "attention_mask", "labels")}).loss
    torch.testing.assert_close(loss_of(model, batch), alone)


@pytest.mark.parametrize("max_images", [1, 2])
def test_the_command_trains_on_all_rows_that_the_model_takes(folder, capsys, max_images):
    config = tiny_config(max_images=max_images)
    for part in (randomize(PheyeForConditionalGeneration(config)), tiny_processor(config)):
        part.save_pretrained(folder / "base")
    options = [
        "--data",
        str(folder / "mixture.json"),
        "--output",
        str(folder / "out"),
        "--model",
        str(folder / "base"),
    ]
    steps = ["--max_steps", "2", "--effective_batch_size", "3", "--per_device_train_batch_size", "1"]
    steps += ["--learning_rate", "1e-2", "--logging_steps", "1"]
    trainer = train.run([*options, "--bf16", "false", *QUIET, *steps])
    said = capsys.readouterr().out
    assert len(trainer.train_dataset) == {1: 4, 2: 6}[max_images]
    for name in ("data", "table"):
        line = f"{name}: 1 of 3 rows left out: 1 with more images than the model takes (max_images=1)."
        assert (line in said) == (max_images == 1)
    assert trainer.state.global_step == 2 and trainer.skipped == 0
    trained = PheyeForConditionalGeneration.from_pretrained(folder / "out")
    before = PheyeForConditionalGeneration.from_pretrained(folder / "base").state_dict()
    changed = {name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("cross_attention_blocks" in name for name in changed)
    assert PheyeProcessor.from_pretrained(folder / "out").image_processor.max_images == max_images


# --- What is shown of a conversation about several images ---


def row_of(folder, row: dict, **fields):
    path = write_json(with_images(folder), [{"image": ["a.png", "b.png"], **row}])
    source = Source(path, **fields)
    return open_rows(source, 2)[0], source


IMAGE = {"type": "image"}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


FORMS = {
    "in front": (conversation(("<image>\n<image>\nWhich?", "B")), [[IMAGE, IMAGE, text("Which?")]]),
    "without marks": (conversation(("Which?", "B")), [[IMAGE, IMAGE, text("Which?")]]),
    "interleaved": (
        conversation(("Is <image> like <image>?", "B")),
        [[text("Is "), IMAGE, text("like "), IMAGE, text("?")]],
    ),
    "behind": (conversation(("Which?\n<image>\n<image>", "B")), [[text("Which?\n"), IMAGE, IMAGE]]),
    "in two turns": (
        conversation(("<image>\nWhat?", "A"), ("And <image>now?", "B")),
        [[IMAGE, text("What?")], [text("And "), IMAGE, text("now?")]],
    ),
}


@pytest.mark.parametrize("is_parts", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_numbers_stand_where_the_chat_template_puts_them(tmp_path, form, is_parts):
    said, questions = FORMS[form]
    expected = messages(*((None, part["value"]) for part in said[1::2]))
    for message, content in zip(expected[::2], questions, strict=True):
        message["content"] = content
    row = {"messages": expected} if is_parts else {"conversations": said}
    sample = compose(*row_of(tmp_path, copy.deepcopy(row), turns=None), "key")
    assert sample["images"] == [f"{tmp_path}/a.png", f"{tmp_path}/b.png"]
    template = tiny_processor(tiny_config(max_images=2)).apply_chat_template
    assert template(sample["messages"]) == template(expected)


def test_a_drawn_turn_has_the_images_up_to_it_and_no_later_ones(tmp_path):
    said = conversation(("Hello.", "H"), ("<image>\nWhat?", "A"), ("And <image>now?", "B"), ("Which?", "C"))
    row, source = row_of(tmp_path, {"conversations": said})
    expected = {
        "H": ("Hello.", 0),
        "A": ("What?", 1),
        "B": ("[image 1] And [image 2] now?", 2),
        "C": ("[image 1] [image 2] Which?", 2),
    }
    found = {}
    for key in range(60):
        sample = compose(row, source, str(key))
        question, answer = sample["messages"]
        found[answer["content"]] = (question["content"], len(sample["images"]))
        assert sample["images"] == row.images[: len(sample["images"])]
    assert found == expected


def test_an_instruction_in_the_place_of_a_question_keeps_the_images(tmp_path):
    row, source = row_of(tmp_path, {"conversations": conversation(("<image> or <image>?", "A"))}, caption=True)
    [question, _] = compose(row, source, "key")["messages"]
    assert question["content"].startswith("[image 1] [image 2] ") and "or" not in question["content"].split()


def test_marks_and_images_that_do_not_fit_are_left_out(tmp_path, capsys):
    rows = llava_rows()
    rows[2]["conversations"][0]["value"] = "<image>\nWhich?"
    found = Mixture([Source(write_json(with_images(tmp_path), rows))], 0, 2)
    assert sorted(sample["id"] for sample in found) == ["one", "text"]
    assert "1 of 3 rows left out: 1 whose marks of images (<image>) are not as many" in capsys.readouterr().out
    spoken = [{"role": "user", "content": [IMAGE, text("Q?")]}, {"role": "assistant", "content": "A"}]
    rows = [{"images": ["a.png"], "messages": spoken}, {"images": [], "messages": spoken}]
    assert len(Mixture([Source(write_json(with_images(tmp_path), rows))], 0)) == 1


@pytest.mark.parametrize("max_images", [1, 2])
def test_streams_have_the_same_samples_and_skip_what_is_too_much(tmp_path, max_images):
    path = tables(tmp_path)
    streamed = by_id(Stream([Source(path, streaming=True)], 0, max_images))
    found = {sample["messages"][-1]["content"]: sample for sample in streamed}
    for sample in Mixture([Source(path)], 0, max_images):
        same = found.pop(sample["messages"][-1]["content"])
        assert (same["images"], same["messages"]) == (sample["images"], sample["messages"])
    if max_images == 2:
        assert found == {}
    else:
        [left] = found.values()
        assert left["images"] == [] and left["error"] == "It has 2 images, and the model takes 1 (max_images)."


# --- Batches ---


def test_one_bad_image_among_several_skips_the_sample(parts, folder):
    model, processor = parts
    collator, samples = PheyeCollator(processor), read(folder, 2)
    bad = {**next(sample for sample in samples if sample["id"] == "two"), "id": "bad"}
    bad["images"] = [bad["images"][0], str(folder / "missing.png")]
    batch, without = collator([*samples, bad]), collator(samples)
    [report] = batch["skipped"]
    assert report["id"] == "bad" and "there is no such file" in report["error"]
    assert (batch["labels"][-1] == IGNORED).all() and batch["image_grids"][-1].tolist() == [[2, 2], [0, 0]]
    assert torch.equal(batch["pixel_values"][:-1], without["pixel_values"])
    torch.testing.assert_close(loss_of(model, batch), loss_of(model, without))


def test_a_row_that_names_what_may_not_be_opened_is_skipped_and_not_learnt_as_text(folder):
    rows = [{**llava_rows()[0], "image": "../a.png"}, *llava_rows()]
    write_json(folder, rows)
    batch = PheyeCollator(tiny_processor())(list(Mixture([Source(str(folder / "data.json"))], 0)))
    assert len(batch["skipped"]) == 1 and "leads out of" in batch["skipped"][0]["error"]
    assert (batch["labels"] != IGNORED).any(dim=1).sum() == 2


def test_inspection_shows_all_images_of_a_sample(parts, folder, capsys):
    _, processor = parts
    samples = [sample for sample in read(folder, 2) if sample["source"] == "data"]
    show_samples(by_id(samples), processor, folder / "out")
    said = capsys.readouterr().out
    assert "learnt; 5 views" in said and "learnt; 0 views" in said and "learnt; 10 views" in said
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["sample-0.png", "sample-2.png"]
    one, two = (Image.open(folder / "out" / f"sample-{number}.png") for number in (0, 2))
    assert two.size == (one.width, 2 * one.height + 4)
    assert two.crop((0, 0, *one.size)).tobytes() == one.tobytes()
