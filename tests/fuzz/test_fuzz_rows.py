"""Rows of data of any kind become samples with all their words, or one error that says why not; no name leads out."""

import json
import os
from pathlib import Path

import pytest

from pheye.common.command import InputError
from pheye.training.formats import Source
from pheye.training.mixture import Mixture

st = pytest.importorskip("hypothesis.strategies", reason="hypothesis is not installed")
from searching import SECONDS, search  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.once, pytest.mark.timeout(SECONDS + 600)]

TEXTS = (
    st.sampled_from(["What?", "<image>\nWhat?", "A cup.", "", " ", "<|endoftext|>", "\u2028", "\ud800"]) | st.text()
)
NOISE = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
THINGS = st.recursive(NOISE, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
NAMES = st.sampled_from(["a.png", "sub/a.png", "../a.png", "/etc/passwd", "sub/../../a.png", "out/a.png", ".", "a\0"])
URLS = st.sampled_from(["http://127.0.0.1/a.png", "file:///etc/passwd", "data:image/png;base64,AAAA"])
IMAGES = NAMES | URLS | THINGS | st.lists(NAMES, max_size=2) | st.builds(lambda path: {"path": path}, NAMES)
KINDS_OF_PARTS = ["text", "image", "input_text", "video"]
PARTS = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, TEXTS),
    st.just({"type": "image"}),
    st.fixed_dictionaries({}, optional={"type": st.sampled_from(KINDS_OF_PARTS), "text": TEXTS, "image": NAMES}),
    THINGS,
)
PLACES = st.booleans().flatmap(lambda is_good: st.just("a.png") if is_good else IMAGES)
CONTENTS = st.booleans().flatmap(lambda is_list: st.lists(PARTS, max_size=3) if is_list else TEXTS | THINGS)
KINDS = {
    "conversations": (("from", "human", "gpt"), "value", TEXTS | THINGS),
    "messages": (("role", "user", "assistant"), "content", CONTENTS),
}


def turns(kind: str):
    """What a row of this kind says, mostly in the right order."""
    (role, *who), key, contents = KINDS[kind]
    ordered = st.lists(contents, min_size=1, max_size=4).map(
        lambda said: [{role: who[number % 2], key: text} for number, text in enumerate(said)]
    )
    return (
        ordered | st.lists(st.dictionaries(st.sampled_from([role, key, "x"]), contents | THINGS), max_size=3) | THINGS
    )


def row(kind: str):
    others = {"id": THINGS, "images": IMAGES, "x": THINGS}
    return st.fixed_dictionaries({"image": PLACES, kind: turns(kind)}, optional=others)


ROWS = st.sampled_from(sorted(KINDS)).flatmap(lambda kind: st.tuples(st.just(kind), row(kind) | THINGS))


def words_of(content) -> str:
    """All that a message says."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def without_blanks(text: str) -> str:
    return "".join(text.replace("<image>", "").split())


def test_no_word_is_lost_no_name_leads_out_and_no_other_error_is_raised(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder, folder / "sub"):
        (place / "a.png").write_bytes(b"no image, but there")
    (folder / "out").symlink_to(tmp_path)
    path = folder / "data.json"
    good = {"id": "good", "image": "a.png"}

    def check(drawn):
        kind, drawn_row = drawn
        (role, *who), key, _ = KINDS[kind]
        first = {**good, kind: [{role: who[0], key: "What?"}, {role: who[1], key: "A cup."}]}
        path.write_text(json.dumps([first, drawn_row]))
        try:
            mixture = Mixture([Source(str(path), turns=None)], 0)
            samples = [mixture[index] for index in range(len(mixture))]
        except InputError as error:
            assert str(error)
            return
        if len(samples) == 1:  # the row has several images, or speaks of one and has none, and was left out
            return
        for image in [image for sample in samples for image in sample["images"]]:
            if isinstance(image, str) and not image.startswith("data:"):
                assert Path(os.path.realpath(image)).is_relative_to(os.path.realpath(folder))
        if kind == "messages":  # nor an image beside the row's own
            parts = [p for m in drawn_row[kind] if not isinstance(m["content"], str) for p in m["content"]]
            assert not any(part["type"] != "text" and part.get("image") for part in parts)
        said = [without_blanks(words_of(message[key])) for message in drawn_row[kind]]
        assert said in [[without_blanks(m["content"]) for m in sample["messages"]] for sample in samples]

    search(check, ROWS, rounds=20)
