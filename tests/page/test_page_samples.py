"""The pictures to begin with: freshly drawn, of words that Pheye-nano never saw."""

import random
from pathlib import Path

import pytest

from pheye import PheyeForConditionalGeneration, PheyeImageToTextPipeline, PheyeProcessor
from pheye.nano.drawing import words
from pheye.page import samples

pytestmark = pytest.mark.once


def test_nano_never_saw_the_words():
    assert all(words.is_held_out(word) and len(word) <= 9 for word in samples.WORDS)


@pytest.mark.parametrize("draw", [samples.sign, samples.page])
def test_each_drawing_is_another(draw):
    assert len({draw().tobytes() for _ in range(8)}) == 8


def test_photographs_are_all_there(monkeypatch):
    for name in samples.PHOTOGRAPHS:
        monkeypatch.setattr(random, "choice", lambda names, name=name: name)
        image = samples.photograph()
        assert image.mode == "RGB" and len(image.getcolors(image.width * image.height)) > 1000


@pytest.mark.parametrize(("corners", "lowest"), [(3, 0.5), (4, 2**-0.5), (48, 0.99)])
def test_shapes_stand_on_their_sides(corners, lowest):
    points = samples.outline(corners, (0, 0), 1)
    assert len(points) == corners
    bottom = max(y for _, y in points)
    assert bottom == pytest.approx(lowest, abs=0.01)
    assert sum(y == pytest.approx(bottom) for _, y in points) == 2


def test_nano_reads_most_of_the_signs(monkeypatch):
    folder = Path(__file__).parents[2] / "checkpoints" / "pheye-nano"
    model, processor = PheyeForConditionalGeneration.from_pretrained(folder), PheyeProcessor.from_pretrained(folder)
    pipe, right = PheyeImageToTextPipeline(model=model, processor=processor), 0
    random.seed(0)
    for word in samples.WORDS[:4]:
        monkeypatch.setattr(samples, "WORDS", (word,))
        right += pipe(samples.sign(), prompt="What is written on the sign?")[0]["generated_text"] == word
    assert right >= 3
