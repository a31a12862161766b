"""Every format of training data gives the same messages, and what does not fit is refused with what was found."""

import json
import os

import datasets
import pytest

from pheye.training.collator import PheyeCollator
from pheye.training.formats import Source, images_of, named_images
from pheye.training.mixture import Mixture, Stream, read_mixture

from tiny import tiny_image, tiny_processor
from toy_data import by_id, conversation, image_table, images, messages, mixture, png, with_images, write_json

pytestmark = pytest.mark.once


@pytest.fixture
def folder(tmp_path):
    return with_images(tmp_path)


@pytest.fixture(autouse=True)
def shorter_waits(monkeypatch):
    """`datasets` waits for seconds at the end of each stream until the threads of pyarrow are gone."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)


# --- JSON ---


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_rows_become_messages_without_image_marks(folder, name):
    rows = [
        {"id": 7, "image": "a.png", "conversations": conversation(("<image>\nWas ist das?", " Ein Fuß. "))},
        {"image": "b.png", "conversations": conversation(("What?\n<image>", "A"), ("Is it <image>red?", "B"))},
        {"id": "u", "image": "http://host/c.png", "conversations": conversation(("Why?\nHow?", "C\nD"))},
    ]
    samples = by_id(mixture(write_json(folder, rows, name), turns=None, image_sources="any"))
    turns = [[("What?", "A"), ("Is it red?", "B")], [("Was ist das?", "Ein Fuß.")], [("Why?\nHow?", "C\nD")]]
    places = [f"{folder}/b.png", f"{folder}/a.png", "http://host/c.png"]
    assert samples == [
        {"id": row_id, "source": "data", "images": [image], "messages": messages(*shown)}
        for row_id, image, shown in zip("17u", places, turns, strict=True)
    ]


# --- Where names may lead ---


@pytest.fixture
def places(folder, tmp_path_factory) -> dict[str, str]:
    """Names of images as a stranger may write them, by what is wrong with them."""
    outside = tmp_path_factory.mktemp("private")
    tiny_image().save(outside / "a.png")
    (folder / "linked").symlink_to(outside)
    (folder / "link.png").symlink_to(outside / "a.png")
    return {
        "leads out of": os.path.relpath(outside / "a.png", folder),
        "leads out": str(outside / "a.png"),
        "leads out ": "linked/a.png",
        "leads out  ": "link.png",
        "is a URL": "http://127.0.0.1/a.png",
        "is a URL;": "HTTPS://127.0.0.1/a.png",
        "null byte": "a\0.png",
        "characters": "x" * 5000,
    }


def test_names_that_lead_elsewhere_are_skipped_with_the_reason_and_never_opened(folder, places, capsys):
    rows = [{"id": "good", "image": "a.png", "conversations": conversation(("Q?", "A"))}]
    rows += [{"id": what, "image": name, "conversations": conversation(("Q?", "A"))} for what, name in places.items()]
    samples = mixture(write_json(folder, rows))
    assert "of its first 9 images will be skipped" in capsys.readouterr().out
    found = {sample["id"]: sample for sample in samples}
    assert found["good"]["images"] == [f"{folder}/a.png"] and "error" not in found["good"]
    batch = PheyeCollator(tiny_processor())(list(found.values()))
    errors = {row["id"]: row["error"] for row in batch["skipped"]}
    assert errors.keys() == places.keys()
    for what in places:
        assert found[what]["images"] == [] and what.strip() in errors[what], errors[what]


@pytest.mark.parametrize("sources", ["local", "any"])
def test_the_user_may_let_names_lead_elsewhere(folder, places, sources):
    rows = [{"id": name, "image": name, "conversations": conversation(("Q?", "A"))} for name in places.values()]
    for sample in mixture(write_json(folder, rows), image_sources=sources):
        is_remote = sample["id"].lower().startswith("http")
        expected = sample["id"] if is_remote else os.path.join(folder, sample["id"])
        assert sample["images"] == ([] if is_remote and sources == "local" else [expected])


def test_a_folder_that_holds_all_images_is_enough_for_absolute_names(folder):
    rows = [{"image": f"{folder}/a.png", "conversations": conversation(("Q?", "A"))}]
    assert mixture(write_json(folder, rows), image_folder=str(folder.parent))[0]["images"] == [f"{folder}/a.png"]
    (folder / "sub").mkdir()
    with pytest.raises(ValueError, match=r"None of the first 1 images .* may be opened: .*holds all images"):
        mixture(write_json(folder, rows), image_folder=str(folder / "sub"))


def test_names_in_tables_may_lead_to_the_tables_own_folder_and_to_what_was_downloaded(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    for name in ("work", "set", "private", "cache"):
        (tmp_path / name).mkdir()
        tiny_image().save(tmp_path / name / "a.png")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    source = Source(str(tmp_path / "set" / "data.parquet"), question_column="q", answers_column="a")
    allowed = ["a.png", str(tmp_path / "work" / "a.png"), str(tmp_path / "set" / "a.png"), str(cache / "a.png")]
    allowed += ["../set/a.png"]
    for name in allowed:
        assert images_of({"image": name}, source) == ([name], None)
        assert images_of({"image": {"path": name, "bytes": None}}, source) == ([name], None)
    for name in ("../private/a.png", str(tmp_path / "private" / "a.png"), "/a\0.png", "/" * 9000):
        images, error = images_of({"image": name}, source)
        assert images == [] and "--image_sources local" in error


def test_only_the_user_says_where_names_may_lead(folder):
    (folder / "m.json").write_text(json.dumps({"sources": [{"path": "data.json", "image_sources": "any"}]}))
    with pytest.raises(ValueError, match="unknown field 'image_sources'"):
        read_mixture([str(folder / "m.json")])
    with pytest.raises(ValueError, match="choose from folder, local, any"):
        Source("data.json", image_sources="anything")


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("a.png", ["a.png"]),
        ([], []),
        (["a.png", {"path": "b.png"}], ["a.png", "b.png"]),
        ({"path": ["a.png", "b.png"]}, ["a.png", "b.png"]),
        (None, [None]),
        ("", [None]),
        ({"path": None, "bytes": None}, [None]),
        ([["a.png", "b.png"]], [None]),
        ({"path": ["a.png", "b.png"], "bytes": [b"x"]}, [None]),
    ],
)
def test_what_a_cell_names_as_images(cell, expected):
    source = Source("data.json")
    assert named_images({"image": cell}, source) == named_images({"images": cell}, source) == expected
    assert named_images({"image": cell, "images": ["c.png"]}, source) == (expected if cell else ["c.png"])
    assert named_images({"file": cell}, source) == []


# --- Fields of a source ---


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("caption", "no", "it must be true or false"),
        ("caption", 1, "it must be true or false"),
        ("streaming", "false", "it must be true or false"),
        ("prompt", 5, "it must be a text"),
        ("name", ["a"], "it must be a text"),
        ("image_folder", 5, "it must be a text"),
        ("subset", 5, "it must be a text"),
        ("answers_column", ["a"], "it must be a text"),
        ("turns", "1", "it must be an integer"),
        ("turns", True, "it must be an integer"),
        ("turns", 0, "it must be an integer of at least 1"),
        ("samples", 1.5, "it must be an integer"),
        ("weight", "2", "it must be a number"),
        ("weight", True, "it must be a number"),
        ("weight", float("nan"), "greater than 0, and finite"),
        ("weight", float("inf"), "greater than 0, and finite"),
        ("weight", 0, "greater than 0"),
    ],
)
def test_a_field_of_another_kind_is_refused_and_not_read_otherwise_than_written(folder, field, value, message):
    with pytest.raises(ValueError, match=f"has {field}=.*{message}"):
        Source("data.json", **{field: value})
    (folder / "m.json").write_text(json.dumps({"sources": [{"path": "data.json", field: value}]}))
    with pytest.raises(ValueError, match=message):
        read_mixture([str(folder / "m.json")])


@pytest.mark.parametrize("field", [{"samples": 10**9}, {"samples": 10**12}, {"weight": 1e300}])
def test_more_draws_than_memory_holds_are_refused_at_once(folder, field):
    rows = [{"image": "a.png", "conversations": conversation(("Q?", "A"))}]
    with pytest.raises(ValueError, match="give less than 100,000,000"):
        mixture(write_json(folder, rows), **field)


# --- Other forms ---


def test_json_of_messages_and_of_questions_is_read_too(folder):
    rows = [{"images": ["a.png"], "messages": messages(("Q?", "A"))}]
    assert mixture(write_json(folder, rows))[0]["messages"] == messages(("Q?", "A"))
    rows = [{"file": "a.png", "q": "Q?", "a": ["x", "y", "y"]}]
    columns = {"image_column": "file", "question_column": "q", "answers_column": "a"}
    sample = mixture(write_json(folder, rows), **columns)[0]
    assert sample["messages"] == messages(("Q?", "y")) and sample["images"] == [f"{folder}/a.png"]


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
        ([{"image": "a.png", "conversations": conversation(("Q?", "\ud800"))}], "holds a half of a character"),
        ([{"image": "a.png", "conversations": conversation(("\ud800?", "A"))}], "holds a half of a character"),
    ],
)
def test_json_of_another_form_is_refused_with_what_was_found(folder, rows, message):
    with pytest.raises(ValueError, match=message):
        mixture(write_json(folder, rows))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_text", "text": "Mind."},
        {"type": "text", "text": None},
        {"type": "text", "content": "Mind."},
        {"text": "Mind."},
        {"type": "image", "text": "Mind."},
        {"type": "image", "image": "b.png"},
        {"type": "image_url", "image_url": {"url": "b.png"}},
        {"type": "video", "video": "b.mp4"},
    ],
)
def test_parts_of_messages_that_would_be_left_out_are_refused(folder, part):
    row = {"image": "a.png", "messages": messages(("Q?", "A"))}
    row["messages"][0]["content"] = [{"type": "image"}, part, {"type": "text", "text": "Q?"}]
    with pytest.raises(
        ValueError, match=r"Sample '0' .* has the part .*which is neither a text nor {'type': 'image'}"
    ):
        mixture(write_json(folder, [row]))


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
        {"photo": images(0), "q": ["What?"], "a": ["A"]},
        {"image_column": "photo", "question_column": "q", "answers_column": "a"},
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
    [sample] = Stream([source], 0) if is_stream else Mixture([source], 0)
    assert sample["messages"] == expected
    assert sample["images"] == [png(0)] and sample["source"] == "table"


def test_a_sequence_of_dicts_is_read_as_a_list(tmp_path):
    """Older tables hold people's answers as a dict of lists."""
    path = image_table(tmp_path, image=images(0), q=["Q?"], a=[{"answer": ["x", "y", "y"], "id": [1, 2, 3]}])
    assert mixture(path, question_column="q", answers_column="a")[0]["messages"] == messages(("Q?", "y"))


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
