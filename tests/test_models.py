"""Which model a folder or Hub id stands for, and folders that are no whole model."""

import json
import shutil

import pytest
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from pheye.__main__ import main
from pheye.common.command import InputError
from pheye.common.models import find_model

from toys import gqa_toy, write


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def test_a_folder_is_told_by_its_files_and_not_by_its_name(folder, tmp_path):
    identity = find_model(str(folder))
    assert find_model(str(shutil.copytree(folder, tmp_path / "copy"))) == identity
    (folder / "README.md").write_text("Another card is no other model.")
    assert find_model(str(folder)) == identity
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: weight + 0.001 for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    assert find_model(str(folder)) != identity


def test_other_settings_are_another_model(folder):
    identity = find_model(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "local_lora_alpha": 1.0}))
    other = find_model(str(folder))
    assert other != identity
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert find_model(str(folder)) not in (identity, other)


@pytest.mark.parametrize("name", ["generation_config.json", "vocab.json", "merges.txt"])
def test_files_that_change_answers_are_part_of_the_model(folder, name):
    identity = find_model(str(folder))
    (folder / name).write_text('{"repetition_penalty": 5.0}')
    assert find_model(str(folder)) != identity


def test_a_folder_is_told_by_its_files_wherever_it_lies(folder, tmp_path):
    inside = shutil.copytree(folder, tmp_path / "snapshots" / "mine")
    assert find_model(str(inside)) == find_model(str(folder))


def test_a_folder_has_no_revision(folder):
    with pytest.raises(InputError, match=r"no revision 'v1'; leave --revision out"):
        find_model(str(folder), "v1")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("trained.safetensors", "load_trained"),
        ("run.json", "not finished"),
        ("adapter_config.json", "PEFT adapter"),
        ("notes.txt", "has no config.json"),
    ],
)
def test_a_folder_without_a_model_is_refused_with_what_it_is(tmp_path, file, said):
    (tmp_path / file).write_text("{}")
    with pytest.raises(InputError, match=said) as error:
        find_model(str(tmp_path))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", '{"model_type": "llava"}'])
def test_a_config_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"no whole JSON object|is a llava model"):
        find_model(str(tmp_path))


@pytest.mark.parametrize("command", ["ask", "caption", "evaluate", "attention"])
def test_every_command_that_answers_says_what_a_folder_is(command, tmp_path, capsys):
    PartialState._reset_state()
    run, image = tmp_path / "run", tmp_path / "n0.jpg"
    run.mkdir()
    (run / "run.json").write_text("{}")
    data, output = write(gqa_toy(), tmp_path), ["--output", str(tmp_path / "out.png")]
    options = {
        "ask": [str(run), str(image), "What?"],
        "caption": ["--model", str(run), "--images", str(image), *output],
        "evaluate": ["--model", str(run), "--task", "gqa", *data, *output],
        "attention": ["--model", str(run), "--image", str(image), "--prompt", "What?", *output],
    }
    assert main([command, *options[command]]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run} holds a training run that is not finished: give its command again.")
    assert not (tmp_path / "out.png").exists()
