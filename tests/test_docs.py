"""Everything that the documentation shows is run as it stands there, on a tiny model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hub_server import FakeHub
from tiny import tiny_image

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "docs/usage.md"])
def test_python_blocks_run(page, model_folder, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    script = tmp_path / "blocks.py"
    script.write_text("\n".join(blocks).replace("your-name/your-pheye", str(model_folder)))
    for name in ("photo.jpg", "page.png"):
        tiny_image().save(tmp_path / name)
    with FakeHub() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "cache")}
        result = subprocess.run(
            [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-3000:]
        if "push_to_hub" in script.read_text():
            assert "your-name/my-pheye" in hub.repos


@pytest.mark.once
def test_demo_answers_and_draws_where_it_looks(tmp_path):
    demo = [sys.executable, ROOT / "examples" / "demo.py", "--output", tmp_path, "--signs", "2"]
    result = subprocess.run(demo, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert " of 2 right" in result.stdout and result.stdout.count("read as") == 2
    assert result.stdout.count("answer:") == 2
    pictures = {"sign-1.png", "sign-2.png", "sign-attention.png", "photograph-attention.png"}
    assert {path.name for path in tmp_path.iterdir()} == pictures


def test_makefile_has_every_target_that_the_readme_names():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`?\bmake ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert named
    assert named <= targets


def test_links_lead_to_files():
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"
