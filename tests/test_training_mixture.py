"""Samples are drawn by seed, epoch and index alone, of mixtures and of streams."""

import json
import pickle
import random
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches

from pheye.training.formats import Source
from pheye.training.mixture import CAPTION_INSTRUCTIONS, Mixture, MixtureSampler, Stream, epoch_rows, read_mixture
from pheye.training.train import read_sources

from toy_data import (
    by_id,
    conversation,
    image_table,
    images,
    llava_rows,
    long_rows,
    messages,
    mixture,
    png,
    with_images,
    write_json,
)

pytestmark = pytest.mark.once


@pytest.fixture
def folder(tmp_path):
    return with_images(tmp_path)


# --- What `--data` stands for ---


def test_a_mixture_file_and_plain_paths_become_sources(folder):
    write_json(folder, llava_rows(1), "own.jsonl")
    (folder / "sub").mkdir()
    content = {
        "sources": [{"path": "own.jsonl", "image_folder": "sub", "turns": None}, {"path": "org/set", "name": "hub"}]
    }
    (folder / "mixture.json").write_text(json.dumps(content))
    (folder / "named.json").write_text(json.dumps({"sources": {"n": {"path": "own.jsonl", "prompt": "P"}}}))
    found = read_mixture(
        [folder / "mixture.json", str(folder / "named.json"), "x.json"], prompt="D", image_folder=None
    )
    assert found == [
        Source(f"{folder}/own.jsonl", "own", image_folder=f"{folder}/sub", turns=None, prompt="D"),
        Source("org/set", "hub", prompt="D"),
        Source(f"{folder}/own.jsonl", "n", prompt="P"),
        Source("x.json", "x", prompt="D"),
    ]


def test_all_turns_are_shown_where_that_is_the_default(folder):
    """None is a value of `turns`, all of them, and not the lack of one."""
    path = write_json(folder, llava_rows(1))
    (folder / "mixture.json").write_text(json.dumps({"sources": [{"path": path, "name": "own", "turns": 2}]}))
    assert [source.turns for source in read_mixture([path, folder / "mixture.json"], turns=None)] == [None, 2]
    assert [read_sources([path], all_turns=is_all)[0].turns for is_all in (True, False)] == [None, 1]


def test_data_in_json_are_not_taken_for_a_mixture(folder):
    rows = [{**llava_rows(1)[0], "sources": "web"}]
    for name in ("data.json", "data.jsonl"):
        path = write_json(folder, rows, name)
        assert read_mixture([path]) == [Source(path)]


