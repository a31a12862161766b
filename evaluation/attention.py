"""Where a Pheye looks while it answers: cross-attention on the views of an image (appendix C of the paper).

    pheye attention --model FOLDER_OR_ID --image FILE --prompt "..." --output OUT.png
    pheye attention --model FOLDER_OR_ID --data FILE.jsonl --output OUT.png

The first draws the image with its crops and, for each word of the answer, heat maps over the global view and over
the crops. The second draws, for many samples, the mean share of the global view per block (the paper's Figure 4): each
line of FILE.jsonl has `image` (a path inside the file's folder, or inside `--images`), `prompt` and, for a curve per
tertile, `boxes_area` (the answer's box over the image) or `tertile` (small, medium or large). Both write a JSON beside
OUT.png.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from ..answering.engine import open_model
from ..common.command import InputError, Parser, add_model_options, at_least, default_device, exit_status, require
from ..common.files import write_atomically
from ..common.images import inside
from ..common.json_lines import read_lines
from ..common.machine import versions
from ..image_opening_pheye import load_image
from ..image_processing_pheye import to_rgb
from .boxes import is_share
from .heatmaps import explain
from .tertiles import TERTILES, tertiles
from .word_attention import global_shares

# --- Figure 4 ---


def read_prompts(path: Path, images: Path | None = None) -> list[dict]:
    """Samples with `image` as a path that exists, `prompt`, and `tertile`: small, medium, large, or None in all.

    images: the folder in which the images' names begin, and stay; by default the file's own.

    Raises:
        InputError: if a line cannot be used; nothing has been computed by then.
    """
    rows, folder = read_lines(path), images or path.parent
    for row in rows:
        where = f"Line {row['_line']} of {path}"
        for name in ("image", "prompt"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise InputError(f"{where} has no `{name}`; each line needs `image` and `prompt`.")
        try:
            row["image"] = Path(inside(folder, row["image"]))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if not os.path.isfile(row["image"]):
            raise InputError(
                f"{where}: there is no image {row['image']}; give the folder in which their names begin as --images."
            )
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


def plot_shares(result: dict, path: Path):
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
    figure.legend(loc="outside right upper", title="area of the answer's box")
    figure.savefig(path, dpi=150)


# --- The command ---


def attention(
    model: str,
    output: Path,
    *,
    image: str | None,
    prompt: str | None,
    data: Path | None,
    images: Path | None,
    max_new_tokens: int,
    revision: str | None,
    dtype: str,
    device: str | None,
):
    """Answer, draw and write; the arguments are the command's options."""
    if data:
        require("matplotlib")
        samples = read_prompts(data, images)
    else:
        try:
            opened = to_rgb(load_image(image))
        except ValueError as error:
            raise InputError(str(error)) from error
    if data and output.with_suffix(".json").resolve() == data.resolve():
        raise InputError(f"{data} would be written over: beside {output} goes a .json. Choose another --output.")
    identity, load = open_model(model, revision, dtype, device or default_device())
    about = {"model": model, "revision": identity, "versions": versions()}
    loaded, processor = load()
    output.parent.mkdir(parents=True, exist_ok=True)
    if data:
        result = global_shares(loaded, processor, samples, max_new_tokens)
        plot_shares(result, output)
        if left_out := result["left_out"]:
            first = f"line {left_out[0]['line']}: {left_out[0]['error']}"
            print(f"{len(left_out)} of {len(samples)} samples were left out, the first {first}", file=sys.stderr)
        about["data"] = str(data)
    else:
        try:
            canvas, result = explain(loaded, processor, opened, prompt, max_new_tokens)
        except ValueError as error:  # an image that cannot be cut, or a prompt that is too long
            raise InputError(str(error)) from error
        canvas.save(output)
        about["image"] = image
        print(f"Answer: {result['answer']}")
        if not result["words"]:
            print("The answer has no words, so only the crops were drawn; ask something else.", file=sys.stderr)
    text = json.dumps({**about, **result}, ensure_ascii=False, indent=1)
    write_atomically(output.with_suffix(".json"), [text.encode(errors="backslashreplace") + b"\n"])
    print(f"Wrote {output} and {output.with_suffix('.json')}.")


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(prog="pheye attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--image", metavar="FILE", help="with --prompt")
    parser.add_argument("--prompt", help="what to ask about the image")
    parser.add_argument("--data", type=Path, metavar="FILE.jsonl", help="many samples, for the mean share per block")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="with --data (default: the folder of the file)")
    parser.add_argument("--output", required=True, type=Path, metavar="OUT.png", help="a .json goes beside it")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=30, help="(default: %(default)s)")
    options = vars(parser.parse_args(argv))
    image, prompt, output = options["image"], options["prompt"], options["output"]
    if (options["data"] is None) == (image is None) or (image is None) != (prompt is None):
        parser.error("give --image and --prompt, or --data alone")
    if options["images"] is not None and options["data"] is None:
        parser.error("--images goes with --data; --image names a single one")
    if prompt is not None and not prompt.strip():
        parser.error("--prompt is empty")
    if output.suffix != ".png":
        parser.error(f"--output {output} must end in .png")
    return options


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(attention, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
