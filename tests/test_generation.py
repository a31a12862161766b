"""generate: every way of decoding gives what a plain loop gives, and the image is encoded and stored once."""

import copy
import inspect
import itertools
import threading
import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    GPT2Config,
    OPTConfig,
    StaticCache,
    TextIteratorStreamer,
)

from pheye import PheyeForConditionalGeneration
from pheye.generation_pheye import PheyeGenerationMixin
from pheye.layers_pheye import CACHE

from tiny import randomize, tiny_image, tiny_model, tiny_processor, tiny_text_config

NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}


def ask(*texts: str, images=None, **kwargs):
    images = [tiny_image(seed) for seed in range(len(texts))] if images is None else images
    return tiny_processor()(images=images, text=list(texts), return_tensors="pt", **kwargs)


@pytest.fixture
def question():
    return ask("What is written on the sign?")


@pytest.fixture
def questions():
    return ask("What is written on the sign?", "Why?", "Is there a cat in this picture, and if so, where?")


def slow_greedy(model, batch, steps=NEW) -> torch.Tensor:
    """One row at a time, the whole text and the image again at every step."""
    rows = []
    for row in range(len(batch["input_ids"])):
        input_ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        for _ in range(steps):
            logits = model(input_ids, batch["pixel_values"][row : row + 1], use_cache=False).logits
            input_ids = torch.cat([input_ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        rows.append(input_ids[0, -steps:])
    return torch.stack(rows)


def count_calls(model) -> dict[str, list]:
    """What the vision tower and the key and value projections were given, call by call, as (images, tokens)."""
    calls = {"vision": [], "keys": [], "values": []}
    model.model.vision_tower.register_forward_hook(lambda m, args, out: calls["vision"].append(args[0].shape[0]))
    for block in model.model.cross_attention_blocks:
        block.to_k.register_forward_hook(lambda m, args, out: calls["keys"].append(args[0].shape[0]))
        block.to_v.register_forward_hook(lambda m, args, out: calls["values"].append(args[0].shape[0]))
    return calls


# --- Ways of decoding ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 5},
        {"prefill_chunk_size": 5, "cache_implementation": "static"},
        {"logits_to_keep": 3},
    ],
    ids=str,
)
def test_greedy_of_unequal_prompts_is_the_plain_loop_of_each_alone(model, questions, options):
    generated = model.generate(**questions, **GREEDY, **options)
    assert torch.equal(generated[:, -NEW:], slow_greedy(model, questions))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_beams_equal_those_of_repeated_images(model, questions, options, monkeypatch):
    arguments = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    beams = model.generate(**questions, **arguments, return_dict_in_generate=True, **options)
    # The library's own expansion: one row of pixels per beam, encoded anew.
    monkeypatch.delattr(PheyeGenerationMixin, "_expand_inputs_for_generation")
    expected = model.generate(**questions, **arguments, return_dict_in_generate=True, use_cache=False)
    assert torch.equal(beams.sequences, expected.sequences)
    assert torch.allclose(beams.sequences_scores, expected.sequences_scores, atol=1e-4)


def test_sampling_draws_the_same_with_and_without_a_cache(model, questions):
    drawn = []
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(1)
        drawn.append(
            model.generate(
                **questions, max_new_tokens=NEW, do_sample=True, num_return_sequences=3, eos_token_id=None, **options
            )
        )
    assert drawn[0].shape[0] == 9
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert len({tuple(row.tolist()) for row in drawn[0]}) > 3  # it does sample


def test_assisted_decoding_by_pheye_by_a_text_model_and_by_prompt_lookup(model, question):
    expected = model.generate(**question, **GREEDY)
    text_assistant = randomize(AutoModelForCausalLM.from_config(tiny_text_config())).eval()
    for options in (
        {"assistant_model": tiny_model(seed=3)},
        {"assistant_model": text_assistant},
        {"prompt_lookup_num_tokens": 2},
    ):
        assert torch.equal(model.generate(**question, **GREEDY, **options), expected)


