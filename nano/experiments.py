"""The paper's claims at a size anyone can run: the same frozen parts, joined and trained in several ways.

    python -m pheye.nano.experiments --start nano/stage2 --ways full k1 one_lora no_lora \
        --data nano/tasks/data.jsonl --output nano/views [--steps 500] [--seeds 2] [--count 500]
    python -m pheye.nano.experiments --vision nano/vision/vision --language nano/language/language \
        --tiles-per-side 1 --ways no_lora every4th prefix --data nano/one/data.jsonl --output nano/blocks

Ways that differ in what the views go through begin with the blocks of `--start`, without its LoRA, and are the last
stage; ways that differ in the blocks begin with new ones, here on pictures for one crop (`draw_data --stage tasks
--tiles-per-side 1`). All take as many steps, with a seed on the same samples, and answer the same held-out
questions. The output folder gets a result per run and, from all of them, experiments.md. A run that has a result is
not done again.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
)

from .. import PheyeForConditionalGeneration, PheyeImageProcessor, PheyeProcessor
from ..answering.engine import answer
from ..common.command import default_device
from ..common.files import write_atomically
from ..common.machine import machine
from ..training.collator import IGNORED, PheyeCollator
from ..training.formats import Source
from ..training.mixture import Mixture
from ..training.trained import choose_trained
from .crops import more_tiles
from .held_out import SHAPES, SIGN, Sample, held_out_samples, percent, requests_of, scores

WARMUP = 0.1  # share of the steps
TOKENS = 16  # of an answer
NO_LORA = {"global_lora_rank": 0, "local_lora_rank": 0}
MATTER = "start", "vision", "language", "tiles_per_side", "data", "steps", "batch_size", "rate", "count"
COSTS = "seconds_per_step", "seconds_per_question"


@dataclass(frozen=True)
class Way:
    """One way to join the two frozen parts; the defaults are Pheye-nano's own."""

    title: str
    tiles_per_side: int | None = None  # by default those of the command
    interval: int = 2
    lora_sets: int = 2
    is_prefix: bool = False

    @property
    def needs_new_blocks(self) -> bool:
        return self.is_prefix or self.interval != 2


WAYS = {
    "full": Way("Pheye-nano: blocks before every 2nd layer, two LoRA sets"),
    "k1": Way("k = 1", tiles_per_side=1),
    "one_lora": Way("one LoRA set for all views", lora_sets=1),
    "no_lora": Way("no LoRA", lora_sets=0),
    "every4th": Way("no LoRA, blocks before every 4th layer", interval=4, lora_sets=0),
    "prefix": Way("LLaVA-style prefix, no LoRA; its language model trains, too", lora_sets=0, is_prefix=True),
}


class Prefix(nn.Module):
    """A LLaVA-style model: all tokens of all views stand before the text, brought to its width by two linears.

    As in LLaVA's recipe the language model trains with them, and the vision tower is frozen.
    """

    def __init__(self, vision_tower: CLIPVisionModel, language_model: PreTrainedModel):
        super().__init__()
        self.vision_tower, self.language_model = vision_tower.requires_grad_(False), language_model
        width, text_width = vision_tower.config.hidden_size, language_model.config.hidden_size
        self.projector = nn.Sequential(nn.Linear(width, text_width), nn.GELU(), nn.Linear(text_width, text_width))

    @property
    def device(self) -> torch.device:
        return self.language_model.device

    def joined(self, input_ids, attention_mask, pixel_values) -> dict[str, torch.Tensor]:
        """Embeddings (B, V * N + T, D) and their mask."""
        states = self.vision_tower(pixel_values.flatten(0, 1)).last_hidden_state  # (B * V, N, D)
        prefix = self.projector(states.unflatten(0, (len(input_ids), -1)).flatten(1, 2))
        embeddings = torch.cat([prefix, self.language_model.get_input_embeddings()(input_ids)], 1)
        mask = torch.cat([attention_mask.new_ones(prefix.shape[:2]), attention_mask], 1)
        return {"inputs_embeds": embeddings, "attention_mask": mask}

    def forward(self, input_ids, attention_mask, pixel_values, labels):
        inputs = self.joined(input_ids, attention_mask, pixel_values)
        ignored = labels.new_full((len(labels), inputs["inputs_embeds"].shape[1] - labels.shape[1]), IGNORED)
        return self.language_model(**inputs, labels=torch.cat([ignored, labels], 1))

    def generate(self, input_ids, attention_mask, pixel_values, **kwargs) -> torch.Tensor:
        ids = self.language_model.generate(**self.joined(input_ids, attention_mask, pixel_values), **kwargs)
        return torch.cat([input_ids, ids], 1)


