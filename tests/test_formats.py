"""Official files and data sets to samples: what each field becomes, and what is said about files of another kind."""

import json
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
from accelerate import PartialState
from PIL import Image

from pheye.common.command import InputError
from pheye.evaluation.evaluate import parse_arguments
from pheye.evaluation.formats import Sample, found_images, read_samples, texts
from pheye.evaluation.tasks import TASKS

pytestmark = pytest.mark.once

DARK, LIGHT, BROKEN = 40, 220, None  # pictures of one grey, and a file that is none


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps its state for the life of a process."""
    PartialState._reset_state()
    yield
    PartialState._reset_state()


# --- Toy files of every kind: three samples, about a dark picture, a light one, and a broken one ---


@dataclass
class Toy:
    """content: of the file that `name` names; pictures: file names under the folder; answers: of a model that sees
    dark or light; scores: of the three rows, in percent, where they are worked out by hand."""

    name: str
    content: object
    pictures: tuple[str, str, str]
    samples: list[Sample]
    answers: tuple[str, str]
    scores: tuple[float, float, float] | None = None
    annotations: object = None
    split: str = "val"


def ten(*counted: tuple[int, str]) -> list[str]:
    return [text for count, text in counted for _ in range(count)]


# Nine agree with the first answer (1), one with the second (9 of 10 times a third: 0.3).
HUMANS = [ten((9, "red"), (1, "blue")), ten((1, "2"), (9, "3")), ten((10, "cat"))]
VQA_ANSWERS, VQA_SCORES = ("Red.", "two"), (100, 30, 0)
CAPTIONS = [["a red car on a road", "a car drives"], ["two dogs play in the snow"], ["a cat sleeps", "a sleeping cat"]]


def vqa_toy(subtype: str = "val2014", pictures: str = "val2014", answered: bool = True) -> Toy:
    questions = [
        {"image_id": image_id, "question": f"What {image_id}?", "question_id": 1000 + image_id}
        for image_id in (9, 7, 8)
    ]
    entries = [
        {
            "question_id": question["question_id"],
            "image_id": question["image_id"],
            "answer_type": "other",
            "multiple_choice_answer": humans[0],
            "answers": [
                {"answer": text, "answer_confidence": "yes", "answer_id": number + 1}
                for number, text in enumerate(humans)
            ],
        }
        for question, humans in zip(questions, HUMANS, strict=True)
    ]
    names = [f"COCO_{pictures}_00000000000{image_id}.jpg" for image_id in (9, 7, 8)]
    split = subtype[:-4]
    return Toy(
        "questions.json",
        {
            "info": {},
            "task_type": "Open-Ended",
            "data_type": "mscoco",
            "data_subtype": subtype,
            "questions": questions,
        },
        tuple(names),
        [
            Sample(
                question["question_id"],
                (name, f"{pictures}/{name}"),
                None,
                question["question"],
                (),
                tuple(humans) if answered else None,
                split,
                question["image_id"],
            )
            for question, name, humans in zip(questions, names, HUMANS, strict=True)
        ],
        VQA_ANSWERS,
        VQA_SCORES,
        {"info": {}, "data_subtype": subtype, "annotations": entries} if answered else None,
        split,
    )


def textvqa_toy() -> Toy:
    keys = ["0054c91397f2fe05", "005635e119b9f32f", "00685bc495504d61"]
    data = [
        {
            "question": f"What is {number}?",
            "image_id": key,
            "image_classes": ["Poster"],
            "flickr_original_url": "https://example.org/a.jpg",
            "flickr_300k_url": "https://example.org/b.jpg",
            "image_width": 90,
            "image_height": 70,
            "answers": humans,
            "question_tokens": ["what", "is", str(number)],
            "question_id": 34602 + number,
            "set_name": "val",
        }
        for number, (key, humans) in enumerate(zip(keys, HUMANS, strict=True))
    ]
    return Toy(
        "TextVQA_0.5.1_val.json",
        {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data},
        tuple(f"train_images/{key}.jpg" for key in keys),
        [
            Sample(
                34602 + number,
                (f"{key}.jpg", f"train_images/{key}.jpg", f"test_images/{key}.jpg"),
                None,
                f"What is {number}?",
                (),
                tuple(HUMANS[number]),
                "val",
                key,
            )
            for number, key in enumerate(keys)
        ],
        VQA_ANSWERS,
        VQA_SCORES,
    )


def textcaps_toy() -> Toy:
    """The file has an entry per caption."""
    keys = ["a1", "b2", "c3"]
    data = [
        {
            "image_id": key,
            "image_path": f"train/{key}.jpg",
            "image_name": key,
            "set_name": "val",
            "caption_id": 10 * number + index,
            "caption_str": caption,
            "reference_strs": CAPTIONS[number],
        }
        for number, key in enumerate(keys)
        for index, caption in enumerate(CAPTIONS[number])
    ]
    return Toy(
        "TextCaps_0.1_val.json",
        {"dataset_type": "val", "dataset_name": "textcaps", "dataset_version": 0.1, "data": data},
        tuple(f"{key}.jpg" for key in keys),
        [
            Sample(
                key,
                (f"{key}.jpg", f"train_images/{key}.jpg", f"test_images/{key}.jpg"),
                references=tuple(CAPTIONS[number]),
                split="val",
            )
            for number, key in enumerate(keys)
        ],
        ("a red car on a road", "a dog in the snow"),
    )


def nocaps_toy() -> Toy:
    keys = ["0013ea2087020901", "002b8f1a6a1d5e2a", "003d84e0165d630c"]
    images = [
        {
            "id": number,
            "open_images_id": key,
            "file_name": f"{key}.jpg",
            "domain": "in-domain",
            "coco_url": "https://x",
        }
        for number, key in enumerate(keys)
    ]
    pairs = [(number, caption) for number, captions in enumerate(CAPTIONS) for caption in captions]
    entries = [{"id": 50 + index, "image_id": number, "caption": text} for index, (number, text) in enumerate(pairs)]
    return Toy(
        "nocaps_val_4500_captions.json",
        {"licenses": [], "info": {}, "images": images, "annotations": entries[::-1]},
        tuple(f"images/{key}.jpg" for key in keys),
        [
            Sample(
                number,
                (f"{key}.jpg", f"images/{key}.jpg", f"val/{key}.jpg", f"test/{key}.jpg"),
                references=tuple(reversed(CAPTIONS[number])),
            )
            for number, key in enumerate(keys)
        ],
        ("a red car on a road", "a dog in the snow"),
    )


def docci_toy() -> Toy:
    """With a line of another split among them."""
    lines = [
        {
            "example_id": f"test_0000{number}",
            "split": "test",
            "image_file": f"test_0000{number}.jpg",
            "description": CAPTIONS[number][0],
        }
        for number in range(3)
    ]
    other = {"example_id": "train_00000", "split": "train", "image_file": "train_00000.jpg", "description": "A hill."}
    return Toy(
        "docci_descriptions.jsonlines",
        [lines[0], other, *lines[1:]],
        tuple(f"images/test_0000{number}.jpg" for number in range(3)),
        [
            Sample(
                f"test_0000{number}",
                (f"test_0000{number}.jpg", f"images/test_0000{number}.jpg"),
                references=(CAPTIONS[number][0],),
                split="test",
            )
            for number in range(3)
        ],
        ("a red car on a road", "a dog in the snow"),
        split="test",
    )


def aokvqa_toy() -> Toy:
    options = [["cat", "dog"], ["red", "blue", "green"], ["one", "two"]]
    right = [1, 0, 0]
    entries = [
        {
            "split": "val",
            "image_id": 461751 + number,
            "question_id": f"22jbM6gDxdaMaunuzgrsB{number}",
            "question": f"What is {number}?",
            "choices": options[number],
            "correct_choice_idx": right[number],
            "direct_answers": ["dog"] * 10,
            "difficult_direct_answer": False,
            "rationales": ["Because.", "So.", "Thus."],
        }
        for number in range(3)
    ]
    names = [f"000000{entry['image_id']}.jpg" for entry in entries]
    return Toy(
        "aokvqa_v1p0_val.json",
        entries,
        tuple(f"val2017/{name}" for name in names),
        [
            Sample(
                entry["question_id"],
                (name, f"val2017/{name}"),
                None,
                entry["question"],
                tuple(entry["choices"]),
                (("A", "B", "C")[index], entry["choices"][index]),
                "val",
            )
            for entry, name, index in zip(entries, names, right, strict=True)
        ],
        ("B. dog", "green"),
        (100, 0, 0),
    )


def gqa_toy() -> Toy:
    """With a question that is not among the balanced ones."""
    answers = ["yes", "left", "car"]
    data = {
        f"0{number}": {
            "semantic": [],
            "imageId": f"n{number}",
            "question": f"Is it {number}?",
            "answer": answers[number],
            "fullAnswer": "It is.",
            "isBalanced": True,
        }
        for number in range(3)
    }
    data["09"] = {**data["00"], "isBalanced": False}
    return Toy(
        "testdev_balanced_questions.json",
        data,
        ("n0.jpg", "n1.jpg", "n2.jpg"),
        [
            Sample(
                f"0{number}",
                (f"n{number}.jpg", f"images/n{number}.jpg"),
                question=f"Is it {number}?",
                references=(answers[number],),
            )
            for number in range(3)
        ],
        ("Yes.", "right"),
        (100, 0, 0),
        split="testdev",
    )


def ocrvqa_toy() -> Toy:
    """A book with two questions, one more, and one of the training set."""
    book = {"imageURL": "http://example.org/51.gif", "title": "T", "authorName": "N", "genre": "G", "split": 3}
    data = {
        "0761": {**book, "questions": ["Who wrote this?", "Is it old?"], "answers": ["Ann Lee", "No"]},
        "0762": {**book, "questions": ["Who wrote this?"], "answers": ["Bo"], "split": 1},
        "0763": {**book, "imageURL": "http://example.org/5", "questions": ["What year?"], "answers": ["1999"]},
    }

    def names(book: str, suffix: str) -> tuple[str, ...]:
        return (f"{book}{suffix}", f"images/{book}{suffix}", f"{book}.jpg", f"images/{book}.jpg")

    return Toy(
        "dataset.json",
        data,
        ("0761.gif", "0761.gif", "images/0763.jpg"),
        [
            Sample("0761-0", names("0761", ".gif"), None, "Who wrote this?", (), ("Ann Lee",), "test"),
            Sample("0761-1", names("0761", ".gif"), None, "Is it old?", (), ("No",), "test"),
            Sample("0763-0", names("0763", ".jpg"), None, "What year?", (), ("1999",), "test"),
        ],
        ("ann lee", "ann lee"),
        (100, 0, 0),
        split="test",
    )


def stvqa_toy() -> Toy:
    answers = [["coca-cola", "coke"], ["north"], ["7"]]
    data = [
        {
            "question": f"Which {number}?",
            "image_name": f"p{number}.jpg",
            "dataset": "VizWiz",
            "file_name": f"p{number}.jpg",
            "file_path": f"vizwiz/p{number}.jpg",
            "question_id": number,
            "set_name": "train",
            "answers": answers[number],
        }
        for number in range(3)
    ]
    return Toy(
        "train_task_3.json",
        {"dataset_name": "ST-VQA", "task_name": "task_3", "data": data},
        tuple(f"vizwiz/p{number}.jpg" for number in range(3)),
        [
            Sample(
                number,
                tuple(
                    f"{parent}vizwiz/p{number}.jpg"
                    for parent in ("", "train_images/", "train_imgs/", "test_task3_images/", "test_images/")
                ),
                None,
                f"Which {number}?",
                (),
                tuple(answers[number]),
                "train",
            )
            for number in range(3)
        ],
        ("coca cola", "south"),
        (100 * 8 / 9, 100 * 3 / 5, 0),  # 1 of 9 letters differs, and 2 of 5
        split="train",
    )


TOYS = {
    "vqav2": vqa_toy,
    "okvqa": vqa_toy,
    "textvqa": textvqa_toy,
    "textcaps": textcaps_toy,
    "nocaps": nocaps_toy,
    "docci": docci_toy,
    "aokvqa": aokvqa_toy,
    "gqa": gqa_toy,
    "ocrvqa": ocrvqa_toy,
    "stvqa": stvqa_toy,
}


def write(toy: Toy, folder: Path) -> list[str]:
    """The toy's files; returns the options that name them."""
    path = folder / toy.name
    if path.suffix == ".jsonlines":
        path.write_text("".join(json.dumps(line) + "\n" for line in toy.content))
    else:
        path.write_text(json.dumps(toy.content))
    for name, grey in zip(toy.pictures, (DARK, LIGHT, BROKEN), strict=True):
        picture = folder / name
        picture.parent.mkdir(exist_ok=True)
        if grey is BROKEN:
            picture.write_bytes(b"no image")
        elif not picture.exists():
            Image.new("RGB", (40, 30), (grey, grey, grey)).save(picture)
    if toy.annotations is None:
        return ["--data", str(path)]
    (folder / "annotations.json").write_text(json.dumps(toy.annotations))
    return ["--data", str(path), "--annotations", str(folder / "annotations.json")]


