"""Captions that are killed repeat and lose nothing: the same command makes the file that an undisturbed run makes."""

import sys

import pytest

from killing import kill_after, moments, seconds_of, start
from tiny import tiny_image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.once,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix"),
]


@pytest.fixture
def command(tmp_path, model_folder):
    """With the output it is given as the last argument."""
    (tmp_path / "images").mkdir()
    for number in range(40):
        tiny_image(number, 50 + number, 90 - number).save(tmp_path / "images" / f"{number:02}.png")
    (tmp_path / "images" / "17.png").write_bytes(b"no image")
    options = ["--images", tmp_path / "images", "--max_new_tokens", 8, "--batch_size", 2, "--device", "cpu"]
    return ["-m", "pheye", "caption", "--model", model_folder, *options, "--output"]


def test_after_a_kill_the_same_command_makes_the_file_of_an_undisturbed_run(tmp_path, command):
    log, output = tmp_path / "log", tmp_path / "work" / "captions.jsonl"
    seconds = seconds_of([*command, output], log)
    undisturbed = output.read_bytes()
    assert undisturbed.count(b"\n") == 40 and undisturbed.count(b'"error"') == 1
    for number, moment in enumerate(moments(seconds)):
        for path in output.parent.iterdir():
            path.unlink()
        kill_after(moment, [*command, output], log)
        if number % 3 == 2:
            kill_after(moment / 2, [*command, output], log)
        told = f"killed after {moment:.2f} of {seconds:.2f} s"
        parts = [path for path in output.parent.iterdir() if ".part-" in path.name]
        rows = set(undisturbed.splitlines(keepends=True))
        for path in parts:  # all but a torn last line is a row that a whole run writes
            assert set(path.read_bytes().splitlines(keepends=True)[:-1]) <= rows, told
        assert start([*command, output], log).wait() == 0, told
        assert output.read_bytes() == undisturbed, told
        assert {path.name for path in output.parent.iterdir()} == {output.name, f"{output.name}.run.json"}, told
