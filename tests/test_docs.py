"""What the documents show is run as it stands there, and what they name is there."""

import contextlib
import functools
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pheye import PheyeConfig
from pheye.__main__ import COMMANDS
from pheye.common.published import PUBLISHED
from pheye.configuration_pheye import VARIANTS
from pheye.training.trained import save_trained, trained_state

from hub_server import FakeHub
from tiny import tiny_image

ROOT = Path(__file__).parent.parent
GUIDES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "nano/README.md", "checkpoints/pheye-nano/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PAGES = [*GUIDES, ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks" / "results").glob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def section(page: Path, heading: str) -> str:
    """What stands under a heading of the second level."""
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", page.read_text(), re.DOTALL | re.MULTILINE)[1]


# --- Python ---


def run(code: str, folder: Path, environment: dict[str, str]) -> str:
    """What a script prints, if it succeeds."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_first_block_of_the_readme_prints_what_the_readme_shows(tmp_path):
    """From the root of a clone, without the package."""
    code, shown = blocks(ROOT / "README.md", "python")[0], blocks(ROOT / "README.md", "text")[0]
    assert len([line for line in code.splitlines() if line]) <= 6
    assert run(f"import sys\nsys.modules['pheye'] = None\n{code}", ROOT, {"HF_HOME": str(tmp_path)}) == shown


@pytest.mark.once
def test_block_of_nanos_card_reads_the_sign(tmp_path):
    [code] = blocks(ROOT / "checkpoints" / "pheye-nano" / "README.md", "python")
    assert "HOTEL" in run(code, ROOT, {"HF_HOME": str(tmp_path)})


@pytest.mark.once
def test_block_of_the_training_page_loads_what_was_trained(model, processor, model_folder, tmp_path):
    [code] = blocks(ROOT / "docs" / "training.md", "python")
    (tmp_path / "out").mkdir()
    save_trained(trained_state(model), tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    run(code.replace("your-name/your-pheye", str(model_folder)), tmp_path, {})
    assert {"model.safetensors", "tokenizer_config.json"} <= {path.name for path in (tmp_path / "whole").iterdir()}


def test_every_python_block_is_in_a_test():
    tested = {"README.md", "checkpoints/pheye-nano/README.md", "docs/training.md", "docs/usage.md"}
    tested.add("docs/serving.md")  # in tests/test_serve.py
    assert {name_of(page) for page in PAGES if blocks(page, "python")} == tested


@pytest.mark.parametrize(("page", "first"), [("README.md", 1), ("docs/usage.md", 0)])
def test_python_blocks_run(page, first, model_folder, tmp_path):
    """In order, as one script, on a tiny model."""
    code = "\n".join(blocks(ROOT / page, "python")[first:])
    assert code
    for model in ("your-name/your-pheye", "pheye-x4-448"):
        code = code.replace(f'"{model}"', repr(str(model_folder)))
    for name in ("photo.jpg", "page.png"):
        tiny_image().save(tmp_path / name)
    with FakeHub() as hub:
        run(code, tmp_path, hub.environment(tmp_path / "cache"))
        if "push_to_hub" in code:
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


# --- Commands ---


def commands(page: Path) -> list[list[str]]:
    """The lines of a page's shell blocks that run something of ours, word by word."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if is_ours(words := shlex.split(line, comments=True))]


def is_ours(words: list[str]) -> bool:
    return words[:1] == ["pheye"] or any(re.match(r"pheye\.|(examples|benchmarks)/", word) for word in words)


def module_and_options(words: list[str]) -> tuple[str, list[str]]:
    """What a command runs, as `pheye NAME`, by `python -m`, by `accelerate launch ... -m` or as a script."""
    if words[0] == "pheye":
        return COMMANDS[words[1]][0], words[2:]
    place = next(index for index, word in enumerate(words) if re.match(r"pheye\.|(examples|benchmarks)/", word))
    assert words[0].startswith("python") or words[:2] == ["accelerate", "launch"], words
    assert (words[place - 1] == "-m") == words[place].startswith("pheye."), words
    return words[place].removeprefix("pheye.").removesuffix(".py").replace("/", "."), words[place + 1 :]