def test_an_assistant_sees_the_image_once(model, question):
    assistant, seen = copy.deepcopy(model), []
    assistant.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    passes = []
    asked = copy.deepcopy(model)
    asked.model.language_model.register_forward_pre_hook(lambda module, args: passes.append(1))
    expected = model.generate(**question, **GREEDY)
    assert torch.equal(asked.generate(**question, **GREEDY, assistant_model=assistant), expected)
    assert len(seen) == 1
    assert len(passes) <= NEW / 2  # its guesses are right, for it is the same model


def test_streamer_gives_the_answer_piece_by_piece(model, question):
    tokenizer = tiny_processor().tokenizer
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = threading.Thread(target=model.generate, kwargs={**question, **GREEDY, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == tokenizer.decode(model.generate(**question, **GREEDY)[0, -NEW:])


def test_stop_strings_end_the_answer(model, question):
    tokenizer = tiny_processor().tokenizer
    answer = model.generate(**question, **GREEDY)[0, -NEW:]
    first = 2
    stop = tokenizer.decode(answer[first])
    assert stop.isascii()
    assert stop not in tokenizer.decode(answer[:first])
    stopped = model.generate(**question, **GREEDY, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(stopped[0, question["input_ids"].shape[1] :], answer[: first + 1])


def test_text_without_an_image_is_the_bare_language_model(model, questions):
    questions.pop("pixel_values")
    bare = model.model.language_model
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        assert torch.equal(
            model.generate(**questions, **GREEDY, **options), bare.generate(**questions, **GREEDY, **options)
        )


def test_no_image_of_an_earlier_call_leaks_into_text_without_one(model, question):
    ids = {name: question[name] for name in ("input_ids", "attention_mask")}
    for options in ({}, {"cache_implementation": "static"}):
        before = model.generate(**ids, **GREEDY, **options)
        model.generate(**question, **GREEDY, **options)
        assert torch.equal(model.generate(**ids, **GREEDY, **options), before)


# --- Caches ---


def caches(model) -> dict:
    config = model.config.text_config
    return {
        "bare dynamic": lambda: DynamicCache(),
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=96),
    }


@pytest.mark.parametrize("kind", ["bare dynamic", "dynamic", "static"])
def test_another_turn_on_a_returned_cache_does_not_encode_the_image_again(kind, question):
    model = tiny_model()
    calls = count_calls(model)
    first = model.generate(**question, **GREEDY, past_key_values=caches(model)[kind](), return_dict_in_generate=True)
    turn = torch.cat([first.sequences, torch.tensor([[70, 71, 72]])], dim=1)
    expected = model.generate(input_ids=turn, pixel_values=question["pixel_values"], **GREEDY)
    for counted in calls.values():
        counted.clear()
    continued = model.generate(input_ids=turn, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(continued, expected)
    assert calls == {"vision": [], "keys": [], "values": []}


def test_a_new_image_on_the_next_turn_replaces_the_old_one(model, question):
    first = model.generate(**question, **GREEDY, return_dict_in_generate=True)
    stored = first.past_key_values.layers[-1].keys.clone()
    turn = torch.cat([first.sequences, torch.tensor([[70, 71, 72]])], dim=1)
    other = ask("x", images=[tiny_image(5)])["pixel_values"]
    model.generate(input_ids=turn, pixel_values=other, past_key_values=first.past_key_values, max_new_tokens=1)
    fresh = model(torch.tensor([[70]]), other).past_key_values
    assert torch.equal(first.past_key_values.layers[-1].keys, fresh.layers[-1].keys)
    assert not torch.equal(first.past_key_values.layers[-1].keys, stored)


def test_step_by_step_on_a_cache_equals_the_whole(model, question):
    ids, pixel_values = question["input_ids"], question["pixel_values"]
    whole = model(ids, pixel_values, use_cache=False).logits
    for make in caches(model).values():
        cache = make()
        logits = [model(ids[:, :4], pixel_values, past_key_values=cache).logits]
        logits += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(4, ids.shape[1])]
        assert torch.allclose(torch.cat(logits, dim=1), whole, atol=1e-4)
    cache.reset()
    assert torch.allclose(model(ids, past_key_values=cache).logits, model(ids).logits, atol=1e-4)  # no image is left


def test_the_image_of_a_given_cache_is_seen_without_use_cache(model, question):
    ids = question["input_ids"]
    cache = model(ids[:, :4], question["pixel_values"]).past_key_values
    whole = model(ids[:, :5], question["pixel_values"], use_cache=False).logits[:, -1:]
    assert torch.allclose(model(ids[:, 4:5], past_key_values=cache, use_cache=False).logits, whole, atol=1e-4)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache_are_taken_on_every_release(model, question, name):
    ids, pixel_values = question["input_ids"], question["pixel_values"]
    for part in (model, model.model):
        cache = DynamicCache(config=model.config.text_config)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            part(ids[:, :4], pixel_values, **{name: cache})
            states = part(ids[:, 4:], **{name: cache})[0]
        assert torch.allclose(states, part(ids, pixel_values)[0][:, 4:], atol=1e-4)
        is_old_name = name == "past_key_values" and CACHE == "cache"
        assert any("`past_key_values` is deprecated" in str(warning.message) for warning in warned) == is_old_name
        with pytest.raises(ValueError, match="`past_key_values` and `cache`"):
            part(ids, cache=cache, past_key_values=cache)


def test_the_cache_comes_back_under_the_names_that_the_language_model_uses(model, question):
    bare = model.model.language_model(question["input_ids"], use_cache=True)
    outputs = model(**question)
    assert list(outputs.keys())[: len(bare)] == list(bare.keys())
    cache = DynamicCache(config=model.config.text_config)
    for name in ("cache", "past_key_values"):
        assert hasattr(outputs, name) == hasattr(bare, name)
        if hasattr(outputs, name):
            assert getattr(model(**question, cache=cache), name) is cache


def test_rows_of_a_cache_with_an_image_are_not_selected_silently(model, question):
    cache = model(**question).past_key_values
    with pytest.raises(NotImplementedError, match="share the image's row"):
        cache.batch_select_indices(torch.tensor([0]))
    text = model(question["input_ids"]).past_key_values
    text.batch_select_indices(torch.tensor([0]))
    assert text.get_seq_length() == question["input_ids"].shape[1]


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 3}], ids=str)
def test_an_image_behind_text_that_was_read_without_it_is_refused(model, question, options):
    """transformers' prefix caching: that text has other keys and values than it would have with the image."""
    ids, pixel_values = question["input_ids"], question["pixel_values"]
    for make in caches(model).values():
        prefix = make()
        model(ids[:, :4], cache=prefix)
        for call in (
            lambda cache: model(ids[:, 4:], pixel_values, cache=cache),
            lambda cache: model.model(ids[:, 4:], pixel_values, cache=cache, use_cache=False),
            lambda cache: model.generate(**question, **GREEDY, **options, past_key_values=cache),
        ):
            with pytest.raises(ValueError, match=r"4 tokens of text that were read without an image.*new cache"):
                call(copy.deepcopy(prefix))
        assert model(ids[:, 4:], cache=prefix).logits.isfinite().all()  # text alone may go on

    with_image = caches(model)["dynamic"]()
    model(ids[:, :4], pixel_values, cache=with_image)
    expected = model.generate(**question, **GREEDY)
    copied = copy.deepcopy(with_image)
    if options and Version(transformers.__version__) < Version("5.24"):
        return  # the library's own chunks go wrong behind a cached prefix, in any language model
    assert torch.equal(model.generate(**question, **GREEDY, **options, past_key_values=copied), expected)


