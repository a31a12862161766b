"""The notebook that fine-tunes Pheye-nano: it runs as it is, and Pheye-nano learns what it is taught."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "fine_tune_nano.ipynb"
MOST_BYTES = 300_000


def outputs_of(notebook: dict) -> list[dict]:
    return [output for cell in notebook["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]


def printed(notebook: dict) -> str:
    return "".join("".join(output["text"]) for output in outputs_of(notebook) if output["output_type"] == "stream")


def scores(notebook: dict) -> list[int]:
    """Right answers: before, to the question that Pheye-nano knows, and after."""
    return [int(count) for count in re.findall(r"(\d+) of 20 right", printed(notebook))]


@pytest.mark.once
def test_what_is_stored_is_small_and_shows_pictures_and_no_place_of_a_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    assert sum("image/png" in output.get("data", {}) for output in outputs_of(notebook)) == 2
    assert not any(output["output_type"] == "error" for output in outputs_of(notebook))
    assert not re.search(r"/(home|root|tmp|work|opt|usr|Users)/", text)
    assert not re.search(r"(?i)warn|failed|error|W\d{4} ", printed(notebook))
    before, known, after = scores(notebook)
    assert before == 0 and after >= 10 and known > 0


@pytest.mark.once
def test_it_trains_by_the_command_of_the_training_page():
    [cell] = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if "train --model" in "".join(cell["source"])]
    page = (ROOT / "docs" / "training.md").read_text()
    [command] = re.findall(r"pheye train --model checkpoints/pheye-nano[^`]*", page)
    options = re.findall(r"--(?!model|data|image_folder|output|disable_tqdm)\w+ [^\s-]\S*", command)
    assert len(options) > 5 and all(option in "".join(cell["source"]) for option in options)


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.timeout(3600)
def test_it_runs_and_pheye_nano_learns_the_question(tmp_path):
    import nbclient
    import nbformat

    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    folder = tmp_path / "examples"
    folder.mkdir()
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(notebook, timeout=3000, resources={"metadata": {"path": str(folder)}})
    client.execute()
    assert "24 steps in all." in printed(notebook)
    before, _, after = scores(notebook)
    assert before == 0 and after >= 8
    assert (folder / "fine-tune-nano" / "out" / "config.json").is_file()
