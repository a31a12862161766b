"""Rows that no kill, full disk or other process repeats or loses."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from pheye.answering import engine, rows
from pheye.answering.engine import answer
from pheye.answering.rows import Request
from pheye.common.command import InputError, Interrupted

from answering_runs import NEW, PICTURES, names, read

# --- Kills ---


POINTS = [  # the n-th call of a function that touches files, and whether the kill comes before it, in it or after it
    *(("os.fsync", n, when) for n in (1, 2, 4, 6) for when in ("before", "after")),
    *(("write", n, "half") for n in (1, 2, 4)),
    *(("os.replace", n, when) for n in (1, 2) for when in ("before", "after")),
    ("os.unlink", 1, "before"),
    ("os.unlink", 1, "after"),
]


def kill_at(name: str, count: int, when: str):
    """Make this process kill itself around the `count`-th call of a function."""
    calls = 0

    def killing(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == count and when == "half":
                function(args[0], args[1][: len(args[1]) // 2])
            elif calls != count or when == "after":
                result = function(*args, **kwargs)
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    if name == "write":
        enter = rows.Part.__enter__

        def wrapped(part):
            enter(part)
            part.file = TornFile(part.file, killing(type(part.file).write))
            return part

        rows.Part.__enter__ = wrapped
    elif name == "os.unlink":
        Path.unlink = killing(Path.unlink)
    else:
        setattr(os, name.removeprefix("os."), killing(getattr(os, name.removeprefix("os."))))


class TornFile:
    """A file whose writing is another function."""

    def __init__(self, file, write):
        self.file, self.write = file, lambda data: write(file, data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def run_killed(start, name: str, count: int, when: str, **kwargs):
    """The run in a child, killed (a fork, because a fresh interpreter takes seconds to import)."""
    child = os.fork()
    if not child:
        try:
            kill_at(name, count, when)
            start(**kwargs)
        finally:
            os._exit(7)  # it was not killed
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize(("name", "count", "when"), POINTS)
def test_a_kill_repeats_and_loses_nothing(start, tmp_path, name, count, when):
    undisturbed = start(output=tmp_path / "whole.jsonl").read_bytes()
    run_killed(start, name, count, when)
    assert start().read_bytes() == undisturbed
    beside = {"whole.jsonl", "whole.jsonl.run.json"}
    assert names(tmp_path) - beside == {"out.jsonl", "out.jsonl.run.json"}


def test_kill_after_kill_gets_there(start, tmp_path):
    undisturbed = start(output=tmp_path / "whole.jsonl").read_bytes()
    for point in [("write", 2, "half"), ("os.fsync", 1, "after"), ("write", 1, "half"), ("os.replace", 1, "before")]:
        run_killed(start, *point, batch_size=1)
    assert start(batch_size=1).read_bytes() == undisturbed


def test_rows_that_are_there_are_not_answered_again(start, model, monkeypatch):
    run_killed(start, "os.fsync", 4, "after")  # the first is of the record of settings
    rows, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **kw: rows.extend(kw["input_ids"]) or generate(**kw))
    start()
    assert len(rows) == len(PICTURES) - 6


@pytest.mark.parametrize("tail", [b'{"id": "id-9", "ans', b"\0\0\0\0\n", b"[]\n", b"12\n", b'{"id": "id-9"}'])
def test_a_torn_line_is_cut_off(start, expected, tmp_path, tail):
    run_killed(start, "os.fsync", 3, "after")
    part = tmp_path / "out.jsonl.part-0"
    assert len(read(part)) == 4
    part.write_bytes(part.read_bytes() + tail)
    assert read(start()) == expected


NO_ROWS = [
    b"garbage",
    bytes(50),
    b"[1]",
    b'{"id": [1], "answer": "x"}',
    b'{"id": {}, "answer": "x"}',
    b'{"id": true, "answer": "x"}',
    b'{"id": "id-0"}',  # without an answer
    b'{"id": "id-0", "answer": null}',
    b'{"id": "id-0", "answer": 5}',
    b'{"id": "\xff", "answer": "x"}',
    b"[" * 100_000,
    b"9" * 5000,
]


@pytest.mark.parametrize("line", NO_ROWS, ids=lambda line: repr(line[:25]))
@pytest.mark.parametrize("finished", [False, True])
def test_lines_that_are_no_rows_are_passed_over_and_nothing_behind_is_asked_again(
    start, model, expected, tmp_path, monkeypatch, line, finished
):
    start() if finished else run_killed(start, "os.fsync", 3, "after")
    path = tmp_path / ("out.jsonl" if finished else "out.jsonl.part-0")
    rows, generate = [], model.generate
    path.write_bytes(line + b"\n" + path.read_bytes())
    monkeypatch.setattr(model, "generate", lambda **kw: rows.extend(kw["input_ids"]) or generate(**kw))
    assert read(start()) == expected
    assert len(rows) == (0 if finished else len(PICTURES) - 4)
    assert names(tmp_path) == {"out.jsonl", "out.jsonl.run.json"}


# --- Files that go away, and the user who stops ---


def test_what_is_removed_midway_is_written_again(start, expected, requests, tmp_path):
    output = tmp_path / "results" / "out.jsonl"

    def removing(index):
        def image():
            if index == 4:
                shutil.rmtree(output.parent)
            elif index == 6:
                output.with_name("out.jsonl.run.json").unlink()
            return requests[index].image

        return Request(requests[index].id, image, requests[index].prompt, requests[index].fields)

    asked = [removing(index) for index in range(len(requests))]
    with pytest.warns(UserWarning, match=r"part-0 was removed; its rows have been written to it once more"):
        start(asked, output, batch_size=1)
    assert read(output) == expected
    assert names(output.parent) == {"out.jsonl", "out.jsonl.run.json"}
    start(asked, output, batch_size=1)  # whose settings are known


def test_what_is_removed_after_the_last_row_is_written_again(start, expected, model, monkeypatch, tmp_path):
    generate, calls = model.generate, []

    def last(**kwargs):
        calls.append(1)
        if len(calls) == 4:
            (tmp_path / "out.jsonl.part-0").unlink()
            (tmp_path / "out.jsonl.part-0").write_text("another file")
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", last)
    with pytest.warns(UserWarning, match="was removed"):
        assert read(start()) == expected


def test_who_stops_a_run_hears_what_is_kept_and_the_bar_goes_on_from_there(
    start, expected, model, monkeypatch, capsys
):
    generate, calls = model.generate, []

    def stopped(**kwargs):
        calls.append(1)
        if len(calls) in stops:
            raise KeyboardInterrupt
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", stopped)
    stops = {1, 4}
    with pytest.raises(Interrupted, match="No row was written yet; give the same command again"):
        start()
    with pytest.raises(Interrupted, match=r"4 of 7 rows are kept in .*out.jsonl.part-0; give the same command again"):
        start()
    capsys.readouterr()
    assert read(start()) == expected
    assert "4/7 [" in capsys.readouterr().err


def test_each_process_has_its_own_part_of_the_bar(monkeypatch):
    monkeypatch.setattr(engine, "tqdm", dict)
    for process, share in enumerate(["ABGH", "CD", "EF"]):
        own = engine.share_of("ABCDEFGH", 2, Turn(process, 3))
        assert own == list(share)
        bar = engine.progress(len(own), 1, Path("out.jsonl"), Turn(process, 3))
        assert (bar["total"], bar["initial"]) == (len(share), len(share) - 1)


# --- Several processes ---


class Turn:
    """accelerate's state, as process `process_index` of `num_processes` sees it, all others being late."""

    def __init__(self, process_index: int, num_processes: int):
        self.process_index, self.num_processes = process_index, num_processes
        self.is_main_process = process_index == 0
        self.device = torch.device("cpu")

    def wait_for_everyone(self): ...


