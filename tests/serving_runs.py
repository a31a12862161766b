"""Servers in processes of their own, and a client for them."""

import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from openai import OpenAI
from PIL import Image

NANO = Path(__file__).parent.parent / "checkpoints" / "pheye-nano"
SIGN = Path(__file__).parent.parent / "docs" / "sign.jpg"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of a server, and its process, which is told to end in the end; it writes into `log`."""
    port = free_port()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_for(url: str, process: subprocess.Popen, log: Path):
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(url, timeout=5)
            return
        time.sleep(0.2)
    raise RuntimeError(log.read_text()[-3000:])


def client(address: str, api_key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key=api_key, max_retries=0)


def data_url(image: bytes | Path | Image.Image) -> str:
    if isinstance(image, Path):
        image = image.read_bytes()
    if isinstance(image, Image.Image):
        image.save(buffer := BytesIO(), "PNG")
        image = buffer.getvalue()
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def question(text: str, image: bytes | Path | Image.Image | None = None) -> dict:
    """A user's message, about an image if there is one."""
    image = [] if image is None else [{"type": "image_url", "image_url": {"url": data_url(image)}}]
    return {"role": "user", "content": [*image, {"type": "text", "text": text}]}


def streamed(api: OpenAI, **arguments) -> str:
    """An answer that is streamed, in one piece."""
    chunks = api.chat.completions.create(stream=True, **arguments)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
