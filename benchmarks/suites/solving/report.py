"""The pages of the results: each is what its JSON says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from suites.calib.report import BARS, DIFFERENCES, Show, facts, table
from suites.solving.peers.beside import NAMES, PAIR
from suites.solving.proof import ALONE, GPTQ
from suites.solving.summing import MARGIN

PROOF = """# Calibration: what GPTQ buys, on nano-K2

Written by `benchmarks/suites/solving/run.py`; do not edit.

{facts}

{seeds} nano-K2s, each trained from its own seed, each calibrated on {draws} draws of {documents:,} documents: models,
draws, test and truth of [the first half's proof](calib-proof.md). Every projection of every layer is rounded, groups
of 32, on the moonshot grid: `rtn` by the plain rule, `imatrix` as `convert` ships it (not propagated), GPTQ as
`convert --method gptq` does, by the pass itself with its defaults ({settings}). Two figures, and
which is which:

- **Linear by linear**: `{alone}`, each matrix solved for what the original model gives it, and its true error on just
  that: sum w |(W - Q) x|^2 over the tokens of {tested:,} questions that neither training nor calibration saw, in
  float64, over that of `rtn`. `{gptq}` beside it is the default: each layer sees the quantised ones before it, so its
  matrices are solved for other inputs than those the error is measured on.
- **Whole models**: KL to the BF16 model in nats a token of an answer, answers that are wholly right, the gate.
  `{gptq}` is the default, propagated.{written}

Intervals are 95% t-intervals over the {seeds} models, draws averaged first. A difference whose interval holds no zero
(for ratios, no one) is marked with a star; nothing is claimed of the others.

## Bars

{bars}

## True error of each kind of linear, relative to rounding

In brackets, the share of linears whose error lies below that of `imatrix`.

{kinds}

On which share of the linears the second has the smaller true error:

{shares}

What matrices ship with, by rule 6; the largest true error of all, how many lie above {tolerance} of rounding's; the
mean error as the held-out tokens judge it that chose, and as it is on the test; the share of weights whose code was cut
off at the end of the grid.

{shipped}

## Predictions and answers

{levels}

Of the KL that `rtn` costs, what comes back:

{back}

Each method against the one that knows less; the last, what propagation wins. KL: its ratio, so that below 1 is better.
Answers: percentage points more right; then answers lost and gained, all models and one draw, with Tango's paired
interval of their difference, which takes these models as given. A difference in answers is marked where neither
interval holds zero.

{differences}

## Through the gate

What `k2quant eval gate` decides (its own function) of the {tested:,} answers of each model and draw, against the
model in BF16: margin {margin:.0%}, alpha 5%. So many answers pass a drop of a point only where few of them change.

{gates}

## Beside QAT

The same seeds on the {exam:,} questions of [QAT's benchmark](qat.md), and what that page says of plain STE. "Loss
back": of the answer loss that rounding adds, the share that comes back, over models. For QAT it is that of a control
which trains as long and is rounded afterwards, so its answers are to be held against its own in BF16. Its KL to the
model before training is no figure: training moves the model itself.

{qat}

{where}
"""

PEERS = """# Calibration: k2quant's GPTQ beside its peers'

Written by `benchmarks/suites/solving/run.py`; do not edit.

{facts} Peers: {peers}.

{seeds} nano-K2s, every projection of every layer, groups of 32, symmetric. All get the same documents (a draw of
{documents:,} less what is held out; k2quant's rule 6 has the tenth that it judges by too), one process a contestant,
{threads} threads each, in turns. All keep weights of BF16 and compute in it. What each wrote was read back and put
into the same float32 model, on the {tested:,} questions of [the proof](solving-proof.md).

- llm-compressor: `GPTQModifier` and `AWQModifier` with their defaults (damping 0.01, static activation order; duo
  scaling, 20 points), on its grid: scale amax/7.5, codes -8 to 7 (at three bits amax/3.5, -4 to 3). Documents in
  batches of one length, so nothing is padded.
- auto-round: `W4A16` with its defaults (200 steps, batches of 8 rows), symmetric: codes -8 to 7, a scale of either
  sign. Documents as rows of one length, what is filled up left out of its loss.
- k2quant: `rtn`; `imatrix`, collecting and searching; `gptq`, the pass with its defaults. K2's grid: codes -7 to 7 (-3
  to 3), one code fewer.

KL to the BF16 model in nats a token of an answer; its ratio to that of k2quant's `gptq`, geometric mean over models
with its 95% t-interval, above 1 where the peer loses; and to that of plain rounding on the contestant's own grid, for
grids are not alike: a sixteenth code alone takes a part of the KL. Error: sum w |(W - Q) x|^2 of each linear on the
original model's held-out activations over that of k2quant's rounding, mean; GPTQ, both, and auto-round solve for what
quantised layers give. AWQ's weights are taken back to the units of the original inputs. In brackets, on which share of
the linears k2quant's `gptq` has the smaller error. The last column is the most values that a group has: what a code can
say.

{levels}

Time and memory: seconds from weights and tokens in memory to quantised ones, without start, imports and loading;
processor seconds and own memory (the largest RssAnon + RssShmem) of the whole process. Medians over models, with their
range. Where the load above is more than the cores, other processes were at work: then times are good for comparison
alone. nano-K2 is small: what a tool spends outside its products weighs here more than on K2.

{costs}

## What was lost

Each figure in which a peer is better than k2quant's `gptq`, or its rounding than k2quant's:

{lost}

## What the peers needed to run at all

- llm-compressor's loader for models of experts (`load_quantizable_moe`) imports every image processor of transformers
  and ended with "No module named 'torchvision'"; experts were taken apart by its `linearize_moe` instead.
- `AWQModifier` with its own mappings for `DeepseekV3ForCausalLM` ended with "AWQ needs to match a single smoothlayer
  for each mapping": they ask every layer for a router, and the first layer is dense, as K2's is. Here they are given
  layer by layer, with the router where there is one.
- `AWQModifier` on a machine without a GPU ended with "Cannot access accelerator device when none is available.", where
  it pins memory. That call was left out, which changes no value.
- auto-round ran as it is.
"""

KINDS: dict[str, Show] = {
    "codes": lambda row: f"INT{row['bits']}",
    "linear": lambda row: row["kind"],
    "count": lambda row: f"{row['count']:,}",
    "imatrix": lambda row: f"{row['error']['imatrix']:.3f}",
    ALONE: lambda row: f"{row['error'][ALONE]:.3f} ({row['won'][ALONE]:.1%})",
    GPTQ: lambda row: f"{row['error'][GPTQ]:.3f} ({row['won'][GPTQ]:.1%})",
}


def _share(found: Mapping[str, float]) -> str:
    return f"{found['mean']:.1%} ({found['low']:.1%} to {min(1.0, found['high']):.1%})"


SHARES: dict[str, Show] = {
    "codes": lambda row: f"INT{row['bits']}",
    "methods": lambda row: f"{row['worse']}, {row['better']}",
    "linears": lambda row: f"{row['count']:,}",
    "share": lambda row: _share(row["share"]),
}

SHIPPED: dict[str, Show] = {
    "codes": lambda row: f"INT{row['bits']}",
    "ships with": lambda row: ", ".join(f"{name} {count:,}" for name, count in row["ships"].items()),
    "worst": lambda row: f"{row['worst']:.3f}",
    "above": lambda row: str(row["above"]),
    "judged": lambda row: f"{row['judged']:.3f}",
    "true": lambda row: f"{row['true']:.3f}",
    "cut off": lambda row: f"{row['saturated']:.2%}",
}

LEVELS: dict[str, Show] = {
    "codes": lambda row: "BF16" if row["method"] == "none" else f"INT{row['bits']}",
    "method": lambda row: "" if row["method"] == "none" else row["method"],
    "KL": lambda row: f"{row['kl']:.5f}",
    "right": lambda row: f"{row['right']:.1%}",
}

BACK: dict[str, Show] = {
    "codes": lambda row: f"INT{row['bits']}",
    "method": lambda row: row["method"],
    "of the KL": lambda row: _share(row["share"]),
}

GATES: dict[str, Show] = {
    "codes": lambda row: f"INT{row['bits']}",
    "method": lambda row: row["method"],
    "answers lost, points": lambda row: f"{100 * row['drop']:+.2f}",
    "verdicts": lambda row: ", ".join(f"{name} {count}" for name, count in row["verdicts"].items()),
}

QAT: dict[str, Show] = {
    "codes": lambda row: f"INT{row['bits']}",
    "method": lambda row: row["method"],
    "KL": lambda row: "" if row["kl"] is None else f"{row['kl']:.5f}",
    "loss back": lambda row: _share(row["recovered"]) if row["recovered"] else "",
    "right": lambda row: f"{row['right']:.1%}",
    "in BF16": lambda row: f"{row['without']:.1%}",
    "points below": lambda row: f"{100 * (row['without'] - row['right']):.1f}",
}

WRITTEN = """ Models were held in memory; in the INT4 checkpoint that `k2quant.calib.solve`
  writes of the first model's first draw {equal} of {of} matrices have the same values to the last bit, and `eval
  fidelity` says {fidelity:.5f} of it, where memory says {kl:.5f}."""


def _written(found: Mapping[str, Any] | None) -> str:
    return WRITTEN.format(**found) if found else ""


ENOUGH = 1.0
"""Percentage points below BF16 at which calibration is called enough here."""


def _where(rows: list[dict[str, Any]]) -> str:
    """Say at which widths calibration is enough, and what QAT has where it is not."""
    lines = []
    for bits in dict.fromkeys(row["bits"] for row in rows):
        here = {row["method"]: row for row in rows if row["bits"] == bits}
        below = {name: 100 * (row["without"] - row["right"]) for name, row in here.items()}
        enough = "calibration is enough" if below[GPTQ] <= ENOUGH else "calibration is not enough"
        lines.append(
            f"- INT{bits}: {enough}, by this measure: GPTQ's answers lie {below[GPTQ]:.1f} points below BF16's "
            f"(`rtn` {below['rtn']:.1f}, `imatrix` {below['imatrix']:.1f}), QAT's {below['QAT']:.1f} below its "
            "control's."
        )
    return "\n".join([f"Enough is here what costs at most {ENOUGH:.0f} point of the answers.\n", *lines])


def proof(results: Mapping[str, Any]) -> str:
    """Return the page of the proof."""
    shown = {
        "facts": facts(results),
        "alone": ALONE,
        "gptq": GPTQ,
        "bars": table(BARS, results["bars"]),
        "kinds": table(KINDS, results["kinds"]),
        "shares": table(SHARES, results["shares"]),
        "shipped": table(SHIPPED, results["shipped"]),
        "levels": table(LEVELS, results["levels"]),
        "back": table(BACK, results["back"]),
        "differences": table(DIFFERENCES, results["differences"]),
        "gates": table(GATES, results["gates"]),
        "qat": table(QAT, results["qat"]),
        "where": _where(results["qat"]),
        "margin": MARGIN,
        "written": _written(results["written"]),
        "settings": ", ".join(f"{name} {value}" for name, value in results["settings"].items()),
    }
    return PROOF.format(**dict(results) | shown)


PEER_LEVELS: dict[str, Show] = {
    "codes": lambda row: f"INT{row['bits']}",
    "contestant": lambda row: NAMES[row["contestant"]],
    "KL": lambda row: f"{row['kl']:.5f}",
    "over gptq's": lambda row: "{:.2f} ({:.2f} to {:.2f})".format(*row["ratio"]) if row["ratio"] else "",
    "over its rounding's": lambda row: "" if row["left"] is None else f"{row['left']:.3f}",
    "right": lambda row: f"{row['right']:.1%}",
    "error": lambda row: f"{row['error']:.3f}" + ("" if row["contestant"] == PAIR else f" ({row['beaten']:.0%})"),
    "values of a group": lambda row: str(row["codes"]),
}


def _range(found: Mapping[str, float], scale: float, form: str) -> str:
    middle, least, most = (found[key] / scale for key in ("median", "least", "most"))
    return f"{middle:{form}} ({least:{form}}-{most:{form}})"


PEER_COSTS: dict[str, Show] = {
    "codes": lambda row: f"INT{row['bits']}",
    "contestant": lambda row: NAMES[row["contestant"]],
    "s": lambda row: _range(row["seconds"], 1, ".1f"),
    "whole command s": lambda row: _range(row["whole"], 1, ".1f"),
    "CPU s": lambda row: _range(row["cpu"], 1, ".1f"),
    "own memory MB": lambda row: _range(row["own"], 1e6, ".0f"),
}


def peers(results: Mapping[str, Any]) -> str:
    """Return the page of the peers."""
    lost = results["lost"] or ["No figure of a peer is better."]
    shown = {
        "facts": facts(results),
        "levels": table(PEER_LEVELS, results["levels"]),
        "costs": table(PEER_COSTS, results["levels"]),
        "lost": "\n".join(f"- {line}" for line in lost),
    }
    return PEERS.format(**dict(results) | shown)
