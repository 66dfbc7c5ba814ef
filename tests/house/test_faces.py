"""A folder with a face is used through it: what its `__all__` names, and what `OPEN` lets neighbours use behind it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from graph import House, Import, made_up, the_house

Opened = Mapping[str, Mapping[str, str]]

OPEN: dict[str, dict[str, str]] = {
    "k2quant.calib": {
        "report": "the page of a calibration",
        "solving.planning": "what solving would take, for a plan that a command has",
        "solving.settings": "the words of its options, without torch",
        "solving.writing": "the plan of a conversion that solves",
        "stats": "what a calibration knows, for conversions that take it",
    },
    "k2quant.calib.collecting": {
        "attention": "attention that needs no score matrix on a CPU, for the pass that solves",
        "experts": "routed experts one by one, and who is sent to them",
        "memory": "what a layer takes, and how tokens are cut, without torch",
        "moments": "the sum of a Hessian, to solve by and to be timed",
        "pieces": "rows as they go through a layer",
        "running": "what holds for any pass over samples",
        "walking": "a model whose layers have weights one at a time",
    },
    "k2quant.calib.inputs": {
        "choosing": "numbers of rows, and how many of them judge, without torch",
    },
    "k2quant.eval": {
        "asking.presets": "what presets hold, as a table",
        "asking.request": "what a run is asked to do",
        "drift.findings": "what fidelity and blame found, as data",
        "drift.reading": "findings read back from their files",
        "gating.pairing": "flips of a pilot, to be counted",
        "gating.policy": "a policy's file, and shares as people write them",
        "gating.verdict": "a row of a verdict",
        "report": "has a face of its own",
        "statistics.planning": "a plan, and the limit on flips that it takes",
        "tools.requests": "the requests that ship, as a list",
        "tools.settings": "what a run of tool calls is asked to do",
        "statistics.repeats_planning": "a plan of items that are asked several times, and what a pilot of them says",
    },
    "k2quant.kernels.codecs.cpu": {
        "checks": "which scales a codec takes, for other engines' layouts of the same codes",
        "fp4.budget": "what rounding to E2M1 explains, for both formats of FP4",
    },
    "k2quant.kernels.codecs.reference": {
        "seam": "the reference as codecs, to be chosen and to build on",
    },
    "k2quant.merge": {
        "figures": "what a report adds up",
    },
    "k2quant.model": {
        "architecture": "the config of a checkpoint, without its weights",
        "assembly": "a model whose weights are not read yet, which QAT makes dense",
        "causal_lm": "what `load_model` returns, for types",
        "decoding": "rows of a weight as BF16, to compare with what QAT trained",
        "filling": "weights into a model that QAT made dense",
        "generation": "tokenizers, answers, and no chatter of transformers",
        "loading": "names of dtypes, and models whose weights are not read yet",
        "modules": "the kinds of experts and matrices, and names of backends",
        "passes": "texts through a model, shared by eval and calibration",
        "placement": "a device, checked",
    },
    "k2quant.qat": {
        "showing": "the first examples of a job, with what of them is learnt",
        "exporting.asked": "the job of a run or a file, without torch",
        "exporting.export": "the export of a run by its folder",
        "job": "has a face of its own",
        "planning": "what a job would take",
        "report.recovery": "a run's result in one sentence",
        "run.history": "what a run noted of itself",
        "run.result": "what a training came to, and whether it is done",
        "training.stepping": "how long a job's steps take",
        "training.training": "a job's whole training",
    },
}
"""Behind each face, the modules and folders that modules outside may use all the same, each with what it is there for.

