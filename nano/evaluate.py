"""How well Pheye-nano reads and counts, on drawn pictures with words, fonts and photographs that it never saw.

    python -m pheye.nano.evaluate --model FOLDER_OR_ID --output FOLDER [--count 1000] [--fine 1000] [--reduced 448 224]

writes into FOLDER the answers, nano.json, the tables nano.md and their plot nano.png: exact reading of the sign, share
of wrong characters, questions about shapes; the same by tertile of letter height, with the picture first reduced to
fewer pixels (the paper's Tables 1 and 2), and the attention on the global view by tertile (its Figure 4). Signs are
read in a second set of pictures too, whose letters are finer. Words that a crop's border crosses are compared with
like words inside a crop. The same command goes on after a kill. Any Pheye trained on these pictures can be measured.
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
from .drawing import questions
from .scoring.held_out import (
    CAP_HEIGHTS,
    FINE,
    LETTERS,
    LIKE,
    MAIN,
    SEED,
    SHAPES,
    SIGN,
    SIZES,
    HeldOutPicture,
    border_scores,
    held_out_pictures,
    kept,
    of_height,
    percent,
    requests_of,
    scores,
    tertiles_of,
    with_interval,
)
from .scoring.tables import table

LOOKED_AT = 300  # pictures whose attention is measured
TOKENS = 16  # of an answer, at most


# --- Tables and plot ---


def scores_table(found: dict) -> list[str]:
    """Markdown: what is asked, how often the answer is right, characters wrong."""
    titles, rows = {SIGN: "what is written on the sign", SHAPES: "shapes, all questions"}, []
    for name in (SIGN, SHAPES, "how many", "is there", "what colour"):
        if name in found:
            one = found[name]
            low, high = map(percent, one["interval"])
            right = f"{percent(one['exact'])} % ({low} to {high})"
            wrong = f"{percent(one['character_error'])} %" if name == SIGN else ""
            rows.append([titles.get(name, name), str(one["questions"]), right, wrong])
    return table(["question", "asked", "exactly right (95 % interval)", "characters wrong"], rows)


def resolution_table(by_input: dict[str, dict]) -> list[str]:
    """Markdown: reading by tertile of letter height, a row for each input."""
    rows = []
    for name, found in by_input.items():
        one, share = found[SIGN], found.get("kept")
        rows.append(
            [
                name,
                with_interval(one["exact"], one["interval"]),
                *(percent(found["by_tertile"][group]["exact"]) for group in TERTILES),
                percent(one["character_error"]),
                with_interval(share["share"], share["interval"]) if share else "",
            ]
        )
    names = ["input", "all (95 % interval)", "small letters", "medium", "large", "characters wrong"]
    return table([*names, "kept (95 % interval)"], rows)


def border_table(by_set: dict[str, dict]) -> list[str]:
    """Markdown: reading of words across a crop's border and of words inside a crop, a row for each set of pictures."""
    rows = []
    for name, found in by_set.items():
        sides = found["across"], found["inside"]
        cells = [f"{percent(side['exact'])} of {side['words']}" if side["words"] else "" for side in sides]
        cells.append(str(found["pairs"]))
        if found["pairs"]:
            cells += [percent(side["paired"]) for side in sides]
            cells.append(with_interval(found["difference"]["share"], found["difference"]["interval"]))
            cells += [f"{100 * side['paired_height']:.2f}" for side in sides]
        else:
            cells += [""] * 5
        rows.append([of_height(name), *cells])
    names = ["letters", "across, all", "inside, all", "pairs", "across", "inside", "difference (95 % interval)"]
    return table([*names, "mean height across", "inside"], rows)


def attention_table(attention: dict) -> list[str]:
    """Markdown: mean share of attention on the global view, a column for each block."""
    rows = [[group["tertile"], *map(percent, group["global_share"])] for group in attention["tertiles"]]
    return table(["letters", *(f"layer {layer}" for layer in attention["layers"])], rows)


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

`python -m pheye.nano.evaluate --model {model} --output FOLDER --count {count} --fine {fine_count}`; {machine}.

Signs with one word, real or made-up, of {letters[0]} to {letters[1]} letters; capitals of {lowest} to {highest} % of
the picture's height. Words, fonts and photographs that training never showed. Intervals are over the pictures
(bootstrap), not over trainings.

{scores}

## Resolution

Words read exactly, in %, by tertile of letter height: the picture in full, or first reduced to fewer pixels. `kept`
is the share of the words read in full pictures that remains.

{resolution}
{fine}
## Words across a crop's border

{borders}

## Attention on the global view

Mean share, in %, per block while the answer is written; the first {looked_at} pictures.

{attention}

![Reading by resolution, and attention](nano.png)
"""

FINE_LETTERS = """
## Fine letters

{count} other pictures, with capitals of {lowest} to {highest} % of the picture's height. Each side has {pixels}
pixels or more, so that a capital has 8 or more. Only the sign is asked for. Else as above, in tertiles of their own.

{resolution}
"""

BORDERS = """Words read exactly, in %. A word is across where an upright border of the {tiles} x {tiles} crops leaves
at least half a letter of it on either side, or a level one at least a quarter of its height. Each such word makes a
pair with a word inside a crop. Both have as many letters, and letter heights that differ by {unlike} % at most. Each
word is in one pair at most. There are as many pairs as can be. Heights are in % of the picture's. Intervals are over
the pairs (bootstrap).

