"""The evaluation command: a toy run of every file format, scores worked out elsewhere, and what stops it early."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from pheye.answering import engine
from pheye.common.models import find_model
from pheye.common.published import PUBLISHED
from pheye.evaluation import evaluate
from pheye.evaluation.metrics.bleu import bleu
from pheye.evaluation.metrics.cider import cider
from pheye.evaluation.metrics.vqa import vqa_accuracy
from pheye.evaluation.tasks import TASKS

from hub_server import FakeHub
from tiny import tiny_config, tiny_model, tiny_processor
from toys import TOYS, Toy, image_paths, nocaps_toy, own_toy, textvqa_toy, vqa_toy, write

pytestmark = pytest.mark.once

NEW = 4  # tokens per answer


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps its state for the life of a process."""
    PartialState._reset_state()
    yield
    PartialState._reset_state()


@pytest.fixture
def run(model_folder, tmp_path, capsys):
    """Runs the command in this process: (exit status, result or None, rows or None, what it printed)."""

    def run(task: str, *options):
        output = tmp_path / "out"
        argv = ["--model", str(model_folder), "--task", task, "--output", str(output), "--batch_size", "2"]
        capsys.readouterr()
        status = evaluate.main([*argv, *map(str, options)])
        printed = capsys.readouterr()
        return status, json_of(output / "result.json"), rows_of(output), printed.out + printed.err

    return run


@pytest.fixture
def answers(monkeypatch):
    """Sets what the model answers about a dark image and about a light one; the prompts it was given."""

    def answers(dark: str, light: str) -> list[str]:
        def generate(model, processor, conversations, image_inputs, generate_kwargs):
            given.extend(messages[-1]["content"] for messages in conversations)
            return [(dark if pixels.mean() < 0 else light, None) for pixels in image_inputs["pixel_values"]]

        given = []
        monkeypatch.setattr(engine, "generate", generate)
        monkeypatch.setattr(engine, "encoded", lambda model, image_inputs: image_inputs)  # pixels, not features
        return given

    return answers


@pytest.fixture
def refused(run, monkeypatch):
    """Runs the command on input that must stop it before the model is loaded: what it says."""
    from transformers import AutoModelForImageTextToText

    def refused(task: str, *options) -> str:
        monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *args, **kw: pytest.fail("loaded"))
        status, result, rows, printed = run(task, *options)
        assert (status, result, rows) == (1, None, None)
        assert printed.startswith("error: ")
        return printed

    return refused


