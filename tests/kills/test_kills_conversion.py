"""A conversion that is killed leaves no half folder, and the same command makes it right."""

import shutil
import sys

import pytest

from conversion_fixtures import GOLDEN
from killing import digests, kill_after, moments, seconds_of, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.once,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix"),
]


@pytest.mark.parametrize("forced", [False, True])
def test_after_a_kill_the_output_is_absent_old_or_whole_and_a_rerun_is_right(tmp_path, forced):
    log, output, old = tmp_path / "log", tmp_path / "work" / "out", tmp_path / "old"
    old.mkdir()
    (old / "mine.txt").write_text("old")
    command = ["-m", "pheye.convert_checkpoint", GOLDEN / "x4-672", output, *(["--force"] if forced else [])]
    seconds, whole = seconds_of(command, log), digests(output)
    for number, moment in enumerate(moments(seconds)):
        shutil.rmtree(output.parent)
        output.parent.mkdir()
        if forced:
            shutil.copytree(old, output)
        told = f"killed after {moment:.2f} of {seconds:.2f} s"
        for _ in range(2 if number % 3 == 2 else 1):  # some die again where they go on
            kill_after(moment, command, log)
            assert digests(output) in ([digests(old), {}, whole] if forced else [{}, whole]), told
        there = output.exists()
        assert start(command, log).wait() == (there and not forced), told
        assert digests(output) == whole, told
        assert list(output.parent.iterdir()) == [output], told
