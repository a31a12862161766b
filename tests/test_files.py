"""Files that appear whole or not at all, and records of runs."""

import errno
import os

import pytest

from pheye.common import files
from pheye.common.command import InputError

from answering_runs import names


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path):
    def chunks():
        yield b"new" * 100_000
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="Free some space"):
        files.write_atomically(tmp_path / "file", chunks())
    assert names(tmp_path) == {"file"}
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_record_lets_the_same_settings_go_on_and_refuses_others(tmp_path):
    record, output = tmp_path / "out" / "run.json", tmp_path / "out"
    settings = {"model": tmp_path, "steps": 3, "shape": (1, 2)}  # as JSON has them: text, number, list
    assert files.read_record(record, settings, output) is None
    files.write_record(record, settings, finished=False)
    assert files.read_record(record, settings, output)["finished"] is False
    with pytest.raises(InputError, match=r"begun with other settings: steps was 3 and is now 4\. Use the same"):
        files.read_record(record, {**settings, "steps": 4}, output)
    with pytest.raises(InputError, match="seed was None and is now 1"):
        files.read_record(record, {**settings, "seed": 1}, output)


def test_a_long_value_that_differs_is_cut_in_the_message():
    told = files.differences({"images": ["a.png"] * 10_000}, {"images": ["b.png"] * 10_000})
    assert told.startswith("images was ['a.png', ") and "is now ['b.png', " in told
    assert len(told) < 700


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings"', '{"settings": 5}', "[" * 100_000, "9" * 5000])
def test_a_file_that_is_no_record_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match="is not a record of settings"):
        files.read_record(tmp_path / "run.json", {}, tmp_path)


def test_a_fingerprint_changes_with_name_size_and_content(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"abc")
    large.write_bytes(bytes(files.READ * files.PLACES * 2))
    before = files.fingerprint(small), files.fingerprint(large), files.fingerprint(small, large)
    assert before == (files.fingerprint(small), files.fingerprint(large), files.fingerprint(small, large))
    assert len(set(before)) == 3
    small.write_bytes(b"abd")
    assert files.fingerprint(small) != before[0]
    changed = bytearray(large.read_bytes())
    changed[5::1000] = b"x" * len(changed[5::1000])  # as training changes weights: all over the file
    large.write_bytes(changed)
    assert files.fingerprint(large) != before[1]
    assert files.fingerprint(small.rename(tmp_path / "other")) != files.fingerprint(large)


def test_a_file_belongs_to_one_process(tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as file:
        files.lock(file, path)
        child = os.fork()
        if not child:
            try:
                with path.open("r+b") as other:
                    files.lock(other, path)
            except InputError as error:
                os._exit(5 if "still writing" in str(error) else 6)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
