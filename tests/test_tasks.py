"""The benchmarks' records: prompts and the published scores."""

import dataclasses

import pytest

from pheye.evaluation.tasks import TASKS
from pheye.training import stages

pytestmark = pytest.mark.once


def test_prompts_are_those_of_the_paper():
    assert TASKS["textvqa"].prompt_for("What brand? ") == (
        "What brand? Answer the question using a single word or phrase"
    )
    assert TASKS["aokvqa"].prompt_for("What is it?", ["a cat", "a {dog}"]) == (
        "What is it?\nA. a cat\nB. a {dog}\nAnswer with the option's letter from the given choices directly."
    )
    assert TASKS["nocaps"].prompt_for("") == "Provide a one-sentence caption for the provided image"
    assert TASKS["docci"].prompt_for("") == (
        "Generate a highly detailed description for the provided image using multiple sentences"
    )
    assert TASKS["textcaps"].prompt_for("") == (
        "Generate a one-sentence caption for the provided image, incorporating textual elements visible in the image."
    )


def test_a_question_may_hold_braces():
    assert TASKS["gqa"].prompt_for("Is {question} {here}?").startswith("Is {question} {here}? Answer the")


def test_what_is_asked_in_training_is_asked_here():
    sources = next(stage for stage in stages.STAGES.values() if "textvqa" in stage.sources).sources
    names = {"vqav2": "vqav2", "gqa": "gqa", "okvqa": "ok-vqa", "ocrvqa": "ocr-vqa", "textvqa": "textvqa"}
    names |= {"stvqa": "st-vqa", "textcaps": "textcaps", "aokvqa": "a-okvqa"}
    for task, source in names.items():
        assert TASKS[task].prompt.endswith(sources[source].prompt), task
        assert sources[source].prompt


def test_published_scores_of_the_paper():
    scores = {
        name: [TASKS[task].published.scores.get(name) for task in ("vqav2", "nocaps", "textvqa", "textcaps")]
        for name in TASKS["textvqa"].published.scores
    }
    assert scores == {
        "Pheye-x4-448": [75.2, 110.1, 45.9, 106.4],
        "Pheye-x4-672": [75.5, 110.8, 49.2, 111.9],
        "Pheye-x2-448": [76.0, 111.8, 47.3, 108.9],
        "Pheye-x2-672": [76.4, 110.5, 50.5, 115.9],
        "moondream2": [77.7, 92.5, 49.7, 120.2],
        "MoE-LLaVA-2.7Bx4": [77.1, None, 50.2, None],
    }
    splits = {task: TASKS[task].published.split for task in ("vqav2", "nocaps", "textvqa", "textcaps")}
    assert splits == {"vqav2": "test-dev", "nocaps": "val", "textvqa": "val", "textcaps": "test"}
    assert all(not task.published for name, task in TASKS.items() if name not in splits)


def test_a_record_cannot_be_changed_by_mistake():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TASKS["gqa"].split = "val"
