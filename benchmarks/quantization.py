"""What a language model in 8 or 4 bits saves, and what it changes.

    python -m pheye.benchmarks.quantization [--variant x4-672 | --model FOLDER] [--methods torchao-int8 ...]

Loads the model in bfloat16 and quantized, the way users do, and lets the two take turns. The vision tower is the same
in both, so image features are given. Without `--model` the weights are random, made once and kept in a temporary
folder (4.7 GB): times and bytes are those of any weights, the change in logits is not. Prints a table, and a line of
JSON last.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import tempfile
from collections.abc import Callable

import torch
from transformers import BitsAndBytesConfig, DynamicCache, QuantoConfig, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from pheye import PheyeConfig, PheyeForConditionalGeneration

from ..common.command import Parser
from ..common.machine import machine, memory, reset_peak_memory
from .full_size import random_model
from .measuring import now, summary

TEXT_TOKENS = 65
STEPS = 2  # decoding steps after each prefill
WARM_UP = 1  # rounds that do not count


def torchao_int8(keep: list[str]) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=keep)


def bitsandbytes_int8(keep: list[str]) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)


def bitsandbytes_nf4(keep: list[str]) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=keep,
    )


def quanto_int8(keep: list[str]) -> QuantoConfig:
    return QuantoConfig(weights="int8", modules_to_not_convert=keep)


# By name: the package, and the quantization config that leaves the modules in a list alone.
METHODS: dict[str, tuple[str, Callable[[list[str]], QuantizationConfigMixin]]] = {
    "torchao-int8": ("torchao", torchao_int8),
    "bitsandbytes-int8": ("bitsandbytes", bitsandbytes_int8),
    "bitsandbytes-nf4": ("bitsandbytes", bitsandbytes_nf4),
    "quanto-int8": ("optimum.quanto", quanto_int8),
}


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


def bytes_of(tensor: torch.Tensor) -> int:
    """Of a tensor's memory; `get_memory_footprint` takes torchao's and quanto's for what they stand for."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def weight_bytes(model: torch.nn.Module) -> int:
    """Of all that would be saved. To be called before the first answer: bitsandbytes repacks what it saves."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}  # tied ones once
    return sum(bytes_of(tensor) for tensor in tensors.values() if isinstance(tensor, torch.Tensor))


def give_back_memory():
    """Return what is free to the system, so that this process's memory before and after can be compared (glibc)."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


class Contestant:
    """A model and what was measured of it."""

    def __init__(self, model: PheyeForConditionalGeneration):
        self.model = model
        self.weights = weight_bytes(model)
        self.prefills, self.steps, self.peaks = [], [], []

    def round(self, text: torch.Tensor, image: torch.Tensor):
        """Prefill and decoding steps of one answer."""
        cache = DynamicCache(config=self.model.config.text_config)
        give_back_memory()
        reset_peak_memory()
        before = memory("VmRSS")
        start = now()
        logits = self.model(text, image_hidden_states=image, cache=cache, logits_to_keep=1).logits
        self.prefills.append(now() - start)
        for _ in range(STEPS):
            token = logits[:, -1:].argmax(-1)
            start = now()
            logits = self.model(token, cache=cache).logits
            self.steps.append(now() - start)
        if before is not None:
            self.peaks.append(memory("VmHWM") - before)

    def report(self) -> dict:
        peaks = self.peaks[WARM_UP:]  # a file's weights come into memory at first use
        return {
            "weights_gb": round(self.weights / 1e9, 3),
            "peak_gb": round((self.weights + max(peaks)) / 1e9, 3) if peaks else None,
            "prefill_s": summary(self.prefills[WARM_UP:]),
            "step_s": summary(self.steps[WARM_UP * STEPS :]),
        }


def change(plain: torch.Tensor, quantized: torch.Tensor) -> dict:
    """What quantization does to the logits (R, T, vocabulary) of all positions."""
    plain, quantized = plain.float(), quantized.float()
    return {
        "relative_rms": round(((quantized - plain).square().mean() / plain.square().mean()).sqrt().item(), 4),
        "same_top_1": round((quantized.argmax(-1) == plain.argmax(-1)).float().mean().item(), 3),
    }


@torch.no_grad()
def compare(plain: PheyeForConditionalGeneration, folder: str, method: str, repeats: int) -> dict:
    """The model in bfloat16 and the folder's quantized by `method`, turn by turn."""
    config = plain.config
    make_config = METHODS[method][1]
    start = now()
    quantized = PheyeForConditionalGeneration.from_pretrained(
        folder, dtype=plain.dtype, quantization_config=make_config(config.modules_to_not_quantize)
    )
    load = now() - start
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(config.vocab_size, (1, TEXT_TOKENS), generator=generator)
    image = torch.randn(1, config.tokens_per_image, config.vision_config.hidden_size, generator=generator)
    image = image.to(plain.dtype)
    contestants = {"bfloat16": Contestant(plain), method: Contestant(quantized)}
    for _ in range(WARM_UP + repeats):
        for contestant in contestants.values():
            contestant.round(text, image)
    logits = [contestant.model(text, image_hidden_states=image).logits for contestant in contestants.values()]
    report = {name: contestant.report() for name, contestant in contestants.items()}
    report[method] |= {"load_s": round(load, 1), **change(*logits)}
    return report


def print_table(results: list[dict]):
    print("| language model | weights, GB | peak, GB | prefill, s | step, s | logits, relative RMS | same top-1 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for result in results:
        for name, row in result.items():
            change = f"{row['relative_rms']} | {row['same_top_1']:.0%}" if "relative_rms" in row else "- | -"
            times = " | ".join(
                f"{row[part]['median']:.3f} ({row[part]['min']:.3f} to {row[part]['max']:.3f})"
                for part in ("prefill_s", "step_s")
            )
            print(f"| {name} | {row['weights_gb']} | {row['peak_gb']} | {times} | {change} |")


def main(argv: list[str] | None = None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--variant", default="x4-672")
    what.add_argument("--model", help="folder of any Pheye, in place of a published variant with random weights")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="by default all whose package is installed")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    methods = arguments.methods or [name for name, (package, _) in METHODS.items() if is_installed(package)]

    results = []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model:
            folder = arguments.model
            plain = PheyeForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
        else:
            plain = random_model(PheyeConfig.from_variant(arguments.variant))
            plain.save_pretrained(folder)
        for method in methods:
            results.append(compare(plain, folder, method, arguments.repeats))
            gc.collect()  # one quantized model at a time

    weights = "random weights" if arguments.model is None else arguments.model
    print(f"{machine()}\n{weights}, {TEXT_TOKENS} text and {plain.config.tokens_per_image} image tokens, batch 1;")
    print(f"medians of {arguments.repeats} (prefill) and {arguments.repeats * STEPS} (step), fastest and slowest\n")
    print_table(results)
    summary_line = {"benchmark": "quantization", "model": arguments.model or arguments.variant, "machine": machine()}
    print(json.dumps(summary_line | {"results": dict(zip(methods, results, strict=True))}))


if __name__ == "__main__":
    main()
