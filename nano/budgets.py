"""What refining the image brings to Pheye-nano: blocks over the image, budgets and a router, trained and asked.

    python -m pheye.nano.budgets --model checkpoints/pheye-nano --data nano-runs/mixture.json --output OUTPUT
        [--steps 300] [--seeds 2] [--count 1000] [--fine 300] [--ways plain universal]

Each way takes as many steps from the same model, with a seed on the same pictures, and answers the same held-out
questions at each of its budgets. Features of pictures are kept in OUTPUT, and used up to four times, as `nano.replay`
does. Other held-out pictures tell which budget their questions need, and routers learn from these. OUTPUT gets a
folder for each run and, from all of them, budgets.md and budgets.png. A run that has a result is not done again.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .. import PheyeConfig, PheyeForConditionalGeneration, PheyeProcessor
from ..answering.engine import generate
from ..answering.rows import Request
from ..common.command import Parser, at_least, exit_status
from ..common.machine import machine
from ..training.mixture import Mixture, read_mixture
from ..training.router import train_router
from ..training.vision_budgets import label_by_score
from ..visor_pheye import PheyeRouter
from .comparing.budget_tables import kind_of, scores_of, write_report
from .comparing.connectors import views_apart
from .learning.checkpoints import claim
from .learning.features import BATCH, FeatureStore, kept_image
from .learning.kept_training import add_options, once, opened, train, weights_of
from .scoring.held_out import FINE, MAIN, HeldOutPicture, held_out_pictures, requests_of

LAYERS = 2, 4  # of six, before whose cross-attention blocks the image is refined
BUDGETS = (), LAYERS[:1], LAYERS
ROUTER_SIZE = 48  # a quarter of the language model's width
TOKENS = 16  # of an answer, at most


@dataclass(frozen=True)
class Way:
    """budgets: of which each step draws one; none for a model without such blocks. is_joined: whether tokens of
    different views see each other there."""

    title: str
    budgets: tuple[tuple[int, ...], ...] = ()
    is_joined: bool = True

    @property
    def has_router(self) -> bool:
        return len(self.budgets) > 1 and self.is_joined


WAYS = {
    "plain": Way("no block over the image"),
    "universal": Way("two blocks, each step draws a budget", BUDGETS),
    "one_alone": Way("one block, at this budget only", BUDGETS[1:2]),
    "two_alone": Way("two blocks, at this budget only", BUDGETS[2:]),
    "views_apart": Way("two blocks in which each view sees itself alone, each step draws a budget", BUDGETS, False),
}


def build(way: Way, folder: Path, seed: int, device: str) -> PheyeForConditionalGeneration:
    """The model in `folder` with new blocks, its trained parts chosen."""
    fields = {"self_attention_layers": list(way.budgets[-1]) if way.budgets else []}
    fields |= {"self_attention_budgets": [list(budget) for budget in way.budgets]}
    fields |= {"router_size": ROUTER_SIZE} if way.has_router else {}
    # The weights of a block over the image, 2570 x 2570, do not fit a cache (`kept_training.PART`).
    model = opened(folder, device, seed, attn_implementation="sdpa", **fields)
    return model if way.is_joined else views_apart(model)


# --- Asking ---


class Asking:
    """Questions about held-out pictures, each at every budget of a model.

    `rows`: one for each question, with `answers`, cheapest budget first; `states`: what a router reads for each;
    `seconds` and `gflop`: what an answer, and the first token of one, takes by budget, without the vision tower.
    """

    def __init__(self, model: PheyeForConditionalGeneration, processor: PheyeProcessor, features: Path):
        self.model, self.processor, self.features = model, processor, features
        self.budgets: list[int | None] = [*range(len(model.config.self_attention_budgets))] or [None]
        self.rows: list[dict] = []
        self.states: list[torch.Tensor] = []
        self.seconds = [0.0] * len(self.budgets)
        self.gflop: list[float] = []

    @torch.no_grad()
    def seen(self, pictures: list[HeldOutPicture]) -> torch.Tensor:
        """What the text reads of some pictures, (B, N, D); their features are kept."""
        file = self.features / f"{pictures[0].letters}-{pictures[0].index:06d}.safetensors"
        image = kept_image(file, self.model, self.processor, lambda: [picture.image() for picture in pictures])
        return image["image_hidden_states"]

    def generate(self, seen: torch.Tensor, questions: list[str], budget: int | None, tokens: int) -> list[str]:
        options = {"max_new_tokens": tokens, "do_sample": False}
        options |= {} if budget is None else {"vision_budget": budget}
        conversations = [[{"role": "user", "content": question}] for question in questions]
        found = generate(self.model, self.processor, conversations, {"image_hidden_states": seen}, options)
        return [answer.strip() for answer, _ in found]

    def ask(self, pictures: list[HeldOutPicture]):
        """Ask all questions about `pictures`, which are of one set."""
        requests = requests_of(pictures, None)
        for first in range(0, len(pictures), BATCH):
            chosen = pictures[first : first + BATCH]
            seen, ids = self.seen(chosen), {str(picture.index) for picture in chosen}
            asked = [request for request in requests if request.id.partition("-")[0] in ids]
            for kind in dict.fromkeys(request.fields["kind"] for request in asked):
                self.ask_alike(
                    seen, [request for request in asked if request.fields["kind"] == kind], chosen[0].letters
                )

    def ask_alike(self, seen: torch.Tensor, requests: list[Request], letters: str):
        """Ask one question about each of some pictures."""
        questions, answers = [request.fields["question"] for request in requests], []
        if not self.gflop:
            self.gflop = [self.operations(seen[:1], questions[:1], budget) / 1e9 for budget in self.budgets]
        for place, budget in enumerate(self.budgets):
            began = time.perf_counter()
            answers.append(self.generate(seen, questions, budget, TOKENS))
            self.seconds[place] += time.perf_counter() - began
        for request, own in zip(requests, zip(*answers, strict=True), strict=True):
            self.rows.append({"id": f"{letters}-{request.id}", "letters": letters, **request.fields, "answers": own})
        if self.model.config.router_size:
            router = self.model.pheye.router
            hook = router.register_forward_pre_hook(lambda _, args: self.states.append(args[0].float().cpu()))
            self.generate(seen, questions, None, 1)
            hook.remove()

    def operations(self, seen: torch.Tensor, questions: list[str], budget: int | None) -> int:
        """Of reading encoded pictures and writing one token."""
        # The counter does not know the processor's own kernel for attention.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.generate(seen, questions, budget, 1)
        return counter.get_total_flops()


# --- Routers ---


def with_choices(asked: Asking, learnt: Asking, config: PheyeConfig, seed: int) -> list[dict]:
    """The rows of `asked`, each with what a router chose that learnt from those of `learnt` (`chosen`), and what
    another chose that learnt without questions of this one's kind (`chosen_unseen`)."""
    kinds = [kind_of(row) for row in learnt.rows]
    labels = torch.tensor([label_by_score(scores_of(row)) for row in learnt.rows])
    states, own_states = torch.cat(learnt.states), torch.cat(asked.states)

    def chosen(of_training: torch.Tensor) -> list[int]:
        torch.manual_seed(seed)
        router = PheyeRouter(config)
        options = {"epochs": 20, "learning_rate": 1e-3, "batch_size": 64, "seed": seed}
        train_router(router, states[of_training], labels[of_training], **options)
        with torch.no_grad():
            return router(own_states).argmax(dim=1).tolist()

    by_all = chosen(torch.ones(len(kinds), dtype=torch.bool))
    without = {kind: chosen(torch.tensor([other != kind for other in kinds])) for kind in dict.fromkeys(kinds)}
    return [
        {
            **row,
            "chosen": choice,
            "chosen_unseen": without[kind_of(row)][number] if kind_of(row) in without else choice,
        }
        for number, (row, choice) in enumerate(zip(asked.rows, by_all, strict=True))
    ]