# --- The last position ---

POSITIONS = 16
NO_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LEARNED = {
    "gpt2": GPT2Config(vocab_size=257, n_embd=128, n_layer=4, n_head=4, n_positions=POSITIONS, **NO_IDS),
    "opt": OPTConfig(
        vocab_size=257,
        hidden_size=128,
        word_embed_proj_dim=128,
        num_hidden_layers=4,
        ffn_dim=64,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        **NO_IDS,
    ),
    "phi": tiny_text_config(max_position_embeddings=POSITIONS),
}
LONG = {**GREEDY, "max_new_tokens": 30, "min_new_tokens": 30}


@pytest.fixture(scope="module", params=LEARNED)
def short_model(request):
    return tiny_model(text_config=LEARNED[request.param])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 2},
        {"prompt_lookup_num_tokens": 3},
        {"max_new_tokens": None, "min_new_tokens": None, "max_length": 40},
    ],
    ids=str,
)
def test_answers_end_at_the_last_position(short_model, options):
    options = {**LONG, **options}
    batches = [ask("abcd")] if "prompt_lookup_num_tokens" in options else [ask("abcd"), ask("abcd", "abcdefgh")]
    for batch in batches:
        assert short_model.generate(**batch, **options).shape[1] == POSITIONS
    text_alone = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert short_model.generate(**text_alone, **options).shape[1] == POSITIONS


