"""The page about a run, drawn from whatever its stages left on the disk; what was missed stands first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from suites.gpu.running import record
from suites.gpu.running.stages import STAGES
from suites.products import cases, goals, report
from suites.products.goals import Verdict

Stages = dict[str, dict[str, Any]]

MINUTES = 8.0
"""Of a run, if nothing else is said."""

INTRO = """# {title}

Written by `benchmarks/gpu.py` from `{folder}/`; do not edit. Losses stand here like wins, and first.
{warning}
{machine}

Repeat with:

    python benchmarks/gpu.py{flag} --minutes {minutes:g}
"""

DRY = """
**A dry run: it proves that the script works. Nothing here was measured on a GPU.**
"""

BITS = """
Each codec of the GPU against its reference in plain torch on the CPU: all codes, scales and figures, bit for bit.
"""

NUMBERS = """
||y - exact|| / ||exact||, exact in float64 with unrounded code * scale, for results and gradients. Allowed is 1.05
times the error of dequantising to BF16 and multiplying; "of what is allowed" is the worst of a row. Uninitialised
memory was NaN in the first run, and so was what lies around x, gradients and router weights; all other runs of a
problem gave the same bits unless it says otherwise.
"""

SOLVING = """
GPTQ of one expert of K2 with torch's operations, factorising included, against the loops of the CPU of the same
machine. A block of columns needs no products and has the same codes; of whole matrices the error of the outputs may be
1 % more than with the CPU's codes.
"""

TABLES = """
Every configuration was checked against float64 and run twice before it was timed, over weights of four times the L2
cache, in a CUDA graph. "shipped" is the configuration that the package had.
"""

TIMES = """
One CUDA graph of 20 calls or more for each contestant, or fewer where these take over 0.1 s, over copies of its weights
of at least {rotate:.0f} MB in all, replayed up to {samples} times in turns, A B B A, after {warm} s of replays. Times
are medians, with the 20th and the 80th percentile in brackets. "eager" is what Python sees of a small call. "Triton, K
tiles of 32" is a plain kernel of the usual style, written for this benchmark; it does not split K. Tables that were
tuned before this stage were used.
"""


def write(folder: Path) -> None:
    """Write the page about the results in a folder beside it."""
    found = {stage.name: kept for stage in STAGES if (kept := record.read(folder / f"{stage.name}.json"))}
    file_of(folder).write_text(text(found, folder))


def file_of(folder: Path) -> Path:
    """Return the page's file."""
    return folder.with_name(f"{folder.name}.md")


def text(found: Stages, folder: Path) -> str:
    """Return the page."""
    return "".join(
        [
            _intro(found, folder),
            _lost(found),
            _ran(found),
            _bits(found),
            _numbers(found),
            _solving(found),
            _tables(found),
            _times(found),
            _whole(found),
        ]
    )


def facts(found: Stages) -> dict[str, Any]:
    """Return what identity found, with the ceilings; what it did not come to is missing."""
    entries = {entry["what"]: entry for entry in _entries(found, "identity")}
    ceilings = entries.get("ceilings", {}).get("ceilings", {})
    return {**entries.get("machine", {}).get("facts", {}), "ceilings": ceilings}


def dry(found: Stages) -> bool:
    """Return whether this was a dry run."""
    return any(kept.get("dry_run") for kept in found.values())


def results(found: Stages) -> dict[str, Any] | None:
    """Return the measured times in the form of `kernels.py`'s results; nothing if there are none."""
    timed = found.get("times", {}).get("results")
    if not timed:
        return None
    settings = found["times"].get("settings", {"rotate_bytes": 0, "samples": 0, "warm_up_seconds": 0.0})
    return {"settings": settings, **facts(found), "device": "cuda", **timed}


