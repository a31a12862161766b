"""Ways to refine the image are trained and asked; their tables, from answers of which one knows what comes out."""

import json
from dataclasses import replace

import pytest
import torch

from pheye.nano import budgets, draw_data
from pheye.nano.budgets import WAYS
from pheye.nano.comparing.budget_tables import line_at, write_report

from tiny import tiny_model, tiny_processor, tiny_text_config

pytestmark = pytest.mark.once


def test_views_apart_do_not_see_each_other(tmp_path):
    """With them joined, as in Pheye, every view changes when one does."""
    tiny_model().save_pretrained(tmp_path)
    views = tiny_model().config.views_per_image
    for is_joined in (True, False):
        way = budgets.Way("", ((), (3,)), is_joined)
        model = budgets.build(way, tmp_path, 0, "cpu")
        [block] = model.pheye.self_attention_blocks
        torch.nn.init.normal_(block.to_out.weight)
        states = torch.randn(2, views * 5, model.config.vision_config.hidden_size)
        other = states.clone()
        other[:, :5] = torch.randn(2, 5, states.shape[-1])
        changed = (block(states) - block(other)).abs().amax(dim=(0, 2)).unflatten(0, (views, 5)).amax(dim=1) > 1e-6
        assert changed.tolist() == [True] + [is_joined] * (views - 1)
        assert hasattr(model.pheye, "router") and (model.pheye.router is not None) == is_joined


def test_ways_are_trained_once_and_asked_at_each_budget(tmp_path, monkeypatch, capsys):
    layers = {2: 1, 4: 3}
    tiny = {
        name: replace(way, budgets=tuple(tuple(layers[layer] for layer in budget) for budget in way.budgets))
        for name, way in WAYS.items()
    }
    monkeypatch.setattr(budgets, "WAYS", tiny)
    monkeypatch.setattr(budgets, "TOKENS", 2)
    model = tmp_path / "model"
    tiny_model(cross_attention_interval=1, text_config=tiny_text_config(max_position_embeddings=2048)).save_pretrained(
        model
    )
    tiny_processor().save_pretrained(model)
    data = draw_data.write_data(tmp_path / "data", "tasks", 16, workers=1)
    command = ["--model", model, "--data", data, "--output", tmp_path / "out", "--steps", 2, "--seeds", 1]
    command = [str(word) for word in [*command, "--count", 3, "--fine", 3, "--routed", 10]]
    assert budgets.main(command) == 0
    for name, way in tiny.items():
        result = json.loads((tmp_path / "out" / f"{name}-0" / "result.json").read_text())
        rows = [json.loads(line) for line in (tmp_path / "out" / f"{name}-0" / "answers.jsonl").open()]
        assert len(rows) == 3 * 2 + 3
        budgets_asked = max(1, len(way.budgets))
        assert all(len(row["answers"]) == budgets_asked for row in rows)
        assert all(("chosen" in row) == way.has_router for row in rows)
        assert len(result["gflop"]) == len(result["seconds"]) == budgets_asked
        assert result["gflop"] == sorted({*result["gflop"]})  # each block costs something
    assert result["gflop"][0] < result["gflop"][1]
    text = (tmp_path / "out" / "budgets.md").read_text()
    assert all(way.title in text for way in tiny.values()) and (tmp_path / "out" / "budgets.png").exists()
    monkeypatch.setattr(budgets, "train", None)
    assert budgets.main(command) == 0 and (tmp_path / "out" / "budgets.md").read_text() == text
    assert budgets.main([*command, "--rate", "1"]) == 1
    assert "rate was 0.0003 and is now 1.0" in capsys.readouterr().err


def row_of(number: int, kind: str, right: list[bool], **fields) -> dict:
    question = "How many circles are there?" if kind == "shapes" else "What is written on the sign?"
    row = {"id": f"main-{number}-{kind}", "kind": kind, "letters": "main", "question": question, "tertile": "small"}
    return {**row, "reference": "yes", "answers": ["yes" if one else "no" for one in right], **fields}


def test_a_router_that_knows_lies_above_the_line(tmp_path, capsys):
    """Signs need two blocks and shapes none, and every third sign nothing helps."""
    rows = []
    for number in range(60):
        rows.append(row_of(number, "shapes", [True] * 3, chosen=0, chosen_unseen=0))
        is_readable = number % 3 > 0
        rows.append(row_of(number, "sign", [False, False, is_readable], chosen=2, chosen_unseen=0, crosses=True))
    result = {"seed": 0, "seconds_per_step": 1.0, "gflop": [1.0, 2.0, 3.0], "seconds": [0.1, 0.2, 0.3]}
    plain = [{**row, "answers": row["answers"][:1]} for row in rows]
    results = [
        {**result, "way": "universal", "rows": rows},
        {**result, "way": "plain", "rows": plain},
    ]
    settings = {"steps": 1, "rate": 1, "model": "m", "count": 60, "fine": 0, "routed": 10}
    write_report(results, WAYS, settings, "a machine", tmp_path)
    cells = {}
    for line in (tmp_path / "budgets.md").read_text().splitlines():
        name, *others = line.strip("| ").split(" | ")
        cells.setdefault(name, []).append(others)
    curve = cells[WAYS["universal"].title]
    assert [row[0] for row in curve] == ["0", "1", "2"]
    assert (
        curve[2][1] == "100.0 (100.0 to 100.0)" and curve[2][2].startswith("66.7 (") and curve[1][2].startswith("0.0")
    )
    assert curve[0][-3:] == ["1.00", "0.10", "1.00"]
    [difference] = cells[f"{WAYS['universal'].title}, at 2, less {WAYS['plain'].title}"]
    assert difference[0] == "0.0 (0.0 to 0.0)" and difference[1].startswith("66.7 (")
    # The line leads from 50 % without blocks to 83.3 % with two; the router takes one block in the mean.
    [[blocks, right, gain]] = cells["router"]
    assert (blocks, right) == ("1.00", "83.3") and gain.startswith("16.7 (")
    [[blocks, right, gain]] = cells["router, without its kind"]
    assert (blocks, right) == ("0.00", "50.0") and gain == "0.0 (0.0 to 0.0)"
    [[blocks, _, _]] = cells["oracle"]
    assert blocks == "0.67"
    assert cells["needs 0"] == [["60", "0", "20"]] and cells["needs 2"] == [["0", "0", "40"]]


def test_the_line_is_the_best_coin_flip():
    assert line_at(1, [0, 1, 2], [0.0, 0.2, 1.0]) == 0.5
    assert line_at(1, [0, 1, 2], [0.0, 0.8, 1.0]) == 0.8
    assert line_at(1.5, [0, 1, 2], [0.0, 0.8, 0.6]) == 0.8  # what is dearer and worse helps nobody
