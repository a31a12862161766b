"""Answers that are made together are those that are made one by one, by the library's own generate."""

import queue
import threading
import time
from io import BytesIO

import pytest
import torch

from pheye.serving import batches
from pheye.serving.batches import End, Worker
from pheye.serving.protocol import ChatRequest, RequestError

from tiny import tiny_config, tiny_image, tiny_model, tiny_processor, tiny_text_config

NEW = 12
QUESTIONS = ("What?", "What is written on the sign?", "Who is that, and where does she go?")


def png(seed: int, *size: int) -> bytes:
    tiny_image(seed, *size).save(buffer := BytesIO(), "PNG")
    return buffer.getvalue()


IMAGES = (png(0), png(1, 40, 90), png(2, 200, 30))


def ask(text: str, *images: bytes, **settings) -> ChatRequest:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return ChatRequest([{"role": "user", "content": content}], list(images), **{"max_tokens": NEW, **settings})


@pytest.fixture
def make_worker(model, processor):
    """Makes workers, and ends them."""
    made = []

    def make(model=model, processor=processor, batch_size=8) -> Worker:
        made.append(Worker(model, processor, batch_size))
        return made[-1]

    yield make
    for worker in made:
        worker.close()


@pytest.fixture
def calls(monkeypatch, model):
    """The rows of each call of `generate`."""
    rows, generate = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda **inputs: rows.append(len(inputs["input_ids"])) or generate(**inputs)
    )
    return rows


def answers(worker: Worker, requests: list[ChatRequest]) -> list[tuple[str, End]]:
    """What comes of requests that wait together."""
    queues = [queue.Queue() for _ in requests]
    jobs = [worker.prepare(request, pieces.put) for request, pieces in zip(requests, queues, strict=True)]
    with worker.changed:
        for job in jobs:
            worker.put(job)
    return [collected(pieces) for pieces in queues]


def collected(pieces: queue.Queue) -> tuple[str, End]:
    text = ""
    while isinstance(piece := pieces.get(timeout=60), str):
        text += piece
    return text, piece


def by_the_library(model, processor, request: ChatRequest, **settings) -> tuple[str, int]:
    """The answer to one request, and the number of its tokens."""
    text = processor.apply_chat_template(request.messages, add_generation_prompt=True)
    images = [[*request.images]] if request.images else None
    inputs = processor(images=images, text=[text], return_tensors="pt")
    ids = model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **settings})
    ids = ids[:, inputs["input_ids"].shape[1] :]
    return processor.post_process_image_text_to_text(ids)[0].lstrip(), ids.shape[1]


