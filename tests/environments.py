"""Environments of their own, for tests of what wants other packages than constraints.txt has."""

import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def checked(command: list, **kwargs) -> str:
    """What a command prints, if it succeeds."""
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    return result.stdout + result.stderr


def install(folder: Path, extra: str, constraints: Path, *packages: str) -> Path:
    """An environment with this checkout, one of its extras and more packages: the folder of its commands.

    It sees the packages of the present one, which are as fixed as those, but can change none of them.
    """
    checkout = folder / "checkout"
    files = [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py"), *ROOT.glob("[a-z]*/[a-z]*/*.py")]
    files += [ROOT / "README.md", ROOT / "pyproject.toml"]
    for file in files:
        (checkout / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, checkout / file.relative_to(ROOT))
    venv.create(folder / "venv", symlinks=True)
    commands = folder / "venv" / "bin"
    own = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    present = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (Path(sysconfig.get_path("purelib", vars=own)) / "present.pth").write_text("\n".join(present))
    pip = [commands / "python", "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    torch_pin = f"torch=={torch.__version__.partition('+')[0]}"
    checked([*pip, "--constraint", constraints, f"{checkout}[{extra}]", torch_pin, *packages])
    return commands
