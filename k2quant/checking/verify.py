"""Verify a conversion: read both checkpoints again and compare what they mean, or compare one with its checksums."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from k2quant.checking.comparison import Finding, Progress, compare_opened
from k2quant.checking.made import Made, made
from k2quant.checking.shared import unlike_scales
from k2quant.checkpoint.cards import CARD
from k2quant.checkpoint.files.checksum import combine, crc32
from k2quant.checkpoint.files.paths import check_inside, read_limited
from k2quant.checkpoint.files.sources import check_folder
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.panels import PIECE_BYTES
from k2quant.checkpoint.reader import CONFIG, REPORT, Checkpoint, open_checkpoint
from k2quant.checkpoint.reading import read_into
from k2quant.checkpoint.remote.address import Address, spot
from k2quant.checkpoint.weights import group_tensors
from k2quant.checkpoint.writing.destination import REPORT_LIMIT
from k2quant.conversion.metadata.carrying import spoken_of, unscaled
from k2quant.conversion.metadata.config import believed, check_output
from k2quant.errors import CheckpointError, MalformedFile
from k2quant.formats.activations import flow
from k2quant.formats.known import FORMATS
from k2quant.ground import names, pool
from k2quant.ground.pool import checked_workers
from k2quant.ground.saying.progress import Asked, barred, told
from k2quant.ground.saying.showing import as_html, brief
from k2quant.ground.units import counted

if TYPE_CHECKING:
    from k2quant.kernels.codecs.figures import Figures

_FIGURES = {"count", "changed", "energy", "error", "worst"}
_SAME = 1e-6  # relative; two ways of summing the same squares
_EQUAL = 1e-11  # the same sums in the same order; those of a GPU may differ by 1e-12
_EXPLAINED = 0.5  # of a weight's energy; of 84 kinds of weights and inputs, the worst lost 0.47 to solving


class Verification(NamedTuple):
    """What verifying came to."""

    findings: list[Finding]
    failures: dict[str, str]
    """For each tensor or file that failed, why."""

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def facts(self) -> dict[str, object]:
        """Return what it comes to, in a few words; of failures the first."""
        relations = Counter(str(finding.relation) for finding in self.findings)
        facts: dict[str, object] = {"passed": self.passed, **relations, "failed": len(self.failures)}
        return facts | {f"failure of {name}": why for name, why in list(self.failures.items())[:1]}

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def _repr_html_(self) -> str:
        """Return it as a small table, for notebooks."""
        return as_html(self)


@barred("verify")
def verify(
    source: str | os.PathLike[str] | Address,
    destination: str | os.PathLike[str] | Address,
    *,
    against: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    follow_links: bool = False,
    progress: Asked = None,
) -> Verification:
    """Compare a converted checkpoint with its source.

    A weight in the same format must be byte-equal; one that became BF16 must be bit-equal to what its codes mean; one
    that was rounded must lie within the rounding of its format (`Format.outside`). One that was solved, by its report,
    has codes that are none of the nearest: its scales must be such as are chosen for the source's weights, its squared
    error below half of its energy, and its figures those of the report. Where a fold was asked for, rows of `up_proj`
    may have lost powers of two that the columns of `down_proj` have. Scales of activations and of the KV cache may be
    missing where the config of the converted checkpoint does not speak of them, those of the cache only where it has
    another `quant_method` than the source's. Where a format has one scale for a whole matrix, matrices that engines lay
    into one must share it, unless the source's do not.

    Args:
        source: folder of the source, or its address.
        destination: folder or address of the converted checkpoint, whoever converted it.
        against: a k2quant_report.json; each weight's figures must be as good as it says. None: one in the converted
            checkpoint still says which weights were solved or folded.
        workers: threads; None takes one for each core.
        follow_links: whether links of both folders may lead out of them.
        progress: called as the work goes on; True for a bar.

    Raises:
        CheckpointError: one of the folders holds no sound checkpoint.
    """
    threads = checked_workers(workers)
    before, after = (open_checkpoint(spot(folder), follow_links=follow_links) for folder in (source, destination))
    stored = None if against is None else read_report(Path(against))
    report = stored or _own_report(after) or {}
    how = made(report)
    findings = compare_opened(before, after, workers=threads, progress=told(progress), made=how or None)
    failures = _config_failure(after)
    idle = set() if failures else _idle_scales(before, after, findings)
    for finding in findings:
        if finding.name in idle:
            continue
        why = (
            _failure(finding)
            or _unlike(finding, report, how)
            or (_worse(finding, stored["tensors"]) if stored else None)
        )
        if why:
            failures[finding.name] = why
    return Verification(findings, failures | _shared_failures(before, after))


def _shared_failures(before: Checkpoint, after: Checkpoint) -> dict[str, str]:
    """Say which matrices that engines lay into one have two scales, where the source's have one."""
    found = unlike_scales(after, group_tensors(after.tensors).weights)
    own = {base for base, _ in unlike_scales(before, group_tensors(before.tensors).weights).values()} if found else ()
    return {
        name: f"has another scale of the whole matrix than `{other}`, and engines have one for both"
        for name, (base, other) in found.items()
        if base not in own
    }


