"""The attention of each word of an answer, against a plain forward pass."""

import gc

import numpy as np
import pytest
import torch

from pheye import blocks_pheye
from pheye.evaluation import word_attention
from pheye.evaluation.word_attention import (
    AttendedAnswer,
    answer_with_attention,
    attention_by_word,
    split_words,
    token_attention,
    view_shares,
)

from tiny import END, tiny_image, tiny_model, tiny_tokenizer


def test_share_per_view_is_the_sum_over_its_tokens():
    weights = np.random.default_rng(0).random((2, 3, 5 * 7))
    shares = view_shares(weights, 7)
    for block in range(2):
        for token in range(3):
            for view in range(5):
                expected = sum(weights[block, token, view * 7 + place] for place in range(7))
                assert shares[block, token, view] == pytest.approx(expected)


# --- Words ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" a cat", [("a", [0, 1]), ("cat", [2, 3, 4, 5])]),
        ("no\n\n 7 ", [("no", [0, 1]), ("7", [2, 3, 4, 5])]),
        (" é ñu", [("é", [0, 1, 2]), ("ñu", [3, 4, 5, 6])]),  # two bytes, and so two tokens, for é and ñ
        (f"yes{END}", [("yes", [0, 1, 2])]),
        (f" {END}", []),
        (END, []),
    ],
)
def test_tokens_are_joined_to_words(text, words):
    tokenizer = tiny_tokenizer()
    assert split_words(tokenizer, tokenizer(text)["input_ids"]) == words


def test_bytes_that_are_no_character_are_kept_in_their_word():
    tokenizer = tiny_tokenizer()
    broken = tokenizer("é")["input_ids"][:1]
    ids = [*tokenizer("ab")["input_ids"], *broken, *tokenizer(" c")["input_ids"]]
    assert split_words(tokenizer, ids) == [("ab\ufffd", [0, 1, 2]), ("c", [3, 4])]


def test_a_token_of_two_words_is_named_after_both():
    class Tokenizer:
        all_special_ids = []

        def decode(self, ids, **kwargs):
            return "".join([" New York", " is", " big"][index] for index in ids)

    assert split_words(Tokenizer(), [0, 1, 2]) == [("New York", [0]), ("is", [1]), ("big", [2])]


def test_attention_of_a_word_is_the_mean_over_its_tokens():
    weights = np.random.default_rng(0).random((6, 2, 5))
    found = AttendedAnswer(
        "one two", [("one", [0, 1, 2]), ("two", [3, 4])], iter(weights)
    )  # the last token ends the text
    (one, count, first), (two, _, second) = attention_by_word(found)
    assert (one, count, two) == ("one", 3, "two")
    assert first == pytest.approx(weights[:3].mean(0))
    assert second == pytest.approx(weights[3:5].mean(0))


# --- The model's attention ---


@pytest.mark.parametrize("chunk", [3, 16])
def test_attention_is_that_of_the_positions_that_predict_the_answer(monkeypatch, model, processor, chunk):
    monkeypatch.setattr(word_attention, "TOKENS_PER_PASS", chunk)
    prompt = processor.apply_chat_template([{"role": "user", "content": "What?"}], add_generation_prompt=True)
    inputs = processor(images=tiny_image(), text=prompt, return_tensors="pt")
    ids = torch.randint(1, 257, (1, 10), generator=torch.Generator().manual_seed(1))
    image = model.get_image_features(inputs["pixel_values"]).last_hidden_state
    found = np.stack(
        list(token_attention(model, inputs["input_ids"], {"image_hidden_states": image}, ids))
    )  # (T, L, N)

    whole = torch.cat([inputs["input_ids"], ids], dim=1)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            outputs = model(whole, pixel_values=inputs["pixel_values"], output_attentions=True, use_cache=False)
    finally:
        model.set_attn_implementation("sdpa")
    first = inputs["input_ids"].shape[1] - 1
    expected = [block[0, :, first:-1].mean(0).numpy() for block in outputs.cross_attentions]  # (T, N) each
    assert found == pytest.approx(np.stack(expected, axis=1), abs=1e-6)
    assert found.std() > 1e-4  # not merely the same everywhere
    assert found.sum(-1) == pytest.approx(1, abs=1e-5)


def test_the_answer_is_that_of_generate(model, processor):
    prompt = processor.apply_chat_template([{"role": "user", "content": "What?"}], add_generation_prompt=True)
    inputs = processor(images=tiny_image(), text=prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    expected = processor.post_process_image_text_to_text(ids)[0].strip()
    found = answer_with_attention(model, processor, tiny_image(), "What?", 8)
    assert found.text == expected
    assert " ".join(word for word, _ in found.words) == " ".join(expected.split())


def test_nothing_on_the_model_changes_meanwhile(monkeypatch, model):
    def state() -> list:
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        configs = (model.config, model.config.text_config, model.config.vision_config)
        return [hooks, *(config._attn_implementation for config in configs)]

    original, seen = blocks_pheye.eager_attention, []

    def spy(*args, **kwargs):
        seen.append(state())
        return original(*args, **kwargs)

    model.set_attn_implementation("sdpa")
    before = state()
    monkeypatch.setattr(blocks_pheye, "eager_attention", spy)
    ids = torch.randint(1, 257, (1, 5), generator=torch.Generator().manual_seed(1))
    image = torch.randn(1, model.config.tokens_per_image, 32)
    for _ in token_attention(model, torch.tensor([[5, 6, 7]]), {"image_hidden_states": image}, ids):
        assert state() == before
    assert seen == [before] * len(model.config.cross_attention_layers)
    assert "eager" not in before


def test_no_weights_per_head_outlive_their_pass_and_no_pass_is_longer_than_it_may_be(monkeypatch):
    model = tiny_model(cross_attention_interval=1)  # more blocks than heads, so that sizes tell what a tensor is
    original, seen = blocks_pheye.eager_attention, []
    monkeypatch.setattr(word_attention, "TOKENS_PER_PASS", 4)

    def spy(module, query, *args, **kwargs):
        heads, length = query.shape[1:3]
        shape = (1, heads, length, model.config.tokens_per_image)
        seen.append((length, sum(type(x) is torch.Tensor and x.shape == shape for x in gc.get_objects())))
        return original(module, query, *args, **kwargs)

    ids = torch.randint(1, 257, (1, 11), generator=torch.Generator().manual_seed(1))
    image = torch.randn(1, model.config.tokens_per_image, 32)
    monkeypatch.setattr(blocks_pheye, "eager_attention", spy)
    for _ in token_attention(model, torch.tensor([[5, 6, 7]]), {"image_hidden_states": image}, ids):
        pass
    assert [length for length, _ in seen] == [4] * 8 + [3] * 4
    kept = [count for _, count in seen]
    assert kept[:4] == kept[4:8] == kept[8:]
    assert kept[0] == 0 < kept[1]
