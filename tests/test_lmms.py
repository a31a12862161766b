"""Pheye as a model of lmms-eval: the adapter here, and the released package in an environment of its own."""

import ast
import importlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from pheye.answering.engine import answer
from pheye.answering.rows import Request
from pheye.common.command import InputError
from pheye.evaluation import lmms
from pheye.evaluation.lmms import Marked, Pheye, RefusedTask, cut, decoding, only_images, prompt_of

from environments import checked, install
from tiny import tiny_config, tiny_image, tiny_model, tiny_processor

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
NEW = 8  # tokens per answer
QUESTIONS = [
    "What?",
    "What is this, and what else is there to see?",
    "Who is so very tall?",
    "Where?",
    "Why is it so?",
]
BROKEN = 3  # which of their images is none


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps its state for the life of a process."""
    PartialState._reset_state()
    yield
    PartialState._reset_state()


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    tiny_image(seed, 90 + seed, 70).save(buffer, "PNG")
    return buffer.getvalue()


def encoded_images() -> list[bytes]:
    return [b"broken" if number == BROKEN else png(number) for number in range(len(QUESTIONS))]


@pytest.fixture(scope="module")
def answers_of_our_engine(model, processor, tmp_path_factory):
    """The answers to `QUESTIONS`, empty where there is no image, for decoding arguments."""

    def answers(**generate_kwargs) -> list[str]:
        requests = [
            Request(n, data, question)
            for n, (data, question) in enumerate(zip(encoded_images(), QUESTIONS, strict=True))
        ]
        output = tmp_path_factory.mktemp("engine") / "rows.jsonl"
        options = {"batch_size": 1, "generate_kwargs": generate_kwargs, "settings": {}}
        answer(lambda: (model, processor), requests, output, **options)
        PartialState._reset_state()
        return [json.loads(line).get("answer", "") for line in output.read_text().splitlines()]

    return answers


# --- What a task says, in our words ---


@pytest.mark.parametrize(
    ("gen_kwargs", "arguments", "until"),
    [
        ({}, {"max_new_tokens": 256, "do_sample": False}, []),
        ({"until": ["\n\n"], "do_sample": False}, {"max_new_tokens": 256, "do_sample": False}, ["\n\n"]),
        ({"until": "Q:", "max_new_tokens": 9}, {"max_new_tokens": 9, "do_sample": False}, ["Q:"]),
        ({"until": None, "max_length": 99}, {"max_length": 99, "do_sample": False}, []),
        ({"until": ""}, {"max_new_tokens": 256, "do_sample": False}, []),
        ({"until": ["", "a"]}, {"max_new_tokens": 256, "do_sample": False}, ["a"]),
        (
            {"max_new_tokens": 64, "temperature": 0, "top_p": 1.0, "num_beams": 3, "do_sample": False},
            {"max_new_tokens": 64, "num_beams": 3, "do_sample": False},
            [],
        ),
        (
            {"temperature": 0.2, "top_p": None, "top_k": 7},
            {"max_new_tokens": 256, "temperature": 0.2, "top_k": 7, "do_sample": True},
            [],
        ),
        ({"do_sample": True}, {"max_new_tokens": 256, "do_sample": True}, []),
        ({"temperature": 0, "top_p": 1.0}, {"max_new_tokens": 256, "do_sample": False}, []),
        ({"vision_budget": 0}, {"max_new_tokens": 256, "vision_budget": 0, "do_sample": False}, []),
        ({"do_sample": True, "temperature": 0.0}, {"max_new_tokens": 256, "do_sample": False}, []),
    ],
)
def test_decoding_arguments(gen_kwargs, arguments, until, caplog):
    before = dict(gen_kwargs)
    assert decoding(gen_kwargs) == (arguments, until)
    assert gen_kwargs == before
    assert not caplog.records


@pytest.mark.parametrize(
    ("gen_kwargs", "name"),
    [
        ({"image_aspect_ratio": "original"}, "image_aspect_ratio"),
        ({"do_sample": False, "temperature": 1}, "temperature"),
        ({"do_sample": False, "top_p": 0.9}, "top_p"),
    ],
)
def test_arguments_without_effect_are_named(gen_kwargs, name, caplog):
    assert decoding(gen_kwargs)[0] == {"max_new_tokens": 256, "do_sample": False}
    assert caplog.messages == [f"{name} in {gen_kwargs} change nothing here."]


def test_several_answers_to_one_request_are_refused():
    with pytest.raises(InputError, match="num_return_sequences must be 1"):
        decoding({"num_return_sequences": 2})


def test_an_answer_ends_at_the_first_of_the_texts():
    assert cut("red Q: blue\n\ngreen", ["\n\n", "Q:"]) == "red "
    assert cut("red", ["\n\n"]) == "red"


def test_other_models_image_token_is_no_part_of_the_prompt():
    assert prompt_of("<image>\nWhat is it?\n") == "What is it?"
    assert prompt_of("What is <b>it</b>?") == "What is <b>it</b>?"


@pytest.mark.parametrize(
    ("visuals", "shown"),
    [
        (None, "no image"),
        ([], "no image"),
        ([None], r"1 objects \(NoneType\)"),
        (["film.mp4"], r"1 objects \(str\)"),
        ([tiny_image(), tiny_image()], r"2 objects \(Image\)"),
    ],
)
def test_anything_but_one_image_is_refused_with_the_remedy(visuals, shown):
    with pytest.raises(RefusedTask, match=f"^Document 3 of toy shows {shown}, but .* exactly one .*--include_path"):
        only_images(visuals, "Document 3 of toy")


@pytest.mark.parametrize("visuals", [[], ["film.mp4", "film.mp4"], [tiny_image()] * 3])
def test_more_images_than_a_model_of_several_takes_are_refused_with_the_number(visuals):
    with pytest.raises(RefusedTask, match=r"answers about one image to 2 \(max_images\): .* with as many images"):
        only_images(visuals, "Document 3 of toy", 2)


@pytest.mark.parametrize(
    ("context", "images", "prompt"),
    [
        ("<image>\nWhat?", 1, "What?"),
        ("Which?", 2, "[image 1] [image 2] Which?"),
        ("<image>\n<image>\nWhich?", 2, "[image 1] [image 2] Which?"),
        ("Is <image> like <image>?", 2, "Is [image 1] like [image 2] ?"),
        ("<image> Which of the two?", 2, "[image 1] [image 2] Which of the two?"),  # marks of another number
        ("<image> or <image>?", 1, "or ?"),
    ],
)
def test_of_several_images_each_has_its_number_at_its_mark_or_in_front(context, images, prompt):
    template = tiny_processor(tiny_config(max_images=2)).apply_chat_template
    request = Marked(0, None, prompt_of(context), context=context)
    expected = template([{"role": "user", "content": prompt}])
    assert template(request.messages(images)) == expected


# --- What lmms-eval calls ---


@dataclass
class Instance:
    args: tuple


def opened(document: dict) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in document["images"]]


def instances(gen_kwargs: list[dict]) -> list[Instance]:
    """A question each, with decoding arguments in turn."""
    turns = zip(QUESTIONS, itertools.cycle(gen_kwargs))
    return [Instance((question, kwargs, opened, n, "toy", "test")) for n, (question, kwargs) in enumerate(turns)]


@pytest.fixture
def adapter(model_folder):
    def adapter(documents: list[dict] | None = None, **options) -> Pheye:
        adapter = Pheye(**{"pretrained": str(model_folder), "dtype": "float32", "batch_size": "2", **options})
        adapter.task_dict = {"toy": {"test": documents or [{"images": [data]} for data in encoded_images()]}}
        return adapter

    return adapter


@pytest.mark.parametrize("workers", [0, 2])
def test_answers_are_those_of_our_engine_in_the_order_of_the_requests(adapter, answers_of_our_engine, workers, caplog):
    if workers and multiprocessing.get_start_method() != "fork":
        pytest.skip("what tasks define cannot be sent to a process")
    greedy, beams = {"max_new_tokens": NEW}, {"max_new_tokens": NEW, "num_beams": 2}
    expected = [answers_of_our_engine(**kwargs, do_sample=False) for kwargs in (greedy, beams)]
    assert expected[0] != expected[1]
    stop = expected[0][0][3:5]
    requests = instances([{**greedy, "until": [stop]}, beams])
    given = adapter(workers=workers).generate_until(requests)
    assert given == [
        beam if n % 2 else text.split(stop)[0] for n, (text, beam) in enumerate(zip(*expected, strict=True))
    ]
    assert given[0] == expected[0][0][:3]
    assert [n for n, text in enumerate(given) if not text] == [BROKEN]
    (record,) = (record for record in caplog.records if record.name == lmms.logger.name)
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"Document {BROKEN} of toy gets an empty answer: cannot identify image")


def test_documents_keep_their_order_in_batches_of_one_kind(adapter, monkeypatch):
    def batches(model, processor, requests, batch_size, workers, generate_kwargs):
        calls.append((batch_size, generate_kwargs["num_beams"], [request.id for request in requests]))
        yield [(request, f"answer {request.id}", None, None) for request in requests]

    calls = []
    monkeypatch.setattr(lmms, "answer_batches", batches)
    given = adapter(batch_size=7).generate_until(instances([{"num_beams": 1}, {"num_beams": 2}]))
    assert given == [f"answer {n}" for n in range(len(QUESTIONS))]
    assert calls == [(7, 1, [0, 2, 4]), (7, 2, [1, 3])]


def test_a_task_of_several_images_stops_before_the_first_answer(adapter, monkeypatch):
    monkeypatch.setattr(lmms, "answer_batches", lambda *args: pytest.fail("answered"))
    documents = [{"images": [png(0), png(1)]}] * len(QUESTIONS)
    with pytest.raises(RefusedTask, match=r"Document 0 of toy shows 2 objects \(Image\)"):
        adapter(documents).generate_until(instances([{}]))


def test_several_images_later_on_are_no_empty_answer(adapter):
    documents = [{"images": [png(n)] * (1 + n // 4)} for n in range(len(QUESTIONS))]
    with pytest.raises(RefusedTask, match=r"Document 4 of toy shows 2 objects \(Image\)"):
        adapter(documents).generate_until(instances([{"max_new_tokens": 1}]))


def test_a_model_of_several_images_is_shown_them_all(adapter, tmp_path):
    config = tiny_config(max_images=2, canvases=[[1, 2], [2, 2], [3, 1]])
    model, processor = tiny_model(config), tiny_processor(config)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    documents = [{"images": [png(n), png(n + 1)][: 1 + n % 2]} for n in range(len(QUESTIONS))]
    expected = []
    for number, (document, question) in enumerate(zip(documents, QUESTIONS, strict=True)):
        said = {"role": "user", "content": f"[image 1] [image 2] {question}" if number % 2 else question}
        text = processor.apply_chat_template([said], add_generation_prompt=True)
        inputs = processor(images=[opened(document)], text=[text], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=NEW)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(ids, skip_special_tokens=True).lstrip())
    given = adapter(documents, pretrained=str(tmp_path / "model"), device="cpu")
    assert given.generate_until(instances([{"max_new_tokens": NEW}])) == expected
    documents[0]["images"] = [png(0)] * 3
    with pytest.raises(RefusedTask, match=r"Document 0 of toy shows 3 objects \(Image\)"):
        given.generate_until(instances([{"max_new_tokens": NEW}]))


def test_a_task_that_begins_with_a_broken_image_goes_on(adapter):
    cut = png(0)[:60]  # which Pillow answers with a SyntaxError
    for broken in (b"broken", cut, b"", None):
        documents = [{"images": [broken]}, *({"images": [png(n)]} for n in range(1, len(QUESTIONS)))]
        given = adapter(documents).generate_until(instances([{"max_new_tokens": 1}]))
        assert [bool(text) for text in given] == [False, True, True, True, True]


@pytest.mark.parametrize("method", ["loglikelihood", "generate_until_multi_round"])
def test_other_kinds_of_tasks_are_refused(adapter, method):
    with pytest.raises(NotImplementedError, match=r"^toy .* choose tasks whose output_type is generate_until"):
        getattr(adapter(), method)(instances([{}]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "auto"}, "batch_size=auto must be a number"),
        ({"batch_size": 0}, "batch_size=0 must be a number of at least 1"),
        ({"dtype": "half"}, "dtype=half must be one of auto, float32, bfloat16, float16"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(adapter, options, message, monkeypatch):
    monkeypatch.setattr(lmms, "open_model", lambda *args: pytest.fail("opened"))
    with pytest.raises(InputError, match=message):
        adapter(**options)


def test_one_device_for_several_processes_is_refused(adapter, monkeypatch):
    state = types.SimpleNamespace(num_processes=2, process_index=1, device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", lambda **kwargs: state)
    with pytest.raises(InputError, match="--device cuda:0 would put all processes on one device"):
        adapter(device="cuda:0")
    assert (adapter()._rank, adapter()._world_size, adapter().device) == (1, 2, torch.device("cpu"))


def test_options_reach_the_model(adapter, monkeypatch, model_folder, caplog):
    given = []
    monkeypatch.setattr(
        lmms, "open_model", lambda *args: (given.append(args), (None, lambda: ("model", "processor")))[1]
    )
    loaded = adapter(revision=1234567, dtype="bfloat16", device="cpu", max_batch_size=4)
    assert given == [(str(model_folder), "1234567", "bfloat16", torch.device("cpu"))]
    assert (loaded.model, loaded.processor, loaded.batch_size, loaded.workers) == ("model", "processor", 2, 0)
    assert "max_batch_size=4 changes nothing" in caplog.text


def test_apply_chat_template_is_refused(adapter):
    with pytest.raises(InputError, match="Leave --apply_chat_template out"):
        _ = adapter().chat_template


def test_entry_point_of_setup_leads_to_the_model(monkeypatch):
    (call,) = (
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.keyword) and node.arg == "entry_points"
    )
    name, _, value = ast.literal_eval(call.value)["lmms_eval.models"][0].partition(" = ")
    module, _, attribute = value.partition(":")
    registry = types.ModuleType("lmms_eval.models.registry_v2")
    registry.ModelManifest = dict
    for package in ("lmms_eval", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    manifest = getattr(importlib.import_module(module), attribute)()
    assert manifest == {"model_id": name, "simple_class_path": f"{Pheye.__module__}.Pheye"}
    assert name == "pheye"


# --- The released package ---

TASK = """\
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: "<image>{{{{question}}}}"
doc_to_target: "{name}"
generation_kwargs: {generation_kwargs}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
UTILS = 'def images(doc):\n    return [doc["image"].convert("RGB")]\n'


