"""Write the page of results from the JSON of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from suites.common.measure import median
from suites.conversion.bars import arrow, cat_ratio, speedup, verdicts, walls, work
from suites.models import report as model_report
from suites.products import report as kernel_report

INTRO = """# Benchmarks

Written by `benchmarks/convert.py` from `{source}`; do not edit. Lost comparisons stand here like won ones.

{machine}

Repeat with:

    {command}

Draw this page anew with `python benchmarks/convert.py --render {source}`.

Times are medians, with the range of the runs in brackets. All runs are fresh processes; tools take turns, run by run.
"""

PEERS = """
In memory (tmpfs): {tmpfs}. On the disk: {disk}.

The peers are called as their examples do (`benchmarks/suites/conversion/peers/run_peer.py`), with the number of
threads that was faster in a trial on four experts. Times are those of whole commands, start and imports included
("Starting" has those apart), and the bars are on tmpfs, where no disk rules. k2quant flushes its files before it
ends; the peers leave that to the system, and "flush after" says how long it took then.
"""

CAT = """
The slice: {slice}, on the disk, its pages in the cache.

"cat" reads it to /dev/null; "write" writes as many random bytes from memory as k2quant wrote, to as many files, and
flushes them; the two are added. k2quant's time is the command less its import. The disk reads {read} GB/s when the
cache is cold.
"""

ERRORS = """
Outputs against the BF16 weights that all sources were made from: root mean square error of every matrix of two experts,
relative to the weights, and the largest error. The weights are random, so this says nothing about a model.
llm-compressor's INT4 grid is amax/7.5, ours is Moonshot's amax/7; its FP8 keeps the scales as BF16.

"""

MEMORY_TEXT = """
"Own memory" is the largest RssAnon + RssShmem seen 10 ms apart; "resident" is `ru_maxrss`, which also counts mapped
pages of the source that the system takes back when it needs them.
"""

PROJECTION = """
On paper, not measured. The codec's rate in memory on this machine, divided by its threads, times the cores; all
{weights:.3f} T weights count as converted. Reads and writes share the disk. The slower of codec and disk sets the time:
no other loss is counted, so these are lower bounds. Disks of a round rate are assumptions, the same rate for reads and
writes; "this disk" has the rates measured above.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median and the range."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def two(what: str) -> list[str]:
    """Head the columns of both tools."""
    return [f"peer {what}", f"k2quant {what}"]


def gigabytes(count: float) -> str:
    """Return bytes as GB."""
    return f"{count / 1e9:.2f}"


def duration(seconds: float) -> str:
    """Return a length of time as people say it."""
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def describe(made: dict[str, Any]) -> str:
    """Say what a slice holds."""
    sizes = ", ".join(f"{gigabytes(count)} GB as {form.upper()}" for form, count in made["bytes"].items())
    return f"layer 1 of K2-Instruct with {made['experts']} routed experts, {made['shards']} shards, {sizes}"


def machine(results: dict[str, Any]) -> str:
    """Say on what, when and with which versions this was measured."""
    box = results["machine"]
    versions = "; ".join(
        f"{where}: " + ", ".join(f"{name} {number}" for name, number in found.items())
        for where, found in results["versions"].items()
    )
    state = " with uncommitted changes" if results["dirty"] else ""
    return (
        f"{results['date']}, commit `{results['commit']}`{state}. {box['cpu']}, {box['cores']} cores, "
        f"{box['memory'] / 2**30:.0f} GiB memory, disk {box['disk']}; load before the run "
        f"{box['load']:.1f}.\n{versions}."
    )


def render_verdicts(results: dict[str, Any]) -> str:
    """Say of each bar whether it was met."""
    found = list(verdicts(results))
    met = sum(verdict.met for verdict in found)
    rows = [(item.what, item.bar, item.measured, "met" if item.met else "**missed**") for item in found]
    return f"\n## Bars\n\n{met} of {len(found)} met.\n\n" + table(["what", "bar", "measured", ""], rows)


