"""What only a GPU shows. `make gpu` runs these tests there, and `python benchmarks/gpu.py --rehearse` on a CPU.

Everywhere else they are skipped. They need neither a network nor packages beyond torch, transformers and accelerate.
"""

import copy
import importlib.util
import json
import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import CompileConfig

from pheye import PheyeForConditionalGeneration, PheyeProcessor
from pheye.vision_pheye import dropout

from tiny import tiny_image, tiny_model, tiny_processor

REHEARSED = os.environ.get("PHEYE_REHEARSE") == "1"  # set by benchmarks/gpu.py
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
GOLDEN = Path(__file__).parent / "fixtures" / "golden"
NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
QUESTIONS = ["What is written on the sign?", "Why?", "How many are there in the picture?"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ON_GPU or REHEARSED), reason="needs an NVIDIA GPU: `make gpu`"),
]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="rehearsed on a CPU, which has nothing to stand in for this")


@pytest.fixture(autouse=True)
def exact_products():
    """TensorFloat-32, which torch allows in convolutions by default, keeps ten bits of a product's factors."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def on_device(batch: dict) -> dict:
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def ask(*texts: str, images=None) -> dict:
    images = [tiny_image(seed) for seed in range(len(texts))] if images is None else images
    return on_device(tiny_processor()(images=images, text=list(texts), return_tensors="pt"))


@pytest.fixture(scope="module")
def model():
    return tiny_model().to(DEVICE)


# --- The published outputs ---


@pytest.fixture(scope="module", params=["x2-448", "x4-672"])
def golden(request, tmp_path_factory):
    """Pictures' folder, converted model and recorded outputs."""
    from pheye.convert_checkpoint import main as convert_checkpoint

    source, folder = GOLDEN / request.param, tmp_path_factory.mktemp("golden") / request.param
    convert_checkpoint([str(source), str(folder)])
    return source, folder, load_file(source / "expected.safetensors")


