"""Processor: the published prompt, token for token, and one image per text."""

import base64
import dataclasses
import logging
import pickle
from pathlib import Path

import pytest
import torch
from jinja2.exceptions import TemplateError
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer

from pheye import PheyeForConditionalGeneration, PheyeImageProcessor, PheyeProcessor
from pheye.processing_pheye import CAPTION_INSTRUCTION, CHAT_TEMPLATE

from tiny import END, tiny_image, tiny_processor, tiny_tokenizer

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "fixtures" / "golden"
SYSTEM = (
    "You are an AI visual assistant and you are seeing a single image. You will receive an instruction regarding that "
    "image. Your goal is to follow the instruction as faithfully as you can."
)
PROMPTS = ["What is written on the sign?", "Describe the image in one sentence."]


def user(*parts) -> dict:
    """A message whose parts are texts and images."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": "user", "content": content}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def text_of(ids: torch.Tensor, processor: PheyeProcessor) -> str:
    return processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


# --- The prompt ---


@pytest.mark.parametrize("case", ["x2-448", "x4-672"])
def test_prompts_have_the_tokens_of_the_published_implementation(case):
    expected = load_file(GOLDEN / case / "expected.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / case / "decoder")
    processor = PheyeProcessor(PheyeImageProcessor(tiles_per_side=int(case == "x4-672") + 2), tokenizer)
    conversations = [[user(GOLDEN / case / f"image{row}.png", prompt)] for row, prompt in enumerate(PROMPTS)]
    inputs = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["attention_mask"], expected["attention_mask"])
    assert (inputs["attention_mask"] == 0).any()  # the prompts differ in length, so padding is compared too
    probe = inputs["pixel_values"][..., ::16, ::16]
    torch.testing.assert_close(probe, expected["pixel_values_probe"], atol=1e-6, rtol=0)


def test_without_a_system_message_the_published_one_is_used(processor):
    text = processor.apply_chat_template([user("Why?")], add_generation_prompt=True)
    assert text == f"{SYSTEM}\n\nInstruction: Why?\nOutput:"


def test_an_own_system_message_replaces_the_published_one(processor):
    text = processor.apply_chat_template([system("Be brief."), user("Why?")], add_generation_prompt=True)
    assert text == "Be brief.\n\nInstruction: Why?\nOutput:"


def test_an_empty_system_message_means_none(processor):
    for empty in (system(""), {"role": "system", "content": []}):
        text = processor.apply_chat_template([empty, user("Why?")], add_generation_prompt=True)
        assert text == "Instruction: Why?\nOutput:"


def test_several_turns(processor):
    turns = [user("One?"), assistant("First."), user("Two?"), assistant("Second."), user("Three?")]
    rest = (
        f"Instruction: One?\nOutput: First.{END}\n\nInstruction: Two?\nOutput: Second.{END}"
        "\n\nInstruction: Three?\nOutput:"
    )
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == f"{SYSTEM}\n\n{rest}"
    assert processor.apply_chat_template([system(""), *turns], add_generation_prompt=True) == rest


def test_without_a_generation_prompt_the_text_ends_where_the_messages_do(processor):
    assert processor.apply_chat_template([user("Why?")]).endswith("\n\nInstruction: Why?")
    finished = processor.apply_chat_template([user("Why?"), assistant("So.")])
    assert finished.endswith(f"\n\nInstruction: Why?\nOutput: So.{END}")


def test_content_may_be_a_string_or_parts(processor):
    as_text = [system("Be brief."), {"role": "user", "content": "Is it red?"}, assistant("Yes.")]
    as_parts = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        user("Is it ", tiny_image(), "red?"),
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    assert processor.apply_chat_template(as_text) == processor.apply_chat_template(as_parts)


def test_messages_are_taken_as_they_are(processor):
    """No trimming, no markup, no template syntax inside of a user's words."""
    odd = "  {{ 1 + 1 }} <b>é</b> \n{% if %} "
    text = processor.apply_chat_template([user(odd)], add_generation_prompt=True)
    assert text == f"{SYSTEM}\n\nInstruction: {odd}\nOutput:"


