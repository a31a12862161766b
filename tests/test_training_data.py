"""Training data: every format gives the same samples, drawn by seed, epoch and index alone."""

import builtins
import json
import pickle
import random
from collections import Counter
from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches

from pheye.training import data
from pheye.training.data import (
    CAPTION_INSTRUCTIONS,
    Mixture,
    MixtureSampler,
    Source,
    epoch_rows,
    read_mixture,
    scan_json,
    streamed,
)

from tiny import tiny_image

pytestmark = pytest.mark.once


def conversation(*turns: tuple[str, str]) -> list[dict]:
    return [{"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn, strict=True)]


def messages(*turns: tuple[str, str]) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def png(seed: int = 0) -> bytes:
    buffer = BytesIO()
    tiny_image(seed).save(buffer, "PNG")
    return buffer.getvalue()


def llava_rows(count: int) -> list[dict]:
    return [
        {"id": f"row-{number}", "image": "a.png", "conversations": conversation((f"Question {number}?", f"A{number}"))}
        for number in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "b.png").write_bytes(png(1))
    return tmp_path


def write_json(folder, rows, name: str = "data.json") -> str:
    lines = name.endswith(".jsonl")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) if lines else json.dumps(rows)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def write_table(folder, name: str = "table", **columns) -> str:
    datasets.Dataset.from_dict(columns).save_to_disk(folder / name)
    return str(folder / name)


def images(*seeds: int) -> list[dict]:
    return [{"bytes": png(seed), "path": None} for seed in seeds]


def image_table(folder, name: str = "table", image_column: str = "image", is_list: bool = False, **columns) -> str:
    """A table whose image column has the type Image, or a list of it."""
    table = datasets.Dataset.from_dict(columns)
    feature = [datasets.Image()] if is_list else datasets.Image()
    table = table.cast(datasets.Features({**table.features, image_column: feature}))
    table.save_to_disk(folder / name)
    return str(folder / name)


def mixture(path, **fields) -> Mixture:
    return Mixture([Source(str(path), **fields)], seed=0)


def by_id(samples) -> list[dict]:
    return sorted(samples, key=lambda sample: sample["id"])


# --- JSON ---


@pytest.mark.parametrize("chunk", [7, 8, 13, 50, 10**6])
@pytest.mark.parametrize("form", ["compact", "indented", "lines", "lines and blanks", "byte order mark"])
def test_rows_of_json_are_found_byte_for_byte(tmp_path, monkeypatch, chunk, form):
    monkeypatch.setattr(data, "CHUNK", chunk)
    rows = [{"a": 'ö"]}[{\\', "b": [1, {"c": "\n,"}]}, {}, {"d": None, "é": "\u3000\U0001f441"}, {"e": -1.5e3}]
    dump = {"ensure_ascii": False}
    text = {
        "compact": json.dumps(rows, **dump),
        "indented": " \n" + json.dumps(rows, indent=3, **dump) + "\n ",
        "lines": "\n".join(json.dumps(row, **dump) for row in rows),
        "lines and blanks": "\n \n".join(json.dumps(row, **dump) for row in rows) + "\n\n",
        "byte order mark": "\ufeff" + json.dumps(rows, **dump),
    }[form]
    content = text.encode()
    (tmp_path / "x.json").write_bytes(content)
    found = [json.loads(content[start:end]) for start, end, _ in scan_json(tmp_path / "x.json")]
    assert found == rows


def test_json_that_is_not_whole_is_refused_wherever_it_ends(tmp_path):
    content = json.dumps([{"a": 1}, {"b": "two"}]).encode()
    for length in range(1, len(content)):
        (tmp_path / "x.json").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"x\.json is no whole JSON"):
            list(scan_json(tmp_path / "x.json"))
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"b": "tw')
    with pytest.raises(ValueError, match=r"x\.jsonl is no whole JSON: at byte 1\d"):
        list(scan_json(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_rows_become_messages_without_image_marks(folder, name):
    rows = [
        {"id": 7, "image": "a.png", "conversations": conversation(("<image>\nWas ist das?", " Ein Fuß. "))},
        {"image": "b.png", "conversations": conversation(("What?\n<image>", "A"), ("Is it <image>red?", "B"))},
        {"id": "u", "image": "http://host/c.png", "conversations": conversation(("Why?\nHow?", "C\nD"))},
    ]
    samples = by_id(mixture(write_json(folder, rows, name), turns=None))
    turns = [[("What?", "A"), ("Is it red?", "B")], [("Was ist das?", "Ein Fuß.")], [("Why?\nHow?", "C\nD")]]
    places = [f"{folder}/b.png", f"{folder}/a.png", "http://host/c.png"]
    assert samples == [
        {"id": row_id, "source": "data", "image": image, "messages": messages(*shown)}
        for row_id, image, shown in zip("17u", places, turns, strict=True)
    ]


def test_images_are_looked_for_in_the_image_folder(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = write_json(elsewhere, llava_rows(2))
    assert mixture(path, image_folder=str(folder))[0]["image"] == f"{folder}/a.png"
    with pytest.raises(ValueError, match=rf"None of the first 2 images of data exists.*at {elsewhere}/a\.png\. .*--image_folder"):  # fmt: skip  # noqa: E501
        mixture(path)


def test_a_few_missing_images_do_not_stop_the_reading(folder):
    rows = llava_rows(3)
    rows[0]["image"] = "missing.png"
    assert len(mixture(write_json(folder, rows))) == 3


def test_rows_without_an_image_are_left_out_and_counted(folder, capsys):
    rows = llava_rows(4)
    del rows[0]["image"]
    rows[2]["image"] = ["a.png", "b.png"]
    rows[3]["image"] = ["b.png"]
    samples = by_id(mixture(write_json(folder, rows)))
    assert [(sample["id"], sample["image"]) for sample in samples] == [
        ("row-1", f"{folder}/a.png"),
        ("row-3", f"{folder}/b.png"),
    ]
    assert capsys.readouterr().out == "data: 2 of 4 rows left out for not having exactly one image.\n"
    with pytest.raises(ValueError, match=r"None of the 1 rows of .* has exactly one image"):
        mixture(write_json(folder, rows[:1]))


def test_json_of_messages_and_of_questions_is_read_too(folder):
    rows = [{"images": ["a.png"], "messages": messages(("Q?", "A"))}]
    assert mixture(write_json(folder, rows))[0]["messages"] == messages(("Q?", "A"))
    rows = [{"file": "a.png", "q": "Q?", "a": ["x", "y", "y"]}]
    columns = {"image_column": "file", "question_column": "q", "answers_column": "a"}
    sample = mixture(write_json(folder, rows), **columns)[0]
    assert sample["messages"] == messages(("Q?", "y")) and sample["image"] == f"{folder}/a.png"


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "is empty; give a data set with at least one row"),
        ({"questions": [{"question": "Q?"}], "info": {}}, "has rows of questions, info, but none of conversations"),
        (["a.png"], 'holds "a.png" where a row in braces is needed'),
        ([{"image": "a.png", "conversations": []}], "its roles are none"),
        (
            [{"id": "x1", "image": "a.png", "conversations": conversation(("Q?", "A"))[1:]}],
            "'x1' .*its roles are assis",
        ),
        ([{"image": "a.png", "conversations": conversation(("Q?", "A"))[:1]}], "Sample '0' of data .*roles are user;"),
        ([{"image": "a.png", "conversations": conversation(("Q?", " "))}], "Sample '0' .* has the answer ' '"),
        ([{"image": "a.png", "conversations": conversation(("<image>", "A"))}], "has an empty question"),
        ([{"image": "a.png", "conversations": [["Q", "Ä"]]}], r'does not have the form .*\{"conversations": \[\["Q"'),
        ([{"image": "a.png", "conversations": conversation((None, "A"))}], "has the question None"),
    ],
)
def test_json_of_another_form_is_refused_with_what_was_found(folder, rows, message):
    with pytest.raises(ValueError, match=message):
        mixture(write_json(folder, rows))


