"""The house: who may import whom, what may be loaded when, and where the folders lie."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from places import ROOT

FLOORS: dict[str, int] = {
    "errors": 0,
    "ground": 1,
    "kernels": 2,
    "formats": 3,
    "checkpoint": 4,
    "conversion": 5,
    "checking": 6,
    "model": 6,
    "merge": 6,
    "report": 7,
    "nano": 8,
    "calib": 8,
    "qat": 8,
    "eval": 8,
    "cli": 9,
    "__init__": 10,
    "__main__": 10,
}
"""The floor of each room, as docs/design.md has them."""

LINKED = ("kernels", "qat", "calib", "eval")
"""Rooms that stand at the root; `k2quant/` has links to them."""

FILES = sorted(path for home in ("k2quant", *LINKED) for path in (ROOT / home).glob("**/*.py"))


def room_of(path: Path) -> str:
    """Return the room that a file of the package belongs to."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] in LINKED else parts[1]


def imports_of(path: Path) -> set[str]:
    """Return the rooms of k2quant that a file imports anywhere, functions included."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "k2quant":
            parts = node.module.split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("k2quant.")}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_points_up(path: Path) -> None:
    """A module imports from floors below, and from its own room."""
    room = room_of(path)
    for other in imports_of(path) - {room}:
        assert other in FLOORS, f"{path}: unknown room {other}"
        assert FLOORS[other] < FLOORS[room], f"{path} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})"


def test_every_room_has_a_floor() -> None:
    """No file of the package stands outside the house."""
    assert {room_of(path) for path in FILES} <= FLOORS.keys()


def test_a_jitted_file_uses_no_other() -> None:
    """Numba's cache notices changes of the file of a function alone, so jitted code never calls into another file."""
    jitted = {path for path in FILES if "numba" in {name.split(".")[0] for name in third_party(path)}}
    assert {str(path.relative_to(ROOT / "kernels")) for path in jitted} == {
        "codecs/cpu/loops.py",
        "products/cpu/dot_loops.py",
        "products/cpu/panels.py",
    }
    names = {".".join(("k2quant", *path.relative_to(ROOT).with_suffix("").parts)) for path in jitted}
    for path in jitted:
        assert not names & third_party(path), f"{path} imports jitted code of another file"


def test_one_file_knows_lm_eval() -> None:
    """lm-eval is an extra: whatever it changes, one file has to follow, and nothing else needs it."""
    users = {path.name for path in FILES if "lm_eval" in {name.split(".")[0] for name in third_party(path)}}
    assert users == {"harness.py"}


def third_party(path: Path) -> set[str]:
    """Return every module name that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize(
    "statement",
    [
        "import k2quant",
        "import k2quant.cli",
        "import k2quant.conversion.plan, k2quant.checking.inspection",
        "import k2quant.eval, k2quant.qat",
    ],
)
def test_import_loads_nothing_heavy(statement: str) -> None:
    """Importing the package or the command line loads no torch, no numpy and no numba."""
    code = f"import sys; {statement}; print(sorted({{'torch', 'numpy', 'numba', 'rich'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_rooms_are_reached_through_the_package() -> None:
    """`import k2quant` is enough for `k2quant.eval.gate` and `k2quant.qat.QATConfig`, which need no torch."""
    code = "import sys, k2quant; print(k2quant.eval.gate.__name__, k2quant.qat.QATConfig().to, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["gate", "int4", "False"]


def test_conversion_on_the_cpu_imports_no_torch(k2_source: Path, tmp_path: Path) -> None:
    """A whole conversion on the CPU runs without torch."""
    code = "import sys, k2quant; k2quant.convert(sys.argv[1], sys.argv[2], to='int4'); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(k2_source), str(tmp_path / "out")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_links_lead_to_the_folders_at_the_root() -> None:
    """`k2quant/kernels` is the folder `kernels`; a checkout that made a text file of the link would ship no kernels."""
    rooms = [name for name in LINKED if (ROOT / name).is_dir()]
    assert {"kernels", "eval", "qat"} <= set(rooms)
    for name in rooms:
        assert (ROOT / "k2quant" / name).is_symlink()
        assert (ROOT / "k2quant" / name).resolve() == ROOT / name
    assert not (ROOT / "kernels" / "__init__.py").exists()