def test_a_final_message_can_be_continued(processor):
    for last in (assistant("It is a"), {"role": "assistant", "content": [{"type": "text", "text": "It is a"}]}):
        text = processor.apply_chat_template([user("What?"), last], continue_final_message=True)
        assert text == f"{SYSTEM}\n\nInstruction: What?\nOutput: It is a"


@pytest.mark.parametrize(
    "roles",
    [["assistant"], ["user", "user"], ["user", "assistant", "assistant"], ["user", "system"], ["system", "system"]],
    ids="-".join,
)
def test_roles_out_of_order_are_refused_by_name(processor, roles):
    conversation = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(TemplateError, match=rf"user and assistant take turns.*message \d has the role {roles[-1]}"):
        processor.apply_chat_template(conversation)


def test_assistant_mask_covers_space_answer_and_end_and_nothing_else(processor):
    conversations = [
        [user(tiny_image(0), "One?"), assistant("Yes, two."), user("And then, in the end?"), assistant("Output: 3")],
        [system(""), user(tiny_image(1), "Q"), assistant("Short")],
    ]
    inputs = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    assert inputs["attention_mask"][1, 0] == 0  # the second row is padded on the left
    answers = [[" Yes, two.", " Output: 3"], [" Short"]]
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)):
        runs = (torch.diff(mask, prepend=torch.zeros(1, dtype=mask.dtype)) == 1).sum()
        assert runs == len(answers[row])
        expected = "".join(answer + END for answer in answers[row])
        assert text_of(ids[mask.bool()], processor) == expected


def test_masked_text_is_what_generation_continues_with(processor):
    """Prompt for generation plus masked part is the training text, token for token."""
    question, answer = user("Why?"), assistant("So.")
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    prompt = processor.apply_chat_template([question], add_generation_prompt=True, **options)["input_ids"][0]
    whole = processor.apply_chat_template([question, answer], return_assistant_tokens_mask=True, **options)
    ids, mask = whole["input_ids"][0], whole["assistant_masks"][0].bool()
    assert torch.equal(torch.cat([prompt, ids[mask]]), ids)


def test_the_caption_instruction_is_the_papers():
    assert CAPTION_INSTRUCTION == "Provide a one-sentence caption for the provided image"


def test_the_prompt_stands_in_one_root_file_only():
    files = [path for path in ROOT.iterdir() if path.suffix in (".py", ".jinja", ".json", ".md", ".toml", ".txt")]
    assert len(files) > 5
    for part in ("You are an AI visual assistant", "'Instruction: '", "Output:'"):
        holders = [path.name for path in files if part in path.read_text()]
        assert holders == ["processing_pheye.py"], part
    assert (ROOT / "processing_pheye.py").read_text().count("You are an AI visual assistant") == 1


def test_a_template_of_ones_own_replaces_the_published_one():
    own = "{% for message in messages %}{{ message['content'] }}|{% endfor %}"
    processor = PheyeProcessor(tiny_processor().image_processor, tiny_tokenizer(), chat_template=own)
    assert processor.apply_chat_template([assistant("a"), assistant("b")]) == "a|b|"
    assert tiny_processor().chat_template == CHAT_TEMPLATE


# --- Text ---


def test_text_is_taken_as_it_is(processor):
    for text in ("a", " two words\n", f"{SYSTEM}\n\nInstruction: x\nOutput:", "{{ x }}"):
        ids = processor(text=text, return_tensors="pt")["input_ids"]
        assert ids.tolist() == [tiny_tokenizer()(text)["input_ids"]]
        assert text_of(ids[0], processor) == text


def test_texts_are_padded_on_the_left(processor):
    inputs = processor(text=["abc", "a", "ab"], return_tensors="pt")
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    ids, end = inputs["input_ids"], processor.tokenizer.eos_token_id
    assert (ids[inputs["attention_mask"] == 0] == end).all()
    assert [text_of(row[mask.bool()], processor) for row, mask in zip(ids, inputs["attention_mask"], strict=True)] == [
        "abc",
        "a",
        "ab",
    ]


def test_a_call_may_pad_on_the_right(processor):
    inputs = processor(text=["abc", "a"], padding_side="right", return_tensors="pt")
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_tokenizer_without_padding_token_gets_its_end_token():
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token is None
    processor = PheyeProcessor(tiny_processor().image_processor, tokenizer)
    assert processor.tokenizer.pad_token == processor.tokenizer.eos_token == END


def test_a_padding_token_of_the_tokenizers_own_stays():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    processor = PheyeProcessor(tiny_processor().image_processor, tokenizer)
    inputs = processor(text=["abc", "a"], return_tensors="pt")
    assert inputs["input_ids"][1, 0] == tokenizer.convert_tokens_to_ids("<pad>") != tokenizer.eos_token_id


def test_answers_are_decoded_without_special_tokens(processor):
    ids = torch.tensor([processor.tokenizer(f"{END}{END} yes{END}")["input_ids"]])
    assert processor.post_process_image_text_to_text(ids) == ["yes"]
    assert processor.post_process_image_text_to_text(ids, skip_special_tokens=False) == [f"{END}{END} yes{END}"]


def test_answers_lose_the_space_that_begins_them_and_none_besides(processor):
    texts = [" a b ", "c", " \n d", "", " Output: e\nOutput: f"]
    rows = [torch.tensor([processor.tokenizer(text)["input_ids"]]) for text in texts if text] + [
        torch.zeros(1, 1).long()
    ]
    answers = [processor.post_process_image_text_to_text(row)[0] for row in rows]
    assert answers == ["a b ", "c", "d", "Output: e\nOutput: f", ""]


@pytest.mark.parametrize("answer", [" Yes.", "Yes.", "\n Yes.", ""])
def test_taking_the_prompt_from_the_whole_text_leaves_the_answer(processor, answer):
    """As transformers' image-text-to-text does."""
    turns = [user("One?"), assistant("First."), user("Two?")]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    ids = processor(text=[prompt, prompt + answer], padding=False)["input_ids"]
    before, whole = (processor.post_process_image_text_to_text([row])[0] for row in ids)
    assert whole.startswith(before)
    assert whole.removeprefix(before) == answer.lstrip()


# --- History ---


def test_an_answer_has_one_space_before_it_whatever_it_brings(processor):
    expected = processor.apply_chat_template([user("Why?"), assistant("So. ")])
    assert expected.endswith(f"Output: So. {END}")
    for answer in (" So. ", "  So. ", "\n So. "):
        assert processor.apply_chat_template([user("Why?"), assistant(answer)]) == expected
        parts = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        assert processor.apply_chat_template([user("Why?"), parts]) == expected


def test_history_has_the_very_tokens_that_were_generated():
    nano = ROOT / "checkpoints" / "pheye-nano"
    model, processor = PheyeForConditionalGeneration.from_pretrained(nano), PheyeProcessor.from_pretrained(nano)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    turns = [user(ROOT / "docs" / "sign.jpg", "What is written on the sign?")]
    for question in ("Describe the image.", "Is there a circle?"):
        inputs = processor.apply_chat_template(turns, add_generation_prompt=True, **options)
        ids = model.generate(**inputs, max_new_tokens=80)
        new = ids[:, inputs["input_ids"].shape[1] :]
        assert new[0, -1] == processor.tokenizer.eos_token_id
        for answer in (
            processor.post_process_image_text_to_text(new)[0],
            processor.decode(new[0], skip_special_tokens=True),  # as a streamer gives it, with its space
        ):
            again = processor.apply_chat_template([*turns, assistant(answer)], **options)
            assert torch.equal(again["input_ids"], ids)
        turns += [assistant(answer), user(question)]


# --- Images and texts ---


def shapes(inputs) -> dict:
    return {name: tuple(value.shape) for name, value in inputs.items()}


def test_one_bare_image_serves_any_number_of_texts(processor):
    image = tiny_image()
    inputs = processor(images=image, text=["a", "bcd", "ef"], return_tensors="pt")
    assert shapes(inputs) == {"input_ids": (3, 3), "attention_mask": (3, 3), "pixel_values": (1, 5, 3, 32, 32)}
    expected = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"], expected)
    assert shapes(processor(images=image, text="a", return_tensors="pt"))["pixel_values"] == (1, 5, 3, 32, 32)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("container", [list, tuple])
