"""Data of one's own: what training reads is asked as it was learnt, whatever file it comes from."""

import json
from pathlib import Path

import datasets
import pytest
from accelerate import PartialState

from pheye.evaluation.evaluate import check_own, find_task, request_of
from pheye.evaluation.tasks import METRICS
from pheye.training.formats import Source
from pheye.training.mixture import Mixture

from tiny import tiny_config, tiny_processor
from toys import image_paths, own_toy, read, refused, textvqa_toy, write

pytestmark = pytest.mark.once
TALK = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "How many letters has it?"},
    {"from": "gpt", "value": "3"},
]


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps its state for the life of a process."""
    PartialState._reset_state()
    yield
    PartialState._reset_state()


def save(rows: list[dict], path: Path) -> list[str]:
    """As JSON, or as lines of it; the options that name it. Every row is about one image."""
    image_paths(path.parent)
    lines = [json.dumps({"image": "n0.jpg", **row}, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
    return ["--data", str(path)]


def asked(samples) -> list[tuple]:
    return [(sample.id, sample.question, sample.references) for sample in samples]


def test_llavas_file(tmp_path):
    toy = own_toy()
    samples, split = read("own", *write(toy, tmp_path))
    assert asked(samples) == asked(toy.samples)
    assert [sample.image for sample in samples] == [tmp_path / name for name in toy.images]
    assert split == "own-val"


@pytest.mark.parametrize("name", ["val.json", "val.jsonl"])
def test_each_turn_is_asked_by_itself_as_in_training(tmp_path, name):
    rows = [{"id": "a", "conversations": TALK}, {"id": "b", "conversations": TALK[:2]}]
    samples, _ = read("own", *save(rows, tmp_path / name))
    assert asked(samples) == [
        ("a-0", "What is it?", ("A cat.",)),
        ("a-1", "How many letters has it?", ("3",)),
        ("b", "What is it?", ("A cat.",)),
    ]
    assert {sample.image for sample in samples} == {tmp_path / "n0.jpg"}


def test_a_sample_is_asked_in_the_very_words_that_training_shows(tmp_path):
    system = [{"role": "system", "content": "Be brief."}]
    turn = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "That."}]
    options = save([{"messages": turn}, {"messages": [*system, *turn]}], tmp_path / "val.jsonl")
    samples, _ = read("own", *options, "--prompt", "{question} In a word.")
    shown = Mixture([Source(str(tmp_path / "val.jsonl"), prompt="In a word.")], 0)
    learnt = [shown[index]["messages"][:-1] for index in range(2)]
    task = find_task("own", "{question} In a word.")
    for sample in samples:
        assert request_of(sample, task).messages() in learnt
    assert [sample.system for sample in samples] == [None, "Be brief."]


def test_ids_that_are_not_unique_give_way_to_numbers(tmp_path):
    rows = [{"id": "a", "conversations": TALK[:2]}] * 2
    samples, _ = read("own", *save(rows, tmp_path / "val.json"))
    assert [sample.id for sample in samples] == ["0", "1"]
    # The turns of "a" would be a-0 and a-1.
    rows = [{"id": "a-1", "conversations": TALK[:2]}, {"id": "a", "conversations": TALK}]
    samples, _ = read("own", *save(rows, tmp_path / "val.json"))
    assert [sample.id for sample in samples] == ["0", "1-0", "1-1"]


def test_tables_with_conversations(tmp_path):
    rows = {"image": [[path] for path in image_paths(tmp_path)], "id": ["x", "y", "z"], "conversations": [TALK] * 3}
    data = datasets.Dataset.from_dict(rows)
    data.to_parquet(tmp_path / "tables" / "rows.parquet")
    for place in ("tables", "tables/rows.parquet"):
        samples, split = read("own", "--data", str(tmp_path / place), "--image_sources", "local")
        assert [sample.id for sample in samples] == [f"{row}-{turn}" for row in "xyz" for turn in (0, 1)]
        assert samples[2].image() == str(tmp_path / "n1.jpg")
        assert (samples[1].references, split) == (("3",), "train")
    datasets.DatasetDict(train=data, validation=data.select([1])).save_to_disk(tmp_path / "saved")
    samples, split = read("own", "--data", str(tmp_path / "saved"), "--id_column", "id", "--image_sources", "local")
    assert ([sample.id for sample in samples], split) == (["y-0", "y-1"], "validation")
    message = refused("own", "--data", str(tmp_path / "saved"), "--image_column", "photo")
    assert "has no column 'photo'; its columns are image, id, conversations. Name the one of the image" in message
    message = refused("own", "--data", str(tmp_path / "saved"), "--id_column", "number")
    assert "has no column 'number'; its columns are image, id, conversations. Name the one of the id" in message
    message = refused("own", "--data", str(tmp_path / "saved"), "--choices_column", "id")
    assert "has conversations: leave --choices_column out." in message


def test_tables_with_questions_and_all_their_answers(tmp_path):
    rows = {"image": image_paths(tmp_path), "question": ["a", "b", "c"], "answers": [["x", "y"]] * 3}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    samples, _ = read("own", "--data", str(tmp_path / "rows.parquet"))
    assert asked(samples) == [(number, question, ("x", "y")) for number, question in enumerate("abc")]


def test_files_of_the_benchmarks(tmp_path):
    toy = textvqa_toy()
    samples, split = read("own", *write(toy, tmp_path))
    assert (samples, split) == (toy.samples, "val")
    for option in ("--image_sources", "--image_column"):
        assert f"leave {option} out" in refused("own", *write(toy, tmp_path), option, "any")


def test_the_field_of_the_images_may_have_another_name(tmp_path):
    options = save([{"id": "a", "conversations": TALK[:2], "picture": "n1.jpg"}], tmp_path / "val.json")
    samples, _ = read("own", *options, "--image_column", "picture")
    assert [sample.image for sample in samples] == [tmp_path / "n1.jpg"]
    with_none = save([{"id": "a", "conversations": TALK[:2], "image": None}], tmp_path / "val.json")
    assert "Name the field by --image_column" in refused("own", *with_none, "--image_column", "picture")


def test_captions_have_no_question(tmp_path):
    rows = [{"id": "a", "conversations": [{"from": "human", "value": "<image>"}, TALK[1]]}]
    options = save(rows, tmp_path / "val.json")
    assert "it has an empty question" in refused("own", *options)
    samples, _ = read("own", *options, "--prompt", "Describe it.", "--metric", "cider")
    assert request_of(samples[0], find_task("own", "Describe it.", "cider")).prompt == "Describe it."


@pytest.mark.parametrize("name", ["../private/a.png", "/etc/a.png", "link/a.png", "https://example.org/a.png"])
def test_names_lead_where_they_may(tmp_path, name):
    (tmp_path / "set").mkdir()
    (tmp_path / "private").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "private")
    options = save([{"id": "a", "conversations": TALK[:2], "image": name}], tmp_path / "set" / "val.json")
    message = refused("own", *options)
    assert "Sample 'a' of" in message and "--image_sources" in message
    if name.startswith("https"):
        samples, _ = read("own", *options, "--image_sources", "any")
        assert samples[0].image == name
    else:
        assert "1 of 1 images are not there" in refused("own", *options, "--image_sources", "local")


def test_files_that_cannot_be_used(tmp_path):
    options = save([{"id": "a", "conversations": TALK[:2], "image": "none.jpg"}], tmp_path / "val.json")
    assert f"1 of 1 images are not there, {tmp_path}/none.jpg for example" in refused("own", *options)
    assert "leave --annotations out" in refused("own", *options, "--annotations", "x.json")
    assert "has no split 'test'; choose --split from val" in refused(
        "own", *save([{"id": "a", "conversations": TALK[:2]}], tmp_path / "val.json"), "--split", "test"
    )
    assert "Sample 'a' of val cannot be used: it has the answer ''" in refused(
        "own", *save([{"id": "a", "conversations": [TALK[0], {"from": "gpt", "value": ""}]}], tmp_path / "val.json")
    )
    (tmp_path / "val.json").write_text("[" * 100_000)
    assert "is not whole JSON" in refused("own", *options)


def test_prompts_and_metrics_that_do_not_fit_the_data(tmp_path):
    samples, _ = read("own", *write(own_toy(), tmp_path))
    with pytest.warns(UserWarning, match=r"--prompt has no \{question\}, so the 3 questions of x are not asked"):
        check_own(samples, find_task("own", "Describe it."), "x")
    with pytest.raises(ValueError, match=r"sample 'row-0' of x has 1 answers, and needs 4"):
        check_own(samples, find_task("own", None, "vqa_accuracy"), "x")
    for metric in METRICS.keys() - {"vqa_accuracy"}:
        check_own(samples, find_task("own", None, metric), "x")
    with pytest.raises(ValueError, match="--prompt is empty"):
        find_task("own", " ")
    with pytest.raises(ValueError, match="leave --metric out, or take --task own"):
        find_task("gqa", None, "anls")


# --- Rows with several images, or none ---


def pair_of(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


SEVERAL = [
    {"id": "none", "image": [], "conversations": pair_of("Two and two?", "4")},
    {"id": "one", "image": ["n0.jpg"], "conversations": pair_of("<image>\nWhat?", "A cat.")},
    {"id": "two", "image": ["n0.jpg", "n1.jpg"], "conversations": pair_of("Is <image> like <image>?", "No.")},
    {"id": "front", "image": ["n0.jpg", "n1.jpg"], "conversations": pair_of("Which?", "B.")},
]
TURNS = [*pair_of("Hello.", "H"), *pair_of("<image>What?", "A"), *pair_of("And <image>now?", "B")]


def learnt(path: str, draws: int, max_images: int = 2, **fields) -> set[tuple]:
    """What training shows in so many draws: a message's text, its answer and its images."""
    shown = Mixture([Source(path, samples=draws, **fields)], 0, max_images)
    return {
        (sample["messages"][0]["content"], sample["messages"][1]["content"], tuple(sample["images"]))
        for sample in shown
    }


