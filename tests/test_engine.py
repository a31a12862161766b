"""The engine behind captions and evaluation: answers as one by one."""

import functools
import io
import os
import socket
import types

import pytest
import torch
from PIL import Image

from pheye import image_opening_pheye
from pheye.answering.engine import answer, is_cut
from pheye.answering.rows import Request
from pheye.common.command import InputError

from answering_runs import BROKEN, LONG, NEW, OTHER, SHORT, names, read
from tiny import tiny_config, tiny_image, tiny_model, tiny_processor


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 0), (100, 0), (2, 2)])
def test_answers_are_those_of_one_by_one(start, expected, tmp_path, batch_size, workers):
    assert read(start(batch_size=batch_size, workers=workers)) == expected
    assert names(tmp_path) == {"out.jsonl", "out.jsonl.run.json"}


@pytest.mark.parametrize(("canvases", "seed"), [(None, 0), ([[1, 2], [2, 2], [2, 1]], 6)])
def test_questions_about_one_image_are_answered_from_one_encoding(requests, fresh_state, tmp_path, canvases, seed):
    """Neighbours or not in the list, by its path or its id; as many images as are encoded are counted."""
    model, processor = tiny_model(canvases=canvases, seed=seed), tiny_processor(tiny_config(canvases=canvases))
    paths = [requests[index].image for index in (0, 4, 5)]
    copies = [functools.partial(Image.open, paths[2]) for _ in range(2)]
    given = [(paths[0], {}), (paths[1], {}), (paths[0], {})]
    given += [(copy, {"image_id": 7}) for copy in copies] + [(paths[0], {})]
    prompts = [SHORT, LONG, OTHER, SHORT, OTHER, LONG]
    asked = [
        Request(number, image, prompt, fields)
        for number, ((image, fields), prompt) in enumerate(zip(given, prompts, strict=True))
    ]
    encode, seen = model.model._encode_views, []

    def count(pixel_values, *others, **more):
        seen.append(len(pixel_values))
        return encode(pixel_values, *others, **more)

    def answers(requests: list[Request], batch_size: int) -> list[dict]:
        path = tmp_path / f"{len(requests)}-{batch_size}.jsonl"
        options = {"batch_size": batch_size, "generate_kwargs": {"max_new_tokens": NEW}, "settings": {}}
        return read(answer(lambda: (model, processor), requests, path, **options))

    model.model._encode_views = count
    found = []
    for batch_size, encoded in ((1, 6), (4, 3), (6, 3)):
        seen.clear()
        found.append(answers(asked, batch_size))
        assert sum(seen) == encoded
    assert found[0] == found[1] == found[2]
    assert len({row["answer"] for row in found[0]}) == len(asked)  # so that mixing them up shows
    asked += [Request(number, [], prompt) for number, prompt in ((6, SHORT), (7, OTHER))]
    assert answers(asked, 8)[:6] == found[0] and answers(asked, 8) == answers(asked, 1)


def test_images_may_be_anything_that_the_processor_opens(start, requests, expected):
    given = [
        Request(request.id, image, request.prompt, request.fields)
        for request, image in zip(
            requests,
            [
                requests[0].image.read_bytes(),
                str(requests[1].image),
                lambda: requests[2].image,
                None,
                tiny_image(4, 96, 62),
            ],
            strict=False,
        )
    ]
    broken = {**expected[BROKEN], "error": "There is no image."}
    assert read(start(given)) == [*expected[:BROKEN], broken, expected[4]]


def test_images_are_opened_when_their_turn_comes(start, requests, tmp_path):
    def open_now(index):
        part = tmp_path / "out.jsonl.part-0"
        opened.append((index, len(read(part)) if part.exists() else 0))
        return requests[index].image

    opened = []
    lazy = [Request(index, functools.partial(open_now, index), "What?") for index in range(3)]
    start(lazy[:1], batch_size=1)
    start(lazy, batch_size=1)
    assert opened == [(0, 0), (1, 0), (2, 1)]  # the first only once