def test_lists_of_images_go_with_lists_of_texts_in_order(processor, nested, container):
    pictures = [tiny_image(0), tiny_image(1)]
    images = container([picture] if nested else picture for picture in pictures)
    inputs = processor(images=images, text=["abc", "a"], return_tensors="pt")
    assert inputs["input_ids"].shape == (2, 3)
    expected = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs["pixel_values"], expected)


def test_a_tokenizer_gives_ids_and_mask_and_nothing_else():
    tokenizer = tiny_tokenizer()
    for names in (["input_ids", "token_type_ids", "attention_mask"], ["input_ids"]):
        tokenizer.model_input_names = names
        processor = PheyeProcessor(tiny_processor().image_processor, tokenizer)
        assert set(processor(images=tiny_image(), text="ab")) == {"input_ids", "attention_mask", "pixel_values"}
    assert "token_type_ids" in processor(text="ab", return_token_type_ids=True)


def test_texts_may_be_a_tuple(processor):
    inputs = processor(images=[tiny_image(0), tiny_image(1)], text=("abc", "a"), return_tensors="pt")
    expected = processor(images=[tiny_image(0), tiny_image(1)], text=["abc", "a"], return_tensors="pt")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])


def test_text_only_and_images_only(processor):
    assert set(processor(text="a", return_tensors="pt")) == {"input_ids", "attention_mask"}
    assert set(processor(images=tiny_image(), return_tensors="pt")) == {"pixel_values"}
    assert shapes(processor(images=[tiny_image(0), tiny_image(1)], return_tensors="pt")) == {
        "pixel_values": (2, 5, 3, 32, 32)
    }
    chat = processor.apply_chat_template([user("a")], tokenize=True, return_dict=True, return_tensors="pt")
    assert set(chat) == {"input_ids", "attention_mask"}


def test_options_reach_the_image_processor(processor):
    inputs = processor(images=tiny_image(), text="a", tiles_per_side=3, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 10, 3, 32, 32)
    assert processor.image_processor.tiles_per_side == 2


@pytest.mark.parametrize("images, texts", [(2, 1), (1, 2), (3, 2)])
def test_lists_of_different_lengths_are_refused_with_both(processor, images, texts):
    pictures, words = [tiny_image(seed) for seed in range(images)], ["word"] * texts
    message = rf"{images} images and {texts} texts; give one image per text, or one image that is not in a list"
    with pytest.raises(ValueError, match=message):
        processor(images=pictures, text=words)
    with pytest.raises(ValueError, match=message):
        processor(images=[[picture] for picture in pictures], text=words)


def test_one_image_that_is_not_loaded_may_stand_at_several_places(processor, tmp_path):
    tiny_image(0, 640, 480).save(tmp_path / "a.png")
    loaded = Image.open(tmp_path / "a.png")
    loaded.load()
    texts, threads = ["a", "b", "c", "d"], torch.get_num_threads()
    expected = processor(images=[loaded] * 4, text=texts, return_tensors="pt")
    try:
        torch.set_num_threads(4)
        for _ in range(5):
            lazy = Image.open(tmp_path / "a.png")
            found = processor(images=[lazy] * 4, text=texts, return_tensors="pt")
            assert torch.equal(found["pixel_values"], expected["pixel_values"])
    finally:
        torch.set_num_threads(threads)


def test_the_choice_of_a_backend_is_that_of_other_image_processors(model_folder):
    for name in ("pil", "torchvision"):
        assert AutoProcessor.from_pretrained(model_folder, trust_remote_code=True, backend=name).image_processor.size


def test_an_array_of_images_must_match_the_texts_too(processor):
    with pytest.raises(ValueError, match="2 images and 3 texts"):
        processor(images=torch.zeros(2, 3, 8, 9, dtype=torch.uint8), text=["a", "b", "c"], return_tensors="pt")


def test_two_images_for_one_prompt_are_refused(processor):
    pair = [tiny_image(0), tiny_image(1)]
    with pytest.raises(ValueError, match=r"Prompt 0 has 2 images, but this model takes 1 \(max_images\)"):
        processor(images=[pair], text="a")
    with pytest.raises(ValueError, match=r"Prompt 1 has 2 images"):
        processor(images=[[tiny_image()], pair], text=["a", "b"])
    together, apart = [user(*pair, "a")], [user(pair[0], "a"), assistant("b"), user(pair[1], "c")]
    for conversation in (together, apart):
        with pytest.raises(ValueError, match=r"Prompt 0 has 2 images"):
            processor.apply_chat_template(conversation, tokenize=True, return_dict=True)


