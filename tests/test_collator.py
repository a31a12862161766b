"""The collator: prompts as generation sees them, answers labelled, broken images skipped."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pheye import PheyeImageProcessor, PheyeProcessor
from pheye.training.collator import IGNORED, PheyeCollator, encode

from image_files import black_png, encoded
from tiny import END, tiny_image, tiny_model, tiny_processor

GOLDEN = Path(__file__).parent / "fixtures" / "golden"
ANSWERS = ["Yes", "Two words.", "line one\nline two", "  indented", ": colon", "é, ü", "...", "\nOutput: x", "1 2"]


def conversation(*texts: str, system: str | None = None) -> list[dict]:
    roles = ("user", "assistant")
    turns = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def sample(*texts: str, image=None, name: str = "s1") -> dict:
    image = tiny_image() if image is None else image
    return {"id": name, "source": "set", "images": [image], "messages": conversation(*(texts or ("Why?", "So.")))}


def joining_tokenizer() -> PreTrainedTokenizerFast:
    """One that joins the colon at the end of a prompt with the space that begins an answer, and end tokens with what
    follows: the text in one go has other tokens than the prompt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([END, *alphabet, ":Ġ", ":ĠY"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(":", "Ġ"), (":Ġ", "Y")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END)


def processor_with(tokenizer) -> PheyeProcessor:
    return PheyeProcessor(tiny_processor().image_processor, tokenizer)


PROCESSORS = {
    "bytes": tiny_processor,
    "published": lambda: processor_with(AutoTokenizer.from_pretrained(GOLDEN / "x4-672" / "decoder")),
    "joining": lambda: processor_with(joining_tokenizer()),
}


# --- Tokens and labels ---


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_prompt_has_the_tokens_that_generation_is_given_and_the_answer_follows(name):
    processor = PROCESSORS[name]()
    for answer in ANSWERS:
        messages = conversation("What is it?", answer)
        prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
        prompt_ids = processor(text=prompt, return_tensors="pt")["input_ids"][0].tolist()
        ids, labels = encode(processor, messages)
        assert ids[: len(prompt_ids)] == prompt_ids
        assert labels == [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :]
        answer_ids = ids[len(prompt_ids) :]
        assert processor.tokenizer.decode(answer_ids, clean_up_tokenization_spaces=False) == f" {answer.strip()}{END}"
        assert answer_ids[-1] == processor.tokenizer.eos_token_id


def test_a_tokenizer_that_joins_prompt_and_answer_would_have_other_tokens_in_one_go():
    """What the test above guards against does happen."""
    processor = PROCESSORS["joining"]()
    messages = conversation("What is it?", "Yes")
    whole = processor.tokenizer(processor.apply_chat_template(messages))["input_ids"]
    assert whole != encode(processor, messages)[0]


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_every_answer_of_several_turns_is_labelled_with_its_end_and_nothing_else(name, system):
    processor = PROCESSORS[name]()
    answers = ["Yes", "Output: 3", "Yes"]
    turns = ["One?", answers[0], "Two\nlines?", answers[1], "Three?", answers[2]]
    messages = conversation(*turns, system=system)
    ids, labels = encode(processor, messages)
    tokenizer = processor.tokenizer
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert text == processor.apply_chat_template(messages)
    learnt = [label for label in labels if label != IGNORED]
    assert tokenizer.decode(learnt, clean_up_tokenization_spaces=False) == "".join(f" {a}{END}" for a in answers)
    runs = np.diff([label != IGNORED for label in [IGNORED, *labels]]).sum()
    assert runs == 2 * len(answers) - 1  # the last one goes up to the end
    assert all(label in (IGNORED, token) for label, token in zip(labels, ids, strict=True))


@pytest.mark.parametrize("name", ["bytes", "published"])
def test_labels_are_those_of_the_processors_own_mask(name):
    processor = PROCESSORS[name]()
    for answer in ["Yes", "Two words.", ": colon", "é, ü"]:
        messages = conversation("What is it?", answer, "And?", answer)
        inputs = processor.apply_chat_template(
            [messages], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, labels = encode(processor, messages)
        assert inputs["input_ids"][0] == ids
        assert [label != IGNORED for label in labels] == [bool(one) for one in inputs["assistant_masks"][0]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_rows_padded_on_the_right_whatever_the_processors_side(side):
    processor = tiny_processor()
    processor.tokenizer.padding_side = side
    samples = [
        sample("Why?", "So."),
        sample("Is it a longer question?", "It is.", "Really?", "Yes."),
        sample("?", "!"),
    ]
    batch = PheyeCollator(processor)(samples)
    assert batch["seen"] == 3 and batch["skipped"] == []
    length = max(len(encode(processor, one["messages"])[0]) for one in samples)
    for row, one in enumerate(samples):
        ids, labels = encode(processor, one["messages"])
        place = slice(0, len(ids))
        assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape == (3, length)
        assert batch["input_ids"][row, place].tolist() == ids
        assert batch["labels"][row, place].tolist() == labels
        assert batch["attention_mask"][row, place].sum() == batch["attention_mask"][row].sum() == len(ids)
        assert (batch["labels"][row] != IGNORED).sum() == sum(label != IGNORED for label in labels)
    expected = processor.image_processor([one["images"] for one in samples], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)


def test_the_loss_of_a_batch_is_that_of_its_samples_one_by_one(model, processor):
    samples = [sample("Why?", "So."), sample("Is it a longer question?", "It is.", image=tiny_image(1))]
    collator = PheyeCollator(processor)

    def loss_of(part) -> torch.Tensor:
        batch = collator(part)
        batch.pop("seen"), batch.pop("skipped")
        with torch.no_grad():
            return model(**batch, num_items_in_batch=1).loss

    one_by_one = sum(loss_of([one]) for one in samples)
    torch.testing.assert_close(loss_of(samples), one_by_one, rtol=1e-5, atol=0)


def test_what_is_too_long_is_cut_at_the_end():
    processor = tiny_processor()
    ids, labels = encode(processor, sample("Why?", "Because.")["messages"])
    batch = PheyeCollator(processor, max_length=len(ids) - 3)([sample("Why?", "Because.")])
    assert batch["input_ids"][0].tolist() == ids[:-3] and batch["labels"][0].tolist() == labels[:-3]
    assert PheyeCollator(processor, max_length=len(ids))([sample("Why?", "Because.")])["input_ids"].shape[1] == len(
        ids
    )


def test_an_answer_that_is_cut_off_whole_is_refused_with_its_sample():
    processor = tiny_processor()
    labels = encode(processor, sample("Why?", "Because.")["messages"])[1]
    prompt = labels.count(IGNORED)
    PheyeCollator(processor, max_length=prompt + 1)([sample("Why?", "Because.")])
    with pytest.raises(
        ValueError, match=rf"Sample 'long' of set is cut off whole.*all of the {prompt} tokens.*--max_le"
    ):
        PheyeCollator(processor, max_length=prompt)([sample("?", "!"), sample("Why?", "Because.", name="long")])


@pytest.mark.parametrize("texts", [("Why?",), ("Why?", ""), ("Why?", " \n"), ("Why?", "So.", "How?", "")])
def test_a_sample_without_an_answer_is_refused_by_its_name(texts):
    with pytest.raises(ValueError, match="Sample 'x7' of set has no answer, or an empty one"):
        PheyeCollator(tiny_processor())([sample(), sample(*texts, name="x7")])


# --- Images ---


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_images_may_be_paths_bytes_or_opened(tmp_path):
    opened = [tiny_image(seed) for seed in range(3)]
    opened[0].save(tmp_path / "a.png")
    given = [str(tmp_path / "a.png"), png(opened[1]), opened[2]]
    processor = tiny_processor()
    batch = PheyeCollator(processor)([sample(image=image) for image in given])
    expected = processor.image_processor(opened, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected) and batch["skipped"] == []


def test_every_image_input_is_in_the_batch_by_the_name_that_the_image_processor_gives_it(tmp_path):
    class WithSizes(PheyeImageProcessor):
        model_input_names = ["pixel_values", "sizes"]

        def __call__(self, images, **kwargs):
            inputs = super().__call__(images, **kwargs)
            inputs["sizes"] = torch.tensor([[0, 0] if isinstance(image, str) else image.size for [image] in images])
            return inputs

    processor = tiny_processor()
    processor.image_processor = WithSizes(**processor.image_processor.to_dict())
    wide, tall = tiny_image(0, 90, 70), tiny_image(1, 30, 60)
    batch = PheyeCollator(processor)([sample(image=wide), sample(image=tall)])
    assert batch["sizes"].tolist() == [[90, 70], [30, 60]] and len(batch["pixel_values"]) == 2
    one_by_one = PheyeCollator(processor)([sample(image=wide), sample(image=str(tmp_path / "no.png"))])
    assert one_by_one["sizes"].tolist() == [[90, 70], [8, 8]]  # of the black image in its place


def broken_images(folder) -> dict:
    whole = png(Image.effect_noise((90, 70), 80))
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    tiny_image().save(folder / "closed.png")
    with Image.open(folder / "closed.png") as closed:
        pass
    return {
        "missing": (str(folder / "missing.png"), "there is no such file"),
        "cut": (str(folder / "cut.png"), "could not be read as an image"),
        "text": (b"no image", "could not be read as an image"),
        "none": (None, "of the type NoneType, which is no image"),
        "number": (3, "int"),
        "empty": (np.zeros((0, 4, 3), np.uint8), "empty"),
        "bomb": (black_png(1, 2_000_000), "too tall"),
        "closed": (closed, "stays open"),
        "folder": (folder, "it is a folder"),
        "odd": (OddImage(), "of a plugin"),
    }


class OddImage(Image.Image):
    """As a plugin of Pillow may behave that meets what it has not expected."""

    size = (4, 4)

    def load(self):
        raise SyntaxError("of a plugin")


@pytest.mark.parametrize(
    "kind", ["missing", "cut", "text", "none", "number", "empty", "bomb", "closed", "folder", "odd"]
)
def test_a_sample_with_a_broken_image_keeps_its_row_without_labels_and_is_reported(tmp_path, kind):
    image, message = broken_images(tmp_path)[kind]
    good, other = sample(name="good"), sample("Is it?", "It is.", image=tiny_image(1), name="other")
    bad = {**sample("What now?", "Nothing.", name="bad"), "images": [image]}
    collator = PheyeCollator(tiny_processor())
    batch, without = collator([good, bad, other]), collator([good, other])
    assert batch["seen"] == 3
    [report] = batch["skipped"]
    assert report["id"] == "bad" and report["source"] == "set" and message in report["error"]
    assert (batch["labels"][1] == IGNORED).all()
    assert torch.equal(batch["pixel_values"][[0, 2]], without["pixel_values"])
    black = collator([sample(image=Image.new("RGB", (5, 5)))])["pixel_values"]
    assert torch.equal(batch["pixel_values"][1:2], black)
    for row, one in ((0, good), (2, other)):
        expected = encode(collator.processor, one["messages"])[1]
        assert batch["labels"][row].tolist()[: len(expected)] == expected


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_broken_metadata_skip_no_sample(format):
    options = {"lossless": True} if format == "WEBP" else {"dpi": (72, 72)}
    plain, broken = (encoded(tiny_image(), format, **options, **exif) for exif in ({}, {"exif": b"Exif\0\0rubbish"}))
    collator = PheyeCollator(tiny_processor())
    batch = collator([sample(image=broken)])
    assert not batch["skipped"]
    assert torch.equal(batch["pixel_values"], collator([sample(image=plain)])["pixel_values"])


def test_a_skipped_sample_adds_nothing_to_the_loss(tmp_path):
    """Nor to the gradient: the batch trains as if the sample were not there."""
    collator, gradients = PheyeCollator(tiny_processor()), []
    good, bad = sample("Why?", "So.", name="good"), sample("A question?", "Yes.", image=str(tmp_path / "missing.png"))
    for samples in ([good], [good, bad]):
        model = tiny_model()
        batch = collator(samples)
        batch.pop("seen"), batch.pop("skipped")
        loss = model(**batch).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.model.cross_attention_blocks.parameters())])
    for alone, together in zip(*gradients, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_a_batch_of_broken_images_only_has_no_labels(tmp_path):
    bad = sample(image=str(tmp_path / "missing.png"))
    batch = PheyeCollator(tiny_processor())([bad, {**bad, "images": [None]}])
    assert len(batch["skipped"]) == batch["seen"] == 2
    assert (batch["labels"] == IGNORED).all()
    assert batch["pixel_values"].shape == (2, 5, 3, 32, 32) and torch.isfinite(batch["pixel_values"]).all()
