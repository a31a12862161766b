"""Which files are read, from a folder and from the Hub, and what is refused; nothing in a checkpoint runs."""

import json
import pickle
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from pheye import convert_checkpoint as converter
from pheye.conversion import reading

from conversion_fixtures import make_tensors, refuse, small_config, stored, write

pytestmark = pytest.mark.once


@pytest.fixture
def tensors():
    return make_tensors(small_config())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"level": 1}, "level 1, which exists in the published code as a number only and cannot run"),
        ({"level": 4}, "level 4, which exists in the published code as a number only and cannot run"),
        ({"level": 7}, "level 7, which is unknown"),
        ({"level": True}, "level True"),
        ({"from_layer": 4}, "leave no cross-attention block"),
        ({"reduce": 0}, "reduce 0, which is no integer of at least 1"),
        ({"cross_interval": 9}, "leave no cross-attention block"),
        ({"encoder": 3}, "encoder 3, which is no name"),
        ({"decoder": "nowhere"}, "'nowhere' is neither a folder nor a Hub repo"),
        ({"decoder": "../escape/decoder"}, "neither a folder nor a Hub repo"),
    ],
)
def test_settings_that_make_no_model_are_refused_with_the_reason(tmp_path, tensors, capsys, settings, reason):
    write(tmp_path / "escape", tensors)
    assert reason in refuse(capsys, write(tmp_path / "source", tensors, **settings), tmp_path / "out")


def test_missing_settings_and_files_are_named(tmp_path, tensors, capsys):
    source = write(tmp_path / "source", tensors)
    settings = json.loads((source / "config.json").read_text())
    del settings["reduce"], settings["decoder"]
    (source / "config.json").write_text(json.dumps(settings))
    assert "lacks decoder, reduce" in refuse(capsys, source, tmp_path / "out")
    (source / "config.json").write_text("{")
    assert "could not be read as JSON" in refuse(capsys, source, tmp_path / "out")
    source = write(tmp_path / "no-weights", tensors)
    (source / "checkpoint.pt").unlink()
    assert "has no checkpoint.pt" in refuse(capsys, source, tmp_path / "out")


# --- Safety ---


class Malice:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_tries_to_run_code_is_refused_and_nothing_runs(tmp_path, tensors, capsys, zipped):
    traces = tmp_path / "ran"
    source = write(tmp_path / "source", tensors)
    torch.save({**tensors, "evil": Malice(traces)}, source / "checkpoint.pt", _use_new_zipfile_serialization=zipped)
    error = refuse(capsys, source, tmp_path / "out")
    assert ("is refused; nothing of it was run" if zipped else "is no whole checkpoint in torch's zip format") in error
    assert not traces.exists()
    torch.load(source / "checkpoint.pt", weights_only=False)
    assert traces.exists()  # it would have run


def test_broken_checkpoints_are_refused(tmp_path, tensors, capsys):
    source = write(tmp_path / "source", tensors)
    path = source / "checkpoint.pt"
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", pickle.dumps({"a": 1})):
        path.write_bytes(broken)
        assert "is no whole checkpoint" in refuse(capsys, source, tmp_path / "out")
    torch.save([torch.zeros(2)], path)
    assert "holds no dict of named tensors" in refuse(capsys, source, tmp_path / "out")


# --- The Hub ---


def test_options_override_names_and_folders_come_before_the_hub(tmp_path, tensors, monkeypatch):
    source = write(tmp_path / "source", tensors, encoder="gone", decoder="gone", tokenizer="gone")
    (source / "decoder").rename(tmp_path / "decoder")
    (source / "encoder").rename(tmp_path / "encoder")
    monkeypatch.setattr(reading, "snapshot_download", None)  # no call to the Hub
    options = {part: str(tmp_path / folder) for part, folder in
               {"encoder": "encoder", "decoder": "decoder", "tokenizer": "decoder"}.items()}  # fmt: skip
    converter.convert(str(source), tmp_path / "out", **options)
    assert stored(tmp_path / "out")


def test_only_configs_and_tokenizer_of_the_parts_are_fetched(tmp_path, tensors, monkeypatch):
    source = write(tmp_path / "source", tensors, encoder="a/vit", decoder="b/lm", tokenizer="b/lm")
    hub = {"a/vit": source / "encoder", "b/lm": source / "decoder"}
    for folder in hub.values():
        (folder / "model.safetensors").write_text("large")
        (folder / "pytorch_model.bin").write_text("large")
    fetched = set()

    def download(repo, allow_patterns, revision=None):
        for path in hub[repo].iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                fetched.add((repo, path.name))
        return str(hub[repo])

    monkeypatch.setattr(reading, "snapshot_download", download)
    converter.convert(str(source), tmp_path / "out")
    assert {("a/vit", "config.json"), ("b/lm", "config.json"), ("b/lm", "tokenizer.json")} <= fetched
    assert not [name for _, name in fetched if "model" in name]
    data = ModelCard.load(tmp_path / "out" / "README.md", ignore_metadata_errors=False).data
    assert data.base_model == ["a/vit", "b/lm"]