def test_a_batch_of_which_only_some_prompts_have_an_image_says_which(processor):
    conversations = [[user(tiny_image(), "a")], [user("b")]]
    inputs = processor.apply_chat_template(conversations, **INPUTS)
    assert inputs["image_grids"].tolist() == [[[2, 2]], [[0, 0]]]
    assert len(inputs["pixel_values"]) == 2 and not inputs["pixel_values"][1].any()


SEVERAL = [user(tiny_image(0), "a", tiny_image(1)), assistant("b"), user("c")]


def test_several_images_have_their_numbers_in_the_prompt_and_one_has_none():
    processor = tiny_processor()
    processor.image_processor.max_images = 3
    text = processor.apply_chat_template(SEVERAL, add_generation_prompt=True)
    assert text == f"{SYSTEM}\n\nInstruction: [image 1] a[image 2] \nOutput: b{END}\n\nInstruction: c\nOutput:"
    assert "[image" not in processor.apply_chat_template(SEVERAL[1:] and [user(tiny_image(), "a")])
    with pytest.raises(ValueError, match=r"speak of 2 images, but 1 are given for it"):
        processor(images=tiny_image(), text=text)
    inputs = processor.apply_chat_template(SEVERAL, **INPUTS)
    expected = processor(images=[[tiny_image(0), tiny_image(1)]], text=text, return_tensors="pt")
    assert inputs.keys() == expected.keys() == {"input_ids", "attention_mask", "pixel_values", "image_grids"}
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert inputs["image_grids"].tolist() == [[[2, 2], [2, 2]]]


def test_lists_of_lists_and_none_are_the_images_of_each_text():
    processor = tiny_processor()
    processor.image_processor.max_images = 2
    one, two = tiny_image(0), tiny_image(1)
    inputs = processor(images=[[one, two], None, two, []], text=["a", "b", "c", "d"], return_tensors="pt")
    assert inputs["image_grids"].tolist() == [[[2, 2]] * 2, [[0, 0]] * 2, [[2, 2], [0, 0]], [[0, 0]] * 2]
    assert processor(images=[None, None], text=["a", "b"]).keys() == {"input_ids", "attention_mask"}
    processor.image_processor.max_images = 1
    for given in ({"max_images": 2}, {"images_kwargs": {"max_images": 2}}):  # for this call alone
        again = processor(images=[[one, two], None, two, []], text=["a", "b", "c", "d"], return_tensors="pt", **given)
        assert all(torch.equal(again[name], inputs[name]) for name in inputs)


def test_empty_texts_are_refused_by_their_place(processor):
    with pytest.raises(ValueError, match=r"Text 0 is empty; give"):
        processor(images=tiny_image(), text="")
    with pytest.raises(ValueError, match=r"Text 1 is empty; give"):
        processor(text=["a", ""])


def test_no_texts_at_all_are_refused(processor):
    for images in (None, tiny_image(), []):
        with pytest.raises(ValueError, match="empty"):
            processor(images=images, text=[])


@pytest.mark.parametrize("text", [5, [["a"]], [b"a"], ["a", None]], ids=str)
def test_texts_that_are_no_strings_are_refused_by_type(processor, text):
    with pytest.raises((TypeError, ValueError), match=r"must be a string or a list of strings.*(int|list|bytes|None)"):
        processor(text=text)


def test_a_text_that_cannot_be_encoded_is_refused_by_its_place(processor):
    with pytest.raises(ValueError, match=r"Text 1 .*'b\\ud83d'"):
        processor(text=["a", "b\ud83d"])


def test_nothing_given_is_refused(processor):
    with pytest.raises(ValueError, match="at least one input"):
        processor()
    with pytest.raises(ValueError, match=r"`images` is an empty list"):
        processor(images=[])