def json_of(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def rows_of(output: Path) -> list[dict] | None:
    path = output / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else None


def many(toy: Toy, count: int) -> Toy:
    """TextVQA's toy with `count` questions about its first two images in turn."""
    first, second, _ = toy.content["data"]
    toy.content["data"] = [
        {**(second if number % 2 else first), "question_id": number, "question": f"{'so ' * (number % 3)}{number}?"}
        for number in range(count)
    ]
    return toy


# --- Every format, end to end ---


@pytest.mark.parametrize("task", TASKS)
def test_score_and_rows_of_every_task(run, answers, task, tmp_path):
    toy = TOYS[task]()
    prompts = answers(*toy.answers)
    status, result, rows, printed = run(task, *write(toy, tmp_path))
    assert status == 0, printed
    assert [row["id"] for row in rows] == [sample.id for sample in toy.samples]
    expected = scores_by_hand(toy)
    assert [100 * row["score"] for row in rows] == pytest.approx(expected, abs=1e-9)
    assert [row.get("references") for row in rows] == [list(sample.references) for sample in toy.samples]
    assert [row.get("question", "") for row in rows] == [sample.question for sample in toy.samples]
    assert ["error" in row for row in rows] == [False, False, True]
    assert "answer" not in rows[2]
    assert result["score"] == pytest.approx(np.mean(expected), abs=1e-9)
    low, high = result["confidence_interval"]
    assert min(expected) <= low < result["score"] < high <= max(expected) + 1e-9
    assert (result["samples"], result["errors"], result["partial"]) == (3, 1, False)
    assert (result["task"], result["split"]) == (task, toy.split)
    asked = [TASKS[task].prompt_for(sample.question, sample.options) for sample in toy.samples[:2]]
    assert sorted(prompts) == sorted(asked)
    assert f"{task} {toy.split}: {result['metric']} {result['score']:.1f} (95% interval" in printed
    assert "3 samples, 1 of them errors" in printed


def scores_by_hand(toy: Toy) -> list[float]:
    if toy.scores is not None:
        return list(toy.scores)
    references = [list(sample.references) for sample in toy.samples]
    return [100 * score for score in cider([*toy.answers, ""], references)[1]]


def test_other_scores_of_captions(run, answers, tmp_path):
    toy = nocaps_toy()
    toy.answers = ("a red car on a road", "two dogs play in the snow")
    answers(*toy.answers)
    _, result, _, printed = run("nocaps", *write(toy, tmp_path))
    references = [list(sample.references) for sample in toy.samples]
    assert result["other_scores"] == {"BLEU-4": pytest.approx(100 * bleu([*toy.answers, ""], references))}
    assert 50 < result["other_scores"]["BLEU-4"] < 99
    assert "BLEU-4 " in printed
    assert "published (val): Pheye-x4-448 110.1, " in printed


def test_answers_are_the_models(run, model, processor, tmp_path):
    """Nothing stubbed: what `generate` gives for each question alone is what stands in the rows and is scored."""
    toy = textvqa_toy()
    options = write(toy, tmp_path)
    _, result, rows, _ = run("textvqa", *options, "--max_new_tokens", NEW, "--num_beams", 2, "--dtype", "float32")
    expected = []
    for sample, name in zip(toy.samples[:2], toy.images[:2], strict=True):
        turn = {"role": "user", "content": f"{sample.question} Answer the question using a single word or phrase"}
        text = processor.apply_chat_template([turn], add_generation_prompt=True)
        inputs = processor(images=Image.open(tmp_path / name), text=text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=NEW, num_beams=2)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(ids, skip_special_tokens=True).lstrip())
    assert [row["answer"] for row in rows[:2]] == expected
    scores = [vqa_accuracy(answer, list(s.references)) for answer, s in zip(expected, toy.samples, strict=False)]
    assert result["score"] == pytest.approx(100 * sum(scores) / 3)


def test_result_says_what_it_depends_on(run, answers, model_folder, tmp_path):
    answers("red", "3")
    _, result, _, _ = run("textvqa", *write(textvqa_toy(), tmp_path), "--num_beams", 3, "--dtype", "float32")
    assert result["decoding"] == {"max_new_tokens": 32, "num_beams": 3, "do_sample": False}
    assert result["prompt"] == "{question} Answer the question using a single word or phrase"
    assert (result["model"], result["dtype"]) == (str(model_folder), "float32")
    assert result["revision"] == find_model(str(model_folder))
    assert result["versions"]["torch"] == torch.__version__
    assert set(result["versions"]) == {"pheye", "torch", "transformers", "python"}
    assert (result["metric"], result["processes"]) == ("VQA accuracy", 1)
    assert result["arguments"]["num_beams"] == 3
    published = PUBLISHED["textvqa"]
    assert result["published"] == {"split": published.split, "scores": published.scores, "comparable": False}


def test_a_part_of_a_benchmark_or_another_split_is_not_compared_with_the_published_scores(run, answers, tmp_path):
    answers("red", "cat")
    _, _, _, printed = run("textvqa", *write(textvqa_toy(), tmp_path))
    assert "of all 5,000 samples of val, and this is of 3." in printed
    whole, published = {"split": "val", "samples": 5000}, PUBLISHED["textvqa"]
    assert evaluate.difference(whole, published) is None
    assert evaluate.difference({**whole, "split": "validation"}, published) is None
    assert evaluate.difference({**whole, "split": "test"}, published) == "they are of val, and this is test"
    for samples in (4999, 40504):
        assert evaluate.difference({**whole, "samples": samples}, published).endswith(f"and this is of {samples:,}")


def test_interval_holds_what_sampling_gives(run, answers, tmp_path):
    """Half of many answers are right: the interval is that of a fair coin, 1.96 standard errors to each side."""
    answers("red", "cat")
    _, result, _, _ = run("textvqa", *write(many(textvqa_toy(), 100), tmp_path))
    assert result["score"] == pytest.approx(50)
    low, high = result["confidence_interval"]
    assert low == pytest.approx(50 - 1.96 * 5, abs=2)
    assert high == pytest.approx(50 + 1.96 * 5, abs=2)


