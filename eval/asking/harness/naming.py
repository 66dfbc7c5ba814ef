"""The tasks, groups and tags that lm-eval knows, and which tasks a name stands for."""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from k2quant.errors import UsageError
from k2quant.eval.asking.harness.version import VERSION
from k2quant.ground.saying.faults import said


@functools.cache
def own_tasks() -> Any:
    """Return the manager of lm-eval's own tasks; to read its 10,000 files takes seconds, so once in a process."""
    return TaskManager()


def manager_of(names: Sequence[str], include: Sequence[Path]) -> Any:
    """Return a manager of task YAML that is free to be changed; lm-eval's own files are read only if they must.

    Raises:
        UsageError: a folder to include is none.
    """
    for folder in include:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder of task YAML")
    given = TaskManager(include_path=[str(folder) for folder in include], include_defaults=False)
    if include and all(name in given.task_index for name in names):
        return given
    manager = copy.copy(own_tasks())
    manager._index = {**manager.task_index, **given.task_index}  # noqa: SLF001  as its constructor does
    manager._all_tasks = sorted(manager.task_index)  # noqa: SLF001  the same
    return manager


def resolved(manager: Any, names: Sequence[str], include: Sequence[Path] = ()) -> list[str]:
    """Return the names of the index that names, patterns and files stand for, each once.

    Args:
        manager: of task YAML.
        names: as a user gave them.
        include: folders with task YAML, one of which may hold a file that cannot be read.

    Raises:
        UsageError: one stands for nothing.
    """
    wanted: list[str] = []
    for name in names:
        matches = [name] if name in manager.task_index or Path(name).is_file() else manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; `lm-eval ls tasks` lists all"
            raise UsageError(f"lm-eval {VERSION} has no task {name!r}{_unreadable(include) or hint}")
        wanted += [match for match in matches if match not in wanted]
    return wanted


def _unreadable(include: Sequence[Path]) -> str | None:
    """Name a YAML file that lm-eval passes over in silence, or return None."""
    for path in (path for folder in include for path in sorted(folder.rglob("*.yaml"))):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # noqa: BLE001  whatever a file of somebody's makes of it
            return f"; {path} cannot be read: {said(error)}"
    return None


def apart(manager: Any, names: list[str]) -> list[str]:
    """Leave out names whose tasks are all in another one: lm-eval takes no task twice."""
    tasks = {name: {entry.name for entry in leaves(manager, name)} for name in names}
    kept: list[str] = []
    for name in names:
        inside = any(tasks[name] < tasks[other] for other in names) or any(
            tasks[name] == tasks[other] for other in kept
        )
        if not (tasks[name] and inside):
            kept.append(name)
    return kept


def leaves(manager: Any, name: str, above: tuple[str, ...] = ()) -> list[Entry]:
    """Return the tasks that a name stands for, groups and tags resolved.

    Raises:
        UsageError: a group is part of itself.
    """
    entry = manager.task_index.get(name)
    if entry is None:
        return []
    if name in above:
        raise UsageError(f"group {name!r} is part of itself")
    above = (*above, name)
    if entry.kind is Kind.TAG:
        return [leaf for tagged in sorted(entry.tags) for leaf in leaves(manager, tagged, above)]
    if entry.kind is not Kind.GROUP:
        return [entry]
    members = entry.cfg.get("task") or []
    called = [
        member.get("task") or member.get("group") if isinstance(member, Mapping) else member for member in members
    ]
    return [leaf for member in called if isinstance(member, str) for leaf in leaves(manager, member, above)]
