"""A verdict as people and machines read it: an HTML page, Markdown, JUnit XML, JSON, and what GitHub shows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from k2quant.checkpoint.files.paths import open_regular, replacing
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
        MalformedResults: a run is no longer what was read.
        MissingExtra: matplotlib is not installed.
    """
    need("report", "drawing the gate's page")
    names = ("gate.html", "gate.md", "gate.xml", "gate.json")
    html, text, xml, data = paths = [Path(folder) / name for name in names]
    for path in paths:
        _check_ours(path)
    contents: dict[Path, Iterable[str]] = {
        data: _as_json(verdict, fidelity, blame),  # the one that reads the runs again while it is written
        html: [page(verdict, fidelity, blame)],
        text: [markdown(verdict, fidelity=fidelity, blame=blame)],
        xml: [junit(verdict)],
    }
    for path, content in contents.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, content)
        except OSError as error:
            raise OutputError("cannot be written", file=path, found=error.strerror or str(error)) from error
    return Reports(html=html, markdown=text, junit=xml, json=data)


def _write(path: Path, content: Iterable[str]) -> None:
    """Write a file piece by piece, so that it is whole or not there."""
    with replacing(path) as descriptor, os.fdopen(os.dup(descriptor), "wb") as file:
        for piece in content:
            file.write(piece.encode(errors="replace"))  # half a surrogate pair is no text


def _as_json(verdict: Verdict, fidelity: Fidelity | None, blame: Blame | None) -> Iterator[str]:
    last = {
        "fidelity": None if fidelity is None else fidelity.as_dict(),
        "blame": None if blame is None else blame.as_dict(),
    }
    return verdict.as_json({"tool": TOOL}, last, ensure_ascii=False)


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
