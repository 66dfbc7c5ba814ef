"""The pages of the results: each is what its JSON says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from suites.calib import wide
from suites.calib.peers.beside import NAMES
from suites.calib.summing import mean

Show = Callable[[Any], str]

FOOT = "{cpu}, {cores} cores, load {load:.1f} at the start; {versions}; commit {commit}{dirty}. `{command}`"

PROOF = """# Calibration: what each method buys, on nano-K2

Written by `benchmarks/suites/calib/run.py`; do not edit.

{facts}

{seeds} nano-K2s, each trained from its own seed, each calibrated on {draws} draws of {documents:,} documents
(`k2quant calibrate`, rows of {length} tokens; a tenth of the documents is held out for the judgement). Every projection
of every layer is rounded, groups of 32, on the moonshot grid: `rtn` by the plain rule, `mse` at the best of 16 scales
by squared error, `imatrix` at the best by the error expected of the columns' E[x^2] and E[x], the expert's own blended
with the layer's. The true error of a linear is sum w |(W - Q) x|^2 over the tokens of {tested:,} questions that neither
training nor calibration saw, with w = p^2 of the router for experts, in float64, by a collector of the benchmark's own.

Intervals are 95% t-intervals over the {seeds} models, draws averaged first. A difference whose interval holds no zero
(for ratios, no one) is marked with a star; nothing is claimed of the others.

## Bars

{bars}

## True error of each kind of linear, relative to rounding

In brackets, the share of linears whose error lies below that of the method before.

{kinds}

## Predictions and answers

KL to the BF16 model in nats a token of an answer, as `k2quant eval fidelity` has it (exact products, float32
activations), and answers that are wholly right. Models were held in memory; `eval fidelity` itself, run on the
checkpoints of `rtn` at INT2, says the same to {agreement:.0e} of the figure.

{levels}

Each method against the one that knows less. KL: its ratio, so that below 1 is better. Answers: percentage points more
right; then answers lost and gained, all models and one draw, with Tango's paired interval of their difference, which
takes these models as given. A difference in answers is marked where neither interval holds zero.

{differences}

## Rule 6: what held-out data says, and what is true

`convert` compares methods by the validation part's mean squares and means alone. How often that names another winner
than the true error, and how often it would ship the first although it is the worse.

{judgement}
"""

PEERS = """# Calibration: k2quant's searches beside its peers'

Written by `benchmarks/suites/calib/run.py`; do not edit.

{facts} Peers: {peers}.

