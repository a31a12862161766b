"""Runs transformers' own common test classes against Pheye: `python conformance/run.py [pytest arguments]`.

The wheel lacks these classes. The source distribution has them; it is fetched from the package index once for each
version and kept in `.cache/conformance`. It lacks `GenerationTesterMixin`: `PHEYE_GENERATION_TESTS` may name a file
that holds it, such as `tests/generation/test_utils.py` of a checkout of transformers.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXCLUDED = "excluded: "  # the mark by which the summary tells exclusions from the tests' own skips

# What the common tests import and the source distribution lacks: two mixins, arguments for configs that have no
# sub-configs, and the way to pictures of the Hub, in whose place stands one made here: these tests use no network.
STUBS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "utils/fetch_hub_objects_for_ci.py": """\
from pathlib import Path

from PIL import Image


def url_to_local_path(url, *args, **kwargs):
    if not url.endswith((".png", ".jpg", ".jpeg")):
        return url
    path = Path(__file__).parent / "picture.png"
    if not path.exists():
        Image.linear_gradient("L").convert("RGB").save(path)
    return str(path)
""",
}


def prepare(version: str) -> Path:
    """The folder that holds transformers' `tests` package of `version`, fetched unless it is there."""
    folder = ROOT / ".cache" / "conformance" / version
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            fetch(version, Path(temporary))
            # Renamed when it is whole, so that an interrupted download leaves nothing behind.
            (Path(temporary) / "sources").rename(folder)
    for name, text in STUBS.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return folder


def fetch(version: str, folder: Path):
    """Write the tests of transformers' source distribution to `folder`/sources."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*download, "--no-binary=transformers", f"--dest={folder}", f"transformers=={version}"], check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        for member in archive.getmembers():
            name = member.name.partition("/")[2]
            if member.isfile() and name.startswith("tests/") and ".." not in name:
                path = folder / "sources" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())


class Summary:
    """Counts tests, not their subtests, and prints the counts and every exclusion at the end."""

    def __init__(self):
        self.outcomes = {}
        self.exclusions = {}

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.partition("::")[2].replace("::", ".")
        is_subtest = hasattr(report, "context")
        if report.failed:
            self.outcomes[name] = "failed"
        elif report.skipped and not is_subtest:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if reason.startswith(EXCLUDED):
                self.exclusions[name] = reason.removeprefix(EXCLUDED)
            self.outcomes[name] = "excluded" if name in self.exclusions else "skipped"
        elif report.when == "call" and not is_subtest:
            self.outcomes.setdefault(name, "passed")

    def pytest_terminal_summary(self, terminalreporter):
        counts = Counter(self.outcomes.values())
        terminalreporter.section("conformance")
        for name, reason in sorted(self.exclusions.items()):
            terminalreporter.write_line(f"excluded {name}: {reason}")
        line = ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped", "excluded"))
        terminalreporter.write_line(f"transformers {metadata.version('transformers')}: {line}")


def main(arguments: list[str]) -> int:
    import pytest

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    prepare(metadata.version("transformers"))
    test_file = Path(__file__).with_name("test_conformance.py")
    # The repository's own options are for its own tests: the common ones use markers that it does not know.
    options = [f"--rootdir={ROOT}", "--override-ini=addopts=", "-q", "-p", "no:cacheprovider", "-p", "no:warnings"]
    return pytest.main([str(test_file), *options, *arguments], plugins=[Summary()])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
