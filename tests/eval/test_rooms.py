"""The folders of `eval/`: who may import whom, and that nobody imports in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from places import ROOT

HOME = ROOT / "eval"

FLOORS = {"statistics": 0, "runs": 1, "gating": 2, "asking": 2, "drift": 3, "tools": 3, "report": 4, "__init__": 5}
"""`asking` writes what `gating` reads: both know the folder of a run, neither knows the other."""


def name_of(path: Path) -> str:
    """Return a file's name as it is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("k2quant", *parts)).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted(HOME.rglob("*.py"))}


def room_of(path: Path) -> str:
    """Return the folder of `eval/` that a file lies in."""
    return path.relative_to(HOME).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """Return the files of `eval/` that a file imports anywhere: in functions and for types alone, too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= inner or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & FILES.keys() - {name_of(path)}


@pytest.mark.parametrize("name", FILES)
def test_no_import_points_up(name: str) -> None:
    """A file imports from its own folder and from those on floors below."""
    room = room_of(FILES[name])
    for other in (room_of(FILES[imported]) for imported in imports_of(FILES[name])):
        assert other == room or FLOORS[other] < FLOORS[room], f"{name} imports from {other}"


def test_nobody_imports_in_a_circle() -> None:
    """An import inside a function, or for types alone, would only hide a circle."""
    graph = {name: imports_of(path) for name, path in FILES.items()}
    TopologicalSorter(graph).prepare()
