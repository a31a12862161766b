"""`transformers serve`, unmodified, with a Pheye: the clients that people use get its answers. And `transformers chat`
with both servers."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving_runs import NANO, SIGN, client, question, running, streamed

pytestmark = pytest.mark.slow

TRANSFORMERS = "from transformers.cli.transformers import main; main()"
# Without trust, the package makes its classes known first.
COMMANDS = {
    "trust": ["-c", TRANSFORMERS, "serve", str(NANO), "--device", "cpu", "--trust-remote-code"],
    "package": ["-c", f"import pheye; pheye.register(); {TRANSFORMERS}", "serve", str(NANO), "--device", "cpu"],
}


@pytest.mark.parametrize("way", COMMANDS)
def test_clients_get_answers_about_an_image(way, tmp_path):
    with running(COMMANDS[way], tmp_path / "log") as (address, _):
        api = client(address)
        messages = [question("What is written on the sign?", SIGN)]
        asked = {"model": str(NANO), "max_tokens": 12}
        read = api.chat.completions.create(messages=messages, **asked)
        assert read.choices[0].message.content.strip() == "HOTEL" and read.usage.prompt_tokens > 20
        messages += [{"role": "assistant", "content": "HOTEL"}, question("What colour is the circle?")]
        with ThreadPoolExecutor(4) as clients:
            second = clients.map(lambda _: streamed(api, messages=messages, **asked), range(4))
            assert [answer.strip() for answer in second] == ["green"] * 4
        if way == "trust":
            assert "yellow triangle" in chat(address)


@pytest.mark.once
def test_chat_of_transformers_talks_to_pheye_serve(tmp_path):
    with running(["-m", "pheye", "serve", "--model", str(NANO), "--device", "cpu"], tmp_path / "log") as (address, _):
        assert "yellow triangle" in chat(address)


def chat(address: str) -> str:
    """What `transformers chat` prints of a question without an image and of its answer."""
    options = ("max_new_tokens=5", "do_sample=False")
    command = [sys.executable, "-c", TRANSFORMERS, "chat", str(NANO), f"{address}/v1", *options]
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200", "HF_HUB_OFFLINE": "0"}
    typed = "What is this?\nn\n!exit\n"
    done = subprocess.run(command, input=typed, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout
