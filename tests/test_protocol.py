"""What a request may say, what is said of one that may not, and the form of answers."""

import json

import pytest

from pheye.serving import protocol
from pheye.serving.protocol import MOST_STOPS, ChatRequest, Form, RequestError, event, read_request

from serving_runs import data_url, question
from tiny import tiny_image

MODEL = "a/model"
TEXT = {"role": "user", "content": "What?"}


def read(allow_urls=False, **fields) -> ChatRequest:
    body = {"model": MODEL, "messages": [TEXT], **fields}
    return read_request(json.dumps(body).encode(), MODEL, allow_urls, max_images=2)


def refused(**fields) -> RequestError:
    with pytest.raises(RequestError) as error:
        read(**fields)
    return error.value


def test_what_is_not_said_is_greedy_and_bounded():
    assert read() == ChatRequest([TEXT], [])
    assert read(temperature=None, stop=None, seed=None, n=1, tools=[], user="me", anything=1) == ChatRequest(
        [TEXT], []
    )
    assert read().temperature == 0 and read().max_tokens == 256
    assert read(top_p=0.5).temperature == 1  # who gives a share asks for a draw
    assert read(top_p=0.5, temperature=0).temperature == 0


def test_settings_are_read():
    given = read(max_tokens=5, temperature=0.5, top_p=0.25, stop="x", seed=-3, vision_budget=1, stream=True)
    assert given == ChatRequest([TEXT], [], 5, 0.5, 0.25, ["x"], -3, 1, is_streamed=True)
    assert read(max_completion_tokens=7, max_tokens=5).max_tokens == 7
    assert read(stream_options={"include_usage": True}).includes_usage


def test_images_leave_placeholders():
    image = tiny_image()
    message = question("What?", image)
    [made], [data] = (
        (found := read(messages=[message, {"role": "developer", "content": "x"}])).messages[:1],
        found.images,
    )
    assert made == {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    assert data.startswith(b"\x89PNG") and found.messages[1]["role"] == "system"


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"temperature": 3}, "temperature", "temperature=3 must be a number from 0 to 2"),
        ({"temperature": True}, "temperature", "True"),
        ({"temperature": float("nan")}, "temperature", "nan"),
        ({"top_p": "1"}, "top_p", "'1'"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens=0 must be an integer from 1"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens", "1.5"),
        ({"seed": 2**63}, "seed", "seed="),
        ({"vision_budget": -1}, "vision_budget", "vision_budget=-1 must be an integer from 0"),
        ({"stop": ["a"] * (MOST_STOPS + 1)}, "stop", "up to 4 texts"),
        ({"stop": ""}, "stop", "1 to 200 characters"),
        ({"stop": "x" * 1000}, "stop", "1 to 200 characters"),
        ({"n": 2}, "n", "n=2 is not served"),
        ({"tools": [{"x": "y" * 1000}]}, "tools", "is not served"),
        ({"logprobs": True}, "logprobs", "logprobs=True is not served"),
        ({"stream_options": 1}, "stream_options", "must be an object"),
        ({"stream": 1}, "stream", "stream=1 must be true or false"),
        ({"stream_options": {"include_usage": "true"}}, "include_usage", "must be true or false"),
        ({"messages": []}, "messages", "one object or more"),
        ({"messages": [TEXT] * 1001}, "messages", "have 1001 parts; give at most 1000"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1001}]}, "messages", "1001 parts"),
        ({"messages": "What?"}, "messages", "one object or more"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages", "Message 0 has a part"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "without a url"),
        ({"model": "b"}, "model", "There is no model 'b' here; this server has 'a/model'"),
    ],
)
def test_what_is_not_served_is_named(fields, param, said):
    error = refused(**fields)
    assert error.param == param and said in str(error) and len(str(error)) < 300
    assert error.body()["error"]["param"] == param and error.status == (404 if param == "model" else 400)


def test_too_many_images_are_refused_before_one_is_fetched(monkeypatch):
    monkeypatch.setattr(protocol, "download", lambda *args, **kwargs: pytest.fail("fetched"))
    part = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    with pytest.raises(RequestError, match=r"have 3 images, but this model takes 2 \(max_images\)"):
        read(
            allow_urls=True, messages=[{"role": "user", "content": [part, part]}, {"role": "user", "content": [part]}]
        )


def test_a_temperature_that_would_overflow_is_none():
    assert read(temperature=1e-38).temperature == 0 and read(temperature=1e-3).temperature == 1e-3


def test_half_a_character_is_quoted_as_it_can_be():
    with pytest.raises(RequestError) as error:
        read(messages=[{"role": "user", "content": "x"}], model="\ud800")
    assert "\\ud800" in json.dumps(error.value.body(), ensure_ascii=False)
    RequestError("role \ud800").body()["error"]["message"].encode()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'"x"', b"[" * 100_000])
def test_what_is_no_object_is_refused(body):
    with pytest.raises(RequestError, match="The body"):
        read_request(body, MODEL, False, 1)


@pytest.mark.parametrize("allow_urls", [False, True])
@pytest.mark.parametrize(
    "url", ["/etc/passwd", "file:///etc/passwd", "photo.jpg", "ftp://x/y.png", "http://127.0.0.1:1/a.png",
            "http://localhost:1/a.png", "http://10.0.0.1/a.png", "http://[::1]:1/a.png", "data:image/png;base64,A"],
)  # fmt: skip
def test_no_file_and_no_private_address_is_opened(url, allow_urls):
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    error = refused(messages=[message], allow_urls=allow_urls)
    assert (error.status, error.code) == (400, "invalid_image_url")
    if allow_urls and url.startswith("http"):
        assert "which is no public address" in str(error)


def test_errors_have_the_protocols_form():
    assert RequestError("x", param="n", code="c").body() == {
        "error": {"message": "x", "type": "invalid_request_error", "param": "n", "code": "c"}
    }
    kinds = {status: RequestError("x", status=status).body()["error"]["type"] for status in (401, 404, 500, 503)}
    assert kinds == {
        401: "authentication_error",
        404: "invalid_request_error",
        500: "server_error",
        503: "server_error",
    }


def test_clients_read_the_forms():
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    form = Form(MODEL, 5)
    whole = ChatCompletion.model_validate(form.whole("text", "stop", 3), strict=True)
    assert whole.usage.total_tokens == 8 and whole.choices[0].message.content == "text"
    for chunk in (form.chunk({"content": "x"}), form.chunk({}, "length"), form.last_chunk(3)):
        assert ChatCompletionChunk.model_validate(chunk, strict=True).id == whole.id
    assert event("[DONE]") == "data: [DONE]\n\n" and "\n" not in event({"x": "a\nb"})[:-2]


def test_data_urls_hold_the_file():
    assert data_url(b"abc") == "data:image/png;base64,YWJj"
