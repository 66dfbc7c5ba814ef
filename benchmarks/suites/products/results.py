"""The results of a run of `kernels.py` and their file, which a crash leaves whole."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Results:
    """The results of a run and the file that they are written to after every cell."""

    file: Path
    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, file: Path, *, resume: bool) -> Results:
        """Start anew, or take up what stands in the file."""
        found = json.loads(file.read_text()) if resume and file.exists() else {}
        return cls(file, {"cells": [], "crashed": {}} | found)

    @property
    def running(self) -> Path:
        """The file that names the contestant at work, so that a crash can be laid at its door."""
        return self.file.with_suffix(".running")

    def done(self) -> set[str]:
        """Return the keys of the cells that were measured."""
        return {record["key"] for record in self.data["cells"]}

    def blame(self, why: str) -> bool:
        """Note a crash against whoever was at work, and return whether somebody was.

        A cell in which it is not known who crashed is given up.
        """
        if not self.running.exists():
            return False
        key, name = json.loads(self.running.read_text())
        print(f"{key}: {name or 'somebody'} {why}", flush=True)
        if name and name not in self.data["crashed"].setdefault(key, {}):
            self.data["crashed"][key][name] = why
        else:
            self.data["cells"].append({"key": key, "given_up": why, "contestants": {}})
        self.running.unlink()
        self.save()
        return True

    def save(self, **more: Any) -> None:
        """Write everything."""
        self.data |= more
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        partial.replace(self.file)