def arguments(task: str, *options: str):
    return parse_arguments(["--model", "m", "--output", "o", "--task", task, *options])


def read(task: str, *options: str) -> tuple[list[Sample], str]:
    return read_samples(TASKS[task], arguments(task, *options))


def refused(task: str, *options: str) -> str:
    with pytest.raises(InputError) as error:
        read(task, *options)
    return str(error.value)


# --- Official files ---


@pytest.mark.parametrize("task", TASKS)
def test_official_file(task, tmp_path):
    toy = TOYS[task]()
    samples, split = read(task, *write(toy, tmp_path))
    assert samples == toy.samples
    assert split == toy.split
    paths = [sample.image for sample in found_images(samples, tmp_path)]
    assert paths == [tmp_path / name for name in toy.pictures]


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


def test_split_of_a_file_that_has_several(tmp_path):
    options = write(docci_toy(), tmp_path)
    samples, split = read("docci", *options, "--split", "train")
    assert [sample.id for sample in samples] == ["train_00000"]
    assert split == "train"
    assert "has no split 'val'; choose --split from test, train." in refused("docci", *options, "--split", "val")


def test_split_of_a_file_that_does_not_say(tmp_path):
    assert read("gqa", *write(gqa_toy(), tmp_path), "--split", "val")[1] == "val"