def _entries(found: Stages, stage: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = found.get(stage, {}).get("entries", [])
    return entries


def _intro(found: Stages, folder: Path) -> str:
    known = facts(found)
    box = known.get("machine", {})
    title = box.get("gpu") or folder.name
    lines = []
    if box:
        versions = ", ".join(f"{name} {number}" for name, number in known["versions"].items())
        commit = found["identity"].get("commit", "unknown")
        lines = [
            f"{known['date']}, commit `{commit}`. {box['cpu']}, {box['cores']} cores.",
            f"{versions}.",
            f"Others that can be imported here: {', '.join(known['peers']) or 'none'}.",
        ]
        smi = box.get("nvidia_smi", {})
        lines += [f"nvidia-smi ({smi['asked']}): {'; '.join(smi['before'])}."] if smi else []
    rates = {name: rate for name, rate in known["ceilings"].items() if isinstance(rate, float)}
    after = [entry["after"] for entry in _entries(found, "identity") if entry.get("after")]
    lines += [f"The same after the ceilings were measured: {'; '.join(after[0])}."] if after else []
    if rates:
        shown = ", ".join(f"{name.replace('_', ' ')} {rate:.3g}" for name, rate in rates.items())
        lines.append(f"Ceilings, measured first: {shown}.")
    warning = DRY if dry(found) else ""
    minutes = max((kept["minutes"] for kept in found.values() if "minutes" in kept), default=MINUTES)
    return INTRO.format(
        minutes=minutes,
        flag=" --dry-run" if dry(found) else "",
        title=title,
        folder=folder.name,
        warning=warning,
        machine="\n".join(lines) or "Nothing is known.",
    )


def _lost(found: Stages) -> str:
    """List whatever is not as it must be."""
    lines = [
        f"- {stage}, {entry['what']}: {entry['outcome']}: {entry.get('said', '')}"
        for stage in found
        for entry in _entries(found, stage)
        if entry["outcome"] in {record.MISSED, record.FAILED}
    ]
    lines += [f"- {stage}: {kept['ended']}" for stage, kept in found.items() if "ended" in kept]
    lines += [f"- times, {sentence}" for sentence in _lost_cells(found)]
    timed = None if dry(found) else results(found)
    if timed:
        missed = [verdict for verdict in (*goals.verdicts(timed), *_more_goals(found)) if verdict.met is False]
        lines += [f"- {each.goal or 'error'}, {each.what}: {each.measured}, must be {each.must}" for each in missed]
    tried = any(_entries(found, stage) or _cells(found) for stage in found)
    nothing = "Nothing of what was tried." if tried else "Nothing was tried."
    return "\n## What was missed\n\n" + ("\n".join(lines) or nothing) + "\n"


def _cells(found: Stages) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = found.get("times", {}).get("results", {}).get("cells", [])
    return cells


def _lost_cells(found: Stages) -> Iterator[str]:
    """Yield what went wrong with k2quant itself in the cells that were timed."""
    for cell in _cells(found):
        ours = cell["contestants"].get(cases.OURS, {})
        if "given_up" in cell:
            yield f"{cell['key']}: given up, {cell['given_up']}"
        elif "failed" in ours:
            yield f"{cell['key']}: failed: {ours['failed']}"
        elif not ours.get("same_bits", True):
            yield f"{cell['key']}: different bits in different runs"
        elif cell.get("section") == "codecs" and ours.get("error"):
            yield f"{cell['key']}: {ours['error']:.1e} of the bytes differ from the reference"


def _outcomes_of(found: Stages, stage: str) -> list[str]:
    """Return the outcomes of a stage's entries; cells that were timed count, too."""
    outcomes = [entry["outcome"] for entry in _entries(found, stage)]
    if stage == "times":
        lost = len(list(_lost_cells(found)))
        late = len(found.get("times", {}).get("results", {}).get("left_out", []))
        outcomes += [record.FAILED] * lost + [record.PASSED] * (len(_cells(found)) - lost) + [record.LEFT_OUT] * late
    return outcomes


def _ran(found: Stages) -> str:
    """Show what each stage came to."""
    rows = []
    for stage in STAGES:
        kept = found.get(stage.name)
        counts = [_outcomes_of(found, stage.name).count(outcome) for outcome in record.OUTCOMES]
        state = "did not run" if kept is None else "" if kept["done"] else kept.get("ended", "did not end")
        at = f", at {kept['running']}" if kept and "running" in kept else ""
        seconds = f"{kept['seconds']:.0f}" if kept else ""
        made_at = f"`{kept['commit']}`, {kept['date']}" if kept and "commit" in kept else ""
        rows.append([stage.name, stage.asks, made_at, seconds, *map(str, counts), state + at])
    head = ["stage", "asks", "at", "seconds", *record.OUTCOMES, ""]
    return "\n## What ran\n\n" + report.table(head, rows)


def _bits(found: Stages) -> str:
    entries = _entries(found, "bits")
    if not entries:
        return ""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry["what"].partition(",")[0], []).append(entry)
    rows = [
        [name, str(len(group)), f"{sum(each.get('elements', 0) for each in group)}", _outcomes(group)]
        for name, group in groups.items()
    ]
    return f"\n## Bits\n{BITS}\n" + report.table(["codec", "inputs", "elements", ""], rows)


