"""What the tests of `answering` share: requests with a broken image, and runs of the engine on a tiny model."""

import json
from pathlib import Path

import pytest
from accelerate import PartialState

from pheye.answering.engine import answer
from pheye.answering.rows import Request

from tiny import tiny_image

NEW = 8  # tokens per answer


SHORT, LONG, OTHER = "What?", "What is this, and what else is there to see?", "Read the sign."


PICTURES = [(0, SHORT), (1, LONG), (2, SHORT), (3, LONG), (4, SHORT), (6, OTHER), (0, OTHER)]  # seed and prompt


BROKEN = 3  # which of them is no image


@pytest.fixture
def fresh_state():
    """accelerate keeps its state for the life of a process."""
    PartialState._reset_state()
    yield
    PartialState._reset_state()


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    """Pictures of different shapes, prompts of two lengths, and a file that is no image."""
    folder = tmp_path_factory.mktemp("images")
    requests = []
    for index, (seed, prompt) in enumerate(PICTURES):
        path = folder / f"{index}.png"
        tiny_image(seed, 60 + 9 * seed, 90 - 7 * seed).save(path)
        requests.append(Request(f"id-{index}", path, prompt, {"image": path.name}))
    requests[BROKEN].image.write_bytes(b"no image")
    return requests


@pytest.fixture(scope="module")
def expected(model, processor, requests) -> list[dict]:
    """What each request gets by itself."""
    rows = []
    for index, request in enumerate(requests):
        row = {"id": request.id, **request.fields}
        if index == BROKEN:
            rows.append({**row, "error": f"'{request.image}' could not be read as an image: cannot identify image "
                         f"file '{request.image}'. Check that the file is whole."})  # fmt: skip
            continue
        text = processor.apply_chat_template([{"role": "user", "content": request.prompt}], add_generation_prompt=True)
        inputs = processor(images=request.image, text=text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=NEW)[0, inputs["input_ids"].shape[1] :]
        rows.append({**row, "answer": processor.tokenizer.decode(ids, skip_special_tokens=True).lstrip()})
    assert len({row.get("answer") for row in rows}) == len(PICTURES)  # so that mixing them up shows
    return rows


@pytest.fixture
def start(model, processor, requests, tmp_path, fresh_state):
    """Runs the engine; keywords replace its arguments."""

    def start(requests=requests, output=tmp_path / "out.jsonl", **kwargs) -> Path:
        defaults = {"batch_size": 2, "generate_kwargs": {"max_new_tokens": NEW}, "settings": {"model": "tiny"}}
        return answer(lambda: (model, processor), requests, output, **{**defaults, **kwargs})

    return start


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