def test_data_set(run, answers, tmp_path):
    answers("Red.", "two")
    rows = {"image": image_paths(tmp_path), "question": ["What?", "Who?", "How?"], "answers": textvqa_references()}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"validation": data}).save_to_disk(tmp_path / "saved")
    status, result, rows, printed = run("vqav2", "--data", tmp_path / "saved", "--split", "validation")
    assert status == 0, printed
    assert (result["score"], result["split"]) == (pytest.approx(130 / 3), "validation")
    assert [row["id"] for row in rows] == [0, 1, 2]
    assert "error" in rows[2]


def textvqa_references() -> list[list[str]]:
    return [list(sample.references) for sample in textvqa_toy().samples]


def test_a_broken_image_is_wrong_even_where_nothing_is_right():
    rows = [{"id": 1, "error": "broken", "references": [""]}, {"id": 2, "answer": "", "references": [""]}]
    assert evaluate.score_rows(rows, TASKS["gqa"]) == ([0.0, 1.0], {})


# --- Data of one's own ---


def test_own_data_with_a_prompt_and_a_metric_of_ones_own(run, answers, tmp_path):
    options = write(own_toy(), tmp_path)
    prompts = answers("cat", "twoo")
    chosen = ("--prompt", "{question} In {a word}.", "--metric", "anls")
    status, result, rows, printed = run("own", *options, *chosen)
    assert status == 0, printed
    assert sorted(prompts) == ["How many dogs? In {a word}.", "What is it? In {a word}."]
    assert [100 * row["score"] for row in rows] == pytest.approx([50 + 100 / 6 - 200 / 3, 75, 0])
    assert (result["metric"], result["prompt"]) == ("ANLS", "{question} In {a word}.")
    assert result["published"] == {"split": "", "scores": {}} and "published" not in printed
    assert [row["image"] for row in rows] == ["p0.jpg", "p1.jpg", "p2.jpg"]
    answered = len(prompts)
    _, result, _, _ = run("own", *options, "--prompt", "{question} In {a word}.", "--metric", "exact_match")
    assert (len(prompts), result["metric"]) == (answered, "exact match")  # scored anew, and not asked again
    status, _, _, printed = run("own", *options)
    assert status == 1 and "prompt was '{question} In {a word}.' and is now '{question}'" in printed


@pytest.mark.parametrize("max_images", [1, 2])
def test_own_data_with_several_images_or_none(tmp_path, max_images, capsys):
    """Nothing stubbed: texts and two images beside rows of one."""
    config = tiny_config(max_images=max_images)
    model, processor = tiny_model(config), tiny_processor(config)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    paths = image_paths(tmp_path)
    images = [[], [paths[0]], [paths[1], paths[0]]]
    prompts = ["Two and two?", "What?", "[image 1] [image 2] Which?"]
    data = [
        {"image": [Path(path).name for path in own], "conversations": [{"from": "human", "value": question},
                                                                       {"from": "gpt", "value": "4"}]}
        for own, question in zip(images, ["Two and two?", "<image>\nWhat?", "Which?"], strict=True)
    ]  # fmt: skip
    (tmp_path / "val.json").write_text(json.dumps(data))
    argv = ["--model", str(tmp_path / "model"), "--task", "own", "--data", str(tmp_path / "val.json")]
    argv += ["--output", str(tmp_path / "out"), "--max_new_tokens", str(NEW), "--dtype", "float32", "--device", "cpu"]
    assert evaluate.main(argv) == 0
    rows = rows_of(tmp_path / "out")
    assert [row.get("image") for row in rows] == [None, "n0.jpg", ["n1.jpg", "n0.jpg"]]
    for row, own, prompt in zip(rows, images, prompts, strict=True):
        if len(own) > max_images:
            assert row["error"] == "It has 2 images, and the model takes 1 (max_images)."
            continue
        text = processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        inputs = processor(images=[own], text=[text], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=NEW)[0, inputs["input_ids"].shape[1] :]
        assert row["answer"] == processor.tokenizer.decode(ids, skip_special_tokens=True).lstrip()
    assert json_of(tmp_path / "out" / "result.json")["errors"] == 2 - max_images