# --- Tables of `datasets` ---

TWO_TURNS = [("What?", "A"), ("Why?", "B")]
PARTS = [
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
]
VQA_ANSWERS = [
    {"answer": answer, "answer_id": number} for number, answer in enumerate(["no", "yes", "yes", "no", "x"])
]
QA = {"question_column": "q", "answers_column": "a"}
FORMATS = {
    "messages": ({"images": [images(0)], "messages": [messages(*TWO_TURNS)]}, {}, messages(*TWO_TURNS)),
    "parts": ({"images": [images(0)], "messages": [PARTS]}, {}, messages(("What?", "A"))),
    "texts": (
        {"images": [images(0)], "texts": [[{"user": user, "assistant": answer} for user, answer in TWO_TURNS]]},
        {},
        messages(*TWO_TURNS),
    ),
    "conversations": ({"image": images(0), "conversations": [conversation(*TWO_TURNS)]}, {}, messages(*TWO_TURNS)),
    "system": (
        {"image": images(0), "messages": [[{"role": "system", "content": "S"}, *messages(("What?", "A"))]]},
        {},
        [{"role": "system", "content": "S"}, *messages(("What?", "A"))],
    ),
    "one answer": (
        {"picture": images(0), "q": ["What?"], "a": ["A"]},
        {"image_column": "picture", "question_column": "q", "answers_column": "a"},
        messages(("What?", "A")),
    ),
    "list of answers": (
        {"image": images(0), "q": ["What?"], "a": [["B", "A", "C", "A"]]},
        QA,
        messages(("What?", "A")),
    ),
    "people's answers": (
        {"image": images(0), "q": ["What?"], "a": [VQA_ANSWERS]},
        QA,
        messages(("What?", "no")),
    ),
    "lists of questions and answers": (
        {"image": images(0), "q": [["What?", "Why?"]], "a": [["A", "B"]]},
        QA,
        messages(*TWO_TURNS),
    ),
    "captions": (
        {"image": images(0), "c": [["A", "A"]]},
        {"answers_column": "c", "prompt": "Say."},
        messages(("Say.", "A")),
    ),
}


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_each_format_of_tables_gives_the_same_messages(tmp_path, form, is_stream):
    columns, fields, expected = FORMATS[form]
    name = next(iter(columns))
    path = image_table(tmp_path, image_column=name, is_list=name == "images", **columns, unused=[1])
    source = Source(path, turns=None, streaming=is_stream, **fields)
    [sample] = streamed([source], 0) if is_stream else Mixture([source], 0)
    assert sample["messages"] == expected
    assert sample["image"] == png(0) and sample["source"] == "table"


