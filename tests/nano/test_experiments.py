"""All ways of training Pheye-nano are trained and asked, on tiny parts."""

import itertools
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_cosine_schedule_with_warmup

from pheye.nano import draw_data
from pheye.nano.comparing.ways import WAYS, build
from pheye.nano.experiments import TOGETHER, main, parse, rate_share
from pheye.nano.learning import kept_training
from pheye.nano.learning.features import FeatureStore, save_features
from pheye.nano.scoring.held_out import SIGN
from pheye.training.formats import Source
from pheye.training.mixture import Mixture

pytestmark = pytest.mark.once


def command_for(parts, data, output) -> list[str]:
    command = ["--parts", parts, "--data", data, "--output", output]
    command += ["--workers", 0, "--batch_size", 2, "--seeds", 1, "--count", 3]
    return [str(word) for word in command]


def test_ways_are_trained_and_asked_once(parts, tmp_path, capsys):
    data = draw_data.write_data(tmp_path / "data", "tasks", 6, workers=1, tiles_per_side=1)
    command = [*command_for(parts, data, tmp_path / "out"), "--tiles_per_side", "1", "--score_every", "2"]
    assert parse(command)["ways"] == list(WAYS)
    names = ("full", "fromage", "small_cap", "monkey")  # all are asked in test_connectors.py
    command += ["--steps", "3", "--ways", *names]
    assert main(command) == 0
    results = {name: tmp_path / "out" / f"{name}-0" / "result.json" for name in names}
    written = {}
    for name, path in results.items():
        result = json.loads(path.read_text())
        assert result["scores"][SIGN]["questions"] == 3 and result["seconds_per_step"] > 0 and result["steps"] == 3
        first, last = result["curve"]
        assert (first["step"], last["step"]) == (2, 3) and 0 < first["seconds"] <= last["seconds"]
        assert last["exact"] == result["scores"][SIGN]["exact"]  # the same pictures, after the same steps
        assert last["character_error"] == result["scores"][SIGN]["character_error"]
        assert math.isclose(last["loss"], result["loss"])  # a tenth of three steps is the last
        written[name] = path.stat().st_mtime_ns
    report = (tmp_path / "out" / "experiments.md").read_text()
    lines = {name: next(line for line in report.splitlines() if f"| {WAYS[name].title} |" in line) for name in names}
    assert (tmp_path / "out" / "experiments.png").stat().st_size > 1000
    full = json.loads(results["full"].read_text())
    cells = lines["full"].split(" | ")
    assert cells[1:4] == ["1", f"{full['parameters']:,}", "34"] and cells[10] == "3"
    assert cells[6] == ", ".join(f"{100 * one['exact']:.1f}" for one in full["scores"]["by_tertile"].values())
    assert lines["fromage"].split(" | ")[3] == "2" and lines["monkey"].split(" | ")[3] == "257"
    assert main(command) == 0
    assert {name: path.stat().st_mtime_ns for name, path in results.items()} == written
    command[command.index("--steps") + 1] = "4"
    assert main(command) == 1
    assert "was begun with other settings: steps was 3 and is now 4" in capsys.readouterr().err
    command[command.index("--steps") + 1] = "13"
    alone = command[: command.index("fromage")]
    assert main([*alone, "--output", str(tmp_path / "more")]) == 1
    assert "has 6 samples; 13 steps take 26, each up to 4 times" in capsys.readouterr().err


def test_minutes_in_place_of_steps_go_round_the_samples(parts, tmp_path, monkeypatch):
    clock = SimpleNamespace(process_time=itertools.count(step=0.25).__next__)
    monkeypatch.setattr(kept_training, "time", clock)
    data = draw_data.write_data(tmp_path / "data", "tasks", 2, workers=1, tiles_per_side=2)
    command = [*command_for(parts, data, tmp_path / "out"), "--tiles_per_side", "2", "--lora_sets", "0"]
    assert main([*command, "--ways", "full", "fromage", "--minutes", "0.01"]) == 0
    for name, keys in (("full", 5 * 17), ("fromage", 5)):
        result = json.loads((tmp_path / "out" / f"{name}-0" / "result.json").read_text())
        [end] = result["curve"]
        assert result["keys"] == keys and result["seconds_per_step"] == 0.25
        assert (
            result["steps"] == end["step"] == 3 and end["seconds"] == 0.8
        )  # more than 0.01 minutes, and of one batch
    assert "steps for 0.01 minutes of 2 samples" in (tmp_path / "out" / "experiments.md").read_text()