What the face itself offers is taken from the face, wherever it stands.
"""


def faces(house: House) -> dict[str, set[str]]:
    """Return what each folder's `__all__` names; the package's own face is for users, all its modules are behind it."""
    named = {name: house.public(name) for name in house.packages - {house.package}}
    return {name: set(public) for name, public in sorted(named.items()) if public is not None}


def behind(house: House) -> Iterator[tuple[str, str, str]]:
    """Yield each use, from outside of a folder, of what its `__all__` does not name: where, which face, and of what."""
    for source in house.paths:
        outside = {face: names for face, names in faces(house).items() if not f"{source}.".startswith(f"{face}.")}
        for line, used in dict.fromkeys(uses(house, source)):
            for face, names in outside.items():
                if used.startswith(f"{face}.") and inside(face, used).split(".")[0] not in names:
                    yield house.place(source, line), face, used


def skips(house: House, opened: Opened) -> list[str]:
    """Return each use of what lies behind a face that is not open, or that the face offers, and what to do about it."""
    found = []
    for place, face, used in behind(house):
        shown = house.shown(face)
        if used in offered(house, face):
            found.append(f"{place} uses {used}: take it from {face}, for __all__ of {shown} names it")
        elif door(house, opened, face, used) is None:
            module = module_of(house, face, used)
            other = f", or open {module!r} of {face} in OPEN, with a reason" if module else ""
            found.append(f"{place} uses {used}: take what __all__ of {shown} names{other}")
    return found


def unused(house: House, opened: Opened) -> list[str]:
    """Return what is open although nobody outside uses it: it is no module, or a face or a wider entry has it too."""
    doors = {
        (face, door(house, opened, face, used)) for _, face, used in behind(house) if used not in offered(house, face)
    }
    return [f"OPEN has {name!r} of {face}" for face in opened for name in opened[face] if (face, name) not in doors]


def door(house: House, opened: Opened, face: str, used: str) -> str | None:
    """Return the entry that opens what is used, the widest if several do."""
    names = (name for name in sorted(opened.get(face, ())) if f"{face}.{name}" in house.paths)
    return next((name for name in names if f"{inside(face, used)}.".startswith(f"{name}.")), None)


def offered(house: House, face: str) -> set[str]:
    """Return the full names, where they stand, of what a face takes from its modules for its `__all__`."""
    return {whole(one) for one in house.imports[face] if one.name in faces(house)[face]}


def module_of(house: House, face: str, used: str) -> str | None:
    """Return the module below a face that a full name is, or stands in."""
    while used != face and used not in house.paths:
        used = used.rpartition(".")[0]
    return None if used == face else inside(face, used)


def inside(face: str, used: str) -> str:
    """Return a full name as it is below a face."""
    return used.removeprefix(f"{face}.")


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
    chains = [node for node in ast.walk(house.trees[source]) if isinstance(node, ast.Attribute)]
    within = {id(node.value) for node in chains}
    for node in chains:
        first, _, rest = dotted(node).partition(".")
        if bound.get(first) in house.paths and id(node) not in within:
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
    """Outside of a folder with an `__all__`, modules use what that names, a name or a submodule, and what is open."""
    found = skips(the_house(), OPEN)
    assert not found, "\n".join(found)


def test_what_is_open_is_used() -> None:
    """`OPEN` has a reason for each entry, and no entry that nobody uses."""
    assert all(reason for reasons in OPEN.values() for reason in reasons.values())
    found = unused(the_house(), OPEN)
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
    "room/attic/__init__.py": "",
    "room/attic/box.py": "x = 1\n",
    "room/attic/chest.py": "x = 1\n",
}


@pytest.mark.parametrize(
    ("statement", "module"),
    [
        ("from k2quant.room import inner", "inner"),
        ("import k2quant.room.inner", "inner"),
        ("def f():\n    from k2quant.room.inner import hidden", "inner"),
        ("from k2quant import room\nroom.inner.hidden", "inner"),
        ("import k2quant.room as r\nr.inner", "inner"),
        ("from k2quant.room.attic.box import x", "attic.box"),
        ("from k2quant.room import attic", "attic"),
    ],
)
def test_a_skip_into_a_face_is_found(statement: str, module: str, tmp_path: Path) -> None:
    """Whatever is used of a folder beside its `__all__` fails, and is told both ways out."""
    found = skips(made_up(tmp_path, {**ROOM, "user.py": f"{statement}\n"}), {})
    assert found
    assert all(one.startswith("k2quant/user.py:") for one in found)
    assert "take what __all__ of k2quant/room/__init__.py names" in found[0]
    assert f"or open {module!r} of k2quant.room in OPEN, with a reason" in found[0]


def test_a_star_has_one_way_out(tmp_path: Path) -> None:
    """What is no module cannot be opened."""
    (found,) = skips(made_up(tmp_path, {**ROOM, "user.py": "from k2quant.room import *\n"}), {})
    assert found.endswith("take what __all__ of k2quant/room/__init__.py names")


@pytest.mark.parametrize(
    ("face", "statement"),
    [
        ("from k2quant.room.inner import shown", "from k2quant.room.inner import shown"),
        ("from k2quant.room.inner import shown", "from k2quant.room import inner\ninner.shown"),
        ("if TYPE_CHECKING:\n    from k2quant.room.inner import shown", "from k2quant.room.inner import shown"),
    ],
    ids=["plain", "by a dot", "lazy"],
)
def test_what_a_face_offers_is_taken_from_it(face: str, statement: str, tmp_path: Path) -> None:
    """A name of `__all__` that is taken from its module fails, even where that is open."""
    files = {**ROOM, "room/__init__.py": f'{face}\n__all__ = ["shown"]\n', "user.py": f"{statement}\n"}
    (found,) = skips(made_up(tmp_path, files), {"k2quant.room": {"inner": "a reason"}})
    assert "uses k2quant.room.inner.shown: take it from k2quant.room, for" in found


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
    assert skips(made_up(tmp_path, {**ROOM, "user.py": f"{statement}\n"}), {}) == []


@pytest.mark.parametrize(
    "statement",
    [
        "from k2quant.room.inner import hidden",
        "from k2quant.room import inner\ninner.hidden",
        "from k2quant.room.attic.box import x",
        "from k2quant.room.attic import box",
        "import k2quant.room.attic.box\nk2quant.room.attic.box.x",
    ],
)
def test_what_is_open_may_be_used(statement: str, tmp_path: Path) -> None:
    """A module behind a face may be used where the table has it."""
    opened = {"k2quant.room": {"inner": "a reason", "attic.box": "another"}}
    assert skips(made_up(tmp_path, {**ROOM, "user.py": f"{statement}\n"}), opened) == []


def test_a_folder_that_is_open_is_open_whole(tmp_path: Path) -> None:
    """With a folder all its modules may be used; with a module, no module beside it."""
    house = made_up(tmp_path, {**ROOM, "user.py": "from k2quant.room.attic.box import x\n"})
    assert skips(house, {"k2quant.room": {"attic": "a reason"}}) == []
    (found,) = skips(house, {"k2quant.room": {"attic.chest": "a reason"}})
    assert "open 'attic.box' of k2quant.room" in found


@pytest.mark.parametrize(
    ("statement", "names"),
    [
        ("", ["inner"]),
        ("from k2quant.room.inner import shown", ["inner"]),
        ("from k2quant.room.open.deep import x", ["open"]),
        ("from k2quant.room import nothing", ["nothing"]),
        ("from k2quant.room.attic.box import x", ["attic.box", "attic"]),
    ],
    ids=["nobody", "offered", "named", "no module", "wider"],
)
def test_an_entry_without_use_is_found(statement: str, names: list[str], tmp_path: Path) -> None:
    """An entry fails that nobody needs: what its room uses, or the face has, or a wider entry opens, needs none."""
    opened = {"k2quant.room": dict.fromkeys(names, "a reason")}
    found = unused(made_up(tmp_path, {**ROOM, "user.py": f"{statement}\n"}), opened)
    assert found == [f"OPEN has {names[0]!r} of k2quant.room"]


def test_a_face_inside_a_face_holds_too(tmp_path: Path) -> None:
    """A submodule that `__all__` names, or the table, may have a face of its own."""
    inner = {"room/open/__init__.py": "__all__ = []\n", "room/attic/__init__.py": "__all__ = []\n"}
    user = "from k2quant.room.open.deep import x\nfrom k2quant.room.attic.box import x\n"
    house = made_up(tmp_path, {**ROOM, **inner, "user.py": user})
    first, second = skips(house, {"k2quant.room": {"attic": "a reason"}})
    assert "take what __all__ of k2quant/room/open/__init__.py names, or open 'deep'" in first
    assert "take what __all__ of k2quant/room/attic/__init__.py names, or open 'box'" in second
