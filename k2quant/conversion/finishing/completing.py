"""Everything that a finished folder holds but its shards, config.json last."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.paths import check_inside, copy_file, write_whole
from k2quant.checkpoint.reader import REPORT
from k2quant.conversion.plan import Plan


def complete(folder: Path, plan: Plan, report: dict[str, Any], *, sha256: bool) -> None:
    """Write everything but the shards, config.json last."""
    for name in plan.copies:
        check_inside(plan.source.folder, plan.source.folder / name, follow_links=plan.source.follow_links)
        copy_file(plan.source.folder / name, folder / name)
        report["files"][name] = _file_facts(folder / name, sha256=sha256)
    for name, data in plan.last.items():
        facts = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        report["files"][name] = facts  # small, and what engines read first: always with its digest
    write_whole(folder / REPORT, json.dumps(report, indent=1).encode() + b"\n")
    for name, data in plan.last.items():
        write_whole(folder / name, data)


def _file_facts(path: Path, *, sha256: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"size": path.stat().st_size}
    if sha256:
        with path.open("rb") as file:
            facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return facts
