"""Canvases are trained and asked; their tables, from answers of which one knows what comes out."""

import json

import pytest
import torch

from pheye.nano import canvases, draw_data
from pheye.nano.canvases import WAYS, build, on_canvas, write_report
from pheye.nano.learning import kept_training
from pheye.nano.scoring.held_out import ASPECTS, held_out_pictures

from tiny import tiny_config, tiny_model, tiny_processor, tiny_text_config

pytestmark = pytest.mark.once


def cells_of(path) -> dict[str, list[list[str]]]:
    cells = {}
    for line in path.read_text().splitlines():
        name, *others = line.strip("| ").split(" | ")
        cells.setdefault(name, []).append(others)
    return cells


def test_held_out_pictures_have_the_shape_of_their_set_and_letters_alike():
    for shape, aspect in ASPECTS.items():
        for picture in held_out_pictures(3, letters=shape):
            width, height = picture.image().size
            assert width / height == pytest.approx(aspect, rel=0.01)
            assert 0.02 < picture.cap_height * height / (width * height) ** 0.5 < 0.065


def test_heights_are_those_in_the_crops():
    [picture] = held_out_pictures(1, letters="16:9")
    height, views = on_canvas(picture, tiny_config(tiles_per_side=3))
    assert height == pytest.approx(picture.cap_height * 3 * 224) and views == 10
    height, views = on_canvas(picture, tiny_config(canvases="fila"))
    width = 2 * 224  # it takes 2 x 2 crops, and fills them from left to right
    assert height == pytest.approx(picture.cap_height * width * 9 / 16, rel=0.01) and views == 5


def test_fewer_crops_have_new_vectors_and_keep_the_rest(tmp_path):
    config = tiny_config(tiles_per_side=3)
    tiny_model(config).save_pretrained(tmp_path)
    tiny_processor(config).save_pretrained(tmp_path)
    (before, _), (model, processor) = (build(way, tmp_path, 0, "cpu") for way in ("stretched", "stretched_2"))
    assert model.config.tiles_per_side == processor.image_processor.tiles_per_side == 2
    old, new = before.state_dict(), model.state_dict()
    name = "pheye.view_encoding.view_embedding.weight"
    assert {part for part in old if not torch.equal(new[part], old[part])} == {name}
    assert torch.equal(new[name][0], old[name][0])
    torch.testing.assert_close(new[name][1:].mean(0), old[name][1:].mean(0))
    trained = [{part for part, values in one.named_parameters() if values.requires_grad} for one in (before, model)]
    assert trained[0] == trained[1] and name in trained[0] and not any("lora" in part for part in trained[1])


def test_ways_are_trained_once_and_asked_about_each_shape(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kept_training, "TOKENS", 2)
    model = tmp_path / "model"
    tiny_model(text_config=tiny_text_config(max_position_embeddings=2048)).save_pretrained(model)
    tiny_processor().save_pretrained(model)
    data = draw_data.write_data(tmp_path / "data", "tasks", 16, workers=1)
    command = ["--model", model, "--data", data, "--output", tmp_path / "out", "--steps", 2, "--seeds", 1]
    command = [str(word) for word in [*command, "--count", 3, "--ways", "stretched", "fila"]]
    assert canvases.main(command) == 0
    for name, views in (("stretched", {5}), ("fila", {3, 4, 5})):
        rows = [json.loads(line) for line in (tmp_path / "out" / f"{name}-0" / "answers.jsonl").open()]
        assert len(rows) == 3 * len(ASPECTS) == len({row["id"] for row in rows})
        assert {row["views"] for row in rows} <= views
    cells = cells_of(tmp_path / "out" / "canvases.md")
    assert len(cells[WAYS["stretched"].title]) == len(cells[WAYS["fila"].title]) == 3
    monkeypatch.setattr(canvases, "train", None)
    assert canvases.main(command) == 0
    assert canvases.main([*command, "--rate", "1"]) == 1
    assert "rate was 0.0003 and is now 1.0" in capsys.readouterr().err


def test_tables_say_where_each_way_reads(tmp_path):
    """Stretched, panoramas are lost; on canvases, upright ones, whose letters are the lowest."""
    lost = {"stretched": "16:9", "fila": "1:3"}
    results = []
    for way, shape in lost.items():
        rows = []
        for own in ASPECTS:
            for number in range(10):
                row = {"id": f"{own}-{number}", "shape": own, "views": 5, "pixels": 8.0 if own == "1:3" else 21.0}
                rows.append({**row, "reference": "WORD", "answer": "WORT" if own == shape else "WORD"})
        results.append({"way": way, "seed": 0, "seconds_per_step": 1.0, "rows": rows})
    write_report(results, {"steps": 1, "rate": 1, "model": "m", "count": 10}, "a machine", tmp_path)
    cells = cells_of(tmp_path / "canvases.md")
    by_shape, sizes, heights = cells[WAYS["stretched"].title]
    everything, nothing = "100.0 (100.0 to 100.0)", "0.0 (0.0 to 0.0)"
    assert by_shape == [everything, everything, nothing, everything, "75.0", "1.00"]
    assert sizes == ["21.0 in 5.0"] * 3 + ["8.0 in 5.0"]
    assert heights == ["100.0 (10)", "", "", "66.7 (30)"]
    [difference] = cells[f"{WAYS['fila'].title}, less {WAYS['stretched'].title}"]
    assert difference[:4] == [nothing, nothing, everything, "-100.0 (-100.0 to -100.0)"]
    assert difference[4].startswith("0.0 (-")
