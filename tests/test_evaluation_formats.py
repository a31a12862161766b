"""Official files to samples: what each field becomes, and what is said about files of another kind."""

import json

import pytest
from accelerate import PartialState

from pheye.common.command import InputError
from pheye.evaluation.formats import found_images
from pheye.evaluation.tasks import OWN, TASKS

from toys import TOYS, aokvqa_toy, docci_toy, nocaps_toy, ocrvqa_toy, read, refused, textvqa_toy, vqa_toy, write

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps its state for the life of a process."""
    PartialState._reset_state()
    yield
    PartialState._reset_state()


BENCHMARKS = [task for task in TASKS if task != OWN]


@pytest.mark.parametrize("task", BENCHMARKS)
def test_official_file(task, tmp_path):
    toy = TOYS[task]()
    samples, split = read(task, *write(toy, tmp_path))
    assert samples == toy.samples
    assert split == toy.split
    paths = [sample.image for sample in found_images(samples, tmp_path)]
    assert paths == [tmp_path / name for name in toy.images]


@pytest.mark.parametrize(("subtype", "split"), [("test-dev2015", "test-dev"), ("test2015", "test")])
def test_questions_of_vqas_test_set_have_no_answers(subtype, split, tmp_path):
    toy = vqa_toy(subtype, "test2015", answered=False)
    toy.split = split
    for sample in toy.samples:
        assert sample.names[0].startswith("COCO_test2015_0000")
    assert read("vqav2", *write(toy, tmp_path)) == (toy.samples, split)


def test_files_whose_answers_are_secret(tmp_path):
    for task in ("textvqa", "textcaps", "stvqa", "nocaps"):
        toy = TOYS[task]()
        for entry in toy.content.get("data", ()):
            for name in ("answers", "reference_strs", "caption_str"):
                entry.pop(name, None)
            entry["set_name"] = "test"
        toy.content.pop("annotations", None)
        samples, split = read(task, *write(toy, tmp_path), "--split", "test")
        assert [sample.references for sample in samples] == [None] * 3
        assert split == "test"


@pytest.mark.parametrize("task", BENCHMARKS)
def test_a_file_of_another_task_is_named(task, tmp_path):
    other = "gqa" if task != "gqa" else "textvqa"
    message = refused(task, *write(TOYS[other](), tmp_path))
    assert f"is not in the format of --task {task}, which is" in message
    assert f"It looks like the format {other!r}" in message


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"data": [3]}', '[["question_id"]]', "null"])
def test_json_of_another_kind(task, content, tmp_path):
    (tmp_path / "data.json").write_text(content)
    assert "is not in the format of" in refused(task, "--data", str(tmp_path / "data.json"))


def test_file_that_is_not_whole_or_no_text(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('{"data": [')
    assert "is not whole JSON" in refused("textvqa", "--data", str(path))
    path.write_bytes(b"PK\x03\x04\xff\xfe")
    assert "is no text; unpack it" in refused("textvqa", "--data", str(path))


def test_lines_of_json_end_at_line_feeds_only(tmp_path):
    toy = docci_toy()
    text = "A wall.\u2028Beside it a door.\u2029And\u0085a lamp."
    toy.content[0]["description"] = text
    options = write(toy, tmp_path)
    path = tmp_path / toy.name
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\r\n" for line in toy.content), "utf-8")
    assert read("docci", *options)[0][0].references == (text,)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"data": [' + "9" * 5000 + "]}"])
def test_json_that_python_does_not_take(text, tmp_path):
    (tmp_path / "data.json").write_text(text)
    assert "is not whole JSON" in refused("textvqa", "--data", str(tmp_path / "data.json"))


@pytest.mark.parametrize(
    ("task", "field", "value", "message"),
    [
        *(("aokvqa", "correct_choice_idx", value, "the right option is") for value in (-1, 2, True, "0", 1.0)),
        ("aokvqa", "choices", "cat", "the options 'cat' are no list of 1 to 26 texts"),
        ("aokvqa", "choices", ["x"] * 27, "are no list of 1 to 26 texts"),
        ("aokvqa", "choices", [], "are no list of 1 to 26 texts"),
        ("aokvqa", "image_id", True, "the image_id True is no number"),
        ("textvqa", "set_name", ["val"], "is ['val'], which is no text"),
        ("gqa", "isBalanced", "no", "isBalanced is 'no', neither true nor false"),
    ],
)
def test_no_value_is_read_otherwise_than_written(task, field, value, message, tmp_path):
    toy = TOYS[task]()
    entries = toy.content.get("data", toy.content) if isinstance(toy.content, dict) else toy.content
    entries[0 if isinstance(entries, list) else "00"][field] = value
    assert message in refused(task, *write(toy, tmp_path))


def test_entry_that_lacks_something(tmp_path):
    toy = textvqa_toy()
    del toy.content["data"][1]["image_id"]
    assert "because an entry has no 'image_id'; it should be TextVQA's" in refused("textvqa", *write(toy, tmp_path))
    toy = aokvqa_toy()
    del toy.content[2]["choices"]
    assert "because an entry has no 'choices'" in refused("aokvqa", *write(toy, tmp_path))
    toy = vqa_toy()
    toy.content["questions"][1]["image_id"] = "seven"
    assert "cannot be read, because" in refused("vqav2", *write(toy, tmp_path))


def test_questions_and_annotations_of_different_splits(tmp_path):
    toy = vqa_toy()
    toy.annotations["annotations"][1]["question_id"] = 5
    assert "1 of 3 ids in the questions are not in the annotations, 1007 for" in refused(
        "vqav2", *write(toy, tmp_path)
    )
    toy = vqa_toy()
    toy.annotations["annotations"].append({"question_id": 5, "answers": ["x"]})
    assert "1 of 4 ids in the annotations are not in the questions, 5 for" in refused("vqav2", *write(toy, tmp_path))
    toy = nocaps_toy()
    del toy.content["images"][0]
    assert "ids in the annotations are not in the images, 0 for" in refused("nocaps", *write(toy, tmp_path))


def test_annotations_that_are_none(tmp_path):
    options = write(vqa_toy(), tmp_path)
    assert "is no annotation file of VQA" in refused("vqav2", *options[:3], options[1])
    assert "There is no file" in refused("vqav2", *options[:3], "none.json")
    options = write(textvqa_toy(), tmp_path)
    assert "leave --annotations out" in refused("textvqa", *options, "--annotations", options[1])


@pytest.mark.parametrize("name", ["../private/a", "{outside}/a", "link/a"])
@pytest.mark.parametrize("task", ["textvqa", "gqa", "nocaps", "ocrvqa", "stvqa", "docci"])
def test_names_lead_to_no_image_outside_of_the_folder(task, name, tmp_path):
    folder, outside = tmp_path / "set", tmp_path / "private"
    for place in (folder, outside):
        place.mkdir()
        for suffix in ("", ".jpg", ".gif"):
            (place / f"a{suffix}").write_bytes(b"secret")
    (folder / "link").symlink_to(outside)
    name, toy = name.format(outside=outside), TOYS[task]()
    toy.images = ("a.png", "b.png", "c.png")
    entries = toy.content
    if isinstance(entries, dict):
        entries = next((entries[key] for key in ("data", "images") if key in entries), entries)
    field = {"textvqa": "image_id", "gqa": "imageId", "nocaps": "file_name", "stvqa": "file_path",
             "docci": "image_file", "ocrvqa": None}[task]  # fmt: skip
    if field is None:
        toy.content = {name: toy.content["0761"]}
    else:
        entries[0 if isinstance(entries, list) else "00"][field] = name
    samples, _ = read(task, *write(toy, folder))
    with pytest.raises(InputError, match=r"leads out of the folder .*Give a folder that holds all images"):
        found_images(samples, folder)


@pytest.mark.parametrize("name", ["a" * 300, "a" * 5000, "a\0b"])
def test_names_that_no_file_can_have(name, tmp_path):
    toy = textvqa_toy()
    toy.content["data"][0]["image_id"] = name
    samples, _ = read("textvqa", *write(toy, tmp_path))
    with pytest.raises(InputError):
        found_images(samples, tmp_path)


def test_images_that_are_missing(tmp_path):
    toy = ocrvqa_toy()
    samples, _ = read("ocrvqa", *write(toy, tmp_path))
    (tmp_path / "images" / "0763.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of 2 images are not in .+, 0763.jpg for example. Give the folder that"):
        found_images(samples, tmp_path)
