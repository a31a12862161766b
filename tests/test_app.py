"""The command `pheye app`: its options, what it says where something is missing, and the page in an environment of its
own, because Gradio wants an older pillow than the other tests have."""

import os
import re
import shutil
import sys

import pytest

from pheye.app import main, parse

from environments import ROOT, checked, install

pytestmark = pytest.mark.once


def test_the_model_may_come_from_the_environment_as_in_a_space(monkeypatch):
    monkeypatch.delenv("PHEYE_MODEL", raising=False)
    with pytest.raises(SystemExit):
        parse([])
    monkeypatch.setenv("PHEYE_MODEL", "name/of-a-space")
    assert parse([])["model"] == "name/of-a-space"
    assert parse(["--model", "other"])["model"] == "other"


@pytest.mark.parametrize("package", ["gradio", "skimage"])
def test_without_its_packages_it_says_what_to_install(package, monkeypatch, capsys):
    for name in ("gradio", "skimage"):
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    assert main(["--model", "anything"]) == 1
    assert capsys.readouterr().err == f'error: This needs {package}: run pip install ".[app]" in a clone of Pheye.\n'


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("chromium") is None, reason="There is no Chromium; apt-get install chromium.")
def test_the_page_in_a_browser(tmp_path):
    commands = install(tmp_path, "app", ROOT / "constraints-app.txt", "playwright")
    tests = [commands / "python", "-m", "pytest", "-p", "no:cacheprovider", "-m", "slow", ROOT / "tests/browser"]
    printed = checked(tests, cwd=tmp_path, env={**os.environ, "GRADIO_TEMP_DIR": str(tmp_path / "gradio")})
    assert int(re.search(r"(\d+) passed", printed)[1]) > 10 and "skipped" not in printed