def test_a_run_of_three_processes_is_continued_by_one(start, expected, tmp_path, monkeypatch, model):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "process_state", lambda: Turn(0, 3))
        with pytest.raises(InputError, match=r"4 of 7 rows are missing.*all machines see"):
            start()
        # The others began when no row was there.
        own = (tmp_path / "out.jsonl.part-0").rename(tmp_path / "aside")
        patch.setattr(engine, "process_state", lambda: Turn(2, 3))
        start()
        own.rename(tmp_path / "out.jsonl.part-0")
    assert [len(read(tmp_path / f"out.jsonl.part-{process}")) for process in (0, 2)] == [3, 2]
    rows, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **kw: rows.extend(kw["input_ids"]) or generate(**kw))
    with pytest.warns(UserWarning, match="processes was 3 and is now 1"):
        assert read(start()) == expected
    assert len(rows) == 2  # those of the process that is missing
    assert names(tmp_path) == {"out.jsonl", "out.jsonl.run.json"}


def test_a_process_that_does_not_see_the_record_stops(start, monkeypatch):
    monkeypatch.setattr(engine, "process_state", lambda: Turn(1, 2))
    monkeypatch.setattr(rows, "NETWORK_DELAY", 0)
    with pytest.raises(InputError, match="all machines see"):
        start()


def test_two_processes_never_write_one_part(start, tmp_path):
    start([Request(0, None, "What?")])
    with rows.Part(tmp_path / "out.jsonl.part-0", 0):
        child = os.fork()
        if not child:
            try:
                start([Request(1, None, "What?")])
            except InputError as error:
                os._exit(5 if "still writing" in str(error) else 6)
            finally:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    start([Request(0, None, "What?"), Request(1, None, "What?")])


# --- What is there already ---


