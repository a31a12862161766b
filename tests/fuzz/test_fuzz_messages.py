"""Chat messages of any kind become a prompt with all their words and their image, or one error that says why not."""

import base64
import io

import pytest
from jinja2.exceptions import TemplateError
from PIL import Image

from tiny import tiny_processor

st = pytest.importorskip("hypothesis.strategies", reason="hypothesis is not installed")
from searching import SECONDS, search  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 600)]

IMAGE = Image.new("RGB", (20, 10), "red")
PNG = io.BytesIO()
IMAGE.save(PNG, "PNG")
BASE64 = base64.b64encode(PNG.getvalue()).decode()
PROCESSOR = tiny_processor()

WORDS = st.sampled_from(["What is it?", "", " ", "\n", "<image>", "{{ 7 * 7 }}", "None", "\nOutput: yes"]) | st.text()
NOISE = st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=5) | WORDS
THINGS = st.recursive(NOISE, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
SOURCES = st.sampled_from(
    [IMAGE, BASE64, f"data:image/png;base64,{BASE64}", {"url": f"data:image/png;base64,{BASE64}"}]
)
KEYS = st.sampled_from(["image", "path", "url", "base64", "image_url", "text", "type", "source"])
TYPES = st.sampled_from(["text", "image", "image_url", "video", "audio", "input_text", "input_image", "TEXT"])
PARTS = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, WORDS),
    st.just({"type": "image", "image": IMAGE}),
    st.builds(lambda kind, rest: {**rest, "type": kind}, TYPES, st.dictionaries(KEYS, SOURCES | THINGS, max_size=2)),
    st.dictionaries(KEYS, SOURCES | THINGS, max_size=2),
    SOURCES,
    THINGS,
)
CONTENTS = st.one_of(WORDS, st.lists(PARTS, max_size=3), st.lists(PARTS, max_size=2).map(tuple), PARTS)
ROLES = st.sampled_from(["user", "assistant", "system"]) | THINGS
MESSAGES = st.one_of(
    st.builds(lambda role, content: {"role": role, "content": content}, ROLES, CONTENTS),
    st.dictionaries(st.sampled_from(["role", "content", "images", "name"]), CONTENTS, max_size=3),
    THINGS,
)
TALKS = st.lists(CONTENTS, min_size=1, max_size=3).map(
    lambda contents: [
        {"role": "assistant" if number % 2 else "user", "content": content} for number, content in enumerate(contents)
    ]
)
ONE = TALKS | st.lists(MESSAGES, max_size=3)
CONVERSATIONS = st.one_of(ONE, ONE.map(tuple), st.lists(ONE, max_size=2), MESSAGES, THINGS)


def texts_of(conversation) -> list[str]:
    """All that is said, as it must stand in the prompt."""
    found = []
    for message in conversation:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
        found.append("".join(parts).lstrip() if message["role"] == "assistant" else "".join(parts))
    return found


def speaks_of_image(conversation) -> bool:
    contents = [message["content"] for message in conversation]
    return any(part["type"] != "text" for content in contents if not isinstance(content, str) for part in content)


def check(conversation):
    try:
        prompts = PROCESSOR.apply_chat_template(conversation, add_generation_prompt=True)
    except (ValueError, TemplateError) as error:
        assert str(error)
        return
    is_batch = not isinstance(prompts, str)
    conversations = conversation if is_batch else [conversation]
    for one, prompt in zip(conversations, prompts if is_batch else [prompts], strict=True):
        said, place = texts_of(one), 0
        for text in said:
            place = prompt.index(text, place) + len(text)
    try:
        inputs = PROCESSOR.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    except ValueError as error:
        assert str(error)
        return
    with_image = [speaks_of_image(one) for one in conversations]
    assert ("pixel_values" in inputs) == any(with_image)
    if any(with_image):
        assert len(inputs["pixel_values"]) == len(conversations)
        grids = inputs.get("image_grids")
        assert all(with_image) if grids is None else (grids > 0).flatten(1).any(1).tolist() == with_image
    for ids, mask, prompt in zip(
        inputs["input_ids"], inputs["attention_mask"], prompts if is_batch else [prompts], strict=True
    ):
        assert PROCESSOR.tokenizer.decode(ids[mask.bool()], clean_up_tokenization_spaces=False) == prompt


def test_no_image_and_no_word_is_lost_and_no_other_error_is_raised():
    search(check, CONVERSATIONS, rounds=500)
