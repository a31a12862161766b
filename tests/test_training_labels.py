"""Labels of questions: against questions asked one by one, and runs that are killed, interrupted or divided."""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pheye.answering.engine import write_rest
from pheye.answering.rows import Part, Run
from pheye.common.command import InputError, Interrupted
from pheye.evaluation.metrics.matching import exact_match
from pheye.evaluation.tasks import METRICS
from pheye.training.collator import PheyeCollator
from pheye.training.labels import RULE, Rule, labelled_rows, make_labels, summary
from pheye.training.questions import read_questions
from pheye.training.vision_budgets import label_by_loss, label_by_score

from answering_runs import read
from budget_runs import BUDGETS, model_with_budgets, save, write_questions
from tiny import tiny_processor
from training_runs import run_alone

SCORE = Rule(METRICS["exact_match"], max_new_tokens=3)
WAYS = range(len(BUDGETS))


@pytest.fixture(scope="module")
def model():
    """Whose answers are letters, and differ with the budget."""
    model = model_with_budgets(router_size=8)
    with torch.no_grad():
        for block in (*model.model.cross_attention_blocks, *model.model.self_attention_blocks):
            block.to_out.weight.mul_(30)
            block.mlp_out.weight.mul_(30)
        letters = tiny_processor().tokenizer("abcdefghij")["input_ids"]
        model.get_output_embeddings().bias.fill_(-1e4)[letters] = 0
    return model


@pytest.fixture(scope="module")
def answers(model, tmp_path_factory) -> list[list[str]]:
    """What the model answers to each question alone, at each budget."""
    _, requests = questions(write_questions(tmp_path_factory.mktemp("asked"), 3))
    processor, found = tiny_processor(), []
    for request in requests:
        text = processor.apply_chat_template([{"role": "user", "content": request.prompt}], add_generation_prompt=True)
        inputs = processor(images=request.image, text=text, return_tensors="pt")
        ids = [model.generate(**inputs, max_new_tokens=3, do_sample=False, vision_budget=budget) for budget in WAYS]
        start = inputs["input_ids"].shape[1]
        found.append([processor.decode(row[0, start:], skip_special_tokens=True).lstrip() for row in ids])
    return found


def questions(path: Path):
    return read_questions(str(path), task="own", prompt=None, images=None)


@pytest.fixture
def requests(tmp_path, answers):
    """Of which the right answers are those of some budget; one image is broken."""
    path = write_questions(tmp_path / "data", 3, lambda picture, kind: answers[2 * picture + kind][picture + kind])
    (tmp_path / "data" / "1.png").write_bytes(b"broken")
    return questions(path)[1]


@pytest.fixture
def start(model, requests, tmp_path, fresh_state):
    def start(rule: Rule = SCORE, output: Path = tmp_path / "labels.jsonl", **kwargs) -> Path:
        defaults = {"batch_size": 1, "settings": {"model": "tiny"}}
        return make_labels(
            lambda: (model, tiny_processor()), BUDGETS, requests, output, rule, **{**defaults, **kwargs}
        )

    return start


# --- What a row says ---


def test_scores_are_those_of_each_question_alone_at_each_budget(start, requests, answers):
    rows = read(start(batch_size=4))
    assert [row["id"] for row in rows] == [request.id for request in requests]
    for number, (row, request) in enumerate(zip(rows, requests, strict=True)):
        if request.id.startswith("1-"):
            assert "could not be read" in row["error"] and "label" not in row
            continue
        assert row["answers"] == answers[number]
        assert row["scores"] == [exact_match(answer, row["references"]) for answer in row["answers"]]
        assert row["label"] == label_by_score(row["scores"]) and row[RULE] == "exact match"
    assert len({tuple(row["scores"]) for row in rows if "scores" in row}) > 1


def test_losses_are_those_of_each_question_alone_at_each_budget(start, model, requests):
    rows = read(start(Rule(margin=0.01), batch_size=4))
    collate = PheyeCollator(tiny_processor())
    for row, request in zip(rows, requests, strict=True):
        if "error" in row:
            continue
        turns = (("user", request.prompt), ("assistant", row["references"][0]))
        messages = [{"role": role, "content": content} for role, content in turns]
        one = collate([{"id": row["id"], "images": [request.image], "messages": messages}])
        one = {name: value for name, value in one.items() if isinstance(value, torch.Tensor)}
        losses = [model(**one, vision_budget=budget).loss.item() for budget in WAYS]
        assert row["losses"] == pytest.approx(losses, rel=1e-5)
        assert row["label"] == label_by_loss(row["losses"], 0.01) and row[RULE] == "loss"
    assert "4 samples have a label, 2 an error." in summary(rows, BUDGETS)


