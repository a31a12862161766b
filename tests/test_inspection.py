"""`--inspect`: what is learnt in marks, and the views where they lie."""

import numpy as np
import pytest
from PIL import Image

from pheye import PheyeImageProcessor
from pheye.image_processing_pheye import cut_views
from pheye.training.inspection import draw_views, show_samples

from tiny import END, tiny_image, tiny_processor
from toy_data import messages


def sample(name: str) -> dict:
    turns = messages(("Why?", "So."), ("How?", "Thus."))
    return {"id": name, "source": "set", "images": [tiny_image()], "messages": turns}


@pytest.mark.parametrize("tiles_per_side", [2, 3])
def test_the_drawing_shows_the_views_where_they_lie(tiles_per_side):
    processor = PheyeImageProcessor(tiles_per_side=tiles_per_side, size={"height": 32, "width": 40})
    image = tiny_image(2)
    drawn = np.asarray(draw_views(processor(image, return_tensors="pt")["pixel_values"][0], processor))
    views = cut_views(image, (tiles_per_side, tiles_per_side), (32, 40))
    places = [(0, 0)] + [(x + 1, y) for x in range(tiles_per_side) for y in range(tiles_per_side)]
    shown = np.zeros(drawn.shape[:2], bool)
    for view, (column, row) in zip(views, places, strict=True):
        left, top = column * 44 + 4 * (column > 0), row * 36
        assert np.array_equal(drawn[top : top + 32, left : left + 40], view)
        shown[top : top + 32, left : left + 40] = True
    assert (drawn[~shown] == (255, 0, 255)).all()
    assert drawn.shape[:2] == (36 * tiles_per_side - 4, 44 * (tiles_per_side + 1))


def test_inspection_marks_what_is_learnt_and_writes_an_image_per_sample(tmp_path, capsys):
    samples = [sample(f"s{number}") for number in range(10)]
    samples[5]["images"] = [str(tmp_path / "missing.png")]
    show_samples(samples, tiny_processor(), tmp_path / "out", count=4)
    printed = capsys.readouterr().out
    assert [name in printed for name in ("s0", "s2", "s5", "s7", "s1", "s9")] == [True] * 4 + [False] * 2
    assert (
        printed.count(f"Instruction: Why?\nOutput:>>> So.{END}<<<\n\nInstruction: How?\nOutput:>>> Thus.{END}<<<") == 3
    )
    assert "SKIPPED: " in printed and "there is no such file" in printed
    learnt = len(f" So.{END} Thus.{END}".replace(END, "E"))  # a token per byte
    assert f"tokens, {learnt} of them learnt; 5 views" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"sample-{n}.png" for n in (0, 1, 3)]
    assert Image.open(tmp_path / "out" / "sample-0.png").size == (3 * 36, 2 * 36 - 4)


def test_inspection_of_a_stream_stops_after_the_first_samples(tmp_path, capsys):
    endless = (sample(f"s{number}") for number in iter(int, 1))
    show_samples(endless, tiny_processor(), tmp_path, count=2, max_length=10_000)
    assert capsys.readouterr().out.count("--- s0 (set)") == 2
