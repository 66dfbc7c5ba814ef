"""The graph of a package's modules: who imports whom, on which line, and where that goes round in a circle."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

from places import ROOT


class Import(NamedTuple):
    """One import statement, or one line of a table of what is loaded when it is asked for."""

    line: int
    module: str
    """What is imported, or imported from: `k2quant.merge` of `from k2quant.merge import merge`."""
    name: str | None = None
    """What `from` takes of it; None of `import k2quant.merge` and of a module that a table names."""


class Edge(NamedTuple):
    """An import that leads from one module of the package to another."""

    source: str
    target: str
    statement: Import


class House:
    """A package as its files say it, read without importing anything; links are followed."""

    def __init__(self, root: Path, package: str = "k2quant") -> None:
        self.root = root
        self.package = package
        self.paths: dict[str, Path] = {}
        """Files by the name of their module; a package's file has the package's name."""
        self.packages: set[str] = set()
        """Modules that are the `__init__.py` of a folder."""
        for path in files_below(root / package):
            if path.suffix == ".py":
                parts = path.relative_to(root).with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                self.paths[name] = path
                if parts[-1] == "__init__":
                    self.packages.add(name)

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        """Each module, parsed once."""
        return {name: parse(path.resolve()) for name, path in self.paths.items()}

    @cached_property
    def imports(self) -> dict[str, list[Import]]:
        """Each module's imports, wherever they stand: in functions and for type checkers too."""
        return {name: [*self._written(name), *self._tables(name)] for name in self.paths}

    @cached_property
    def edges(self) -> list[Edge]:
        """Imports between modules of the package, in the order of the modules."""
        found = []
        for source, statements in self.imports.items():
            for statement in statements:
                target = self.target(statement)
                if target is not None and target != source:
                    found.append(Edge(source, target, statement))
        return found

    def target(self, statement: Import) -> str | None:
        """Return the module that an import leads to: a submodule if it names one, else what it takes the name from."""
        full = f"{statement.module}.{statement.name}"
        if statement.name is not None and full in self.paths:
            return full
        return statement.module if statement.module in self.paths else None

    def place(self, name: str, line: int) -> str:
        """Return `kernels/ops.py:7`: where a line of a module stands, links resolved."""
        return f"{self.shown(name)}:{line}"

    def shown(self, name: str) -> str:
        """Return a module's file as the repository has it."""
        return str(self.paths[name].resolve().relative_to(self.root.resolve()))

    def public(self, name: str) -> list[str] | None:
        """Return what a module's `__all__` names, None if it has none."""
        for node in self.trees[name].body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.AnnAssign):
                targets = [node.target]
            if any(isinstance(one, ast.Name) and one.id == "__all__" for one in targets):
                return [str(one) for one in ast.literal_eval(node.value)]  # type: ignore[attr-defined]
        return None

    def _written(self, name: str) -> Iterator[Import]:
        for node in ast.walk(self.trees[name]):
            if isinstance(node, ast.Import):
                yield from (Import(node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                module = self._absolute(name, node)
                yield from (Import(node.lineno, module, alias.name) for alias in node.names)

    def _absolute(self, name: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = name.split(".")
        kept = parts[: len(parts) - node.level + (name in self.packages)]
        return ".".join([*kept, node.module] if node.module else kept)

    def _tables(self, name: str) -> Iterator[Import]:
        """Yield the modules that a face loads when they are asked for: of `_HOMES`, `__getattr__` and `homes=`."""
        for node in ast.walk(self.trees[name]):
            lazy = (
                (isinstance(node, ast.FunctionDef) and node.name == "__getattr__" and node in self.trees[name].body)
                or (isinstance(node, ast.Assign) and any(ast.unparse(one) == "_HOMES" for one in node.targets))
                or (isinstance(node, ast.keyword) and node.arg == "homes")
            )
            for part in ast.walk(node) if lazy else ():
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    full = next((one for one in (part.value, f"{name}.{part.value}") if one in self.paths), None)
                    if full is not None:
                        yield Import(part.lineno, full)


@cache
def parse(path: Path) -> ast.Module:
    """Parse a file, once for all who ask."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def the_house() -> House:
    """Return the package of this repository, read once."""
    return House(ROOT)


def made_up(folder: Path, files: Mapping[str, str]) -> House:
    """Write a small package `k2quant` below a folder: contents by path; return its house."""
    for name, content in files.items():
        path = folder / "k2quant" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return House(folder)


def files_below(folder: Path) -> list[Path]:
    """Return every file of a folder, links followed, caches aside, in the order of their names."""
    found = []
    for home, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found += [Path(home, name) for name in names if not name.endswith(".pyc")]
    return sorted(found)


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Return the groups of modules in which each leads to each (strongly connected components of more than one)."""
    after: dict[str, list[str]] = {}
    for source, target in edges:
        after.setdefault(source, []).append(target)
        after.setdefault(target, [])
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    waiting: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:  # Tarjan's; modules are few, so the recursion is shallow
        numbers[name] = lowest[name] = len(numbers)
        waiting.append(name)
        for other in after[name]:
            if other not in numbers:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in waiting:
                lowest[name] = min(lowest[name], numbers[other])
        if lowest[name] == numbers[name]:
            cut = waiting.index(name)
            group = sorted(waiting[cut:])
            del waiting[cut:]
            if len(group) > 1:
                found.append(group)

    for name in sorted(after):
        if name not in numbers:
            visit(name)
    return sorted(found)
