"""Which files are read, from a folder and from the Hub, and what is refused; nothing in a checkpoint runs."""

import json
import os
import pickle
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from pheye import convert_checkpoint as converter
from pheye.common.command import InputError
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
        ({"level": 3.0}, "level 3.0, which is unknown"),
        ({"level": [3]}, "level [3], which is unknown"),
        ({"level": {}}, "level {}, which is unknown"),
        ({"first_level": "no"}, "first_level 'no', which is neither true nor false"),
        ({"first_level": 1}, "first_level 1, which is neither true nor false"),
        ({"reduce": 10**4000}, "cross_attention_reduction=1000"),
        ({"cross_interval": "x" * 10**5}, "which is no integer of at least 1"),
        ({"from_layer": 4}, "leave no cross-attention block"),
        ({"reduce": 0}, "reduce 0, which is no integer of at least 1"),
        ({"cross_interval": 9}, "leave no cross-attention block"),
        ({"encoder": 3}, "encoder 3, which is no name"),
        ({"decoder": "nowhere"}, "'nowhere' is neither a folder nor a Hub repo"),
        ({"decoder": "../escape/decoder"}, "neither a folder nor a Hub repo"),
        ({"decoder": "x" * 5000}, "neither a folder nor a Hub repo"),
        ({"decoder": "\0"}, "neither a folder nor a Hub repo"),
        ({"decoder": "."}, "config.json names no model_type"),
    ],
)
def test_settings_that_make_no_model_are_refused_with_the_reason(tmp_path, tensors, capsys, settings, reason):
    write(tmp_path / "escape", tensors)
    error = refuse(capsys, write(tmp_path / "source", tensors, **settings), tmp_path / "out")
    assert reason in error
    assert error.count("\n") == 2
    assert len(error) < 1200


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


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000, '{"level": ' + "9" * 10_000 + "}", "\udcff"])
@pytest.mark.parametrize("file", ["config.json", "encoder/config.json", "decoder/config.json"])
def test_a_file_that_is_no_json_object_is_refused_by_name(tmp_path, tensors, file, text):
    path = write(tmp_path / "source", tensors) / file
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="could not be read as JSON") as caught:
        if file == "config.json":
            reading.read_settings(path, {})
        else:
            reading.read_config(path.parent, file.split("/")[0], tensors)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of Unix")
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="there is no such file"):
        reading.read_settings(tmp_path / "config.json", {})


@pytest.mark.parametrize(
    ("part", "config", "reason"),
    [
        ("encoder", {}, "names no model_type"),  # transformers takes it from the folder's name, which has "clip" in it
        ("encoder", {"model_type": "nothing-known"}, "describes no encoder"),
        ("encoder", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}, "describes no encoder"),
        ("encoder", {"model_type": "clip_vision_model", "hidden_size": 1_000_000}, "describes no encoder"),
        ("encoder", {"model_type": "clip_vision_model", "num_hidden_layers": 10**9}, "it has 1,000,000,000 layers"),
        ("encoder", {"model_type": "clip", "vision_config": {"num_hidden_layers": 10**9}}, "1,000,000,000 layers"),
        ("decoder", {"model_type": "phi", "num_hidden_layers": 10**9}, "it has 1,000,000,000 layers"),
        ("decoder", {"model_type": "phi", "hidden_size": "a"}, "describes no decoder"),
        ("decoder", {"model_type": "phi", "hidden_size": -1}, "make no model"),
        ("decoder", {"model_type": "phi", "vocab_size": -1}, "make no model"),
        ("decoder", {"model_type": "clip_vision_model"}, "make no model: text_config is a CLIPVisionConfig"),
        ("encoder", {"model_type": "phi"}, "make no model: vision_config is a PhiConfig"),
    ],
)
def test_a_config_that_makes_no_model_is_refused_with_the_reason(tmp_path, tensors, capsys, part, config, reason):
    source = write(tmp_path / "source-clip", tensors)
    (source / part / "config.json").write_text(json.dumps(config))
    error = refuse(capsys, source, tmp_path / "out")
    assert reason in error
    assert error.count("\n") == 2


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


PICKLES = {
    "empty": b"",
    "without end": b"\x80\x02}",
    "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xffabc.",
    "a memo of nothing": b"\x80\x02h\x07.",
    "an unhashable key": b"\x80\x02}](K\x01s.",
    "a tuple of nothing": b"\x80\x02t.",
    "no UTF-8": b"\x80\x02X\x02\0\0\0\xff\xff.",
    "a storage without numbers": b"\x80\x02X\x07\0\0\0storageq\0\x85Q.",
    "a parameter of a text": b"\x80\x02ctorch._utils\n_rebuild_parameter\nX\x01\0\0\0a\x89}\x87R.",
}


@pytest.mark.parametrize("case", PICKLES)
def test_errors_of_the_unpickler_are_of_one_kind(tmp_path, case):
    path = tmp_path / "checkpoint.pt"
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records:
            archive.writestr(name, PICKLES[case] if name.endswith("/data.pkl") else data)
    with pytest.raises(InputError, match=r"is no whole checkpoint|holds something other than tensors") as caught:
        reading.read_tensors(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


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
