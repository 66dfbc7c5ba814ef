"""Where the checkpoints of a training lie, and of which step each is; without torch."""

from __future__ import annotations

import re
from pathlib import Path

STATE = "state.json"
"""Name of the file that a checkpoint has once it is whole."""
_NAME = re.compile(r"step-(?P<step>[0-9]{8})")


def path_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return folder / f"step-{step:08}"


def found(folder: Path) -> list[Path]:
    """Return the finished checkpoints of a folder, the newest last."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / STATE).is_file())


def step_of(path: Path) -> int:
    """Return the step that a checkpoint was saved after."""
    match = _NAME.fullmatch(path.name)
    assert match  # noqa: S101  `found` gave it
    return int(match["step"])