def test_unequal_pictures_and_prompts_answered_together_are_those_one_by_one(make_worker, calls, model, processor):
    requests = [ask(QUESTIONS[n % 3], IMAGES[n // 3]) for n in range(8)]
    found = answers(make_worker(), requests)
    assert calls == [8]
    for request, (text, end) in zip(requests, found, strict=True):
        assert (text, end.tokens) == by_the_library(model, processor, request)
    assert len({text for text, _ in found}) >= 5


def test_texts_without_an_image_go_by_themselves(make_worker, calls, model, processor):
    requests = [ask(QUESTIONS[0], IMAGES[0]), ask(QUESTIONS[1]), ask(QUESTIONS[2], IMAGES[1]), ask(QUESTIONS[2])]
    found = answers(make_worker(), requests)
    assert calls == [2, 2]
    assert [text for text, _ in found] == [by_the_library(model, processor, request)[0] for request in requests]


@pytest.mark.parametrize("options", [{"canvases": "fila"}, {"max_images": 2}])
def test_models_with_canvases_or_several_images_too(make_worker, options):
    config = tiny_config(**options)
    model, processor = tiny_model(config), tiny_processor(config)
    requests = [ask(QUESTIONS[n], IMAGES[n]) for n in range(3)]
    requests += [ask(QUESTIONS[0], *IMAGES[:2])] if "max_images" in options else []
    found = answers(make_worker(model, processor), requests)
    assert [text for text, _ in found] == [by_the_library(model, processor, request)[0] for request in requests]


@pytest.mark.parametrize("router_size", [0, 8])
def test_each_request_may_say_how_closely_to_read(make_worker, monkeypatch, router_size):
    budgets = {"self_attention_layers": [3], "self_attention_budgets": [[], [3]], "router_size": router_size}
    model = tiny_model(**budgets)
    processor = tiny_processor(model.config)
    asked = [(0, 0, 0), (0, 0, 1), (1, 0, 1), (1, 1, None), (1, 1, 0), (0, 0, None)]  # question, image, budget
    requests = [ask(QUESTIONS[question], IMAGES[image], vision_budget=budget) for question, image, budget in asked]
    calls, generate = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda **inputs: calls.append(len(inputs["input_ids"])) or generate(**inputs)
    )
    worker = make_worker(model, processor)
    together = answers(worker, requests)
    about_one = answers(worker, requests[:2])
    alike = answers(worker, requests[1:3])
    assert calls == [4, 2, 2, 2]  # requests that say so are answered apart from those that do not
    expected = [
        by_the_library(model, processor, request, vision_budget=budget)
        for request, (_, _, budget) in zip(requests, asked, strict=True)
    ]
    assert [(text, end.tokens) for text, end in together] == expected
    assert about_one == together[:2] and alike == together[1:3]
    assert expected[0] != expected[1] and expected[2] != by_the_library(model, processor, requests[2], vision_budget=0)
    with pytest.raises(RequestError, match="vision_budget=2 must be an integer from 0 to 1") as error:
        worker.prepare(ask("What?", IMAGES[0], vision_budget=2), print)
    assert error.value.param == "vision_budget"
    with pytest.raises(RequestError, match="without an image"):
        worker.prepare(ask("What?", vision_budget=1), print)


def test_a_budget_of_a_model_without_any_is_refused(make_worker):
    with pytest.raises(RequestError, match="has no self_attention_layers"):
        make_worker().prepare(ask("What?", IMAGES[0], vision_budget=1), print)


def test_draws_are_those_of_the_library_whatever_is_answered_beside(make_worker, calls, model, processor):
    settings = [
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.5, "top_p": 1},
        {"temperature": 0.7, "top_p": 0.5},
    ]
    requests = [ask(QUESTIONS[n], IMAGES[n], seed=n, **one) for n, one in enumerate(settings)]
    found = answers(make_worker(), [*requests, ask(QUESTIONS[0], IMAGES[0])])
    assert calls == [4]
    for seed, (request, one) in enumerate(zip(requests, settings, strict=True)):
        torch.manual_seed(seed)
        expected = by_the_library(model, processor, request, do_sample=True, top_k=0, **one)[0]
        assert found[seed][0] == expected
    assert found[3][0] == by_the_library(model, processor, ask(QUESTIONS[0], IMAGES[0]))[0]
    again = [answers(make_worker(), [ask(QUESTIONS[0], IMAGES[0], temperature=1.5)])[0][0] for _ in range(2)]
    assert again[0] != again[1]  # without a seed


def test_each_row_has_its_own_length_and_stops(make_worker, calls):
    [(text, end)] = answers(make_worker(), [ask(QUESTIONS[0], IMAGES[0])])
    assert end == End("length", NEW)
    stop = text[4:7]
    place = text.index(stop)
    found = answers(
        make_worker(),
        [
            ask(QUESTIONS[0], IMAGES[0], **one)
            for one in ({"max_tokens": 3}, {"stop": ["no", stop]}, {"stop": ["q!"]}, {})
        ],
    )
    assert calls[-1] == 4
    assert found[0] == (text[: len(found[0][0])], End("length", 3)) and 0 < len(found[0][0]) < len(text)
    assert found[1][0] == text[:place] and found[1][1].reason == "stop" and found[1][1].tokens < NEW
    assert found[2] == found[3] == (text, end)


def test_nothing_of_a_stop_sequence_is_sent_and_nothing_is_lost(processor):
    for stop, sent in (("cup", "a "), ("tea!", "a cup of tea"), ("a cup of tea", "")):
        given = []
        job = batches.Job(ask("?", stop=[stop]), [1], 100, None, None, None, given.append)
        answer = batches.Answer(job, processor.tokenizer, {0})
        for token in processor.tokenizer("  a cup of tea")["input_ids"] + [0]:
            if answer.add(token):
                break
        assert "".join(piece for piece in given if isinstance(piece, str)) == sent
        assert given[-1].reason == "stop"


def test_characters_of_several_tokens_come_whole(processor):
    given = []
    job = batches.Job(ask("?"), [1], 100, None, None, None, given.append)
    answer = batches.Answer(job, processor.tokenizer, {0})
    for token in processor.tokenizer(" naïve 日本 \N{GRINNING FACE}")["input_ids"] + [0]:
        answer.add(token)
    assert given[:-1] == list("naïve 日本 \N{GRINNING FACE}")


def test_a_picture_is_encoded_once_for_all_who_ask_about_it(make_worker, monkeypatch, model):
    encoded, encode = [], model.get_image_features
    monkeypatch.setattr(
        model, "get_image_features", lambda **inputs: encoded.append(len(inputs["pixel_values"])) or encode(**inputs)
    )
    worker = make_worker()
    first = answers(worker, [ask(QUESTIONS[0], IMAGES[0]), ask(QUESTIONS[1], IMAGES[0]), ask(QUESTIONS[0], IMAGES[1])])
    assert encoded == [1, 1]
    assert answers(worker, [ask(QUESTIONS[0], IMAGES[0])]) == first[:1]  # also where one image serves all rows
    assert answers(worker, [ask(QUESTIONS[1], IMAGES[0])] * 2) == [first[1]] * 2
    assert encoded == [1, 1]
    one = next(iter(worker.features.values()))["image_hidden_states"].nbytes
    monkeypatch.setattr(batches, "CACHED_BYTES", 2 * one)
    answers(worker, [ask(QUESTIONS[0], IMAGES[2])])
    assert encoded == [1, 1, 1] and len(worker.features) == 2
    answers(worker, [ask(QUESTIONS[0], IMAGES[0])])  # it was asked about last
    assert encoded == [1, 1, 1]


def test_no_answer_is_cut_short_by_a_longer_prompt_beside_it(make_worker, calls, model, processor):
    positions = model.config.text_positions
    requests = [ask(QUESTIONS[0], IMAGES[0], max_tokens=10**6), ask(QUESTIONS[2] * 4, IMAGES[1], max_tokens=4)]
    found = answers(make_worker(), requests)
    assert calls == [1, 1]
    prompt = processor.apply_chat_template(requests[0].messages, add_generation_prompt=True)
    length = len(processor.tokenizer(str(prompt))["input_ids"])
    assert found[0][1].tokens == positions - length and found[1][1].tokens == 4


def test_an_answer_has_an_end_where_positions_have_none(make_worker):
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0, "partial_rotary_factor": 0.5}
    model = tiny_model(tiny_config(text_config=tiny_text_config(rope_parameters=scaled)))
    assert model.config.text_positions is None
    job = make_worker(model).prepare(ask("What?", max_tokens=2**31), print)
    assert job.longest + len(job.ids) == batches.LONGEST_TEXT


