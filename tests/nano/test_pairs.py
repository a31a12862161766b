"""Two pictures in a prompt: drawn, learnt from and asked about."""

import json
import random
import re

import pytest
import torch

from pheye.nano import pairs
from pheye.nano.learning import kept_training
from pheye.nano.learning.features import FeatureStore, as_image
from pheye.nano.scoring.held_out import SIGN, held_out_pictures
from pheye.training.collator import PheyeCollator
from pheye.training.mixture import Mixture, read_mixture

from tiny import tiny_model, tiny_processor, tiny_text_config

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "model"
    tiny_model(text_config=tiny_text_config(max_position_embeddings=1024)).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def test_lessons_tell_both_signs_and_ask_for_one():
    seen = set()
    for seed in range(30):
        said = pairs.lesson(random.Random(seed))
        told = re.match(
            r"Image one: a sign that says (\w+)\. Image two: a sign that says (\w+)\. ", said[0]["content"]
        )
        for question, answer in zip(said[::2], said[1::2], strict=True):
            text, reply = question["content"].removeprefix(told.group()), answer["content"]
            if text.startswith("What"):
                assert reply == told[1 if text.endswith("image one?") else 2]
            else:
                assert told[1 if reply == "one" else 2] in text
            seen.add((len(said), text.split()[0]))
    assert seen == {(2, "What"), (2, "In"), (4, "What"), (4, "In")}


def test_the_second_picture_alone_gets_a_vector(model):
    """So that one picture is read as before."""
    told_apart, _ = pairs.build(model, 0, "cpu")
    vectors = told_apart.pheye.view_encoding.image_embedding.weight
    assert not vectors.any()
    pairs.tell_apart(told_apart)
    assert not vectors[0].any() and vectors[1].std().item() == pytest.approx(pairs.SPREAD, rel=0.5)


def test_only_the_language_model_reads(model, monkeypatch):
    monkeypatch.setattr(pairs, "TEXTS", 2)
    reader, processor = pairs.build(model, 0, "cpu")
    trained = {name for name, parameter in reader.named_parameters() if parameter.requires_grad}
    before = {name: parameter.clone() for name, parameter in reader.named_parameters()}
    pairs.read(reader, processor, 2)
    changed = {name for name, value in reader.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all("language_model" in name for name in changed)
    assert trained == {name for name, parameter in reader.named_parameters() if parameter.requires_grad}


def test_answers_fit_the_questions():
    words = ["HOTEL", "CAFE"]
    answers = set()
    for seed in range(30):
        turns = pairs.turns_of(words, random.Random(seed))
        question, answer = turns[pairs.WHICH]
        assert words[("one", "two").index(answer)] in question
        question, word = turns[pairs.READ]
        assert words[0 if question.endswith("image one?") else 1] == word
        answers.add((answer, word))
    assert answers == {("one", "CAFE"), ("two", "HOTEL")}  # no word is in the first question and the second answer
    requests = pairs.requests_of_pairs(held_out_pictures(4))
    assert len(requests) == 4 and all(len(request.images()) == 2 for request in requests)


def test_pairs_are_drawn_and_their_features_stand_for_them(model, tmp_path):
    data = pairs.write_pairs(tmp_path / "pairs", 2)
    assert pairs.write_pairs(tmp_path / "pairs", 2) == data
    for line in data.open():
        row = json.loads(line)
        assert len(row["image"]) == 2 and row["conversations"][0]["value"].startswith("<image><image>")
    loaded, processor = pairs.build(model, 0, "cpu")
    mixture = Mixture(read_mixture([str(data)], turns=None), 0, max_images=2)
    store = FeatureStore(tmp_path / "features", mixture, processor, together=2, seed=0)
    store.encode(0, loaded)
    batch = store.batch([1, 0])
    assert batch["image_grids"].tolist() == [[[2, 2], [2, 2]]] * 2
    found = loaded(**as_image(loaded, batch.pop("features"), batch.pop("image_grids")), **batch)
    whole = PheyeCollator(processor)([store.sample(1), store.sample(0)])
    expected = loaded(**{name: value for name, value in whole.items() if isinstance(value, torch.Tensor)})
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-2, atol=0)  # features are kept in bfloat16


def test_a_model_is_asked_before_and_after(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kept_training, "TOKENS", 2)
    monkeypatch.setattr(pairs, "TEXTS", 2)
    command = ["--model", model, "--output", tmp_path, "--lessons", 1, "--steps", 2, "--seeds", 1, "--count", 3]
    command += ["--drawn", 16]
    command = [str(word) for word in command]
    assert pairs.main(command) == 0
    for name in ("before", "after-texts", "after-0"):
        rows = [json.loads(line) for line in (tmp_path / name / "answers.jsonl").open()]
        kinds = [row["kind"] for row in rows]
        assert [kinds.count(kind) for kind in (pairs.WHICH, pairs.READ, SIGN)] == [3, 3, 3]
    assert "loss" in json.loads((tmp_path / "after-0" / "result.json").read_text())
    text = (tmp_path / "pairs.md").read_text()
    assert all(text.count(f"| {name} |") == 1 for name in ("before", "after texts", "after"))
    monkeypatch.setattr(pairs, "train", None)
    assert pairs.main(command) == 0 and (tmp_path / "pairs.md").read_text() == text
    assert pairs.main([*command, "--rate", "1"]) == 1
    assert pairs.main(["--model", "nowhere", "--output", str(tmp_path / "other")]) == 1
    assert "nowhere holds no model.safetensors; give" in capsys.readouterr().err


def test_the_table_has_the_mean_of_the_seeds():
    def rows(*right: bool) -> list[dict]:
        kinds = zip((pairs.WHICH, pairs.READ, SIGN), right, strict=True)
        return [{"kind": kind, "reference": "A", "answer": "A" if one else "B"} for kind, one in kinds]

    before, after = [rows(False, False, True)], [rows(True, False, True), rows(True, True, False)]
    lines = pairs.scores_table({"before": before, "after": after})
    assert lines[-2].split(" | ")[1:] == ["0.0 (0.0 to 0.0)", "0.0 (0.0 to 0.0)", "100.0 (100.0 to 100.0) |"]
    assert lines[-1].split(" | ")[1:] == ["100.0 (100.0 to 100.0)", "50.0 (50.0 to 50.0)", "50.0 (50.0 to 50.0) |"]