def asked_in_words(samples) -> set[tuple]:
    """The same of the samples of an evaluation."""
    words = set()
    for sample in samples:
        request = request_of(sample, find_task("own"))
        [message] = request.messages(len(request.images()))
        words.add((message["content"], *sample.references, tuple(map(str, request.images()))))
    return words


def test_rows_with_several_images_or_none_are_asked_as_training_shows_them(tmp_path):
    rows = [*SEVERAL, {"id": "turns", "image": ["n0.jpg", "n1.jpg"], "conversations": TURNS}]
    options = save(rows, tmp_path / "val.jsonl")
    samples, _ = read("own", *options)
    assert [sample.id for sample in samples] == ["none", "one", "two", "front", "turns-0", "turns-1", "turns-2"]
    assert [len(request_of(sample, find_task("own")).images()) for sample in samples] == [0, 1, 2, 2, 0, 1, 2]
    assert samples[2].question == "Is [image 1] like [image 2] ?"
    assert samples[3].question == "[image 1] [image 2] Which?"
    assert asked_in_words(samples) == learnt(options[1], 60)


@pytest.mark.parametrize("column", ["image", "images"])
def test_tables_with_several_images_or_none(tmp_path, column):
    paths = image_paths(tmp_path)
    data = {
        column: [[paths[0]] * len(row["image"]) for row in SEVERAL],
        "conversations": [row["conversations"] for row in SEVERAL],
    }
    datasets.Dataset.from_dict(data).to_parquet(tmp_path / "rows.parquet")
    options = ("--image_sources", "local")
    samples, _ = read("own", "--data", str(tmp_path / "rows.parquet"), *options)
    assert asked_in_words(samples) == learnt(str(tmp_path / "rows.parquet"), 40, image_sources="local")
    questions = [pair[0]["value"] for pair in data["conversations"]]
    columns = {column: data[column], "question": questions, "answers": [["x", "y"]] * 4}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "columns.parquet")
    found, _ = read("own", "--data", str(tmp_path / "columns.parquet"), *options)
    assert [sample.question for sample in found] == [sample.question for sample in samples]
    assert {sample.references for sample in found} == {("x", "y")}