def test_a_sequence_of_dicts_is_read_as_a_list(tmp_path):
    """Older tables hold people's answers as a dict of lists."""
    path = image_table(tmp_path, image=images(0), q=["Q?"], a=[{"answer": ["x", "y", "y"], "id": [1, 2, 3]}])
    assert mixture(path, question_column="q", answers_column="a")[0]["messages"] == messages(("Q?", "y"))


def test_images_in_tables_may_be_paths_or_bytes(folder):
    rows = {"messages": [messages(("Q?", "A"))]}
    path = write_table(folder, "paths", image=["a.png"], **rows)
    assert mixture(path, image_folder=str(folder))[0]["image"] == f"{folder}/a.png"
    with pytest.raises(ValueError, match="None of the first 1 images of paths exists"):
        mixture(path, image_folder=str(folder / "wrong"))
    assert mixture(write_table(folder, "bytes", image=[png(3)], **rows))[0]["image"] == png(3)


def test_a_broken_picture_is_not_opened_and_none_or_several_are_none(tmp_path):
    pictures = [[{"bytes": b"broken", "path": None}], [], images(0, 1)]
    path = image_table(
        tmp_path, image_column="images", is_list=True, images=pictures, messages=[messages(("Q", "A"))] * 3
    )
    assert [sample["image"] for sample in by_id(mixture(path))] == [b"broken", None, None]


@pytest.mark.parametrize("where", ["split", "parquet", "folder"])
def test_tables_are_found_wherever_datasets_keeps_them(tmp_path, where):
    table = datasets.Dataset.from_dict({"id": ["x"], "image": [png(0)], "messages": [messages(("Q?", "A"))]})
    other = datasets.Dataset.from_dict({"id": ["y"], "image": [png(0)], "messages": [messages(("Q?", "A"))]})
    path, fields = tmp_path / "here", {}
    if where == "split":
        datasets.DatasetDict({"train": other, "val": table}).save_to_disk(path)
        fields = {"split": "val"}
        with pytest.raises(ValueError, match="it has no split 'test', but train, val"):
            mixture(path, split="test")
    else:
        path.mkdir()
        table.to_parquet(path / "x.parquet")
        path = path / "x.parquet" if where == "parquet" else path
    assert [sample["id"] for sample in mixture(path, **fields)] == ["x"]