@pytest.mark.parametrize("eyes", ["parts", "parts_with_branch"])
def test_kept_features_train_as_pictures_do(eyes, request, tmp_path):
    parts = request.getfixturevalue(eyes)
    data = draw_data.write_data(tmp_path / "data", "tasks", 9, workers=1, tiles_per_side=1)
    options = ["--tiles_per_side", "1", "--lora_sets", "0", "--batch_size", "8", "--steps"]
    losses = {}
    for name in ("kept", "new"):
        command = [*command_for(parts, data, tmp_path / name), *options, "1", "--ways", "full", "prefix"]
        assert main(command + ["--keep_features"] * (name == "kept")) == 0
        for way in ("full", "prefix"):
            losses[name, way] = json.loads((tmp_path / name / f"{way}-0" / "result.json").read_text())["loss"]
    for way in ("full", "prefix"):  # of eight of the nine pictures
        assert losses["kept", way] == pytest.approx(losses["new", way], rel=0.02), way
    assert losses["new", "full"] != losses["new", "prefix"]
    [file] = (tmp_path / "kept" / "features-1").glob("*.safetensors")
    if eyes == "parts_with_branch":  # whose LoRA would drop while it trains
        model, processor = build(WAYS["full"], 0, tiles_per_side=1, lora_sets=0, parts=parts)
        store = FeatureStore(tmp_path, Mixture([Source(str(data), turns=None)], 0), processor, TOGETHER, seed=0)
        images = [store.sample(index)["images"] for index in range(TOGETHER)]
        save_features(tmp_path / "expected.safetensors", model.eval(), store.collator.open_images(images)[0])
        kept, expected = (load_file(path)["features"].float() for path in (file, tmp_path / "expected.safetensors"))
        assert torch.allclose(kept, expected, atol=1e-2)
    assert "Features of pictures were kept" in (tmp_path / "kept" / "experiments.md").read_text()
    assert "Features of pictures were kept" not in (tmp_path / "new" / "experiments.md").read_text()


def test_kept_features_are_of_one_tower_and_used_four_times(parts, tmp_path, capsys):
    data = draw_data.write_data(tmp_path / "data", "tasks", 8, workers=1, tiles_per_side=1)
    options = ["--tiles_per_side", "1", "--lora_sets", "0", "--keep_features", "--ways"]
    command = [*command_for(parts, data, tmp_path / "out"), *options]
    assert main([*command, "every4th", "--steps", "17"]) == 1
    assert "has 8 samples; 17 steps take 34, each up to 4 times" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    assert main([*command, "every4th", "--steps", "16"]) == 0
    result = tmp_path / "out" / "every4th-0" / "result.json"
    first = json.loads(result.read_text())
    result.unlink()  # as after a kill
    (tmp_path / "out" / "every4th-0" / "answers.jsonl").write_text("{}\n")
    assert main([*command, "every4th", "--steps", "16"]) == 0
    assert json.loads(result.read_text())["scores"] == first["scores"]
    other = draw_data.write_data(tmp_path / "other", "tasks", 8, workers=1, tiles_per_side=1)
    assert main([*command_for(parts, other, tmp_path / "out"), *options, "full", "--steps", "16"]) == 1
    assert "was begun with other settings: data" in capsys.readouterr().err
    for wrong in ([*command, "one_lora"], [*command, "full", "--lora_sets", "2"]):
        with pytest.raises(SystemExit):
            main(wrong)


def test_the_learning_rate_is_that_of_the_librarys_schedule():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 20, 200)
    for step in range(200):
        assert math.isclose(rate_share(step / 200), schedule.get_last_lr()[0], abs_tol=1e-9)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("way", ["every4th", "prefix", "monkey"])
def test_ways_with_other_blocks_are_refused_for_a_model_that_has_blocks(way, capsys):
    with pytest.raises(SystemExit):
        main(["--start", "x", "--data", "x", "--output", "y", "--ways", way])
    assert "with --start only full, k1, one_lora, no_lora;" in capsys.readouterr().err


def test_the_start_of_new_blocks_is_refused_for_blocks_that_have_learnt(capsys):
    with pytest.raises(SystemExit):
        main(["--start", "x", "--data", "x", "--output", "y", "--initializer_range", "0.02"])
    assert "--initializer_range is of new blocks" in capsys.readouterr().err
    with_parts = ["--parts", "x", "--data", "x", "--output", "y"]
    assert parse(with_parts)["initializer_range"] == 0.04
    assert parse([*with_parts, "--initializer_range", "0"])["initializer_range"] == 0  # refused by the model's config


@pytest.mark.parametrize("options", [["--minutes", "0"], ["--minutes", "1", "--steps", "5"]])
def test_minutes_are_some_and_stand_alone(options):
    with pytest.raises(SystemExit):
        main(["--start", "x", "--data", "x", "--output", "y", *options])
