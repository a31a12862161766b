"""Small data sets for the tests of training: rows, files and tables."""

import json
from io import BytesIO
from pathlib import Path

import datasets

from pheye.training.formats import Source
from pheye.training.mixture import Mixture

from tiny import tiny_image


def conversation(*turns: tuple[str, str]) -> list[dict]:
    return [{"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn, strict=True)]


def messages(*turns: tuple[str, str]) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def png(seed: int = 0) -> bytes:
    buffer = BytesIO()
    tiny_image(seed).save(buffer, "PNG")
    return buffer.getvalue()


def llava_rows(count: int) -> list[dict]:
    return [
        {"id": f"row-{number}", "image": "a.png", "conversations": conversation((f"Question {number}?", f"A{number}"))}
        for number in range(count)
    ]


def long_rows(count: int) -> list[dict]:
    """Rows of six turns, so that two draws seldom agree by chance."""
    return [
        {"id": str(row), "image": "a.png", "conversations": conversation(*((f"{row}.{t}?", f"{t}") for t in range(6)))}
        for row in range(count)
    ]


def with_images(folder: Path) -> Path:
    (folder / "a.png").write_bytes(png(0))
    (folder / "b.png").write_bytes(png(1))
    return folder


def write_json(folder, rows, name: str = "data.json") -> str:
    lines = name.endswith(".jsonl")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) if lines else json.dumps(rows)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def write_table(folder, name: str = "table", **columns) -> str:
    datasets.Dataset.from_dict(columns).save_to_disk(folder / name)
    return str(folder / name)


def images(*seeds: int | None) -> list[dict | None]:
    return [None if seed is None else {"bytes": png(seed), "path": None} for seed in seeds]


def image_table(folder, name: str = "table", image_column: str = "image", is_list: bool = False, **columns) -> str:
    """A table whose image column has the type Image, or a list of it."""
    table = datasets.Dataset.from_dict(columns)
    feature = [datasets.Image()] if is_list else datasets.Image()
    table = table.cast(datasets.Features({**table.features, image_column: feature}))
    table.save_to_disk(folder / name)
    return str(folder / name)


def mixture(path, **fields) -> Mixture:
    return Mixture([Source(str(path), **fields)], seed=0)


def by_id(samples) -> list[dict]:
    return sorted(samples, key=lambda sample: sample["id"])