def test_the_files_of_other_tasks_with_a_prompt_of_ones_own(run, answers, tmp_path):
    prompts = answers("red", "two")
    options = write(textvqa_toy(), tmp_path)
    status, result, _, printed = run("own", *options, "--metric", "vqa_accuracy")
    assert status == 0, printed
    assert sorted(prompts) == ["What is 0?", "What is 1?"]
    assert (result["score"], result["split"]) == (pytest.approx(130 / 3), "val")
    assert "leave --prompt, --metric out, or take --task own, which reads" in run(
        "textvqa", *options, "--prompt", "{question}", "--metric", "anls"
    )[-1]  # fmt: skip


def test_a_system_message_of_a_sample_is_the_models(run, tmp_path, monkeypatch):
    toy = own_toy()
    toy.content[0]["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    conversations = []
    monkeypatch.setattr(
        engine,
        "generate",
        lambda model, processor, asked, *_: conversations.extend(asked) or [("", None)] * len(asked),
    )
    monkeypatch.setattr(evaluate, "finish", lambda *args: {})
    monkeypatch.setattr(evaluate, "report", lambda *args: "")
    monkeypatch.setattr("pheye.answering.rows.row", lambda *args: {})
    run("own", *write(toy, tmp_path))
    turns = [{"role": "user", "content": question} for question in ("How many dogs?", "What is it?")]
    assert conversations == [[turns[0]], [{"role": "system", "content": "Be brief."}, turns[1]]]


# --- Secret answers, and parts ---


def test_server_file_of_vqas_test_set(run, answers, tmp_path):
    answers("Red.", "zwei für 2")
    toy = vqa_toy("test-dev2015", "test2015", answered=False)
    status, result, rows, printed = run("vqav2", *write(toy, tmp_path))
    assert status == 0, printed
    assert json_of(tmp_path / "out" / "server.json") == [
        {"question_id": 1009, "answer": "Red."},
        {"question_id": 1007, "answer": "zwei für 2"},
        {"question_id": 1008, "answer": ""},
    ]
    assert (result["score"], result["confidence_interval"], result["errors"]) == (None, None, 1)
    assert (result["server_file"], result["split"]) == ("server.json", "test-dev")
    assert "score" not in rows[0]
    assert "the answers are secret: give" in printed
    assert "published (test-dev): Pheye-x4-448 75.2" in printed


def test_server_file_of_captions(run, answers, tmp_path):
    answers("a car", "a dog")
    toy = nocaps_toy()
    del toy.content["annotations"]
    run("nocaps", *write(toy, tmp_path), "--split", "test")
    expected = [(0, "a car"), (1, "a dog"), (2, "")]
    assert json_of(tmp_path / "out" / "server.json") == [{"image_id": i, "caption": text} for i, text in expected]


def test_a_part_gives_no_headline_number(run, answers, tmp_path):
    answers("red", "cat")
    status, result, rows, printed = run("textvqa", *write(many(textvqa_toy(), 5), tmp_path), "--limit", 3)
    assert status == 0, printed
    assert (result["partial"], result["score"], result["confidence_interval"]) == (True, None, None)
    assert (result["samples"], result["samples_of_split"], len(rows)) == (3, 5, 3)
    assert result["partial_score"] == pytest.approx(200 / 3)
    assert len(result["partial_confidence_interval"]) == 2
    assert "PARTIAL RUN of textvqa val: 3 samples, 0 of them errors, of 5" in printed
    assert "textvqa val: VQA accuracy" not in printed


def test_a_part_of_a_secret_set_gives_no_file_for_the_server(run, answers, tmp_path):
    answers("red", "cat")
    toy = vqa_toy("test2015", "test2015", answered=False)
    _, result, _, printed = run("vqav2", *write(toy, tmp_path), "--limit", 2)
    assert not (tmp_path / "out" / "server.json").exists()
    assert "server_file" not in result
    assert "PARTIAL RUN" in printed


def test_a_limit_above_the_number_of_samples_is_no_part(run, answers, tmp_path):
    answers("red", "cat")
    _, result, _, _ = run("textvqa", *write(many(textvqa_toy(), 4), tmp_path), "--limit", 9)
    assert (result["partial"], result["score"]) == (False, 50)


def test_a_part_becomes_the_whole(run, answers, tmp_path):
    """CIDEr weighs words by the whole corpus, so the part's scores must go."""
    toy = nocaps_toy()
    answers(*toy.answers)
    options = write(toy, tmp_path)
    _, _, few, _ = run("nocaps", *options, "--limit", 2)
    prompts = answers("never asked again", "never asked again")
    _, whole, rows, _ = run("nocaps", *options)
    assert prompts == []  # the third image is broken
    assert [row["answer"] for row in rows[:2]] == list(toy.answers)
    assert [100 * row["score"] for row in rows] == pytest.approx(scores_by_hand(toy))
    assert rows[0]["score"] != few[0]["score"]
    assert whole["score"] == pytest.approx(np.mean(scores_by_hand(toy)))
    status, result, _, printed = run("nocaps", *options, "--limit", 2)
    assert (status, result) == (1, whole)
    assert "holds the result of a whole run: leave --limit out" in printed


# --- Again ---


def test_a_model_that_was_trained_anew_under_its_name_is_another(run, answers, model, processor, tmp_path):
    own, (whole, changed) = tmp_path / "model", (model, tiny_model())
    with torch.no_grad():
        next(changed.parameters()).add_(1)
    options = [*write(textvqa_toy(), tmp_path), "--model", own]
    processor.save_pretrained(own)
    answers("red", "cat")
    for saved, status in ((whole, 0), (whole, 0), (changed, 1)):
        saved.save_pretrained(own)
        found, _, _, printed = run("textvqa", *options)
        assert found == status
    assert "files of the model was " in printed and "choose another output, or remove" in printed


def test_who_stops_the_scoring_hears_that_the_answers_are_kept(run, answers, monkeypatch, tmp_path):
    def stopped(*args):
        raise KeyboardInterrupt

    prompts = answers("red", "cat")
    options = write(textvqa_toy(), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "finish", stopped)
        status, result, _, printed = run("textvqa", *options)
    assert (status, result) == (130, None)
    assert "interrupted. All answers are kept in" in printed and "again to score them" in printed
    assert run("textvqa", *options)[0] == 0
    assert len(prompts) == 2  # of the first run


@pytest.mark.parametrize("content", [b"{}", b"[]", b"{", b"[" * 100_000])
def test_a_result_that_is_none_of_this_command(refused, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_bytes(content)
    status = evaluate.main(["--model", "m", "--task", "gqa", "--data", "x.json", "--output", str(tmp_path / "out"),
                            "--limit", "3"])  # fmt: skip
    assert status == 1


def test_an_interrupted_run_goes_on(run, answers, monkeypatch, tmp_path):
    answers("red", "cat")
    options = write(many(textvqa_toy(), 7), tmp_path)
    generate, calls = engine.generate, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args)

    monkeypatch.setattr(engine, "generate", dies)
    status, *_, printed = run("textvqa", *options)
    assert status == 130
    assert "\ninterrupted. 4 of 7 rows are kept in " in printed
    part = tmp_path / "out" / "rows.jsonl.part-0"
    assert len(part.read_text().splitlines()) == 4
    assert not (tmp_path / "out" / "result.json").exists()
    prompts = answers("red", "cat")
    _, result, rows, _ = run("textvqa", *options)
    assert len(prompts) == 3
    assert [row["id"] for row in rows] == list(range(7))
    assert result["score"] == pytest.approx(400 / 7)
    assert sorted(path.name for path in part.parent.iterdir()) == ["result.json", "rows.jsonl", "rows.jsonl.run.json"]


def test_a_finished_run_is_scored_again_without_the_model(run, answers, monkeypatch, tmp_path):
    from transformers import AutoModelForImageTextToText

    answers("red", "cat")
    options = write(many(textvqa_toy(), 5), tmp_path)
    _, first, rows, _ = run("textvqa", *options)
    (tmp_path / "out" / "result.json").unlink()
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *args, **kw: pytest.fail("loaded"))
    assert run("textvqa", *options)[1:3] == (first, rows)