@pytest.mark.parametrize("task", TASKS)
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


def test_entry_that_lacks_something(tmp_path):
    toy = textvqa_toy()
    del toy.content["data"][1]["image_id"]
    assert "because an entry has no 'image_id'; it should be TextVQA's" in refused("textvqa", *write(toy, tmp_path))
    toy = aokvqa_toy()
    toy.content[2]["correct_choice_idx"] = 2
    assert "cannot be read, because list index out of range" in refused("aokvqa", *write(toy, tmp_path))
    toy = vqa_toy()
    toy.content["questions"][1]["image_id"] = "seven"
    assert "cannot be read, because" in refused("vqav2", *write(toy, tmp_path))


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


def test_texts_that_are_none(tmp_path):
    toy = textvqa_toy()
    toy.content["data"][0]["question"] = " "
    assert "The question of 34602 in" in refused("textvqa", *write(toy, tmp_path))
    toy = textvqa_toy()
    toy.content["data"][1]["answers"] = [1, 2]
    assert "Sample 34603 of" in refused("textvqa", *write(toy, tmp_path))


def test_images_that_are_missing(tmp_path):
    toy = ocrvqa_toy()
    samples, _ = read("ocrvqa", *write(toy, tmp_path))
    (tmp_path / "images" / "0763.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of 2 images are not in .+, 0763.jpg for example. Give the folder that"):
        found_images(samples, tmp_path)


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


