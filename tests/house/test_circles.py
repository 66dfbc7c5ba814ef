"""No import goes round in a circle, lazy ones and those for type checkers included."""

from __future__ import annotations

from pathlib import Path

import pytest

from graph import House, circles, made_up, the_house


def described(house: House) -> list[str]:
    """Return each circle: its modules, and the imports that make it with their lines."""
    edges = house.edges
    found = []
    for group in circles((edge.source, edge.target) for edge in edges):
        taken: dict[tuple[str, str], list[str]] = {}
        for edge in edges:
            if edge.source in group and edge.target in group:
                place, statement = house.place(edge.source, edge.statement.line), edge.statement
                taken.setdefault((place, statement.module), []).append(statement.name or "")
        lines = [f"  {place} {written(module, names)}" for (place, module), names in taken.items()]
        found.append("\n".join([" <-> ".join(group), *lines]))
    return found


def written(module: str, names: list[str]) -> str:
    """Return an import as it stands in the file."""
    return f"from {module} import {', '.join(names)}" if any(names) else f"import {module}"


def test_no_circles() -> None:
    """No module leads back to itself over its imports, wherever in a file these stand."""
    found = described(the_house())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "back",
    [
        "from k2quant.a import x",
        "def late():\n    from k2quant.a import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import k2quant.a",
        "from .a import x",
    ],
    ids=["plain", "in a function", "for type checkers", "relative"],
)
def test_a_circle_of_two_is_found(back: str, tmp_path: Path) -> None:
    """Two modules that import each other are named, with the lines that do it."""
    house = made_up(tmp_path, {"__init__.py": "", "a.py": "import k2quant.b\nx = 1\n", "b.py": f"{back}\n"})
    (found,) = described(house)
    assert found.startswith("k2quant.a <-> k2quant.b\n  k2quant/a.py:1 import k2quant.b\n  k2quant/b.py:")
    assert str(back.count("\n") + 1) in found.splitlines()[2].split()[0]


@pytest.mark.parametrize(
    "face",
    [
        '_HOMES = {"x": "inner"}',
        'def __getattr__(name):\n    return import_module("k2quant.room.inner")',
        '@command(homes={"x": "k2quant.room.inner"})\ndef main(): ...',
        '@command(homes={name: f"{__name__}.{name}" for name in ("inner", "other")})\ndef main(): ...',
    ],
    ids=["table", "function", "commands", "commands by name"],
)
def test_a_lazy_circle_is_found(face: str, tmp_path: Path) -> None:
    """A face that loads a module when it is asked leads to it as an import does."""
    inner = "def f():\n    from k2quant.room import x\n"
    house = made_up(tmp_path, {"__init__.py": "", "room/__init__.py": f"{face}\n", "room/inner.py": inner})
    (found,) = described(house)
    assert found.startswith("k2quant.room <-> k2quant.room.inner\n")


def test_a_longer_circle_is_one(tmp_path: Path) -> None:
    """Three modules in a ring are one circle; what only leads there is no part of it."""
    files = {f"{name}.py": f"import k2quant.{other}\n" for name, other in ("ab", "bc", "ca", "da")}
    (found,) = described(made_up(tmp_path, files))
    assert found.splitlines()[0] == "k2quant.a <-> k2quant.b <-> k2quant.c"


def test_a_face_of_its_own_modules_is_no_circle(tmp_path: Path) -> None:
    """A folder re-exports from its modules while these import each other: `from folder import module` is the module."""
    house = made_up(
        tmp_path,
        {
            "__init__.py": "from k2quant.room import x\n",
            "room/__init__.py": "from k2quant.room.upper import x\n",
            "room/upper.py": "from k2quant.room import lower\nfrom k2quant.room.lower import y\nx = lower\n",
            "room/lower.py": "y = 1\n",
        },
    )
    assert described(house) == []