@pytest.mark.parametrize(
    "columns, fields, message",
    [
        ({"x": [1]}, {}, "has rows of image, x, but none of conversations.*--answers_column"),
        ({"a": ["A"]}, QA, "no column 'q', but image, a; choose from these with --question_column"),
        ({"q": ["Q"]}, {"answers_column": "a"}, "no column 'a', but image, q; .*--answers_column"),
        ({"texts": [[]]}, {"image_column": "img"}, "no column 'img', but .*--image_column"),
        ({"q": ["Q"], "a": [None]}, QA, "Sample '0' of table .*answer None"),
        ({"q": ["Q"], "a": [[]]}, QA, "Sample '0' of table .*answer None"),
        ({"q": [["Q", "R"]], "a": [["A"]]}, QA, "not as many answers"),
        ({"messages": [messages(("Q", ""))]}, {}, "has the answer ''"),
    ],
)
def test_tables_that_do_not_fit_are_refused_with_the_remedy(tmp_path, columns, fields, message):
    with pytest.raises(ValueError, match=message):
        mixture(image_table(tmp_path, image=images(0), **columns), **fields)


def test_tables_without_pictures_or_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has neither a column `image` nor `images`, but messages"):
        mixture(write_table(tmp_path, "text", messages=[messages(("Q", "A"))]))
    none = datasets.load_from_disk(write_table(tmp_path, "x", image=["a"], messages=[messages(("Q", "A"))])).select([])
    none.save_to_disk(tmp_path / "none")
    none.to_parquet(tmp_path / "none.parquet")
    for name in ("none", "none.parquet"):
        with pytest.raises(ValueError, match=r"none.* (is empty; give a data set|corresponds to no data)"):
            mixture(tmp_path / name)


@pytest.mark.parametrize("name", ["missing.json", "missing.parquet", "missing"])
def test_what_does_not_exist_is_refused_by_its_name(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        mixture(tmp_path / name)


def test_a_missing_package_is_named_with_the_way_to_install_it(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(ValueError, match=r'pip install "pheye\[train\]"'):
        mixture(tmp_path / "table")


# --- Mixtures ---


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


def long_rows(count: int) -> list[dict]:
    """Rows of six turns, so that two draws seldom agree by chance."""
    return [
        {"id": str(row), "image": "a.png", "conversations": conversation(*((f"{row}.{t}?", f"{t}") for t in range(6)))}
        for row in range(count)
    ]


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
    stream = streamed([source], 0)
    first = list(stream)
    assert list(stream) == list(streamed([source], 0)) == first
    stream.set_epoch(1)
    second = list(stream)
    for epoch in (first, second):
        assert sorted(sample["id"] for sample in epoch) == sorted(f"a{row}" for row in range(12))
    assert [sample["id"] for sample in first] != [sample["id"] for sample in second]
    assert by_id(first) != by_id(second)  # other turns, too
    assert list(streamed([source], 1)) != first
    stream.set_epoch(0)
    assert list(stream) == first


def test_workers_share_a_stream_and_change_none_of_its_samples(tmp_path):
    stream = streamed([stream_source(tmp_path, "a", 12)], 0)
    for epoch in range(2):
        stream.set_epoch(epoch)
        loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
        assert by_id(loader) == by_id(stream)


def test_streams_are_interleaved_by_their_shares(tmp_path):
    sources = [stream_source(tmp_path, "a", 30, weight=3), stream_source(tmp_path, "b", 30, weight=1)]
    drawn = Counter(sample["source"] for sample in streamed(sources, 0))
    assert drawn["b"] >= 30 and 2 * drawn["b"] < drawn["a"] < 4.5 * drawn["b"]


def test_streams_do_not_mix_with_what_is_not_streamed(folder):
    stream = stream_source(folder, "a", 3)
    own = Source(write_json(folder, llava_rows(1)))
    with pytest.raises(ValueError, match="data is not streamed, so no data set may be"):
        streamed([stream, own], 0)
    with pytest.raises(ValueError, match="a is streamed, so every data set must be"):
        Mixture([stream, own], 0)
    with pytest.raises(ValueError, match="a JSON file cannot be"):
        streamed([Source(own.path, streaming=True)], 0)
    with pytest.raises(ValueError, match="give all streamed sources `samples`, or none"):
        streamed([stream, stream_source(folder, "b", 3, samples=2)], 0)
    with pytest.raises(ValueError, match="no column 'q', but id, image, messages"):
        streamed([stream_source(folder, "c", 3, question_column="q", answers_column="a")], 0)
