"""The ways of training Pheye-nano that are compared, on tiny parts: they differ as they say, and all of them run."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPVisionModel, PhiForCausalLM

from pheye.nano import draw_data
from pheye.nano.experiments import WAYS, build, main
from pheye.nano.held_out import SIGN

from tiny import tiny_model, tiny_processor, tiny_text_config, tiny_tokenizer, tiny_vision_config

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parts")
    CLIPVisionModel(tiny_vision_config(image_size=224, patch_size=56)).save_pretrained(folder / "vision")
    PhiForCausalLM(tiny_text_config(max_position_embeddings=2048)).save_pretrained(folder / "language")
    tiny_tokenizer().save_pretrained(folder / "language")
    return {"vision": folder / "vision", "language": folder / "language"}


def arguments(start: Path | None = None, vision: Path | None = None, language: Path | None = None) -> Namespace:
    return Namespace(start=start, vision=vision, language=language, tiles_per_side=3)


def test_each_way_differs_as_it_says(parts):
    models = {name: build(way, arguments(**parts), seed=0)[0] for name, way in WAYS.items()}
    assert models["full"].config.cross_attention_layers == (1, 3) and models["full"].config.views_per_image == 10
    assert models["k1"].config.views_per_image == 2 and models["every4th"].config.cross_attention_layers == (3,)
    assert models["one_lora"].pheye.global_lora is models["one_lora"].pheye.local_lora
    assert models["full"].pheye.global_lora is not models["full"].pheye.local_lora
    for name in ("no_lora", "every4th", "prefix"):
        assert not any("lora" in key for key, _ in models[name].named_parameters())
    for name, model in models.items():
        trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained and not any("vision_tower" in key for key in trained)
        assert any("language_model" in key for key in trained) == (name == "prefix")


def test_the_same_seed_gives_the_same_start(parts):
    first, again, other = (build(WAYS["full"], arguments(**parts), seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("tiles_per_side", [1, 3])
def test_ways_of_looking_begin_with_blocks_that_learnt(tiles_per_side, tmp_path, capsys):
    start = tiny_model(tiles_per_side=tiles_per_side)
    for name, parameter in start.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter)  # what it learnt
    old = start.pheye.cross_attention_blocks.state_dict()
    start.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    for name, views, lora in (("full", 10, True), ("k1", 2, True), ("one_lora", 10, True), ("no_lora", 10, False)):
        model, processor = build(WAYS[name], arguments(start=tmp_path), seed=0)
        assert model.config.views_per_image == processor.image_processor.tiles_per_side**2 + 1 == views
        second = [parameter for key, parameter in model.named_parameters() if "_lora." in key and key.endswith(".B")]
        assert bool(second) == lora and not any(parameter.any() for parameter in second)  # LoRA begins as nothing
        blocks = model.pheye.cross_attention_blocks.state_dict()
        assert all(torch.equal(blocks[key], learnt) for key, learnt in old.items())
        vectors, learnt = (one.pheye.view_encoding.view_embedding.weight for one in (model, start))
        assert torch.equal(vectors, learnt) == (vectors.shape == learnt.shape)
    for name in ("every4th", "prefix"):
        with pytest.raises(SystemExit):
            main(["--start", str(tmp_path), "--data", "x", "--output", "y", "--ways", name])
        assert "with --start only full, k1, one_lora, no_lora;" in capsys.readouterr().err


def test_the_prefix_model_says_what_its_forward_pass_predicts(parts):
    model, processor = build(WAYS["prefix"], arguments(**parts), 0)
    model.eval()
    inputs = processor(images=torch.rand(3, 60, 50), text="What?", return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        length = inputs["input_ids"].shape[1]
        assert torch.equal(ids[:, :length], inputs["input_ids"])
        logits = model(**inputs, labels=inputs["input_ids"]).logits
        assert logits.shape[1] == 10 * 17 + length
        assert logits[0, -1].argmax() == ids[0, length]
        other = model(**{**inputs, "pixel_values": inputs["pixel_values"] + 1}, labels=inputs["input_ids"]).logits
        assert not torch.allclose(logits[0, -1], other[0, -1])


def test_all_ways_are_trained_and_asked_once(parts, tmp_path):
    data = draw_data.write_data(tmp_path / "data", "tasks", 2, workers=1)
    command = ["--vision", parts["vision"], "--language", parts["language"], "--data", data, "--workers", "0"]
    command = [str(word) for word in (*command, "--output", tmp_path / "out")]
    command += ["--batch-size", "2", "--steps", "1", "--seeds", "1", "--count", "3"]
    main(command)
    results = {name: tmp_path / "out" / f"{name}-0" / "result.json" for name in WAYS}
    written = {}
    for name, path in results.items():
        result = json.loads(path.read_text())
        assert result["scores"][SIGN]["questions"] == 3 and result["seconds_per_step"] > 0
        written[name] = path.stat().st_mtime_ns
    report = (tmp_path / "out" / "experiments.md").read_text()
    assert all(way.title in report for way in WAYS.values())
    tertiles = json.loads(results["full"].read_text())["scores"]["by_tertile"].values()
    expected = ", ".join(f"{100 * one['exact']:.1f}" for one in tertiles)
    assert next(line for line in report.splitlines() if WAYS["full"].title in line).split(" | ")[2] == expected
    main(command)
    assert {name: path.stat().st_mtime_ns for name, path in results.items()} == written
    with pytest.raises(ValueError, match="steps was 1, now 2"):
        main([*command[:-5], "2", *command[-4:]])
    with pytest.raises(ValueError, match="has 2 samples; 2 steps take 4"):
        main([*command[:-5], "2", *command[-4:], "--ways", "full", "--output", str(tmp_path / "more")])