@functools.cache
def options_of(module: str) -> set[str]:
    """The options that a command knows: those of its help, or else those that its source names."""
    parse = getattr(importlib.import_module(f"pheye.{module}"), "parse", None)
    if parse is None:
        return set(re.findall(r'"(--\w+)"', (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()))
    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
        parse(["--help"])
    return set(re.findall(r"--\w+", shown.getvalue()))


ALL_COMMANDS = [
    pytest.param(words, id=f"{name_of(page)}: {' '.join(words)[:60]}") for page in GUIDES for words in commands(page)
]


@pytest.mark.parametrize("words", ALL_COMMANDS)
def test_commands_are_understood_by_their_own_parsers(words):
    module, options = module_and_options(words)
    assert not [word for word in options if re.match("--[a-z]+-", word)], "options are written with underscores"
    imported = importlib.import_module(f"pheye.{module}")
    if hasattr(imported, "parse"):
        assert imported.parse(options)
    else:
        assert {word for word in options if word.startswith("--")} <= options_of(module)


def test_every_subcommand_is_shown():
    shown = {words[1] for page in GUIDES for words in commands(page) if words[0] == "pheye"}
    assert shown == set(COMMANDS)


@pytest.mark.once
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_sentences_exist(page):
    spans = re.findall(r"`([^`]+)`", prose(page))
    for span in spans:
        words = span.split()
        if words[0] == "pheye" and len(words) > 1 and words[1].islower():
            assert words[1] in COMMANDS, span
        if words[:2] == ["python", "-m"] and words[2].islower():
            module, options = module_and_options(words)
            assert {word for word in options if word.startswith("--")} <= options_of(module), span
        assert not [word for word in words if re.match("--[a-z]+-", word)], span


@pytest.mark.once
def test_makefile_has_every_target_that_the_documents_name():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in GUIDES:
        assert set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets, page
    named = set(re.findall(r"^\| `make ([a-z-]+)`", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))
    assert named == targets


# --- Tables and the tree of the README ---


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.+\|$", text, re.M)]


def scores_table() -> list[list[str]]:
    """The README's rows of the table that begins with the column `model`."""
    text = section(ROOT / "README.md", "Use a published model")
    return table_rows(re.search(r"^\| model \|.*?\n\n", text, re.DOTALL | re.MULTILINE)[0])


@pytest.mark.once
def test_published_scores_are_those_of_the_papers_table():
    _, _, *rows = scores_table()
    columns = [PUBLISHED[name].scores for name in ("vqav2", "nocaps", "textvqa", "textcaps")]
    models = list(dict.fromkeys(model for scores in columns for model in scores))
    assert rows == [[model, *(str(scores.get(model, "-")) for scores in columns)] for model in models]
    assert {f"Pheye-{variant}" for variant in VARIANTS} < set(models)


@pytest.mark.once
def test_published_scores_name_their_benchmark_split_and_metric():
    head, *_ = scores_table()
    published = [PUBLISHED[name] for name in ("vqav2", "nocaps", "textvqa", "textcaps")]
    assert head == ["model", *(f"{one.benchmark} ({one.split}), {one.metric}" for one in published)]


@pytest.mark.once
def test_sizes_of_the_published_models_are_those_of_their_configurations():
    rows = {row[0]: row[1:] for row in table_rows(section(ROOT / "README.md", "What it costs"))}
    assert rows[""] == list(VARIANTS)
    configs = [PheyeConfig.from_variant(variant) for variant in VARIANTS]
    assert rows["crops"] == [f"{config.tiles_per_side} x {config.tiles_per_side}" for config in configs]
    assert rows["image tokens"] == [str(config.tokens_per_image) for config in configs]
    [blocks] = [cells for name, cells in rows.items() if name.startswith("cross-attention blocks")]
    assert blocks == [str(len(config.cross_attention_layers)) for config in configs]


@pytest.mark.once
def test_the_tree_is_that_of_the_repository():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no checkout of git")
    [tree] = re.findall(r"^```text\n(.*?)^```", section(ROOT / "README.md", "Files"), re.DOTALL | re.MULTILINE)
    named = {line.split()[0] for line in tree.splitlines()}
    assert not [name for name in named if not (ROOT / name).exists()]
    files = [Path(name) for name in listed.stdout.splitlines() if not name.startswith(".") and (ROOT / name).exists()]
    rooms = {f"{file.parts[0]}/" for file in files if len(file.parts) > 1}
    modules = {file.name for file in files if len(file.parts) == 1 and file.suffix == ".py"}
    assert named == rooms | modules - {"__init__.py", "__main__.py", "setup.py"}


# --- Links ---


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub writes them into addresses."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.once
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.once
def test_names_on_the_architecture_page_are_in_the_files_beside_them():
    page = ROOT / "docs" / "architecture.md"
    named, source = [], None
    for row in table_rows(section(page, "The way of an image, from file to answer"))[2:]:
        source = found[1] if (found := re.search(r"\((.+)\)", row[1])) else source  # or "the same"
        named += [(name, source) for name in re.findall(r"`([\w.]+)`", row[2])]
    named += re.findall(r"`([\w.]+)`(?:[^`\[]{0,20})\sin\s+\[[^\]]+\]\(([^)]+)\)", prose(page))
    assert len(named) > 25
    for name, source in named:
        name = name.split(".")[-1]
        assert re.search(rf"\b{name}\b", (page.parent / source).read_text()), (name, source)


def test_scores_on_the_card_and_in_the_readme_are_those_of_the_results():
    results = (ROOT / "benchmarks" / "results" / "nano.md").read_text()
    fine = results.split("## Fine letters")[1]
    card, readme = ((ROOT / path).read_text() for path in ("checkpoints/pheye-nano/README.md", "README.md"))
    shares = {}
    for question in ("what is written on the sign", "shapes, all questions", "how many", "is there", "what colour"):
        [row] = [line for line in results.splitlines() if line.startswith(f"| {question} |")]
        assert row in card.splitlines()
        shares[question] = round(float(re.search(r"\| ([\d.]+) % \(", row)[1]))
    signs, shapes = shares["what is written on the sign"], shares["shapes, all questions"]
    small = re.search(r"\| full \| (([\d.]+) \([\d. to]+\))", fine)
    for text in (
        f"| unseen words, read exactly | {signs} % |",
        f"| the same, finer letters | {round(float(small[2]))} % |",
        f"| questions about shapes | {shapes} % |",
        f"it reads {small[1].replace(' (', ' % (')}.",
    ):
        assert text in card
    assert f"| What is written on the sign? | {signs} % |" in readme
    assert f"| questions about shapes | {shapes} % |" in readme
