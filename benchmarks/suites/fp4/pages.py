"""The pages of the results: each is what its JSON says."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from suites.calib.report import BARS, Show, facts, table

PROOF = """# FP4: what INT4 loses on its way

Written by `benchmarks/suites/fp4/run.py`; do not edit.

{facts}

INT4 is the truth here: K2-Thinking and later have no BF16. Each conversion is the command's, INT4 to FP4 and that to
BF16, and the BF16 values are compared. `rtn` takes a format's own scales; `mse` searches each block's scale for the
least squared error (NVFP4: neighbours in e4m3 of amax/6 and amax/4; MXFP4: three exponents); `imatrix` weighs that by
what a calibration saw. Relative squared error is sum (W - Q)^2 / sum W^2; SQNR is that in dB.

## The weights of K2.6

{tensors}: a published slice of the release ([tests/data](../../tests/data/README.md)). Few weights, but
the model's own.

{slices}

## nano-K2 after QAT

{seeds} nano-K2s, each trained {steps} steps with INT4 in the forward pass ([QAT](../../docs/qat.md)) and exported as
INT4: `experts` as Moonshot ships it, `projections` with every matrix of the layers. `imatrix` is calibrated on
{documents:,} documents. KL to the INT4 model in nats a token of an answer; its ratio to that of `rtn` of the same
format, geometric mean over models with its 95% t-interval, with a star where that holds no one. Answers that are wholly
right, of {tested:,} questions that neither training nor calibration saw; and what `k2quant eval gate` decides of each
model (margin 1%, alpha 5%).

{levels}

By kind of matrix, `projections`: the mean relative squared error, and its least and largest.

{kinds}
"""

PEERS = """# FP4 beside its peers

Written by `benchmarks/suites/fp4/run.py`; do not edit.

{facts}

Whole commands in memory (tmpfs), {runs} runs in turns, medians with their range: start, reading, converting, writing.
The slice is that of [the conversions](../README.md): routed experts of K2's shapes, a router, norms and one matrix of
attention, in {shards} shards. Peers: llm-compressor's `model_free_ptq` with its presets NVFP4A16 and MXFP4A16, FP8 and
INT4 dequantised on the way; ModelOpt's `NVFP4QTensor.quantize` in a loop over shards, gate and up of an expert at the
larger of their tensor scales, which is what its tensor code offers where no GPU holds the model. INT4 -> NVFP4 is
k2quant's default, a search, against the peer's rounding; and once more rounded, `rtn`, against the same.

## Bars

{bars}

## Times and memory

Memory: the largest RssAnon + RssShmem, in a run of its own.

{rows}

## The same bytes

How many tensors of each kind are equal to the last byte; in brackets, how many differ although both have one tensor
scale. llm-compressor 0.14.0.1 takes gate and up of an expert for strangers under K2's names (its fused sets ask for
`mlp.gate_proj`, and for `w1` with `w3`), so the one with the smaller maximum has a tensor scale of its own there: its
scales and codes differ from ours, which share one as engines want it.

{same}
"""

SLICES: dict[str, Show] = {
    "target": lambda row: row["target"],
    "weights": lambda row: f"{row['weights']:,}",
    "relative squared error": lambda row: f"{row['relative']:.3e}",
    "SQNR, dB": lambda row: "exact" if row["decibels"] is None else f"{row['decibels']:.2f}",
    "unchanged": lambda row: f"{row['exact']:.1%}",
}

LEVELS: dict[str, Show] = {
    "INT4": lambda row: row["scope"],
    "target": lambda row: row["target"],
    "relative squared error": lambda row: f"{row['relative']:.3e}",
    "SQNR, dB": lambda row: f"{row['decibels']:.2f}",
    "unchanged": lambda row: f"{row['exact']:.1%}",
    "KL": lambda row: f"{row['kl']:.5f}",
    "over rtn's": lambda row: _ratio(row["ratio"]),
    "right": lambda row: f"{row['before']:.1%} -> {row['right']:.1%}",
    "gate": lambda row: ", ".join(f"{count} {word}" for word, count in row["gates"].items()),
}


def _ratio(found: list[float] | None) -> str:
    if found is None:
        return ""
    middle, low, high = found
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]{'' if low <= 1 <= high else ' *'}"


def _range(target: str, row: Mapping[str, Any]) -> str:
    found = row["error"][target]
    return f"{found['mean']:.2e} ({found['least']:.2e} to {found['most']:.2e})"


def proof(results: Mapping[str, Any]) -> str:
    """Return the page of the proof."""
    targets = list(results["kinds"][0]["error"]) if results["kinds"] else []
    columns: dict[str, Show] = {"matrix": lambda row: row["kind"], "count": lambda row: f"{row['count']:,}"}
    columns |= {name: partial(_range, name) for name in targets}
    shown = {
        "facts": facts(results),
        "tensors": "; ".join(dict.fromkeys(row["tensor"] for row in results["slices"])),
        "slices": table(SLICES, results["slices"]),
        "levels": table(LEVELS, results["levels"]),
        "kinds": table(columns, results["kinds"]),
    }
    return PROOF.format(**dict(results) | shown)


def _seconds(row: Mapping[str, Any]) -> str:
    return f"{row['median']:.2f} [{row['least']:.2f}, {row['most']:.2f}]"


def _task(row: Mapping[str, Any]) -> str:
    asked = f", {row['method']}" if row["method"] else ""
    return f"{row['source'].upper()} -> {row['target'].upper()}, {row['layout']}{asked}"


ROWS: dict[str, Show] = {
    "task": _task,
    "peer": lambda row: row["peer"],
    "read, GB": lambda row: f"{row['bytes'] / 1e9:.2f}",
    "k2quant, s": lambda row: _seconds(row["ours"]),
    "peer, s": lambda row: _seconds(row["theirs"]),
    "times faster": lambda row: f"{row['times']:.1f}",
    "k2quant, own MB": lambda row: f"{row['ours']['own'] / 1e6:.0f}",
    "peer, own MB": lambda row: f"{row['theirs']['own'] / 1e6:.0f}",
    "load": lambda row: f"{row['load']:.1f}",
}


def peers(results: Mapping[str, Any]) -> str:
    """Return the page of the peers."""
    rows = results["rows"]
    suffixes = [*dict.fromkeys(suffix for row in rows for suffix in row["same"].get("parts", ()))]
    columns: dict[str, Show] = {
        "task": _task,
        "peer": lambda row: ", ".join(
            f"{name} {version}" for name, version in row["versions"].items() if name != "Python"
        ),
    }
    columns |= {f"`{suffix}`": partial(_same, suffix) for suffix in suffixes}
    shown = {
        "facts": facts(results),
        "shards": 4,
        "bars": table(BARS, results["bars"]),
        "rows": table(ROWS, rows),
        "same": table(columns, [row for row in rows if row["same"]]),
    }
    return PEERS.format(**dict(results) | shown)


def _same(suffix: str, row: Mapping[str, Any]) -> str:
    found: Mapping[str, int] | None = row["same"]["parts"].get(suffix)
    if found is None:
        return ""
    equal, apart = found.get("equal", 0), found.get("apart", 0)
    return f"{equal} of {found['of']} ({found['of'] - equal - apart})"
