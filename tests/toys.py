"""Toy files of every kind that the evaluation reads: three samples, about a dark image, a light and a broken one."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from pheye.common.command import InputError
from pheye.evaluation.evaluate import find_task, parse
from pheye.evaluation.samples import Sample
from pheye.evaluation.sources import read_samples

DARK, LIGHT, BROKEN = 40, 220, None  # images of one grey, and a file that is none


@dataclass
class Toy:
    """content: of the file that `name` names; images: file names under the folder; answers: of a model that sees
    dark or light; scores: of the three rows, in percent, where they are worked out by hand."""

    name: str
    content: object
    images: tuple[str, str, str]
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


def vqa_toy(subtype: str = "val2014", images: str = "val2014", answered: bool = True) -> Toy:
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
    names = [f"COCO_{images}_00000000000{image_id}.jpg" for image_id in (9, 7, 8)]
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
                (name, f"{images}/{name}"),
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


def own_toy() -> Toy:
    """LLaVA's format, which training takes."""
    turns = [("<image>\nWhat is it?", "A cat."), ("How many dogs?\n<image>", " two "), ("Which?", "none")]
    rows = [
        {
            "id": f"row-{number}",
            "image": f"p{number}.jpg",
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        }
        for number, (question, answer) in enumerate(turns)
    ]
    asked = [("What is it?", "A cat."), ("How many dogs?", "two"), ("Which?", "none")]
    return Toy(
        "own-val.json",
        rows,
        ("images/p0.jpg", "images/p1.jpg", "images/p2.jpg"),
        [
            Sample(f"row-{number}", (), None, question, references=(answer,), split="own-val")
            for number, (question, answer) in enumerate(asked)
        ],
        ("a CAT", "three"),
        (100, 0, 0),
        split="own-val",
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
    "own": own_toy,
}


def write(toy: Toy, folder: Path) -> list[str]:
    """The toy's files; returns the options that name them."""
    path = folder / toy.name
    if path.suffix == ".jsonlines":
        path.write_text("".join(json.dumps(line) + "\n" for line in toy.content))
    else:
        path.write_text(json.dumps(toy.content))
    for name, grey in zip(toy.images, (DARK, LIGHT, BROKEN), strict=True):
        image = folder / name
        image.parent.mkdir(exist_ok=True)
        if grey is BROKEN:
            image.write_bytes(b"no image")
        elif not image.exists():
            Image.new("RGB", (40, 30), (grey, grey, grey)).save(image)
    if isinstance(toy.content, list) and "conversations" in toy.content[0]:
        return ["--data", str(path), "--images", str(folder / "images")]
    if toy.annotations is None:
        return ["--data", str(path)]
    (folder / "annotations.json").write_text(json.dumps(toy.annotations))
    return ["--data", str(path), "--annotations", str(folder / "annotations.json")]


def image_paths(folder: Path) -> list[str]:
    """Paths of the three images."""
    write(gqa_toy(), folder)
    return [str(folder / f"n{number}.jpg") for number in range(3)]


def read(task: str, *options: str) -> tuple[list[Sample], str]:
    """What `pheye evaluate` reads with these options."""
    given = parse(["--model", "m", "--output", "o", "--task", task, *options])
    names = ["split", "annotations", "images", "config", "data_files"]
    names += ["image_sources"] + [f"{kind}_column" for kind in ("image", "question", "choices", "answers", "id")]
    task = find_task(task, given["prompt"], given["metric"])
    return read_samples(task, given["data"], **{name: given[name] for name in names})


def refused(task: str, *options: str) -> str:
    with pytest.raises(InputError) as error:
        read(task, *options)
    return str(error.value)
