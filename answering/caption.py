"""Captions for images, folders, lists or a data set of them, as lines of JSON.

    pheye caption --model FOLDER_OR_ID --images FOLDER|IMAGE...|LIST.txt|DATA_SET --output captions.jsonl
    accelerate launch --num_processes 8 -m pheye.answering.caption ...

A row holds `id`, `image` and `caption`, or `error` in place of the caption where an image cannot be read. After a
kill, the same command goes on where the rows end, with any number of processes. To try images with an error once
more, delete their rows from the output and give the same command again.
"""

import argparse
import math
import sys

import torch
from PIL import Image

from ..common.command import Parser, add_budget_option, add_model_options, at_least, exit_status, process_state
from ..common.tables import IMAGE_SOURCES
from ..image_processing_pheye import grids_of
from ..pipeline_pheye import DEFAULT_MAX_NEW_TOKENS
from ..processing_pheye import CAPTION_INSTRUCTION
from .engine import answer, default_workers, open_model
from .sources import find_requests

# --- The command ---


@torch.no_grad()
def compile_vision_tower(model, processor, images: int):
    """Compile for batches of so many images, all of the most crops; others, such as the last, which may be smaller,
    are encoded as they would be without."""
    model.model.vision_tower.compile(dynamic=False)
    image_processor = processor.image_processor
    grids, view = grids_of(image_processor.tiles_per_side, image_processor.canvases), image_processor.size
    rows, columns = max(grids, key=math.prod)
    largest = Image.new("RGB", (columns * view.width, rows * view.height))  # which fills this canvas alone
    image_inputs = image_processor([largest] * images, return_tensors="pt")
    model.get_image_features(**image_inputs.to(model.device))
    torch.compiler.set_stance("eager_on_recompile")


def caption(
    model: str,
    images: list[str],
    output: str,
    *,
    prompt: str,
    batch_size: int,
    max_new_tokens: int,
    num_beams: int,
    vision_budget: int | None,
    dtype: str,
    device: str | None,
    workers: int | None,
    compile: bool,
    revision: str | None,
    **dataset_options,
):
    """Write the captions; the arguments are the command's options."""
    state = process_state(device)
    requests, passed_over = find_requests(images, prompt, **dataset_options)
    device = device or state.device
    identity, open_whole = open_model(model, revision, dtype, device)

    def load() -> tuple:
        loaded, processor = open_whole()
        if compile:
            compile_vision_tower(loaded, processor, batch_size)
        return loaded, processor

    settings = {
        "model": model,
        "files of the model": identity,
        "dtype": dtype,
        "prompt": prompt,
        "images": images[0] if len(images) == 1 else images,
        **dataset_options,
        **({"compile": True} if compile else {}),  # rounds differently in half precision
    }
    decoding = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
    if vision_budget is not None:
        decoding["vision_budget"] = vision_budget
    answer(
        load,
        requests,
        output,
        batch_size=batch_size,
        generate_kwargs=decoding,
        settings=settings,
        workers=default_workers(device) if workers is None else workers,
        answer_name="caption",
    )
    if state.is_main_process and str(passed_over):
        print(passed_over, file=sys.stderr)


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(prog="pheye caption", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument(
        "--images",
        required=True,
        nargs="+",
        action="extend",
        metavar="SOURCE",
        help="images, URLs, folders, patterns such as 'photos/*.jpg', text files with a path or URL per line; or a "
        "data set: .parquet, .arrow or .csv files, a folder of them, one made by save_to_disk, or what load_dataset "
        "takes",
    )
    parser.add_argument("--output", required=True, metavar="FILE.jsonl", help="a line of JSON per image")
    parser.add_argument("--prompt", default=CAPTION_INSTRUCTION, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=at_least(1), default=8, help="images at once (default: 8)")
    parser.add_argument(
        "--max_new_tokens", type=at_least(1), default=DEFAULT_MAX_NEW_TOKENS, help="(default: %(default)s)"
    )
    parser.add_argument("--num_beams", type=at_least(1), default=1, help="(default: 1, greedy)")
    add_budget_option(parser)
    parser.add_argument(
        "--workers", type=at_least(0), help="processes that open images, per device (default: 4; on a CPU none)"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the vision tower first: takes minutes, pays for many images",
    )
    dataset = parser.add_argument_group("data sets only")
    dataset.add_argument("--split", help="(default: the only one, or train)")
    dataset.add_argument("--image_column", help="(default: image)")
    dataset.add_argument("--id_column", help="texts or integers, each once (default: the number of the row)")
    dataset.add_argument(
        "--image_sources",
        choices=IMAGE_SOURCES,
        help="where names in the data may lead: to files in the working directory, the data's folder and what "
        "datasets downloaded (folder, the default), to all files (local), or to URLs as well (any)",
    )
    dataset.add_argument("--config", help="configuration of the data set, where it has several")
    dataset.add_argument("--data_files", help="files or pattern, where SOURCE is a loader such as parquet")
    options = vars(parser.parse_args(argv))
    if not options["prompt"].strip():
        parser.error("--prompt is empty; leave it out for a one-sentence caption")
    return options


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(caption, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