def test_captions_of_several_images_have_the_numbers_that_training_shows(tmp_path):
    options = save([SEVERAL[2]], tmp_path / "val.jsonl")
    task = find_task("own", "Describe them.")
    [sample] = read("own", *options, "--prompt", "Describe them.")[0]
    assert request_of(sample, task).prompt == "Describe them."
    template = tiny_processor(tiny_config(max_images=2)).apply_chat_template
    said = {"role": "user", "content": "[image 1] [image 2] Describe them."}
    assert template(request_of(sample, task).messages(2)) == template([said])


def test_marks_that_do_not_fit_the_images(tmp_path, capsys):
    """As in training: left out of a file and counted, and an error of the row of a table."""
    rows = [SEVERAL[0], {**SEVERAL[2], "conversations": pair_of("<image>?", "No.")}]
    samples, _ = read("own", *save(rows, tmp_path / "val.jsonl"))
    assert [sample.id for sample in samples] == ["none"]
    assert "1 of 2 rows left out: 1 whose marks of images (<image>) are not as many" in capsys.readouterr().out
    paths = image_paths(tmp_path)
    data = {"images": [[], paths[:2]], "conversations": [row["conversations"] for row in rows]}
    datasets.Dataset.from_dict(data).to_parquet(tmp_path / "rows.parquet")
    samples, _ = read("own", "--data", str(tmp_path / "rows.parquet"))
    with pytest.raises(ValueError, match=r"have 1 marks of an image \(<image>\), but it has 2 images"):
        request_of(samples[1], find_task("own")).images()
