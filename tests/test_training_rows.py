"""Rows of training data are found in files and tables wherever they lie, with their images."""

import json
import re
import sys
from types import SimpleNamespace

import datasets
import pytest

from pheye.common.command import InputError
from pheye.training.formats import Source
from pheye.training.mixture import Mixture, read_mixture
from pheye.training.rows import fingerprint_of, scan_json

from toy_data import (
    by_id,
    conversation,
    image_table,
    images,
    llava_rows,
    messages,
    mixture,
    png,
    with_images,
    write_json,
    write_table,
)

pytestmark = pytest.mark.once


@pytest.fixture
def folder(tmp_path):
    return with_images(tmp_path)


# --- JSON ---


@pytest.mark.parametrize("chunk", [7, 8, 13, 50, 10**6])
@pytest.mark.parametrize("form", ["compact", "indented", "lines", "lines and blanks", "byte order mark"])
def test_rows_of_json_are_found_byte_for_byte(tmp_path, monkeypatch, chunk, form):
    monkeypatch.setattr("pheye.training.rows.CHUNK_BYTES", chunk)
    rows = [{"a": 'ö"]}[{\\', "b": [1, {"c": "\n,"}]}, {}, {"d": None, "é": "\u3000\U0001f441"}, {"e": -1.5e3}]
    dump = {"ensure_ascii": False}
    text = {
        "compact": json.dumps(rows, **dump),
        "indented": " \n" + json.dumps(rows, indent=3, **dump) + "\n ",
        "lines": "\n".join(json.dumps(row, **dump) for row in rows),
        "lines and blanks": "\n \n".join(json.dumps(row, **dump) for row in rows) + "\n\n",
        "byte order mark": "\ufeff" + json.dumps(rows, **dump),
    }[form]
    content = text.encode()
    (tmp_path / "x.json").write_bytes(content)
    found = [json.loads(content[start:end]) for start, end, _ in scan_json(tmp_path / "x.json")]
    assert found == rows


def test_json_that_is_not_whole_is_refused_wherever_it_ends(tmp_path):
    content = json.dumps([{"a": 1}, {"b": "two"}]).encode()
    for length in range(1, len(content)):
        (tmp_path / "x.json").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"x\.json is no whole JSON"):
            list(scan_json(tmp_path / "x.json"))
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"b": "tw')
    with pytest.raises(ValueError, match=r"x\.jsonl is no whole JSON: at byte 1\d"):
        list(scan_json(tmp_path / "x.jsonl"))


