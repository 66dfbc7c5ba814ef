"""What the QAT experiment is held to, and its page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from suites.qat.summaries import Interval, Row, interval

TIME, MEMORY = 1.25, 1.15
"""Bars on a QAT step against a plain one."""

PAGE = """# QAT on nano-K2, against its control

Written by `benchmarks/qat.py`; do not edit. `{command}`

{cpu}, {cores} cores; {versions}; commit {commit}{dirty}.

{seeds} seeds, each a nano-K2 of its own, trained from nothing (`k2quant nano --seed`). Every projection is rounded in
groups of 32 by Moonshot's rule with codes to ±7, ±3, ±1. {steps} steps of {batch} rows of 64 tokens, AdamW, {warmup}
warm-up steps, cosine to a tenth; the router frozen; highest rate {rates} (the better of two for the plain
arm on seed 0, by rows that are neither trained on nor among these items). {items:,} held-out items, the same for all;
losses in nats a token of an answer, mean over items.

The control is trained as long, on the same rows in the same order with the same rates, without fake quantisation, and
rounded afterwards. Gap: what rounding costs the control. Gained: how far an arm lies below the rounded control.
Recovered: the second over the first, the mean of the seeds' ratios. Intervals are 95% t-intervals over seeds. A ratio
is given where every seed's gap is above three standard errors.

{comes_to}

## Bars

{bars}

## Recovery

Right: answers wholly right, of all items and seeds. The control in BF16 is what the same steps teach without any
rounding; the start point of seed 0, trained no further, has {start} of the gate's items. Gap, gained and recovered
are of the loss.

{recovery}

Seed by seed, recovered:

{seeds_table}

Plain STE without seed 0, on which the rates were tried: {without}.

Learned scales and distillation against plain STE: how far their loss lies below it, nats a token.

{variants}

Every arm's export was read back from the disk and scored: {exports}. The arms were trained at commit {commits}.

## Accuracy through the gate

Seed 0. `k2quant eval run` on the tasks that `k2quant nano --tasks` writes, then `k2quant eval gate` against the base in
BF16. Rounded: the base, rounded to nearest, no training. The margin is {margin}.

{gates}

## Side by side with torchao

{peers}

## Cost of a step

nano-K2, INT4 codes, plain STE, {rows} rows of 64 tokens, one thread, router frozen in all. Fused: the experts as
transformers has them. Separate: each a linear of its own, the only kind that torchao takes. Times: {turns} steps each,
in turns.

{cost}

Memory, MiB: the peak of a process of ten steps, whole, and less what it held with libraries and data before the model
("own"); medians (least to most) of {rounds} processes each, in turns. By default glibc keeps pieces of freed memory,
how many is chance; the last columns are of processes that give every block of 64 KiB back when it is freed
(`MALLOC_MMAP_THRESHOLD_=65536`). The rounded float32 copy of the weights is a large part of so small a model and so
short a batch.