# --- The command ---


def run(
    name: str,
    seed: int,
    output: Path,
    *,
    model: Path,
    store: FeatureStore,
    processor: PheyeProcessor,
    steps: int,
    rate: float,
    tested: list[list[HeldOutPicture]],
    routed: list[list[HeldOutPicture]],
    settings: dict,
    device: str,
) -> dict:
    """Train one way with one seed, and ask it about the sets `tested` and, for a router, `routed`."""
    way = WAYS[name]

    def trained_and_asked() -> tuple[dict, list[dict]]:
        trained = build(way, model, seed, device)
        found = train(trained, store, steps, rate, seed)
        asked, learnt = (Asking(trained, processor, output / "asked") for _ in range(2))
        for pictures in tested:
            asked.ask(pictures)
        found |= {"gflop": asked.gflop, "seconds": [spent / len(asked.rows) for spent in asked.seconds]}
        for pictures in routed if way.has_router else ():
            learnt.ask(pictures)
        return found, with_choices(asked, learnt, trained.config, seed) if way.has_router else asked.rows

    return {"way": name, "seed": seed, **once(output / f"{name}-{seed}", settings, trained_and_asked)}


def budgets(
    output: Path,
    *,
    model: Path,
    data: list[str],
    ways: list[str],
    steps: int,
    rate: float,
    seeds: int,
    count: int,
    fine: int,
    routed: int,
    device: str,
):
    """Run what has no result yet, and write the tables of all; the arguments are the command's options."""
    settings = {"model": model, "data": data, "steps": steps, "rate": rate, "count": count, "fine": fine}
    settings["routed"] = routed
    settings["weights"] = weights_of(model)
    claim(output, **settings)
    processor = PheyeProcessor.from_pretrained(model)
    store = FeatureStore(output / "features", Mixture(read_mixture(data, turns=None), 0), processor, BATCH, 0)
    (output / "asked").mkdir(exist_ok=True)
    tiles = PheyeConfig.from_pretrained(model).tiles_per_side
    tested, others = [], []
    for letters, number, more in ((MAIN, count, routed), (FINE, fine, round(routed * fine / count))):
        pictures = held_out_pictures(number + more, letters=letters, tiles_per_side=tiles)
        tested.append(pictures[:number])
        others.append(pictures[number:])
    options = {"model": model, "store": store, "processor": processor, "steps": steps, "rate": rate}
    options |= {"tested": tested, "routed": others, "settings": settings, "device": device}
    results = [run(name, seed, output, **options) for seed in range(seeds) for name in ways]
    write_report(results, {name: WAYS[name] for name in ways}, settings, machine(device), output)


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.budgets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, 300)
    parser.add_argument("--data", nargs="+", required=True, help="as the training command takes it")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="(default: all)")
    parser.add_argument("--count", type=at_least(3), default=1000, help="held-out pictures (default: %(default)s)")
    parser.add_argument("--fine", type=at_least(3), default=300, help="more, with fine letters (default: %(default)s)")
    parser.add_argument(
        "--routed", type=at_least(10), default=800, help="others, from which routers learn (default: %(default)s)"
    )
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(budgets, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
