"""What holds for samples of any source: references, and what each must have."""

import pytest
from accelerate import PartialState

from pheye.evaluation.samples import texts

from toys import aokvqa_toy, refused, textvqa_toy, vqa_toy, write

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps its state for the life of a process."""
    PartialState._reset_state()
    yield
    PartialState._reset_state()


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([{"answer": "a", "answer_id": 1}], ("a",)),
        ({"answer": ["a", "b"], "answer_id": [1, 2]}, ("a", "b")),
        *[(nothing, None) for nothing in (None, [], {"answer": []})],
    ],
)
def test_references_in_every_shape(answers, expected):
    assert texts(answers) == expected


def test_answers_that_are_missing(tmp_path):
    options = write(vqa_toy(), tmp_path)
    message = refused("vqav2", *options[:2])
    assert "3 of 3 samples" in message
    assert "--annotations for VQAv2" in message
    toy = textvqa_toy()
    toy.content["data"][2]["answers"] = []
    assert "1 of 3 samples" in refused("textvqa", *write(toy, tmp_path))
    for entry in toy.content["data"]:
        entry["set_name"] = "test"
    assert "34604 for example" in refused("textvqa", *write(toy, tmp_path))
    toy = aokvqa_toy()
    for entry in toy.content:
        entry |= {"correct_choice_idx": None, "split": "test"}
    assert "no server's file is known for --task aokvqa" in refused("aokvqa", *write(toy, tmp_path))


def test_texts_that_are_none(tmp_path):
    toy = textvqa_toy()
    toy.content["data"][0]["question"] = " "
    assert "The question of 34602 in" in refused("textvqa", *write(toy, tmp_path))
    toy = textvqa_toy()
    toy.content["data"][1]["answers"] = [1, 2]
    assert "Sample 34603 of" in refused("textvqa", *write(toy, tmp_path))
