"""Lines of JSON: files that a user gives, and the rows of an evaluation."""

import json
from pathlib import Path

from ..common.command import InputError

ROWS = "rows.jsonl"  # in the folder of an evaluation


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no text file; give a file of JSON.") from error


def read_lines(path: Path, text: str | None = None) -> list[dict]:
    """The objects in lines of JSON, each with the number of its line as `_line`."""
    rows = []
    for number, line in enumerate((read_text(path) if text is None else text).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"Line {number} of {path} is no JSON: {error}.") from error
            if not isinstance(row, dict):
                raise InputError(f"Line {number} of {path} is no JSON object; give one object a line.")
            rows.append({**row, "_line": number})
    if not rows:
        raise InputError(f"{path} is empty.")
    return rows