def test_rows_of_other_settings_or_questions_are_not_taken(run, answers, tmp_path):
    answers("red", "cat")
    toy = many(textvqa_toy(), 5)
    options = write(toy, tmp_path)
    _, first, _, _ = run("textvqa", *options)
    status, result, _, printed = run("textvqa", *options, "--num_beams", 2)
    assert (status, result) == (1, first)
    assert "was begun with other settings: generate_kwargs was" in printed
    toy.content["data"][4]["question"] = "Another?"
    status, result, _, printed = run("textvqa", *write(toy, tmp_path))
    assert (status, result) == (1, first)
    assert "was begun with other settings: samples was" in printed


def test_rows_of_other_images_are_not_taken(run, answers, tmp_path):
    answers("cat", "dog")
    toy = own_toy()
    status, first, _, _ = run("own", *write(toy, tmp_path))
    assert status == 0
    toy.content[0]["image"], toy.content[1]["image"] = toy.content[1]["image"], toy.content[0]["image"]
    status, result, _, printed = run("own", *write(toy, tmp_path))
    assert (status, result) == (1, first)
    assert "was begun with other settings: samples was" in printed


def test_rows_of_another_column_of_images_are_not_taken(run, answers, tmp_path):
    answers("cat", "dog")
    paths = image_paths(tmp_path)
    rows = {"image": paths, "other": paths[::-1], "question": ["What?"] * 3, "answers": [["cat"]] * 3}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    options = ("--data", tmp_path / "rows.parquet", "--image_sources", "local")
    status, first, _, _ = run("own", *options)
    assert status == 0
    status, result, _, printed = run("own", *options, "--image_column", "other")
    assert (status, result) == (1, first)
    assert "was begun with other settings: image_column was" in printed