def write_tasks(folder: Path, answers: dict[str, list[str]], generation_kwargs: dict[str, dict]):
    """A task per name, whose right answers are `answers`, but for the first two."""
    folder.mkdir()
    (folder / "utils.py").write_text(UTILS)
    rows = {"image": [{"bytes": data, "path": None} for data in encoded_images()], "question": QUESTIONS}
    rows |= {name: ["?", "?", *texts[2:]] for name, texts in answers.items()}
    features = {"image": datasets.Image(decode=False)} | {
        name: datasets.Value("string") for name in rows if name != "image"
    }
    data = datasets.Dataset.from_dict(rows, datasets.Features(features)).cast_column("image", datasets.Image())
    data.to_parquet(folder / "data.parquet")
    for name, kwargs in generation_kwargs.items():
        text = TASK.format(name=name, data=folder / "data.parquet", generation_kwargs=json.dumps(kwargs))
        (folder / f"{name}.yaml").write_text(text)


def read_output(folder: Path, name: str) -> tuple[list[str], float]:
    """The answers to a task in the order of the documents, and its score."""
    (samples,) = folder.rglob(f"*samples_{name}.jsonl")
    (results,) = folder.rglob("*results.json")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    assert [row["doc_id"] for row in rows] == list(range(len(QUESTIONS)))
    return [row["filtered_resps"] for row in rows], json.loads(results.read_text())["results"][name][
        "exact_match,none"
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_released_lmms_eval_gives_our_answers_in_one_process_and_in_two(answers_of_our_engine, model_folder, tmp_path):
    kwargs = {
        "greedy": {"max_new_tokens": NEW, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False},
        "beams": {"max_new_tokens": NEW, "num_beams": 2},
    }
    expected = {
        name: answers_of_our_engine(max_new_tokens=NEW, num_beams=kw["num_beams"]) for name, kw in kwargs.items()
    }
    assert expected["greedy"] != expected["beams"]
    write_tasks(tmp_path / "tasks", expected, kwargs)
    commands = install(tmp_path, "lmms", ROOT / "constraints-lmms.txt")
    # It comes for another build of torch than the present one, and then breaks transformers.
    checked([commands / "python", "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"])
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    options = ["--model", "pheye", "--model_args", f"pretrained={model_folder},dtype=float32", "--batch_size", "2"]
    options += ["--tasks", "greedy,beams", "--include_path", tmp_path / "tasks", "--log_samples"]
    for start in ([commands / "lmms-eval"], [commands / "python", *launch, "-m", "lmms_eval"]):
        output = tmp_path / f"out{len(start)}"
        printed = checked([*start, *options, "--output_path", output], cwd=tmp_path, env=environment)
        assert output.exists(), printed[-5000:]
        assert printed.count(f"Document {BROKEN} of greedy gets an empty answer: cannot identify image") == 1
        for name, answers in expected.items():
            given, score = read_output(output, name)
            assert given == answers
            assert score == pytest.approx(3 / 5)