def test_images_are_looked_for_in_the_image_folder(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = write_json(elsewhere, llava_rows(2))
    assert mixture(path, image_folder=str(folder))[0]["images"] == [f"{folder}/a.png"]
    with pytest.raises(ValueError, match=rf"None of the first 2 images of data exists.*at {elsewhere}/a\.png\. .*--image_folder"):  # fmt: skip  # noqa: E501
        mixture(path)


def test_a_few_missing_images_do_not_stop_the_reading(folder):
    rows = llava_rows(3)
    rows[0]["image"] = "missing.png"
    assert len(mixture(write_json(folder, rows))) == 3


def test_rows_that_speak_of_images_they_have_not_are_left_out_and_counted(folder, capsys):
    rows = llava_rows(7)
    del rows[0]["image"]
    del rows[1]["image"]
    rows[1]["conversations"][0]["value"] = "<image>\nWhat?"
    rows[2]["image"] = None
    rows[3]["image"] = ["a.png", "b.png"]
    rows[4]["image"] = ["a.png", None]
    rows[5]["image"] = ["b.png"]
    rows[6]["image"] = []
    samples = by_id(mixture(write_json(folder, rows)))
    assert [(sample["id"], sample["images"]) for sample in samples] == [
        ("row-0", []),
        ("row-5", [f"{folder}/b.png"]),
        ("row-6", []),
    ]
    assert capsys.readouterr().out == (
        "data: 4 of 7 rows left out: 1 whose marks of images (<image>) are not as many as their images; 2 whose image "
        "is null; 1 with more images than the model takes (max_images=1).\n"
    )
    with pytest.raises(ValueError, match=r"None of the 1 rows of .* can be used: 1 whose image is null\."):
        mixture(write_json(folder, rows[2:3]))
    with pytest.raises(ValueError, match=r"None of the 1 rows of .* has an image \(field 'image'\).*--image_column"):
        mixture(write_json(folder, rows[:1]))


# --- Tables of `datasets` ---


def test_images_in_tables_may_be_paths_or_bytes(folder):
    rows = {"messages": [messages(("Q?", "A"))]}
    path = write_table(folder, "paths", image=["a.png"], **rows)
    assert mixture(path, image_folder=str(folder))[0]["images"] == [f"{folder}/a.png"]
    with pytest.raises(ValueError, match="None of the first 1 images of paths exists"):
        mixture(path, image_folder=str(folder / "wrong"))
    assert mixture(write_table(folder, "bytes", image=[png(3)], **rows))[0]["images"] == [png(3)]


@pytest.mark.parametrize("max_images", [1, 2])
def test_a_broken_image_is_not_opened_and_too_many_are_left_out_and_counted(tmp_path, capsys, max_images):
    column = [[{"bytes": b"broken", "path": None}], images(0, 1), [], images(1, None), images(0, 1, 2), None]
    rows = {"images": column, "messages": [messages(("Q", "A"))] * 6}
    path = image_table(tmp_path, image_column="images", is_list=True, **rows)
    samples = by_id(Mixture([Source(path)], 0, max_images))
    found = {sample["id"]: (sample["images"], sample.get("error")) for sample in samples}
    assert found.pop("0") == ([b"broken"], None) and found.pop("2") == ([], None)
    for row in ("3", "5")[2 - max_images :]:
        images_found, error = found.pop(row)
        assert images_found == [] and "names an image that is null" in error
    assert found == ({} if max_images == 1 else {"1": ([png(0), png(1)], None)})
    left_out = {1: 3, 2: 1}[max_images]
    said = (
        f"{left_out} of 6 rows left out: {left_out} with more images than the model takes (max_images={max_images})."
    )
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("where", ["split", "parquet", "folder"])
def test_tables_are_found_wherever_datasets_keeps_them(tmp_path, where):
    table = datasets.Dataset.from_dict({"id": ["x"], "image": [png(0)], "messages": [messages(("Q?", "A"))]})
    other = datasets.Dataset.from_dict({"id": ["y"], "image": [png(0)], "messages": [messages(("Q?", "A"))]})
    path, fields = tmp_path / "here", {}
    if where == "split":
        datasets.DatasetDict({"train": other, "val": table}).save_to_disk(path)
        fields = {"split": "val"}
        assert [sample["id"] for sample in mixture(path)] == ["y"]  # of "train"
        with pytest.raises(ValueError, match="has no split 'test'; choose the split from train, val"):
            mixture(path, split="test")
    else:
        path.mkdir()
        table.to_parquet(path / "x.parquet")
        path = path / "x.parquet" if where == "parquet" else path
    assert [sample["id"] for sample in mixture(path, **fields)] == ["x"]


def test_tables_without_images_or_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has neither a column `image` nor `images`, but messages"):
        mixture(write_table(tmp_path, "text", messages=[messages(("Q", "A"))]))
    none = datasets.load_from_disk(write_table(tmp_path, "x", image=["a"], messages=[messages(("Q", "A"))])).select([])
    none.save_to_disk(tmp_path / "none")
    none.to_parquet(tmp_path / "none.parquet")
    for name in ("none", "none.parquet"):
        with pytest.raises(ValueError, match=r"none.* (is empty; give a data set|corresponds to no data)"):
            mixture(tmp_path / name)


@pytest.mark.parametrize("name", ["missing.json", "missing.parquet", "missing"])
def test_what_does_not_exist_is_refused_by_its_name(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        mixture(tmp_path / name)


def test_a_missing_package_is_named_with_the_way_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r'pip install "\.\[train\]"'):
        mixture(tmp_path / "table")


# --- JSON that nobody means ---


@pytest.mark.parametrize(
    "text",
    ["[" * 100000 + "]" * 100000, '{"id": ' + "[" * 100000 + "]" * 100000 + "}", '{"id": ' + "9" * 5000 + "}"],
    ids=["nested too deeply", "nested too deeply in a row", "a number of 5,000 digits"],
)
def test_json_that_python_does_not_read_is_refused_with_the_file(tmp_path, text):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Mixture(read_mixture([str(path)]), 0)
    path.write_text('{"sources": ' + text + "}")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Mixture(read_mixture([str(path)]), 0)


# --- What tells data from others ---


def test_the_fingerprint_of_a_file_and_of_a_folder_changes_with_what_they_hold(tmp_path):
    write_json(with_images(tmp_path), [{"image": "a.png", "conversations": conversation(("Q?", "A"))}])
    file, folder = Source(str(tmp_path / "data.json")), Source(str(tmp_path))
    before = fingerprint_of(file), fingerprint_of(folder)
    assert (fingerprint_of(file), fingerprint_of(folder)) == before
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "cache-1.arrow").write_text("of datasets")
    assert fingerprint_of(folder) == before[1]
    text = (tmp_path / "data.json").read_text()
    (tmp_path / "data.json").write_text(text.replace('"A"', '"B"'))
    assert fingerprint_of(file) != before[0] and fingerprint_of(folder) != before[1]
    (tmp_path / "data.json").write_text(text)
    assert (fingerprint_of(file), fingerprint_of(folder)) == before
    (tmp_path / "a.png").write_bytes(b"another size")
    assert fingerprint_of(file) == before[0] and fingerprint_of(folder) != before[1]


def test_a_data_set_of_the_hub_is_told_by_its_commit(monkeypatch):
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda path, subset: SimpleNamespace(hash=f"{path} {subset} 123")
    )
    assert fingerprint_of(Source("org/set", subset="main")) == "org/set main 123"


def test_json_has_no_split(tmp_path):
    path = write_json(with_images(tmp_path), [{"image": "a.png", "conversations": conversation(("Q?", "A"))}])
    with pytest.raises(ValueError, match="which has no split 'validation'; leave it out"):
        Mixture([Source(str(path), split="validation")], 0)
