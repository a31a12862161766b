"""The captioning command: its sources, its rows, and what it says about bad input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from test_image_processing_pheye import serve

from pheye.answering import caption, engine

from tiny import tiny_image, tiny_model

NEW = 8  # tokens per caption
CAPTION = "Provide a one-sentence caption for the provided image"
SEEDS = {"a.png": 0, "b/c.JPG": 4, "b/d.webp": 2, "e.bmp": 1}
BROKEN = "b/broken.png"


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps its state for the life of a process."""
    PartialState._reset_state()
    yield
    PartialState._reset_state()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four pictures, a broken one, and files that are to be left out."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "b").mkdir()
    (folder / ".hidden").mkdir()
    for name, seed in SEEDS.items():
        tiny_image(seed, 60 + 9 * seed, 90 - 7 * seed).save(folder / name, lossless=True)
    (folder / BROKEN).write_bytes((folder / "a.png").read_bytes()[:100])
    (folder / "notes.txt").write_text("no image")
    for name in (".a.png", ".hidden/a.png"):
        tiny_image().save(folder / name)
    return folder


@pytest.fixture(scope="module")
def captions(model, processor, folder) -> dict[str, str]:
    """What each picture gets by itself, by `generate`; no two are alike, so that mixing them up shows."""
    text = processor.apply_chat_template([{"role": "user", "content": CAPTION}], add_generation_prompt=True)
    captions = {}
    for name in SEEDS:
        inputs = processor(images=Image.open(folder / name), text=text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=NEW)[0, inputs["input_ids"].shape[1] :]
        captions[name] = processor.tokenizer.decode(ids, skip_special_tokens=True).lstrip()
    assert len(set(captions.values())) == len(SEEDS)
    return captions


@pytest.fixture
def run(model_folder, tmp_path, capsys):
    """Runs the command in this process: (exit status, rows or None, what it wrote to the error stream)."""

    def run(images, *options):
        output = tmp_path / "captions.jsonl"
        argv = ["--model", str(model_folder), "--output", str(output), "--max_new_tokens", str(NEW)]
        capsys.readouterr()
        status = caption.main([*argv, "--batch_size", "2", "--images", str(images), *options])
        return status, rows_of(output), capsys.readouterr().err

    return run


@pytest.fixture
def refused(run, monkeypatch):
    """Runs the command on input that must stop it before the model is loaded: what it says."""
    from transformers import AutoModelForImageTextToText

    def refused(images, *options) -> str:
        monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *args, **kw: pytest.fail("loaded"))
        status, rows, error = run(images, *options)
        assert (status, rows) == (1, None)
        assert error.startswith("error: ")
        return error

    return refused


def rows_of(output: Path) -> list[dict] | None:
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else None


def by_id(rows: list[dict]) -> dict:
    return {row["id"]: row.get("caption") for row in rows}


# --- Sources ---


def test_folder(run, folder, captions):
    status, rows, _ = run(folder)
    assert status == 0
    assert [row["id"] for row in rows] == sorted([*SEEDS, BROKEN])
    assert all(row["image"] == str(folder / row["id"]) for row in rows)
    assert by_id(rows) == {**captions, BROKEN: None}
    broken = next(row for row in rows if row["id"] == BROKEN)
    assert set(broken) == {"id", "image", "error"}
    assert "broken.png" in broken["error"]