# --- Data sets ---


def pictures(folder: Path) -> list[str]:
    """Paths of the three pictures."""
    write(gqa_toy(), folder)
    return [str(folder / f"n{number}.jpg") for number in range(3)]


def test_columns_of_a_data_set(tmp_path):
    columns = {"photo": pictures(tmp_path), "q": ["What?", "Who?", "How?"], "a": HUMANS, "key": ["x", "y", "z"]}
    data = datasets.Dataset.from_dict(columns).cast_column("photo", datasets.Image())
    datasets.DatasetDict({"train": data, "val": data.select([1, 2])}).save_to_disk(tmp_path / "saved")
    options = ["--image_column", "photo", "--question_column", "q", "--answers_column", "a", "--id_column", "key"]
    samples, split = read("vqav2", "--data", str(tmp_path / "saved"), *options)
    assert split == "val"
    assert [(s.id, s.question, s.references) for s in samples] == [
        ("y", "Who?", tuple(HUMANS[1])),
        ("z", "How?", tuple(HUMANS[2])),
    ]
    assert samples[0].image() == (tmp_path / "n1.jpg").read_bytes()
    assert len(read("vqav2", "--data", str(tmp_path / "saved"), *options, "--split", "train")[0]) == 3


def test_data_set_with_the_usual_columns(tmp_path):
    paths = pictures(tmp_path)
    datasets.Dataset.from_dict({"image": paths, "captions": CAPTIONS}).save_to_disk(tmp_path / "captions")
    samples, split = read("docci", "--data", str(tmp_path / "captions"))
    assert [(s.id, s.question, s.references) for s in samples] == [(i, "", tuple(CAPTIONS[i])) for i in range(3)]
    assert split == "test"
    options = [["cat", "dog"]] * 3
    rows = {"image": paths, "question": ["a", "b", "c"], "choices": options, "correct_choice_idx": [0, 1, 0]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "options")
    samples, _ = read("aokvqa", "--data", str(tmp_path / "options"))
    assert [s.references for s in samples] == [("A", "cat"), ("B", "dog"), ("A", "cat")]
    assert samples[0].options == ("cat", "dog")


