"""How fast a Pheye of full size answers, beside the floors that the hardware sets.

    python -m pheye.benchmarks.generation --variant x4-672 [--dtype bfloat16] [--beams 4] [--batch 8] [--device cpu]
        [--compare] [--plot FILE]

Random weights, made straight in their dtype. Parts are timed by stamping the clock at their borders (the end of the
vision tower, each step's logits), all in one process and in turn; medians over `--repeats` rounds are printed as a
table and, last, as one line of JSON. `--compare` adds the published way of computing and a LLaVA-style model of the
same parts (see designs.py). `--plot` draws instead what an answer costs against the number of crops.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from pheye import PheyeConfig, PheyeForConditionalGeneration, PheyeImageProcessor

from .designs import LlavaStyle, Ours, Published
from .full_size import random_model
from .measuring import Stamps, machine, memory, now, reset_peak_memory, summary

PROMPT_TOKENS = 65  # of the paper's section 2.2
QUESTIONS = 8
GEMM_SIZE = 4096
PHOTO = (4000, 3000)
PLOTTED_TOKENS = 20  # of an answer whose cost is drawn


def step_linears(model: PheyeForConditionalGeneration) -> list[nn.Linear]:
    """The linears whose weights every decoding step reads: all but those of the image's keys and values."""
    linears = [module for module in model.pheye.language_model.modules() if isinstance(module, nn.Linear)]
    for block in model.pheye.cross_attention_blocks:
        linears += [block.to_q, block.to_out, block.mlp_in, block.mlp_out]
    return linears


def stream_weights(model: PheyeForConditionalGeneration):
    """The floor of a step: each weight times one row, and nothing else."""
    rows = {size: torch.ones(1, size, dtype=model.dtype, device=model.device) for size in _sizes(step_linears(model))}
    for linear in step_linears(model):
        F.linear(rows[linear.in_features], linear.weight)


def multiply_as_encoder(model: PheyeForConditionalGeneration):
    """The floor of encoding an image: the matrix products of vision tower and LoRA, and nothing else."""
    config, tower = model.config, model.pheye.vision_tower
    views, tokens = config.views_per_image, config.tokens_per_view
    linears = [module for module in tower.modules() if isinstance(module, nn.Linear)]
    options = {"dtype": model.dtype, "device": model.device}
    rows = {size: torch.ones(views * tokens, size, **options) for size in _sizes(linears)}
    for linear in linears:
        F.linear(rows[linear.in_features], linear.weight)
    patches = next(module for module in tower.modules() if isinstance(module, nn.Conv2d)).weight.flatten(1)
    F.linear(torch.ones(views * tokens, patches.shape[1], **options), patches)
    for lora, share in ((model.pheye.global_lora, 1), (model.pheye.local_lora, views - 1)):
        for module in lora.values():
            a, b = module.A.flatten(1), module.B.flatten(1)
            F.linear(F.linear(torch.ones(share * tokens, a.shape[1], **options), a), b)
    heads = config.vision_config.num_attention_heads
    query = torch.ones(views * heads, tokens, config.vision_config.hidden_size // heads, **options)
    for _ in range(config.vision_config.num_hidden_layers):
        torch.bmm(torch.bmm(query, query.transpose(1, 2)), query)


def _sizes(linears: list[nn.Linear]) -> set[int]:
    return {linear.in_features for linear in linears}


class Rounds:
    """Seconds of each part, over rounds in which all parts take turns."""

    def __init__(self, model: PheyeForConditionalGeneration, tokens: int, static: bool = False):
        self.model, self.device, self.tokens, self.static = model, model.device, tokens, static
        self.seconds = defaultdict(list)
        generator = torch.Generator().manual_seed(0)
        config = model.config
        size = config.vision_config.image_size
        self.pixels = torch.randn(1, config.views_per_image, 3, size, size, generator=generator).to(self.device)
        vocabulary = config.vocab_size - 1  # the last is LLaVA's image token
        self.ids = torch.randint(vocabulary, (QUESTIONS, PROMPT_TOKENS), generator=generator).to(self.device)
        self.features = model.get_image_features(self.pixels.to(model.dtype)).last_hidden_state

    def time(self, part: str, call, *args):
        start = now(self.device)
        call(*args)
        self.seconds[part].append(now(self.device) - start)

    def answer(self, name: str, design, rows: int = 1, **inputs) -> torch.Tensor:
        """Generate for `rows` prompts and return the new ids; times encode (given pixels), prefill, step and whole."""
        options = {"max_new_tokens": self.tokens, "min_new_tokens": self.tokens, "do_sample": False}
        if self.static and isinstance(design, Ours):
            options["cache_implementation"] = "static"  # with which `generate` compiles the steps on a GPU
        with Stamps(design.encoded, design.step, device=self.device) as stamps:
            ids = design.generate(input_ids=self.ids[:rows], **options, **inputs)
            intervals = stamps.intervals
        if "pixel_values" in inputs:
            self.seconds[f"{name} encode"].append(intervals.pop(0))  # ends where the prefill begins
        self.seconds[f"{name} prefill"].append(intervals[0])
        self.seconds[f"{name} step"].append(statistics.median(intervals[1:]))
        self.seconds[f"{name} whole"].append(stamps.times[-1] - stamps.times[0])
        return ids[:, -self.tokens :]

    def ask_singly(self, ours: Ours) -> list[torch.Tensor]:
        """Each question in a run of its own, the image included."""
        answers, all_ids = [], self.ids
        for self.ids in all_ids.split(1):
            answers.append(self.answer("single", ours, pixel_values=self.pixels))
        self.ids = all_ids
        self.seconds["8 single runs"].append(sum(self.seconds["single whole"][-QUESTIONS:]))
        return torch.cat(answers)

    def encoder_floors(self):
        self.time("encoder's matrix products", multiply_as_encoder, self.model)
        square = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=self.model.dtype, device=self.device)
        self.time("square product", torch.mm, square, square)


