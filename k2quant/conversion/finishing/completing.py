"""Everything that a finished folder holds but its shards, config.json last."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from k2quant.checkpoint.files.paths import check_inside
from k2quant.checkpoint.reader import REPORT
from k2quant.checkpoint.writing.target import Target
from k2quant.conversion.plan import Plan


def complete(folder: Target, plan: Plan, report: dict[str, Any], *, sha256: bool) -> None:
    """Write everything but the shards, config.json last."""
    for name in plan.copies:
        check_inside(plan.source.folder, plan.source.folder / name, follow_links=plan.source.follow_links)
        folder.copy(plan.source.folder / name, name)
        report["files"][name] = folder.facts(name, sha256=sha256)
    for name, data in plan.last.items():
        facts = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        report["files"][name] = facts  # small, and what engines read first: always with its digest
    folder.write(REPORT, json.dumps(report, indent=1).encode() + b"\n")
    for name, data in plan.last.items():
        folder.write(name, data)
