"""What wheel and sdist must hold: every file of the package that runs or is read, and nothing else."""

from __future__ import annotations

import os
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


def differences(root: Path, names: Iterable[str], *, what: str) -> list[str]:
    """Return what an archive lacks of the package, and what it has below the package that the tree does not say."""
    needed = package_files(root)
    held = {name for name in names if name.startswith("k2quant/") and not name.endswith("/")}
    lacks = [f"{what} lacks {name}" for name in sorted(needed - held)]
    return lacks + [f"{what} holds {name}, which is no file of the package" for name in sorted(held - needed)]