# --- By the size of the answer's box ---


def test_by_detail(run, answers, tmp_path):
    answers("red", "cat")
    options = write(many(textvqa_toy(), 6), tmp_path)
    areas = {0: 0.5, 1: 0.1, 2: 0.2, 3: 0.01, 4: 0.3, 5: 0.4}  # even ones are right
    lines = [json.dumps({"question_id": key, "area": area}) for key, area in areas.items()]
    (tmp_path / "boxes.jsonl").write_text("\n".join(lines))
    _, result, _, printed = run("textvqa", *options, "--by-detail", tmp_path / "boxes.jsonl")
    found = [(group["tertile"], group["samples"], group["accuracy"]) for group in result["by_detail"]["tertiles"]]
    assert found == [("small", 2, 0), ("medium", 2, 1), ("large", 2, 0.5)]
    assert "medium answer boxes (2): 100.0" in printed


def test_boxes_by_image(run, answers, tmp_path):
    """TextVQA's own OCR file names images, so the rows must."""
    answers("red", "3")
    toy = textvqa_toy()
    entries = [
        {
            "image_id": entry["image_id"],
            "ocr_info": [{"word": entry["answers"][-2], "bounding_box": {"width": 0.1, "height": 0.1 * (number + 1)}}],
        }
        for number, entry in enumerate(toy.content["data"])
    ]
    (tmp_path / "ocr.json").write_text(json.dumps({"data": entries}))
    _, result, rows, _ = run("textvqa", *write(toy, tmp_path), "--by_detail", tmp_path / "ocr.json")
    assert [group["largest_area"] for group in result["by_detail"]["tertiles"]] == pytest.approx([0.01, 0.02, 0.03])
    assert rows[0]["image_id"] == "0054c91397f2fe05"


# --- Bad input stops before the model is loaded ---


def test_unknown_task(refused, tmp_path):
    assert "There is no task 'vqa3'; choose --task from vqav2, textvqa" in refused("vqa3", "--data", tmp_path)


def test_files_that_do_not_fit(refused, tmp_path):
    options = write(vqa_toy(), tmp_path)
    assert "It looks like the format 'vqa'" in refused("textvqa", *options)
    assert "have no answers" in refused("vqav2", *options[:2])
    assert "There is no none.json" in refused("vqav2", "--data", "none.json")


def test_images_that_are_missing(refused, tmp_path):
    options = write(textvqa_toy(), tmp_path)
    (tmp_path / "elsewhere").mkdir()
    message = refused("textvqa", *options, "--images", tmp_path / "elsewhere")
    assert "3 of 3 images are not in" in message
    assert "as --images" in message


def test_ids_that_occur_twice(refused, tmp_path):
    toy = textvqa_toy()
    toy.content["data"][1]["question_id"] = 34602
    assert "The id 34602 occurs more than once" in refused("textvqa", *write(toy, tmp_path))


def test_model_that_is_no_pheye(refused, tmp_path):
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path / "clip")
    options = write(textvqa_toy(), tmp_path)
    assert "clip model; give the folder or Hub id" in refused("textvqa", *options, "--model", tmp_path / "clip")