def test_padding_takes_no_positions(short_model):
    batch = ask("abcd")
    expected = short_model.generate(**batch, **GREEDY)[:, 4:]
    for length in (POSITIONS, POSITIONS + 9):
        pad = {"input_ids": torch.zeros(1, length - 4, dtype=torch.long), "attention_mask": torch.zeros(1, length - 4)}
        padded = {name: torch.cat([value.to(batch[name].dtype), batch[name]], 1) for name, value in pad.items()}
        found = short_model.generate(**{**batch, **padded}, **GREEDY)[:, length:]
        assert torch.equal(found, expected)


def test_answers_to_embeddings_and_full_prompts_end_at_the_last_position(short_model):
    batch = ask("abcd")
    embeds = short_model.get_input_embeddings()(batch.pop("input_ids"))
    assert short_model.generate(inputs_embeds=embeds, **batch, **LONG).shape[1] == POSITIONS - 4
    assert short_model.generate(**ask("a" * POSITIONS), **LONG).shape[1] == POSITIONS + 1  # it needs no position
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        with pytest.raises(ValueError, match=f"17 tokens, but the language model has {POSITIONS} positions; shorten"):
            short_model.generate(**ask("a" * (POSITIONS + 1)), **LONG, **options)


def test_another_turn_ends_at_the_last_position(short_model):
    first = short_model.generate(**ask("abcd"), **GREEDY, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, torch.tensor([[70, 71]])], dim=1)  # 14 tokens, 11 of them in the cache
    for given in (turn, turn[:, -3:]):  # all of the text, or what the cache does not hold
        cache = copy.deepcopy(first.past_key_values)
        mask = torch.ones_like(turn)
        ids = short_model.generate(input_ids=given, attention_mask=mask, past_key_values=cache, **LONG)
        assert ids.shape[1] == given.shape[1] + 2
    too_long = torch.cat([turn, turn], dim=1)
    with pytest.raises(ValueError, match=f"28 tokens, but the language model has {POSITIONS} positions; shorten"):
        short_model.generate(input_ids=too_long, past_key_values=first.past_key_values, **LONG)


def test_an_assistant_with_fewer_positions_is_refused_before_it_fails():
    model = tiny_model(text_config=LEARNED["gpt2"])
    fewer = GPT2Config(**{**LEARNED["gpt2"].to_dict(), "n_positions": 10})
    with pytest.raises(ValueError, match="The assistant has 10 positions, but the text may get 16 tokens long"):
        model.generate(**ask("abcd"), **LONG, assistant_model=tiny_model(text_config=fewer))
    assert (
        model.generate(**ask("abcd"), **LONG, assistant_model=tiny_model(text_config=LEARNED["gpt2"])).shape[1] == 16
    )


