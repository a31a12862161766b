"""Published checkpoint (`config.json` and a pickled `checkpoint.pt`) to a folder that transformers loads.

    pheye convert miguelcarv/Pheye-x4-448 pheye-x4-448

The pickle is mapped into memory and written shard by shard, without building the model, so that memory use stays far
below the size of the weights. OUTPUT appears under its name only when it is whole.

transformers takes longer to import than torch, so it is imported inside the functions that need it: by then the
checkpoint is being hashed and written in threads of their own. What it then finds wrong takes the written part away.
"""

import argparse
import importlib.util
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if importlib.util.find_spec("pheye") is None:
    sys.exit("The package pheye is not installed; run `pip install .` in the folder of this script first.")

import torch
from huggingface_hub import HfApi

from pheye.common.command import InputError, Interrupted, Parser, exit_status
from pheye.common.files import appear_whole
from pheye.conversion.archive import check_storages, hash_and_check, list_records, state_of
from pheye.conversion.card import write_card
from pheye.conversion.errors import one_line, refusing
from pheye.conversion.processor import write_processor
from pheye.conversion.reading import PARTS, Conversion, find_checkpoint, make_conversion, read_tensors
from pheye.conversion.reference import Reference, draw_test_picture
from pheye.conversion.rules import RULES, Plan
from pheye.conversion.writing import code_files, write_configs, write_weights

if TYPE_CHECKING:
    from pheye.processing_pheye import PheyeProcessor


class Background(threading.Thread):
    """A call in a thread of its own, which does not keep the program from ending."""

    def __init__(self, call: Callable, *args):
        super().__init__(daemon=True)
        self.call, self.args, self.value, self.error = call, args, None, None
        self.start()

    def run(self):
        try:
            self.value = self.call(*self.args)
        except BaseException as error:
            self.error = error

    def result(self):
        """What the call returned or raised, when it is done."""
        self.join()
        if self.error is not None:
            raise self.error
        return self.value


def report(plan: Plan):
    """How many tensors each rule took, and what became of them."""
    for rule in RULES:
        if plan.counts[rule]:
            print(f"{plan.counts[rule]:5} {rule.action:8}{rule.source}: {rule.why}")
    totals = Counter()
    for rule, count in plan.counts.items():
        totals[rule.action] += count
    parts = ", ".join(f"{totals[action]} {action}" for action in ("renamed", "split", "dropped"))
    print(f"{totals.total()} tensors of the source: {parts}; {len(plan.pieces)} of the model, each filled once.")


def refuse_to_replace(output: Path, inputs: Iterable[str | Path]):
    """No OUTPUT may hold a folder or file that the conversion reads, wherever links lead."""
    for path in map(Path, inputs):
        for file in (path, *(entry for entry in path.glob("*") if not entry.is_dir())):
            if os.path.lexists(file) and Path(os.path.realpath(file)).is_relative_to(output):
                raise InputError(f"{output} holds {file}, which the conversion reads; choose another OUTPUT.")


def convert(
    source: str,
    output: str,
    *,
    encoder: str | None = None,
    decoder: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "keep",
    max_shard_size: int = 2_000_000_000,
    force: bool = False,
    verify: bool = False,
    model: str | None = None,
) -> Plan:
    """Convert `source` to the folder `output`; see the command's help. `model` is the name that the card shows.

    Raises:
        InputError: if the source is refused, or if reading or writing fails, with the reason.
    """
    output = Path(os.path.realpath(output))
    parts = {"encoder": encoder, "decoder": decoder, "tokenizer": tokenizer}
    if empty := [part for part, name in parts.items() if name == ""]:
        raise InputError(f"The {empty[0]} is an empty text; give a folder or a Hub id, or leave it out.")
    replacements = {part: name for part, name in parts.items() if name}
    refuse_to_replace(output, (source, *replacements.values(), *code_files()))
    stored = None if dtype == "keep" else getattr(torch, dtype)
    with (
        refusing(f"{output} could not be written", "Mend this, or choose another OUTPUT."),
        appear_whole(output, force) as folder,
    ):
        checkpoint = find_checkpoint(source, replacements)
        state = state_of(checkpoint.weights)
        hashing = Background(hash_and_check, checkpoint.weights, list_records(checkpoint.weights))
        tensors = read_tensors(checkpoint.weights)
        plan, stop = Plan(tensors, checkpoint.settings), threading.Event()
        writing = Background(write_weights, folder, checkpoint.weights, plan, stored, max_shard_size, stop)
        try:
            conversion = make_conversion(checkpoint, tensors, plan, replacements, stored)
            refuse_to_replace(output, (checkpoint.folder, *conversion.folders.values()))
            processor = write_processor(folder, conversion)
            write_configs(folder, conversion.config, processor.tokenizer)
            writing.result()
        finally:
            stop.set()
            writing.join()
        sha256, sizes = hashing.result()
        check_storages(checkpoint.weights, tensors, sizes)
        if state_of(checkpoint.weights) != state:
            raise InputError(f"{checkpoint.weights} was changed while it was read; give the same command again.")
        report(plan)
        write_card(folder, model or output.name, conversion, sha256)
        if verify:
            verify_folder(folder, conversion, processor)
    return plan