def render_peers(results: dict[str, Any]) -> str:
    """Compare with the peers."""
    times, costs = [], []
    for row in results["peers"]:
        ours, theirs = row["k2quant_runs"], row["peer_runs"]
        name = f"{arrow(row['task'])}, {row['medium']}"
        times.append([name, row["peer"], spread(walls(theirs)), spread(walls(ours)), f"{speedup(row):.1f}x"])
        processor = [f"{median([run['cpu_s'] for run in runs]):.1f}" for runs in (theirs, ours)]
        resident = [f"{max(run['peak_rss'] for run in runs) / 2**20:.0f}" for runs in (theirs, ours)]
        flushes = f"{median([run['flush_s'] for run in theirs]):.2f}"
        output = [gigabytes(row["peer_bytes"]), gigabytes(row["k2quant_bytes"])]
        costs.append([name, str(row["threads"]), flushes, *processor, *resident, *output])
    head = ["task", "peer", "peer s", "k2quant s", "faster"]
    parts = [
        "\n## Against the peers\n",
        PEERS.format(**{medium: describe(results["slices"][f"peers-{medium}"]) for medium in ("tmpfs", "disk")}),
        "\n" + table(head, times),
        "\nProcessor seconds are user and system; MiB are the largest `ru_maxrss` of all runs.\n\n",
        table(
            ["task", "peer threads", "peer flush after s", *two("CPU s"), *two("MiB"), *two("GB out")],
            costs,
        ),
        render_errors(results),
    ]
    return "".join(parts)


def render_errors(results: dict[str, Any]) -> str:
    """Hold the outputs against the weights they came from."""
    rows = []
    for row in results["peers"]:
        if check := row.get("check"):
            pairs = [check["peer"], check["k2quant"]]
            numbers = [f"{pair['relative_rms']:.4%}" for pair in pairs] + [f"{pair['largest']:.5f}" for pair in pairs]
            rows.append([arrow(row["task"]), *numbers, "yes" if check["same_bits"] else "no"])
    head = ["task", "peer error", "k2quant error", "peer largest", "k2quant largest", "same tensors, same bits"]
    return ERRORS + table(head, rows)


def render_cat(results: dict[str, Any]) -> str:
    """Compare with reading and writing the bytes."""
    rows = []
    for row in results["cat"]:
        ours, seconds = work(row), (row["cat_s"], row["write_s"], walls(row["k2quant_runs"]))
        rates = row["output_bytes"] / median(row["write_s"]), row["weights"] / median(ours)
        numbers = [
            *map(spread, seconds),
            spread(ours),
            f"{cat_ratio(row):.2f}x",
            *(f"{rate / 1e9:.2f}" for rate in rates),
        ]
        rows.append([arrow(row["task"]), *numbers])
    head = ["task", "cat s", "write s", "k2quant s", "less import", "over cat + write", "write GB/s", "G weights/s"]
    text = CAT.format(slice=describe(results["slices"]["disk"]), read=f"{results['cold_read_gbps']:.2f}")
    return f"\n## Against the disk\n{text}\n" + table(head, rows)


def render_memory(results: dict[str, Any]) -> str:
    """Show that memory does not grow with a shard."""
    rows = []
    for row in results["memory"]:
        peaks = row["run"]["peak_private"], row["run"]["peak_rss"]
        shape = f"{row['shards']} x {row['shard_bytes'] / 1e9:.1f} GB"
        rows.append([arrow(row["task"]), shape, *(f"{peak / 2**20:.0f}" for peak in peaks)])
    head = ["task", "source", "own memory MiB", "resident MiB"]
    return f"\n## Memory\n{MEMORY_TEXT}\n" + table(head, rows)


def render_start(results: dict[str, Any]) -> str:
    """Show what a command costs before it works."""
    lines = [f"- `k2quant --help`: {spread(walls(results['help']), 3)} s, {len(results['help'])} runs."]
    lines += [f"- Import of {tool}: {spread(walls(runs))} s." for tool, runs in results["imports"].items()]
    first = results["first_run"]["wall_s"]
    lines.append(
        f"- First conversion on a machine, when the codecs are compiled: {first:.1f} s for one expert, FP8 -> INT4. "
        "The compiled code is kept; later runs do not pay this, and none above did."
    )
    return "\n## Starting\n\n" + "\n".join(lines) + "\n"


