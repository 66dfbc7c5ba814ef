"""The house: who may import whom, what may be loaded when, and where the folders lie."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from graph import Edge, House, made_up, the_house
from places import ROOT

FLOORS: dict[str, int] = {
    "errors": 0,
    "ground": 1,
    "kernels": 2,
    "formats": 3,
    "checkpoint": 4,
    "calib.stats": 5,
    "conversion": 6,
    "checking": 7,
    "model": 7,
    "merge": 7,
    "data": 8,
    "report": 8,
    "exports": 8,
    "nano": 9,
    "calib": 9,
    "qat": 9,
    "eval": 9,
    "cli": 10,
    "__init__": 11,
    "__main__": 11,
}
"""The floor of each room, as docs/design.md has them; a folder that others need far below stands by itself."""

INNER: dict[str, tuple[str, ...]] = {
    "kernels": ("devices", "codecs", "products solvers", "tuning", "ops"),
    "eval": ("statistics", "runs", "gating", "asking drift", "tools", "report", "__init__"),
    "qat": (
        "config",
        "job rounding",
        "loading preparing run showing",
        "exporting report",
        "planning",
        "training",
        "launch",
        "__init__ __main__",
    ),
}
"""How folders, and files beside them, stand on each other inside the big rooms: a line for each floor, lowest first."""

LINKED = ("kernels", "qat", "calib", "eval", "exports")
"""Rooms that stand at the root; `k2quant/` has links to them."""


def room_of(module: str) -> str:
    """Return the room that a module belongs to; the package's own `__init__.py` is one."""
    _, room, folder, *_ = [*module.split("."), "__init__", "__init__"]
    return inner if (inner := f"{room}.{folder}") in FLOORS else room


def place_in_room(module: str) -> str:
    """Return the folder or the file of its room that a module belongs to."""
    return [*module.split("."), "__init__"][2]


def inner_floors(room: str) -> dict[str, int]:
    """Return the floor of each folder and file of a room."""
    return {name: floor for floor, names in enumerate(INNER[room]) for name in names.split()}


def pointing_up(house: House) -> list[str]:
    """Return the imports that lead to no lower floor: between rooms, and between the folders of a room."""
    found = []
    for edge in house.edges:
        source, target = room_of(edge.source), room_of(edge.target)
        if source != target:
            floors = FLOORS
        elif source in INNER:
            floors, source, target = inner_floors(source), place_in_room(edge.source), place_in_room(edge.target)
        if source != target and not floors.get(source, -1) > floors.get(target, 99):
            found.append(described(house, edge, f"{source} does not stand above {target}"))
    return list(dict.fromkeys(found))


def described(house: House, edge: Edge, fault: str) -> str:
    """Return one import that should not be."""
    return f"{house.place(edge.source, edge.statement.line)} imports {edge.target}: {fault}"


def test_no_import_points_up() -> None:
    """A module imports from floors below, and from its own room; there, from its own folder and from those below."""
    found = pointing_up(the_house())
    assert not found, "\n".join(found)


def test_every_room_has_a_floor() -> None:
    """No file of the package stands outside the house, and none of a big room outside of its floors."""
    modules = the_house().paths
    assert {room_of(name) for name in modules} <= FLOORS.keys()
    for room in INNER:
        inside = {place_in_room(name) for name in modules if room_of(name) == room}
        assert inside == inner_floors(room).keys(), room


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("ground/units.py", "from k2quant.formats.layouts import x", "ground does not stand above formats"),
        ("model/saving.py", "def f():\n    import k2quant.merge.update", "model does not stand above merge"),
        ("ground/units.py", "from k2quant import ground", "ground does not stand above __init__"),
        ("attic/a.py", "import k2quant.ground.units", "attic does not stand above ground"),
        ("kernels/devices/a.py", "from k2quant.kernels.codecs import values", "devices does not stand above codecs"),
        ("eval/drift/a.py", "import k2quant.eval.asking.b", "drift does not stand above asking"),
    ],
    ids=["up", "sideways", "the top", "no floor", "up in a room", "sideways in a room"],
)
def test_an_import_that_points_up_is_found(file: str, content: str, fault: str, tmp_path: Path) -> None:
    """One that leads up or sideways fails, between rooms and between the folders of a room."""
    others = (
        "formats/layouts.py",
        "merge/update.py",
        "ground/units.py",
        "kernels/codecs/values.py",
        "eval/asking/b.py",
    )
    files = {"__init__.py": "", **dict.fromkeys(others, ""), file: f"{content}\n"}
    (found,) = pointing_up(made_up(tmp_path, files))
    assert found.startswith(f"k2quant/{file}:")
    assert fault in found


def test_an_import_that_points_down_is_none(tmp_path: Path) -> None:
    """Folders of one floor, and what lies below, may be used."""
    files = {"eval/drift/a.py": "from k2quant.eval.drift import b\nimport k2quant.eval.runs.c\n"}
    house = made_up(
        tmp_path, {**files, "eval/drift/b.py": "import k2quant.errors\n", "eval/runs/c.py": "", "errors.py": ""}
    )
    assert len(house.edges) == 3
    assert pointing_up(house) == []


def test_a_jitted_file_uses_no_other() -> None:
    """Numba's cache notices changes of the file of a function alone, so jitted code never calls into another file."""
    house = the_house()
    jitted = {name for name in house.paths if "numba" in {used.split(".")[0] for used in modules_of(house, name)}}
    assert {house.shown(name) for name in jitted} == {
        "kernels/codecs/cpu/fp4/budget.py",
        "kernels/codecs/cpu/fp4/loops.py",
        "kernels/codecs/cpu/fp4/search_loops.py",
        "kernels/codecs/cpu/gguf_loops.py",
        "kernels/codecs/cpu/loops.py",
        "kernels/codecs/cpu/search_loops.py",
        "kernels/products/cpu/dot_loops.py",
        "kernels/products/cpu/panels.py",
        "kernels/solvers/cpu/loops.py",
    }
    for name in jitted:
        assert not jitted & {house.target(one) for one in house.imports[name]}, f"{name} imports jitted code"


def test_one_folder_knows_lm_eval() -> None:
    """lm-eval is an extra: whatever it changes, one folder has to follow, and nothing else needs it."""
    house = the_house()
    users = {name for name in house.paths if "lm_eval" in {used.split(".")[0] for used in modules_of(house, name)}}
    assert {house.paths[name].parent.resolve() for name in users} == {ROOT / "eval/asking/harness"}


def modules_of(house: House, name: str) -> set[str]:
    """Return every module name that a file imports, of the package and of others."""
    return {one.module for one in house.imports[name]}


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
    code = f"import sys; {statement}; print(sorted({{'torch', 'numpy', 'numba'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_completion_names_what_is_loaded_later() -> None:
    """`dir(k2quant)` has every public name, and loads nothing for it."""
    code = "import sys, k2quant; print({*k2quant.__all__} <= {*dir(k2quant)}, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


def test_rooms_are_reached_through_the_package() -> None:
    """`import k2quant` is enough for `k2quant.eval.gate` and `k2quant.qat.QATConfig`, which need no torch."""
    code = "import sys, k2quant; print(k2quant.eval.gate.__name__, k2quant.qat.QATConfig().to, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["gate", "int4", "False"]


def test_conversion_on_the_cpu_imports_no_torch(k2_source: Path, tmp_path: Path) -> None:
    """A whole conversion on the CPU runs without torch, one that searches scales too."""
    code = (
        "import sys, k2quant; k2quant.convert(sys.argv[1], sys.argv[2], 'int4', method='mse'); "
        "print('torch' in sys.modules)"
    )
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
