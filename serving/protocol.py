"""The protocol of OpenAI's chat completions: what a request may say, and the form of answers and errors.

Source: https://platform.openai.com/docs/api-reference/chat
"""

import json
import time
import uuid
from dataclasses import dataclass, field

from ..image_opening_pheye import WEB, download, from_base64, naming
from ..pipeline_pheye import DEFAULT_MAX_NEW_TOKENS

MOST_STOPS, LONGEST_STOP = 4, 200  # characters
MOST_PARTS = 1000  # of all messages
LEAST_TEMPERATURE = 1e-4  # with less, logits would overflow; it is as good as 0
# Fields that would change the answer and are not served, with what they may say all the same.
NOT_SERVED = {
    "n": (1,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("auto", "none"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
}


class RequestError(ValueError):
    """What is wrong with a request, in the words and the form of the protocol."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = kind if self.status < 500 else "server_error"
        message = str(self).encode("utf-8", "backslashreplace").decode()  # it may quote half a character
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


@dataclass
class ChatRequest:
    """A request that has been checked.

    messages: as the processor takes them, images being placeholders; images: their files' bytes, in order; seed: None
    for another answer each time; vision_budget: an index into the model's budgets, None for its own choice.
    """

    messages: list[dict]
    images: list[bytes]
    max_tokens: int = DEFAULT_MAX_NEW_TOKENS
    temperature: float = 0
    top_p: float = 1
    stop: list[str] = field(default_factory=list)
    seed: int | None = None
    vision_budget: int | None = None
    is_streamed: bool = False
    includes_usage: bool = False


def read_request(body: bytes, model: str, allow_urls: bool, max_images: int) -> ChatRequest:
    """What the body of a request asks of the model of this name.

    Args:
        allow_urls: whether images may be fetched from public addresses.
        max_images: how many images the model takes; with more, none is fetched.

    Raises:
        RequestError: if it is no whole request, or asks for what is not served.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is no JSON: {error}.") from error
    if not isinstance(given, dict):
        raise RequestError("The body must be a JSON object.")
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("model") != model:
        raise RequestError(
            f"There is no model {shown(given.get('model'))} here; this server has {model!r}.",
            status=404,
            param="model",
            code="model_not_found",
        )
    for name, harmless in NOT_SERVED.items():
        if name in given and given[name] not in harmless:
            raise RequestError(f"{name}={shown(given[name])} is not served; leave it out.", param=name)
    top_p = number(given, "top_p", 0, 1, 1)
    stop = given.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    are_texts = isinstance(stop, list) and all(isinstance(one, str) and 0 < len(one) <= LONGEST_STOP for one in stop)
    if not are_texts or len(stop) > MOST_STOPS:
        raise RequestError(
            f"stop must be a text or up to {MOST_STOPS} texts, each of 1 to {LONGEST_STOP} characters.", param="stop"
        )
    longest = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise RequestError("stream_options must be an object.", param="stream_options")
    messages, images = read_messages(given.get("messages"), allow_urls, max_images)
    # Who asks for a share of the probability asks for a draw.
    temperature = number(given, "temperature", 0, 2, 0 if top_p == 1 else 1)
    return ChatRequest(
        messages,
        images,
        max_tokens=integer(given, longest, 1, 2**31, DEFAULT_MAX_NEW_TOKENS),
        temperature=temperature if temperature >= LEAST_TEMPERATURE else 0,
        top_p=top_p,
        stop=stop,
        seed=integer(given, "seed", -(2**63), 2**63 - 1, None),
        vision_budget=integer(given, "vision_budget", 0, 2**31, None),
        is_streamed=truth(given, "stream"),
        includes_usage=truth(options, "include_usage"),
    )


def shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def number(given: dict, name: str, least: float, most: float, default: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise RequestError(f"{name}={shown(value)} must be a number from {least} to {most}.", param=name)
    return value


def integer(given: dict, name: str, least: int, most: int, default: int | None) -> int | None:
    value = given.get(name, default)
    if name in given and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
        raise RequestError(f"{name}={shown(value)} must be an integer from {least} to {most}.", param=name)
    return value


def truth(given: dict, name: str) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name}={shown(value)} must be true or false.", param=name)
    return bool(value)


def read_messages(messages, allow_urls: bool, max_images: int) -> tuple[list[dict], list[bytes]]:
    """The messages with placeholders for images, and the images' bytes."""
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise RequestError("messages must be a list of one object or more.", param="messages")
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    if len(parts) > MOST_PARTS:
        raise RequestError(f"The messages have {len(parts)} parts; give at most {MOST_PARTS}.", param="messages")
    asked = sum(isinstance(part, dict) and part.get("type") == "image_url" for part in parts)
    if asked > max_images:
        raise RequestError(
            f"The messages have {asked} images, but this model takes {max_images} (max_images).", param="messages"
        )
    read, images = [], []
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        role = "system" if role == "developer" else role
        if isinstance(content, list):
            parts = []
            for part in content:
                if isinstance(part, dict) and part.get("type") == "image_url":
                    images.append(image_bytes(part.get("image_url"), number, allow_urls))
                    part = {"type": "image"}
                elif not isinstance(part, dict) or part.get("type") != "text":
                    raise RequestError(
                        f"Message {number} has a part that is neither of the type text nor image_url.",
                        param="messages",
                    )
                parts.append(part)
            content = parts
        read.append({"role": role, "content": content})
    return read, images


def image_bytes(image_url, message: int, allow_urls: bool) -> bytes:
    """The file of an image, as base64 data in the URL or, if that is allowed, from a public address."""
    url = image_url.get("url") if isinstance(image_url, dict) else image_url
    if not isinstance(url, str):
        raise RequestError(f"Message {message} has an image_url without a url.", param="messages")
    try:
        with naming(url):
            if url[:5].lower() == "data:":
                return from_base64(url)
            if allow_urls and url[:8].lower().startswith(WEB):
                return download(url, only_public=True)
    except ValueError as error:
        raise RequestError(str(error), param="messages", code="invalid_image_url") from error
    allowed = "a URL of a public address, or " if allow_urls else ""
    raise RequestError(
        f"The image {shown(url)} of message {message} may not be opened: give {allowed}its data, as "
        "data:image/jpeg;base64,...",
        param="messages",
        code="invalid_image_url",
    )


# --- Answers ---


class Form:
    """Puts what is said of one answer into the protocol's objects."""

    def __init__(self, model: str, prompt_tokens: int):
        self.model, self.prompt_tokens = model, prompt_tokens
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def usage(self, tokens: int) -> dict:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
        }

    def whole(self, text: str, reason: str, tokens: int) -> dict:
        """The answer in one piece. reason: "stop" or "length"."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {**self._object("chat.completion"), "choices": [choice], "usage": self.usage(tokens)}

    def chunk(self, delta: dict, reason: str | None = None) -> dict:
        """A piece of the answer."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._object("chat.completion.chunk"), "choices": [choice]}

    def last_chunk(self, tokens: int) -> dict:
        """What it took, for those who asked."""
        return {**self._object("chat.completion.chunk"), "choices": [], "usage": self.usage(tokens)}

    def _object(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(data: dict | str) -> str:
    """A line of a stream (server-sent events)."""
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"