def test_a_broken_image_is_refused_by_name(processor, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png"):
        processor(images=path, text="a")
    with pytest.raises(ValueError, match=r"broken\.png"):
        processor.apply_chat_template([user(path, "a")], tokenize=True, return_dict=True)


# --- An image that was asked for and would not arrive ---

QUESTION = {"type": "text", "text": "What is it?"}
INPUTS = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
UNREAD = {
    "the image is None": [{"type": "image", "image": None}, QUESTION],
    "the path is None": [{"type": "image", "path": None}, QUESTION],
    "all sources are None": [{"type": "image", "image": None, "url": None, "text": None}, QUESTION],
    "OpenAI's part without a URL": [{"type": "image_url", "image_url": None}, QUESTION],
    "OpenAI's part with an empty dict": [{"type": "image_url", "image_url": {}}, QUESTION],
    "OpenAI's part with the wrong key": [{"type": "image_url", "url": "x.png"}, QUESTION],
    "an image under the wrong key": [{"type": "image", "image_url": "x.png"}, QUESTION],
    "two sources": [{"type": "image", "path": "x.png", "url": "y.png"}, QUESTION],
    "input_image": [{"type": "input_image", "image_url": "x.png"}, QUESTION],
    "input_text": [{"type": "image", "image": tiny_image()}, {"type": "input_text", "text": "What?"}],
    "parts without a type": [{"image": tiny_image()}, {"text": "What is it?"}],
    "an image beside a text": [{"type": "text", "text": "What is it?", "image": tiny_image()}],
    "an empty list for an image": [{"type": "image", "image": []}],
    "two images in one part": [{"type": "image", "image": [tiny_image(), tiny_image()]}],
    "a text that is None": [{"type": "image", "image": tiny_image()}, {"type": "text", "text": None}],
    "a text that is a number": [{"type": "text", "text": 5}],
    "a text in upper case": [{"type": "TEXT", "text": "What?"}],
    "video": [{"type": "video", "video": "x.mp4"}, QUESTION],
    "audio": [{"type": "audio", "audio": "x.wav"}, QUESTION],
    "a bare text in the list": ["What is it?"],
    "a bare image in the list": [tiny_image(), QUESTION],
    "one part": QUESTION,
    "None": None,
    "a number": 5,
    "no parts": [],
    "no text": "",
}


@pytest.mark.parametrize("tokenize", [True, False])
@pytest.mark.parametrize("content", UNREAD.values(), ids=UNREAD)
def test_what_pheye_does_not_read_in_a_message_is_refused(processor, content, tokenize):
    options = INPUTS if tokenize else {}
    with pytest.raises(
        ValueError, match=r'message 0.*\{"type": "text", "text": \.\.\.\}, or \{"type": "image"|Message 0'
    ):
        processor.apply_chat_template([{"role": "user", "content": content}], **options)


@pytest.mark.parametrize("key", ["images", "image", "videos", "audio"])
def test_what_stands_beside_the_content_of_a_message_is_refused(processor, key):
    with pytest.raises(ValueError, match=f"'{key}' beside its content"):
        processor.apply_chat_template([{"role": "user", "content": "What?", key: [tiny_image()]}])
    assert processor.apply_chat_template([{"role": "user", "content": "What?", key: []}])


@pytest.mark.parametrize(
    "part",
    [{"type": "image"}, {"type": "image", "text": None, "index": 0}, {"type": "image", "src": "x.png"}],
    ids=str,
)
def test_an_image_part_without_an_image_is_a_placeholder_that_needs_one(processor, part):
    conversation = [{"role": "user", "content": [part, QUESTION]}]
    with pytest.raises(ValueError, match="speak of an image, but do not have it"):
        processor.apply_chat_template(conversation, **INPUTS)
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    with pytest.raises(ValueError, match=r"Text 0 was made of messages that speak of an image.*give `images`"):
        processor(text=text)
    with pytest.raises(ValueError, match=r"Text 1 was made of messages that speak of an image"):
        processor(text=["a", text])
    assert set(processor(images=tiny_image(), text=text)) == {"input_ids", "attention_mask", "pixel_values"}
    assert pickle.loads(pickle.dumps(text)) == text and type(pickle.loads(pickle.dumps(text))) is str


def test_an_image_in_the_messages_does_not_come_with_the_text_alone(processor):
    conversations = [[user("a")], [user(tiny_image(), "b")]]
    for conversation in (conversations[1], conversations):
        with pytest.raises(ValueError, match="speak of an image, but no image is given"):
            processor(text=processor.apply_chat_template(conversation))
        with pytest.raises(ValueError, match="return_dict=True"):
            processor.apply_chat_template(conversation, tokenize=True)
    assert processor.apply_chat_template(conversations[0], tokenize=True)


def test_text_made_by_another_copy_of_the_code_still_needs_its_image(processor, model_folder):
    trusted = AutoProcessor.from_pretrained(model_folder, trust_remote_code=True)
    assert type(trusted) is not type(processor)
    for maker, user_of in ((trusted, processor), (processor, trusted)):
        with pytest.raises(ValueError, match="speak of an image, but no image is given"):
            user_of(text=maker.apply_chat_template([user(tiny_image(), "a")]))


def test_a_tokenizer_does_not_lose_an_image(processor):
    options = {"chat_template": CHAT_TEMPLATE, "tokenize": False, "add_generation_prompt": True}
    apply = processor.tokenizer.apply_chat_template
    assert apply([user("a")], **options) == processor.apply_chat_template([user("a")], add_generation_prompt=True)
    with pytest.raises(TemplateError, match="A tokenizer would lose the message's image"):
        apply([user(tiny_image(), "a")], **options)
    for content in UNREAD.values():
        if content not in ([], ""):
            with pytest.raises(TemplateError):
                apply([{"role": "user", "content": content}], **options)


def test_images_may_come_beside_messages_with_placeholders_only(processor):
    placeholder = [{"role": "user", "content": [{"type": "image"}, QUESTION]}]
    for conversation, options in (
        ([user(tiny_image(), "a")], INPUTS),
        (placeholder, {}),
    ):
        with pytest.raises(ValueError, match="`images` goes with tokenize=True"):
            processor.apply_chat_template(conversation, processor_kwargs={"images": tiny_image()}, **options)


SOURCES = {
    "image": lambda path: {"type": "image", "image": tiny_image()},
    "path": lambda path: {"type": "image", "path": path},
    "path as text": lambda path: {"type": "image", "path": str(path)},
    "base64": lambda path: {"type": "image", "base64": base64.b64encode(path.read_bytes()).decode()},
    "OpenAI": lambda path: {"type": "image_url", "image_url": {"url": data_url(path)}},
    "OpenAI, bare": lambda path: {"type": "image_url", "image_url": data_url(path)},
    "columns that are None": lambda path: {
        "type": "image",
        "image": None,
        "path": str(path),
        "url": None,
        "text": None,
    },
}


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


@pytest.mark.parametrize("container", [list, tuple])
@pytest.mark.parametrize("source", SOURCES)
def test_every_spelling_that_is_known_brings_the_image(processor, tmp_path, source, container):
    tiny_image().save(tmp_path / "a.png")
    parts = container([SOURCES[source](tmp_path / "a.png"), {**QUESTION, "image": None}])
    conversation = [{"role": "user", "content": parts}]
    expected = processor(
        images=tiny_image(), text=f"{SYSTEM}\n\nInstruction: What is it?\nOutput:", return_tensors="pt"
    )
    for given in (conversation, tuple(conversation), [conversation], iter(conversation)):
        inputs = processor.apply_chat_template(given, **INPUTS)
        assert set(inputs) == set(expected)
        assert all(torch.equal(inputs[name], expected[name]) for name in inputs)
    assert conversation == [{"role": "user", "content": parts}]  # as the user gave it


def test_messages_may_be_objects(processor):
    @dataclasses.dataclass
    class Message:
        role: str
        content: list

    class Answer:  # as OpenAI's client gives it
        def model_dump(self):
            return {"role": "assistant", "content": "So.", "audio": None, "tool_calls": None}

    objects = [
        Message("user", [{"type": "image", "image": tiny_image()}, QUESTION]),
        Answer(),
        Message("user", "Why?"),
    ]
    inputs = processor.apply_chat_template(objects, **INPUTS)
    assert "pixel_values" in inputs
    assert text_of(inputs["input_ids"][0], processor).endswith(f"Output: So.{END}\n\nInstruction: Why?\nOutput:")


@pytest.mark.parametrize(
    "conversation", [None, 5, "text", b"x", {}, [], [[]], [None], [[None]], [[user("a")], []], ["x"]]
)
def test_what_is_no_conversation_is_refused(processor, conversation):
    for options in (INPUTS, {}):
        with pytest.raises(ValueError, match=r"A conversation is a list|Message 0 must be a dict"):
            processor.apply_chat_template(conversation, **options)


def test_arguments_that_would_be_left_out_are_refused_by_name(processor):
    image = tiny_image()
    for name, value in {"prompt": "What?", "image": image, "question": "?", "videos": [image], "audio": [0.0]}.items():
        with pytest.raises(TypeError, match=rf"^{name} is no argument of PheyeProcessor.*`images`, `text`"):
            processor(images=image, text="a", **{name: value})
    with pytest.raises(TypeError, match=r"^prompt is no argument of PheyeProcessor"):
        processor(images=image, text="a", text_kwargs={"prompt": "What?"})
    known = {"videos": None, "text_kwargs": {"padding": False}, "images_kwargs": {"do_rescale": True}, "max_length": 9}
    assert processor(images=image, text="a", **known, truncation=True)


def image_texts(path: Path) -> list[str]:
    data = base64.b64encode(path.read_bytes()).decode()
    return [str(path), "missing.jpg", "a/b/MISSING.HEIC", "https://host/x", "HTTP://host/y", data_url(path), data]


def test_text_that_is_the_place_of_an_image_is_refused_without_one(processor, tmp_path):
    for name in ("a.png", "my sign.png", "no suffix"):
        tiny_image().save(tmp_path / name, "PNG")
        for text in image_texts(tmp_path / name):
            with pytest.raises(ValueError, match=r"Text 1 is the place of an image, not a question.*`images`"):
                processor(text=["a", text])
            assert processor(images=tiny_image(), text=text)
    for text in ("What is in photo.jpg", "See https://host/x", "ACGT" * 40, "a" * 5000, str(tmp_path)):
        assert processor(text=text)


# --- Saving ---


def test_the_shipped_template_is_the_processors():
    assert (ROOT / "checkpoints" / "pheye-nano" / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_loading_says_nothing(caplog):
    with caplog.at_level("WARNING", logger="transformers"):
        logging.getLogger("transformers").addHandler(caplog.handler)
        PheyeProcessor.from_pretrained(ROOT / "checkpoints" / "pheye-nano")
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize("own_template", [None, "{{ messages[0]['content'][0]['text'] }}!"])
def test_save_and_reload_give_the_same_processor(tmp_path, own_template):
    image_processor = PheyeImageProcessor(tiles_per_side=4, size={"height": 24, "width": 24}, image_mean=[0.1] * 3)
    processor = PheyeProcessor(image_processor, tiny_tokenizer(), chat_template=own_template)
    processor.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"chat_template.jinja", "tokenizer.json", "processing_pheye.py", "image_processing_pheye.py"}
    assert (tmp_path / "chat_template.jinja").read_text() == (own_template or CHAT_TEMPLATE)

    conversation = [user("What?")]
    inputs = processor(images=tiny_image(), text=["abc", "a"], return_tensors="pt")
    for reloaded in (
        PheyeProcessor.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        assert type(reloaded).__name__ == "PheyeProcessor"
        assert reloaded.chat_template == processor.chat_template
        assert reloaded.image_processor.to_dict() == processor.image_processor.to_dict()
        assert reloaded.tokenizer.pad_token == END
        assert reloaded.apply_chat_template(conversation) == processor.apply_chat_template(conversation)
        again = reloaded(images=tiny_image(), text=["abc", "a"], return_tensors="pt")
        assert set(again) == set(inputs) and all(torch.equal(again[name], inputs[name]) for name in inputs)


def test_the_assistant_mask_of_one_conversation_is_that_of_a_batch_of_one(processor):
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    alone = processor.apply_chat_template(turns, **options)
    batch = processor.apply_chat_template([turns], **options)
    assert (
        alone["assistant_masks"] == batch["assistant_masks"] and sum(alone["assistant_masks"][0]) == len(" A cat.") + 1
    )
    assert alone["input_ids"] == batch["input_ids"]