def build(way: Way, args: argparse.Namespace, seed: int) -> tuple[nn.Module, PheyeProcessor]:
    """A model with its trained parts chosen, and its processor."""
    torch.manual_seed(seed)
    tiles_per_side = way.tiles_per_side or args.tiles_per_side
    tokenizer = AutoTokenizer.from_pretrained(args.start or args.language)
    processor = PheyeProcessor(PheyeImageProcessor(tiles_per_side=tiles_per_side), tokenizer)
    if args.start:
        start = PheyeForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32, **NO_LORA)
        model = more_tiles(start, tiles_per_side, with_lora=way.lora_sets > 0)
    elif way.is_prefix:
        vision_tower = CLIPVisionModel.from_pretrained(args.vision)
        return Prefix(vision_tower, AutoModelForCausalLM.from_pretrained(args.language)), processor
    else:
        model = PheyeForConditionalGeneration.from_pretrained_parts(
            args.vision,
            args.language,
            tiles_per_side=tiles_per_side,
            cross_attention_interval=way.interval,
            **({} if way.lora_sets else NO_LORA),
        )
    if way.lora_sets == 1:
        model.pheye.global_lora = model.pheye.local_lora
    choose_trained(model)
    return model, processor


def train(model: nn.Module, loader: DataLoader, steps: int, rate: float, device: str) -> tuple[float, float]:
    """Train for `steps` steps on what requires gradients; the median seconds of a step, and the mean loss of the last
    tenth of them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    model.train()
    batches, seconds, losses = iter(loader), [], []
    for _ in tqdm(range(steps), unit=" steps"):
        batch = next(batches)
        names = ("input_ids", "attention_mask", "pixel_values", "labels")
        batch = {name: batch[name].to(device) for name in names}
        begin = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), statistics.mean(losses[-math.ceil(steps / 10) :])


def run(name: str, seed: int, samples: list[Sample], args: argparse.Namespace) -> dict:
    """Train and ask one way with one seed; its result, also in a file, from which it is read the next time."""
    folder = args.output / f"{name}-{seed}"
    settings = {key: str(value) for key, value in vars(args).items() if key in MATTER}
    if (folder / "result.json").is_file():
        result = json.loads((folder / "result.json").read_text())
        changed = [key for key in MATTER if result["settings"][key] != settings[key]]
        if changed:
            raise ValueError(
                f"{folder} has the result of other settings ({changed[0]} was {result['settings'][changed[0]]}, now "
                f"{settings[changed[0]]}). Use the same, or another --output."
            )
        return result
    model, processor = build(WAYS[name], args, seed)
    model.to(args.device)
    data = Mixture([Source(str(args.data), turns=None)], seed)
    if len(data) < args.batch_size * args.steps:
        needed = args.batch_size * args.steps
        raise ValueError(f"{args.data} has {len(data)} samples; {args.steps} steps take {needed}.")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    collator = PheyeCollator(processor)
    loader = DataLoader(data, args.batch_size, sampler=order, collate_fn=collator, num_workers=args.workers)
    seconds, loss = train(model, loader, args.steps, args.rate, args.device)
    model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    rows = answer(
        lambda: (model, processor),
        requests_of(samples, None),
        folder / "answers.jsonl",
        batch_size=8,
        generate_kwargs={"max_new_tokens": TOKENS, "do_sample": False},
        settings={"way": name, "seed": seed, "steps": args.steps, "time": time.time()},
    )
    found = scores([json.loads(line) for line in rows.read_text().splitlines()])
    result = {
        "way": name,
        "seed": seed,
        "settings": settings,
        "loss": round(loss, 4),
        "seconds_per_step": round(seconds, 3),
        "seconds_per_question": round((time.perf_counter() - begin) / (2 * len(samples)), 3),
        "scores": found,
    }
    write_atomically(folder / "result.json", [json.dumps(result, indent=1).encode() + b"\n"])
    return result


REPORT = """# Pheye-nano in several ways

