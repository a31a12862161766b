"""Samples whose image could not be read: listed in the run's folder, step by step."""

import json
from pathlib import Path

from ..common.files import write_atomically

SKIPPED_FILE = "skipped.jsonl"
SHOWN = 10


def append_skipped(output: str | Path, rows: list[dict], step: int):
    """Add the rows {"id", "source", "error"} that were skipped in `step`."""
    with open(Path(output) / SKIPPED_FILE, "a") as file:
        file.writelines(json.dumps({"step": step, **row}) + "\n" for row in rows)


def read_skipped(output: str | Path) -> list[dict]:
    """The rows that were added, without a line that a kill has left in parts."""
    path, rows = Path(output) / SKIPPED_FILE, []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            row = json.loads(line)
            rows.append({"step": int(row["step"]), **{name: row[name] for name in ("id", "source", "error")}})
        except (KeyError, TypeError, ValueError):
            continue
    return rows


def keep_until(output: str | Path, step: int) -> int:
    """Forget what was skipped after `step`, from which a run goes on and will skip it again; returns what is left."""
    rows = [row for row in read_skipped(output) if row["step"] <= step]
    path = Path(output) / SKIPPED_FILE
    if rows:
        write_atomically(path, [json.dumps(row).encode() + b"\n" for row in rows])
    else:
        path.unlink(missing_ok=True)
    return len(rows)


def print_skipped(output: str | Path):
    """List the samples that were skipped, once each."""
    rows = {(row["source"], row["id"]): row["error"] for row in read_skipped(output)}
    if rows:
        path = Path(output) / SKIPPED_FILE
        print(f"{len(rows)} samples were skipped, because their image could not be read (all are in {path}):")
        for (source, name), error in list(rows.items())[:SHOWN]:
            print(f"  {name} of {source}: {error}")