def test_a_finished_output_is_left_alone_and_nothing_is_loaded(start, requests, capsys):
    output = start()
    before, written = output.read_bytes(), output.stat().st_mtime_ns
    capsys.readouterr()
    options = {"batch_size": 2, "generate_kwargs": {"max_new_tokens": NEW}, "settings": {"model": "tiny"}}
    answer(lambda: pytest.fail("loaded"), requests, output, **options)
    assert output.read_bytes() == before
    assert output.stat().st_mtime_ns == written
    assert "out.jsonl is finished: 7 rows; nothing to do.\n" in capsys.readouterr().err
    answer(lambda: pytest.fail("loaded"), requests[:5], output, **options)
    assert output.read_bytes() == before
    assert "5 rows; nothing to do. It holds 2 more, which are not asked for.\n" in capsys.readouterr().err


def test_new_requests_join_a_finished_output_and_removed_rows_are_answered_again(start, requests, expected):
    output = start(requests[:5])
    output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[1:]))
    assert read(start()) == expected


def test_rows_that_are_no_longer_asked_for_are_left_out_with_a_warning(start, requests, expected):
    run_killed(start, "os.replace", 2, "before")
    with pytest.warns(UserWarning, match="2 rows were left out"):
        assert read(start(requests[2:])) == expected[2:]


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"settings": {"model": "other"}}, "model was 'tiny' and is now 'other'"),
        ({"settings": {"model": "tiny", "split": "val"}}, "split was None and is now 'val'"),
        ({"generate_kwargs": {"max_new_tokens": 3}}, "'max_new_tokens': 8} and is now {'max_new_tokens': 3}"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(start, tmp_path, changed, difference, finished):
    start() if finished else run_killed(start, "os.fsync", 3, "after")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="choose another output, or remove") as refusal:
        start(**changed)
    assert difference in str(refusal.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_versions_and_batches_are_only_warned_about(start, expected, tmp_path, monkeypatch):
    run_killed(start, "os.fsync", 3, "after")
    monkeypatch.setattr(engine, "versions", lambda: {"torch": "1.0"})
    with pytest.warns(UserWarning, match=r"versions was .*batch_size was 2 and is now 4"):
        assert read(start(batch_size=4)) == expected


def test_the_record_holds_what_the_rows_depend_on(start, tmp_path):
    start()
    record = json.loads((tmp_path / "out.jsonl.run.json").read_text())
    assert record["settings"] == {"model": "tiny", "generate_kwargs": {"max_new_tokens": NEW}}
    assert set(record["details"]["versions"]) == {"pheye", "torch", "transformers"}
    assert (record["details"]["batch_size"], record["details"]["processes"]) == (2, 1)


def test_files_of_unknown_origin_are_not_touched(start, tmp_path):
    (tmp_path / "out.jsonl").write_text("somebody's work")
    with pytest.raises(InputError, match=r"has no out.jsonl.run.json"):
        start()
    assert (tmp_path / "out.jsonl").read_text() == "somebody's work"
    (tmp_path / "out.jsonl.run.json").write_text("{}")
    with pytest.raises(InputError, match="is not a record of settings"):
        start()
    with pytest.raises(InputError, match="is a folder"):
        start(output=tmp_path)


# --- Bad input and full disks ---


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "nothing to answer"),
        ([Request("a", None, "What?"), Request("a", None, "What?")], "'a' occurs more than once"),
        ([Request("a", None, "")], "prompt of 'a' is empty"),
        ([Request(1.5, None, "What?")], "1.5 is a float"),
        ([Request(None, None, "What?")], "None is a NoneType"),
    ],
)
def test_bad_requests_stop_before_anything_is_written(start, tmp_path, bad, message):
    with pytest.raises(InputError, match=message):
        start(bad)
    assert names(tmp_path) == set()


def full_disk(room: int):
    """A `write` of a file that runs out of space after `room` bytes."""

    def write(file, data):
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = file.write(data[:room])
        room -= written
        return written

    return write


@pytest.mark.parametrize("room", [0, 1, 100, 400])
def test_a_full_disk_leaves_whole_rows_and_names_the_remedy(start, expected, tmp_path, monkeypatch, room):
    enter, write = rows.Part.__enter__, full_disk(room)

    def wrapped(part):
        enter(part)
        part.file = TornFile(part.file, write)
        return part

    with monkeypatch.context() as patch:
        patch.setattr(rows.Part, "__enter__", wrapped)
        with pytest.raises(OSError, match=r"part-0 could not be written: No space.* Free some space and run") as error:
            start()
    part = (tmp_path / "out.jsonl.part-0").read_bytes()
    assert part == b"" or part.endswith(b"\n")
    assert len(part) <= room
    assert isinstance(error.value.__cause__, OSError)
    assert read(start()) == expected


def test_a_disk_that_is_full_at_the_end_keeps_the_parts(start, expected, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 1 + 4 + 1:  # the record, the batches, the output
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"out.jsonl could not be written.*Free some space"):
            start()
    assert names(tmp_path) == {"out.jsonl.run.json", "out.jsonl.part-0"}
    assert read(start()) == expected