def _own_report(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the report that lies beside a checkpoint; None where there is none that could be believed."""
    try:
        return read_report(checkpoint.folder / REPORT)
    except (CheckpointError, OSError):
        return None


def _config_failure(checkpoint: Checkpoint) -> dict[str, str]:
    """Say why an engine could not load the tensors with the config beside them."""
    weights = group_tensors(checkpoint.tensors).weights
    try:
        check_output(checkpoint.config, weights)
    except CheckpointError as error:
        return {CONFIG: str(error)}
    if missing := unscaled(checkpoint.config, weights):
        what = counted(len(missing), "weight")
        return {CONFIG: f"says that inputs are quantised, but {what} have no scale of them, such as {missing[0]}"}
    return {}


def _idle_scales(before: Checkpoint, after: Checkpoint, findings: list[Finding]) -> set[str]:
    """Return the scales that were left out, and for which engines have no use by the config that is there."""
    missing = [finding.name for finding in findings if finding.relation == "missing"]
    idle = {name: suffix for name in missing if flow(suffix := names.split(name)[1])}
    if not idle:
        return set()
    source = believed(before.config, group_tensors(before.tensors).weights)
    return {name for name, suffix in idle.items() if not spoken_of(after.config, source, suffix)}


def _failure(finding: Finding) -> str | None:
    """Say why a finding is not what a conversion may do, or None."""
    match finding.relation:
        case "missing":
            return "is missing"
        case "extra":
            return "is not in the source"
        case "differs" if finding.formats[0] == finding.formats[1] and not finding.relabelled:
            values = finding.figures is not None and not finding.figures.changed
            same = ", though every value is the same" if values else ""
            return f"was to be copied, but {finding.bytes_changed or 'all'} bytes differ{same}"
        case "differs":
            return "has another shape or kind" if finding.figures is None else _beyond(finding, finding.figures)
    return None


def _beyond(finding: Finding, figures: Figures) -> str | None:
    """Say what of a weight neither rounding nor, where it was solved, solving explains, or None."""
    if finding.outside and finding.solved:
        return f"{finding.outside} weights have scales or codes that solving does not give"
    if finding.outside:
        return f"{finding.outside} weights are further off than {finding.formats[1]} rounding explains"
    if finding.solved and figures.error > _EXPLAINED * figures.energy:
        return f"squared error {figures.error / figures.energy:.3g} of its energy; solving explains {_EXPLAINED}"
    return None


def _unlike(finding: Finding, report: dict[str, Any], how: Made) -> str | None:
    """Say in what a weight that was solved or may be folded is not as the report has it that says so, or None.

    No other rule would find one wrong code among codes that are none of the nearest.
    """
    facts = _facts_of(finding, report.get("tensors", {})) if finding.solved or how.folded else None
    figures = None if facts is None else facts.get("figures")
    if figures is None or finding.figures is None:
        return None
    found = finding.figures
    if found.changed == figures["changed"] and abs(found.error - figures["error"]) <= _EQUAL * found.error:
        return None
    return (
        f"{found.changed:,} weights differ from the source's by a squared error of {found.error:.10g}, the report has "
        f"{figures['changed']:,} and {figures['error']:.10g}"
    )


def _facts_of(finding: Finding, stored: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a report has of a weight, under whichever name."""
    base, _ = names.split(finding.name)
    mains = dict.fromkeys(f"{base}.{main}" for kind in FORMATS.values() for main in kind.mains)
    return next((stored[name] for name in (finding.name, *mains) if name in stored), None)


def _worse(finding: Finding, stored: dict[str, Any]) -> str | None:
    """Say in what a weight is worse than a report has it, or None."""
    facts = _facts_of(finding, stored)
    if facts is None:
        return "is not in the report"
    figures = facts.get("figures")
    if figures is None or finding.figures is None:
        return None
    if finding.figures.changed > figures["changed"] or finding.figures.error > figures["error"] * (1 + _SAME):
        return f"squared error {finding.figures.error:.6g}, the report has {figures['error']:.6g}"
    return None


def read_report(path: Path) -> dict[str, Any]:
    """Read a k2quant_report.json.

    Raises:
        MalformedFile: it is none.
    """
    if not os.path.isfile(path):  # noqa: PTH113  unlike Path.is_file, it never raises
        raise MalformedFile("no such report", file=path, remedy="it lies in a folder that k2quant convert wrote")
    report = parse_object(read_limited(path, REPORT_LIMIT), file=path)
    tensors, files = report.get("tensors"), report.get("files")
    sound = (
        report.get("tool") == "k2quant"
        and isinstance(tensors, dict)
        and all(isinstance(facts, dict) and _sound_facts(facts) for facts in tensors.values())
        and isinstance(files, dict)
        and all(isinstance(facts, dict) for facts in files.values())
    )
    if not sound:
        raise MalformedFile("not a report of k2quant", file=path)
    return report


def _sound_facts(facts: dict[str, Any]) -> bool:
    """Tell whether a tensor's entry has the parts that are read here and in the picture of the report."""
    checksums, figures = facts.get("crc32"), facts.get("figures")
    return (
        isinstance(checksums, dict)
        and isinstance(facts.get("shape"), list)
        and (figures is None or (isinstance(figures, dict) and figures.keys() >= _FIGURES and _numbers(figures)))
    )


def _numbers(figures: dict[str, Any]) -> bool:
    return all(isinstance(value, int | float) for value in figures.values())


def other_values(folder: str | os.PathLike[str] | Address) -> str | None:
    """Say why, by its report, a folder's values are by design not those of its source; None where nothing says so.

    This explains and excuses nothing: what differs has failed, whatever a report says of itself.
    """
    if isinstance(folder, Address):
        return None
    try:
        values = read_report(Path(folder) / REPORT).get("values")
    except CheckpointError:
        return None
    if not isinstance(values, dict):
        return None
    if "adapter" in values:
        return "an adapter was merged into it"
    return "it was exported from a training's model" if "trained" in values else "they are none of the source's own"


@barred("verify")
def verify_checksums(
    folder: str | os.PathLike[str] | Address,
    *,
    workers: int | None = None,
    follow_links: bool = False,
    progress: Asked = None,
) -> Verification:
    """Compare a converted checkpoint with the checksums in its own report.

    Args:
        folder: of the converted checkpoint, or its address.
        workers: threads; None takes one for each core.
        follow_links: whether its links may lead out of it.
        progress: called as the work goes on; True for a bar.

    Raises:
        CheckpointError: the folder holds no sound checkpoint, or no report.
    """
    here = spot(folder)
    if isinstance(here, Path):
        check_folder(here)
        read_report(here / REPORT)
    checkpoint = open_checkpoint(here, follow_links=follow_links)
    report = read_report(checkpoint.folder / REPORT)
    expected = {
        (f"{base}.{suffix}" if base else suffix): crc
        for name, facts in report["tensors"].items()
        for base in (names.split(name)[0],)
        for suffix, crc in facts["crc32"].items()
    }
    failures = {name: "is missing" for name in expected if name not in checkpoint.tensors}
    failures |= {name: "is not in the report" for name in checkpoint.tensors if name not in expected}
    entries = [entry for name, entry in checkpoint.tensors.items() if name in expected]
    found = _checksums(checkpoint, entries, workers=checked_workers(workers), progress=told(progress))
    failures |= {
        name: f"crc32 {crc}, the report has {expected[name]}" for name, crc in found.items() if crc != expected[name]
    }
    for name, facts in report.get("files", {}).items():
        if name == CARD:  # people edit it, and it says itself whether they did
            continue
        if why := _file_failure(checkpoint, name, facts):
            failures[name] = why
    return Verification([], failures)


class _Piece(NamedTuple):
    entry: TensorEntry
    start: int
    stop: int


def _checksums(
    checkpoint: Checkpoint, entries: list[TensorEntry], *, workers: int, progress: Progress | None
) -> dict[str, str]:
    """Return the crc32 of each tensor, in hexadecimal."""
    total, done, lock = sum(entry.nbytes for entry in entries), 0, threading.Lock()
    parts: dict[str, dict[int, tuple[int, int]]] = {entry.name: {} for entry in entries}

    def work(piece: _Piece) -> None:
        nonlocal done
        data = memoryview(bytearray(piece.stop - piece.start))
        read_into(checkpoint.shards[piece.entry.file], piece.entry.start + piece.start, data)
        crc = crc32(data)
        with lock:
            parts[piece.entry.name][piece.start] = (crc, len(data))
            done += len(data)

    tick = (lambda: progress(done, total)) if progress else None
    pool.run(_pieces(entries), work, workers=workers, tick=tick)
    if tick is not None:
        tick()
    return {name: f"{combine(crc for _, crc in sorted(pieces.items())):08x}" for name, pieces in parts.items()}


def _pieces(entries: list[TensorEntry]) -> Iterator[_Piece]:
    for entry in entries:
        for start in range(0, entry.nbytes, PIECE_BYTES):
            yield _Piece(entry, start, min(start + PIECE_BYTES, entry.nbytes))


def _file_failure(checkpoint: Checkpoint, name: str, facts: dict[str, Any]) -> str | None:
    path = checkpoint.folder / name
    if ".." in Path(name).parts or Path(name).is_absolute():
        return "leaves the folder"
    check_inside(checkpoint.folder, path, follow_links=checkpoint.follow_links)
    elsewhere = None if checkpoint.supply is None else checkpoint.supply.place.files.get(name)
    if elsewhere is None and not path.is_file():
        return "is missing"
    size = path.stat().st_size if elsewhere is None else elsewhere.size
    if size != facts.get("size"):
        said = facts.get("size")
        return f"has {size:,} bytes, the report has {f'{said:,}' if type(said) is int else said!r} bytes"
    if "sha256" in facts and elsewhere is not None and elsewhere.sha256 is not None:
        return None if elsewhere.sha256 == facts["sha256"] else "its sha256 is not the one in the report"
    if "sha256" in facts and path.is_file():
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                return "its sha256 is not the one in the report"
    return None