# --- Runs ---


@pytest.mark.parametrize("torn", [b"", b'{"id": "2-0", "rule": "exact match", "sco'])
def test_an_interrupted_run_goes_on_and_loses_and_doubles_nothing(start, tmp_path, monkeypatch, torn):
    expected = start(output=tmp_path / "undisturbed.jsonl").read_bytes()
    append, calls = Part.append, []

    def stop(self, rows):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.extend(row["id"] for row in rows)
        append(self, rows)

    monkeypatch.setattr(Part, "append", stop)
    with pytest.raises(Interrupted, match="3 of 6 rows are kept"):
        start()
    part = tmp_path / "labels.jsonl.part-0"
    with part.open("ab") as file:
        file.write(torn)

    def count(self, rows):
        calls.extend(row["id"] for row in rows)
        append(self, rows)

    monkeypatch.setattr(Part, "append", count)
    assert start().read_bytes() == expected
    assert len(calls) == len(set(calls)) == 6 and not part.exists()


def test_processes_share_the_samples_and_one_may_go_on_alone(start, model, requests, tmp_path):
    expected = start(output=tmp_path / "undisturbed.jsonl").read_bytes()
    run = Run(tmp_path / "labels.jsonl", RULE)
    run.begin({}, {})
    load, states = lambda: (model, tiny_processor()), []
    rows_of = partial(labelled_rows, rule=SCORE, batch_size=1, workers=0)
    for process in (0, 1):
        two = {"process_index": process, "num_processes": 2, "is_main_process": not process}
        states.append(SimpleNamespace(**two, wait_for_everyone=lambda: None))
    write_rest(load, requests[:3], run, states[1], rows_of, 1, requests[:3])
    with pytest.raises(InputError, match="2 of 6 rows are missing"):
        write_rest(load, requests, run, states[0], rows_of, 1, requests)
    assert [len(read(part)) for part in run.parts()] == [3, 1]
    states[0].num_processes = 1
    write_rest(load, requests, run, states[0], rows_of, 1, requests)
    assert run.output.read_bytes() == expected and not run.parts()


def test_rows_of_other_settings_are_not_continued(start):
    start()
    with pytest.raises(InputError, match="max_new_tokens was 3 and is now 4"):
        start(Rule(METRICS["exact_match"], max_new_tokens=4))
    with pytest.raises(InputError, match="rule was 'exact match' and is now 'loss'"):
        start(Rule())


def test_one_budget_is_nothing_to_choose(model, requests, tmp_path):
    with pytest.raises(InputError, match=r"self_attention_budgets are \[\[3, 5\]\]"):
        make_labels(lambda: None, [[3, 5]], requests, tmp_path / "x", SCORE, batch_size=1, settings={})
    assert not (tmp_path / "x.run.json").exists()


KILLED = """
import os, signal, sys
from pheye.answering.rows import Part
from pheye.training import budgets

write, calls = Part.write, 0

def die(self, data):
    global calls
    calls += 1
    if calls == 3:
        self.file.write(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, data)

Part.write = die
sys.exit(budgets.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_a_killed_command_goes_on(model, requests, tmp_path, fresh_state):
    from pheye.training import budgets

    folder, data = save(tmp_path / "model", model), tmp_path / "data" / "questions.json"
    options = ["label", "--model", str(folder), "--data", str(data), "--max_new_tokens", "3", "--batch_size", "1"]
    options += ["--device", "cpu", "--output"]
    assert budgets.main([*options, str(tmp_path / "undisturbed.jsonl")]) == 0
    (tmp_path / "killed.py").write_text(KILLED)
    output = tmp_path / "labels.jsonl"
    run_alone([str(tmp_path / "killed.py"), *options, str(output)], expect=-signal.SIGKILL)
    assert not output.exists() and os.path.getsize(f"{output}.part-0")
    assert budgets.main([*options, str(output)]) == 0
    assert output.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()
    assert json.loads(output.read_text().splitlines()[0])["label"] in WAYS
