"""Which file may import which: the rules of the house (docs/architecture.md), each with the imports that break it."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
ROOMS = {"answering", "conversion", "training", "evaluation", "nano", "page", "serving"}
OUTSIDE = {"benchmarks", "examples", "tests", "conformance"}  # they use the rooms, and no room uses them
HUB = {path.stem for path in ROOT.glob("*_pheye.py")}
NANO = "drawing", "learning", "scoring", "comparing"  # its folders, each of which imports only those before it
RUNS_AS_A_FILE = {"app", "convert_checkpoint"}  # `python app.py` has no package to import from relatively


def module_files(root: Path) -> dict[str, Path]:
    """Every file of the package and around it, by its module's name inside `pheye` ("" for the package itself)."""
    files = {}
    for folder in (root, *(root / name for name in sorted({"common", *ROOMS, *OUTSIDE}))):
        for path in sorted(folder.glob("*.py") if folder == root else folder.rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            files[name.removesuffix("__init__").removesuffix(".")] = path
    files.pop("setup", None)
    return files


def imported(source: str, name: str, is_package: bool, modules: set[str]) -> dict[str, set[str]]:
    """The modules of the package that a module's source imports, wherever it does: by "relative" and "absolute"."""
    found = {"relative": set(), "absolute": set()}
    package = name.split(".") if is_package and name else name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "pheye"]
            found["absolute"] |= {name.removeprefix("pheye").removeprefix(".") for name in names}
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "pheye"):
            if node.level:
                kind, parts = "relative", package[: len(package) - node.level + 1]
                parts = parts + (node.module.split(".") if node.module else [])
            else:
                kind, parts = "absolute", node.module.split(".")[1:]
            base = ".".join(parts)
            for alias in node.names:
                inner = f"{base}.{alias.name}" if base else alias.name
                found[kind].add(inner if inner in modules else base)
    return found


def room_of(module: str) -> str:
    """The folder of a module; "hub" for the files that a Hub repo carries, "" for the others of the root."""
    first, *rest = module.split(".")
    return "hub" if first in HUB else first if rest or first in {"common", *ROOMS, *OUTSIDE} else ""


def place_in_nano(module: str) -> int:
    """The place of a module's folder in that order; nano's commands, outside of all folders, come last."""
    folder = module.split(".")[1]
    return NANO.index(folder) if folder in NANO else len(NANO)


def is_command(source: str) -> bool:
    return 'if __name__ == "__main__":' in source.splitlines()


def broken_rules(imports: dict[str, set[str]], commands: set[str]) -> list[str]:
    """One line for each import that breaks a rule."""
    broken = []
    for module, targets in sorted(imports.items()):
        room = room_of(module)
        for target in sorted(targets):
            other, rule = room_of(target), None
            if room == "hub" and other != "hub":
                rule = "Hub files import only Hub files: a Hub repo carries nothing else"
            elif room == "common" and other in ROOMS:
                rule = "common/ imports no room"
            elif target in commands and room not in OUTSIDE and module != "__main__":
                rule = "no room imports a command: move what both need into a file of its own"
            elif other == "nano" and room not in {"nano", "examples", "tests"}:
                rule = "nothing imports nano/ but examples and tests"
            elif other in {"benchmarks", "examples"} and room not in {other, "tests"}:
                rule = "benchmarks/ and examples/ are imported by tests only"
            elif room == other == "nano" and module != "nano" and place_in_nano(module) < place_in_nano(target):
                rule = f"the folders of nano/ import each other in the order {', '.join(NANO)}"
            elif other in {"tests", "conformance"} and room != other:
                rule = "nothing imports tests"
            if rule is not None:
                broken.append(f"{module or 'the package'} imports {target}. {rule}.")
    return broken


def circle(imports: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a circle, the first one again at the end."""
    state: dict[str, bool] = {}  # False while its imports are being followed

    def follow(module: str, path: list[str]) -> list[str] | None:
        if state.get(module) is False:
            return [*path[path.index(module) :], module]
        if module not in state:
            state[module] = False
            for target in sorted(imports.get(module, ())):
                if found := follow(target, [*path, module]):
                    return found
            state[module] = True
        return None

    return next((found for module in sorted(imports) if (found := follow(module, []))), None)


@pytest.fixture(scope="module")
def house() -> tuple[dict[str, dict[str, set[str]]], set[str]]:
    """Imports of each module, and which modules are commands."""
    files = module_files(ROOT)
    sources = {name: path.read_text() for name, path in files.items()}
    imports = {
        name: imported(source, name, files[name].name == "__init__.py", set(files)) for name, source in sources.items()
    }
    return imports, {name for name, source in sources.items() if is_command(source)}


def joined(imports: dict[str, dict[str, set[str]]]) -> dict[str, set[str]]:
    return {module: kinds["relative"] | kinds["absolute"] for module, kinds in imports.items()}


def test_no_import_breaks_a_rule(house):
    imports, commands = house
    assert {"answering.caption", "training.train", "evaluation.evaluate", "convert_checkpoint"} <= commands
    broken = broken_rules(joined(imports), commands)
    assert not broken, "\n" + "\n".join(broken)


def test_no_imports_go_in_a_circle_not_even_inside_functions(house):
    found = circle(joined(house[0]))
    assert found is None, " -> ".join(found)


def test_imports_inside_the_package_are_relative(house):
    for module, kinds in house[0].items():
        if room_of(module) in OUTSIDE - {"benchmarks"} or module in RUNS_AS_A_FILE:
            assert not kinds["relative"], f"{module} runs as a file, and imports relatively: {kinds['relative']}"
        elif room_of(module) != "benchmarks":
            assert not kinds["absolute"], f"{module} imports {kinds['absolute']} by pheye.: write a relative import"


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("modeling_pheye", "from .common.command import InputError", "Hub files import only Hub files"),
        ("modeling_pheye", "def f():\n    from . import __version__", "Hub files import only Hub files"),
        ("common.files", "from ..answering import engine", "common/ imports no room"),
        ("evaluation.samples", "from ..answering.caption import folder_requests", "no room imports a command"),
        ("evaluation.tasks", "def f():\n    from ..nano.words import word", "nothing imports nano/"),
        ("nano.scoring.held_out", "from pheye.benchmarks import measuring", "benchmarks/ and examples/"),
        ("nano.drawing.pictures", "from ..learning.configs import TILES", "the folders of nano/"),
        ("training.rows", "import pheye.tests.tiny", "nothing imports tests"),
    ],
)
def test_what_breaks_a_rule_is_told(house, module, source, rule):
    _, commands = house
    files = module_files(ROOT)
    found = imported(source, module, False, {*files, "tests.tiny"})
    [line] = broken_rules({module: found["relative"] | found["absolute"]}, commands)
    assert line.startswith(f"{module} imports ") and rule in line


def test_what_keeps_the_rules_is_not_told():
    allowed = {
        "modeling_pheye": {"blocks_pheye"},
        "nano.scoring.held_out": {"training.mixture", "evaluation.tertiles", "nano.drawing.pictures"},
        "examples.demo": {"nano.drawing.pictures"},
        "__main__": {"answering.caption"},
        "benchmarks.loading": {"convert_checkpoint"},
    }
    assert broken_rules(allowed, {"answering.caption", "convert_checkpoint"}) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
