"""Questions at every budget, their images encoded once: against one question at a time, with pixels."""

from pathlib import Path

import pytest
import torch

from pheye.answering.engine import encoded
from pheye.answering.rows import Request
from pheye.common.command import InputError
from pheye.training.collator import PheyeCollator
from pheye.training.questions import (
    answered,
    batches,
    digest_of,
    losses_of,
    read_questions,
    right_answer,
    tokens_of,
)

from budget_runs import BUDGETS, KINDS, model_with_budgets, write_questions
from tiny import tiny_image, tiny_processor

OPTIONS = {"task": "own", "prompt": None, "images": None}


@pytest.fixture
def data(tmp_path) -> Path:
    return write_questions(tmp_path / "data", 3, lambda picture, kind: ("no", "a long answer, this time")[kind])


def test_losses_of_a_batch_are_those_of_each_question_alone(data):
    model, processor = model_with_budgets(router_size=8), tiny_processor()
    _, requests = read_questions(str(data), **OPTIONS)
    assert [request.id for request in requests] == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]
    (data.parent / "1.png").write_bytes(b"broken")
    collate, seen = PheyeCollator(processor), []
    for batch in batches(processor, requests, batch_size=4, workers=0):
        text = answered(processor, batch.conversations, [right_answer(request) for request in batch.requests])
        image = encoded(model, batch.image_inputs)
        for budget in range(len(BUDGETS)):
            found = losses_of(model, text, image, budget) / tokens_of(text)
            for request, loss in zip(batch.requests, found, strict=True):
                turns = zip(("user", "assistant"), (request.prompt, request.fields["references"][0]), strict=True)
                messages = [{"role": role, "content": content} for role, content in turns]
                one = collate([{"id": request.id, "images": [request.image], "messages": messages}])
                one = {name: value for name, value in one.items() if isinstance(value, torch.Tensor)}
                torch.testing.assert_close(loss, model(**one, vision_budget=budget).loss, atol=1e-5, rtol=1e-4)
        seen += [request.id for request in batch.requests] + list(batch.errors)
        assert all("could not be read" in error for error in batch.errors.values())
    assert sorted(seen) == sorted(request.id for request in requests)


def test_a_picture_that_several_questions_share_is_encoded_once(data, monkeypatch):
    model, processor = model_with_budgets(), tiny_processor()
    _, requests = read_questions(str(data), **OPTIONS)
    [batch] = batches(processor, [requests[row] for row in (0, 2, 1, 4)], batch_size=4, workers=0)
    expected = model.get_image_features(**batch.image_inputs).last_hidden_state
    seen, encode = [], model.get_image_features

    def count(pixel_values, **others):
        seen.append(len(pixel_values))
        return encode(pixel_values, **others)

    monkeypatch.setattr(model, "get_image_features", count)
    found = encoded(model, batch.image_inputs)["image_hidden_states"]
    assert seen == [3]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_unequal_canvases_and_several_images(tmp_path):
    model = model_with_budgets(canvases=[[1, 2], [2, 2], [3, 1]], max_images=2)
    processor = tiny_processor(model.config)
    images = [tiny_image(seed, *size) for seed, size in enumerate([(80, 40), (50, 50), (30, 90)])]
    asked = [images[0], [images[1], images[2]], images[0], images[2]]
    requests = [Request(number, image, "What?", {"references": ["no"]}) for number, image in enumerate(asked)]
    together, alone = (
        torch.cat(
            [
                losses_of(model, answered(processor, batch.conversations, ["no"] * size), image, 3)
                for batch in batches(processor, requests, batch_size=size, workers=0)
                for image in [encoded(model, batch.image_inputs)]
            ]
        )
        for size in (4, 1)
    )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert together[0] == together[2] and together.unique().numel() == 3


def test_text_that_is_too_long_is_told():
    model, processor = model_with_budgets(), tiny_processor()
    text = answered(processor, [[{"role": "user", "content": "what? " * 100}]], ["no"])
    with pytest.raises(InputError, match="512 positions"):
        losses_of(model, text, {"image_hidden_states": torch.zeros(1, 25, 32)}, 0)


def test_prompts_ids_and_answers_change_the_digest_and_rows_without_an_image_are_left_out(data):
    _, requests = read_questions(str(data), **OPTIONS)
    _, prompted = read_questions(str(data), **{**OPTIONS, "prompt": "{question} One word."})
    assert prompted[0].prompt == f"{KINDS[0]} One word."
    content = data.read_text()
    data.write_text(content.replace('"no"', '"now"'))
    _, other = read_questions(str(data), **OPTIONS)
    assert len({digest_of(requests), digest_of(prompted), digest_of(other), digest_of(requests[1:])}) == 4
    data.write_text(content.replace('"image": "0.png"', '"image": []'))
    _, fewer = read_questions(str(data), **OPTIONS)
    assert [request.id for request in fewer] == [request.id for request in requests[2:]]
