"""How well Pheye-nano reads and counts, on drawn pictures with words, fonts and photographs that it never saw.

    python -m pheye.nano.evaluate --model FOLDER_OR_ID --output FOLDER [--count 1000] [--reduced 448 224]

writes into FOLDER the answers, nano.json, the tables nano.md and their plot nano.png: exact reading of the sign, share
of wrong characters, questions about shapes; the same by tertile of letter height, with the picture first reduced to
fewer pixels (the paper's Tables 1 and 2), and the attention on the global view by tertile (its Figure 4). The same
command goes on after a kill. Any Pheye trained on these pictures can be measured.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..answering.engine import answer, open_model
from ..common.command import Parser, add_model_options, at_least, default_device, exit_status
from ..common.files import write_atomically
from ..common.json_lines import read_rows
from ..common.machine import machine, versions
from ..evaluation.tertiles import TERTILES
from ..evaluation.word_attention import global_shares
from . import questions
from .held_out import (
    CAP_HEIGHTS,
    LETTERS,
    SEED,
    SHAPES,
    SIGN,
    HeldOutPicture,
    held_out_pictures,
    percent,
    requests_of,
    scores,
    tertiles_of,
)

LOOKED_AT = 300  # pictures whose attention is measured
TOKENS = 16  # of an answer, at most


# --- Tables and plot ---


def scores_table(found: dict) -> list[str]:
    """Markdown: what is asked, how often the answer is right, characters wrong."""
    lines = ["| question | asked | exactly right (95 % interval) | characters wrong |", "| --- | --- | --- | --- |"]
    titles = {SIGN: "what is written on the sign", SHAPES: "shapes, all questions"}
    for name in (SIGN, SHAPES, "how many", "is there", "what colour"):
        if name in found:
            one = found[name]
            low, high = map(percent, one["interval"])
            wrong = f"{percent(one['character_error'])} %" if name == SIGN else ""
            lines.append(
                f"| {titles.get(name, name)} | {one['questions']} | {percent(one['exact'])} % ({low} to {high}) "
                f"| {wrong} |"
            )
    return lines


def resolution_table(by_input: dict[str, dict]) -> list[str]:
    """Markdown: exact reading by tertile of letter height, a row for each input."""
    lines = ["| input | all | small letters | medium | large |", "| --- | --- | --- | --- | --- |"]
    for name, found in by_input.items():
        cells = [percent(found[SIGN]["exact"]), *(percent(found["by_tertile"][group]["exact"]) for group in TERTILES)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def attention_table(attention: dict) -> list[str]:
    """Markdown: mean share of attention on the global view, a column for each block."""
    layers = attention["layers"]
    lines = [f"| letters | {' | '.join(f'layer {layer}' for layer in layers)} |", "| --- " * (len(layers) + 1) + "|"]
    for group in attention["tertiles"]:
        lines.append(f"| {group['tertile']} | {' | '.join(percent(share) for share in group['global_share'])} |")
    return lines


def plot(result: dict, path: Path):
    """Exact reading by tertile and input; attention on the global view by block and tertile."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    reading, looking = figure.subplots(1, 2)
    for name, found in result["inputs"].items():
        shares = [100 * found["by_tertile"][group]["exact"] for group in TERTILES]
        reading.plot(TERTILES, shares, marker="o", label=name)
    reading.set(xlabel="height of letters", ylabel="words read exactly in %", ylim=(0, 100))
    reading.legend(title="input")
    for group in result["attention"]["tertiles"]:
        shares = [100 * share for share in group["global_share"]]
        looking.plot(result["attention"]["layers"], shares, marker="o", label=group["tertile"])
    looking.set_xticks(result["attention"]["layers"])
    looking.set(xlabel="layer of the language model behind the block", ylabel="attention on the global view in %")
    looking.legend(title="height of letters")
    figure.savefig(path, dpi=120)


REPORT = """# Pheye-nano on held-out pictures

`python -m pheye.nano.evaluate --model {model} --output FOLDER --count {count}`; {machine}.

Signs with one word, real or made-up, of {letters[0]} to {letters[1]} letters; capitals of {lowest} to {highest} % of
the picture's height. Words, fonts and photographs that training never showed. Intervals are over the pictures
(bootstrap), not over trainings.

{scores}

## Resolution

Words read exactly, in %, by tertile of letter height: the picture in full, or first reduced to fewer pixels.

{resolution}

## Attention on the global view

Mean share, in %, per block while the answer is written; the first {looked_at} pictures.

{attention}

![Reading by resolution, and attention](nano.png)
"""


def report(result: dict) -> str:
    return REPORT.format(
        model=result["model"],
        count=result["pictures"],
        machine=result["machine"],
        letters=LETTERS,
        lowest=percent(CAP_HEIGHTS[0]),
        highest=percent(CAP_HEIGHTS[1]),
        scores="\n".join(scores_table(result["inputs"]["full"])),
        resolution="\n".join(resolution_table(result["inputs"])),
        looked_at=min(LOOKED_AT, result["pictures"]),
        attention="\n".join(attention_table(result["attention"])),
    )


# --- The command ---


def looked_at(pictures: Sequence[HeldOutPicture]) -> Iterator[dict]:
    """Pictures for the attention, drawn one at a time."""
    for picture, group in zip(pictures, tertiles_of(pictures), strict=True):
        yield {"_line": picture.index, "image": picture.image(), "prompt": questions.SIGN, "tertile": group}


def evaluate(
    model: str,
    output: Path,
    *,
    count: int,
    reduced: list[int],
    batch_size: int,
    workers: int,
    dtype: str,
    device: str | None,
    revision: str | None,
):
    """Write answers, scores, tables and plot; the arguments are the command's options."""
    device = device or default_device()
    pictures = held_out_pictures(count)
    identity, load = open_model(model, revision, dtype, device)
    settings = {"model": model, "files of the model": identity, "dtype": dtype, "seed": SEED, "count": count}
    inputs = {}
    for side in (None, *reduced):
        rows = answer(
            load,
            requests_of(pictures, side),
            output / f"answers-{side or 'full'}.jsonl",
            batch_size=batch_size,
            generate_kwargs={"max_new_tokens": TOKENS, "do_sample": False},
            settings={**settings, "reduced": side},
            workers=workers,
        )
        name = f"reduced to {side}" if side else "full"
        inputs[name] = scores(read_rows(rows))
    attention = global_shares(*load(), looked_at(pictures[:LOOKED_AT]), TOKENS)
    result = {
        "model": model,
        "revision": identity,
        "pictures": count,
        "machine": machine(device),
        "versions": versions(),
        "inputs": inputs,
        "attention": attention,
    }
    plot(result, output / "nano.png")
    write_atomically(output / "nano.json", [json.dumps(result, indent=1).encode() + b"\n"])
    write_atomically(output / "nano.md", [report(result).encode()])
    print("\n".join(scores_table(inputs["full"])))


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--count", type=at_least(3), default=1000, help="pictures (default: %(default)s)")
    parser.add_argument(
        "--reduced", type=at_least(1), nargs="*", default=[448, 224], help="sides, in pixels (default: 448 224)"
    )
    parser.add_argument("--batch_size", type=at_least(1), default=8, help="(default: %(default)s)")
    parser.add_argument("--workers", type=at_least(0), default=2, help="processes that draw (default: %(default)s)")
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(evaluate, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