def test_data_set_without_answers(tmp_path):
    rows = {"image": pictures(tmp_path), "question": ["a", "b", "c"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    assert "3 of 3 samples" in refused("textvqa", "--data", str(tmp_path / "saved"))
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows)}).save_to_disk(tmp_path / "splits")
    samples, split = read("textvqa", "--data", str(tmp_path / "splits"), "--split", "test")
    assert [s.references for s in samples] == [None] * 3
    assert split == "test"


def test_data_set_with_the_wrong_columns(tmp_path):
    rows = {"image": pictures(tmp_path), "question": ["a", "b", "c"], "answers": [1, 2, 3]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    source = str(tmp_path / "saved")
    assert "they must be a text, a list of texts" in refused("textvqa", "--data", source)
    message = refused("textvqa", "--data", source, "--question_column", "q")
    assert "has no column 'q'; its columns are image, question, answers. Name the one of the question by" in message
    assert "it must hold images, paths" in refused("textvqa", "--data", source, "--image_column", "answers")
    assert "has no column 'human'" in refused("textvqa", "--data", source, "--answers_column", "human")
    assert "leave --question_column out" in refused("docci", "--data", source, "--question_column", "question")
    assert "leave --images out" in refused("textvqa", "--data", source, "--images", ".")
    assert "leave --annotations out" in refused("vqav2", "--data", source, "--annotations", "x.json")


def test_sources_that_are_none(tmp_path):
    assert "is a folder; give TextVQA's: an object" in refused("textvqa", "--data", str(tmp_path))
    for name in (str(tmp_path / "x"), "x.json", "a/b/c"):
        assert f"There is no {name}; give" in refused("textvqa", "--data", name)
    assert "is neither a folder, nor a list, nor a dataset" in refused("textvqa", "--data", "some/dataset-v1.5")
    options = write(textvqa_toy(), tmp_path)
    message = refused("textvqa", *options, "--id_column", "x", "--config", "y")
    assert "is a file: leave --config, --id_column out" in message
