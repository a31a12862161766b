"""JSON that a user gives, and lines of it: whatever is wrong with them is one error, which names the file."""

import json
from pathlib import Path

from .command import InputError


def parse_json(text: str | bytes) -> object:
    """What `text` holds.

    Raises:
        ValueError: whatever is wrong with it, its depth included.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def split_lines(text: str) -> list[str]:
    """The lines of a file, which end at a line feed alone, or behind a carriage return.

    `str.splitlines` knows ten other ends, which texts in JSON and names of files may hold.
    """
    return text.replace("\r\n", "\n").split("\n")


def read_rows(path: Path) -> list[dict]:
    """The rows that a run of this package wrote."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


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
    for number, line in enumerate(split_lines(read_text(path) if text is None else text), start=1):
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                raise InputError(f"Line {number} of {path} is no JSON: {error}.") from error
            if not isinstance(row, dict):
                raise InputError(f"Line {number} of {path} is no JSON object; give one object a line.")
            rows.append({**row, "_line": number})
    if not rows:
        raise InputError(f"{path} is empty.")
    return rows