def _outcomes(entries: Sequence[dict[str, Any]]) -> str:
    counts = {outcome: sum(entry["outcome"] == outcome for entry in entries) for outcome in record.OUTCOMES}
    if counts[record.PASSED] == len(entries):
        return "all equal"
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)


def _numbers(found: Stages) -> str:
    entries = _entries(found, "numbers")
    if not entries:
        return ""
    rows = []
    for entry in entries:
        ratios = [entry["errors"][name] / allowed for name, allowed in entry.get("allowed", {}).items()]
        shown = ", ".join(f"{name} {error:.1e}" for name, error in entry.get("errors", {}).items())
        shown = shown or entry.get("said", "").replace("|", "\\|")
        worst = f"{max(ratios):.2f}" if ratios else ""
        rows.append([entry["what"], shown, worst, entry["outcome"]])
    return f"\n## Numbers\n{NUMBERS}\n" + report.table(["problem", "errors", "of what is allowed", ""], rows)


def _solving(found: Stages) -> str:
    entries = _entries(found, "solving")
    if not entries:
        return ""
    rows = [
        [
            entry["what"],
            entry.get("said", "").replace("|", "\\|"),
            *(f"{entry[name]:.3g}" if name in entry else "" for name in ("seconds", "cpu_seconds")),
            entry["outcome"],
        ]
        for entry in entries
    ]
    return f"\n## Solving\n{SOLVING}\n" + report.table(["of one expert", "", "s", "s on the CPU", ""], rows)


def _tables(found: Stages) -> str:
    entries = [entry for entry in _entries(found, "tables") if "us" in entry]
    if not entries:
        return ""
    rows = [
        [
            entry["what"],
            f"{entry['us']:.1f}",
            f"{entry['shipped_us']:.1f}" if entry["shipped_us"] else "refused",
            f"{entry['shipped_us'] / entry['us']:.2f}x" if entry["shipped_us"] else "",
            ", ".join(f"{name} {value}" for name, value in entry["config"].items()),
        ]
        for entry in entries
    ]
    return f"\n## Tables\n{TABLES}\n" + report.table(["cell", "us", "shipped us", "faster", "configuration"], rows)


def _times(found: Stages) -> str:
    timed = results(found)
    if not timed:
        return ""
    setting = found["times"].get("settings") or timed["settings"]
    told = TIMES.format(
        rotate=setting["rotate_bytes"] / 1e6, samples=setting["samples"], warm=setting["warm_up_seconds"]
    )
    verdicts = "" if dry(found) else report.goals_table(timed, list(_more_goals(found)))
    parts = [f"\n## Times\n{told}", report.ERRORS, verdicts]
    parts += [report.section_table(timed, section) for section in report.SECTIONS]
    return (
        "".join([*parts, report.failures_table(timed)]).replace("\n## ", "\n### ").replace("\n### Times", "\n## Times")
    )


def _more_goals(found: Stages) -> Iterator[Verdict]:
    """Yield the verdict on compiling, which the loaded layer shows."""
    layer = next((entry for entry in _entries(found, "whole") if "compiled_after" in entry), None)
    late = len(layer["compiled_after"]) if layer else None
    measured = "" if layer is None else f"{late}, after {layer['warmup_s']:.1f} s for {layer['compiled_by_warmup']}"
    yield Verdict(
        "G15", "kernels compiled after warmup(), one layer", "0", "", measured, None if late is None else not late
    )


def _whole(found: Stages) -> str:
    rows = [
        [entry["what"], entry["outcome"], entry.get("said", "").replace("|", "\\|")]
        for entry in _entries(found, "whole")
    ]
    return "\n## Whole\n\n" + report.table(["what", "", ""], rows) if rows else ""
