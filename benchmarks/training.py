"""What a training step of full size costs, beside the matrix products that it cannot do without.

    python -m pheye.benchmarks.training [--variant x4-672] [--dtype bfloat16] [--repeats 5] [--device cpu] [--batch 1]
        [--settings plain ...] [--attention sdpa] [--profile]

Random weights; frozen parts in `--dtype`, what `choose_trained` picks in float32, under autocast. The settings take
turns in one process: plain; the activations of all layers computed twice (gradient checkpointing), or of the vision
tower's alone; and both LoRA sets frozen. The clock is stamped at the borders of forward pass, backward pass and AdamW
step. The matrix products are those that a plain step was seen to run, run alone: same operators, shapes, strides and
dtypes, with the model's own weights and otherwise constant numbers. A table and, last, one line of JSON.
"""

import argparse
import contextlib
import ctypes
import functools
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.flop_counter import flop_registry

from ..common.command import Parser, at_least
from ..common.machine import machine, memory, reset_peak_memory
from ..configuration_pheye import PheyeConfig
from ..modeling_pheye import PheyeForConditionalGeneration
from ..training.collator import IGNORED
from ..training.trained import choose_trained, describe_trained
from .full_size import chosen_config, random_model
from .measuring import Stamps, now, summary

PROMPT_TOKENS = 65  # of the paper's section 2.2
ANSWER_TOKENS = 30
PRODUCTS = "matrix products of a plain step"
BAR = 1.25  # step / its matrix products
MEMORY_BAR = 24e9  # bytes, plain at batch 1

aten = torch.ops.aten
# How torch counts floating-point operations, and the same for what it leaves out: products that add in place, and
# attention on a CPU.
COUNTS = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


# --- The matrix products of a step ---


class Layout(NamedTuple):
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> torch.Tensor:
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return torch.full((span,), 0.01, dtype=self.dtype, device=self.device).as_strided(self.shape, self.stride)


class Product(NamedTuple):
    """One call of an operator that multiplies matrices; tensors other than weights stand as their layouts."""

    operator: Callable
    args: tuple
    kwargs: dict
    flops: int
    shapes: tuple[tuple[int, ...], ...]  # of what came out


class Products(TorchDispatchMode):
    """Notes every matrix product while it is active, in `calls`: below autograd and autocast, backward included."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.calls: list[Product] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        count = COUNTS.get(func.overloadpacket)
        if count is not None:
            outputs = output if isinstance(output, (tuple, list)) else (output,)
            shapes = tuple(tuple(tensor.shape) for tensor in outputs if isinstance(tensor, torch.Tensor))
            flops = count(*args, **kwargs, out_val=output)
            self.calls.append(Product(func, *tree_map(self._note, (args, kwargs)), flops, shapes))
        return output

    def _note(self, value):
        if not isinstance(value, torch.Tensor):
            return value
        if value.untyped_storage().data_ptr() in self.weights:
            return value.detach()  # frozen weights are streamed from memory when the products run alone, too
        return Layout(tuple(value.shape), value.stride(), value.dtype, value.device)


@torch.no_grad()
def run_alone(calls: list[Product], device: torch.device | str = "cpu") -> float:
    """Seconds that products take by themselves."""

    @functools.cache
    def make(place: int, layout: Layout) -> torch.Tensor:
        return layout.make()

    ready = []
    for call in calls:
        # `Layout` is a tuple, which must not be taken apart. Operands of one call never share memory.
        leaves, structure = tree_flatten((call.args, call.kwargs), is_leaf=lambda value: isinstance(value, Layout))
        leaves = [make(i, leaf) if isinstance(leaf, Layout) else leaf for i, leaf in enumerate(leaves)]
        args, kwargs = tree_unflatten(leaves, structure)
        ready.append((call.operator, args, kwargs))
    start = now(device)
    for operator, args, kwargs in ready:
        operator(*args, **kwargs)
    return now(device) - start


# --- Settings ---


@contextlib.contextmanager
def checkpointed(module) -> Iterator[None]:
    module.gradient_checkpointing_enable()
    yield
    module.gradient_checkpointing_disable()
    module.disable_input_require_grads()  # which enabling may have begun


@contextlib.contextmanager
def frozen_lora(model: PheyeForConditionalGeneration) -> Iterator[None]:
    """Without a gradient in front of it and in it, the vision tower runs without a graph."""
    parameters = [*model.pheye.global_lora.parameters(), *model.pheye.local_lora.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(False)
    yield
    for parameter in parameters:
        parameter.requires_grad_(True)


SETTINGS = {
    "plain": contextlib.nullcontext,
    "gradient checkpointing": checkpointed,
    "ViT under gradient checkpointing": lambda model: checkpointed(model.pheye.vision_tower),
    "LoRA frozen": frozen_lora,
}


# --- Steps ---


class Trainee:
    """A model of full size with its optimizer and a batch."""

    def __init__(self, config: PheyeConfig, *, dtype: str, device: str, batch: int, attention: str | None = None):
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        self.model = random_model(config, self.dtype, device)
        if attention:
            self.model.set_attn_implementation(attention)
        choose_trained(self.model)
        self.model.train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)  # as transformers' Trainer does
        self.batch = random_batch(config, batch, self.device)
        self._make_optimizer_state()

    def _make_optimizer_state(self):
        """A step of zeros, so that the first one measured finds the state that all later ones find."""
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward(self) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(**self.batch).loss

    def step(self) -> dict[str, float]:
        """Seconds of each part."""
        with Stamps(self.model.pheye.vision_tower, device=self.device) as stamps:
            loss = self.forward()
            stamps.times.append(now(self.device))
            loss.backward()
            stamps.times.append(now(self.device))
            self.optimizer.step()
            self.optimizer.zero_grad()
            stamps.times.append(now(self.device))
        vision, rest, backward, optimizer = stamps.intervals
        parts = {"vision forward": vision, "forward": vision + rest, "backward": backward, "optimizer": optimizer}
        return {**parts, "step": stamps.times[-1] - stamps.times[0]}

    def record(self) -> tuple[list[Product], int]:
        """The products of a step, and how many of them are the forward pass's."""
        with Products(self.model) as products:
            loss = self.forward()
            forward = len(products.calls)
            loss.backward()
        self.optimizer.zero_grad()
        return products.calls, forward


