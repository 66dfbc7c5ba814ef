"""Write the page and the plot of the kernels' results from their JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from suites.products import cases, goals
from suites.products.goals import Record

INTRO = """# Kernels on {device}

Written by `benchmarks/kernels.py` from `{source}`; do not edit. Lost comparisons stand here like won ones.

{machine}

Repeat with:

    {command}

Draw this page anew with `{command} --render`.
"""

CPU_PROTOCOL = """
Contestants take turns, A B B A; a turn lasts 20 ms or one call. Weights rotate over copies of {rotate:.0f} MB together,
so they come from memory. Times are medians, with the 20th and the 80th percentile in brackets. `F.linear` in float32
takes and gives float32; everything else takes and gives BF16.
"""

CUDA_PROTOCOL = """
One CUDA graph of at least 20 calls for each contestant, over copies of its weights of at least {rotate:.0f} MB in all,
replayed {samples} times in turns, A B B A, after {warm} s of replays; calls that take long are repeated less. Times are
medians, with the 20th and the 80th percentile in brackets. "flushed" is another protocol: one call in a graph after
256 MB were overwritten, a few microseconds of the graph's start included. "eager" is what Python sees of a small call.
"""

ERRORS = """
The error is ||y - exact|| / ||exact|| over up to 64 rows (4 tokens for experts), exact in float64 from unrounded
code * scale. Products of FP8 by FP8 are held to x as rounded to FP8, `F.linear` to x as it is. For codecs it is the
share of bytes that differ from the reference. "over BF16" is our error over that of dequantising to BF16.
"""

SECTIONS = {
    "int4": "INT4 weights, BF16 activations (W4A16, groups of 32)",
    "fp8": "FP8 weights, BF16 activations (W8A16, blocks of 128x128)",
    "w8a8": "FP8 weights, FP8 activations (W8A8)",
    "nvfp4": "NVFP4 weights, BF16 activations",
    "mxfp4": "MXFP4 weights, BF16 activations",
    "moe-int4": "Experts, INT4: top 8, routing, SiLU and weighted sum included",
    "moe-fp8": "Experts, FP8: top 8, routing, SiLU and weighted sum included",
    "codecs": "Codecs",
}
COLOURS = {
    cases.OURS: "#d62728",
    cases.GEMM: "#ff9896",
    cases.DENSE: "#1f77b4",
    cases.DENSE32: "#17becf",
    cases.DEQUANTIZED: "#2ca02c",
    cases.INT4PACK: "#9467bd",
    cases.SCALED: "#8c564b",
    cases.GROUP_TILES: "#7f7f7f",
    cases.GROUPED: "#1f77b4",
    cases.LOOP: "#1f77b4",
}
PLOTTED = {
    "cpu": (("int4", "expert gate"), ("int4", "expert down"), ("fp8", "expert gate")),
    "cuda": (("int4", "gate"), ("int4", "q_a"), ("w8a8", "gate"), ("moe-int4", "K2")),
}


def write(file: Path) -> None:
    """Write page and plot beside a file of results; remarks of a person lie there too, as `<name>-remarks.md`."""
    results = json.loads(file.read_text())
    plotted = draw(results, file.with_suffix(".svg"))
    remarks = file.with_name(f"{file.stem}-remarks.md")
    text = remarks.read_text() if remarks.exists() else ""
    file.with_suffix(".md").write_text(page(results, file, remarks=text, plot=f"{file.stem}.svg" if plotted else ""))


def summary(file: Path) -> str:
    """Return a line about a file of results, for the page of all benchmarks."""
    results = json.loads(file.read_text())
    found = [verdict for verdict in goals.verdicts(results) if verdict.met is not None]
    met = sum(bool(verdict.met) for verdict in found)
    return f"[Kernels on {_device(results)}](results/{file.stem}.md): {met} of {len(found)} goals met."


def page(results: Record, file: Path, *, remarks: str = "", plot: str = "") -> str:
    """Return the page."""
    folder = "benchmarks/results/" if file.parent.name == "results" else ""
    setting = results["settings"]
    protocol = CPU_PROTOCOL if results["device"] == "cpu" else CUDA_PROTOCOL
    numbers = {
        "rotate": setting["rotate_bytes"] / 1e6,
        "samples": setting["samples"],
        "warm": setting["warm_up_seconds"],
    }
    parts = [
        INTRO.format(
            device=_device(results), source=folder + file.name, machine=_machine(results), command=results["command"]
        ),
        protocol.format(**numbers),
        ERRORS,
        goals_table(results),
        f"\n{remarks}" if remarks else "",
        f"\n## Time over rows\n\n![Times of the contestants and the least possible time]({plot})\n" if plot else "",
        *(section_table(results, section) for section in SECTIONS),
        _memory(results),
        failures_table(results),
    ]
    return "".join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def roofline(results: Record, record: Record) -> float | None:
    """Return the least possible microseconds: the bytes at the bandwidth or the operations at the rate of this run."""
    rates = results["ceilings"]
    dtype = "fp8" if record["section"] == "w8a8" else "bf16"
    flops = rates.get(f"{dtype}_flops_per_s") or rates.get("bf16_flops_per_s")
    if results["device"] == "cpu":
        flops = max(rate for name, rate in rates.items() if name.endswith("flops_per_s"))
    moved = rates["read_bytes_per_s" if results["device"] == "cpu" else "copy_bytes_per_s"]
    if "bytes" not in record or not flops:
        return None
    least: float = max(record["bytes"] / moved, record["flops"] / flops)
    return 1e6 * least


def _device(results: Record) -> str:
    box = results["machine"]
    return str(box.get("gpu") or f"{box['cpu']}, {box['threads']} threads")


def _machine(results: Record) -> str:
    box, rates = results["machine"], results["ceilings"]
    state = " with uncommitted changes" if results["dirty"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    known = [
        f"copying {rates['copy_bytes_per_s'] / 1e9:.0f} GB/s, read and written",
        f"reading {rates['read_bytes_per_s'] / 1e9:.1f} GB/s (`torch.sum`, float32)",
        *(
            f"{name.split('_')[0]} products {rate / 1e12:.3g} TFLOP/s"
            for name, rate in rates.items()
            if name.endswith("flops_per_s")
        ),
    ]
    host = f"{box['cpu']}, {box['cores']} cores, {box['memory'] / 2**30:.0f} GiB memory, {box['instructions']}"
    lines = [
        f"{results['date']}, commit `{results['commit']}`{state}. {host}; load before the run {box['load']:.1f}.",
        f"{versions}.",
        f"In the same run: {', '.join(known)}.",
    ]
    if "nvidia_smi" in box:
        smi = box["nvidia_smi"]
        lines += [
            f"nvidia-smi ({smi['asked']}): {when}: {'; '.join(smi.get(when, []))}" for when in ("before", "after")
        ]
    return "\n".join(lines)


def goals_table(results: Record, more: Sequence[goals.Verdict] = ()) -> str:
    """Show every goal, met, missed or not measured; `more` are those that are measured elsewhere."""
    found = [*goals.verdicts(results), *more]
    known = [verdict for verdict in found if verdict.met is not None]
    met = sum(bool(verdict.met) for verdict in known)
    rows = [
        (
            item.goal,
            item.what,
            item.must,
            item.stretch,
            item.measured or "-",
            _state(item.met, stretched=item.stretched),
        )
        for item in found
    ]
    left = results.get("left_out", [])
    tail = f"\nThe time was over before {len(left)} cells were measured.\n" if left else ""
    head = ["goal", "what", "must", "stretch", "measured", ""]
    return f"\n## Goals\n\n{met} of {len(known)} met.\n\n" + table(head, rows) + tail


def _state(met: bool | None, *, stretched: bool) -> str:  # noqa: FBT001 - three states
    if met is None:
        return "not measured"
    return "**missed**" if not met else "met, stretch too" if stretched else "met"


def section_table(results: Record, section: str) -> str:
    """Show the cells of a section; nothing if there are none."""
    records = [record for record in results["cells"] if record.get("section") == section]
    if not records:
        return ""
    names = list(dict.fromkeys(name for record in records for name in record["contestants"]))
    cpu = results["device"] == "cpu"
    head = ["shape", "M", "", *(f"{name}, {'ms' if cpu else 'us'}" for name in names)]
    head += ["over the best peer", "of the roofline", "TFLOP/s", "GB/s", "over BF16"]
    rows = [
        [
            record["shape"],
            str(record["m"] or "-"),
            _kind(record),
            *(_time(record["contestants"].get(name), in_ms=cpu) for name in names),
            *_derived(results, record),
        ]
        for record in sorted(records, key=_order)
    ]
    return f"\n## {SECTIONS[section]}\n\nEach time with its error.\n\n" + table(head, rows)


def _order(record: Record) -> tuple[Any, ...]:
    sizes = list(cases.SHAPES) + list(cases.EXPERTS) + list(cases.CODECS)
    place = sizes.index(record["shape"]) if record["shape"] in sizes else len(sizes)
    return record["protocol"] != "rotating", record["protocol"], record["routing"], place, record["shape"], record["m"]


def _kind(record: Record) -> str:
    return ", ".join(filter(None, (record["routing"], record["protocol"].replace("rotating", ""))))


def _time(found: Record | None, *, in_ms: bool) -> str:
    if found is None:
        return ""
    if "median_us" not in found:
        return "failed"
    unit = 1e3 if in_ms else 1.0
    median, low, high = (_three(found[f"{name}_us"] / unit) for name in ("median", "p20", "p80"))
    return f"{median} ({low}-{high}), {found['error']:.1e}"


def _derived(results: Record, record: Record) -> Iterator[str]:
    """Yield the last columns."""
    ours, least, ratio = goals.microseconds(record), roofline(results, record), goals.behind(record)
    if not ours:
        yield from [""] * 5
        return
    held = results["device"] == "cpu" and record["section"] in {"int4", "fp8"}
    bar = goals.CPU_RATIOS.get(record["m"]) if held else None
    state = "" if bar is None or ratio is None else f" (<= {bar:.2f}: {'met' if ratio <= bar else '**missed**'})"
    yield "" if ratio is None else f"{ratio:.2f}x{state}"
    timed = record["protocol"] != "eager"
    yield f"{100 * least / ours:.0f} %" if least and timed else ""
    yield _three(goals.teraflops(record) or 0) if record.get("flops") and timed else ""
    yield _three(record["bytes"] / ours / 1e3) if "bytes" in record and timed else ""
    yield "" if (error := goals.error_ratio(record)) is None else f"{error:.2f}x"


def _memory(results: Record) -> str:
    """Show what the weights take, by contestant."""
    rows: dict[tuple[str, str], dict[str, int]] = {}
    for record in results["cells"]:
        if record.get("section", "codecs") != "codecs":
            held = rows.setdefault((record["section"], record["shape"]), {})
            held |= {name: found["weight_bytes"] for name, found in record["contestants"].items() if "error" in found}
    names = list(dict.fromkeys(name for held in rows.values() for name in held))
    if not names:
        return ""
    body = [
        [section, shape, *(f"{held[name] / 1e6:.1f}" if name in held else "" for name in names)]
        for (section, shape), held in rows.items()
        if held
    ]
    return "\n## Memory of the weights, MB\n\n" + table(["section", "shape", *names], body)


def failures_table(results: Record) -> str:
    """Say who failed, where and why; equal reasons of one contestant stand together."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for record in results["cells"]:
        if "given_up" in record:
            reasons.setdefault(("the cell", record["given_up"]), []).append(record["key"])
        for name, found in record["contestants"].items():
            if "failed" in found:
                reasons.setdefault((name, found["failed"]), []).append(record["key"])
    if not reasons:
        return ""
    rows = [(name, why.replace("|", "\\|"), _few(keys)) for (name, why), keys in reasons.items()]
    return "\n## What failed\n\n" + table(["contestant", "why", "cells"], rows)


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _three(value: float) -> str:
    """Write a number with three significant digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def draw(results: Record, file: Path) -> bool:
    """Plot times over rows of x, log-log, with the least possible time; return whether there was anything to plot."""
    series = [
        (f"{section}, {shape}", records)
        for section, shape in PLOTTED[results["device"]]
        if len(records := _line(results, section, shape)) > 1
    ]
    if not series:
        return False
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    # Text stays text, and names stay the same from run to run: the file is small and its changes can be read.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "k2quant", "font.size": 8})
    figure, every = plt.subplots(1, len(series), figsize=(4.2 * len(series), 3.6), squeeze=False)
    for axes, (title, records) in zip(every[0], series, strict=True):
        names = list(dict.fromkeys(name for record in records for name in record["contestants"]))
        for name in names:
            points = [(record["m"], time) for record in records if (time := goals.microseconds(record, name))]
            width = 2.0 if name == cases.OURS else 1.0
            axes.plot(
                *zip(*points, strict=True), "o-", ms=3, lw=width, color=COLOURS.get(name), label=name
            ) if points else None
        least = [(record["m"], time) for record in records if (time := roofline(results, record))]
        axes.plot(*zip(*least, strict=True), "k--", lw=1, label="least possible") if least else None
        axes.set(xscale="log", yscale="log", xlabel="M", ylabel="microseconds", title=title)
        axes.set_xticks([record["m"] for record in records], [str(record["m"]) for record in records])
        axes.minorticks_off()
        axes.grid(visible=True, lw=0.3)
        axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return True


def _line(results: Record, section: str, shape: str) -> list[Record]:
    """Return the cells of one curve, by rows of x."""
    timed = [record for record in goals.Cells(results).find(section, [shape]) if goals.microseconds(record)]
    return sorted(timed, key=lambda record: int(record["m"]))
