"""Samples out of files and data sets: which source, which columns, which split."""

import datasets
import pytest
from accelerate import PartialState

from toys import CAPTIONS, HUMANS, docci_toy, gqa_toy, image_paths, read, refused, textvqa_toy, write

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def in_the_folder_of_the_images(tmp_path, monkeypatch):
    """Names in a table may lead to the working directory; of a folder of data not beside it."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps its state for the life of a process."""
    PartialState._reset_state()
    yield
    PartialState._reset_state()


# --- Official files ---


def test_split_of_a_file_that_has_several(tmp_path):
    options = write(docci_toy(), tmp_path)
    samples, split = read("docci", *options, "--split", "train")
    assert [sample.id for sample in samples] == ["train_00000"]
    assert split == "train"
    assert "has no split 'val'; choose --split from test, train." in refused("docci", *options, "--split", "val")


def test_split_of_a_file_that_does_not_say(tmp_path):
    assert read("gqa", *write(gqa_toy(), tmp_path), "--split", "val")[1] == "val"


# --- Data sets ---


def test_columns_of_a_data_set(tmp_path):
    columns = {"photo": image_paths(tmp_path), "q": ["What?", "Who?", "How?"], "a": HUMANS, "key": ["x", "y", "z"]}
    data = datasets.Dataset.from_dict(columns).cast_column("photo", datasets.Image())
    datasets.DatasetDict({"train": data, "val": data.select([1, 2])}).save_to_disk(tmp_path / "saved")
    options = ["--image_column", "photo", "--question_column", "q", "--answers_column", "a", "--id_column", "key"]
    samples, split = read("vqav2", "--data", str(tmp_path / "saved"), *options)
    assert split == "val"
    assert [(s.id, s.question, s.references) for s in samples] == [
        ("y", "Who?", tuple(HUMANS[1])),
        ("z", "How?", tuple(HUMANS[2])),
    ]
    assert samples[0].image() == (tmp_path / "n1.jpg").read_bytes()
    assert len(read("vqav2", "--data", str(tmp_path / "saved"), *options, "--split", "train")[0]) == 3


def test_data_set_with_the_usual_columns(tmp_path):
    paths = image_paths(tmp_path)
    datasets.Dataset.from_dict({"image": paths, "captions": CAPTIONS}).save_to_disk(tmp_path / "captions")
    samples, split = read("docci", "--data", str(tmp_path / "captions"))
    assert [(s.id, s.question, s.references) for s in samples] == [(i, "", tuple(CAPTIONS[i])) for i in range(3)]
    assert split == "test"
    options = [["cat", "dog"]] * 3
    rows = {"image": paths, "question": ["a", "b", "c"], "choices": options, "correct_choice_idx": [0, 1, 0]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "options")
    samples, _ = read("aokvqa", "--data", str(tmp_path / "options"))
    assert [s.references for s in samples] == [("A", "cat"), ("B", "dog"), ("A", "cat")]
    assert samples[0].options == ("cat", "dog")


def test_table_file(tmp_path):
    rows = {"image": image_paths(tmp_path), "question": ["a", "b", "c"], "answers": [["x"]] * 3}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    samples, split = read("textvqa", "--data", str(tmp_path / "rows.parquet"))
    assert [(s.question, s.references) for s in samples] == [("a", ("x",)), ("b", ("x",)), ("c", ("x",))]
    assert samples[0].image() == rows["image"][0]
    assert split == "train"
    assert "leave --images out" in refused("textvqa", "--data", str(tmp_path / "rows.parquet"), "--images", ".")


def test_data_set_without_answers(tmp_path):
    rows = {"image": image_paths(tmp_path), "question": ["a", "b", "c"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    assert "3 of 3 samples" in refused("textvqa", "--data", str(tmp_path / "saved"))
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows)}).save_to_disk(tmp_path / "splits")
    samples, split = read("textvqa", "--data", str(tmp_path / "splits"), "--split", "test")
    assert [s.references for s in samples] == [None] * 3
    assert split == "test"


@pytest.mark.parametrize("changed", [{"correct_choice_idx": [0, 1, -1]}, {"choices": ["cat", "dog", "cow"]}])
def test_options_of_a_data_set_are_not_read_otherwise_than_written(tmp_path, changed):
    rows = {"image": image_paths(tmp_path), "question": ["a", "b", "c"], "choices": [["cat", "dog"]] * 3}
    datasets.Dataset.from_dict({**rows, "correct_choice_idx": [0, 1, 0], **changed}).save_to_disk(tmp_path / "saved")
    assert "The answers of a row are" in refused("aokvqa", "--data", str(tmp_path / "saved"))


def test_data_set_with_the_wrong_columns(tmp_path):
    rows = {"image": image_paths(tmp_path), "question": ["a", "b", "c"], "answers": [1, 2, 3]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    source = str(tmp_path / "saved")
    assert "they must be a text, a list of texts" in refused("textvqa", "--data", source)
    message = refused("textvqa", "--data", source, "--question_column", "q")
    assert "has no column 'q'; its columns are image, question, answers. Name the one of the question by" in message
    assert "it must hold images, paths" in refused("textvqa", "--data", source, "--image_column", "answers")
    assert "has no column 'human'" in refused("textvqa", "--data", source, "--answers_column", "human")
    assert "leave --question_column out" in refused("docci", "--data", source, "--question_column", "question")
    assert "leave --images out" in refused("textvqa", "--data", source, "--images", ".")
    assert "leave --annotations out" in refused("vqav2", "--data", source, "--annotations", "x.json")


def test_sources_that_are_none(tmp_path):
    assert "is a folder; give TextVQA's: an object" in refused("textvqa", "--data", str(tmp_path))
    for name in (str(tmp_path / "x"), "x.json", "a/b/c"):
        assert f"There is no {name}; give" in refused("textvqa", "--data", name)
    assert "'some/dataset-v1.5' cannot be read as a data set" in refused("textvqa", "--data", "some/dataset-v1.5")
    options = write(textvqa_toy(), tmp_path)
    message = refused("textvqa", *options, "--id_column", "x", "--config", "y")
    assert "is a file: leave --config, --id_column out" in message
