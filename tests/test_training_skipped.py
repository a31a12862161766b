"""The list of samples whose image could not be read."""

import json

import pytest

from pheye.training.skipped import SKIPPED_FILE, append_skipped, keep_until, print_skipped, read_skipped

pytestmark = pytest.mark.once


def row(name: str) -> dict:
    return {"id": name, "source": "signs", "error": "it is broken"}


def test_a_restart_keeps_what_was_skipped_up_to_its_checkpoint_and_forgets_the_rest(tmp_path):
    assert keep_until(tmp_path, 0) == 0 and read_skipped(tmp_path) == []
    for step, name in ((1, "a"), (3, "b\u2028b"), (4, "c")):
        append_skipped(tmp_path, [row(name)], step)
    assert keep_until(tmp_path, 3) == 2
    assert read_skipped(tmp_path) == [{"step": 1, **row("a")}, {"step": 3, **row("b\u2028b")}]
    assert keep_until(tmp_path, 0) == 0 and not (tmp_path / SKIPPED_FILE).exists()


@pytest.mark.parametrize(
    "torn", ["{", '{"step": 2, "id": "x", "sou', "[]", "5", "null", '{"step": "x", "id": 1}', "\x00\x00", "\xff"]
)
def test_a_torn_line_is_passed_over(tmp_path, capsys, torn):
    path = tmp_path / SKIPPED_FILE
    path.write_bytes(json.dumps({"step": 1, **row("a")}).encode() + b"\n" + torn.encode("latin-1"))
    print_skipped(tmp_path)
    assert "1 samples were skipped" in capsys.readouterr().out
    assert keep_until(tmp_path, 5) == 1
    append_skipped(tmp_path, [row("b")], 6)  # not behind the torn line
    assert [found["id"] for found in read_skipped(tmp_path)] == ["a", "b"]


def test_each_sample_is_listed_once(tmp_path, capsys):
    append_skipped(tmp_path, [row("a"), row("b"), row("a")], 1)
    print_skipped(tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith("2 samples were skipped") and printed.count("  a of signs: it is broken") == 1
    print_skipped(tmp_path / "nowhere")
    assert capsys.readouterr().out == ""