{memory}
"""


def page(facts: dict[str, Any]) -> str:
    """Return the page of what the JSON file holds."""
    found, arms = rows_of(facts), facts["arms"]
    same = sum(one["export_scores_the_same"] for one in arms)
    return PAGE.format(
        **facts["machine"],
        command=facts["command"],
        seeds=facts["seeds"],
        steps=facts["steps"],
        batch=facts["batch"],
        warmup=facts["warmup"],
        rates=", ".join(f"{rate:g} for INT{bits}" for bits, rate in facts["rates"].items()),
        items=arms[0]["rounded"]["count"],
        comes_to=_comes_to(found, facts["gates"]["rows"]),
        start=f"{facts['gates']['rows'][0]['base']:.1%}",
        bars=table(
            ["bar", "measured", "met"], [(b["bar"], b["measured"], "yes" if b["met"] else "NO") for b in facts["bars"]]
        ),
        recovery=_recovery(found),
        seeds_table=_seeds(found),
        without=", ".join(
            f"INT{row.bits} {'-' if row.share is None else _percent(row.share)}"
            for row in rows_of(facts, "without_seed_0")
        ),
        variants=_variants(facts["variants"]),
        exports=f"{same} of {len(arms)} scored the same to the last bit",
        commits=", ".join(sorted({one["commit"] for one in arms})),
        margin=facts["gates"]["margin"],
        gates=_gates(facts["gates"]["rows"]),
        peers=_peers(facts["peers"]),
        rows=facts["batch"],
        turns=len(facts["cost"]["fused"]["seconds"]["none"]),
        cost=_cost(facts["cost"]),
        rounds=len(facts["cost"]["fused"]["memory"]["none"]["usual"]),
        memory=_memory(facts["cost"]),
    )


def rows_of(facts: dict[str, Any], key: str = "rows") -> list[Row]:
    """Return rows as the JSON file has them."""
    return [
        Row(
            **{
                **one,
                **{name: one[name] and Interval(*one[name]) for name in ("gap", "gained", "share")},
                "shares": tuple(one["shares"]),
                "accuracy": tuple(one["accuracy"]),
            }
        )
        for one in facts[key]
    ]


def bars(facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every bar with what was measured."""
    found = {(one.kind, one.bits): one for one in rows_of(facts)}
    for bits, least in ((2, 0.5), (3, 0.3)):
        share = found["plain", bits].share
        yield _bar(
            f"INT{bits}: at least {least:.0%} of the loss recovered, lower 95% bound",
            "gap too small to tell" if share is None else f"{_percent(share)}; {_right(found['plain', bits])}",
            met=share is not None and share.low >= least,
        )
    four = found["plain", 4]
    yield _bar(
        "INT4: a lower loss than the control with 95% confidence",
        f"{_nats(four.gained)}; {_right(four)}",
        met=four.gained.low > 0,
    )
    times, held = facts["cost"]["fused"]["seconds"], facts["cost"]["fused"]["memory"]
    ratio = median(times["k2quant"]) / median(times["none"])
    yield _bar(f"a QAT step: at most {TIME}x the time of a plain one", f"{ratio:.3f}x", met=ratio <= TIME)
    for of, kind, part in (
        ("its process", "usual", _peak),
        ("its own", "returned", _own),
        ("its own, with the blocks that glibc keeps", "usual", _own),
    ):
        ratio = _typical(held["k2quant"], kind, part) / _typical(held["none"], kind, part)
        yield _bar(f"a QAT step: at most {MEMORY}x the peak memory, {of}", f"{ratio:.3f}x", met=ratio <= MEMORY)
    same = all(one["export_scores_the_same"] for one in facts["arms"])
    yield _bar("every export scores as its training, to the last bit", f"{len(facts['arms'])} exports", met=same)


def _bar(bar: str, measured: str, *, met: bool) -> dict[str, Any]:
    return {"bar": bar, "measured": measured, "met": met}


def _recovery(found: list[Row]) -> str:
    head = ["bits", "arm", "right", "control rounded", "control in BF16", "loss recovered", "gap", "gained"]
    lines = [
        (
            f"INT{row.bits}",
            row.kind,
            *(f"{100 * row.accuracy[which]:.1f}%" for which in (2, 1, 0)),
            "gap too small" if row.share is None else _percent(row.share),
            _nats(row.gap),
            _nats(row.gained),
        )
        for row in found
    ]
    return table(head, lines)


def _comes_to(found: list[Row], gates: list[dict[str, Any]]) -> str:
    """Say what plain STE comes to at each width, in answers before losses."""
    verdicts = {one["name"]: one["decision"] for one in gates}
    said = [
        f"- INT{row.bits}: {_right(row)}"
        + ("" if row.share is None else f"; {row.share.mean:.1%} of the loss that rounding adds came back")
        + f". Through the gate, seed 0: {verdicts[f'INT{row.bits}, QAT, plain STE']}, the rounded control "
        + f"{verdicts[f'INT{row.bits}, control, rounded']}."
        for row in found
        if row.kind == "plain"
    ]
    head = "What it comes to, plain STE against the rounded control. A share of the loss is no share of answers."
    return head + "\n\n" + "\n".join(said)


def _right(row: Row) -> str:
    """Say how many answers are right: of the control rounded, of the arm, and of the control in BF16."""
    whole, before, now = row.accuracy
    return f"{before:.1%} -> {now:.1%} of answers right, of {whole:.1%} in BF16"


def _seeds(found: list[Row]) -> str:
    return table(
        ["bits", "arm", "by seed"],
        [(f"INT{row.bits}", row.kind, ", ".join(f"{share:.0%}" for share in row.shares) or "-") for row in found],
    )


def _variants(found: list[dict[str, Any]]) -> str:
    lines = []
    for one in found:
        below = Interval(*one["below_plain"])
        lines.append((f"INT{one['bits']}", one["kind"], _nats(below), _said(below)))
    return table(["bits", "arm", "below plain STE", ""], lines)


def _said(found: Interval) -> str:
    return "better" if found.low > 0 else "worse" if found.high < 0 else "no difference to tell"


