"""The command that finds budgets, labels questions with them and trains the router: on a toy, from end to end."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pheye import PheyeForConditionalGeneration
from pheye.common.command import InputError
from pheye.training import budgets, train
from pheye.training.collator import PheyeCollator
from pheye.training.vision_budgets import changed_config

from answering_runs import read
from budget_runs import BUDGETS, KINDS, LAYERS, model_with_budgets, save, write_questions
from tiny import tiny_processor
from training_runs import command, weights


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "data", 6)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "base", model_with_budgets())


@pytest.fixture
def folder(base, tmp_path, fresh_state) -> Path:
    return shutil.copytree(base, tmp_path / "model")


def given(way: str, folder: Path, data: Path, *options: object) -> list[str]:
    return [way, "--model", str(folder), "--data", str(data), "--device", "cpu", *map(str, options)]


def refused(capsys, *arguments) -> str:
    assert budgets.main(given(*arguments)) == 1
    message = capsys.readouterr().err
    assert "error: " in message and "Traceback" not in message
    return message


# --- find ---


def slow_losses(folder: Path, data: Path) -> dict[tuple[int, ...], float]:
    """Loss per answer token of all subsets, as training computes it, from one batch of all questions."""
    rows = json.loads(data.read_text())
    samples = []
    for row in rows:
        turns = [turn["value"] for turn in row["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            samples.append({"id": row["id"], "images": [str(data.parent / row["image"])], "messages": messages})
    batch = PheyeCollator(tiny_processor())(samples)
    batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    model = PheyeForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        return {tuple(BUDGETS[budget]): model(**batch, vision_budget=budget).loss.item() for budget in range(4)}


def test_find_measures_all_subsets_and_changes_the_budgets_alone(folder, data, capsys):
    before = json.loads((folder / "config.json").read_text())
    others = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.json"}
    expected = slow_losses(folder, data)
    assert budgets.main(given("find", folder, data, "--batch_size", 5)) == 0
    printed = capsys.readouterr().out
    for subset, loss in expected.items():
        assert f"{list(subset)}: loss per answer token {loss:.4f}" in printed
    after = json.loads((folder / "config.json").read_text())
    found = after["self_attention_budgets"]
    assert all(any(list(subset) == budget for subset in expected) for budget in found) and found[0] == []
    losses = [expected[tuple(budget)] for budget in found]
    assert losses == sorted(losses, reverse=True) and losses[-1] == min(expected.values())
    assert {**before, "self_attention_budgets": found} == after
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.json"} == others
    loaded = PheyeForConditionalGeneration.from_pretrained(folder)
    assert loaded.config.self_attention_budgets == found
    loaded.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text()) == after


# --- label and route ---


def test_labels_and_a_router_by_the_loss(folder, data, tmp_path, capsys):
    labels, out = tmp_path / "labels.jsonl", tmp_path / "routed"
    assert budgets.main(given("label", folder, data, "--output", labels, "--rule", "loss", "--margin", 0.01)) == 0
    rows = read(labels)
    assert len(rows) == 12 and "12 samples have a label, 0 an error." in capsys.readouterr().out
    planted = [{**row, "label": 1 + 2 * (row["question"] == KINDS[0])} for row in rows]
    labels.write_text("".join(json.dumps(row) + "\n" for row in planted))
    options = ["--labels", labels, "--output", out, "--router_size", 16, "--epochs", 40, "--learning_rate", 1e-2]
    assert budgets.main(given("route", folder, data, *options, "--held_out", 0.34)) == 0
    report = json.loads((out / budgets.REPORT).read_text())
    assert report["test"]["accuracy"] == report["training"]["accuracy"] == 1
    assert report["test"]["pictures"] == 2 and report["test"]["samples"] == 4
    assert report["test"]["confusion"] == [[0] * 4, [0, 2, 0, 0], [0] * 4, [0, 0, 0, 2]]
    assert report["test"]["ways"]["router"]["layers"] == 1.5
    assert "router: 1.50 layers a question" in capsys.readouterr().out
    before, after = (PheyeForConditionalGeneration.from_pretrained(path) for path in (folder, out))
    for name, weight in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], weight), name
    text = tiny_processor().apply_chat_template([{"role": "user", "content": KINDS[0]}], add_generation_prompt=True)
    inputs = tiny_processor()(images=data.parent / "0.png", text=text, return_tensors="pt")
    assert after(**inputs).vision_budget.tolist() == [3]
    again = given("route", out, data, *options[:2], "--output", tmp_path / "again", "--held_out", 0.34)
    assert budgets.main(again) == 0  # a router that is there goes on
    wide = given("route", folder, data, *options[:2], "--output", tmp_path / "wide", "--held_out", 0.34, "--epochs", 1)
    assert budgets.main(wide) == 0
    assert PheyeForConditionalGeneration.from_pretrained(tmp_path / "wide").config.router_size == 512


def test_labels_of_other_images_are_not_taken(folder, tmp_path, capsys):
    labels, data = tmp_path / "labels.jsonl", write_questions(tmp_path / "own", 2)
    options = ["--output", labels, "--rule", "loss", "--limit", 2]
    assert budgets.main(given("label", folder, data, *options)) == 0
    message = refused(capsys, "label", folder, data, *options, "--images", data.parent)
    assert "was begun with other settings: images was" in message
    rows = json.loads(data.read_text())
    rows[0]["image"], rows[1]["image"] = rows[1]["image"], rows[0]["image"]
    data.write_text(json.dumps(rows))
    assert "was begun with other settings: samples was" in refused(capsys, "label", folder, data, *options)


@pytest.mark.parametrize("way", ["find", "label"])
def test_a_model_whose_loss_is_nan_is_refused_and_stays(folder, data, tmp_path, capsys, way):
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if "self_attention_blocks" in name)
    save_file({**state, name: state[name] * float("nan")}, folder / "model.safetensors", {"format": "pt"})
    before = (folder / "config.json").read_bytes()
    options = [] if way == "find" else ["--output", tmp_path / "labels.jsonl", "--rule", "loss"]
    assert "The loss of an answer is nan at budget" in refused(capsys, way, folder, data, *options)
    assert (folder / "config.json").read_bytes() == before


def test_labels_by_the_score(folder, data, tmp_path, capsys):
    labels = tmp_path / "labels.jsonl"
    options = ["--metric", "anls", "--max_new_tokens", 2, "--limit", 3, "--prompt", "{question} One word."]
    assert budgets.main(given("label", folder, data, "--output", labels, *options)) == 0
    rows = read(labels)
    assert [row["rule"] for row in rows] == ["ANLS"] * 3 and all(len(row["answers"]) == 4 for row in rows)
    assert "budget 3 [3, 5]: label of 0, mean of its scores 0.0000" in capsys.readouterr().out


def test_what_is_refused(folder, data, tmp_path, capsys):
    plain = save(tmp_path / "plain", model_with_budgets(self_attention_layers=[], self_attention_budgets=[]))
    one = save(tmp_path / "one", model_with_budgets(self_attention_budgets=[LAYERS]))
    routed = save(tmp_path / "routed", model_with_budgets(router_size=4))
    to, labels = ("--output", tmp_path / "labels.jsonl"), tmp_path / "some.jsonl"
    labels.write_text('{"id": "0-0", "rule": "loss", "losses": [1, 1, 1, 1], "label": 0}\n')
    routing = ("--labels", labels, "--output", tmp_path / "out")
    assert "has no self_attention_layers" in refused(capsys, "find", plain, data)
    assert "has a router for its self_attention_budgets [[], [3]" in refused(capsys, "find", routed, data)
    assert "is no folder" in refused(capsys, "find", "your-name/your-pheye", data)
    assert "self_attention_budgets are []" in refused(capsys, "label", plain, data, *to)
    assert "self_attention_budgets are [[3, 5]]" in refused(capsys, "label", one, data, *to)
    assert "self_attention_budgets are [[3, 5]]" in refused(capsys, "route", one, data, *routing)
    assert "--rule score has no use for --margin" in refused(capsys, "label", folder, data, *to, "--margin", 1)
    loss = (*to, "--rule", "loss")
    assert "no use for --metric" in refused(capsys, "label", folder, data, *loss, "--metric", "anls")
    assert "--margin nan must be" in refused(capsys, "label", folder, data, *loss, "--margin", "nan")
    assert "CIDEr of an answer" in refused(capsys, "label", folder, data, *to, "--metric", "cider")
    assert "of size 4" in refused(capsys, "route", routed, data, *routing, "--router_size", 8)
    assert "holds out 0" in refused(capsys, "route", folder, data, *routing, "--router_size", 8)
    for option in (("--held_out", "nan"), ("--held_out", 1), ("--learning_rate", "inf"), ("--learning_rate", -1)):
        assert "--held_out" in refused(capsys, "route", folder, data, *routing, *option)
    (tmp_path / "out").mkdir()
    assert "exists already" in refused(capsys, "route", folder, data, *routing)
    labels.write_text(labels.read_text().replace("0-0", "other"))
    free = ("--labels", labels, "--output", tmp_path / "free")
    assert "No sample of" in refused(capsys, "route", folder, data, *free)
    with pytest.raises(InputError, match="has no right answers"):
        budgets.read_questions(**{"data": str(without_answers(tmp_path)), "task": "vqav2", "split": "test",
                                  "prompt": None, "images": None})  # fmt: skip


def without_answers(folder: Path) -> Path:
    questions = [{"image_id": 9, "question": "What?", "question_id": 1}]
    path = folder / "vqa.json"
    path.write_text(json.dumps({"data_type": "mscoco", "data_subtype": "test2015", "questions": questions}))
    (folder / "test2015").mkdir()
    shutil.copy(folder / "model" / "config.json", folder / "test2015" / "COCO_test2015_000000000009.jpg")
    return path


# --- The whole recipe ---


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layers"), [("block", [3, 5]), ("joint", [2, 4])])
def test_the_recipe_from_a_plain_model_to_one_that_routes(data, tmp_path, fresh_state, kind, layers):
    plain = save(tmp_path / "plain", model_with_budgets(self_attention_layers=[], self_attention_budgets=[]))
    steps = ["--max_steps", "3", "--effective_batch_size", "4", "--learning_rate", "3e-2", "--all_turns"]
    train.run(command(plain, data, tmp_path / "largest", *steps, "--self_attention_kind", kind,
                      "--self_attention_layers", *map(str, layers)))  # fmt: skip
    refined = tmp_path / "largest"
    assert budgets.main(given("find", refined, data)) == 0
    several = changed_config(refined, self_attention_budgets=[[], layers[:1], layers])
    (refined / "config.json").write_bytes(several)  # whichever are viable after three steps
    train.run(command(refined, data, tmp_path / "universal", *steps, "--vision_budgets", "universal"))
    changed = [
        name
        for name, tensor in weights(refined).items()
        if not torch.equal(tensor, weights(tmp_path / "universal")[name])
    ]
    assert any("self_attention_blocks" in name or "joint_attention" in name for name in changed)
    labels, routed = tmp_path / "labels.jsonl", tmp_path / "routed"
    assert budgets.main(given("label", tmp_path / "universal", data, "--output", labels, "--rule", "loss")) == 0
    options = ["--labels", labels, "--output", routed, "--held_out", 0.34, "--router_size", 8]
    assert budgets.main(given("route", tmp_path / "universal", data, *options)) == 0
    rows = read(labels)
    model, processor = PheyeForConditionalGeneration.from_pretrained(routed), tiny_processor()
    image = processor(images=data.parent / "0.png", return_tensors="pt")
    text = processor.apply_chat_template([{"role": "user", "content": KINDS[0]}], add_generation_prompt=True)
    assert model(**processor(text=text, return_tensors="pt"), **image).vision_budget.item() in range(3)
    for row in rows[:2]:  # the losses of the model that was labelled, which routing has not changed
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["references"][0]},
        ]
        one = PheyeCollator(processor)([{"id": "x", "images": [str(data.parent / "0.png")], "messages": messages}])
        one = {name: value for name, value in one.items() if isinstance(value, torch.Tensor)}
        losses = [model(**one, vision_budget=budget).loss.item() for budget in range(3)]
        assert row["losses"] == pytest.approx(losses, rel=1e-4)
