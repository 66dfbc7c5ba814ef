"""A verdict as people and machines read it: an HTML page, Markdown, JUnit XML, JSON, and what GitHub shows."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.paths import open_regular, write_whole
from k2quant.errors import DestinationForeign, MalformedFile, OutputError
from k2quant.eval.drift.findings import Blame, Fidelity
from k2quant.eval.gating.verdict import Verdict
from k2quant.eval.report.github import github_annotations, job_summary, publish_to_github
from k2quant.eval.report.junit import junit
from k2quant.eval.report.markdown import markdown
from k2quant.eval.report.page import page
from k2quant.eval.report.wording import TOOL
from k2quant.ground.extras import need

__all__ = ["Reports", "github_annotations", "job_summary", "publish_to_github", "write_reports"]

_BEGINNING = 2000  # bytes in which our own files name k2quant


@dataclass(frozen=True, slots=True, kw_only=True)
class Reports:
    """Where the reports of a verdict lie."""

    html: Path
    """One page with pictures, for people."""
    markdown: Path
    junit: Path
    """XML, for a CI's list of tests."""
    json: Path
    """Everything, all flips included."""


def write_reports(
    verdict: Verdict,
    folder: str | os.PathLike[str],
    *,
    fidelity: Fidelity | None = None,
    blame: Blame | None = None,
) -> Reports:
    """Write `gate.html`, `gate.md`, `gate.xml` and `gate.json`, each whole or not at all.

    Args:
        verdict: what the gate decided.
        folder: made if need be. Reports of an earlier gate are replaced, nothing else is touched.
        fidelity: what `measure_fidelity` found, for pictures by layer.
        blame: what `find_blame` found.

    Raises:
        DestinationForeign: a file of such a name is not ours.
        OutputError: the reports cannot be written.
        MissingExtra: matplotlib is not installed.
    """
    need("report", "drawing the gate's page")
    names = ("gate.html", "gate.md", "gate.xml", "gate.json")
    html, text, xml, data = paths = [Path(folder) / name for name in names]
    for path in paths:
        _check_ours(path)
    contents = {
        html: page(verdict, fidelity, blame),
        text: markdown(verdict, fidelity=fidelity, blame=blame),
        xml: junit(verdict),
        data: _as_json(verdict, fidelity, blame),
    }
    for path, content in contents.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content.encode(errors="replace"))  # half a surrogate pair is no text
        except OSError as error:
            raise OutputError("cannot be written", file=path, found=error.strerror or str(error)) from error
    return Reports(html=html, markdown=text, junit=xml, json=data)


def _as_json(verdict: Verdict, fidelity: Fidelity | None, blame: Blame | None) -> str:
    more: dict[str, Any] = {
        "fidelity": None if fidelity is None else fidelity.as_dict(),
        "blame": None if blame is None else blame.as_dict(),
    }
    content = {"tool": TOOL} | verdict.as_dict() | more
    return json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def _check_ours(path: Path) -> None:
    """Refuse to replace what an earlier gate did not write."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            ours = TOOL.encode() in file.read(_BEGINNING) and not path.is_symlink()
    except FileNotFoundError:
        ours = not path.is_symlink()
    except MalformedFile:
        ours = False
    except OSError as error:
        raise OutputError("cannot be written", file=path, found=error.strerror or str(error)) from error
    if not ours:
        raise DestinationForeign("not a report of a gate", file=path, remedy="name another folder for the reports")
