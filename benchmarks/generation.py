"""How fast a Pheye of full size answers, beside the floors that the hardware sets.

    python -m pheye.benchmarks.generation --variant x4-672 [--dtype bfloat16] [--beams 4] [--batch 8] [--device cpu]
        [--compare] [--compile] [--static] [--plot FILE | --branch T B L | --budget LAYER ... [--joint]]

Random weights, made straight in their dtype. Parts are timed by stamping the clock at their borders (the end of the
vision tower, each step's logits), all in one process and in turn; medians over `--repeats` rounds are printed as a
table and, last, as one line of JSON. A first round that compiles, and on a GPU chooses kernels, does not count.
`--compare` adds the published way of computing and a LLaVA-style model of the same parts (see designs.py), `--compile`
a compiled vision tower, `--static` answers with a static cache, whose steps are compiled on a GPU. `--plot` draws
instead what an answer costs against the number of crops. `--branch` measures instead what encoding costs with
ConvNeXts of these sizes as high-resolution branch (see branch.py). `--budget` measures instead what reading an image
costs with none, one, ... of the self-attention blocks before these layers (with `--joint`, of these layers as joint
ones), beside plain Pheye, the LLaVA-style model, and that with half of its visual tokens; and a batch of mixed budgets
(see budgets.py).
"""

import argparse
import copy
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LogitsProcessor, LogitsProcessorList

from pheye import PheyeConfig, PheyeForConditionalGeneration, PheyeImageProcessor

from ..common.command import Parser
from ..common.machine import machine, memory, reset_peak_memory
from .branch import branch_costs, print_costs
from .budgets import budget_costs, print_budgets
from .designs import LlavaStyle, Ours, Published
from .full_size import CONVNEXT_SIZES, chosen_config, random_model
from .measuring import Stamps, now, summary

PROMPT_TOKENS = 65  # of the paper's section 2.2
QUESTIONS = 8
GEMM_SIZE = 4096
GEMMS = 10  # in a row, because a GPU takes about as long to begin one as to finish it
COPIED_BYTES = 1 << 30  # more than any cache holds
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


