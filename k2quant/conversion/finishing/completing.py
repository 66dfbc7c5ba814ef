"""Everything that a finished folder holds but its shards, config.json last."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from k2quant.checkpoint.cards import CARD, LIMIT, is_ours, placed
from k2quant.checkpoint.files.paths import check_inside
from k2quant.checkpoint.reader import REPORT
from k2quant.checkpoint.writing.target import Target
from k2quant.conversion.finishing.card import card_of
from k2quant.conversion.plan import Plan


def complete(folder: Target, plan: Plan, report: dict[str, Any], *, sha256: bool) -> None:
    """Write everything but the shards, config.json last."""
    for name, own in placed(plan.copies).items():
        check_inside(plan.source.folder, plan.source.folder / name, follow_links=plan.source.follow_links)
        folder.copy(plan.source.folder / name, own)
        report["files"][own] = folder.facts(own, sha256=sha256)
    _write_card(folder, plan, report)
    for name, data in plan.last.items():
        facts = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        report["files"][name] = facts  # small, and what engines read first: always with its digest
    folder.write(REPORT, json.dumps(report, indent=1).encode() + b"\n")
    for name, data in plan.last.items():
        folder.write(name, data)


def _write_card(folder: Target, plan: Plan, report: dict[str, Any]) -> None:
    """Write the model card, unless somebody's own stands there."""
    found = folder.read(CARD, LIMIT)
    if folder.size(CARD) is not None and not (found is not None and is_ours(found)):
        return
    card = card_of(plan, report)
    folder.write(CARD, card)
    report["files"][CARD] = {"size": len(card), "sha256": hashlib.sha256(card).hexdigest()}