def random_batch(config: PheyeConfig, rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = config.vision_config.image_size
    ids = torch.randint(1, config.vocab_size, (rows, PROMPT_TOKENS + ANSWER_TOKENS), generator=generator)
    labels = ids.clone()
    labels[:, :PROMPT_TOKENS] = IGNORED
    pixels = torch.randn(rows, config.views_per_image, 3, size, size, generator=generator)
    batch = {"input_ids": ids, "labels": labels, "pixel_values": pixels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def kept_for_backward(model: torch.nn.Module, call: Callable[[], object]) -> int:
    """Bytes of all tensors but parameters that autograd keeps after `call`; each storage counts once.

    What gradient checkpointing keeps does not pass by here.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    del output  # until here it holds the graph, so that no storage is freed and its address used again
    return sum(kept.values())


def give_back_memory():
    """Hand memory that was freed back to the system, which glibc may keep."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Bytes at most in use while a `with` block runs, beyond those that were at `start`; None if unknown."""

    def __init__(self, start: int | None, device: torch.device):
        self.start, self.on_gpu = start, device.type == "cuda"
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            give_back_memory()
            reset_peak_memory()
        return self

    def __exit__(self, *error):
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else memory("VmHWM")
        if peak is not None:
            self.bytes = peak if self.on_gpu else peak - self.start


# --- Measuring ---


def measure(trainee: Trainee, settings: list[str], repeats: int, start_memory: int | None) -> dict:
    """All figures. Memory and products are those of a first step in each setting; then settings and products take
    turns, without anything that would take freed memory away from the next step."""
    seconds, peaks, recorded = defaultdict(lambda: defaultdict(list)), {}, {}
    for name in dict.fromkeys(["plain", *settings]):
        with SETTINGS[name](trainee.model), PeakMemory(start_memory, trainee.device) as peak:
            recorded[name] = trainee.record()
        peaks[name] = peak.bytes
    for _ in range(repeats):
        for name in settings:
            with SETTINGS[name](trainee.model):
                for part, value in trainee.step().items():
                    seconds[name][part].append(value)
        seconds[PRODUCTS]["step"].append(run_alone(recorded["plain"][0], trainee.device))
    ids = trainee.batch["input_ids"]
    result = {"settings": {}, "memory": held_memory(trainee)}
    for name, parts in seconds.items():
        row = {part: summary(values) for part, values in parts.items()}
        if name in SETTINGS:
            step, (calls, forward) = row["step"]["median"], recorded[name]
            row |= {"tokens/s": ids.numel() / step, "images/s": len(ids) / step, "peak": peaks[name]}
            row |= {"products": len(calls), "forward FLOP": sum(call.flops for call in calls[:forward])}
            row |= {"backward FLOP": sum(call.flops for call in calls[forward:])}
        result["settings"][name] = row
    if "plain" in settings:
        plain, alone = (statistics.median(seconds[name]["step"]) for name in ("plain", PRODUCTS))
        result["step / matrix products"] = plain / alone
    return result


def held_memory(trainee: Trainee) -> dict[str, int]:
    """Bytes of what is held by its kind; activations are those of a plain step and of one with LoRA frozen."""
    model, trained = trainee.model, trainee.trained
    states = [value for state in trainee.optimizer.state.values() for value in state.values()]
    held = {
        "frozen weights": sum(p.nbytes for p in model.parameters() if not p.requires_grad),
        "trained weights": sum(p.nbytes for p in trained),
        "gradients": sum(p.nbytes for p in trained),
        "optimizer": sum(value.nbytes for value in states if isinstance(value, torch.Tensor)),
        "activations": kept_for_backward(model, trainee.forward),
    }
    with frozen_lora(model):
        held["activations, LoRA frozen"] = kept_for_backward(model, trainee.forward)
    return held


def profile(trainee: Trainee) -> str:
    """The operators in which a plain step spends its time."""
    give_back_memory()  # the profiler needs some itself
    with torch.profiler.profile() as profiler:
        trainee.step()
    on_gpu = trainee.device.type == "cuda"
    return profiler.key_averages().table(f"self_{'cuda' if on_gpu else 'cpu'}_time_total", row_limit=25)


def print_tables(result: dict):
    parts = ("step", "vision forward", "forward", "backward", "optimizer")
    columns = ("setting", "step, s (fastest to slowest)", *parts[1:], "tokens/s", "images/s", "peak, GB", "TFLOP")
    print(f"| {' | '.join(columns)} | rounds |\n|{' --- |' * (len(columns) + 1)}")
    for name, row in result["settings"].items():
        step = row["step"]
        cells = [name, f"{step['median']:.3f} ({step['min']:.3f} to {step['max']:.3f})"]
        cells += [f"{row[part]['median']:.3f}" if part in row else "" for part in parts[1:]]
        cells += [f"{row[rate]:.3g}" if rate in row else "" for rate in ("tokens/s", "images/s")]
        cells.append(f"{row['peak'] / 1e9:.3f}" if row.get("peak") else "")
        cells.append(
            f"{row['forward FLOP'] / 1e12:.3f} + {row['backward FLOP'] / 1e12:.3f}" if name in SETTINGS else ""
        )
        print(f"| {' | '.join(cells)} | {step['n']} |")
    print("\n| held, GB | |\n| --- | --- |")
    for name, value in result["memory"].items():
        print(f"| {name} | {value / 1e9:.3f} |")
    if "step / matrix products" in result:
        plain, alone = result["settings"]["plain"], result["settings"][PRODUCTS]["step"]["median"]
        rate = (plain["forward FLOP"] + plain["backward FLOP"]) / alone / 1e9
        print(f"\nStep / matrix products: {result['step / matrix products']:.3f} (bar: {BAR})")
        print(f"The {plain['products']} products run at {rate:.0f} GFLOP/s alone.")
        if plain["peak"] is not None:
            print(f"Peak of a plain step: {plain['peak'] / 1e9:.2f} GB (bar: {MEMORY_BAR / 1e9:.0f} GB at batch 1)")


def main(argv: list[str] | None = None, config: PheyeConfig | None = None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="x4-672", help="or toy, to try the command")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the frozen parts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=at_least(1), default=1)
    parser.add_argument("--attention", help="attention implementation, such as sdpa or flash_attention_2")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--repeats", type=at_least(1), default=5)
    parser.add_argument("--profile", action="store_true", help="print the operators that a plain step runs, too")
    args = parser.parse_args(argv)
    start_memory = memory("VmRSS")
    config = config or chosen_config(args.variant)

    print(f"{args.variant}, {args.dtype}, batch {args.batch}; {machine(args.device)}")
    trainee = Trainee(config, dtype=args.dtype, device=args.device, batch=args.batch, attention=args.attention)
    print(describe_trained(trainee.model), "\n", flush=True)
    result = measure(trainee, args.settings, args.repeats, start_memory)
    print_tables(result)
    if args.profile:
        print(profile(trainee))
    print(json.dumps({"benchmark": "training", **vars(args), "machine": machine(args.device), **result}))


if __name__ == "__main__":
    main()