class StepClock(LogitsProcessor):
    """The moments at which a step's logits are there, seen from outside of what `generate` may have compiled."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(now(self.device))
        return scores


class Rounds:
    """Seconds of each part, over rounds in which all parts take turns."""

    def __init__(self, model: PheyeForConditionalGeneration, tokens: int, rows: int = 1):
        self.model, self.device, self.tokens = model, model.device, tokens
        self.seconds = defaultdict(list)
        generator = torch.Generator().manual_seed(0)
        config = model.config
        size = config.vision_config.image_size
        self.pixels = torch.randn(1, config.views_per_image, 3, size, size, generator=generator).to(self.device)
        vocabulary = config.vocab_size - 1  # the last is LLaVA's image token
        rows = max(rows, QUESTIONS)
        self.ids = torch.randint(vocabulary, (rows, PROMPT_TOKENS), generator=generator).to(self.device)
        self.features = model.get_image_features(self.pixels.to(model.dtype)).last_hidden_state
        self.square = torch.randn(GEMM_SIZE, GEMM_SIZE, generator=generator).to(self.device, model.dtype)
        self.copied = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=self.device)
        self.copy = torch.empty_like(self.copied)

    def time(self, part: str, call, *args):
        start = now(self.device)
        call(*args)
        self.seconds[part].append(now(self.device) - start)

    def answer(self, name: str, design, rows: int = 1, **inputs) -> torch.Tensor:
        """Generate for `rows` prompts and return the new ids; times encode (given pixels), prefill, step and whole."""
        options = {"max_new_tokens": self.tokens, "min_new_tokens": self.tokens, "do_sample": False}
        clock = StepClock(self.device)
        with Stamps(design.encoded, device=self.device) as stamps:
            options["logits_processor"] = LogitsProcessorList([clock])
            ids = design.generate(input_ids=self.ids[:rows], **options, **inputs)
        stamps.times += clock.times
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
        for self.ids in all_ids[:QUESTIONS].split(1):
            answers.append(self.answer("single", ours, pixel_values=self.pixels))
        self.ids = all_ids
        self.seconds["8 single runs"].append(sum(self.seconds["single whole"][-QUESTIONS:]))
        return torch.cat(answers)

    def encode(self, tower: nn.Module):
        self.model.pheye.vision_tower = tower
        self.model.get_image_features(self.pixels.to(self.model.dtype))

    def floors(self):
        self.time("encoder's matrix products", multiply_as_encoder, self.model)
        self.time("square products", self._multiply_squares)
        self.time("copy", self.copy.copy_, self.copied)

    def _multiply_squares(self):
        for _ in range(GEMMS):
            torch.mm(self.square, self.square)


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
    rounds = Rounds(model, args.tokens, max(args.batch))
    processor, picture = PheyeImageProcessor(tiles_per_side=model.config.tiles_per_side), photo()
    towers = {"": model.pheye.vision_tower}
    if args.compile:
        towers[", compiled tower"] = copy.copy(model.pheye.vision_tower)  # the same modules, called another way
        mode = "reduce-overhead" if model.device.type == "cuda" else None  # replays CUDA graphs
        towers[", compiled tower"].compile(dynamic=False, mode=mode)
    caches = {"": {}, **({", static cache": {"cache_implementation": "static"}} if args.static else {})}
    warm_up = int(args.compile or args.static or model.device.type == "cuda")
    for number in range(warm_up + args.repeats):
        if number == warm_up:
            rounds.seconds.clear()
        if not args.only_steps:
            rounds.time("preprocess a 12-megapixel picture", processor, picture)
            for name, tower in towers.items():
                rounds.time(f"encode{name}", rounds.encode, tower)
            rounds.encode(towers[""])
            rounds.answer("ours", ours, pixel_values=rounds.pixels)
            rounds.floors()
        rounds.time("weight streaming", stream_weights, model)
        rounds.answer(f"{args.beams} beams", ours, image_hidden_states=rounds.features, num_beams=args.beams)
        for name, cache in caches.items():
            rounds.answer(f"greedy{name}", ours, image_hidden_states=rounds.features, **cache)
        rounds.time("weight streaming", stream_weights, model)
        for batch in args.batch:
            images = rounds.features.expand(batch, -1, -1)
            for name, cache in caches.items():
                rounds.answer(f"batch {batch}{name}", ours, rows=batch, image_hidden_states=images, **cache)
        if args.questions:
            together = rounds.answer("8 questions", ours, rows=QUESTIONS, pixel_values=rounds.pixels)
        for name, design in others.items():
            rounds.answer(name, design, pixel_values=rounds.pixels)
    if args.questions:
        same = (rounds.ask_singly(ours) == together).all(dim=1)
        result["same answers of 8"] = int(same.sum())
    result["seconds"] = {part: summary(values) for part, values in rounds.seconds.items()}
    result["ratios"] = ratios(rounds.seconds, args)
    result["rates"] = rates(model, rounds.seconds)
    return result


def rates(model: PheyeForConditionalGeneration, seconds: dict[str, list[float]]) -> dict[str, float]:
    """What the hardware does at best, and the shares of it that decoding and encoding reach."""
    weights = sum(linear.weight.nbytes for linear in step_linears(model))
    result = {"weight streaming, GB/s": weights / min(seconds["weight streaming"]) / 1e9}
    if "copy" not in seconds:
        return result
    copied = 2 * COPIED_BYTES / min(seconds["copy"])  # read and written
    multiplied = GEMMS * 2 * GEMM_SIZE**3 / min(seconds["square products"])
    result |= {"copy, GB/s": copied / 1e9, "square products, GFLOP/s": multiplied / 1e9}
    with FlopCounterMode(display=False) as counter:
        multiply_as_encoder(model)
    for part, values in seconds.items():
        name = part.removesuffix(" step")
        if name.startswith("greedy") and part.endswith(" step"):
            result[f"step / weights at the copy's rate, {name}"] = statistics.median(values) * copied / weights
        elif part.startswith("encode") and "products" not in part:
            share = counter.get_total_flops() / multiplied / statistics.median(values)
            result[f"share of the square products' rate, {part}"] = share
    return result


def ratios(seconds: dict[str, list[float]], args: argparse.Namespace) -> dict[str, float]:
    """What the project promises, each a ratio of two medians of this run."""
    parts = {
        "step / weight streaming": ("greedy step", "weight streaming"),
        f"step, {args.beams} beams / greedy": (f"{args.beams} beams step", "greedy step"),
        "encode / its matrix products": ("encode", "encoder's matrix products"),
        "encode, compiled tower / its matrix products": ("encode, compiled tower", "encoder's matrix products"),
        "8 questions / 8 single runs": ("8 questions whole", "8 single runs"),
        "LLaVA-style prefill / ours": ("LLaVA-style prefill", "ours prefill"),
        "published step / ours": ("published step", "ours step"),
        "published encode / ours": ("published encode", "ours encode"),
        "encode / that of the bare ViT (LLaVA-style)": ("ours encode", "LLaVA-style encode"),
        "step, static cache / step": ("greedy, static cache step", "greedy step"),
    }
    medians = {part: statistics.median(values) for part, values in seconds.items()}
    result = {name: medians[a] / medians[b] for name, (a, b) in parts.items() if a in medians and b in medians}
    for batch in args.batch:
        throughput = batch * medians["greedy step"] / medians[f"batch {batch} step"]
        result[f"throughput of batch {batch} / batch 1"] = throughput
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


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options; those without effect beside others are refused."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="x4-672", help="or a model's folder, or toy, to try the command")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[8], help="images at once; several are measured in turn"
    )
    parser.add_argument("--tokens", type=int, default=8, help="of an answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--attention", default="sdpa", help="such as eager, flex_attention or flash_attention_2")
    parser.add_argument("--compile", action="store_true", help="measure a compiled vision tower too")
    parser.add_argument("--static", action="store_true", help="measure a static cache too, compiled on a GPU")
    parser.add_argument("--only_steps", action="store_true", help="leave out preprocessing and encoding")
    parser.add_argument("--compare", action="store_true", help="measure the published way and a LLaVA-style model too")
    parser.add_argument("--questions", action="store_true", help="measure 8 questions on one image too")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--plot", metavar="FILE", help="draw the cost of an answer for 1 to 5 crops a side instead")
    instead.add_argument(
        "--branch",
        nargs="+",
        choices=CONVNEXT_SIZES,
        help="measure encoding with a ConvNeXt of these sizes as high-resolution branch instead",
    )
    instead.add_argument(
        "--budget",
        nargs="+",
        type=int,
        metavar="LAYER",
        help="measure budgets with self-attention blocks before these layers, ascending, instead",
    )
    parser.add_argument("--joint", action="store_true", help="let --budget name joint layers of the language model")
    args = parser.parse_args(argv)
    of_the_whole = ("beams", "attention", "compile", "static", "only_steps", "compare", "questions")
    idle = [f"--{name}" for name in of_the_whole if getattr(args, name) != parser.get_default(name)]
    if idle and (args.plot or args.branch or args.budget):
        parser.error(f"{', '.join(idle)} cannot be with --plot, --branch or --budget")
    if args.only_steps and args.compile:
        parser.error("--compile measures encoding, which --only_steps leaves out")
    if args.joint and not args.budget:
        parser.error("--joint needs --budget")
    return args


def main(argv: list[str] | None = None, config: PheyeConfig | None = None):
    args = parse(argv)
    start_memory = memory("VmRSS")
    config = config or chosen_config(args.variant)

    print(f"{args.variant}, {args.dtype}; {machine(args.device)}\n")
    if args.plot:
        rows = []
        for row in answer_costs(config, args):
            rows.append(row)
            print(" | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
        plot_costs(rows, args.plot, f"Pheye-{args.variant[:2]}, {args.dtype}")
        result = {"answer_costs": rows}
    elif args.branch:
        result = {"branches": {}}
        for convnext in args.branch:
            costs = branch_costs(config, convnext, getattr(torch, args.dtype), args.device, args.repeats)
            print_costs(convnext, costs)
            result["branches"][convnext] = costs
    elif args.budget:
        options = {"repeats": args.repeats, "text_tokens": PROMPT_TOKENS, "tokens": args.tokens}
        kind, dtype = "joint" if args.joint else "block", getattr(torch, args.dtype)
        result = budget_costs(config, args.budget, kind, dtype, args.device, batch=max(args.batch), **options)
        print_budgets(result)
    else:
        model = random_model(config, getattr(torch, args.dtype), args.device)
        model.set_attn_implementation(args.attention)
        result = measure(model, args, start_memory)
        print_tables(result)
    print(json.dumps({"benchmark": "generation", **vars(args), "machine": machine(args.device), **result}))


if __name__ == "__main__":
    main()
