"""What is installed for what: pyproject.toml, the packages that code asks for, and what people are told agree."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions, requires
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import pytest

from graph import the_house
from k2quant.ground.extras import PACKAGES, Extra
from places import ROOT

OFFERED = {"triton", "vllm"}
"""What is used where it happens to be there: Triton comes with torch's builds for GPUs."""

BROUGHT_ALONG = {
    "aiohttp": "lm-eval",
    "fsspec": "huggingface-hub",
    "jinja2": "lm-eval",
    "llvmlite": "numba",
    "referencing": "jsonschema",
}
"""What is imported and no line of pyproject.toml names, and what requires it."""

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_OURS = re.compile(r"k2quant\[([\w,]+)\]")
_COMMAND = re.compile(r"k2quant\[([\w,]+)\]|\"\.\[([\w,]+)\]\"")


def _project() -> dict[str, Any]:
    read: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return read


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def brought(extra: str | None) -> set[str]:
    """Return the distributions that an extra brings, those of other extras in it too; of None what base brings."""
    lines = _project()["optional-dependencies"][extra] if extra else _project()["dependencies"]
    found: set[str] = set()
    for line in lines:
        if ours := _OURS.match(line):
            found.update(*(brought(name) for name in ours[1].split(",")))
        elif name := _NAME.match(line):
            found.add(_plain(name[0]))
    return found


@cache
def homes() -> Mapping[str, list[str]]:
    """Return the distributions that bring each package."""
    return packages_distributions()


def imported(module: str) -> Iterator[str]:
    """Yield the packages of others that a module imports, lazily too, but for type checkers."""
    tree = the_house().trees[module]
    hidden = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in hidden:
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        yield from {name.partition(".")[0] for name in names} - {"k2quant", *sys.stdlib_module_names}


@pytest.mark.parametrize("extra", get_args(Extra))
def test_an_extra_brings_what_it_is_asked_for(extra: Extra) -> None:
    """Each package without which a command names an extra is brought by that extra, and not by base."""
    names = {_plain(name) for name in PACKAGES[extra]}
    assert names <= brought(extra)
    assert not names & brought(None)


def test_all_is_all() -> None:
    """`all` brings what every extra for users brings, and `dev` brings that too."""
    extras = set(_project()["optional-dependencies"]) - {"dev", "docs", "mutants"}
    assert brought("all") == set().union(*map(brought, extras))
    assert brought("all") <= brought("dev")


def test_whatever_is_imported_is_installed_by_something() -> None:
    """Each package that the code imports is brought by base or an extra, or by what those require."""
    used = {name: module for module in the_house().paths for name in imported(module)}
    assert {"torch", "numba", "lm_eval"} <= used.keys()
    for name, by in BROUGHT_ALONG.items():
        assert name in {_plain(found[0]) for line in requires(by) or [] if (found := _NAME.match(line))}
    known = brought(None) | brought("all") | BROUGHT_ALONG.keys()
    owned = {name: {*map(_plain, homes().get(name, [name]))} for name in used}
    strange = {name: used[name] for name, owners in owned.items() if known.isdisjoint(owners)}
    assert strange.keys() <= OFFERED, strange


@pytest.mark.parametrize("name", ["click", "isal", "numba", "numpy", "pyyaml"])
def test_base_has_nothing_that_it_does_not_need(name: str) -> None:
    """Each requirement of base is imported by rooms that work without an extra."""
    assert brought(None) == {"click", "huggingface-hub", "isal", "numba", "numpy", "pyyaml"}
    rooms = ("k2quant.cli", "k2quant.checkpoint", "k2quant.kernels.codecs.cpu", "k2quant.formats")
    modules = (module for module in the_house().paths if module.startswith(rooms))
    used = set(chain.from_iterable(map(imported, modules)))
    assert any(name in {_plain(each) for each in homes().get(package, [])} for package in used)


def test_extras_that_people_are_told_of_exist() -> None:
    """Code, documents and examples name no other extras; and documents install from a clone, for no index has k2quant.

    `pip install 'k2quant[run]'` works where k2quant is installed, as where an error says so, and nowhere else.
    """
    extras = set(_project()["optional-dependencies"])
    for path in told():
        text = path.read_text()
        named = {name for pair in _COMMAND.findall(text) for part in pair if part for name in part.split(",")}
        assert named <= extras, path
        shown = re.sub(r"(?m)^k2quant: .*", "", text)  # what a command printed
        assert path.suffix == ".py" or not re.search(r"pip install [\"']?k2quant", shown), path


def told() -> Iterator[Path]:
    """Yield the files in which people are told what to install."""
    yield from (ROOT / "README.md", ROOT / "CONTRIBUTING.md")
    for room in ("docs", "examples", "k2quant", "eval", "exports", "qat", "kernels"):
        yield from (path for path in (ROOT / room).rglob("*.*") if path.suffix in {".md", ".py", ".yml", ".sh"})
