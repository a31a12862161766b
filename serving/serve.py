"""A server of OpenAI's chat protocol, for many clients: requests that wait are answered together.

    pheye serve --model FOLDER_OR_ID --port 8000

/v1/chat/completions takes images as base64 data in `image_url`. /v1/models and /health are there too.
"""

import argparse
import os
import sys

from ..answering.engine import open_model
from ..common.command import Parser, add_model_options, at_least, default_device, exit_status, require

SECONDS_TO_FINISH = 30  # for answers that are on their way when the server is told to end


def serve(
    model: str,
    *,
    host: str,
    port: int,
    api_key: str | None,
    allow_urls: bool,
    batch_size: int,
    revision: str | None,
    dtype: str,
    device: str | None,
):
    """Answer until SIGTERM or SIGINT; the arguments are the command's options."""
    uvicorn = require("uvicorn", "serve")
    require("starlette", "serve")
    from .batches import Worker
    from .server import Server

    _, load = open_model(model, revision, dtype, device or default_device())
    worker = Worker(*load(), batch_size)
    try:
        app = Server(worker, model, api_key, allow_urls).app()
        uvicorn.run(app, host=host, port=port, access_log=False, timeout_graceful_shutdown=SECONDS_TO_FINISH)
    finally:
        worker.close()


def parse(argv: list[str] | None) -> dict:
    """The command's options by name."""
    parser = Parser(prog="pheye serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for other machines (default: %(default)s)")
    parser.add_argument("--port", type=at_least(0), default=8000, help="0 for a free one (default: %(default)s)")
    parser.add_argument(
        "--api_key",
        default=os.environ.get("PHEYE_API_KEY"),
        help="what clients must give (default: the variable PHEYE_API_KEY, or none)",
    )
    parser.add_argument(
        "--allow_urls", action="store_true", help="fetch images from URLs too, of public addresses only"
    )
    parser.add_argument(
        "--batch_size", type=at_least(1), default=8, help="requests answered at once (default: %(default)s)"
    )
    options = vars(parser.parse_args(argv))
    return {**options, "api_key": options["api_key"] or None}  # a variable that is set to nothing is none


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return exit_status(serve, **parse(argv))


if __name__ == "__main__":
    sys.exit(main())
