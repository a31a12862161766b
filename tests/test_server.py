"""The server, asked by the clients that people use."""

import functools
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import uvicorn

from pheye.serving import server as server_module
from pheye.serving.batches import Worker
from pheye.serving.server import Server

from serving_runs import client, question, streamed
from tiny import tiny_image

NAME = "tiny"
KEY = "secret"
ASKED = {"model": NAME, "max_tokens": 12}
LONG = {"model": NAME, "max_tokens": 100_000}


class Running:
    """A server in a thread, which counts the model's steps."""

    def __init__(self, model, processor, monkeypatch):
        self.steps, forward = 0, model.forward

        @functools.wraps(forward)  # `generate` reads the names of its arguments
        def counted(*args, **kwargs):
            self.steps += 1
            time.sleep(0.005)  # so that a long answer is long
            return forward(*args, **kwargs)

        monkeypatch.setattr(model, "forward", counted)
        self.server = Server(Worker(model, processor, 4), NAME, KEY, allow_urls=False)
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.http = uvicorn.Server(uvicorn.Config(self.server.app(), log_level="error"))
        self.thread = threading.Thread(target=self.http.run, args=([listening],))
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.port}"
        while not self.http.started:
            time.sleep(0.01)

    def close(self):
        self.http.should_exit = True
        self.thread.join(60)

    def is_still(self) -> bool:
        """Whether the model soon does nothing any more, and no request is kept."""
        end, steps = time.monotonic() + 20, -1
        while time.monotonic() < end and (steps != self.steps or self.server.requests):
            steps = self.steps
            time.sleep(0.3)
        return steps == self.steps and self.server.requests == 0 == self.server.bytes


@pytest.fixture(scope="module")
def running(model, processor):
    with pytest.MonkeyPatch.context() as patch:
        running = Running(model, processor, patch)
        yield running
        running.close()
        assert not running.thread.is_alive() and not running.server.worker.thread.is_alive()


@pytest.fixture
def api(running):
    return client(running.address, KEY)


def raw(running, **fields) -> socket.socket:
    """A connection on which a request has been sent."""
    body = json.dumps({**ASKED, "messages": [question("What?")], **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=60)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}"
    )
    connection.sendall(f"{head}\r\n\r\n".encode() + body)
    return connection


def test_models_and_health(running, api):
    assert [model.id for model in api.models.list()] == [NAME]
    assert json.load(urllib.request.urlopen(f"{running.address}/health")) == {"status": "ok"}  # without a key


def test_an_answer_is_the_same_streamed_and_not(api):
    messages = [question("What is written?", tiny_image(3))]
    whole = api.chat.completions.create(messages=messages, **ASKED)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 12
    chunks = list(
        api.chat.completions.create(messages=messages, stream=True, stream_options={"include_usage": True}, **ASKED)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 6
    assert streamed(api, messages=messages, **ASKED) == whole.choices[0].message.content


def test_a_second_turn_and_many_clients_at_once(api):
    first = question("What is written?", tiny_image(3))
    answer = api.chat.completions.create(messages=[first], **ASKED).choices[0].message.content
    turns = [first, {"role": "assistant", "content": answer or "x"}]
    asked = [[*turns, question(f"And {n}?")] for n in range(8)]
    alone = [streamed(api, messages=messages, **ASKED) for messages in asked]
    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(lambda messages: streamed(api, messages=messages, **ASKED), asked)) == alone


def test_another_client_that_people_use(running, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # the address is this machine's
    other = huggingface_hub.InferenceClient(base_url=f"{running.address}/v1", api_key=KEY)
    asked = {"model": NAME, "max_tokens": 5, "messages": [question("What?", tiny_image(1))]}
    whole = other.chat_completion(**asked).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in other.chat_completion(**asked, stream=True)]
    assert "".join(pieces) == whole


@pytest.mark.parametrize("key", ["", "secre", "wrong", "s\N{LATIN SMALL LETTER E WITH ACUTE}"])
def test_who_does_not_know_the_key_gets_nothing(running, key):
    request = urllib.request.Request(f"{running.address}/v1/models", headers={"Authorization": f"Bearer {key}"})
    with pytest.raises(urllib.error.HTTPError, match="401") as error:
        urllib.request.urlopen(request)
    assert json.load(error.value)["error"]["code"] == "invalid_api_key"
    request = urllib.request.Request(f"{running.address}/load_model", b"{}", headers=dict(request.headers))
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request)
    with pytest.raises(openai.AuthenticationError):
        client(running.address, "wrong").chat.completions.create(messages=[question("What?")], **ASKED)


def test_errors_are_those_that_the_client_knows(running, api):
    with pytest.raises(openai.NotFoundError, match="There is no model 'x'"):
        api.chat.completions.create(model="x", messages=[question("What?")])
    with pytest.raises(openai.BadRequestError, match="could not be read as an image") as error:
        api.chat.completions.create(messages=[question("What?", b"no image")], **ASKED)
    assert error.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="may not be opened"):
        part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}
        api.chat.completions.create(messages=[{"role": "user", "content": [part]}], stream=True, **ASKED)
    with pytest.raises(openai.NotFoundError, match="GET /v1/other: Not Found"):
        api.get("/other", cast_to=object)
    with pytest.raises(openai.APIStatusError, match="Method Not Allowed"):
        api.get("/chat/completions", cast_to=object)
    assert running.is_still()


def test_too_much_is_refused_in_words(running, api, monkeypatch):
    monkeypatch.setattr(server_module, "MOST_BODY", 2**20)
    with pytest.raises(openai.APIStatusError, match="A request may have 1 MB") as error:
        api.chat.completions.create(messages=[question("x" * 2**20)], **ASKED)
    assert error.value.status_code == 413
    monkeypatch.setattr(server_module, "MOST_BODIES", 1000)
    with pytest.raises(openai.InternalServerError, match="Too much is being sent at once"):
        api.chat.completions.create(messages=[question("x" * 2000)], **ASKED)
    monkeypatch.setattr(server_module, "MOST_REQUESTS", 0)
    with pytest.raises(openai.InternalServerError, match="0 requests are being answered"):
        api.chat.completions.create(messages=[question("What?")], **ASKED)
    assert running.is_still()


@pytest.mark.parametrize("stream", [True, False])
def test_an_abandoned_request_stops_computing(running, stream):
    steps, connection = running.steps, raw(running, stream=stream, **LONG)
    end = time.monotonic() + 20
    while running.steps < steps + 10 and time.monotonic() < end:
        time.sleep(0.01)
    assert running.steps >= steps + 10
    connection.close()
    assert running.is_still() and running.steps < steps + 200  # of some 480 positions


def test_a_request_that_never_comes_whole_is_given_up(running, monkeypatch):
    monkeypatch.setattr(server_module, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as slow:
        slow.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode())
        slow.sendall(b"Content-Length: 1000\r\n\r\n{")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    assert running.is_still()


def test_a_failure_of_the_model_is_an_error_of_the_server(running, api, monkeypatch, capsys):
    monkeypatch.setattr(running.server.worker.model, "generate", lambda **inputs: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="log says why"):
        api.chat.completions.create(messages=[question("What?")], **ASKED)
    with pytest.raises(openai.APIError, match="log says why"):
        streamed(api, messages=[question("What?")], **ASKED)
    assert "ZeroDivisionError" in capsys.readouterr().err
