"""Where a model with budgets is used: commands, pipelines, Trainer, PEFT, quantization, the branch, remote code."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_high_res import hybrid_config
from test_quantization import TOLERANCES, difference
from test_quantization import load as load_quantized
from test_visor import LAYERS, close, visor_config
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from pheye import PheyeForConditionalGeneration
from pheye.answering import caption
from pheye.benchmarks import quantization
from pheye.evaluation import evaluate
from pheye.evaluation.word_attention import answer_with_attention
from pheye.training.trained import choose_trained

from tiny import randomize, tiny_image, tiny_pixels, tiny_processor, tiny_text, tiny_text_config, tiny_vision_config

NEW = 6
CAPTION = "Provide a one-sentence caption for the provided image"


@pytest.fixture(scope="module", params=LAYERS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def parts(kind):
    config = visor_config(kind, router_size=8)
    return randomize(PheyeForConditionalGeneration(config)).eval(), tiny_processor(config)


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "visor"
    for part in parts:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        tiny_image(number).save(folder / f"{number}.png")
    return folder


def answers(parts, photos, budget: int | None) -> list[str]:
    model, processor = parts
    found = []
    for path in sorted(photos.iterdir()):
        text = processor.apply_chat_template([{"role": "user", "content": CAPTION}], add_generation_prompt=True)
        inputs = processor(images=path, text=text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=NEW, vision_budget=budget)
        found += processor.post_process_image_text_to_text(ids[:, inputs["input_ids"].shape[1] :])
    return [answer.lstrip() for answer in found]


def router_choices(parts, photos) -> list[int]:
    model, processor = parts
    text = processor.apply_chat_template([{"role": "user", "content": CAPTION}], add_generation_prompt=True)
    return [
        int(model(**processor(images=path, text=text, return_tensors="pt")).vision_budget)
        for path in sorted(photos.iterdir())
    ]


@pytest.mark.parametrize("budget", [0, 3, None])
def test_captions_at_a_budget_record_the_one_taken(parts, saved, photos, tmp_path, budget):
    output = tmp_path / "captions.jsonl"
    options = ["--model", str(saved), "--images", str(photos), "--output", str(output), "--batch_size", "2"]
    options += ["--max_new_tokens", str(NEW)] + ([] if budget is None else ["--vision_budget", str(budget)])
    assert caption.main(options) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["caption"] for row in rows] == answers(parts, photos, budget)
    taken = router_choices(parts, photos) if budget is None else [budget] * 3
    assert [row["vision_budget"] for row in rows] == taken


def test_a_budget_that_the_model_has_not_stops_the_command(saved, photos, tmp_path, capsys):
    options = ["--model", str(saved), "--images", str(photos), "--output", str(tmp_path / "captions.jsonl")]
    assert caption.main([*options, "--vision_budget", "7"]) == 1
    assert "vision_budget=7 must be an integer from 0 to 3" in capsys.readouterr().err


def test_evaluation_at_a_budget_records_the_one_taken(saved, photos, tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "x"}]
    rows = [{"id": number, "image": f"{number}.png", "conversations": turns} for number in range(3)]
    (photos.parent / "data.json").write_text(json.dumps(rows))
    for budget in (None, 1):
        output = tmp_path / str(budget)
        options = ["--model", str(saved), "--task", "own", "--data", str(photos.parent / "data.json")]
        options += ["--images", str(photos), "--output", str(output)]
        options += [] if budget is None else ["--vision_budget", str(budget)]
        assert evaluate.main(options) == 0
        found = [json.loads(line)["vision_budget"] for line in (output / "rows.jsonl").read_text().splitlines()]
        assert set(found) <= ({1} if budget else {0, 1, 2, 3})
        assert json.loads((output / "result.json").read_text())["decoding"].get("vision_budget") == budget


def test_pipelines_take_a_budget(parts, saved, photos):
    paths = [str(path) for path in sorted(photos.iterdir())]
    captions = pipeline("image-to-text", model=str(saved), trust_remote_code=True, device="cpu")
    expected = answers(parts, photos, 1)
    found = captions(paths, max_new_tokens=NEW, vision_budget=1, batch_size=2)
    assert [answer[0]["generated_text"] for answer in found] == expected
    with pytest.raises(ValueError, match="vision_budget is given twice"):
        captions(paths[0], vision_budget=1, generate_kwargs={"vision_budget": 2})
    chat = pipeline("image-text-to-text", model=str(saved), trust_remote_code=True, device="cpu")
    content = [{"type": "image", "url": paths[0]}, {"type": "text", "text": CAPTION}]
    found = chat(
        [{"role": "user", "content": content}],
        return_full_text=False,
        generate_kwargs={"vision_budget": 1, "max_new_tokens": NEW},
    )
    assert found[0]["generated_text"].strip() == expected[0].strip()


def test_attention_is_that_of_the_budget_taken(parts, monkeypatch):
    model, processor = parts
    choices = iter([1, 3, 3, 3])
    monkeypatch.setattr(model.model.router, "forward", lambda states: torch.eye(4)[[next(choices)]])
    answer = answer_with_attention(model, processor, tiny_image(), "What?", 3)
    found = torch.tensor(np.stack(list(answer.attention)))  # (T, L, N)
    text = processor.apply_chat_template([{"role": "user", "content": "What?"}], add_generation_prompt=True)
    inputs = processor(images=tiny_image(), text=text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=3, vision_budget=1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    weights = model(**inputs, vision_budget=1, output_cross_attentions=True).cross_attentions
    close(found, torch.stack([block[0].mean(0)[-4:-1] for block in weights], dim=1))


def test_remote_code_is_saved_and_answers(parts, saved, photos):
    assert (saved / "visor_pheye.py").exists()
    model = AutoModelForImageTextToText.from_pretrained(saved, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(saved, trust_remote_code=True)
    assert answers((model, processor), photos, 2) == answers(parts, photos, 2)


def test_peft_trains_a_copy_of_what_refines(kind, tmp_path):
    model = randomize(PheyeForConditionalGeneration(visor_config(kind))).eval()
    part = {"block": "self_attention_blocks.0", "joint": "joint_attention"}[kind]
    before = model(tiny_text(), tiny_pixels(), vision_budget=3).logits
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=[part]))
    close(peft(tiny_text(), tiny_pixels(), vision_budget=3).logits, before)
    peft(tiny_text(), tiny_pixels(), labels=tiny_text()).loss.backward()
    trained = [name for name, weight in peft.named_parameters() if weight.grad is not None and "to_save" in name]
    assert trained and all(part in name for name in trained)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "modules_to_save" in name:
                weight += 0.1
    assert not torch.allclose(peft(tiny_text(), tiny_pixels(), vision_budget=3).logits, before, atol=1e-3)


@pytest.mark.parametrize("method", quantization.METHODS)
def test_quantized_models_have_budgets(kind, tmp_path, method):
    text_config = tiny_text_config(hidden_size=128, intermediate_size=256, num_hidden_layers=6)
    config = visor_config(kind, text_config=text_config, vision_config=tiny_vision_config(), router_size=8)
    model = randomize(PheyeForConditionalGeneration(config)).eval()
    model.save_pretrained(tmp_path)
    quantized = load_quantized(tmp_path, method)
    for budget in (0, 3):
        logits, expected = (one(tiny_text(), tiny_pixels(), vision_budget=budget).logits for one in (quantized, model))
        assert difference(logits, expected) < TOLERANCES[method]


@pytest.mark.parametrize("canvases", [None, [[1, 2], [2, 2]]])
def test_with_the_branch_new_parts_change_nothing(kind, canvases):
    options = {"text_config": tiny_text_config(num_hidden_layers=6), "canvases": canvases}
    fields = {"self_attention_kind": kind, "self_attention_layers": LAYERS[kind]}
    torch.manual_seed(0)
    plain = randomize(PheyeForConditionalGeneration(hybrid_config(**options))).eval()
    model = PheyeForConditionalGeneration(hybrid_config(**options, **fields)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    processor = tiny_processor(model.config)
    images = [tiny_image(0, 80, 40), tiny_image(1, 50, 50)]
    inputs = processor(images=images, text=["What?"] * 2, return_tensors="pt")
    expected = plain(**inputs).logits
    for budget in (0, 1, torch.tensor([0, 1])):
        assert torch.equal(model(**inputs, vision_budget=budget).logits, expected)
    randomize(model)
    mixed = model(**inputs, vision_budget=torch.tensor([1, 0])).logits
    for row, budget in ((0, 1), (1, 0)):
        one = processor(images=images[row], text="What?", return_tensors="pt")
        close(mixed[row : row + 1], model(**one, vision_budget=budget).logits)


def test_what_refines_trains_and_the_router_does_not(kind):
    model = PheyeForConditionalGeneration(visor_config(kind, router_size=8, visual_convolution_kernel=7))
    names = choose_trained(model)
    part = {"block": "self_attention_blocks", "joint": "joint_attention"}[kind]
    assert {part, "visual_convolution", "cross_attention_blocks"} <= {name.split(".")[1] for name in names}
    assert not [name for name in names if "router" in name]
