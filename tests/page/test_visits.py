"""What is held for a visitor: an image that is encoded once, and answers that are watched, stopped and explained."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from pheye import PheyeImageToTextPipeline
from pheye.evaluation.word_attention import answer_with_attention, attention_by_word
from pheye.page import visits
from pheye.page.visits import Answer, Looked, Pace, Visits

from tiny import randomize, tiny_config, tiny_image, tiny_model, tiny_processor

pytestmark = pytest.mark.once

CANVASES = {"canvases": [[1, 2], [2, 1], [2, 2]]}


@pytest.fixture(params=[{}, CANVASES], ids=["squares", "canvases"])
def parts(request):
    model = randomize(tiny_model(tiny_config(**request.param)))
    return model, tiny_processor(model.config)


@pytest.fixture
def picture(tmp_path):
    tiny_image().save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(visits, "DEFAULT_MAX_NEW_TOKENS", 12)


def read(model, processor, looked: Looked, question: str = "What?", stop: threading.Event | None = None):
    answer = Answer(model, processor, looked, question, stop or threading.Event())
    return answer, list(answer)


def test_answers_are_those_of_the_pipeline_and_the_image_is_encoded_once(parts, picture, tmp_path, monkeypatch):
    model, processor = parts
    encoded, encode = [], model.get_image_features
    monkeypatch.setattr(model, "get_image_features", lambda **inputs: encoded.append(1) or encode(**inputs))
    looked = Looked(processor, picture, str(tmp_path))
    pipe = PheyeImageToTextPipeline(model=model, processor=processor)
    for number, question in enumerate(("What?", "How many?")):
        answer, texts = read(model, processor, looked, question)
        expected = pipe(picture, prompt=question, max_new_tokens=12)[0]["generated_text"]
        assert texts[-1] == expected
        assert (answer.encode_seconds is None) == (number == 1)
        assert answer.tokens == 12 and answer.is_cut and answer.tokens_per_second > 0 and answer.first_seconds > 0
    assert len(encoded) == 1
    assert set(looked.inputs) <= {"image_hidden_states", "image_grids"}  # the pixels are gone


def test_two_at_once_encode_the_image_once(model, processor, picture, tmp_path, monkeypatch):
    encoded, begun, encode = [], threading.Event(), model.get_image_features

    def slowly(**inputs):
        encoded.append(1)
        begun.wait(0.2)
        return encode(**inputs)

    monkeypatch.setattr(model, "get_image_features", slowly)
    looked = Looked(processor, picture, str(tmp_path))
    threads = [threading.Thread(target=looked.encode, args=(model,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(encoded) == 1


def test_words_have_the_attention_that_the_command_draws(parts, picture, tmp_path):
    model, processor = parts
    answer, _ = read(model, processor, Looked(processor, picture, str(tmp_path)))
    expected = answer_with_attention(model, processor, Image.open(picture), "What?", 12)
    found, expected = answer.words(), list(attention_by_word(expected))
    assert [word for word, _ in found] == [word for word, _, _ in expected] and found
    for (_, weights), (_, _, others) in zip(found, expected, strict=True):
        np.testing.assert_allclose(weights, others, rtol=1e-4, atol=1e-6)


def test_an_answer_ends_when_it_is_told_to(model, processor, picture, tmp_path, monkeypatch):
    stop, call = threading.Event(), Pace.__call__

    def after_three(self, input_ids, scores, **kwargs):
        if len(self.times) == 2:
            stop.set()
        return call(self, input_ids, scores, **kwargs)

    monkeypatch.setattr(Pace, "__call__", after_three)
    answer, _ = read(model, processor, Looked(processor, picture, str(tmp_path)), stop=stop)
    assert answer.tokens == 3 and not answer.is_cut


def test_an_answer_ends_when_its_reader_leaves(model, processor, picture, tmp_path, monkeypatch):
    paces, call, go_on = [], Pace.__call__, threading.Event()

    def watched(self, *args, **kwargs):
        paces.append(self)
        go_on.wait(5)  # until the reader has left
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Pace, "__call__", watched)
    monkeypatch.setattr(visits, "TextIteratorStreamer", lambda *args, **kwargs: Begun(*args, **kwargs))
    answer = Answer(model, processor, Looked(processor, picture, str(tmp_path)), "What?", threading.Event())
    reader = iter(answer)
    next(reader)
    threading.Timer(0.2, go_on.set).start()
    reader.close()
    assert len(paces) == 1


class Begun(visits.TextIteratorStreamer):
    """Tells of the answer's first token at once, whatever its text."""

    def put(self, value):
        super().put(value)
        self.on_finalized_text("")


