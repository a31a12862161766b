"""Where a Pheye looks while it answers: cross-attention on the views of a picture (appendix C of the paper).

    python -m pheye.evaluation.attention --model FOLDER_OR_ID --image FILE --prompt "..." --output OUT.png
    python -m pheye.evaluation.attention --model FOLDER_OR_ID --data FILE.jsonl --output OUT.png

The first draws the picture with its crops and, for each word of the answer, heat maps over the global view and over
the crops. The second draws, for many samples, the mean share of the global view per block (the paper's Figure 4): each
line of FILE.jsonl has `image` (a path, from the file's folder), `prompt` and, for a curve per tertile, `boxes_area`
(the answer's box over the picture) or `tertile` (small, medium or large). Both write a JSON beside the picture.

The attention of a word is that of the positions which predict its tokens, averaged over them and over the heads.

Shapes: L blocks, T tokens of the answer, N image tokens, V views, k crops and G patches along each side.
"""

import argparse
import json
import sys
from pathlib import Path

from ..answering.engine import open_model
from ..common.command import InputError, at_least, default_device, exit_status, require
from ..common.files import write_atomically
from ..common.machine import versions
from ..image_processing_pheye import load_image, to_rgb
from .heatmaps import explain
from .json_lines import read_lines
from .tertiles import TERTILES, tertiles
from .word_attention import global_shares

# --- Figure 4 ---


def read_samples(path: Path) -> list[dict]:
    """Samples with `image` as a path that exists, `prompt`, and `tertile`: small, medium, large, or None in all.

    Raises:
        InputError: if a line cannot be used; nothing has been computed by then.
    """
    rows = read_lines(path)
    for row in rows:
        where = f"Line {row['_line']} of {path}"
        for name in ("image", "prompt"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise InputError(f"{where} has no `{name}`; each line needs `image` and `prompt`.")
        row["image"] = path.parent / row["image"]
        if not row["image"].is_file():
            raise InputError(f"{where}: there is no image {row['image']}; paths begin at the folder of {path.name}.")
    names = [name for name in ("tertile", "boxes_area") if name in rows[0]]
    for row in rows:
        if names and names[0] not in row:
            raise InputError(f"Line {row['_line']} of {path} has no `{names[0]}`, but line {rows[0]['_line']} has.")
        if names == ["boxes_area"] and not is_share(row["boxes_area"]):
            raise InputError(
                f"Line {row['_line']} of {path}: boxes_area is {row['boxes_area']!r}, not a number from 0 to 1."
            )
        if "tertile" in names and row["tertile"] not in TERTILES:
            raise InputError(
                f"Line {row['_line']} of {path}: tertile is {row['tertile']!r}, not one of {', '.join(TERTILES)}."
            )
    if names == ["boxes_area"]:
        groups = tertiles({index: row["boxes_area"] for index, row in enumerate(rows)})
        return [{**row, "tertile": TERTILES[groups[index]]} for index, row in enumerate(rows)]
    return [{"tertile": None, **row} for row in rows]


def is_share(value) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value <= 1


def plot(result: dict, path: Path):
    """Figure 4: a curve per tertile over the blocks."""
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for group in result["tertiles"]:
        label = f"{group['tertile']} ({group['samples']})"
        axes.plot(result["layers"], [100 * share for share in group["global_share"]], marker="o", label=label)
    axes.set_xticks(result["layers"])
    axes.set_xlabel("layer of the language model behind the block")
    axes.set_ylabel("attention on the global view in %")
    axes.legend(title="area of the answer's box")
    figure.savefig(path, dpi=150)


# --- The command ---


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pheye.evaluation.attention", description="Draw where a Pheye looks while it answers."
    )
    parser.add_argument("--model", required=True, metavar="FOLDER_OR_ID")
    parser.add_argument("--image", help="a picture; with --prompt")
    parser.add_argument("--prompt", help="what to ask about it")
    parser.add_argument("--data", type=Path, metavar="FILE.jsonl", help="many samples, for the mean share per block")
    parser.add_argument("--output", required=True, type=Path, metavar="OUT.png", help="a .json goes beside it")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=30, help="(default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default=default_device(), help="(default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit of the model's repository")
    args = parser.parse_args(argv)
    if (args.data is None) == (args.image is None) or (args.image is None) != (args.prompt is None):
        parser.error("give --image and --prompt, or --data alone")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty")
    if args.output.suffix != ".png":
        parser.error(f"--output {args.output} must end in .png")
    return args


def run(args: argparse.Namespace):
    if args.data:
        require("matplotlib")
        samples = read_samples(args.data)
    else:
        try:
            picture = to_rgb(load_image(args.image))
        except ValueError as error:
            raise InputError(str(error)) from error
    revision, load = open_model(args.model, args.revision, args.dtype, args.device)
    model, processor = load()
    about = {"model": args.model, "revision": revision, "versions": versions()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.data:
        result = global_shares(model, processor, samples, args.max_new_tokens)
        plot(result, args.output)
        about["data"] = str(args.data)
    else:
        canvas, result = explain(model, processor, picture, args.prompt, args.max_new_tokens)
        canvas.save(args.output)
        about["image"] = args.image
        print(f"Answer: {result['answer']}")
        if not result["words"]:
            print("The answer has no words, so only the crops were drawn; ask something else.", file=sys.stderr)
    text = json.dumps({**about, **result}, ensure_ascii=False, indent=1)
    write_atomically(args.output.with_suffix(".json"), [text.encode() + b"\n"])
    print(f"Wrote {args.output} and {args.output.with_suffix('.json')}.")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
