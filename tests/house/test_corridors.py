"""Short corridors, and a sentence at each door: how much a folder holds, and that it says what it is for."""

from __future__ import annotations

import ast
import os
from pathlib import Path

from graph import House, made_up, the_house
from places import ROOT

MOST = 12
"""Names that a folder may hold: more than a dozen side by side are a list to search, no room to know."""

HOMES = ("k2quant", "kernels", "qat", "calib", "eval", "exports", "benchmarks", "tests")

ASIDE = {Path("benchmarks/results"), Path("tests/data")}
"""Folders of data."""

UNCOUNTED = {"__init__.py", "__main__.py", "py.typed", "__pycache__"}


def long_corridors(root: Path) -> list[str]:
    """Return the folders that hold too much; links are not followed and do not count."""
    found = []
    for top in HOMES:
        for home, folders, files in os.walk(root / top):
            here = Path(home).relative_to(root)
            folders[:] = [name for name in folders if name not in UNCOUNTED and here / name not in ASIDE]
            names = [name for name in (*folders, *files) if name not in UNCOUNTED and not Path(home, name).is_symlink()]
            if len(names) > MOST:
                found.append(f"{here} holds {len(names)} names, more than {MOST}: {', '.join(sorted(names))}")
    return sorted(found)


def silent(house: House) -> list[str]:
    """Return modules without a docstring, and folders without an `__init__.py` that could have one."""
    found = [house.shown(name) for name, tree in house.trees.items() if not ast.get_docstring(tree)]
    homes = {name.rpartition(".")[0] for name in house.paths} - {"", f"{house.package}.kernels"}
    return sorted(found) + sorted(f"{home}: no __init__.py" for home in homes - house.packages)


def test_corridors_are_short() -> None:
    """A folder holds at most a dozen files and folders."""
    found = long_corridors(ROOT)
    assert not found, "\n".join(found)


def test_every_folder_and_module_says_what_it_is_for() -> None:
    """Each folder of the package has a docstring in its `__init__.py`, `kernels/` aside, and so has each module."""
    assert silent(the_house()) == []


def test_a_thirteenth_name_is_found(tmp_path: Path) -> None:
    """Twelve names are a corridor, thirteen are too many; links, caches and `__init__.py` do not count."""
    folder = tmp_path / "k2quant" / "room"
    (folder / "__pycache__").mkdir(parents=True)
    for number in range(MOST):
        (folder / f"m{number:02}.py").touch()
    (folder / "__init__.py").touch()
    (folder / "linked").symlink_to(tmp_path)
    assert long_corridors(tmp_path) == []
    (folder / "inner").mkdir()
    (found,) = long_corridors(tmp_path)
    assert found.startswith("k2quant/room holds 13 names, more than 12: inner, m00.py")


def test_silence_is_found(tmp_path: Path) -> None:
    """A module or a face without a docstring is named, and so is a folder without a face; `kernels/` needs none."""
    said = '"""What it is for."""\n'
    files = {"__init__.py": said, "a.py": "x = 1\n", "room/b.py": said, "kernels/c.py": said, "hall/__init__.py": ""}
    assert silent(made_up(tmp_path, files)) == [
        "k2quant/a.py",
        "k2quant/hall/__init__.py",
        "k2quant.room: no __init__.py",
    ]