`python -m pheye.nano.experiments`, {steps} steps of {batch} samples of {data} at a learning rate of {rate},
from {start}; {seeds} seeds (mean, and each), {count} held-out pictures with two questions each, k = {tiles};
{machine}. Signs are read if no character is wrong: all, and by tertile of letter height. The loss is the mean of the
last tenth of the steps.

| way | signs read, % | small, medium, large | characters wrong, % | shapes, % | loss | s per step | s per question |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}
"""


def cell(values: list[float], shown: Callable[[float], str] = percent) -> str:
    """The mean of the seeds, and each."""
    return f"{shown(statistics.mean(values))} ({', '.join(map(shown, values))})"


def report(results: list[dict], args: argparse.Namespace) -> str:
    lines = []
    for name, way in WAYS.items():
        runs = [result for result in results if result["way"] == name]
        if runs:
            signs = [one["scores"][SIGN] for one in runs]
            by_tertile = [one["scores"]["by_tertile"] for one in runs]
            cells = [
                way.title,
                cell([one["exact"] for one in signs]),
                ", ".join(
                    percent(statistics.mean(one[size]["exact"] for one in by_tertile)) for size in by_tertile[0]
                ),
                cell([one["character_error"] for one in signs]),
                cell([one["scores"][SHAPES]["exact"] for one in runs]),
                cell([one["loss"] for one in runs], "{:.2f}".format),
                *(f"{statistics.mean(one[cost] for one in runs):.2f}" for cost in COSTS),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return REPORT.format(
        steps=args.steps,
        batch=args.batch_size,
        data=f"{args.data.parent.name}/{args.data.name}",
        rate=args.rate,
        start=f"the blocks of {args.start.name}" if args.start else "new blocks",
        tiles=args.tiles_per_side,
        seeds=args.seeds,
        count=args.count,
        machine=machine(args.device),
        rows="\n".join(lines),
    )


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="a Pheye; its LoRA is left out")
    parser.add_argument("--vision", type=Path, metavar="FOLDER", help="in place of --start, for new blocks")
    parser.add_argument("--language", type=Path, metavar="FOLDER", help="the same")
    parser.add_argument("--tiles-per-side", type=int, choices=[1, 3], default=3, help="of the way that is full")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="by default all that can be")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--count", type=int, default=500, help="held-out pictures")
    parser.add_argument("--workers", type=int, default=2, help="processes that open pictures")
    parser.add_argument("--device", default=default_device())
    args = parser.parse_args(argv)
    if (args.start is None) == (args.vision is None or args.language is None):
        parser.error("give either --start, or both --vision and --language")
    possible = [name for name, way in WAYS.items() if not (args.start and way.needs_new_blocks)]
    args.ways = args.ways or possible
    if not set(args.ways) <= set(possible):
        parser.error(f"with --start only {', '.join(possible)}; the other ways need new blocks")
    samples = held_out_samples(args.count, zoom=3 // args.tiles_per_side)
    results = [run(name, seed, samples, args) for seed in range(args.seeds) for name in args.ways]
    write_atomically(args.output / "experiments.md", [report(results, args).encode()])


if __name__ == "__main__":
    main()
