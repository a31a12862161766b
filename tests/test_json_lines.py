"""Lines of JSON, and what is said about files of another kind."""

import json
from pathlib import Path

import pytest

from pheye.common.command import InputError
from pheye.common.json_lines import parse_json, read_lines, read_rows, split_lines

pytestmark = pytest.mark.once


# Ends of lines to `str.splitlines`, but not to JSON, whose texts may hold all but the first four as they are.
NO_ENDS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


def test_rows_know_their_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"id": 1}\n\n{"id": 2, "text": "a\\u2028b"}\n', encoding="utf-8")
    assert read_lines(path) == [{"id": 1, "_line": 1}, {"id": 2, "text": "a\u2028b", "_line": 3}]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_where_those_of_json_do(tmp_path, end):
    row = {"text": f"a{NO_ENDS[-3:]}b"}
    line = json.dumps(row, ensure_ascii=False)
    assert all(sign in line for sign in NO_ENDS[-3:])
    path = tmp_path / "rows.jsonl"
    path.write_bytes((line + end + line + end).encode())
    assert read_rows(path) == [row, row]
    assert read_lines(path) == [{**row, "_line": 1}, {**row, "_line": 2}]
    assert split_lines(f"a{NO_ENDS}b{end}c") == [f"a{NO_ENDS}b", "c"]


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"a": ', b"\xff", ""])
def test_whatever_is_wrong_with_json_is_one_error(tmp_path, text):
    with pytest.raises(ValueError):
        parse_json(text)
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "rows.jsonl").write_bytes(b'{"id": 1}\n' + content + b"x\n")
    with pytest.raises(InputError):
        read_lines(tmp_path / "rows.jsonl")


def test_no_room_splits_data_at_other_ends():
    root = Path(__file__).parent.parent
    rooms = ("answering", "common", "conversion", "evaluation", "examples", "nano", "training")
    for path in [path for room in rooms for path in (root / room).rglob("*.py")]:
        lines = [line for line in path.read_text().split("\n") if ".splitlines(" in line]
        assert not [line for line in lines if "str(error)" not in line], path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"id": 1}\n{"id": ', "Line 2 of .* is no JSON"),
        (b'{"id": 1}\n7\n', "Line 2 of .* is no JSON object"),
        (b"\x89PNG\xff\xfe", "is no text file"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_lines(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="There is no file"):
        read_lines(tmp_path / "none.jsonl")
