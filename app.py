"""A page in the browser: give a picture, ask, read the answer, and see where the model looked.

    pheye app --model FOLDER_OR_ID

As the app.py of a Hugging Face Space, this file takes the model from the Space's variable PHEYE_MODEL.
"""

import argparse
import os
import sys
from pathlib import Path

from pheye.answering.engine import open_model
from pheye.common.command import Parser, add_loading_options, at_least, default_device, exit_status, require


def app(model: str, *, host: str | None, port: int | None, revision: str | None, dtype: str, device: str | None):
    """Serve the page until it is interrupted; the arguments are the command's options."""
    for package in ("gradio", "skimage"):
        require(package, "app")
    from pheye.page.layout import build, launch

    _, load = open_model(model, revision, dtype, device or default_device())
    print(f"Loading {model} ...", flush=True)
    page = build(*load(), Path(model).resolve().name if os.path.isdir(model) else model)
    launch(page, server_name=host, server_port=port)


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(prog="pheye app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = os.environ.get("PHEYE_MODEL")
    parser.add_argument("--model", metavar="FOLDER_OR_ID", default=model, required=model is None)
    add_loading_options(parser)
    parser.add_argument("--host", help="address to listen at; 0.0.0.0 for other machines too (default: this one only)")
    parser.add_argument("--port", type=at_least(1), help="(default: the first free one from 7860)")
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(app, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