# Largest and mean distance of the features and largest distance of the logits; a half's are those seen on CPUs.
TOLERANCES = {
    torch.float32: (2e-4, 2e-5, 2e-3),
    torch.bfloat16: (0.3, 0.025, 0.5),
    torch.float16: (0.1, 0.006, 0.1),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_golden_outputs(golden, dtype):
    source, folder, expected = golden
    model = PheyeForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(DEVICE).eval()
    processor = PheyeProcessor.from_pretrained(folder)
    images = processor.image_processor([source / f"image{i}.png" for i in range(2)], return_tensors="pt").pixel_values
    images = images.to(DEVICE)
    most, mean, of_logits = TOLERANCES[dtype]
    features = model.get_image_features(images).last_hidden_state
    assert features.dtype == dtype
    error = (features.float().cpu() - expected["vision_features"]).abs()
    assert error.max() < most
    assert error.mean() < mean
    for row in range(2):
        ids = expected["input_ids"][row][expected["attention_mask"][row].bool()][None].to(DEVICE)
        logits = model(ids, images[row : row + 1]).logits
        assert (logits.float().cpu() - expected[f"logits_{row}"]).abs().max() < of_logits
        for beams in (1, 3) if dtype == torch.float32 else ():
            generated = model.generate(
                input_ids=ids, pixel_values=images[row : row + 1], max_new_tokens=12, num_beams=beams, do_sample=False
            )
            assert torch.equal(generated.cpu(), expected[f"generated_{row}_beams{beams}"])


# --- Attention and compilation ---


@torch.no_grad()
@pytest.mark.parametrize(
    ("attention", "dtype", "atol"),
    [
        ("sdpa", torch.float32, 1e-3),
        ("flex_attention", torch.float32, 1e-3),
        ("sdpa", torch.bfloat16, 0.1),
        ("flash_attention_2", torch.bfloat16, 0.1),
        ("flash_attention_3", torch.bfloat16, 0.1),
    ],
    ids=str,
)
def test_attention_implementations_agree_with_eager(attention, dtype, atol):
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(attention)
    if package and not (ON_GPU and importlib.util.find_spec(package)):
        pytest.skip(f"{package} is not installed")
    model = tiny_model().to(DEVICE, dtype)
    model.set_attn_implementation("eager")
    batch = ask(*QUESTIONS[:1])
    expected = model(**batch).logits
    model.set_attn_implementation(attention)
    assert torch.allclose(model(**batch).logits, expected, atol=atol)


def test_a_static_cache_decodes_compiled_without_a_break_and_gives_the_eager_ids(model):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = CompileConfig(fullgraph=True, mode="reduce-overhead" if ON_GPU else "default")
    compiled._compile_all_devices = True  # on a CPU too
    batch = ask(*QUESTIONS)
    for options in ({}, {"num_beams": 3}):
        expected = model.generate(**batch, **GREEDY, **options)
        found = model.generate(**batch, **GREEDY, **options, cache_implementation="static", compile_config=compiled)
        assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@torch.no_grad()
def test_a_compiled_vision_tower_gives_the_same_features_from_one_graph():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model().to(DEVICE)
    expected = [model.get_image_features(ask("x", images=[tiny_image(seed)])["pixel_values"]) for seed in range(3)]
    model.model.vision_tower.compile(fullgraph=True, mode="reduce-overhead" if ON_GPU else None)
    found = [model.get_image_features(ask("x", images=[tiny_image(seed)])["pixel_values"]) for seed in range(3)]
    for one, other in zip(found, expected, strict=True):  # CUDA graphs reuse their memory; none may have changed
        assert torch.allclose(one.last_hidden_state, other.last_hidden_state, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- Generation ---


def test_a_batch_is_answered_as_each_alone_and_all_questions_about_one_image(model):
    together = model.generate(**ask(*QUESTIONS), **GREEDY)[:, -NEW:]
    about_one = model.generate(**ask(*QUESTIONS, images=tiny_image(0)), **GREEDY)[:, -NEW:]
    for row, question in enumerate(QUESTIONS):
        alone = model.generate(**ask(question, images=[tiny_image(row)]), **GREEDY)[:, -NEW:]
        assert torch.equal(together[row : row + 1], alone)
        alone = model.generate(**ask(question, images=[tiny_image(0)]), **GREEDY)[:, -NEW:]
        assert torch.equal(about_one[row : row + 1], alone)


def test_beams_are_the_cpu_s(model):
    batch = ask(*QUESTIONS)
    cpu = {name: tensor.cpu() for name, tensor in batch.items()}
    found = model.generate(**batch, **GREEDY, num_beams=3)
    assert torch.equal(found.cpu(), tiny_model().generate(**cpu, **GREEDY, num_beams=3))


def test_two_threads_share_a_model(model):
    batches = [ask(question, images=[tiny_image(row)]) for row, question in enumerate(QUESTIONS[:2])]
    expected = [model.generate(**batch, **GREEDY) for batch in batches]
    found = [[], []]

    def answer(row: int):
        for _ in range(4):
            found[row].append(model.generate(**batches[row], **GREEDY))

    threads = [threading.Thread(target=answer, args=(row,)) for row in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row in range(2):
        assert len(found[row]) == 4
        assert all(torch.equal(ids, expected[row]) for ids in found[row])


# --- Where weights and caches lie ---


@needs_gpu
def test_an_offloaded_cache_gives_the_same_ids(model):
    batch = ask(*QUESTIONS)
    expected = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY, cache_implementation="offloaded"), expected)


@needs_gpu
@pytest.mark.parametrize("memory", [None, {0: "1MB", "cpu": "1GB"}], ids=["all on the GPU", "partly on the CPU"])
def test_a_device_map_gives_the_same_ids(memory, model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    batch = ask(*QUESTIONS)
    options = {} if memory is None else {"max_memory": memory}
    spread = PheyeForConditionalGeneration.from_pretrained(tmp_path, device_map="auto", **options).eval()
    assert ("cpu" in map(str, spread.hf_device_map.values())) == (memory is not None)
    assert torch.equal(spread.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))


def test_weights_kept_on_the_cpu_give_the_same_ids(model):
    from accelerate import cpu_offload

    batch = ask(*QUESTIONS)
    offloaded = cpu_offload(tiny_model(), torch.device(DEVICE))
    assert torch.equal(offloaded.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))


# --- Training ---


def training_batch() -> dict:
    inputs = tiny_processor()(
        images=[tiny_image(0), tiny_image(1)], text=["What is it? A cat.", "Who? Me."], return_tensors="pt"
    )
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def trainee(**kwargs):
    """Only what stands between the two pretrained models trains."""
    model = tiny_model(lora_dropout=0.0, **kwargs)
    model.model.vision_tower.requires_grad_(False)
    model.model.language_model.requires_grad_(False)
    return model.train()


def gradients(model, batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {
        name.removeprefix("module."): parameter.grad.cpu()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5), name


def test_gradients_are_the_cpu_s():
    batch = training_batch()
    assert_same_gradients(gradients(trainee().to(DEVICE), on_device(batch)), gradients(trainee(), batch))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    batch = on_device(training_batch())
    expected = gradients(trainee().to(DEVICE), batch)
    model = trainee().to(DEVICE)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same_gradients(gradients(model, batch), expected)


def test_ddp_gives_the_same_gradients(tmp_path):
    batch = on_device(training_batch())
    expected = gradients(trainee().to(DEVICE), batch)
    dist.init_process_group(
        "nccl" if ON_GPU else "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = torch.nn.parallel.DistributedDataParallel(trainee().to(DEVICE))
        assert_same_gradients(gradients(model, batch), expected)
    finally:
        dist.destroy_process_group()


def test_a_step_under_autocast_is_the_float32_step_within_bfloat16():
    batch = on_device(training_batch())
    expected = trainee().to(DEVICE)(**batch).loss
    model = trainee().to(DEVICE)
    for part in (model.model.vision_tower, model.model.language_model):
        part.to(torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert abs(loss - expected) < 0.05 * expected
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all(), name


def test_dropout_leaves_the_share_that_it_says_and_the_mean():
    x = torch.ones(1 << 20, device=DEVICE)
    dropped, factor = dropout(x, 0.05)
    assert abs((dropped == 0).float().mean() - 0.05) < 0.002
    assert abs((dropped * factor).mean() - 1) < 0.002


# --- Commands ---


def test_captions_from_workers_and_pinned_memory_are_those_without(tmp_path):
    from accelerate import PartialState

    from pheye.answering import caption

    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    for seed in range(5):
        tiny_image(seed).save(tmp_path / "pictures" / f"{seed}.png")
    rows = []
    for name, options in {
        "plain": ["--device", "cpu", "--batch_size", "1"],
        "workers": ["--device", DEVICE, "--batch_size", "2", "--workers", "2"],
    }.items():
        output = tmp_path / f"{name}.jsonl"
        files = ["--model", str(tmp_path / "model"), "--images", str(tmp_path / "pictures"), "--output", str(output)]
        PartialState._reset_state()
        assert caption.main([*files, "--max_new_tokens", str(NEW), *options]) == 0
        rows.append([json.loads(line) for line in output.read_text().splitlines()])
    PartialState._reset_state()
    assert len({row["caption"] for row in rows[0]}) > 1
    assert rows[0] == rows[1]


def test_a_model_moves_between_devices_and_answers_alike(model):
    moved = copy.deepcopy(model).cpu()
    batch = ask(QUESTIONS[0])
    expected = moved.generate(**{name: tensor.cpu() for name, tensor in batch.items()}, **GREEDY)
    assert torch.equal(moved.to(DEVICE).generate(**batch, **GREEDY).cpu(), expected)
