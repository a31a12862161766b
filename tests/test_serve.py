"""The command: its options, its end, and 200 requests of all kinds at once."""

import json
import random
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import openai
import pytest
from PIL import Image

from pheye.common.command import InputError
from pheye.serving.serve import main, parse

from serving_runs import NANO, client, question, running, streamed
from tiny import tiny_image


def test_the_key_may_be_in_the_environment(monkeypatch):
    monkeypatch.setenv("PHEYE_API_KEY", "secret")
    assert parse(["--model", "x"])["api_key"] == "secret"
    assert parse(["--model", "x", "--api_key", "other"])["api_key"] == "other"
    assert parse(["--model", "x", "--api_key", ""])["api_key"] is None
    monkeypatch.delenv("PHEYE_API_KEY")
    assert parse(["--model", "x"])["api_key"] is None
    assert parse(["--model", "x"])["host"] == "127.0.0.1" and not parse(["--model", "x"])["allow_urls"]


def test_what_is_no_model_or_not_installed_is_one_line(tmp_path, capsys, monkeypatch):
    assert main(["--model", str(tmp_path)]) == 1
    assert "has no config.json" in capsys.readouterr().err

    def missing(package, extra):
        raise InputError(f"This needs {package}: {extra}")

    monkeypatch.setattr("pheye.serving.serve.require", missing)
    assert main(["--model", str(tmp_path)]) == 1
    assert "This needs uvicorn: serve" in capsys.readouterr().err


def command(folder: Path, *options: str) -> list[str]:
    return ["-m", "pheye", "serve", "--model", str(folder), "--device", "cpu", *options]


@pytest.mark.slow
@pytest.mark.once
def test_sigterm_lets_answers_end_and_leaves_nothing(model_folder, tmp_path):
    with running(command(model_folder), tmp_path / "log") as (address, process):
        api = client(address)
        asked = {"model": str(model_folder), "messages": [question("What?", tiny_image())]}
        chunks = iter(api.chat.completions.create(stream=True, max_tokens=400, **asked))
        next(chunks)
        process.send_signal(signal.SIGTERM)
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
        assert process.wait(20) == -signal.SIGTERM  # as who starts it expects
    log = (tmp_path / "log").read_text()
    assert "Application shutdown complete" in log and "Traceback" not in log


@pytest.mark.slow
@pytest.mark.once
def test_block_of_the_serving_page_reads_the_sign(tmp_path, capsys, monkeypatch):
    page = (NANO.parent.parent / "docs" / "serving.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(NANO.parent.parent)
    with running(command(Path("checkpoints", "pheye-nano")), tmp_path / "log") as (address, _):
        exec(code.replace("http://localhost:8000", address), {})
    assert capsys.readouterr().out == "HOTEL"


# --- 200 requests from 16 clients ---

KINDS = ("whole", "streamed", "whole", "streamed", "broken", "huge", "large", "closed", "slow", "drawn")


def memory(process) -> float:
    """Of a process, in MB."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024


def png(image: Image.Image) -> bytes:
    image.save(buffer := BytesIO(), "PNG")
    return buffer.getvalue()


class Load:
    """A client that sends requests of each kind, and knows what must come back."""

    def __init__(self, address: str, model: str):
        self.address, self.api = address, client(address)
        self.asked = {"model": model, "max_tokens": 16}
        self.questions = [question(f"What is {n}?", tiny_image(n, 60 + 9 * n, 200 - 7 * n)) for n in range(12)]
        self.huge = png(Image.new("1", (20_000, 20_000)))  # 50 kB that would become 400 MB
        self.large = question("What?", png(Image.new("L", (7_000, 7_000), 99)))
        self.drawn = {**self.asked, "temperature": 1.0, "top_p": 0.9}
        self.expected = [self.whole(n) for n in range(12)]
        self.expected_drawn = [self.draw(n) for n in range(12)]
        self.expected_large = self.text([self.large])

    def text(self, messages, **asked) -> str:
        return self.api.chat.completions.create(messages=messages, **(asked or self.asked)).choices[0].message.content

    def whole(self, n: int) -> str:
        return self.text([self.questions[n]])

    def draw(self, n: int) -> str:
        return self.text([self.questions[n]], **self.drawn, seed=n)

    def connection(self, n: int, **asked) -> socket.socket:
        body = json.dumps({**self.asked, "messages": [self.questions[n]], "stream": True, **asked}).encode()
        host, _, port = self.address.removeprefix("http://").partition(":")
        sending = socket.create_connection((host, int(port)), timeout=120)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}"
        sending.sendall(f"{head}\r\n\r\n".encode() + body)
        return sending

    def send(self, number: int):
        """One request; raises unless what comes back is right."""
        kind, n = KINDS[number % len(KINDS)], number % 12
        if kind == "whole":
            assert self.whole(n) == self.expected[n]
        elif kind == "streamed":
            assert streamed(self.api, messages=[self.questions[n]], **self.asked) == self.expected[n]
        elif kind == "drawn":
            assert self.draw(n) == self.expected_drawn[n]
        elif kind == "large":
            assert self.text([self.large]) == self.expected_large
        elif kind in ("broken", "huge"):
            image = self.huge if kind == "huge" else png(tiny_image(n))[: 100 + n]
            with pytest.raises(openai.BadRequestError, match="too large" if kind == "huge" else "could not be read"):
                self.text([question("What?", image)])
        elif kind == "closed":
            with self.connection(n, max_tokens=400, stream=number % 20 < 10) as sending:
                time.sleep(random.Random(number).random() / 2)
                sending.close()
        elif kind == "slow":
            with self.connection(n) as sending:
                data = b""
                while piece := sending.recv(97):
                    data += piece
                    time.sleep(0.02)
            chunks = [json.loads(line) for line in re.findall(rb"^data: (\{.*\})\r?$", data, re.MULTILINE)]
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            assert text == self.expected[n] and b"[DONE]" in data


@pytest.mark.slow
@pytest.mark.once
def test_no_answer_is_lost_or_crossed_and_memory_stays_flat(model_folder, tmp_path):
    with running(command(model_folder), tmp_path / "log") as (address, process):
        load = Load(address, str(model_folder))
        used, peak, is_over = [], [], threading.Event()

        def watch():
            while not is_over.wait(0.05):
                peak.append(memory(process))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with ThreadPoolExecutor(16) as clients:
                for _ in range(3):  # the first round fills what is kept
                    list(clients.map(load.send, range(200)))
                    used.append(memory(process))
        finally:
            is_over.set()
            watcher.join()
        print(f"memory after each 200 requests: {used}, peak {max(peak):.0f} MB")
        assert used[-1] < used[0] + 60
        assert load.whole(0) == load.expected[0]
    assert "Traceback" not in (tmp_path / "log").read_text()