def photo() -> Image.Image:
    """A picture of 12 megapixels, smooth as photographs are."""
    coarse = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(PHOTO, Image.Resampling.BICUBIC)


@torch.no_grad()
def measure(model: PheyeForConditionalGeneration, args: argparse.Namespace, start_memory: int | None) -> dict:
    """All figures of one model."""
    result = {"memory": peak_memory(model, start_memory)}
    ours = Ours(model)
    others = {"published": Published(model), "LLaVA-style": LlavaStyle(model)} if args.compare else {}
    rounds = Rounds(model, args.tokens, args.static)
    images = rounds.features.repeat(args.batch, 1, 1)
    processor, picture = PheyeImageProcessor(tiles_per_side=model.config.tiles_per_side), photo()
    for _ in range(args.repeats):
        if not args.only_steps:
            rounds.time("preprocess a 12-megapixel picture", processor, picture)
            rounds.answer("ours", ours, pixel_values=rounds.pixels)
            rounds.encoder_floors()
        rounds.time("weight streaming", stream_weights, model)
        rounds.answer(f"{args.beams} beams", ours, image_hidden_states=rounds.features, num_beams=args.beams)
        rounds.answer("greedy", ours, image_hidden_states=rounds.features)
        rounds.time("weight streaming", stream_weights, model)
        rounds.answer(f"batch {args.batch}", ours, rows=args.batch, image_hidden_states=images)
        if args.questions:
            together = rounds.answer("8 questions", ours, rows=QUESTIONS, pixel_values=rounds.pixels)
        for name, design in others.items():
            rounds.answer(name, design, pixel_values=rounds.pixels)
    if args.questions:
        same = (rounds.ask_singly(ours) == together).all(dim=1)
        result["same answers of 8"] = int(same.sum())
    result["seconds"] = {part: summary(values) for part, values in rounds.seconds.items()}
    result["ratios"] = ratios(rounds.seconds, args)
    weight_bytes = sum(linear.weight.nbytes for linear in step_linears(model))
    result["rates"] = {"weight streaming, GB/s": weight_bytes / min(rounds.seconds["weight streaming"]) / 1e9}
    if not args.only_steps:
        rate = 2 * GEMM_SIZE**3 / min(rounds.seconds["square product"])
        result["rates"]["matrix products, GFLOP/s"] = rate / 1e9
    return result


def ratios(seconds: dict[str, list[float]], args: argparse.Namespace) -> dict[str, float]:
    """What the project promises, each a ratio of two medians of this run."""
    parts = {
        "step / weight streaming": ("greedy step", "weight streaming"),
        f"step, {args.beams} beams / greedy": (f"{args.beams} beams step", "greedy step"),
        "encode / its matrix products": ("ours encode", "encoder's matrix products"),
        "8 questions / 8 single runs": ("8 questions whole", "8 single runs"),
        "LLaVA-style prefill / ours": ("LLaVA-style prefill", "ours prefill"),
        "published step / ours": ("published step", "ours step"),
        "published encode / ours": ("published encode", "ours encode"),
        "encode / that of the bare ViT (LLaVA-style)": ("ours encode", "LLaVA-style encode"),
    }
    medians = {part: statistics.median(values) for part, values in seconds.items()}
    result = {name: medians[a] / medians[b] for name, (a, b) in parts.items() if a in medians and b in medians}
    result[f"throughput of batch {args.batch} / batch 1"] = (
        args.batch * medians["greedy step"] / medians[f"batch {args.batch} step"]
    )
    return result


