"""Canvases are trained and asked; their tables, from answers of which one knows what comes out."""

import json

import pytest

from pheye.nano import canvases, draw_data
from pheye.nano.canvases import TITLES, on_canvas, write_report
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


def test_ways_are_trained_once_and_asked_about_each_shape(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kept_training, "TOKENS", 2)
    monkeypatch.setattr(canvases, "WAYS", {"stretched": None, "fila": "fila"})
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
    assert len(cells[TITLES["stretched"]]) == len(cells[TITLES["fila"]]) == 3
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
    by_shape, sizes, heights = cells[TITLES["stretched"]]
    everything, nothing = "100.0 (100.0 to 100.0)", "0.0 (0.0 to 0.0)"
    assert by_shape == [everything, everything, nothing, everything, "75.0", "1.00"]
    assert sizes == ["21.0 in 5.0"] * 3 + ["8.0 in 5.0"]
    assert heights == ["100.0 (10)", "", "", "66.7 (30)"]
    [difference] = cells[f"{TITLES['fila']}, less stretched"]
    assert difference[:4] == [nothing, nothing, everything, "-100.0 (-100.0 to -100.0)"]
    assert difference[4].startswith("0.0 (-")
