"""What wheel and sdist must hold: every file of the package that runs or is read, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

SHIPPED = (".py", ".json", ".txt", "py.typed")
"""How the names of files end that belong to the package."""


def package_files(root: Path, package: str = "k2quant") -> set[str]:
    """Return the files that an archive must hold below the package, links followed: `k2quant/kernels/ops.py`."""
    found = set()
    for home, folders, names in os.walk(root / package, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found |= {Path(home, name).relative_to(root).as_posix() for name in names if name.endswith(SHIPPED)}
    return found


def packaged(root: Path) -> list[str]:
    """Return what setuptools would put into a wheel of a checkout, by the checkout's own pyproject.toml."""
    command = [sys.executable, "-P", "-c", "import setuptools; setuptools.setup()", "--quiet", "build_py"]
    done = subprocess.run([*command, "--build-lib", "built"], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = root / "built"
    return [path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()]


def differences(root: Path, names: Iterable[str], *, what: str) -> list[str]:
    """Return what an archive lacks of the package, and what it has below the package that the tree does not say."""
    needed = package_files(root)
    held = {name for name in names if name.startswith("k2quant/") and not name.endswith("/")}
    lacks = [f"{what} lacks {name}" for name in sorted(needed - held)]
    return lacks + [f"{what} holds {name}, which is no file of the package" for name in sorted(held - needed)]
