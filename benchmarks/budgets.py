"""What each vision budget costs, beside plain Pheye and LLaVA-style models; run by `generation --budget`."""

import itertools
from collections import defaultdict

import torch

from pheye import PheyeConfig

from .complexity import counted_budgets
from .designs import PLAIN, Reading, budget_name, readings
from .full_size import random_model, with_budgets
from .measuring import busy, summary

PARTS = ("encode", "prefill", "with encoding", "step", "batch")


class Clock:
    """Seconds of calls, by name."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, defaultdict(list)

    def time(self, part: str, name: str, call, *args, **kwargs):
        start = busy(self.device)
        result = call(*args, **kwargs)
        self.seconds[part, name].append(busy(self.device) - start)
        return result

    def summaries(self, part: str) -> dict[str, dict]:
        return {name: summary(values) for (what, name), values in self.seconds.items() if what == part}

    def ratios(self, part: str, other: str) -> dict[str, dict]:
        """Of each round, to `other` in the same round."""
        base = self.seconds.get((part, other), [])
        return {
            name: summary([value / beside for value, beside in zip(values, base, strict=True)])
            for (what, name), values in self.seconds.items()
            if what == part and name != other
        }


def one_round(clock: Clock, designs: dict[str, Reading], ids: torch.Tensor, pixels: torch.Tensor, tokens: int):
    """Every design answers once; their further tokens take turns."""
    features, encoded, caches = {}, {}, {}
    for name, design in designs.items():
        if design.encode not in features:
            features[design.encode] = clock.time("encode", name, design.encode, pixel_values=pixels)
            encoded[design.encode] = clock.seconds["encode", name][-1]
        caches[name] = clock.time("prefill", name, design.prefill, ids, features[design.encode])
        clock.seconds["with encoding", name].append(encoded[design.encode] + clock.seconds["prefill", name][-1])
    for _ in range(tokens):
        for name, design in designs.items():
            clock.time("step", name, design.step, ids[:, :1], caches[name])


def mixed_round(clock: Clock, model, ids: torch.Tensor, features: torch.Tensor):
    """The prefill of a batch at each budget, and at all of them in turn; what the former predict of the latter."""
    budgets = range(len(model.config.self_attention_budgets))

    def prefill(vision_budget: int | torch.Tensor):
        model(ids, image_hidden_states=features, vision_budget=vision_budget, use_cache=True, logits_to_keep=1)

    for budget in budgets:
        clock.time("batch", budget_name(model.config, budget), prefill, budget)
    mixed = list(itertools.islice(itertools.cycle(budgets), len(ids)))
    clock.time("batch", "mixed", prefill, torch.tensor(mixed))
    alone = [clock.seconds["batch", budget_name(model.config, budget)][-1] / len(ids) for budget in mixed]
    clock.seconds["batch", "predicted"].append(sum(alone))


@torch.no_grad()
def budget_costs(
    config: PheyeConfig,
    layers: list[int],
    kind: str,
    dtype: torch.dtype,
    device: str,
    *,
    repeats: int,
    text_tokens: int,
    tokens: int,
    batch: int,
) -> dict:
    """Operations, seconds and ratios, for `config` with self-attention at `layers`.

    Args:
        kind: "block" or "joint".
        text_tokens: of a prompt.
        tokens: further ones that are timed in each round.
        batch: images in a batch with mixed budgets; 1 for none.
    """
    config = with_budgets(config, layers, kind)
    model = random_model(config, dtype, device)
    designs, size = readings(model), config.vision_config.image_size
    pixels = torch.randn(1, config.views_per_image, 3, size, size).to(model.device, dtype)
    ids = torch.randint(config.vocab_size - 1, (batch, text_tokens)).to(
        model.device
    )  # the last is LLaVA's image token
    features = model.get_image_features(pixels).last_hidden_state.repeat(batch, 1, 1)
    clock, warm_up = Clock(model.device), int(model.device.type == "cuda")
    for repeat in range(warm_up + repeats):
        if repeat == warm_up:
            clock.seconds.clear()
        one_round(clock, designs, ids[:1], pixels, tokens)
        if batch > 1:
            mixed_round(clock, model, ids, features)
    return {
        "operations": counted_budgets(config, text_tokens),
        "seconds": {part: clock.summaries(part) for part in PARTS},
        "step / plain": clock.ratios("step", PLAIN),
        "mixed / predicted": clock.ratios("batch", "predicted").get("mixed"),
    }


def print_budgets(costs: dict):
    seconds = costs["seconds"]
    print("| design | GFLOP: prefill | with encoding | seconds: prefill | with encoding | further token | / plain |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, operations in costs["operations"].items():
        prefill, whole = operations["prefill"] / 1e9, (operations["encode"] + operations["prefill"]) / 1e9
        times = " | ".join(_shown(seconds[part][name]) for part in ("prefill", "with encoding", "step"))
        ratio = _shown(costs["step / plain"][name]) if name != PLAIN else ""
        print(f"| {name} | {prefill:,.4g} | {whole:,.4g} | {times} | {ratio} |")
    if seconds["batch"]:
        print("\n| prefill of a batch | seconds |\n| --- | --- |")
        for name, row in seconds["batch"].items():
            print(f"| {name} | {_shown(row)} |")
        print(f"| mixed / predicted | {_shown(costs['mixed / predicted'])} |")
    print(flush=True)


def _shown(row: dict) -> str:
    return f"{row['median']:.3g} ({row['min']:.3g} to {row['max']:.3g})"
