"""Where a model with canvases is used: every way that reads several images at once gives each its own answer."""

import copy
import json
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from test_quantization import TOLERANCES, difference
from test_quantization import load as load_quantized
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CompileConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from pheye import PheyeForConditionalGeneration, PheyeProcessor
from pheye.answering import caption
from pheye.benchmarks import quantization
from pheye.benchmarks.canvases import measure
from pheye.evaluation.attention import main as attention
from pheye.training.collator import PheyeCollator
from pheye.training.trainer import PheyeTrainer

from tiny import randomize, tiny_config, tiny_image, tiny_processor, tiny_text_config, tiny_vision_config

ROOT = Path(__file__).parent.parent
NEW = 6
CAPTION = "Provide a one-sentence caption for the provided image"
CANVASES = [[1, 2], [2, 2], [3, 1]]
SIZES = [(80, 40), (50, 50), (30, 90), (64, 60)]


@pytest.fixture(scope="module")
def parts():
    config = tiny_config(canvases=CANVASES)
    return randomize(PheyeForConditionalGeneration(config)).eval(), tiny_processor(config)


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "canvases"
    for part in parts:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, (width, height) in enumerate(SIZES):
        tiny_image(number, width, height).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def expected(parts, photos) -> list[str]:
    """What each picture gets by itself."""
    model, processor = parts
    text = processor.apply_chat_template([{"role": "user", "content": CAPTION}], add_generation_prompt=True)
    answers = []
    for path in sorted(photos.iterdir()):
        inputs = processor(images=path, text=text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=NEW)[:, inputs["input_ids"].shape[1] :]
        answers += processor.post_process_image_text_to_text(ids)
    assert len(set(answers)) == len(SIZES)
    return answers


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_pipeline_answers_about_images_of_all_shapes_at_once(saved, photos, expected, batch_size):
    pipe = pipeline("image-to-text", model=str(saved), trust_remote_code=True, device="cpu")
    paths = [str(path) for path in sorted(photos.iterdir())]
    answers = pipe(paths, max_new_tokens=NEW, batch_size=batch_size)
    assert [answer[0]["generated_text"] for answer in answers] == expected


def test_transformers_own_pipeline_answers(saved, photos, expected):
    pipe = pipeline("image-text-to-text", model=str(saved), trust_remote_code=True, device="cpu")
    for path, answer in zip(sorted(photos.iterdir()), expected, strict=True):
        content = [{"type": "image", "path": str(path)}, {"type": "text", "text": CAPTION}]
        found = pipe(text=[{"role": "user", "content": content}], max_new_tokens=NEW, return_full_text=False)
        assert found[0]["generated_text"].strip() == answer.strip()


def test_transformers_own_pipeline_joins_images_of_one_canvas_alone(saved, photos):
    """As docs/usage.md says. When it joins others, the documents may say so."""
    pipe = pipeline("image-text-to-text", model=str(saved), trust_remote_code=True, device="cpu")

    def ask(names: list[str], batch_size: int) -> list[str]:
        contents = [
            [{"type": "image", "path": str(photos / name)}, {"type": "text", "text": "What?"}] for name in names
        ]
        chats = [[{"role": "user", "content": content}] for content in contents]
        found = pipe(text=chats, batch_size=batch_size, max_new_tokens=NEW, return_full_text=False)
        return [answer[0]["generated_text"] for answer in found]

    assert ask(["1.png", "3.png"], 2) == ask(["1.png", "3.png"], 1)
    assert len(ask(["0.png", "1.png"], 1)) == 2
    with pytest.raises(RuntimeError, match=r"Sizes of tensors must match.* in the list"):
        ask(["0.png", "1.png"], 2)


def captions(saved, images: list, output: Path, batch_size: int, *options: str) -> list[str]:
    PartialState._reset_state()
    options = ["--batch_size", str(batch_size), "--max_new_tokens", str(NEW), "--dtype", "float32", *options]
    argv = ["--model", str(saved), "--images", *map(str, images), "--output", str(output), "--device", "cpu", *options]
    assert caption.main(argv) == 0
    return [json.loads(line)["caption"] for line in output.read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 1])
def test_captions_of_all_shapes_in_one_batch(saved, photos, expected, tmp_path, workers):
    assert captions(saved, [photos], tmp_path / "out.jsonl", 4, "--workers", str(workers)) == expected