{table}"""
NO_BORDERS = "Not measured: the crops of this model have no borders that all pictures share."


def report(result: dict) -> str:
    return REPORT.format(
        model=result["model"],
        count=result["pictures"],
        machine=result["machine"],
        letters=LETTERS,
        lowest=percent(CAP_HEIGHTS[MAIN][0]),
        highest=percent(CAP_HEIGHTS[MAIN][1]),
        scores="\n".join(scores_table(result["inputs"]["full"])),
        resolution="\n".join(resolution_table(result["inputs"])),
        fine_count=result["fine"]["pictures"] if result["fine"] else 0,
        fine=fine_letters(result["fine"]) if result["fine"] else "",
        borders=borders_of(result["borders"]) if result["borders"] else NO_BORDERS,
        looked_at=min(LOOKED_AT, result["pictures"]),
        attention="\n".join(attention_table(result["attention"])),
    )


def fine_letters(fine: dict) -> str:
    return FINE_LETTERS.format(
        count=fine["pictures"],
        lowest=percent(CAP_HEIGHTS[FINE][0]),
        highest=percent(CAP_HEIGHTS[FINE][1]),
        pixels=SIZES[FINE][0],
        resolution="\n".join(resolution_table(fine["inputs"])),
    )


def borders_of(borders: dict) -> str:
    return BORDERS.format(
        tiles=borders["tiles_per_side"], unlike=round(100 * (LIKE - 1)), table="\n".join(border_table(borders["sets"]))
    )


# --- The command ---


def looked_at(pictures: Sequence[HeldOutPicture]) -> Iterator[dict]:
    """Pictures for the attention, drawn one at a time."""
    for picture, group in zip(pictures, tertiles_of(pictures), strict=True):
        yield {"_line": picture.index, "image": picture.image(), "prompt": questions.SIGN, "tertile": group}


def answers(
    loaded: tuple,
    pictures: Sequence[HeldOutPicture],
    sides: Sequence[int | None],
    output: Path,
    *,
    batch_size: int,
    workers: int,
    settings: dict,
) -> dict[str, list[dict]]:
    """Rows about the pictures of a set by input: in full (a side of None), and reduced to so many pixels a side."""
    letters, rows = pictures[0].letters, {}
    for side in sides:
        path = answer(
            lambda: loaded,
            requests_of(pictures, side),
            output / f"answers-{'' if letters == MAIN else f'{letters}-'}{side or 'full'}.jsonl",
            batch_size=batch_size,
            generate_kwargs={"max_new_tokens": TOKENS, "do_sample": False},
            settings={**settings, "letters": letters, "count": len(pictures), "reduced": side},
            workers=workers,
        )
        rows[f"reduced to {side}" if side else "full"] = read_rows(path)
    return rows


def evaluate(
    model: str,
    output: Path,
    *,
    count: int,
    fine: int,
    reduced: list[int],
    batch_size: int,
    workers: int,
    dtype: str,
    device: str | None,
    revision: str | None,
):
    """Write answers, scores, tables and plot; the arguments are the command's options."""
    device = device or default_device()
    identity, load = open_model(model, revision, dtype, device)
    loaded = load()
    tiles = tiles_with_borders(loaded[0].config)
    settings = {"model": model, "files of the model": identity, "dtype": dtype, "seed": SEED, "tiles": tiles}
    drawn, by_set, borders = {}, {}, {}
    for letters, number in ((MAIN, count), (FINE, fine)):
        if number:
            drawn[letters] = held_out_pictures(number, letters=letters, tiles_per_side=tiles)
            options = {"batch_size": batch_size, "workers": workers, "settings": settings}
            rows = answers(loaded, drawn[letters], (None, *reduced), output, **options)
            by_set[letters] = {name: scores(found) for name, found in rows.items()}
            for name in list(rows)[1:]:
                by_set[letters][name]["kept"] = kept(rows["full"], rows[name])
            borders[letters] = border_scores(rows["full"]) if tiles else None
    result = {
        "model": model,
        "revision": identity,
        "pictures": count,
        "machine": machine(device),
        "versions": versions(),
        "inputs": by_set[MAIN],
        "fine": {"pictures": fine, "inputs": by_set[FINE]} if fine else None,
        "borders": {"tiles_per_side": tiles, "sets": borders} if tiles else None,
        "attention": global_shares(*loaded, looked_at(drawn[MAIN][:LOOKED_AT]), TOKENS),
    }
    plot(result, output / "nano.png")
    write_atomically(output / "nano.json", [json.dumps(result, indent=1).encode() + b"\n"])
    write_atomically(output / "nano.md", [report(result).encode()])
    print("\n".join(scores_table(by_set[MAIN]["full"])))


def tiles_with_borders(config) -> int | None:
    """Crops along each side of every picture; None where there is one, or where canvases differ from picture to
    picture."""
    return config.tiles_per_side if config.tiles_per_side > 1 and not config.canvases else None


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="python -m pheye.nano.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--count", type=at_least(3), default=1000, help="pictures (default: %(default)s)")
    parser.add_argument(
        "--fine",
        type=at_least(0),
        default=1000,
        help="more, with fine letters: none, or 3 at least (default: %(default)s)",
    )
    parser.add_argument(
        "--reduced", type=at_least(1), nargs="*", default=[448, 224], help="sides, in pixels (default: 448 224)"
    )
    parser.add_argument("--batch_size", type=at_least(1), default=8, help="(default: %(default)s)")
    parser.add_argument("--workers", type=at_least(0), default=2, help="processes that draw (default: %(default)s)")
    options = vars(parser.parse_args(argv))
    if 0 < options["fine"] < 3:
        parser.error(f"--fine {options['fine']} must be 0, or 3 at least: there are tertiles of them")
    return options


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(evaluate, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
