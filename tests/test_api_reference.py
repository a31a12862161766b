"""`make docs`: a page for each module that is meant to be imported, with its docstrings."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent


def api() -> list[str]:
    """The modules that the Makefile names."""
    return (
        re.search(r"^API := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
        .replace("\\", "")
        .split()
    )


def path_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def test_every_module_of_the_reference_exists_and_every_hub_file_is_in_it():
    assert all(path_of(module).is_file() for module in api())
    assert {path.stem for path in ROOT.glob("*_pheye.py")} <= set(api())


def test_modules_and_public_classes_have_docstrings():
    without = {"PheyePreTrainedModel", "PheyeProcessorKwargs"}  # the library's own forms
    for module in api():
        tree = ast.parse(path_of(module).read_text())
        assert ast.get_docstring(tree), module
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name not in without:
                assert ast.get_docstring(node), f"{module}.{node.name}"


@pytest.mark.slow
def test_the_reference_is_made_with_a_page_per_module(tmp_path):
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "--output-directory", str(tmp_path)]
    done = subprocess.run([*command, *(f"pheye.{module}" for module in api())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for module in api():
        page = (tmp_path / "pheye" / f"{module.replace('.', '/')}.html").read_text()
        names = [node.name for node in ast.parse(path_of(module).read_text()).body if isinstance(node, ast.ClassDef)]
        assert all(name in page for name in names if not name.startswith("_"))