def test_a_compiled_vision_tower_gives_the_same_captions_from_one_graph(run, folder, captions, monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compiled(self, **kw, backend="eager"))
    try:
        status, rows, _ = run(folder, "--compile")
    finally:
        torch.compiler.set_stance("default")
    assert status == 0
    assert by_id(rows) == {**captions, BROKEN: None}  # the broken picture and the last one make batches of one
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_list_of_paths_and_urls(run, folder, captions, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    with serve({"/x.png": (folder / "e.bmp").read_bytes()}) as url:
        lines = ["e.bmp", str(folder / "a.png"), f"{url}/x.png", "missing.png"]
        (tmp_path / "list.txt").write_text("\r\n".join(["", *lines, ""]))
        _, rows, _ = run(tmp_path / "list.txt")
    assert [(row["id"], row["image"]) for row in rows] == [(line, line) for line in lines]
    assert [row.get("caption") for row in rows[:3]] == [captions["e.bmp"], captions["a.png"], captions["e.bmp"]]
    assert "there is no such file" in rows[3]["error"]


@pytest.fixture(scope="module")
def dataset(folder):
    """A column of encoded pictures, a broken one and none among them, and one of ids."""
    names = [*SEEDS, BROKEN, None]
    cells = [{"bytes": (folder / name).read_bytes(), "path": None} if name else None for name in names]
    features = datasets.Features({"picture": datasets.Image(), "key": datasets.Value("string")})
    return datasets.Dataset.from_dict({"picture": cells, "key": [str(name) for name in names]}, features=features)


def test_saved_dataset(run, dataset, captions, tmp_path):
    dataset.save_to_disk(tmp_path / "saved")
    status, rows, _ = run(tmp_path / "saved", "--image_column", "picture", "--id_column", "key")
    assert status == 0
    assert by_id(rows) == {**captions, BROKEN: None, "None": None}
    assert [row["image"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert "could not be read as an image" in rows[4]["error"]
    assert rows[5]["error"] == "There is no image."


def test_split_of_a_saved_dataset_with_paths(run, folder, captions, tmp_path):
    paths = datasets.Dataset.from_dict({"image": [str(folder / name) for name in SEEDS]})
    datasets.DatasetDict({"train": paths.select([0]), "val": paths}).save_to_disk(tmp_path / "saved")
    _, rows, _ = run(tmp_path / "saved", "--split", "val", "--image_sources", "local")
    assert by_id(rows) == dict(enumerate(captions.values()))


def test_dataset_by_the_name_of_its_loader(run, dataset, captions, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    dataset.to_parquet(tmp_path / "rows.parquet")
    options = ("--data_files", str(tmp_path / "rows.parquet"), "--image_column", "picture")
    _, rows, _ = run("parquet", *options)
    assert by_id(rows) == dict(enumerate([*captions.values(), None, None]))


def test_several_sources_and_a_word_on_what_was_passed_over(run, folder, captions):
    status, rows, error = run(folder / "a.png", str(folder / "b"), str(folder / "*.txt*"), str(folder / "*.bmp"))
    assert status == 1 and "No image or table matches" in error
    status, rows, error = run(folder / "a.png", str(folder / "b"), "--images", str(folder / "?.bmp"))
    assert status == 0
    names = ["a.png", "b/broken.png", "b/c.JPG", "b/d.webp", "e.bmp"]
    assert by_id(rows) == {str(folder / name): captions.get(name) for name in names}
    assert f"5 rows, 1 of them errors (the first: '{folder}/b/broken.png')." in error
    assert "Passed over" not in error
    (folder / "b" / "x.heic").write_bytes(b"")
    status, again, error = run(folder / "a.png", str(folder / "b"), "--images", str(folder / "?.bmp"))
    assert (status, again) == (0, rows)
    assert error.endswith("Passed over: 1 .heic. Convert HEIC and the raw files of cameras to JPEG first, for Pillow "
                          "cannot read them.\n")  # fmt: skip
    (folder / "b" / "x.heic").unlink()


def test_a_plain_struct_of_bytes_and_paths(run, folder, captions, tmp_path):
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    cells = [{"bytes": (folder / name).read_bytes(), "path": None} for name in SEEDS]
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array(cells, kind)}), tmp_path / "rows.parquet")
    status, rows, _ = run(tmp_path / "rows.parquet")
    assert status == 0
    assert by_id(rows) == dict(enumerate(captions.values()))


def test_a_row_with_several_images_says_so(run, folder, captions, tmp_path):
    paths = [str(folder / name) for name in SEEDS]
    datasets.Dataset.from_dict({"image": [paths[:1], paths[:2], []]}).to_parquet(tmp_path / "rows.parquet")
    _, rows, _ = run(tmp_path / "rows.parquet", "--image_sources", "local")
    assert rows[0]["caption"] == captions["a.png"]
    assert "There are 2 images; this command asks about one" in rows[1]["error"]
    assert rows[2]["error"] == "There is no image."


def test_prompt_and_beams_are_used_and_recorded(run, folder, model, processor, tmp_path):
    _, rows, _ = run(folder, "--prompt", "What is this?", "--num_beams", "3", "--dtype", "float32")
    text = processor.apply_chat_template([{"role": "user", "content": "What is this?"}], add_generation_prompt=True)
    inputs = processor(images=Image.open(folder / "a.png"), text=text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW, num_beams=3)[0, inputs["input_ids"].shape[1] :]
    assert rows[0]["caption"] == processor.tokenizer.decode(ids, skip_special_tokens=True).lstrip()
    settings = json.loads((tmp_path / "captions.jsonl.run.json").read_text())["settings"]
    assert settings["generate_kwargs"] == {"max_new_tokens": NEW, "num_beams": 3, "do_sample": False}
    assert (settings["prompt"], settings["dtype"], settings["images"]) == ("What is this?", "float32", str(folder))


# --- Again ---


def test_a_second_run_does_nothing_and_one_with_another_prompt_is_refused(run, folder, monkeypatch):
    _, rows, first = run(folder)
    assert "Wrote " in first
    assert "5 rows, 1 of them errors" in first
    from transformers import AutoModelForImageTextToText

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *args, **kw: pytest.fail("loaded"))
    status, again, error = run(folder)
    assert (status, again) == (0, rows)
    assert "is finished: 5 rows; nothing to do" in error
    status, again, error = run(folder, "--prompt", "What is this?")
    assert (status, again) == (1, rows)
    assert "prompt was 'Provide a one-sentence" in error
    assert "choose another output, or remove" in error


def test_a_model_that_was_trained_anew_under_its_name_is_another(run, folder, model, processor, tmp_path, monkeypatch):
    own = tmp_path / "model"
    model.save_pretrained(own)
    processor.save_pretrained(own)
    _, rows, _ = run(folder, "--model", str(own))
    changed = tiny_model()
    changed.save_pretrained(own)
    assert run(folder, "--model", str(own))[0] == 0  # the very same weights
    with torch.no_grad():
        next(changed.parameters()).add_(1)
    changed.save_pretrained(own)
    status, again, error = run(folder, "--model", str(own))
    assert (status, again) == (1, rows)
    assert re.search(r"begun with other settings: files of the model was '\w+' and is now '\w+'\. Use the same", error)


def test_who_stops_it_hears_what_is_kept(run, folder, captions, monkeypatch):
    answer, generate = [], engine.generate

    def stopped(*args):
        answer.append(1)
        if len(answer) == 2:
            raise KeyboardInterrupt
        return generate(*args)

    monkeypatch.setattr(engine, "generate", stopped)
    status, rows, error = run(folder)
    assert (status, rows) == (130, None)
    assert "2 of 5 rows are kept in" in error and "give the same command again to go on from there" in error
    assert "Traceback" not in error
    _, rows, _ = run(folder)
    assert by_id(rows) == {**captions, BROKEN: None}


# --- Bad input ---


def test_sources_without_images_stop_before_the_model_is_loaded(refused, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "There are no images in" in refused(tmp_path / "empty")
    for name in (tmp_path / "list.txt", "list.txt", tmp_path / "photos", "a/b/c"):
        assert f"There is no {name}; give images, folders" in refused(name)
    assert "is no data set: leave --split, --id_column out" in refused(folder, "--split", "x", "--id_column", "y")


def test_dataset_without_the_column_split_or_kind(refused, dataset, tmp_path):
    saved = tmp_path / "saved"
    dataset.save_to_disk(saved)
    assert "has no column 'image'; its columns are picture, key." in refused(saved)
    assert "has no column 'name'" in refused(saved, "--image_column", "picture", "--id_column", "name")
    assert "leave the split val out" in refused(saved, "--split", "val")
    datasets.DatasetDict({"val": dataset, "test": dataset}).save_to_disk(tmp_path / "splits")
    assert "has no split 'train'; choose the split from val, test." in refused(tmp_path / "splits")
    datasets.Dataset.from_dict({"image": [1, 2], "id": ["x", "x"]}).save_to_disk(tmp_path / "numbers")
    assert "it must hold images, paths, URLs or bytes" in refused(tmp_path / "numbers")
    datasets.Dataset.from_dict({"image": ["p", "q"], "id": ["x", "x"]}).save_to_disk(tmp_path / "twice")
    assert "The id 'x' occurs more than once" in refused(tmp_path / "twice", "--id_column", "id")


def test_dataset_that_does_not_load(refused):
    assert "'some/dataset' cannot be read as a data set" in refused("some/dataset")


def test_model_that_is_missing_or_no_pheye(refused, folder, tmp_path):
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path / "clip")
    assert "clip model; give the folder or Hub id of a Pheye" in refused(folder, "--model", str(tmp_path / "clip"))
    refused(folder, "--model", str(tmp_path / "none"))


@pytest.mark.parametrize(
    "option",
    [("--batch_size", "0"), ("--batch_size", "x"), ("--num_beams", "-1"), ("--prompt", " "), ("--workers", "-1")],
)
def test_options_out_of_range(run, folder, option, capsys):
    with pytest.raises(SystemExit) as stop:
        run(folder, *option)
    assert stop.value.code == 2
    assert option[0] in capsys.readouterr().err


# --- As a command ---


@pytest.mark.once
def test_two_processes_write_the_file_that_one_writes(run, folder, model_folder, tmp_path):
    run(folder)
    # With --cpu, accelerate starts several processes by mpirun only; where no GPU is seen, this does it too.
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    output = tmp_path / "two.jsonl"
    options = ["--model", model_folder, "--images", folder, "--output", output, "--max_new_tokens", NEW]
    command = [sys.executable, "-m", *launch, "-m", "pheye.answering.caption", *options, "--batch_size", 1]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert output.read_bytes() == (tmp_path / "captions.jsonl").read_bytes()
    assert {path.name for path in tmp_path.glob("two*")} == {"two.jsonl", "two.jsonl.run.json"}
    assert json.loads((tmp_path / "two.jsonl.run.json").read_text())["details"]["processes"] == 2
