"""Pipelines: one line from a picture to an answer, for every kind of input."""

import base64
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from test_image_processing_pheye import encoded, serve
from transformers import GenerationConfig, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from tiny import END, tiny_image

CAPTION = "Provide a one-sentence caption for the provided image"
NEW = 8  # tokens per answer, enough for different pictures to get different answers
PICTURES = [tiny_image(seed, 60 + 9 * seed, 90 - 7 * seed) for seed in range(3)]


def load(model_folder, task="image-to-text", **kwargs):
    return pipeline(task, model=str(model_folder), trust_remote_code=True, device="cpu", **kwargs)


@pytest.fixture(scope="module")
def pipe(model_folder):
    return load(model_folder)


@pytest.fixture(scope="module")
def native(model_folder):
    return load(model_folder, "image-text-to-text")


@pytest.fixture
def calls(pipe, monkeypatch):
    """Keyword arguments and result of each call of the model's `generate`."""
    calls, generate = [], pipe.model.generate

    def spy(**kwargs):
        calls.append((kwargs, generate(**kwargs)))
        return calls[-1][1]

    monkeypatch.setattr(pipe.model, "generate", spy)
    return calls


def by_hand(model, processor, image, prompt=CAPTION, max_new_tokens=NEW, **kwargs) -> list[str]:
    """The answers as a user of `generate` would get them."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **kwargs)
    length = inputs["input_ids"].shape[1]
    return [processor.tokenizer.decode(row[length:], skip_special_tokens=True).lstrip() for row in ids]


def texts(outputs) -> list[str]:
    """Answers of one image."""
    assert all(set(output) == {"generated_text"} for output in outputs)
    return [output["generated_text"] for output in outputs]


@pytest.fixture(scope="module")
def answers(model, processor):
    """What each picture gets, one by one and by hand; no two are alike, so that mixing them up shows."""
    answers = [by_hand(model, processor, image) for image in PICTURES]
    assert len({answer for (answer,) in answers}) == len(PICTURES)
    return answers


# --- image-to-text ---


def test_the_pipeline_is_reached_by_the_folder_alone(pipe, model_folder):
    assert type(pipe).__name__ == "PheyeImageToTextPipeline"
    assert type(pipe.model).__name__ == "PheyeForConditionalGeneration"
    assert type(pipe.processor).__name__ == "PheyeProcessor"
    for part in (pipe, pipe.model, pipe.processor):
        assert type(part).__module__.startswith("transformers_modules."), "not from the folder's code"


def test_an_answer_is_what_generate_gives_without_the_prompt(pipe, answers):
    for picture, answer in zip(PICTURES, answers, strict=True):
        assert texts(pipe(picture, max_new_tokens=NEW)) == answer


def test_every_kind_of_single_image_gets_the_same_answer(pipe, answers, tmp_path):
    picture, path = PICTURES[0], tmp_path / "picture.png"
    data = encoded(picture)
    path.write_bytes(data)
    array = np.asarray(picture)
    with serve({"/picture.png": data}) as address:
        sources = {
            "PIL": picture,
            "path": str(path),
            "pathlib": path,
            "URL": f"{address}/picture.png",
            "bytes": data,
            "base64": base64.b64encode(data).decode(),
            "numpy": array,
            "torch": torch.from_numpy(array.copy()).permute(2, 0, 1),
        }
        for name, source in sources.items():
            assert texts(pipe(source, max_new_tokens=NEW)) == answers[0], name


def image_column() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": PICTURES}, features=datasets.Features({"image": datasets.Image()}))


class TorchDataset(torch.utils.data.Dataset):
    def __len__(self):
        return len(PICTURES)

    def __getitem__(self, index):
        return PICTURES[index]


SOURCES = {
    "list": lambda: list(PICTURES),
    "tuple": lambda: tuple(PICTURES),
    "generator": lambda: (picture for picture in PICTURES),
    "list of mixed kinds": lambda: [PICTURES[0], encoded(PICTURES[1]), np.asarray(PICTURES[2])],
    "torch dataset": TorchDataset,
    "KeyDataset": lambda: KeyDataset([{"picture": picture} for picture in PICTURES], "picture"),
    "KeyDataset of datasets": lambda: KeyDataset(image_column(), "image"),
    "dataset column": lambda: image_column()["image"],
    "column of a slice": lambda: image_column()[:]["image"],
    "streaming dataset column": lambda: image_column().to_iterable_dataset()["image"],
}


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("source", SOURCES)
def test_many_images_get_the_answers_of_each_alone(pipe, answers, calls, source, batch_size):
    outputs = list(pipe(SOURCES[source](), batch_size=batch_size, max_new_tokens=NEW))
    assert [texts(output) for output in outputs] == answers
    sizes = [len(kwargs["pixel_values"]) for kwargs, _ in calls]
    assert sizes == ([1, 1, 1] if batch_size == 1 else [2, 1])


def test_a_column_is_opened_one_by_one(pipe):
    """A column of a dataset may be larger than memory."""
    opened, most = [], 0

    class Column(tuple):
        def __iter__(self):
            for picture in super().__iter__():
                opened.append(picture)
                yield picture

    generate = pipe.model.generate

    def spy(**kwargs):
        nonlocal most
        most = max(most, len(opened) - spy.done)
        spy.done += 1
        return generate(**kwargs)

    spy.done = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.model, "generate", spy)
        pipe(Column(PICTURES * 3), max_new_tokens=1)
    assert len(opened) == spy.done == 9 and most <= 2


def test_no_images_get_no_answers(pipe):
    assert pipe([]) == [] and pipe(()) == [] and list(pipe(picture for picture in [])) == []


def test_the_default_prompt_asks_for_a_caption(pipe, processor, calls):
    pipe(PICTURES[0], max_new_tokens=1)
    prompt = processor.tokenizer.decode(calls[0][0]["input_ids"][0])
    assert prompt == processor.apply_chat_template([{"role": "user", "content": CAPTION}], add_generation_prompt=True)
    assert prompt.endswith(f"\n\nInstruction: {CAPTION}\nOutput:")


def test_prompt_replaces_the_default_by_call_and_from_the_start(pipe, model_folder, model, processor, calls):
    question = "What colour is it?"
    expected = by_hand(model, processor, PICTURES[0], question)
    assert texts(pipe(PICTURES[0], prompt=question, max_new_tokens=NEW)) == expected
    assert processor.tokenizer.decode(calls[0][0]["input_ids"][0]).endswith(f"Instruction: {question}\nOutput:")
    assert texts(load(model_folder, prompt=question)(PICTURES[0], max_new_tokens=NEW)) == expected
    several = pipe(PICTURES[:2], prompt=question, batch_size=2, max_new_tokens=NEW)
    assert [texts(output) for output in several] == [
        by_hand(model, processor, picture, question) for picture in PICTURES[:2]
    ]


def new_tokens(call) -> int:
    kwargs, sequences = call
    return sequences.shape[1] - kwargs["input_ids"].shape[1]


ENDLESS = {"suppress_tokens": [0]}  # no end of text


def test_an_answer_has_at_most_256_tokens_by_default(pipe, calls):
    pipe(PICTURES[0], prompt="Why?", generate_kwargs=ENDLESS)
    assert new_tokens(calls[0]) == 256


def test_max_new_tokens_by_call_from_the_start_and_in_generate_kwargs(pipe, model_folder, calls):
    pipe(PICTURES[0], max_new_tokens=3, generate_kwargs=ENDLESS)
    pipe(PICTURES[0], generate_kwargs={"max_new_tokens": 4, **ENDLESS})
    pipe(PICTURES[0], generate_kwargs={"generation_config": GenerationConfig(max_new_tokens=5, **ENDLESS)})
    assert [new_tokens(call) for call in calls] == [3, 4, 5]

    own = load(model_folder, max_new_tokens=6, generate_kwargs=ENDLESS)
    generate = own.model.generate
    own.model.generate = lambda **kwargs: calls.append((kwargs, generate(**kwargs))) or calls[-1][1]
    own(PICTURES[0])
    own(PICTURES[0], max_new_tokens=2)
    own(PICTURES[0], generate_kwargs={"max_new_tokens": 7})
    own(PICTURES[0])
    assert [new_tokens(call) for call in calls[3:]] == [6, 2, 7, 6]


def test_max_length_and_the_models_own_setting_count_before_the_default(pipe, calls, monkeypatch):
    length = len(pipe.preprocess(PICTURES[0])["input_ids"][0])
    pipe(PICTURES[0], generate_kwargs={"max_length": length + 3, **ENDLESS})
    monkeypatch.setattr(pipe.model.generation_config, "max_new_tokens", 2)
    pipe(PICTURES[0], generate_kwargs=ENDLESS)
    monkeypatch.setattr(pipe.model.generation_config, "max_new_tokens", None)
    monkeypatch.setattr(pipe.model.generation_config, "max_length", length + 1)
    pipe(PICTURES[0], generate_kwargs=ENDLESS)
    assert [new_tokens(call) for call in calls] == [3, 2, 1]


def test_a_dict_of_what_generate_gives_makes_no_difference(pipe):
    expected = pipe(PICTURES[0], max_new_tokens=NEW)
    assert pipe(PICTURES[0], max_new_tokens=NEW, generate_kwargs={"return_dict_in_generate": True}) == expected


def test_a_generation_config_without_a_length_leaves_the_default(pipe, calls):
    pipe(PICTURES[0], prompt="Why?", generate_kwargs={"generation_config": GenerationConfig(**ENDLESS)})
    assert new_tokens(calls[0]) == 256


@pytest.mark.parametrize("part", ["image_processor", "tokenizer"])
def test_half_a_processor_is_refused(pipe, part):
    with pytest.raises(TypeError, match="takes processor="):
        type(pipe)(model=pipe.model, processor=pipe.processor, **{part: getattr(pipe.processor, part)})


def test_max_new_tokens_given_twice_is_refused_with_both(pipe, model_folder):
    twice = {"max_new_tokens": 3, "generate_kwargs": {"max_new_tokens": 5}}
    with pytest.raises(ValueError, match=r"max_new_tokens.*3.*5; give it once"):
        pipe(PICTURES[0], **twice)
    with pytest.raises(ValueError, match=r"max_new_tokens.*3.*5; give it once"):
        load(model_folder, **twice)


def test_generate_kwargs_are_left_as_they_were(pipe):
    generate_kwargs = {"num_beams": 2}
    pipe(PICTURES[0], max_new_tokens=2, generate_kwargs=generate_kwargs)
    assert generate_kwargs == {"num_beams": 2}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_beams_and_several_answers_per_image(pipe, model, processor, batch_size):
    options = {"num_beams": 3, "num_return_sequences": 2}
    outputs = pipe(PICTURES, batch_size=batch_size, max_new_tokens=NEW, generate_kwargs=options)
    expected = [by_hand(model, processor, picture, **options) for picture in PICTURES]
    assert [texts(output) for output in outputs] == expected
    assert all(len(set(answers)) == 2 for answers in expected)
    assert texts(pipe(PICTURES[0], max_new_tokens=NEW, generate_kwargs=options)) == expected[0]


def test_sampling_takes_the_seed(pipe, model, processor):
    options = {"do_sample": True, "temperature": 2.0}
    torch.manual_seed(7)
    expected = by_hand(model, processor, PICTURES[0], **options)
    torch.manual_seed(7)
    assert texts(pipe(PICTURES[0], max_new_tokens=NEW, generate_kwargs=options)) == expected


def test_return_dict_in_generate_does_not_break_the_pipeline(pipe, answers, monkeypatch):
    monkeypatch.setattr(pipe.model.generation_config, "return_dict_in_generate", True)
    assert texts(pipe(PICTURES[0], max_new_tokens=NEW)) == answers[0]


def test_answers_lose_prompt_leading_space_and_end_and_nothing_else(pipe, processor, monkeypatch):
    answer = processor.tokenizer(f" A cat, \n {CAPTION} {END}{END}", return_tensors="pt")["input_ids"]
    monkeypatch.setattr(
        pipe.model,
        "generate",
        lambda input_ids, **kwargs: torch.cat([input_ids, answer.expand(len(input_ids), -1)], 1),
    )
    assert pipe(PICTURES[0]) == [{"generated_text": f"A cat, \n {CAPTION} "}]
    assert pipe(PICTURES[:2], batch_size=2) == [[{"generated_text": f"A cat, \n {CAPTION} "}]] * 2


@pytest.mark.parametrize("prompt", ["", ["What?", "Why?"], 5], ids=str)
def test_a_prompt_that_is_empty_or_no_text_is_refused(pipe, prompt):
    with pytest.raises((TypeError, ValueError), match=r"(?i)prompt"):
        pipe(PICTURES[0], prompt=prompt, max_new_tokens=1)


def test_an_unknown_option_is_refused_with_what_to_use(pipe, model_folder):
    with pytest.raises(TypeError, match=r"no option num_beams; use generate_kwargs=\{'num_beams': 2\}"):
        pipe(PICTURES[0], num_beams=2)
    for name in ("question", "text", "prompts"):
        with pytest.raises(TypeError, match=rf"no option {name}; use prompt="):
            pipe(PICTURES[0], **{name: "What?"})
    with pytest.raises(TypeError, match=r"no option do_sample; use generate_kwargs=\{'do_sample': True\}"):
        load(model_folder, do_sample=True)
    for wrong in (5, "x", ["num_beams"]):
        with pytest.raises(TypeError, match=r"generate_kwargs=.* must be a dict"):
            pipe(PICTURES[0], generate_kwargs=wrong)


@pytest.mark.parametrize("nothing", [None, [None], [PICTURES[0], None]], ids=["None", "[None]", "[image, None]"])
def test_a_missing_image_is_refused_instead_of_answered_blindly(pipe, nothing):
    with pytest.raises((TypeError, ValueError), match=r"(?i)image"):
        pipe(nothing, max_new_tokens=1)


def test_a_broken_image_is_refused_by_name(pipe, tmp_path):
    path = tmp_path / "half.png"
    path.write_bytes(encoded(PICTURES[0])[:200])
    for images in (path, [PICTURES[0], path], (PICTURES[0], str(path)), (name for name in [path])):
        with pytest.raises(ValueError, match=r"half\.png.*file is whole"):
            list(pipe(images, max_new_tokens=1))
    with pytest.raises(ValueError, match=r"missing\.png.*no such file"):
        pipe(str(tmp_path / "missing.png"))
    with serve({}) as address:
        with pytest.raises(ValueError, match=rf"{address}/gone\.png.*404"):
            pipe(f"{address}/gone.png")


# --- image-text-to-text, transformers' own ---


def chat(image, *more, text=CAPTION) -> list[dict]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}, *more]


def test_the_native_pipeline_answers_chats(native, answers, tmp_path):
    assert type(native).__module__ == "transformers.pipelines.image_text_to_text"
    (tmp_path / "picture.png").write_bytes(encoded(PICTURES[0]))
    for image in (PICTURES[0], str(tmp_path / "picture.png")):
        (output,) = native(text=chat(image), max_new_tokens=NEW)
        assert output["generated_text"][-1]["role"] == "assistant"
        assert output["generated_text"][-1]["content"] == answers[0][0]
        (new_text,) = native(text=chat(image), max_new_tokens=NEW, return_full_text=False)
        assert new_text["generated_text"] == answers[0][0]


SIGN = Path(__file__).parent.parent / "docs" / "sign.jpg"
NANO = Path(__file__).parent.parent / "checkpoints" / "pheye-nano"


def test_the_native_pipelines_chat_goes_on_with_the_tokens_that_were_generated():
    native = load(NANO, "image-text-to-text")
    (output,) = native(text=chat(str(SIGN), text="What is written on the sign?"), max_new_tokens=20)
    assert output["generated_text"][-1] == {"role": "assistant", "content": "HOTEL"}
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = native.processor.apply_chat_template(output["input_text"], add_generation_prompt=True, **options)
    ids = native.model.generate(**inputs, max_new_tokens=20)
    history = native.processor.apply_chat_template(output["generated_text"], **options)
    assert torch.equal(history["input_ids"], ids)


def test_a_path_is_no_question_where_transformers_replaces_the_task(model, processor):
    """For a loaded model `pipeline("image-to-text")` is image-text-to-text, to which the first argument is text."""
    native = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    assert type(native).__name__ == "ImageTextToTextPipeline"
    data = base64.b64encode(SIGN.read_bytes()).decode()
    for wrong in (str(SIGN), [str(SIGN)] * 2, "missing.png", "https://host/x.jpg", data):
        with pytest.raises(ValueError, match=r"is the place of an image.*PheyeImageToTextPipeline\(model="):
            native(wrong, max_new_tokens=1)
    with pytest.raises(TypeError, match="prompt is no argument of PheyeProcessor"):
        native(text=chat(PICTURES[0]), prompt="What?", max_new_tokens=1)
    own = type(load(NANO))(model=model, processor=processor)
    assert own(str(SIGN), max_new_tokens=1)


def test_the_native_pipeline_refuses_an_image_that_would_not_arrive(native):
    for part in ({"type": "image"}, {"type": "image", "image": None}, {"type": "input_image", "image_url": "x"}):
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
        with pytest.raises(ValueError, match="image"):
            native(text=messages, max_new_tokens=1)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_native_pipeline_answers_many_chats(native, model, processor, batch_size):
    questions = ["What?", "Which of the colours is the darkest one?", "Is it red?"]
    chats = [chat(picture, text=question) for picture, question in zip(PICTURES, questions, strict=True)]
    outputs = native(text=chats, max_new_tokens=NEW, return_full_text=False, batch_size=batch_size)
    expected = [
        by_hand(model, processor, picture, question) for picture, question in zip(PICTURES, questions, strict=True)
    ]
    assert [[output["generated_text"] for output in row] for row in outputs] == expected


def test_the_native_pipeline_takes_a_system_message_and_turns(native, model, processor):
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        *chat(PICTURES[1], {"role": "assistant", "content": [{"type": "text", "text": "A field."}]}, text="What?"),
        {"role": "user", "content": [{"type": "text", "text": "Which colour?"}]},
    ]
    prompt = f"Be brief.\n\nInstruction: What?\nOutput: A field.{END}\n\nInstruction: Which colour?\nOutput:"
    inputs = processor(images=PICTURES[1], text=prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW)[0, inputs["input_ids"].shape[1] :]
    (output,) = native(text=turns, max_new_tokens=NEW, return_full_text=False)
    assert output["generated_text"] == processor.tokenizer.decode(ids, skip_special_tokens=True).lstrip()


def test_the_native_pipeline_continues_an_answer(native, model, processor):
    begun = {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": CAPTION}, {"role": "assistant", "content": "It is"}], continue_final_message=True
    )
    inputs = processor(images=PICTURES[0], text=prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW)[0, inputs["input_ids"].shape[1] :]
    (output,) = native(text=chat(PICTURES[0], begun), max_new_tokens=NEW, return_full_text=False)
    assert output["generated_text"] == processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_the_native_pipeline_takes_images_and_texts(native, answers, processor):
    text = processor.apply_chat_template([{"role": "user", "content": CAPTION}], add_generation_prompt=True)
    (output,) = native(images=PICTURES[0], text=text, max_new_tokens=NEW, return_full_text=False)
    assert output["generated_text"] == answers[0][0]
    outputs = native(images=PICTURES, text=[text] * 3, max_new_tokens=NEW, return_full_text=False)
    assert [output["generated_text"] for output in outputs] == [answer for (answer,) in answers]
    (full,) = native(images=PICTURES[0], text=text, max_new_tokens=NEW)
    assert full["generated_text"].startswith(text)


def test_the_native_pipeline_refuses_a_broken_image_by_name(native, tmp_path):
    with pytest.raises(ValueError, match=r"missing\.png"):
        native(text=chat(str(tmp_path / "missing.png")), max_new_tokens=1)
    with pytest.raises(ValueError, match=r"missing\.png"):
        native(images=str(tmp_path / "missing.png"), text="What?", max_new_tokens=1)


# --- Registered, without the folder's code ---

REGISTERED = """
    import json, sys
    import pheye
    pheye.register()
    from pheye import PheyeImageToTextPipeline
    from transformers import pipeline

    folder, path, new = sys.argv[1], sys.argv[2], int(sys.argv[3])
    pipe = pipeline("image-to-text", model=folder, pipeline_class=PheyeImageToTextPipeline, device="cpu")
    native = pipeline("image-text-to-text", model=folder, device="cpu")
    content = [{"type": "image", "path": path}, {"type": "text", "text": sys.argv[4]}]
    parts = [pipe.model, pipe.processor, pipe.processor.image_processor, native.model, native.processor]
    print(json.dumps({
        "modules": sorted({type(part).__module__ for part in parts}),
        "remote": [name for name in sys.modules if name.startswith("transformers_modules.")],
        "answer": pipe(path, max_new_tokens=new),
        "native": native(text=[{"role": "user", "content": content}], max_new_tokens=new, return_full_text=False),
    }))
"""


def test_registered_classes_serve_without_trust_remote_code(model_folder, answers, tmp_path):
    """In a process of its own, because registration stays."""
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(PICTURES[0]))
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(REGISTERED), str(model_folder), str(path), str(NEW), CAPTION],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["modules"] == ["pheye.image_processing_pheye", "pheye.modeling_pheye", "pheye.processing_pheye"]
    assert result["remote"] == []
    assert texts(result["answer"]) == answers[0]
    assert result["native"][0]["generated_text"] == answers[0][0]