def test_the_language_model_is_not_left_early(model, question):
    with pytest.raises(ValueError, match="assistant_early_exit must be None"):
        model.generate(**question, **GREEDY, assistant_early_exit=2)


# --- The image once ---


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, 1),
        ({"num_beams": 4}, 1),
        ({"do_sample": True, "num_return_sequences": 3}, 1),
        ({"cache_implementation": "static", "num_beams": 2}, 1),
        ({"prefill_chunk_size": 4}, 1),
        ({"prompt_lookup_num_tokens": 2}, 1),
        ({}, 5),
        ({"num_beams": 2}, 5),
    ],
    ids=str,
)
def test_image_is_encoded_and_projected_once_for_all_beams_questions_and_steps(options, rows):
    model = tiny_model()
    calls = count_calls(model)
    texts = ["What?", "Who is it?", "Where is that?", "When?", "How many of them?"][:rows]
    batch = ask(*texts, images=tiny_image(0))
    assert batch["pixel_values"].shape[0] == 1
    output = model.generate(**batch, **{**GREEDY, **options}, return_dict_in_generate=True)
    assert calls == {"vision": [5], "keys": [1, 1], "values": [1, 1]}
    stored = output.past_key_values.layers[-2:]
    assert [layer.keys.shape[0] for layer in stored] == [1, 1]
    assert all(layer.keys.is_contiguous() and layer.values.is_contiguous() for layer in stored)


def test_without_a_cache_the_image_is_still_encoded_once(question):
    model = tiny_model()
    calls = count_calls(model)
    model.generate(**question, **GREEDY, use_cache=False, num_beams=2)
    assert calls["vision"] == [5]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}, {"prefill_chunk_size": 4}], ids=str)
