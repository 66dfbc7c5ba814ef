"""A folder with a face is used through it: what its `__all__` names, and nothing behind."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from graph import House, Import, made_up, the_house


def faces(house: House) -> dict[str, set[str]]:
    """Return what each folder's `__all__` names; the package's own face is for users, all its modules are behind it."""
    named = {name: house.public(name) for name in house.packages - {house.package}}
    return {name: set(public) for name, public in sorted(named.items()) if public is not None}


def skips(house: House) -> list[str]:
    """Return each use of what lies behind a face, from outside of its folder."""
    found = []
    for source in house.paths:
        outside = {face: names for face, names in faces(house).items() if not f"{source}.".startswith(f"{face}.")}
        for line, used in dict.fromkeys(uses(house, source)):
            for face, names in outside.items():
                behind = used.removeprefix(f"{face}.").split(".")[0]
                if used.startswith(f"{face}.") and behind not in names:
                    place = house.place(source, line)
                    found.append(f"{place} uses {used}, but {behind!r} is not in __all__ of {house.shown(face)}")
    return found


def uses(house: House, source: str) -> Iterator[tuple[int, str]]:
    """Yield the full name of whatever a module imports, and of what it takes of that by a dot, with its line."""
    bound: dict[str, str] = {}
    for statement in house.imports[source]:
        full = whole(statement)
        if full.startswith(f"{house.package}."):
            yield statement.line, full
    for node in ast.walk(house.trees[source]):
        if isinstance(node, ast.Import):
            bound |= {one.asname or house.package: one.name if one.asname else house.package for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            bound |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    for node in ast.walk(house.trees[source]):
        if isinstance(node, ast.Attribute):
            first, _, rest = dotted(node).partition(".")
            if bound.get(first) in house.packages:
                yield node.lineno, f"{bound[first]}.{rest}"


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` of names with dots between them, else something that no import binds."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def whole(statement: Import) -> str:
    """Return the full name of what an import brings."""
    return statement.module if statement.name is None else f"{statement.module}.{statement.name}"


def test_folders_are_used_through_their_faces() -> None:
    """Outside of a folder whose `__init__.py` has `__all__`, modules use what that names: a name, or a submodule."""
    found = skips(the_house())
    assert not found, "\n".join(found)


def test_what_a_face_names_exists() -> None:
    """Each name of an `__all__` is a submodule or stands in the `__init__.py`; lazily loaded ones too, for types."""
    house = the_house()
    for face, names in faces(house).items():
        standing = {whole(one).split(".")[-1] for one in house.imports[face]}
        standing |= {getattr(node, "name", "") for node in house.trees[face].body}
        for node in house.trees[face].body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                standing |= {ast.unparse(target) for target in targets}
        missing = [name for name in names - standing if f"{face}.{name}" not in house.paths]
        assert not missing, f"{house.shown(face)} has no {missing}"


def test_kernels_have_no_face_at_the_top() -> None:
    """`kernels/` has no `__init__.py`, since Hugging Face's `kernels` has that import name; so it has no face."""
    assert "k2quant.kernels" not in the_house().packages


ROOM = {
    "__init__.py": "",
    "room/__init__.py": 'from k2quant.room.inner import shown\n__all__ = ["open", "shown"]\n',
    "room/inner.py": "shown = hidden = 1\n",
    "room/other.py": "from k2quant.room.inner import hidden\n",
    "room/open/__init__.py": "",
    "room/open/deep.py": "x = 1\n",
}


@pytest.mark.parametrize(
    ("statement", "behind"),
    [
        ("from k2quant.room.inner import shown", "inner"),
        ("from k2quant.room import inner", "inner"),
        ("import k2quant.room.inner", "inner"),
        ("def f():\n    from k2quant.room.inner import hidden", "inner"),
        ("from k2quant.room import *", "*"),
        ("from k2quant import room\nroom.inner.hidden", "inner"),
        ("import k2quant.room as r\nr.inner", "inner"),
    ],
)
def test_a_skip_into_a_face_is_found(statement: str, behind: str, tmp_path: Path) -> None:
    """Whatever is used of a folder beside its `__all__` fails, with both names."""
    found = skips(made_up(tmp_path, {**ROOM, "user.py": f"{statement}\n"}))
    assert found
    assert all(one.startswith("k2quant/user.py:") for one in found)
    assert f"{behind!r} is not in __all__ of k2quant/room/__init__.py" in found[0]


@pytest.mark.parametrize(
    "statement",
    [
        "from k2quant.room import shown",
        "from k2quant.room import open",
        "from k2quant.room.open.deep import x",
        "import k2quant.room\nk2quant.room.shown",
        "import k2quant.room\nk2quant.room.open.deep.x",
    ],
)
def test_what_a_face_names_may_be_used(statement: str, tmp_path: Path) -> None:
    """A name of `__all__` may be used, and whatever is in a submodule that it names; inside, all may."""
    assert skips(made_up(tmp_path, {**ROOM, "user.py": f"{statement}\n"})) == []


def test_a_face_inside_a_face_holds_too(tmp_path: Path) -> None:
    """A submodule that `__all__` names may have a face of its own."""
    files = {**ROOM, "room/open/__init__.py": "__all__ = []\n", "user.py": "from k2quant.room.open.deep import x\n"}
    (found,) = skips(made_up(tmp_path, files))
    assert "'deep' is not in __all__ of k2quant/room/open/__init__.py" in found