def peak_memory(model: PheyeForConditionalGeneration, start: int | None) -> dict:
    """Peak of the first answer beyond the interpreter with its imports, over the size of the weights."""
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    size = model.config.vision_config.image_size
    pixels = torch.randn(1, model.config.views_per_image, 3, size, size, device=model.device)
    ids = torch.ones(1, PROMPT_TOKENS, dtype=torch.long, device=model.device)
    on_gpu = model.device.type == "cuda"
    reset_peak_memory()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    peak = torch.cuda.max_memory_allocated() if on_gpu else memory("VmHWM")
    if peak is None:
        return {"weights": weights}
    peak -= 0 if on_gpu else start
    return {"weights": weights, "peak": peak, "peak / weights": peak / weights}


@torch.no_grad()
def answer_costs(config: PheyeConfig, args: argparse.Namespace) -> Iterator[dict]:
    """Seconds of an answer for 1 to 5 crops a side, for each design."""
    for tiles in range(1, 6):
        config = PheyeConfig.from_dict(config.to_dict() | {"tiles_per_side": tiles})
        model = random_model(config, getattr(torch, args.dtype), args.device)
        rounds = Rounds(model, args.tokens)
        designs = {"ours": Ours(model), "published": Published(model), "LLaVA-style": LlavaStyle(model)}
        for _ in range(args.repeats):
            for name, design in designs.items():
                rounds.answer(name, design, pixel_values=rounds.pixels)
        for name in designs:
            parts = {p: statistics.median(rounds.seconds[f"{name} {p}"]) for p in ("encode", "prefill", "step")}
            cost = parts["encode"] + parts["prefill"] + (PLOTTED_TOKENS - 1) * parts["step"]
            yield {"tiles": tiles, "design": name, "seconds": cost, **parts}


def plot_costs(rows: list[dict], path: str, title: str):
    """One line per design; the share of the vision tower, which all have in common, dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name in dict.fromkeys(row["design"] for row in rows):
        own = [row for row in rows if row["design"] == name]
        axes.plot([row["tiles"] for row in own], [row["seconds"] for row in own], marker="o", label=name)
    ours = [row for row in rows if row["design"] == "ours"]
    tiles = [row["tiles"] for row in ours]
    axes.plot(tiles, [row["encode"] for row in ours], "k--", label="of which ours encodes the image")
    axes.set(
        xlabel="crops along each side (k)",
        ylabel=f"seconds per answer of {PLOTTED_TOKENS} tokens",
        title=title,
        xticks=tiles,
    )
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)


def print_tables(result: dict):
    print("| seconds | median | fastest | slowest | rounds |\n| --- | --- | --- | --- | --- |")
    for part, row in result["seconds"].items():
        print(f"| {part} | {row['median']:.3f} | {row['min']:.3f} | {row['max']:.3f} | {row['n']} |")
    print("\n| ratio of medians | |\n| --- | --- |")
    for name, ratio in result["ratios"].items():
        print(f"| {name} | {ratio:.3g} |")
    for name, value in {**result["memory"], **result["rates"]}.items():
        print(f"| {name} | {value / 1e9:.3g} GB |" if value > 1e6 else f"| {name} | {value:.3g} |")
    if "same answers of 8" in result:
        print(f"| same answers of 8 | {result['same answers of 8']} |")


def main(argv: list[str] | None = None, config: PheyeConfig | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="x4-672")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8, help="of an answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--attention", default="sdpa", help="such as eager, flex_attention or flash_attention_2")
    parser.add_argument("--static", action="store_true", help="static cache, compiled on a GPU")
    parser.add_argument("--only-steps", action="store_true", help="leave out preprocessing and encoding")
    parser.add_argument("--compare", action="store_true", help="measure the published way and a LLaVA-style model too")
    parser.add_argument("--questions", action="store_true", help="measure 8 questions on one image too")
    parser.add_argument("--plot", metavar="FILE", help="draw the cost of an answer for 1 to 5 crops a side instead")
    args = parser.parse_args(argv)
    start_memory = memory("VmRSS")
    config = config or PheyeConfig.from_variant(args.variant)

    print(f"{args.variant}, {args.dtype}; {machine(args.device)}\n")
    if args.plot:
        rows = []
        for row in answer_costs(config, args):
            rows.append(row)
            print(" | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
        plot_costs(rows, args.plot, f"Pheye-{args.variant[:2]}, {args.dtype}")
        result = {"answer_costs": rows}
    else:
        model = random_model(config, getattr(torch, args.dtype), args.device)
        model.set_attn_implementation(args.attention)
        result = measure(model, args, start_memory)
        print_tables(result)
    print(json.dumps({"benchmark": "generation", **vars(args), "machine": machine(args.device), **result}))


if __name__ == "__main__":
    main()