def _gates(lines: list[dict[str, Any]]) -> str:
    return table(
        ["candidate", "items", "base right", "candidate right", "drop, pp", "lost, gained", "verdict"],
        [
            (
                one["name"],
                one["n"],
                f"{100 * one['base']:.1f}%",
                f"{100 * one['candidate']:.1f}%",
                f"{100 * one['drop']:+.1f} ({100 * one['low']:+.1f} to {100 * one['high']:+.1f})",
                f"{one['lost']}, {one['gained']}",
                one["decision"],
            )
            for one in lines
        ],
    )


def _peers(facts: dict[str, Any]) -> str:
    if not facts["results"]:
        return "torchao was not installed; the side-by-side was left out."
    text = (
        "The same nano-K2s with each expert a linear of its own, the same rows, steps and rates, a plain loop; every "
        f"projection rounded. torchao {facts['version']}: `QATConfig(IntxWeightOnlyConfig(intN, PerGroup(32)))`, its "
        "loss that of its own `convert`; k2quant's that of the checkpoint on the disk. Below: how far k2quant's loss "
        "lies below, over seeds. In nano-K2 as transformers has it, torchao's QAT leaves the fused experts untouched, "
        f"{facts['experts']:.0%} of all weights.\n\n"
    )
    by_key = {(one["seed"], one["tool"], one["bits"]): one for one in facts["results"]}
    lines = []
    for bits in sorted({bits for _, _, bits in by_key}):
        seeds = sorted({s for s, tool, b in by_key if b == bits and tool == "torchao" and (s, "k2quant", b) in by_key})
        ours, theirs = ([by_key[s, tool, bits] for s in seeds] for tool in ("k2quant", "torchao"))
        gains = [t["loss"] - o["loss"] for o, t in zip(ours, theirs, strict=True)]
        gain = interval(gains) if len(gains) > 1 else None
        lines.append(
            (
                f"INT{bits}",
                len(seeds),
                *(f"{sum(one['loss'] for one in arm) / len(arm):.4f}" for arm in (ours, theirs)),
                "-" if gain is None else f"{_nats(gain)}, {_said(gain)}",
                *(
                    f"{sum(one['right'] for one in arm) / sum(one['count'] for one in arm):.1%}"
                    for arm in (ours, theirs)
                ),
            )
        )
    head = ["bits", "seeds", "loss k2quant", "loss torchao", "below torchao", "right k2quant", "right torchao"]
    return text + table(head, lines)


def _cost(cost: dict[str, Any]) -> str:
    lines = []
    for experts, found in cost.items():
        plain = median(found["seconds"]["none"])
        for tool, seconds in found["seconds"].items():
            low, high = _quartiles(seconds)
            spread = f"{1000 * median(seconds):.0f} ({1000 * low:.0f}-{1000 * high:.0f})"
            lines.append((experts, _step(tool), spread, f"{median(seconds) / plain:.3f}x"))
    return table(["experts", "step", "ms (quartiles)", "time"], lines)


def _memory(cost: dict[str, Any]) -> str:
    lines = []
    for experts, found in cost.items():
        plain = found["memory"]["none"]
        for tool, held in found["memory"].items():
            cells = []
            for kind, part in (("usual", _peak), ("usual", _own), ("returned", _own)):
                sizes = [part(one) / 2**20 for one in held[kind]]
                ratio = _typical(held, kind, part) / _typical(plain, kind, part)
                cells += [f"{median(sizes):.0f} ({min(sizes):.0f}-{max(sizes):.0f})", f"{ratio:.3f}x"]
            lines.append((experts, _step(tool), *cells))
    share = "of a plain step's"
    return table(["experts", "step", "peak", share, "own", share, "own, blocks returned", share], lines)


def _step(tool: str) -> str:
    return "plain step" if tool == "none" else tool


def _quartiles(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 4], ordered[-len(ordered) // 4]


def _typical(held: dict[str, list[dict[str, int]]], kind: str, part: Callable[[dict[str, int]], int]) -> float:
    """Return the median of a part over processes of a kind."""
    return median(part(one) for one in held[kind])


def _peak(memory: dict[str, int]) -> int:
    return memory["peak"]


def _own(memory: dict[str, int]) -> int:
    return memory["peak"] - memory["before"]


def _percent(found: Interval) -> str:
    return f"{100 * found.mean:.1f}% ({100 * found.low:.1f} to {100 * found.high:.1f})"


def _nats(found: Interval) -> str:
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def table(head: list[str], lines: list[tuple[Any, ...]]) -> str:
    """Return a Markdown table."""
    whole = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in whole)
