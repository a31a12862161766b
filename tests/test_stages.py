"""The stages of the recipe are the paper's."""

import json

import pytest

from pheye.training.formats import Source
from pheye.training.stages import STAGES, completed, stage_sources
from pheye.training.train import read_eval_sources, read_sources

pytestmark = pytest.mark.once


def named(*names: str, **fields) -> list[tuple[Source, set[str]]]:
    """Sources of these names, and what was said of each."""
    return [(Source(f"/data/{name}.json", name, **fields), {"path", "name", *fields}) for name in names]


def test_learning_rates_and_sizes_are_those_of_the_recipe():
    assert {name: (stage.learning_rate, stage.samples) for name, stage in STAGES.items()} == {
        "describe": (2e-4, 1_246_000),
        "instruct": (1e-4, 964_000),
        "tasks": (5e-5, 676_000),
    }
    thousands = {name: record.samples // 1000 for name, record in STAGES["tasks"].sources.items()}
    assert thousands == {
        **{"llava": 158, "llavar": 20, "vqav2": 166, "gqa": 144, "ok-vqa": 9, "ocr-vqa": 80, "textvqa": 35},
        **{"st-vqa": 26, "a-okvqa": 17, "textcaps": 22},
    }
    assert abs(sum(thousands.values()) - 676) <= 1  # each is rounded to thousands, as in the paper


def test_prompts_are_those_of_the_recipe():
    sources = STAGES["tasks"].sources
    one_word = {name for name, record in sources.items() if record.prompt.endswith("single word or phrase")}
    assert one_word == {"vqav2", "gqa", "ok-vqa", "ocr-vqa", "textvqa", "st-vqa"}
    assert sources["a-okvqa"].prompt == "Answer with the option's letter from the given choices directly."
    assert sources["textcaps"].prompt.startswith("Generate a one-sentence caption for the provided image, incorp")
    assert sources["llava"].prompt == sources["llavar"].prompt == ""
    assert [name for stage in STAGES.values() for name, record in stage.sources.items() if record.caption] == [
        "sharegpt4v-pt"
    ]
    assert {record.turns for stage in STAGES.values() for record in stage.sources.values()} == {1}


def test_records_fill_in_what_the_mixture_leaves_out():
    stage = STAGES["tasks"]
    found = stage_sources(stage, named(*stage.sources, image_folder="/images"))
    assert {source.name: source.most for source in found} == {
        name: record.samples for name, record in stage.sources.items()
    }
    gqa = next(source for source in found if source.name == "gqa")
    assert gqa == Source(
        "/data/gqa.json",
        "gqa",
        image_folder="/images",
        prompt="Answer the question using a single word or phrase",
        most=144_000,
    )
    [described] = stage_sources(STAGES["describe"], named("sharegpt4v-pt"))
    assert described.caption and described.most == 1_246_000


def test_what_the_mixture_says_comes_first():
    record = STAGES["tasks"].sources["vqav2"]
    own = Source("x.json", "vqav2", prompt="Short.", turns=3, samples=5)
    assert completed(own, {"prompt", "turns", "caption", "samples"}, record) == own
    weighted = completed(Source("x.json", "vqav2", weight=0.5), {"weight"}, record)
    assert (weighted.most, weighted.weight, weighted.prompt) == (None, 0.5, record.prompt)
    bounded = completed(Source("x.json", "vqav2", most=5), {"most"}, record)
    assert (bounded.most, bounded.prompt) == (5, record.prompt)


def test_what_a_mixture_file_says_comes_first_even_if_it_is_the_default(tmp_path):
    stage, path = STAGES["describe"], tmp_path / "mixture.json"
    entry = {"path": "a.json", "caption": False, "prompt": "", "turns": 1, "most": 7}
    path.write_text(json.dumps({"sources": dict.fromkeys(stage.sources, entry)}))
    for sources in (read_sources([str(path)], "describe"), read_eval_sources([str(path)], "describe")):
        assert [(one.caption, one.prompt, one.turns, one.most) for one in sources] == [(False, "", 1, 7)]
    path.write_text(json.dumps({"sources": {name: {"path": "a.json"} for name in stage.sources}}))
    [described] = read_sources([str(path)], "describe", all_turns=True)
    assert described.caption and described.turns is None  # the option comes before the stage


def test_own_data_under_other_names_stay_as_they_are():
    own = named("mine", "yours", turns=2)
    sources = [source for source, _ in own]
    assert stage_sources(STAGES["tasks"], own) == sources
    stage = STAGES["instruct"]
    both = stage_sources(stage, named(*stage.sources) + own)
    assert both[-2:] == sources and {source.most for source in both} == {None}


def test_a_stage_of_which_data_are_missing_is_refused_with_names_and_sizes():
    with pytest.raises(
        ValueError, match=r"'tasks', these are missing: llavar \(20,000 samples\), vqav2 \(166,000"
    ) as e:
        stage_sources(STAGES["tasks"], named("llava", "mine"))
    assert "textcaps (22,000 samples)" in str(e.value) and "llava (" not in str(e.value)
    with pytest.raises(ValueError, match=r"svit \(964,000 samples together with mimic-it, lrv, svit, lvis-instruct\)"):
        stage_sources(STAGES["instruct"], named("lrv", "mimic-it", "lvis-instruct"))