@pytest.mark.parametrize(
    "content, message",
    [
        ({"sources": []}, "must list at least one data set"),
        (
            {"sources": [{"path": "a.json", "folder": "b"}]},
            "unknown field 'folder'; a source has path, name, image_fold",
        ),
        ({"sources": [{"name": "a"}]}, 'has no "path"'),
        ({"sources": [{"path": "a.json", "samples": 3, "weight": 2}]}, "samples=3 and weight=2; give one"),
        ({"sources": [{"path": "a.json", "samples": 0}]}, "samples=0; it must be an integer of at least 1"),
        ({"sources": [{"path": "a.json", "turns": 1.5}]}, "turns=1.5; it must be an integer"),
        ({"sources": [{"path": "a.json", "weight": 0}]}, "weight=0; it must be greater"),
        ({"sources": [{"path": "a.json", "question_column": "q"}]}, "question_column but no answers_column"),
        ({"sources": [{"path": "a.json"}, {"path": "b/a.json"}]}, "2 data sets are called 'a'; give each a `name`"),
    ],
)
def test_a_faulty_mixture_file_is_refused(tmp_path, content, message):
    (tmp_path / "mixture.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_mixture([tmp_path / "mixture.json"])


# --- Choosing at random ---


@pytest.mark.parametrize("size, count", [(5, 5), (5, 2), (5, 3), (5, 13), (1, 4), (7, 14)])
def test_epochs_draw_whole_permutations_one_after_another(size, count):
    drawn = np.concatenate([epoch_rows(size, count, epoch, (3,)) for epoch in range(20)])
    assert len(drawn) == 20 * count
    for start in range(0, len(drawn) - size + 1, size):
        assert sorted(drawn[start : start + size]) == list(range(size))
    if size > 1:
        rounds = {tuple(drawn[start : start + size]) for start in range(0, len(drawn) - size + 1, size)}
        assert len(rounds) > 1


def test_samples_and_weights_set_how_often_each_source_is_drawn(folder):
    paths = [write_json(folder, llava_rows(size), f"{name}.json") for name, size in (("a", 4), ("b", 3), ("c", 6), ("d", 2))]  # fmt: skip  # noqa: E501
    draws = [{}, {"samples": 8}, {"weight": 0.5}, {"weight": 2.5}]
    sources = [Source(path, **fields) for path, fields in zip(paths, draws, strict=True)]
    mixed = Mixture(sources, seed=1)
    assert mixed.counts == {"a": 4, "b": 8, "c": 3, "d": 5} and len(mixed) == 20
    drawn = Counter((sample["source"], sample["id"]) for sample in mixed)
    assert Counter(name for name, _ in drawn.elements()) == mixed.counts
    assert {drawn["a", f"row-{number}"] for number in range(4)} == {1}
    assert {drawn["b", f"row-{number}"] for number in range(3)} == {2, 3}
    with pytest.raises(IndexError):
        mixed[20]


def test_an_epoch_draws_at_most_what_a_source_says_and_repeats_nothing_to_make_it_up(folder):
    path = write_json(folder, long_rows(9), "long.json")
    sources = [Source(path, "few", most=4), Source(path, "all", most=20), Source(path, "weighted", weight=3, most=20)]
    assert Mixture(sources, 0).counts == {"few": 4, "all": 9, "weighted": 20}


def random_mixture(folder) -> Mixture:
    path = write_json(folder, long_rows(9), "long.json")
    captions = image_table(
        folder, "captions", image=images(0, 1), c=[[f"{row}{n}" for n in range(9)] for row in range(2)]
    )
    sources = [
        Source(path, samples=20),
        Source(path, "described", caption=True, samples=5),
        Source(captions, answers_column="c", prompt="P", samples=5),
    ]
    return Mixture(sources, seed=4)


def epochs_of(mixed: Mixture, count: int = 3) -> list[list[dict]]:
    epochs = []
    for epoch in range(count):
        mixed.set_epoch(epoch)
        epochs.append([mixed[index] for index in range(len(mixed))])
    return epochs


def test_samples_are_a_function_of_seed_epoch_and_index(folder):
    mixed = random_mixture(folder)
    expected = epochs_of(mixed)
    assert expected[0] != expected[1] != expected[2]
    shown = [[sample["messages"] for sample in epoch[:20]] for epoch in expected]
    assert shown[0] != shown[1] != shown[2]
    again = random_mixture(folder)
    for epoch, index in random.Random(0).sample([(epoch, index) for epoch in range(3) for index in range(30)], 40):
        random.seed(index)
        np.random.seed(index)
        again.set_epoch(epoch)
        assert again[index] == expected[epoch][index]
    assert epochs_of(Mixture(mixed.sources, seed=5)) != expected
    assert epochs_of(pickle.loads(pickle.dumps(mixed))) == expected


def test_turns_are_drawn_anew_by_seed_epoch_and_index_though_the_row_is_the_same(folder):
    path = write_json(folder, long_rows(1))

    def turns(seed: int, epoch: int) -> tuple[str, ...]:
        mixed = Mixture([Source(path, samples=40)], seed)
        mixed.set_epoch(epoch)
        return tuple(sample["messages"][1]["content"] for sample in mixed)

    drawn = [turns(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(drawn)) == len(drawn)
    assert all(set(one) == set("012345") for one in drawn)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_see_the_same_samples_in_every_epoch(folder, persistent):
    expected = epochs_of(random_mixture(folder))
    mixed = random_mixture(folder)
    loader = torch.utils.data.DataLoader(
        mixed, batch_size=7, collate_fn=list, num_workers=2, persistent_workers=persistent
    )
    for epoch in range(3):
        mixed.set_epoch(epoch)
        assert [sample for batch in loader for sample in batch] == expected[epoch]


def loader_of(mixed: Mixture, process: int, processes: int):
    loader = torch.utils.data.DataLoader(mixed, batch_size=3, collate_fn=list, sampler=MixtureSampler(mixed))
    return prepare_data_loader(loader, num_processes=processes, process_index=process, put_on_device=False)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_sampler_brings_the_epoch_to_the_mixture_and_a_resumed_run_goes_on_with_it(folder, processes):
    """accelerate tells the data set its epoch with one process, and not after a resume or with several; the sampler it
    always tells."""
    whole = []
    for epoch in range(2):
        batches = []
        for process in range(processes):
            loader = loader_of(random_mixture(folder), process, processes)
            loader.set_epoch(epoch)
            batches.append(list(loader))
        whole.append(batches)
    assert whole[0] != whole[1]
    ids = [(sample["source"], sample["id"]) for batches in whole[1] for batch in batches for sample in batch]
    mixed = random_mixture(folder)
    mixed.set_epoch(1)
    assert sorted(ids) == sorted((sample["source"], sample["id"]) for sample in mixed)
    for process in range(processes):
        mixed = random_mixture(folder)
        loader = skip_first_batches(loader_of(mixed, process, processes), 2)
        loader.set_epoch(1)
        assert list(loader) == whole[1][process][2:]


def test_one_turn_or_several_are_drawn_in_their_order(folder):
    path = write_json(folder, long_rows(1))
    turns = messages(*((f"0.{turn}?", f"{turn}") for turn in range(6)))
    assert mixture(path, turns=None)[0]["messages"] == mixture(path, turns=9)[0]["messages"] == turns
    for count in (1, 3):
        seen = Counter()
        for sample in mixture(path, turns=count, samples=300):
            answers = [message["content"] for message in sample["messages"][1::2]]
            assert len(answers) == count and answers == sorted(set(answers))
            assert [message["content"] for message in sample["messages"][::2]] == [
                f"0.{answer}?" for answer in answers
            ]
            seen.update(answers)
        assert set(seen) == set("012345") and min(seen.values()) > 0.7 * 300 * count / 6


def test_a_caption_instruction_takes_the_place_of_the_question(folder):
    assert len(set(CAPTION_INSTRUCTIONS)) == 10
    path = write_json(folder, llava_rows(2))
    samples = list(mixture(path, caption=True, samples=400))
    asked = Counter(sample["messages"][0]["content"] for sample in samples)
    assert set(asked) == set(CAPTION_INSTRUCTIONS) and min(asked.values()) > 15
    assert {sample["messages"][1]["content"] for sample in samples} == {"A0", "A1"}


def test_the_formatting_prompt_is_appended_once(folder):
    rows = llava_rows(2)
    rows[1]["conversations"] = conversation(("Where?\nIn a word.", "Here"))
    samples = by_id(mixture(write_json(folder, rows), prompt="In a word."))
    assert [s["messages"][0]["content"] for s in samples] == ["Question 0? In a word.", "Where?\nIn a word."]


def test_any_caption_of_a_row_is_drawn(tmp_path):
    path = image_table(tmp_path, image=images(0), c=[["x", "y", "z"]])
    drawn = Counter(s["messages"][1]["content"] for s in mixture(path, answers_column="c", prompt="P", samples=90))
    assert set(drawn) == {"x", "y", "z"} and min(drawn.values()) > 15


# --- Streams ---


@pytest.fixture(autouse=True)
def shorter_waits(monkeypatch):
    """`datasets` waits for seconds at the end of each stream until the threads of pyarrow are gone."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)


def stream_source(folder, name: str, rows: int, **fields) -> Source:
    """Rows in three shards, so that workers can share them."""
    table = datasets.Dataset.from_dict(
        {
            "id": [f"{name}{row}" for row in range(rows)],
            "image": [png(0)] * rows,
            "messages": [messages(*((f"{row}.{turn}?", f"{turn}") for turn in range(6))) for row in range(rows)],
        }
    )
    (folder / name).mkdir(exist_ok=True)
    for shard in range(3):
        table.shard(3, shard).to_parquet(folder / name / f"{shard}.parquet")
    return Source(str(folder / name), streaming=True, **fields)


def test_a_stream_has_every_row_once_in_an_order_of_its_own_per_epoch(tmp_path):
    source = stream_source(tmp_path, "a", 12)
    stream = Stream([source], 0)
    first = list(stream)
    assert list(stream) == list(Stream([source], 0)) == first
    stream.set_epoch(1)
    second = list(stream)
    for epoch in (first, second):
        assert sorted(sample["id"] for sample in epoch) == sorted(f"a{row}" for row in range(12))
    assert [sample["id"] for sample in first] != [sample["id"] for sample in second]
    assert by_id(first) != by_id(second)  # other turns, too
    assert list(Stream([source], 1)) != first
    stream.set_epoch(0)
    assert list(stream) == first


def test_workers_share_a_stream_and_change_none_of_its_samples(tmp_path):
    stream = Stream([stream_source(tmp_path, "a", 12)], 0)
    for epoch in range(2):
        stream.set_epoch(epoch)
        loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
        assert by_id(loader) == by_id(stream)


def test_streams_are_interleaved_by_their_shares(tmp_path):
    sources = [stream_source(tmp_path, "a", 30, weight=3), stream_source(tmp_path, "b", 30, weight=1)]
    drawn = Counter(sample["source"] for sample in Stream(sources, 0))
    assert drawn["b"] >= 30 and 2 * drawn["b"] < drawn["a"] < 4.5 * drawn["b"]


def test_streams_do_not_mix_with_what_is_not_streamed(folder):
    stream = stream_source(folder, "a", 3)
    own = Source(write_json(folder, llava_rows(1)))
    with pytest.raises(ValueError, match="data is not streamed, so no data set may be"):
        Stream([stream, own], 0)
    with pytest.raises(ValueError, match="a is streamed, so every data set must be"):
        Mixture([stream, own], 0)
    with pytest.raises(ValueError, match="a JSON file cannot be"):
        Stream([Source(own.path, streaming=True)], 0)
    with pytest.raises(ValueError, match="give all streamed sources `samples`, or none"):
        Stream([stream, stream_source(folder, "b", 3, samples=2)], 0)
    with pytest.raises(ValueError, match="no column 'q', but id, image, messages"):
        Stream([stream_source(folder, "c", 3, question_column="q", answers_column="a")], 0)
