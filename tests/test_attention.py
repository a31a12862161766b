"""The attention command: one image, Figure 4, and what stops it."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pheye.common.command import InputError
from pheye.evaluation import word_attention
from pheye.evaluation.attention import (
    main,
    read_prompts,
)
from pheye.evaluation.word_attention import AttendedAnswer, split_words

from tiny import tiny_config, tiny_image, tiny_model, tiny_processor


def one_hot(size, index):
    weights = np.zeros(size)
    weights[index] = 1
    return weights


# --- Figure 4 ---


def samples_file(folder, rows):
    for index, row in enumerate(rows):
        name = f"{index}.png"
        tiny_image(index, 20, 20).save(folder / name)
        rows[index] = {"image": name, "prompt": f"question {index}", **row}
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_mean_share_of_the_global_view_per_block_and_tertile(monkeypatch, tmp_path, model, model_folder):
    areas = [0.5, 0.1, 0.2, 0.05, 0.9, 0.7, 0.6]
    path = samples_file(tmp_path, [{"boxes_area": area} for area in areas])
    shares = np.random.default_rng(0).random((7, 3, 2))  # (samples, tokens, blocks)
    size, tokens = model.config.tokens_per_image, model.config.tokens_per_view

    def fake_answer(model, processor, image, prompt, max_new_tokens):
        index = int(prompt.split()[1])
        if index == 6:
            return AttendedAnswer("", [], iter([]))
        weights = shares[index][..., None] * one_hot(size, 2) + (1 - shares[index][..., None]) * one_hot(size, tokens)
        return AttendedAnswer("a b", [("a", [0]), ("b", [1, 2])], iter(weights))

    monkeypatch.setattr(word_attention, "answer_with_attention", fake_answer)
    output = tmp_path / "figure" / "share.png"
    assert main(["--model", str(model_folder), "--data", str(path), "--output", str(output), "--device", "cpu"]) == 0
    result = json.loads(output.with_suffix(".json").read_text())
    groups = {"small": [3, 1, 2], "medium": [0], "large": [5, 4]}  # the last sample of the middle had no words
    assert [group["tertile"] for group in result["tertiles"]] == list(groups)
    for group, members in zip(result["tertiles"], groups.values(), strict=True):
        assert group["samples"] == len(members)
        assert group["global_share"] == pytest.approx(shares[members].mean((0, 1)), abs=1e-6)
    assert result["left_out"] == [{"line": 7, "error": "The answer has no words."}]
    assert Image.open(output).width > 300


def test_tertiles_may_be_given_or_left_out(tmp_path):
    given = read_prompts(samples_file(tmp_path, [{"tertile": "large"}, {"tertile": "small"}]))
    assert [sample["tertile"] for sample in given] == ["large", "small"]
    plain = read_prompts(samples_file(tmp_path, [{}]))
    assert plain[0]["tertile"] is None
    assert plain[0]["image"] == tmp_path / "0.png"


def test_images_may_be_in_another_folder(tmp_path):
    path = samples_file(tmp_path, [{"image": "x.png"}])
    (tmp_path / "images").mkdir()
    tiny_image().save(tmp_path / "images" / "x.png")
    assert read_prompts(path, tmp_path / "images")[0]["image"] == tmp_path / "images" / "x.png"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": ""}], "no `prompt`"),
        ([{"image": 5}], "no `image`"),
        ([{"image": "none.png"}], r"no image .*none\.png; give the folder"),
        ([{"image": "../a.png"}], r"Line 1 .*'\.\./a\.png' leads out of the folder"),
        ([{"image": "/etc/passwd"}], r"Line 1 .*leads out of the folder"),
        ([{"boxes_area": 0.1}, {}], "Line 2 .* has no `boxes_area`, but line 1 has"),
        ([{"boxes_area": 12}] * 3, "boxes_area is 12"),
        ([{"boxes_area": 0.1}] * 2, "at least 3"),
        ([{"tertile": "tiny"}], "'tiny', not one of small, medium, large"),
    ],
)
def test_samples_that_cannot_be_used_are_refused(tmp_path, rows, message):
    path = samples_file(tmp_path, rows)
    with pytest.raises(InputError, match=message):
        read_prompts(path)


# --- Command ---


def test_command_draws_one_image(tmp_path, model_folder, capsys):
    tiny_image().save(tmp_path / "photo.jpg")
    output = tmp_path / "out" / "attention.png"
    arguments = ["--image", str(tmp_path / "photo.jpg"), "--prompt", "What is it?", "--max_new_tokens", "5"]
    assert main(["--model", str(model_folder), *arguments, "--output", str(output), "--device", "cpu"]) == 0
    result = json.loads(output.with_suffix(".json").read_text())
    assert Image.open(output).width > 300
    assert (result["prompt"], result["model"]) == ("What is it?", str(model_folder))
    assert result["answer"] in capsys.readouterr().out
    for word in result["words"]:
        assert np.array(word["by_block"]).sum(1) == pytest.approx(1, abs=1e-4)


def test_command_draws_the_figure_and_goes_on_after_a_broken_image(tmp_path, model_folder, capsys):
    path = samples_file(tmp_path, [{}, {}, {}])
    (tmp_path / "1.png").write_bytes(b"broken")
    output = tmp_path / "share.png"
    arguments = ["--data", str(path), "--max_new_tokens", "3", "--output", str(output), "--device", "cpu"]
    assert main(["--model", str(model_folder), *arguments]) == 0
    result = json.loads(output.with_suffix(".json").read_text())
    assert [(group["tertile"], group["samples"]) for group in result["tertiles"]] == [("all", 2)]
    assert all(0 < share < 1 for share in result["tertiles"][0]["global_share"])
    assert [entry["line"] for entry in result["left_out"]] == [2]
    assert "1 of 3 samples were left out, the first line 2: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "a.png"], "--image and --prompt, or --data"),
        (["--prompt", "What?"], "--image and --prompt, or --data"),
        (["--image", "a.png", "--prompt", "What?", "--data", "b.jsonl"], "--image and --prompt, or --data"),
        (["--image", "a.png", "--prompt", " "], "--prompt is empty"),
        (["--data", "b.jsonl", "--output", "out.jpg"], "must end in .png"),
        (["--image", "a.png", "--prompt", "What?", "--images", "b"], "--images goes with --data"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["--model", "none", "--output", "out.png", *arguments])
    assert message in capsys.readouterr().err


def test_command_stops_before_it_loads_a_model(tmp_path, monkeypatch, capsys):
    tiny_image().save(tmp_path / "0.png")
    common = ["--model", str(tmp_path / "no-model"), "--output", str(tmp_path / "out.png")]
    assert main([*common, "--image", str(tmp_path / "none.png"), "--prompt", "What?"]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main([*common, "--data", str(tmp_path / "none.jsonl")]) == 1
    assert "There is no file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*common, "--data", str(samples_file(tmp_path, [{}]))]) == 1
    assert 'pip install ".[eval]"' in capsys.readouterr().err


def test_shares_on_canvases_are_those_of_the_views_that_each_image_has(tmp_path):
    """Nothing stubbed: an image of 1 x 3 crops has four views, and one of 2 x 2 five; the reference is a plain pass
    over each whole conversation."""
    config = tiny_config(canvases=[[1, 3], [2, 2]])
    model, processor = tiny_model(config), tiny_processor(config)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    tertiles, sizes = ["small", "large", "large"], [(120, 37), (50, 50), (110, 40)]
    path = samples_file(tmp_path, [{"tertile": tertile} for tertile in tertiles])
    expected = []
    for number, size in enumerate(sizes):
        image = tiny_image(number, *size)
        image.save(tmp_path / f"{number}.png")
        text = processor.apply_chat_template(
            [{"role": "user", "content": f"question {number}"}], add_generation_prompt=True
        )
        inputs = processor(images=image, text=text, return_tensors="pt")
        assert inputs["image_grids"].tolist() == [[[1, 3] if number != 1 else [2, 2]]]
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        start = inputs["input_ids"].shape[1]
        places = [place for _, found in split_words(processor.tokenizer, ids[0, start:].tolist()) for place in found]
        inputs["input_ids"], inputs["attention_mask"] = ids[:, :-1], torch.ones_like(ids[:, :-1])
        with torch.no_grad():
            blocks = model(**inputs, output_cross_attentions=True).cross_attentions  # (1, H, T, N) each
        views = [block[0].mean(0).unflatten(-1, (-1, config.tokens_per_view)).sum(-1) for block in blocks]  # (T, V)
        assert {share.shape[1] for share in views} == {4 if number != 1 else 5}
        expected.append(np.array([share[[start - 1 + place for place in places], 0].mean() for share in views]))
    arguments = ["--model", str(tmp_path / "model"), "--data", str(path), "--output", str(tmp_path / "out.png")]
    assert main([*arguments, "--max_new_tokens", "4", "--dtype", "float32", "--device", "cpu"]) == 0
    small, large = json.loads((tmp_path / "out.json").read_text())["tertiles"]
    assert small["global_share"] == pytest.approx(expected[0], abs=1e-4)
    assert large["global_share"] == pytest.approx((expected[1] + expected[2]) / 2, abs=1e-4)
    assert not np.allclose(expected[0], 1 / 4, atol=1e-2)
