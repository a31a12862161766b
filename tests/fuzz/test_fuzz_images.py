"""Bytes give the image processor pixels or one sentence, whatever they are: half a minute; ten by `make fuzz`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = int(os.environ.get("FUZZ", 30))
pytestmark = [pytest.mark.slow, pytest.mark.once, pytest.mark.timeout(SECONDS + 300)]


def test_no_bytes_are_answered_by_another_error_than_one_that_names_the_image(tmp_path):
    pytest.importorskip("atheris", reason="has no wheel for this machine")
    script = Path(__file__).parent / "images.py"
    command = [sys.executable, script, tmp_path / "corpus", f"-max_total_time={SECONDS}"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
