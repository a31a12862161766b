"""Two processes that split the model between them train as one process does: torch's `fully_shard` on the CPU.

accelerate's own FSDP wants a GPU, so its way of wrapping a model is called here with all else that it needs at hand.
"""

import itertools
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml
from test_high_res import hybrid_config
from torch import nn

from pheye import PheyeConfig
from pheye.training.trained import (
    choose_trained,
    load_trained,
    nonfinite,
    save_trained,
    set_rate_of_pretrained,
    trained_state,
)

from tiny import tiny_config, tiny_image, tiny_model, tiny_processor

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parent.parent / "training" / "configs" / "fsdp2.yaml"
STEPS = 2
ANSWERS = ["A cat.", "Nothing at all, as far as can be told.", "Two.", "Me and my friends."]  # of unequal length


def wrapped_classes(model: nn.Module) -> list[str]:
    """Those of the file, and what its comment says for a model with blocks over the image."""
    names = yaml.safe_load(CONFIG.read_text())["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"].split(",")
    return names + ["PheyeSelfAttentionBlock"] * bool(model.pheye.self_attention_blocks)


def config_of(kind: str) -> PheyeConfig:
    options = {"canvases": [[1, 2], [2, 2], [3, 1]], "max_images": 2} if "canvases" in kind else {}
    if "budgets" in kind:
        joint = {"self_attention_kind": "joint", "self_attention_layers": [2]}
        options |= joint if "joint" in kind else {"self_attention_layers": [3]}
    return (hybrid_config if "hybrid" in kind else tiny_config)(lora_dropout=0.0, **options)


def samples(rows: slice, kind: str = "plain") -> dict[str, torch.Tensor]:
    """Some of four images with questions; only answers are learnt. With canvases, rows of two images, one and none."""
    processor = tiny_processor(config_of(kind))
    processor.tokenizer.padding_side = "right"
    prompt = "What is it?"
    inputs = processor(text=[f"{prompt} {answer}" for answer in ANSWERS], return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, : len(prompt)] = -100  # a token per byte
    images = [tiny_image(seed, *size) for seed, size in enumerate([(90, 70), (80, 40), (30, 90), (50, 50)])]
    if "canvases" in kind:
        images = [[images[0], images[1]], images[2], None, images[3]]
    encoded = processor.image_processor(images[rows], return_tensors="pt")
    return {name: tensor[rows] for name, tensor in {**inputs, "labels": labels}.items()} | dict(encoded)


def answer_tokens() -> int:
    return int((samples(slice(None))["labels"] != -100).sum())


def new_model(bf16: bool, kind: str = "plain"):
    model = tiny_model(config_of(kind))  # without dropout, for each process would draw other numbers
    choose_trained(model, train=["high_res_tower"] if "hybrid" in kind else None)
    model.train()
    if bf16:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    return model


def train(model: nn.Module, batch: dict, bf16: bool, processes: int = 1, kind: str = "plain") -> list[float]:
    """Losses of this process: its share of the sum over answer tokens, over the answer tokens of all processes. With
    budgets, the first step takes the largest and the second the cheapest, which leaves a block without gradients."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    if "hybrid" in kind:  # of which the branch trains
        set_rate_of_pretrained(optimizer, model, 0.05)
    losses = []
    for step in range(STEPS):
        budget = {"vision_budget": 1 - step} if "budgets" in kind else {}
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch, **budget, num_items_in_batch=answer_tokens()).loss
        (loss.float() * processes).backward()  # gradients are averaged over processes, and the loss is a sum
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# --- What runs in each process ---


def shard_by_torch(model: nn.Module, mesh, bf16: bool) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    names = wrapped_classes(model)
    for module in model.modules():
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_by_accelerate(model: nn.Module, mesh, bf16: bool) -> nn.Module:
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=wrapped_classes(model),
        mixed_precision_policy="bf16" if bf16 else None,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh={("dp",): mesh},
        parallelism_config=SimpleNamespace(fsdp_dim_names=("dp",)),
        mixed_precision="bf16" if bf16 else "no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def replicate(model: nn.Module, mesh, bf16: bool) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def process(rank: int, rendezvous: str, folder: str, shard, bf16: bool, kind: str):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    try:
        model = new_model(bf16, kind)
        names = list(trained_state(model))
        model = shard(model, init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)), bf16)
        is_split = [isinstance(parameter, DTensor) for parameter in model.parameters()]
        assert not any(is_split) if shard is replicate else all(is_split)
        losses = train(model, samples(slice(2 * rank, 2 * rank + 2), kind), bf16, 2, kind)
        assert nonfinite(model) == []  # what the Trainer asks before it saves
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        total = torch.tensor(losses)
        dist.all_reduce(total)
        if rank == 0:
            save_trained({name: state[name] for name in names}, folder)
            torch.save({"losses": total, "state": state}, Path(folder) / "result.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes():
    """Two processes that all tests share, because each takes seconds to start."""
    spawn = torch.multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, mp_context=spawn) for _ in range(2)]
    yield pools
    for pool in pools:
        pool.shutdown()


def run_sharded(processes: list[ProcessPoolExecutor], folder: Path, shard, bf16: bool, kind: str = "plain") -> dict:
    arguments = (folder / "rendezvous").as_uri(), str(folder), shard, bf16, kind
    for run in [pool.submit(process, rank, *arguments) for rank, pool in enumerate(processes)]:
        run.result()
    return torch.load(folder / "result.pt")


# --- Tests ---


WAYS = [
    *itertools.product([shard_by_torch, shard_by_accelerate, replicate], ["plain", "hybrid canvases"]),
    (shard_by_accelerate, "budgets"),
    (shard_by_torch, "joint budgets"),
]


@pytest.mark.parametrize(("shard", "kind"), WAYS)
def test_two_processes_train_as_one_and_their_checkpoint_loads_in_one(processes, tmp_path, shard, kind):
    before, single = new_model(bf16=False, kind=kind), new_model(bf16=False, kind=kind)
    losses = train(single, samples(slice(None), kind), bf16=False, kind=kind)
    sharded = run_sharded(processes, tmp_path, shard, False, kind)
    torch.testing.assert_close(sharded["losses"], torch.tensor(losses), rtol=1e-5, atol=0)
    assert losses[1] < losses[0]
    loaded = load_trained(new_model(bf16=False, kind=kind), tmp_path)
    for name, parameter in loaded.named_parameters():
        expected = single.get_parameter(name)
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(sharded["state"][name], expected, rtol=1e-5, atol=1e-5, msg=name)
        if not name.endswith("to_k.bias"):  # which adds the same to all scores, so that its gradient is zero
            least = 0 if ".high_res_tower." in name else 1e-4  # the branch's gradients are small
            changed = (parameter - before.get_parameter(name)).abs().max() > least
            assert changed == parameter.requires_grad, name


def test_frozen_bfloat16_and_trained_float32_train_in_two_processes_by_the_files_own_mixed_precision(
    processes, tmp_path
):
    single = new_model(bf16=True)
    losses = train(single, samples(slice(None)), bf16=True)
    sharded = run_sharded(processes, tmp_path, shard_by_accelerate, bf16=True)
    torch.testing.assert_close(sharded["losses"], torch.tensor(losses), rtol=0.02, atol=0)
    for name, parameter in single.named_parameters():
        assert sharded["state"][name].dtype == parameter.dtype, name
        if parameter.requires_grad:
            assert sharded["state"][name].isfinite().all(), name
