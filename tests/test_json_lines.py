"""Lines of JSON, and what is said about files of another kind."""

import pytest

from pheye.common.command import InputError
from pheye.evaluation.json_lines import read_lines

pytestmark = pytest.mark.once


def test_rows_know_their_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"id": 1}\n\n{"id": 2, "text": "a\\u2028b"}\n', encoding="utf-8")
    assert read_lines(path) == [{"id": 1, "_line": 1}, {"id": 2, "text": "a\u2028b", "_line": 3}]


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