All get the same matrices (every linear of {seeds} nano-K2s, {linears:,} in all), the same importance (E[x^2] that
`k2quant calibrate` measured; k2quant's `imatrix` has E[x] too, for which the peers have no place) and the same groups
of 32. llm-compressor's observers run with their defaults on its own grid (scale amax/7.5, codes -8 to 7); llama.cpp's
Q4_0 has codes -8 to 7 too, a float16 scale of either sign, and weighs by E[x^2] * sqrt(mean w^2 + w^2). k2quant ships
K2's grid, codes -7 to 7, and only scales that survive a round trip. The error is the true one on held-out activations,
relative to rounding on K2's grid; in brackets, on which share of the linears k2quant's `imatrix` has the smaller one.

## Error

{errors}
{grids}
## Rates

10^9 weights a second from weights in memory to codes and scales: medians of {rounds} rounds, in turns, with their
range. N(0, 0.02) weights, random importance and means. Where the load above is more than the cores, other processes
were at work: then the figures are low and wide, and good for comparison alone.

{rates}
"""

GRIDS = """
llama.cpp's Q4_0 with imatrix has the smaller error on {share:.0%} of the linears: a loss, and one of the grid. With its
sixteenth code, and scales of either sign, Q4_0 has {plain:.3f} of our rounding's error before anything is searched. Its
search then wins {won:.0%} ({searched:.3f}); k2quant's `imatrix` wins {ours:.0%} on the grid that K2's releases have,
which cannot hold what Q4_0 writes.
"""

RATES = """# Calibration: how fast, and in how much memory

Written by `benchmarks/suites/calib/run.py`; do not edit.

{facts}

Medians with their range; contestants take turns, after a round that warms up. Where the load is more than the cores,
other processes were at work, and times are good for comparison alone.

## Bars

{bars}

## Search in memory

10^9 weights a second from BF16 to codes and scales, [2048, 7168], {rounds[codec]} rounds. `imatrix` has mean squares
and means. The last column is the same by the processor time of the process: what a thread does that is never
interrupted. Load before: {codec_load:.1f}.

{codecs}

## A whole conversion

`k2quant convert --to int4`: one layer of K2's size with {source[experts]} routed experts in FP8,
{source[size]:.2f} GB, on the disk, its pages in the cache; start and imports included, {rounds[whole]} rounds. Own
memory is the largest RssAnon + RssShmem seen 10 ms apart, in the round that warms up.

{converts}

## Collecting

One layer of K2's size with {few[experts]} routed experts in FP8, {few[size]:.2f} GB, {passes[tokens]:,} tokens in
rows of {length}, in a process of its own, imports left out.

{times}

## On paper

Not run: arithmetic. {tokens:,} tokens through K2's 60 layers of 384 experts, of which each token has 8 as it does
here, so that the time a token and layer is that of the pass above ({token:.2f} ms). The attention and the disk of this
machine are in it, and the weights of all experts, read and decoded once for only so many tokens: more than a long
calibration would take.

- On this machine: {paper[this machine]:.0f} h.
- A node of {node} cores, if all of it scales with cores: {paper[node]:.1f} h.
- One H200 at {flops:.0f} TFLOP/s (assumed), experts alone: {paper[compute one]:.2f} h of arithmetic, and
  {paper[disk]:.2f} h to read 1.03 TB at {disk:.0f} GB/s (assumed): {paper[one]:.2f} h, the slower of the two.
- Eight, which share that disk: {paper[eight]:.2f} h.
"""


def table(columns: Mapping[str, Show], rows: Iterable[Any]) -> str:
    """Return rows as a Markdown table."""
    head = [list(columns), ["---"] * len(columns)]
    lines = [*head, *([show(row) for show in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


BARS: dict[str, Show] = {
    "what": lambda row: row["what"],
    "bar": lambda row: row["bar"],
    "measured": lambda row: row["measured"],
    "": lambda row: "met" if row["met"] else "**missed**",
}

KINDS: dict[str, Show] = {
    "codes": lambda row: f"INT{row['bits']}",
    "linear": lambda row: row["kind"],
    "count": lambda row: f"{row['count']:,}",
    "mse": lambda row: f"{row['error']['mse']:.3f} ({row['won']['mse']:.1%})",
    "imatrix": lambda row: f"{row['error']['imatrix']:.3f} ({row['won']['imatrix']:.1%})",
}

LEVELS: dict[str, Show] = {
    "codes": lambda row: "BF16" if row["method"] == "none" else f"INT{row['bits']}",
    "method": lambda row: "" if row["method"] == "none" else row["method"],
    "KL": lambda row: f"{row['kl']:.5f}",
    "right": lambda row: f"{row['right']:.1%}",
}


def _between(found: Mapping[str, float], form: str, scale: float = 1.0) -> str:
    mean, low, high = (scale * found[key] for key in ("mean", "low", "high"))
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


DIFFERENCES: dict[str, Show] = {
    "codes": lambda row: f"INT{row['bits']}",
    "method": lambda row: f"{row['better']} against {row['worse']}",
    "KL, ratio": lambda row: _between(row["kl"], ".3f") + (" *" if row["kl_claimed"] else ""),
    "answers, points": lambda row: (
        _between(row["answers"]["gain"], "+.2f", 100) + (" *" if row["answers"]["claimed"] else "")
    ),
    "lost, gained": lambda row: f"{row['answers']['lost']:,}, {row['answers']['gained']:,}",
    "paired": lambda row: f"{100 * row['answers']['low']:+.2f} to {100 * row['answers']['high']:+.2f}",
}

JUDGEMENT: dict[str, Show] = {
    "codes": lambda row: f"INT{row['bits']}",
    "method": lambda row: f"{row['better']} against {row['worse']}",
    "linears": lambda row: f"{row['count']:,}",
    "judged wrongly": lambda row: f"{row['wrong']:,} ({row['wrong'] / row['count']:.1%})",
    "shipped though worse": lambda row: f"{row['shipped_worse']:,} ({row['shipped_worse'] / row['count']:.1%})",
}


def facts(results: Mapping[str, Any]) -> str:
    """Return where and with what it was measured."""
    shown = {
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "dirty": ", changed since" if results["dirty"] else "",
    }
    return FOOT.format(**{**results, **shown})


def proof(results: Mapping[str, Any]) -> str:
    """Return the page of the proof."""
    shown = {
        "facts": facts(results),
        "bars": table(BARS, results["bars"]),
        "kinds": table(KINDS, results["kinds"]),
        "levels": table(LEVELS, results["levels"]),
        "differences": table(DIFFERENCES, results["differences"]),
        "judgement": table(JUDGEMENT, results["judgement"]),
        "agreement": max(abs(row["fidelity"] / row["kl"] - 1) for row in results["fidelity"]),
    }
    return PROOF.format(**dict(results) | shown)


def peers(results: Mapping[str, Any]) -> str:
    """Return the page of the peers."""
    contestants: list[str] = results["contestants"]
    names = [*dict.fromkeys(row["kind"] for row in results["errors"])]
    columns: dict[str, Show] = {"linear": lambda row: row["kind"], "count": lambda row: f"{row['count']:,}"}
    for contestant in contestants:
        columns[NAMES[contestant]] = _of(contestant)
    rates = {"shape": lambda row: f"{row['shape'][0]} x {row['shape'][1]}", "threads": lambda row: str(row["threads"])}
    rates |= {
        "method": lambda row: NAMES[row["method"]],
        "G weights/s": lambda row: f"{row['median']:.4f} ({row['least']:.4f}-{row['most']:.4f})",
    }
    shown = {
        "facts": facts(results),
        "linears": next(row["count"] for row in results["errors"] if row["kind"] == "all"),
        "errors": table(columns, (row for name in names for row in results["errors"] if row["kind"] == name)),
        "rates": table(rates, results["rates"]),
        "grids": _grids(results),
    }
    return PEERS.format(**dict(results) | shown)


def _of(contestant: str) -> Show:
    if contestant == "imatrix":
        return lambda row: f"{row['error'][contestant]:.3f}"
    return lambda row: f"{row['error'][contestant]:.3f} ({row['beaten'][contestant]:.0%})"


def _grids(results: Mapping[str, Any]) -> str:
    """Return what of llama.cpp's figures is its grid, and what its search; nothing where it took no part."""
    found = next(row for row in results["errors"] if row["kind"] == "all")
    plain, searched = (found["error"].get(name) for name in ("peer Q4_0 plain", "peer Q4_0"))
    if plain is None or searched is None:
        return ""
    return GRIDS.format(
        plain=plain,
        searched=searched,
        won=1 - searched / plain,
        ours=1 - found["error"]["imatrix"],
        share=1 - found["beaten"]["peer Q4_0"],
    )


def peer_errors(rows: list[dict[str, Any]], contestants: Iterable[str]) -> list[dict[str, Any]]:
    """Return the mean errors of each kind of linear and of all, and beside them how often `imatrix` beats each."""
    contestants = list(contestants)
    made = []
    for name in [*dict.fromkeys(row["kind"] for row in rows), "all"]:
        chosen = [row["true"] for row in rows if name in {row["kind"], "all"}]
        made.append(
            {
                "kind": name,
                "count": len(chosen),
                "error": {each: mean(row[each] for row in chosen) for each in contestants},
                "beaten": {each: mean(row["imatrix"] < row[each] for row in chosen) for each in contestants},
            }
        )
    return made


def _range(row: Mapping[str, float], form: str) -> str:
    return f"{row['median']:{form}} ({row['least']:{form}}-{row['most']:{form}})"


def rates(results: Mapping[str, Any]) -> str:
    """Return the page of the rates."""
    passes, codecs = results["passes"], results["codecs"]
    by_method = {row["method"]: row for row in results["converts"]}
    in_memory: dict[str, Show] = {
        "method": lambda row: row["method"],
        "threads": lambda row: str(row["threads"]),
        "G weights/s": lambda row: _range(row, ".2f"),
        "a core's second": lambda row: f"{row['core']:.2f}",
    }
    converts: dict[str, Show] = {
        "method": lambda row: row["method"],
        "s": lambda row: _range(row, ".2f"),
        "against rtn": lambda row: f"{row['median'] / by_method['rtn']['median']:.2f}x",
        "CPU s": lambda row: f"{row['cpu_s']:.1f}",
        "own memory MiB": lambda row: f"{row['own'] / 2**20:.0f}",
    }
    times: dict[str, Show] = {
        "pass": lambda what: {"stream": "`stream_forward`", "collect": "`calibrate`"}[what],
        "s": lambda what: _range(passes[what], ".2f"),
        "own memory GB": lambda what: f"{passes[what]['own'] / 1e9:.2f}",
    }
    shown = {
        "facts": facts(results),
        "bars": table(BARS, results["bars"]),
        "codecs": table(in_memory, codecs),
        "converts": table(converts, results["converts"]),
        "times": table(times, ("stream", "collect")),
        "source": results["source"] | {"size": results["source"]["bytes"] / 1e9},
        "few": results["few"] | {"size": results["few"]["bytes"] / 1e9},
        "length": wide.LENGTH,
        "tokens": wide.TOKENS,
        "token": 1000 * passes["collect"]["median"] / passes["tokens"],
        "node": wide.NODE_CORES,
        "flops": wide.H200_FLOPS / 1e12,
        "disk": wide.DISK / 1e9,
    }
    return RATES.format(**dict(results) | shown)
