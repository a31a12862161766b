"""Tokenizer and image processor are the source's own, or there is no conversion."""

import json
import shutil
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer
from transformers import AutoProcessor, LlamaTokenizer
from transformers.image_utils import OPENAI_CLIP_STD

from pheye import convert_checkpoint as converter
from pheye.common.command import InputError
from pheye.conversion import processor

from conversion_fixtures import GOLDEN, make_tensors, refuse, small_config, write
from tiny import tiny_tokenizer

pytestmark = pytest.mark.once


@pytest.fixture
def tensors():
    return make_tensors(small_config())


# --- Image processor ---


def test_the_processor_has_the_encoders_mean_and_std(tmp_path, tensors):
    source = write(tmp_path / "source", tensors)
    published = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 1], "size": {"shortest_edge": 224}}
    (source / "encoder" / "preprocessor_config.json").write_text(json.dumps(published))
    converter.convert(str(source), tmp_path / "out", verify=True)
    image_processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True).image_processor
    assert list(image_processor.image_mean) == [0.5, 0.4, 0.3]
    assert list(image_processor.image_std) == [0.1, 0.2, 1]
    assert dict(image_processor.size) == {"height": 32, "width": 32}  # what the vision tower takes


@pytest.mark.parametrize(
    "text",
    [
        '{"image_std": [0.0, 0.0, 0.0]}',
        '{"image_std": [0.2, 0.2, -0.2]}',
        '{"image_std": [58.4, 57.1, 57.4]}',
        '{"image_std": [true, true, true]}',
        '{"image_std": 0.5}',
        '{"image_mean": [NaN, 0.5, 0.5]}',
        '{"image_mean": [0.5, 0.5, Infinity]}',
        '{"image_mean": [0.1, 0.1, 0.1, 0.1]}',
        '{"image_mean": [123.7, 116.3, 103.5]}',
        '{"image_mean": "abc"}',
        '{"image_mean": null}',
        "[]",
        "{",
        "",
        "[" * 100_000,
        '{"image_mean": ' + "9" * 10_000 + "}",
    ],
)
def test_a_mean_or_std_that_cannot_be_right_is_refused(tmp_path, text):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        processor.read_image_processor(conversion_of(tmp_path))
    assert str(path) in str(caught.value)
    assert "Download it again" in str(caught.value)
    assert "\n" not in str(caught.value)


def conversion_of(encoder, **kwargs):
    return SimpleNamespace(config=SimpleNamespace(**{**vars(small_config()), **kwargs}), folders={"encoder": encoder})


def test_other_encoders_than_clip_must_tell_their_mean_and_std(tmp_path):
    assert processor.read_image_processor(conversion_of(tmp_path)).size["height"] == 32
    siglip = SimpleNamespace(model_type="siglip_vision_model", image_size=32)
    with pytest.raises(
        InputError, match=r"preprocessor_config\.json could not be read as JSON: there is no such file"
    ):
        processor.read_image_processor(conversion_of(tmp_path, vision_config=siglip))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    assert list(processor.read_image_processor(conversion_of(tmp_path)).image_std) == OPENAI_CLIP_STD
    with pytest.raises(InputError, match="has image_std None"):
        processor.read_image_processor(conversion_of(tmp_path, vision_config=siglip))


# --- Tokenizer ---


def without(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return change


def with_file(name, text):
    return lambda folder: (folder / name).write_text(text)


def with_vocabulary(size):
    """A tokenizer that is whole, and larger or smaller than the language model's 384."""

    def change(folder):
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        extra = [f"<{number}>" for number in range(size)]
        alphabet = {token: number for token, number in tokenizer["model"]["vocab"].items() if len(token) == 1}
        tokens = ["<|endoftext|>", *alphabet, *extra][:size]
        tokenizer["model"] |= {"vocab": {token: number for number, token in enumerate(tokens)}, "merges": []}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    return change


CASES = {
    "no files": (without("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"), "no such file"),
    "no tokenizer.json": (without("tokenizer.json"), "no tokenizer that can be loaded"),
    "no tokenizer_config.json": (without("tokenizer_config.json"), "tokenizer_config.json could not be read"),
    "torn tokenizer.json": (with_file("tokenizer.json", "{"), "no tokenizer that can be loaded"),
    "empty tokenizer.json": (with_file("tokenizer.json", "{}"), "no tokenizer that can be loaded"),
    "deep tokenizer.json": (with_file("tokenizer.json", "[" * 100_000), "no tokenizer that can be loaded"),
    "torn tokenizer_config.json": (with_file("tokenizer_config.json", '{"eos'), "could not be read as JSON"),
    "a list": (with_file("tokenizer_config.json", "[]"), "it holds a list, not an object"),
    "larger": (with_vocabulary(385), "has 385 tokens where the language model has 384"),
    "far smaller": (with_vocabulary(300), "has 300 tokens where the language model has 384"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_tokenizer_that_is_not_whole_or_not_the_models_is_refused(tmp_path, case):
    change, reason = CASES[case]
    folder = shutil.copytree(GOLDEN / "x2-448" / "decoder", tmp_path / "decoder")
    change(folder)
    with pytest.raises(InputError, match=reason) as caught:
        processor.read_tokenizer(folder, 384)
    assert str(folder) in str(caught.value)
    assert "--tokenizer" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_a_little_padding_behind_it_is_the_models(tmp_path):
    folder = shutil.copytree(GOLDEN / "x2-448" / "decoder", tmp_path / "decoder")
    with_vocabulary(360)(folder)
    assert len(processor.read_tokenizer(folder, 384)) == 360


def test_a_folder_that_holds_no_tokenizer_is_refused(tmp_path, capsys):
    for option in ("encoder", "."):
        error = refuse(capsys, GOLDEN / "x2-448", tmp_path / "out", "--tokenizer", str(GOLDEN / "x2-448" / option))
        assert "tokenizer_config.json could not be read" in error
        assert error.count("\n") == 2


def test_what_transformers_makes_of_missing_files_is_no_tokenizer(tmp_path):
    """Whatever it makes up: none of the files is there that this class reads."""
    made_up = LlamaTokenizer()
    assert len(made_up) < 5
    made_up.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"turns 'What is written on the sign\?' into ''"):
        processor.read_tokenizer(tmp_path, len(made_up))


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert len(processor.read_tokenizer(tmp_path, 257)) == 257
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == 257
    with pytest.raises(InputError, match="has no token for the end of a text"):
        processor.read_tokenizer(tmp_path, 257)