@pytest.mark.parametrize("begun", [True, False])
def test_an_abandoned_request_stops_computing(make_worker, begun):
    worker = make_worker(batch_size=1)
    pieces, others = queue.Queue(), queue.Queue()
    first = worker.prepare(ask(QUESTIONS[0], IMAGES[0], max_tokens=10**6), pieces.put)
    second = worker.prepare(ask(QUESTIONS[1], IMAGES[0], max_tokens=10**6), others.put)
    worker.put(first)
    worker.put(second)
    pieces.get(timeout=60)
    (first if begun else second).is_abandoned = True
    if begun:
        others.get(timeout=60)  # the next one is answered, long before the first would have come to its end
        assert pieces.qsize() < 300
        second.is_abandoned = True
    else:
        first.is_abandoned = True
        end = time.monotonic() + 60
        while worker.waiting and time.monotonic() < end:
            time.sleep(0.01)
        assert others.empty()


def test_what_cannot_be_answered_is_refused_before_it_waits(make_worker):
    worker = make_worker()
    for request, said in (
        (ask(QUESTIONS[0], b"no image"), "could not be read as an image"),
        (ask(QUESTIONS[0], IMAGES[0], IMAGES[1]), "2 images"),
        (ask("x" * 600), "512 positions"),
        (ask("x" * 10**6), "characters; shorten"),
        (ask("\ud800"), "surrogates"),
        (ChatRequest([{"role": "assistant", "content": "x"}], []), "take turns"),
        (ChatRequest([{"role": "user", "content": 3}], []), "must be a text"),
    ):
        with pytest.raises(RequestError, match=said) as error:
            worker.prepare(request, print)
        assert error.value.status == 400


def test_a_failure_reaches_those_who_wait_and_the_worker_goes_on(make_worker, monkeypatch, model, capsys):
    worker, generate = make_worker(), model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: 1 / 0)
    [(_, end), _] = answers(worker, [ask(QUESTIONS[0], IMAGES[0])] * 2)
    assert isinstance(end.error, ZeroDivisionError) and "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setattr(model, "generate", generate)
    assert answers(worker, [ask(QUESTIONS[0], IMAGES[0])])[0][1].reason == "length"


def test_closing_ends_answers_and_the_thread(model, processor):
    worker, pieces = Worker(model, processor, 8), queue.Queue()
    worker.put(worker.prepare(ask(QUESTIONS[0], IMAGES[0], max_tokens=10**6), pieces.put))
    pieces.get(timeout=60)
    worker.close()
    assert collected(pieces)[1].error.status == 503
    assert worker.thread not in threading.enumerate()