def test_boxes_that_do_not_fit(refused, tmp_path):
    options = write(textvqa_toy(), tmp_path)
    (tmp_path / "boxes.jsonl").write_text('{"question_id": 34602, "area": 0.5}\n{"question_id": 1, "area": 0.5}\n')
    boxes = ("--by_detail", tmp_path / "boxes.jsonl")
    assert "1 samples have an area, but three groups need at least 3" in refused("textvqa", *options, *boxes)
    assert "--by_detail needs questions" in refused("nocaps", *write(nocaps_toy(), tmp_path), *boxes)
    assert "There is no file" in refused("textvqa", *options, "--by_detail", tmp_path / "none.jsonl")


def test_package_that_is_missing(refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert 'This needs sacrebleu: run pip install ".[eval]"' in refused("nocaps", *write(nocaps_toy(), tmp_path))


def test_output_that_is_a_file(model_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    options = ["--model", str(model_folder), "--task", "textvqa", *write(textvqa_toy(), tmp_path)]
    assert evaluate.main([*options, "--output", str(tmp_path / "file")]) == 1
    assert "is a file; give a folder" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--limit", "0"), ("--batch_size", "x"), ("--num_beams", "-1")])
def test_options_out_of_range(run, option, capsys):
    with pytest.raises(SystemExit) as stop:
        run("textvqa", "--data", "x.json", *option)
    assert stop.value.code == 2
    assert option[0] in capsys.readouterr().err


def test_documentation_names_tasks_and_options_that_exist(capsys):
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*?\| ([^|]+) \| [^|]+ \|$", page, re.MULTILINE)
    assert {name for name, _ in rows} == set(TASKS)
    for name, split in rows:
        assert split in ("the file's", "test-dev", TASKS[name].split)
    with pytest.raises(SystemExit):
        evaluate.parse(["--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    commands = [
        block
        for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
        if re.search(r"evaluation\.evaluate|pheye evaluate", block)
    ]
    for command in commands:
        assert set(re.findall(r"--[a-z][a-z_-]+", command)) <= known
    assert commands


# --- As a command ---

UPLOAD_AND_EVALUATE = """
import sys
from huggingface_hub import HfApi
from pheye.evaluation.evaluate import main

HfApi().create_repo("your-name/tiny")
HfApi().upload_folder(repo_id="your-name/tiny", folder_path=sys.argv[1])
sys.exit(main(["--model", "your-name/tiny", *sys.argv[2:]]))
"""


def test_commit_of_a_model_on_the_hub_is_recorded(model_folder, tmp_path):
    options = [*write(textvqa_toy(), tmp_path), "--task", "textvqa", "--max_new_tokens", str(NEW)]
    with FakeHub() as hub:
        command = [sys.executable, "-c", UPLOAD_AND_EVALUATE, str(model_folder), *options]
        environment = {**os.environ, **hub.environment(tmp_path / "cache")}
        finished = subprocess.run(
            [*command, "--output", str(tmp_path / "out")], env=environment, capture_output=True, text=True
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        commit = hub.repos["your-name/tiny"].branches["main"]
    assert json_of(tmp_path / "out" / "result.json")["revision"] == commit
    assert json_of(tmp_path / "out" / "rows.jsonl.run.json")["settings"]["files of the model"] == commit


def test_two_processes_write_what_one_writes(run, model_folder, tmp_path):
    options = [*write(many(textvqa_toy(), 5), tmp_path), "--max_new_tokens", str(NEW)]
    _, result, _, _ = run("textvqa", *options)
    # With --cpu, accelerate starts several processes by mpirun only; where no GPU is seen, this does it too.
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, "-m", *launch, "-m", "pheye.evaluation.evaluate", "--model", str(model_folder)]
    command += ["--task", "textvqa", "--output", str(tmp_path / "two"), *options, "--batch_size", "1"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (tmp_path / "two" / "rows.jsonl").read_bytes() == (tmp_path / "out" / "rows.jsonl").read_bytes()
    two = json_of(tmp_path / "two" / "result.json")
    assert two["processes"] == 2
    assert {**two, "processes": 1, "arguments": None} == {**result, "arguments": None}
    assert finished.stdout.count("textvqa val: VQA accuracy") == 1