# Differences that rounding in float32 explains; a wrong mapping makes them a thousand times larger.
BOUNDS = {"pixels": 1e-6, "features": 2e-4, "logits": 2e-3}


def verify_folder(folder: Path, conversion: Conversion, processor: "PheyeProcessor"):
    """Compare the converted model with the formulas applied to the source's own tensors, both in float32."""
    from pheye.modeling_pheye import PheyeForConditionalGeneration

    config, checkpoint = conversion.config, conversion.checkpoint
    model = PheyeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tensors = read_tensors(checkpoint.weights)
    try:
        reference = Reference(tensors, checkpoint.settings, config.vision_config, config.text_config)
    except ValueError as error:  # another kind of encoder or decoder
        raise InputError(f"{error} Leave --verify out to convert without a comparison.") from error
    image = draw_test_picture()
    conversation = [{"role": "user", "content": "Describe the image."}]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    image_processor = processor.image_processor
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"]).last_hidden_state
        ours = {"pixels": inputs["pixel_values"], "features": features, "logits": model(**inputs).logits}
        pixels = reference.pixels(image, image_processor.image_mean, image_processor.image_std)
        features = reference.features(pixels)
        theirs = {"pixels": pixels, "features": features, "logits": reference.logits(inputs["input_ids"][0], features)}
    differences = {name: (ours[name][0] - theirs[name]).abs().max().item() for name in BOUNDS}
    listing = ", ".join(f"{name} {difference:.2g}" for name, difference in differences.items())
    print(f"Largest differences from the reference: {listing}")
    exact = conversion.dtype is None or config.dtype == torch.float32
    if exact and not all(differences[name] <= bound for name, bound in BOUNDS.items()):
        bounds = ", ".join(f"{name} {bound:g}" for name, bound in BOUNDS.items())
        raise InputError(
            f"The converted model differs from the source: {listing}; rounding explains {bounds}. This is a fault of "
            "the converter; please report it."
        )


def push(output: str, repo: str, private: bool, revision: str | None):
    """Upload the folder to the Hub; weights that an earlier push left there go."""
    api = HfApi()
    repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo,
        folder_path=output,
        revision=revision,
        commit_message="Convert the published checkpoint",
        delete_patterns=["*.safetensors", "*.safetensors.index.json"],
    )
    print(f"Pushed to {commit.commit_url}")


def size_in_bytes(text: str) -> int:
    """ "500MB" or "2GB" as a number; a bare number is one of bytes."""
    match = re.fullmatch(r"([1-9]\d*)([KMGT]?)B?", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500MB or 2GB")
    return int(match[1]) * 1000 ** " KMGT".index(match[2] or " ")


def convert_and_push(
    source: str, output: str, *, push_to_hub: str | None, private: bool, revision: str | None, **options
):
    """Convert, and push where that is asked; the arguments are the command's options."""
    try:
        convert(source, output, model=push_to_hub, **options)
    except KeyboardInterrupt as error:
        raise Interrupted(f"Nothing was written to {output}; the same command begins anew.") from error
    except InputError as error:
        raise InputError(f"{error}\nNothing was written to {output}.") from error
    print(f"Wrote {output}")
    if push_to_hub:
        try:
            push(output, push_to_hub, private, revision)
        except KeyboardInterrupt as error:
            raise Interrupted(f"{output} is whole; to push it, give `hf upload {push_to_hub} {output}`.") from error
        except Exception as error:  # of the network, of any kind
            raise InputError(f"{output} is whole, but pushing it failed: {one_line(error)}") from error


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(
        prog="pheye convert", description="Turn a published Pheye checkpoint into a folder that transformers loads."
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of a published checkpoint")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; it appears when it is whole")
    for part in PARTS:
        parser.add_argument(f"--{part}", help=f"folder or Hub id, in place of the {part} that config.json names")
    dtypes = ("keep", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="keep", help="of the weights (default: as in the source)")
    parser.add_argument("--max_shard_size", type=size_in_bytes, default="2GB", help="of a weights file (default: 2GB)")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")
    parser.add_argument(
        "--verify", action="store_true", help="compare the model with a slow reference on a test image"
    )
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload OUTPUT to this Hub repo")
    parser.add_argument("--private", action="store_true", help="make that repo private if it is new")
    parser.add_argument("--revision", help="branch of that repo to push to (default: main)")
    options = vars(parser.parse_args(argv))
    if options["push_to_hub"] == "":
        parser.error("--push_to_hub is an empty text; give a repo, or leave it out")
    if not options["push_to_hub"] and (options["private"] or options["revision"]):
        parser.error("--private and --revision say how to push; give --push_to_hub REPO too")
    return options


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parse(argv)
    sys.setswitchinterval(0.0005)  # or the writing thread waits 5 ms for every tensor while imports run
    return exit_status(convert_and_push, **options)


if __name__ == "__main__":
    sys.exit(main())