def test_what_goes_wrong_while_an_answer_is_made_reaches_its_reader(model, processor, picture, tmp_path):
    looked = Looked(processor, picture, str(tmp_path))
    with pytest.raises(ValueError, match="position"):
        read(model, processor, looked, "What? " * 200)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"no image"), "^The picture could not be read as an image: cannot identify"),
        (lambda path: path.write_bytes(b""), "^The picture could not be read as an image: it is empty"),
        (lambda path: Image.new("1", (20_000, 20_000)).save(path), "^The picture is too large: it may have up to 178"),
        (lambda path: Image.new("1", (1, 6_000_000)).save(path), "^The picture is too tall.*into parts[.]$"),
    ],
)
def test_pictures_that_cannot_be_used_are_refused_without_their_path(processor, tmp_path, make, message):
    path = tmp_path / "image.png"
    make(path)
    with pytest.raises(ValueError, match=message) as refused:
        Looked(processor, str(path), str(tmp_path))
    assert str(tmp_path) not in str(refused.value)


def test_files_outside_of_the_folder_are_not_opened(processor, picture, tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "link.png").symlink_to(picture)
    for path in (picture, str(tmp_path / "inner" / "link.png")):
        with pytest.raises(ValueError, match=r"no such file|no image"):
            Looked(processor, path, str(tmp_path / "inner"))


def test_a_closed_visit_is_gone_and_its_answer_ends():
    visits = Visits()
    visit = visits.of("a")
    assert visits.of("a") is visit and not visit.stop.is_set()
    visits.close("a")
    assert visit.stop.is_set() and visits.of("a") is not visit
    visits.close("unknown")


def test_no_more_visits_are_held_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(visits, "MOST_VISITORS", 2)
    held = Visits()
    first, _, again, _ = held.of("a"), held.of("b"), held.of("a"), held.of("c")
    assert again is first and list(held.open) == ["a", "c"]
    with first.turn:  # he is being answered, and may stop that
        held.of("d")
        assert list(held.open) == ["a", "d"] and held.of("a") is first


def test_pace_is_asked_row_by_row():
    pace = Pace(threading.Event())
    assert pace(torch.zeros(2, 3, dtype=torch.long), None).tolist() == [False, False]
    pace.is_read = False
    assert pace(torch.zeros(2, 3, dtype=torch.long), None).tolist() == [True, True]


def test_answers_at_a_budget_and_what_the_router_took(picture, tmp_path):
    config = tiny_config(self_attention_layers=[3], router_size=8)
    model, processor = tiny_model(config), tiny_processor(config)
    pipe = PheyeImageToTextPipeline(model=model, processor=processor)
    looked, chosen = Looked(processor, picture, str(tmp_path)), []
    model.model.router.forward = lambda states: chosen.append(1) or torch.tensor([[1.0, 0.0]])
    for asked, taken in ((0, 0), (1, 1), (None, 0)):
        answer = Answer(model, processor, looked, "What?", threading.Event(), asked)
        texts = list(answer)
        expected = pipe(picture, prompt="What?", max_new_tokens=12, vision_budget=taken)[0]["generated_text"]
        assert texts[-1] == expected and answer.vision_budget == taken
        answer.words()
    assert len(chosen) == 1  # the maps are those of the budget taken
    assert "vision_budget" not in looked.inputs
