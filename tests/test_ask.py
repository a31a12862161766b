"""A question about an image: what is printed, when, and what is said about bad input."""

import sys

import pytest
import torch
from test_image_processing_pheye import serve

from pheye.answering import ask
from pheye.answering.ask import Answer

from tiny import tiny_config, tiny_image, tiny_model, tiny_processor

NEW = 8
QUESTION = "What is this?"


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "a.png"
    tiny_image(3, 60, 90).save(path)
    return path


@pytest.fixture
def run(model_folder, capsys):
    """Runs the command in this process: (exit status, what it printed, what it wrote to the error stream)."""

    def run(image, question=QUESTION, *options):
        capsys.readouterr()
        status = ask.main([str(model_folder), str(image), question, *options, "--device", "cpu"])
        return status, *capsys.readouterr()

    return run


def test_the_answer_is_that_of_generate(run, image, model, processor):
    text = processor.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    expected = processor.post_process_image_text_to_text(ids)[0].lstrip()
    assert run(image, QUESTION, "--max-new-tokens", str(NEW))[:2] == (0, f"{expected}\n")
    with serve({"/a.png": image.read_bytes()}) as url:
        assert run(f"{url}/a.png", QUESTION, "--max_new_tokens", str(NEW))[1] == f"{expected}\n"


@pytest.mark.parametrize("canvases", [None, [[1, 2], [2, 2], [3, 1]]])
def test_several_images_and_none(image, tmp_path, capsys, canvases):
    config = tiny_config(max_images=2, canvases=canvases)
    model, processor = tiny_model(config), tiny_processor(config)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    tiny_image(1, 80, 40).save(tmp_path / "b.png")
    both = [image, tmp_path / "b.png"]
    printed = []
    for images, question, prompt in [
        (both, QUESTION, f"[image 1] [image 2] {QUESTION}"),
        (both[::-1], QUESTION, f"[image 1] [image 2] {QUESTION}"),
        (both, "Is [image 1] like [image 2]?", "Is [image 1] like [image 2]?"),
        ([], QUESTION, QUESTION),
    ]:
        text = processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        inputs = processor(images=[images], text=[text], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        expected = processor.post_process_image_text_to_text(ids)[0].lstrip()
        options = ["--device", "cpu", "--max_new_tokens", str(NEW)]
        assert ask.main([str(tmp_path / "model"), *options, *map(str, images), question]) == 0
        printed.append(capsys.readouterr().out)
        assert printed[-1] == f"{expected}\n"
    assert len(set(printed)) >= 3


def test_more_images_than_the_model_takes_are_counted(image, model_folder, capsys):
    assert ask.main([str(model_folder), str(image), str(image), QUESTION, "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert f"There are 2 images, and {model_folder} takes 1 (max_images); ask about fewer." in error


@pytest.mark.parametrize("name", ["a.png", "https://example.org/a"])
def test_a_question_that_was_forgotten(name, capsys):
    with pytest.raises(SystemExit):
        ask.parse(["model", name])
    assert f"{name} is an image: write a question behind it" in capsys.readouterr().err


def test_words_appear_when_they_are_there_and_without_the_space_in_front(processor, monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "stdout", type("Screen", (), {"write": lambda self, text: printed.append(text),
                                                           "flush": lambda self: None})())  # fmt: skip
    ids = processor.tokenizer("\n a cup of tea")["input_ids"]
    answer = Answer(processor.tokenizer)
    answer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids:
        answer.put(torch.tensor([token]))
    before = "".join(printed)
    assert before and "a cup of tea".startswith(before.strip())
    answer.end()
    assert "".join(printed) == "a cup of tea\n"


def test_an_answer_that_was_cut_says_so(run, image):
    _, printed, error = run(image, QUESTION, "--max_new_tokens", "1")
    assert "(cut after 1 tokens; --max_new_tokens gives more)" in error and "cut after" not in printed


def test_input_that_cannot_be_used_stops_it_before_the_model_is_loaded(run, image, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "pheye.PheyeForConditionalGeneration.from_pretrained", lambda *args, **kw: pytest.fail("loaded")
    )
    (tmp_path / "broken.png").write_bytes(b"no image")
    for bad in (tmp_path / "none.png", tmp_path / "broken.png", tmp_path):
        status, printed, error = run(bad)
        assert (status, printed) == (1, "") and error.startswith("error: ")
    assert ask.main([str(tmp_path), str(image), QUESTION]) == 1
    assert "has no config.json. Give the folder or Hub id of a whole model" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run(image, " ")
    assert stop.value.code == 2


def test_a_question_that_is_too_long_is_one_line(run, image):
    status, printed, error = run(image, "What is this? " * 3000)
    assert (status, printed) == (1, "")
    assert error.splitlines()[-1].startswith("error: The text has ") and "shorten the prompt" in error


def test_who_stops_it_sees_no_traceback(run, image, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pheye.PheyeForConditionalGeneration.generate", stopped)
    status, _, error = run(image)
    assert status == 130 and error.splitlines()[-1] == "interrupted."
