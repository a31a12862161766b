"""Answers per second of a server, with 1, 4 and 16 clients: requests answered together against one by one.

    python -m pheye.benchmarks.serving
    python -m pheye.benchmarks.serving --variant x4-448 --requests 8 --max_tokens 8 --rounds 1 --clients 1 8

Each request is about another picture, or all are about one. Servers run in turn, one at a time, each in a process of
its own; the clients are OpenAI's. The answers of all servers must be equal.
"""

import argparse
import base64
import contextlib
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI

from ..common.machine import machine
from .full_size import chosen_config, random_model

ROOT = Path(__file__).parent.parent
NANO = ROOT / "checkpoints" / "pheye-nano"
QUESTION = "What is written on the sign?"
SERVERS = {
    "transformers serve": [
        "-c",
        "from transformers.cli.transformers import main; main()",
        "serve",
        "{model}",
        "--trust-remote-code",
    ],
    "pheye serve, one by one": ["-m", "pheye", "serve", "--model", "{model}", "--batch_size", "1"],
    "pheye serve, 8 at once": ["-m", "pheye", "serve", "--model", "{model}", "--batch_size", "8"],
    "pheye serve, 16 at once": ["-m", "pheye", "serve", "--model", "{model}", "--batch_size", "16"],
}


@contextlib.contextmanager
def running(command: list[str], model: str) -> Iterator[OpenAI]:
    """A client of a server that runs."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [word.format(model=model) for word in command]
    process = subprocess.Popen(
        [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    try:
        while process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            time.sleep(0.2)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=3600)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def random_folder(variant: str, folder: str) -> str:
    """A model of full size with random weights, and nano's tokenizer, in `folder`."""
    from pheye import PheyeImageProcessor, PheyeProcessor

    config = chosen_config(variant)
    random_model(config).save_pretrained(folder)
    size = config.vision_config.image_size
    images = PheyeImageProcessor(tiles_per_side=config.tiles_per_side, size={"height": size, "width": size})
    PheyeProcessor(images, PheyeProcessor.from_pretrained(NANO).tokenizer).save_pretrained(folder)
    return folder


numbers = itertools.count()


def request(api: OpenAI, model: str, max_tokens: int, is_shared: bool) -> tuple[str, float]:
    """An answer about the sign, and its seconds. What stands behind the end of a JPEG file makes it another one."""
    data = (ROOT / "docs" / "sign.jpg").read_bytes() + (b"" if is_shared else f" {next(numbers)}".encode())
    url = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    start = time.perf_counter()
    answer = api.chat.completions.create(
        model=model, messages=[{"role": "user", "content": parts}], max_tokens=max_tokens
    )
    return answer.choices[0].message.content.strip(), time.perf_counter() - start


def measure(api: OpenAI, model: str, options: argparse.Namespace, clients: int, is_shared: bool) -> dict:
    """Answers per second, the median seconds of an answer, and the different answers."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda _: request(api, model, options.max_tokens, is_shared), range(options.requests)))
    seconds = time.perf_counter() - start
    return {
        "answers per second": round(options.requests / seconds, 3),
        "seconds of an answer": round(statistics.median(time for _, time in found), 3),
        "answers": sorted({text for text, _ in found}),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", help="a model of full size with random weights (default: Pheye-nano)")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--max_tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=list(SERVERS))
    parser.add_argument("--shared_only", action="store_true", help="all requests about one picture")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        model = str(NANO) if options.variant is None else random_folder(options.variant, folder)
        for turn in range(options.rounds):
            for name in options.servers:
                with running(SERVERS[name], model) as api:
                    request(api, model, options.max_tokens, is_shared=True)  # warms it up
                    for is_shared in (True,) if options.shared_only else (False, True):
                        for clients in options.clients:
                            found = measure(api, model, options, clients, is_shared)
                            pictures = "one" if is_shared else "each its own"
                            row = {"round": turn, "server": name, "picture": pictures, "clients": clients, **found}
                            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