def test_several_questions_on_each_image_equal_single_ones(model, options):
    images = [tiny_image(0), tiny_image(1)]
    texts = ["What?", "Who is it?", "Where is that?", "When?", "How many of them?", "Why?"]
    tokens = tiny_processor()(text=texts, return_tensors="pt")
    pixel_values = ask("a", "b", images=images)["pixel_values"]
    together = model.generate(**tokens, pixel_values=pixel_values, **GREEDY, **options)
    for row, question in enumerate(texts):
        alone = model.generate(**ask(question, images=[images[row // 3]]), **GREEDY, **options)
        assert torch.equal(together[row, -NEW:], alone[0, -NEW:])


def test_image_features_encoded_beforehand_serve_many_calls(question):
    model = tiny_model()
    expected = model.generate(**question, **GREEDY)
    features = model.get_image_features(question.pop("pixel_values")).last_hidden_state
    calls = count_calls(model)
    for options in ({}, {"num_beams": 2}, {"use_cache": False}, {"prefill_chunk_size": 4}):
        model.generate(**question, image_hidden_states=features, **GREEDY, **options)
    assert calls["vision"] == []
    assert torch.equal(model.generate(**question, image_hidden_states=features, **GREEDY), expected)


# --- Threads, compilation, attention back ends ---


def test_two_threads_on_one_model_give_what_each_gives_alone(model):
    batches = [ask("What is written?"), ask("Who is that?", images=[tiny_image(1)])]
    expected = [model.generate(**batch, **GREEDY, num_beams=2) for batch in batches]
    results = {}

    def work(index):
        results[index] = [model.generate(**batches[index % 2], **GREEDY, num_beams=2) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        assert all(torch.equal(result, expected[index % 2]) for result in results[index])


def test_forward_compiles_into_one_graph(model, question):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for options in ({"use_cache": False}, {}):
            assert torch.allclose(
                compiled(**question, **options).logits, model(**question, **options).logits, atol=1e-5
            )


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_vision_tower_is_one_graph_for_each_number_of_images(backend, question, tmp_path):
    torch._dynamo.reset()
    model = tiny_model()
    names = list(model.state_dict())
    batches = [
        ask(*["x"] * len(seeds), images=[tiny_image(seed) for seed in seeds]) for seeds in ([0, 1], [2, 3], [4])
    ]
    with torch.no_grad():
        expected = [model.get_image_features(batch["pixel_values"]).last_hidden_state for batch in batches]
    answer = model.generate(**question, **GREEDY)

    model.save_pretrained(tmp_path)
    torch._dynamo.utils.counters.clear()
    for compiled in (model, PheyeForConditionalGeneration.from_pretrained(tmp_path).eval()):  # which share graphs
        compiled.model.vision_tower.compile(fullgraph=True, dynamic=False, backend=backend)
        for batch, features in zip(batches, expected, strict=True):
            with torch.no_grad():
                found = compiled.get_image_features(batch["pixel_values"]).last_hidden_state
            assert torch.allclose(found, features, atol=1e-5)
        assert torch.equal(compiled.generate(**question, **GREEDY), answer)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
        assert list(compiled.state_dict()) == names
    compiled.save_pretrained(tmp_path / "again")
    again = PheyeForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again.generate(**question, **GREEDY), answer)


def test_compiled_models_of_one_process_keep_their_own_lora(question):
    torch._dynamo.reset()  # torch does not ask whether hooks have changed when it takes a graph that it has
    models = [tiny_model(), tiny_model(global_lora_rank=0), tiny_model(local_lora_alpha=5.0)]
    models.append(copy.deepcopy(models[0]))
    models[-1].model.local_lora.apply(lambda part: [parameter.data.mul_(2) for parameter in part.parameters(False)])
    with torch.no_grad():
        expected = [model.get_image_features(question["pixel_values"]).last_hidden_state for model in models]
        for model in models:
            model.model.vision_tower.compile(fullgraph=True, dynamic=False, backend="eager")
        for model, features in zip(models, expected, strict=True):
            found = model.get_image_features(question["pixel_values"]).last_hidden_state
            assert torch.allclose(found, features, atol=1e-5)
    assert all((one - other).abs().max() > 1e-2 for one, other in itertools.combinations(expected, 2))


@pytest.mark.slow
def test_forward_compiles_with_inductor_and_a_static_cache_decodes_compiled(question):
    torch._dynamo.reset()
    model = tiny_model()
    expected = model.generate(**question, **GREEDY)
    compiled = torch.compile(model, fullgraph=True)
    ids, pixel_values = question["input_ids"], question["pixel_values"]
    with torch.no_grad():
        assert torch.allclose(compiled(**question, use_cache=False).logits, model(**question).logits, atol=1e-4)
        cache = StaticCache(config=model.config.text_config, max_cache_len=96)
        token = model(ids, pixel_values, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens = [token]
        for _ in range(NEW - 1):
            tokens.append(compiled(tokens[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(tokens, dim=1), expected[:, -NEW:])


@pytest.mark.slow
def test_flex_attention_agrees_with_eager(question):
    torch._dynamo.reset()
    model = tiny_model()
    with torch.no_grad():
        expected = model(**question).logits
        model.set_attn_implementation("flex_attention")
        assert torch.allclose(model(**question).logits, expected, atol=1e-3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(question, attention):
    model = tiny_model()
    expected = model(**question).logits
    model.set_attn_implementation(attention)
    assert model.model.vision_tower.config._attn_implementation == attention
    assert model.model.language_model.config._attn_implementation == attention
    assert torch.allclose(model(**question).logits, expected, atol=1e-4)


def test_generation_mixin_still_calls_what_we_override():
    # Private hooks: a rename would repeat the image and not fail. The counts above would notice; this says which.
    source = inspect.getsource(GenerationMixin)
    for hook in (
        "_expand_inputs_for_generation",
        "_prepare_generated_length",
        "_prepare_cache_for_generation",
        "_get_candidate_generator",
    ):
        assert f"self.{hook}(" in source
        assert hook in vars(PheyeGenerationMixin)