def test_whatever_a_strangers_picture_is_it_becomes_a_row(start, requests, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(image_opening_pheye, "DOWNLOAD_SECONDS", 0.2)
    os.mkfifo(tmp_path / "pipe.png")
    thin = io.BytesIO()
    Image.new("1", (1, 3_000_000)).save(thin, "PNG")
    closed = Image.open(requests[0].image)
    closed.close()

    def fails():
        raise SyntaxError("of a plugin")

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.png"
        bad = [tmp_path / "pipe.png", thin.getvalue(), closed, fails, url, tmp_path, {}, "\0"]
        asked = [Request(number, image, "What?") for number, image in enumerate(bad)]
        rows = read(start([*asked, requests[0]], tmp_path / "out" / "rows.jsonl"))
    assert all(row["error"] and "answer" not in row for row in rows[:-1])
    assert rows[-1] == expected[0]


def test_a_broken_image_says_the_same_in_every_run(start, tmp_path):
    rows = [read(start([Request(1, b"no image", "What?")], tmp_path / name)) for name in ("a", "b")]
    assert rows[0] == rows[1]
    assert "could not be read as an image" in rows[0][0]["error"]
    assert " at 0x" not in rows[0][0]["error"]


def test_an_error_of_the_model_stops_the_run(start, model, monkeypatch, tmp_path):
    def fail(**kwargs):
        raise ValueError("not the image's fault")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(ValueError, match="not the image's fault"):
        start()
    assert not (tmp_path / "out.jsonl").exists()


def test_a_prompt_that_is_too_long_is_named_and_the_first_thing_that_is_asked(start, requests, tmp_path):
    long = Request("long", requests[0].image, "What is this? " * 3000)
    with pytest.raises(InputError, match=r"shorten the prompt.*The first prompt of the batch.*What is this"):
        start([*requests, long])
    assert (tmp_path / "out.jsonl.part-0").read_bytes() == b""


def test_long_prompts_come_first_and_rows_keep_the_order_of_the_requests(start, model, monkeypatch, requests):
    lengths, generate = [], model.generate

    def spy(**kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", spy)
    output = start()
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]
    assert [row["id"] for row in read(output)] == [request.id for request in requests]


def test_names_that_are_not_unicode_and_texts_of_any_language_become_lines(start, tmp_path):
    names = ["foto-\udcff", "fotografía\u2028", "写真"]
    output = start([Request(name, None, "What?") for name in names])
    assert [row["id"] for row in read(output)] == names
    assert "写真".encode() in output.read_bytes()
    start([Request(name, None, "What?") for name in names])  # and are found again


@pytest.mark.parametrize("ends", [6, [6, 7], None])
def test_an_answer_is_cut_where_its_length_alone_has_ended_it(ends):
    model = types.SimpleNamespace(generation_config=types.SimpleNamespace(eos_token_id=ends))
    assert is_cut(model, torch.tensor([6, 5]), 2)
    assert not is_cut(model, torch.tensor([5]), 2)
    assert is_cut(model, torch.tensor([5, 6]), 2) == (ends is None)


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"workers": -1}, {"generate_kwargs": {"num_return_sequences": 2}}])
def test_bad_options_stop_before_anything_is_written(start, tmp_path, bad):
    with pytest.raises(InputError, match="must be"):
        start(**bad)
    assert names(tmp_path) == set()


# --- Several images, or none ---

TEXT, TWO = "Hello.", "Is [image 1] like [image 2]?"


def mixed(folder) -> list[Request]:
    """Prompts about two images, one and none, of which some are to be called for."""
    paths = []
    for seed, size in enumerate([(80, 40), (50, 50), (30, 90)]):
        paths.append(folder / f"{seed}.png")
        tiny_image(seed, *size).save(paths[-1])
    return [
        Request("two", [paths[0], lambda: paths[1]], TWO),
        Request("none", [], TEXT),
        Request("one", paths[2], SHORT),
        Request("called", lambda: [paths[1], paths[0]], OTHER),
        Request("other none", (), OTHER),
        Request("list of one", [paths[0].read_bytes()], SHORT),
    ]


def alone(model, processor, request: Request) -> str:
    """What `generate` answers about the images themselves, with numbers written by hand."""
    images = request.images()
    prompt = request.prompt
    if len(images) == 2 and "[image 1]" not in prompt:
        prompt = f"[image 1] [image 2] {prompt}"
    text = processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    inputs = processor(images=[images], text=[text], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True).lstrip()


@pytest.fixture
def answered(tmp_path, fresh_state):
    """Runs the engine on a model and requests; its rows."""

    def answered(parts, requests, **options) -> list[dict]:
        settings = {"batch_size": 3, "generate_kwargs": {"max_new_tokens": NEW}, "settings": {}, **options}
        return read(answer(lambda: parts, requests, tmp_path / "rows.jsonl", **settings))

    return answered


@pytest.mark.parametrize("batch_size", [1, 2, 6])
@pytest.mark.parametrize("canvases", [None, [[1, 2], [2, 2], [3, 1]]])
def test_rows_of_two_images_one_and_none_are_answered_together_as_alone(answered, tmp_path, batch_size, canvases):
    config = tiny_config(max_images=2, canvases=canvases)
    parts, requests = (tiny_model(config), tiny_processor(config)), mixed(tmp_path)
    expected = [alone(*parts, request) for request in requests]
    assert len(set(expected)) >= 5  # so that mixing them up shows
    rows = answered(parts, requests, batch_size=batch_size)
    assert [row["answer"] for row in rows] == expected


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_a_model_of_one_image_says_how_many_are_too_many_and_answers_texts(
    answered, model, processor, tmp_path, batch_size
):
    requests = mixed(tmp_path)
    rows = answered((model, processor), requests, batch_size=batch_size)
    for row, request in zip(rows, requests, strict=True):
        if len(request.images()) == 2:
            assert row["error"] == "It has 2 images, and the model takes 1 (max_images)."
        else:
            assert row["answer"] == alone(model, processor, request)


def test_one_broken_image_of_two_is_named_and_its_row_alone_has_no_answer(answered, tmp_path):
    config = tiny_config(max_images=2)
    good = mixed(tmp_path)[0]
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken = Request("broken", [good.image[0], tmp_path / "broken.png"], TWO)
    missing = Request("missing", [None, good.image[0]], TWO)
    rows = answered((tiny_model(config), tiny_processor(config)), [good, broken, missing])
    assert rows[0]["answer"] and "answer" not in rows[1]
    assert "broken.png' could not be read as an image" in rows[1]["error"]
    assert rows[2]["error"] == "There is no image."
