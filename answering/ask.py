"""A question about an image, answered on the screen.

    pheye ask MODEL IMAGE "What is written on the sign?"
    pheye ask MODEL IMAGE IMAGE "Which is the older one?"
    pheye ask MODEL "How are you?"

MODEL is a folder or a Hub id, IMAGE a path or a URL. A model takes as many images as it was made for (`max_images`).
Several get their numbers in front of the question, unless it has them: "Is [image 1] older than [image 2]?". The
answer appears word by word.
"""

import argparse
import sys

from transformers import TextStreamer

from ..common.command import InputError, Parser, add_loading_options, at_least, default_device, exit_status
from ..image_opening_pheye import load_image
from ..image_processing_pheye import to_rgb
from ..pipeline_pheye import DEFAULT_MAX_NEW_TOKENS
from .engine import is_cut, open_model
from .rows import Request
from .sources import is_image, is_url


class Answer(TextStreamer):
    """Prints an answer while it is made, without the space in front."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.has_begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False):
        text = text if self.has_begun else text.lstrip()
        self.has_begun |= bool(text)
        super().on_finalized_text(text, stream_end)


def ask(
    model: str,
    images: list[str],
    question: str,
    *,
    max_new_tokens: int,
    revision: str | None,
    dtype: str,
    device: str | None,
):
    """Print the answer; the arguments are the command's options."""
    try:
        opened = [to_rgb(load_image(image)) for image in images]
    except ValueError as error:
        raise InputError(str(error)) from error
    _, load = open_model(model, revision, dtype, device or default_device())
    loaded, processor = load()
    most = processor.image_processor.max_images
    if len(opened) > most:
        raise InputError(f"There are {len(opened)} images, and {model} takes {most} (max_images); ask about fewer.")
    messages = Request(0, opened, question).messages(len(opened))
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    try:
        inputs = processor(images=[opened], text=prompt, return_tensors="pt").to(loaded.device)
        ids = loaded.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=False,
            streamer=Answer(processor.tokenizer),
        )
    except ValueError as error:  # an image that cannot be cut, or a question that is too long
        raise InputError(str(error)) from error
    if is_cut(loaded, ids[0, inputs["input_ids"].shape[1] :], max_new_tokens):
        print(f"(cut after {max_new_tokens} tokens; --max_new_tokens gives more)", file=sys.stderr)


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(prog="pheye ask", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id")
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="path or URL; several, or none")
    parser.add_argument("question", metavar="QUESTION", help="in quotes")
    parser.add_argument(
        "--max_new_tokens", type=at_least(1), default=DEFAULT_MAX_NEW_TOKENS, help="(default: %(default)s)"
    )
    add_loading_options(parser)
    options = vars(parser.parse_intermixed_args(argv))
    if not options["images"] and (is_url(options["question"]) or is_image(options["question"])):
        parser.error(f"{options['question']} is an image: write a question behind it")
    if not options["question"].strip():
        parser.error("QUESTION is empty; give the model something to answer")
    return options


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(ask, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