def test_a_compiled_tower_captions_batches_of_the_largest_canvas_by_its_one_graph(
    saved, photos, expected, tmp_path, monkeypatch
):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, runs = torch.nn.Module.compile, []

    def backend(graph, inputs):
        def run(*args):
            runs.append(1)
            return graph.forward(*args)

        return run

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compiled(self, **kw, backend=backend))
    square, others = [photos / "1.png", photos / "3.png"], [photos / "0.png", photos / "2.png"]
    try:
        found = captions(saved, square, tmp_path / "square.jsonl", 2, "--compile")
        assert found == [expected[1], expected[3]]
        assert len(runs) == 2  # for the picture that warms it up, and for the two
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        torch.compiler.set_stance("default")
        torch._dynamo.reset()
        runs.clear()
        found = captions(saved, [*square, *others], tmp_path / "all.jsonl", 4, "--compile")
        assert found == [expected[place] for place in (1, 3, 0, 2)]
        assert len(runs) == 1  # images of other shapes among them: eagerly
    finally:
        torch.compiler.set_stance("default")


def test_attention_is_drawn_on_the_image_and_not_on_what_lies_around_it(saved, photos, tmp_path):
    arguments = ["--model", str(saved), "--image", str(photos / "0.png"), "--prompt", "What?"]
    status = attention([*arguments, "--output", str(tmp_path / "out.png"), "--dtype", "float32", "--device", "cpu"])
    assert status == 0
    assert json.loads((tmp_path / "out.json").read_text())["views"] == ["global", "column 1 row 1", "column 2 row 1"]


def samples(photos) -> list[dict]:
    return [
        {
            "id": path.name,
            "images": [str(path)],
            "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": path.stem * 3}],
        }
        for path in sorted(photos.iterdir())
    ]


def test_the_collator_fills_up_and_a_broken_image_keeps_its_row(parts, photos, tmp_path):
    model, processor = parts
    collator = PheyeCollator(processor)
    batch = collator(samples(photos))
    assert batch["image_grids"].tolist() == [[[1, 2]], [[2, 2]], [[3, 1]], [[2, 2]]]
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken = [*samples(photos)[:2], {**samples(photos)[2], "images": [str(tmp_path / "broken.png")]}]
    with_broken = collator(broken)
    assert len(with_broken["skipped"]) == 1 and (with_broken["labels"][2] == -100).all()
    assert torch.equal(with_broken["pixel_values"][:2], batch["pixel_values"][:2])
    names = ("input_ids", "attention_mask", "labels", "pixel_values", "image_grids")
    together = model(**{name: batch[name] for name in names}).loss
    alone = []
    for sample in samples(photos):
        own = collator([sample])
        alone.append((model(**{name: own[name] for name in names}).loss, int((own["labels"] != -100).sum())))
    weighted = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    torch.testing.assert_close(together, weighted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trainer", [PheyeTrainer, Trainer])
def test_trainers_train(photos, tmp_path, trainer):
    config = tiny_config(canvases=CANVASES)
    model, processor = randomize(PheyeForConditionalGeneration(config)), tiny_processor(config)
    collator = PheyeCollator(processor)

    def collate(rows: list[dict]) -> dict:
        batch = collator(rows)
        return batch if trainer is PheyeTrainer else {k: v for k, v in batch.items() if k not in ("seen", "skipped")}

    arguments = TrainingArguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"processing_class": processor} if trainer is PheyeTrainer else {}
    trainer(model, arguments, data_collator=collate, train_dataset=samples(photos), **options).train()
    for part in ("row_embedding", "column_embedding"):
        name = f"pheye.view_encoding.{part}.weight"
        assert not torch.equal(model.state_dict()[name], before[name])


