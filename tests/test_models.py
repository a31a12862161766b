"""Which model a folder or Hub id stands for, and folders that are no whole model."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from pheye.common.command import InputError
from pheye.common.models import find_model


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
    assert find_model(str(folder)) != identity


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
