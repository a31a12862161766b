"""Readers of text in images, and what they cost."""

import shutil

import pytest
from PIL import Image, ImageDraw

from pheye.nano import ocr
from pheye.nano.drawing import fonts
from pheye.nano.scoring import readers

pytestmark = pytest.mark.once


@pytest.mark.skipif(shutil.which("tesseract") is None, reason="Tesseract is not installed")
@pytest.mark.parametrize("mode", readers.PAGE_MODES)
def test_tesseract_reads_large_black_letters(mode):
    image = Image.new("RGB", (500, 160), "white")
    font = fonts.open_font(next(iter(fonts.families(True).values()))[0], 60)
    ImageDraw.Draw(image).text((60, 40), "HOTEL", "black", font)
    assert ocr.letters_of(readers.open_reader(mode, 1)(image)) == "HOTEL"
    weights, installed = readers.megabytes(mode)
    assert weights > 1 and (installed is None or weights < installed)
    assert readers.reader_versions([mode])["Tesseract"][0].isdigit()


def test_the_size_of_a_package_is_that_of_all_it_needs_without_extras(tmp_path, monkeypatch):
    def package(name, size, *needs):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (tmp_path / f"{name}.py").write_bytes(b"#" * size)
        required = "".join(f"Requires-Dist: {need}\n" for need in needs)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{required}")
        (folder / "RECORD").write_text(f"{name}.py,,\n")

    package("sized_one", 1_000_000, "sized-two>=1", 'sized_three; extra == "more"', 'sized_three; os_name == "none"')
    package("sized_two", 500_000, "sized_one", "sized-missing")  # in a circle
    package("sized_three", 250_000)
    monkeypatch.syspath_prepend(tmp_path)
    assert readers.packages_size("sized-one") == pytest.approx(1.5)
    assert readers.packages_size("sized-missing") is None


def test_the_least_of_several_readings_counts(monkeypatch):
    clock, cpu = iter([0, 5, 10, 12, 20, 23]), iter([0, 1, 2, 6, 6, 9])
    monkeypatch.setattr(readers.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(readers, "cpu_seconds", lambda: next(cpu))
    assert readers.timed(lambda image: "", None) == (2, 1)