def render_codecs(results: dict[str, Any]) -> str:
    """Show the codecs alone."""
    found = results["codecs"]
    rates = found["rates_1e9_weights_per_s"].items()
    rows = [(name, spread(rate["runs"])) for name, rate in rates]
    text = f"\n## Codecs in memory\n\n10^9 weights a second on {found['setup']['threads']} threads; no files.\n\n"
    return text + table(["codec", "G weights/s"], rows)


def render_projection(results: dict[str, Any]) -> str:
    """Show the whole model, on paper."""
    rows: dict[tuple[str, str], list[str]] = {}
    for row in results["projection"]["rows"]:
        cells = rows.setdefault((row["task"], row["disk"]), [])
        cells.append(f"{duration(row['total_s'])} ({row['limit']})")
    cores = list(dict.fromkeys(f"{row['cores']} cores" for row in results["projection"]["rows"]))
    body = [[arrow(task), disk, *cells] for (task, disk), cells in rows.items()]
    text = PROJECTION.format(weights=results["projection"]["weights"] / 1e12)
    real = [f"{arrow(task)} {duration(seconds)}" for task, seconds in results["projection"]["scaled_s"].items()]
    tail = f"\nAt the rate measured above on the slice, files and all, on this machine: {', '.join(real)}.\n"
    return f"\n## The whole model\n{text}\n" + table(["task", "disk", *cores], body) + (tail if real else "")


def render_kernels(folder: Path) -> str:
    """Link the pages of the kernels' results, which `kernels.py` and `gpu.py` write."""
    files = [folder / f"kernels-{device}.json" for device in ("cpu", "cuda")]
    lines = [f"- {kernel_report.summary(file)}\n" for file in files if file.exists()]
    for file in sorted(folder.glob("gpu-*.md")):
        title = file.read_text().partition("\n")[0].removeprefix("# ")
        lines.append(f"- [On a GPU: {title}](results/{file.name}): bits, numbers, tables, times, whole commands.\n")
    pages = "Pages written by `benchmarks/kernels.py` and `benchmarks/gpu.py`."
    return f"\n## Kernels\n\n{pages}\n\n{''.join(lines)}" if lines else ""


def render_models(folder: Path) -> str:
    """Link the pages about whole models, which `model.py` and `nano.py` write."""
    lines = [f"- {model_report.summary(file)}\n" for file in (folder / "model-cpu.json",) if file.exists()]
    if (folder / "nano.json").exists():
        lines.append("- [nano-K2](results/nano.md): what rounding to INT8, INT4, INT3 and INT2 does to its answers.\n")
    return f"\n## Whole models\n\n{''.join(lines)}" if lines else ""


def render_accuracy(folder: Path) -> str:
    """Link the proofs of `k2quant eval`, which `gate.py`, `blame.py`, `neighbours.py` and two suites write."""
    pages = {
        "gate": "[The gate](results/gate.md): false accepts, power, and the rules of other tools in the same cells; "
        "then items that are asked several times, by seven rules.",
        "gate-sharper": "[A sharper gate at the same level](results/gate-sharper.md): what restricting the share of "
        "flips wins, enumerated; `PYTHONPATH=benchmarks python -m suites.gate.sharper`.",
        "blame": "[Blame](results/blame.md): how often planted damage is found, and anything named without it.",
        "equals": "[Fidelity of equal values](results/equals.md): exactly 0 decoded, the noise of the fused kernels, "
        "and what exactness costs; `PYTHONPATH=benchmarks python -m suites.blame.equals`.",
        "neighbours": "[Neighbours](results/neighbours.md): what other busy processes cost, by how threads wait.",
    }
    lines = [f"- {line}\n" for name, line in pages.items() if (folder / f"{name}.json").exists()]
    return f"\n## Accuracy\n\n{''.join(lines)}" if lines else ""