def test_loaded_by_the_auto_classes_without_the_package_it_answers(saved, photos, expected):
    model = AutoModelForImageTextToText.from_pretrained(saved, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(saved, trust_remote_code=True)
    text = processor.apply_chat_template([{"role": "user", "content": CAPTION}], add_generation_prompt=True)
    images = [Image.open(path) for path in sorted(photos.iterdir())]
    inputs = processor(images=images, text=[text] * len(images), return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW)[:, inputs["input_ids"].shape[1] :]
    assert processor.post_process_image_text_to_text(ids) == expected


def test_a_compiled_vision_tower_gives_the_same(parts, photos):
    model, processor = parts
    text = processor.apply_chat_template([{"role": "user", "content": CAPTION}], add_generation_prompt=True)
    images = [Image.open(path) for path in sorted(photos.iterdir())]
    inputs = processor(images=images, text=[text] * len(images), return_tensors="pt")
    expected = model(**inputs).logits
    compiled = PheyeForConditionalGeneration(model.config).eval()
    compiled.load_state_dict(model.state_dict())
    compiled.model.vision_tower.compile(dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    whole = torch.compile(model, backend="eager")  # the tower's call stays out of it, with its two kinds of views
    torch.testing.assert_close(whole(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


# --- What stands beside the model ---


def test_a_processor_loaded_for_canvases_leaves_its_tokenizer_as_it_is(saved, tmp_path):
    processor = PheyeProcessor.from_pretrained(saved, canvases="fila", max_images=3)
    assert processor.image_processor.canvases == [[1, 2], [2, 1], [2, 2], [1, 3], [3, 1]]
    assert processor.image_processor.max_images == 3
    processor.save_pretrained(tmp_path)
    assert "max_images" not in (tmp_path / "tokenizer_config.json").read_text()


@pytest.mark.once
def test_the_example_draws_the_crops_of_every_image(photos, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import show_crops

    output = tmp_path / "crops.png"
    assert show_crops.main([str(photos / "0.png"), str(photos / "2.png"), "--output", str(output)]) == 0
    with Image.open(output) as drawn:
        assert drawn.size == (2 * 116, 112 + 12 + 112)  # one crop each: they are small
    assert show_crops.main(["--output", str(output)]) == 0


@pytest.mark.once
def test_the_benchmark_counts_views_and_stored_numbers():
    result = measure(64, 1, 1, images=4)
    assert set(result["ratios"]) == {"mixed / full", "full / square"}
    stored = result["keys_and_values"]
    assert [stored[name] / stored["1 x 1"] for name in stored] == [1, 1.5, 2.5, 5]  # as the views


# --- Adapters, quantization, compilation ---


def learnt(parts, photos) -> dict[str, torch.Tensor]:
    batch = PheyeCollator(parts[1])(samples(photos))
    return {name: value for name, value in batch.items() if name not in ("seen", "skipped")}


def test_peft_trains_beside_blocks_and_view_vectors_that_are_saved_whole(parts, photos, tmp_path):
    model, batch = parts[0], learnt(parts, photos)
    kept = ["cross_attention_blocks.0", "cross_attention_blocks.1", "view_encoding"]
    config = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj)", modules_to_save=kept)
    adapted = get_peft_model(copy.deepcopy(model), config)
    optimizer = torch.optim.SGD([one for one in adapted.parameters() if one.requires_grad], lr=0.5)
    adapted.train()(**batch).loss.backward()
    optimizer.step()
    logits = adapted.eval()(**batch).logits
    encoding = adapted.base_model.model.pheye.view_encoding.modules_to_save["default"]
    assert not torch.equal(encoding.row_embedding.weight, model.pheye.view_encoding.row_embedding.weight)
    adapted.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert torch.equal(reloaded(**batch).logits, logits)


@pytest.mark.parametrize("method", quantization.METHODS)
def test_a_quantized_language_model_sees_every_image(photos, method, tmp_path):
    config = tiny_config(
        canvases=CANVASES,
        vision_config=tiny_vision_config(hidden_size=64, intermediate_size=128),
        text_config=tiny_text_config(intermediate_size=256),
    )
    model, processor = randomize(PheyeForConditionalGeneration(config)).eval(), tiny_processor(config)
    model.save_pretrained(tmp_path)
    quantized = load_quantized(tmp_path, method)
    batch = learnt((model, processor), photos)
    logits, expected = (one(**batch).logits for one in (quantized, model))
    assert difference(logits, expected) < TOLERANCES[method]
    black = {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}
    assert difference(quantized(**black).logits, logits) > 0.01


def test_decoding_compiles_with_a_mask_in_the_cache(parts, photos):
    model, batch = parts[0], learnt(parts, photos)
    images = {name: batch[name] for name in ("pixel_values", "image_grids")}
    text = torch.randint(1, 257, (4, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "cache_implementation": "static"}
    expected = model.generate(text, **images, **options, disable_compile=True)
    compiled = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    assert torch.equal(model.generate(text, **images, **options, compile_config=compiled), expected)
