"""How the output was made, and commands that check it: none is shown that would say no of an output that is whole."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from k2quant.formats.known import FORMATS
from k2quant.ground.units import counted, size
from k2quant.report.choices.beside import Beside
from k2quant.report.content import Report
from k2quant.report.origins import Exported, Merged
from k2quant.report.sections import searched
from k2quant.report.words import code, table, text

_NOTE = 500  # letters of a remark
_LIST_SHOWN = 200  # shards and patterns; K2 has 62 shards


def how(report: Report, folder: str) -> str:
    """Return the section."""
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _facts(report))
    checks = "".join(f"<p>{what}</p><pre>{text(command, _NOTE)}</pre>" for what, command in _checks(report, folder))
    return (
        f"<section class=card><h2>How it was made, and how to check it</h2><dl>{listed}</dl>{_shards(report)}"
        f"{checks}{_differing(report)}</section>"
    )


def _checks(report: Report, folder: str) -> Iterator[tuple[str, str]]:
    """Yield what a command does, as HTML, and the command."""
    here = shlex.quote(folder)
    yield "Compare every tensor on disk with its checksum in the report:", f"k2quant verify --checksums {here}"
    match report.origin:
        case None:
            source = shlex.quote(report.source_name)
            yield "Compare it with its source, value by value:", f"k2quant verify {source} {here}"
        case Exported(run=run, job=job) if (whose := run or job) is not None:
            shards = report.options["shard_size"]
            more = f" --shard-size {shards}" if shards else ""
            yield (
                (
                    "Compare it bit for bit with the last checkpoint of the training; its folder lies with you:"
                    if run
                    else "Compare it bit for bit with the model of the job, rounded once more; its file lies with you:"
                ),
                f"k2quant qat export {shlex.quote(whose)} {here}{more}",
            )


def _differing(report: Report) -> str:
    """Say why there is no comparison with the source."""
    match report.origin:
        case Merged():
            why = "the adapter changed them"
        case Exported() as origin:
            why = "training moved them" if origin.moved else "the training's rule rounded them"
        case _:
            return ""
    return f"<p class=note>Compared with the base, values differ by design: {why}.</p>"


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    """Yield options and fingerprint as pairs of HTML."""
    shard_size = report.options["shard_size"]
    yield from _origin(report)
    if report.search is not None:
        yield from searched.facts(report.search)
    if report.rules:
        yield from ((f"rule {number}", code(rule)) for number, rule in enumerate(report.rules[:_LIST_SHOWN], 1))
    else:
        yield from _asked(report)
    yield from _beside(report.beside)
    yield "shards", f"at most {size(shard_size)}" if shard_size else "as in the source"
    yield from (("note", text(said, _NOTE)) for said in report.remarks[:_LIST_SHOWN])
    for key in ("config_sha256", "tensors_sha256"):
        if isinstance(report.source.get(key), str):
            yield f"source {key.replace('_', ' ')}", code(report.source[key])


def _beside(beside: Beside) -> Iterator[tuple[str, str]]:
    """Yield what stands beside the weights as pairs of HTML."""
    if beside.inputs is not None:
        yield "scales of inputs", text(str(beside.inputs))
        if beside.inputs.stats is not None:
            yield "their statistics", code(beside.inputs.stats)
    if beside.kv_cache is not None:
        yield "KV cache", f"{text(beside.kv_cache)}, without scales: engines take 1.0"
    if beside.rounded is not None:
        matrices, weights, of = beside.rounded
        some, all_ = counted(weights, "weight"), counted(of, "matrix", "matrices")
        yield "rounded on the way", f"{some} of {matrices:,} of {all_} whose codes are carried over"


def _asked(report: Report) -> Iterator[tuple[str, str]]:
    """Yield what was asked for in options."""
    scope, grid, patterns, layout = (report.options[key] for key in ("scope", "grid", "ignore", "layout"))
    yield "format", report.to
    kind = FORMATS[report.options["to"]]
    if kind.default_scope:
        yield "scope", text(scope) if scope else f"{kind.default_scope} (default)"
    if kind.grids:
        yield "grid", text(grid) if grid else f"{kind.grids[0]} (default)"
    if kind.layouts:
        yield "layout", text(layout) if layout else f"{kind.layouts[0]} (default)"
    if patterns:
        more = f" and {len(patterns) - _LIST_SHOWN:,} more" if len(patterns) > _LIST_SHOWN else ""
        yield "ignored", ", ".join(map(code, patterns[:_LIST_SHOWN])) + more


def _origin(report: Report) -> Iterator[tuple[str, str]]:
    """Yield where values come from that are not the source's own."""
    if report.origin is None:
        return
    yield "base", code(report.source_name)
    match report.origin:
        case Merged() as origin:
            yield "adapter", f"{code(origin.name)} (rank {origin.rank}, alpha {origin.alpha:g})"
            yield from ((f"sha256 of {text(name)}", code(digest)) for name, digest in origin.digests.items())
        case Exported(run=str() as run, step=step):
            yield "training", f"{code(run)}, after step {step:,}"
        case Exported(job=str() as job):
            yield "job", code(job)


def _shards(report: Report) -> str:
    """List the shards of the source as they were when it was read."""
    shards = report.source.get("shards")
    rows = [
        [code(name), size(facts["size"]), code(facts.get("header_sha256", ""))]
        for name, facts in (shards.items() if isinstance(shards, dict) else ())
        if isinstance(facts, dict) and isinstance(facts.get("size"), int) and 0 <= facts["size"] < 2**63
    ]
    if not rows:
        return ""
    heads = ["shard of the source", "size", "sha256 of its header"]
    listed = table(heads, rows[:_LIST_SHOWN], css="compact", label="shards of the source")
    more = f"<p class=note>and {len(rows) - _LIST_SHOWN:,} more</p>" if len(rows) > _LIST_SHOWN else ""
    return f"<details><summary>Source shards: {len(rows):,}</summary>{listed}{more}</details>"