def render_calibration(folder: Path) -> str:
    """Link the pages of `python -m suites.calib.run` and `suites.solving.run`."""
    pages = {
        "calib-proof": "[What each method buys](results/calib-proof.md): true errors of every linear of nano-K2, its "
        "predictions and its answers, by `rtn`, `mse` and `imatrix` at INT4, INT3 and INT2.",
        "calib-peers": "[Beside its peers](results/calib-peers.md): llm-compressor's observers and llama.cpp's Q4_0 on "
        "the same matrices, errors and rates.",
        "calib-rates": "[How fast](results/calib-rates.md): the search in memory, whole conversions, the pass that "
        "collects.",
        "solving-proof": "[What GPTQ buys](results/solving-proof.md): the same linears, models and answers by `gptq`, "
        "through the gate, and beside QAT.",
        "solving-peers": "[GPTQ beside its peers](results/solving-peers.md): llm-compressor's GPTQ and AWQ and "
        "auto-round on the same models and documents: KL, errors, time, memory.",
        "solving-rates": "[How fast GPTQ is](results/solving-rates.md): beside llm-compressor's, on the same matrices.",
    }
    lines = [f"- {line}\n" for name, line in pages.items() if (folder / f"{name}.json").exists()]
    command = (
        "`PYTHONPATH=benchmarks python -m suites.calib.run --only proof`, or `peers`, or `rates`; of GPTQ, "
        "`suites.solving.run` with the same."
    )
    return f"\n## Calibration\n\n{command}\n\n{''.join(lines)}" if lines else ""


def render_fp4(folder: Path) -> str:
    """Link the pages of `python -m suites.fp4.run` and `suites.fp4.rates`."""
    pages = {
        "fp4-proof": "[What INT4 loses on its way](results/fp4-proof.md): K2.6's own weights and nano-K2 after QAT to "
        "NVFP4 and MXFP4, by `rtn`, `mse` and `imatrix`: errors of matrices, predictions, answers, the gate.",
        "fp4-peers": "[FP4 beside its peers](results/fp4-peers.md): whole commands against llm-compressor and "
        "ModelOpt's tensor code on the same bytes: time, memory, and which tensors are equal.",
        "fp4-rates": "[How fast FP4 is](results/fp4-rates.md): every conversion into and out of FP4 in memory, and "
        "products at one row beside INT4's.",
    }
    lines = [f"- {line}\n" for name, line in pages.items() if (folder / f"{name}.json").exists()]
    command = (
        "`PYTHONPATH=benchmarks python -m suites.fp4.run --only proof`, or `peers`; `python -m suites.fp4.rates`. "
        "`make fp4-oracles` asks ModelOpt for the bytes that tests hold."
    )
    return f"\n## FP4\n\n{command}\n\n{''.join(lines)}" if lines else ""


def render_machines(folder: Path) -> str:
    """Link the pages of `python -m suites.conversion.machines.report` and `suites.conversion.machines.overhead`."""
    pages = {
        "machines": "[The whole of K2 on many machines](results/machines.md): on paper, by a simulation: 1, 4 and 16 "
        "machines, lines of 10 and 25 Gbit/s, buckets, a shared file system, NVMe, and which of them rules.",
        "machines-overhead": "[What a cluster costs](results/machines-overhead.md): two nodes of one core beside two "
        "threads, on the same slice.",
    }
    lines = [f"- {line}\n" for name, line in pages.items() if (folder / f"{name}.json").exists()]
    command = (
        "`PYTHONPATH=benchmarks python -m suites.conversion.machines.report`, or `suites.conversion.machines.overhead "
        "--workdir /dev/shm/machines`."
    )
    return f"\n## Many machines\n\n{command}\n\n{''.join(lines)}" if lines else ""


SECTIONS = {
    "peers": render_peers,
    "cat": render_cat,
    "memory": render_memory,
    "help": render_start,
    "codecs": render_codecs,
    "projection": render_projection,
}


def render(results: dict[str, Any], source: str, page: Path, *, remarks: str) -> None:
    """Write the page, with what a person remarked on the bars; a section that was not measured is left out."""
    parts = [
        INTRO.format(source=source, machine=machine(results), command=results["command"]),
        render_verdicts(results),
        f"\n{remarks}" if remarks else "",
    ]
    parts += [section(results) for name, section in SECTIONS.items() if name in results]
    linkers = (render_kernels, render_models, render_accuracy, render_calibration, render_fp4, render_machines)
    parts += [linked(page.parent / "results") for linked in linkers]
    page.write_text("".join(parts))
