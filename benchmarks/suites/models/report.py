"""Write the page of the models' results from their JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from suites.common.measure import median
from suites.models.run import OURS, PEER, PEER_LOOP
from suites.models.sources import FORMATS
from suites.products.report import table

Record = dict[str, Any]
CONTESTANTS = (OURS, PEER, PEER_LOOP)
TITLES = {"nano": "nano-K2", "layer": "One layer of K2 in full size"}
INTRO = """# Whole models on {cpu}, {threads} threads

Written by `benchmarks/model.py` from `{source}`; do not edit. Lost comparisons stand here like won ones.

{machine}

Repeat with:

    {command}

Draw this page anew with `{command} --render`.

k2quant keeps FP8 and INT4 packed and multiplies straight from them. transformers (`from_pretrained`, its config.json
saying `deepseek_v3`, for it does not know `kimi_k2`) gets the same bytes and dequantises them to BF16 as it loads:
`FineGrainedFP8Config(dequantize=True)`, `CompressedTensorsConfig(dequantize=True)`. {experts}
Activations are BF16 everywhere.

Every run is a fresh process, its checkpoint in the page cache; the tools take turns, the other way round every second
time. Numbers are medians, with the range in brackets. Runs of each: {repetitions}; for rates up to {samples} samples in
each, after one that is not counted. Decoding is greedy, by `generate`, with a KV cache, after a prompt of
{prompt} tokens; the first token is not timed.

"own" is what a process holds for itself (RssAnon + RssShmem), "mapped" what it maps from files (RssFile), both after
loading, its libraries included: {before} MiB own before that. "peak" is the most of both together (VmHWM), until it is
loaded and afterwards; "peak own" is the most of its own over the whole process, seen 10 ms apart. "weights" is what
parameters and buffers take. "logits" is ||y - exact|| / ||exact|| over the prompt; exact is what transformers gives for
the checkpoint dequantised to BF16 by `k2quant convert`, looping over the experts. Where rounding sends a token to
another expert, that token differs by tens of percent: hence the median of the tokens, too.
"""


def write(file: Path) -> None:
    """Write the page beside a file of results; remarks of a person lie there too, as `<name>-remarks.md`."""
    results = json.loads(file.read_text())
    remarks = file.with_name(f"{file.stem}-remarks.md")
    text = remarks.read_text() if remarks.exists() else ""
    file.with_suffix(".md").write_text(page(results, file, remarks=text))


def summary(file: Path) -> str:
    """Return a line about a file of results, for the page of all benchmarks."""
    results = json.loads(file.read_text())
    found = {form: ratio(results, "layer", form, "decode_1") for form in FORMATS}
    said = [f"{form.upper()} {value:.2f}x" for form, value in found.items() if value]
    cpu, over = results["machine"]["cpu"], ", ".join(said)
    return f"[Whole models on {cpu}](results/{file.stem}.md): tokens/s with K2's layer over transformers': {over}."


def page(results: Record, file: Path, *, remarks: str = "") -> str:
    """Return the page."""
    folder = "benchmarks/results/" if file.parent.name == "results" else ""
    runs = [run for record in results["cells"].values() for run in record["runs"]]
    workload = next(iter(results["models"].values()))["workload"]
    intro = INTRO.format(
        cpu=results["machine"]["cpu"],
        threads=next(run["threads"] for run in runs if "threads" in run),
        source=folder + file.name,
        machine=_machine(results),
        command=results["command"],
        experts=_experts(runs),
        repetitions=results["repetitions"],
        samples=workload["samples"],
        prompt=workload["prompt"],
        before=_range([_mib(run["before"]["own"]) for run in runs if "before" in run]),
    )
    sections = (_section(results, name) for name in results["models"])
    return "".join([intro, f"\n{remarks}" if remarks else "", *sections, _failures(results)])


def ratio(results: Record, model: str, form: str, quantity: str) -> float | None:
    """Return our median over the best of transformers', or nothing where one of both was not measured."""
    found = {name: _samples(results["cells"].get(f"{model}/{form}/{name}"), quantity) for name in CONTESTANTS}
    theirs = [median(samples) for name, samples in found.items() if samples and name != OURS]
    return median(found[OURS]) / max(theirs) if found[OURS] and theirs else None


def _samples(record: Record | None, quantity: str) -> list[float]:
    """Return all samples of a rate, of all processes."""
    return [rate for run in (record or {"runs": []})["runs"] for rate in run.get(quantity, [])]


def _machine(results: Record) -> str:
    box = results["machine"]
    state = " with uncommitted changes" if results["dirty"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        f"{results['date']}, commit `{results['commit']}`{state}. {box['cpu']}, {box['cores']} cores, "
        f"{box['memory'] / 2**30:.0f} GiB memory, {box['disk']}; load before the run {box['load']:.1f}.\n{versions}."
    )


def _experts(runs: Sequence[Record]) -> str:
    """Say how transformers runs experts."""
    found = {run["default_experts"] for run in runs if "default_experts" in run}
    default = f"`{found.pop()}`" if len(found) == 1 else "its own choice"
    return (
        f"Its experts\nrun by its default, {default}, and then by the loop that it calls `eager`, in the same process."
    )


def _section(results: Record, name: str) -> str:
    model = results["models"][name]
    shape, workload = model["shape"], model["workload"]
    sizes = ", ".join(f"{form.upper()} {nbytes / 1e6:,.0f} MB" for form, nbytes in model["bytes"].items())
    text = (
        f"{shape['num_hidden_layers']} layers, {shape['first_k_dense_replace']} of them dense, hidden size "
        f"{shape['hidden_size']}, {shape['num_attention_heads']} heads, {shape['n_routed_experts']} routed experts of "
        f"{shape['moe_intermediate_size']}, {shape['num_experts_per_tok']} for each token, "
        f"{shape['n_shared_experts']} shared; {shape['vocab_size']} tokens. On disk: {sizes}. Prefill of "
        f"{workload['prefill']} tokens, {workload['new_tokens']} new ones."
    )
    parts = [f"\n## {TITLES[name]}\n\n{text}\n", _speed(results, name, workload), _memory(results, name)]
    return "".join(parts) + _against(results, name, workload)


def _rows(results: Record, name: str) -> Iterator[tuple[str, str, list[Record]]]:
    """Yield format, contestant and runs of every cell of a model."""
    for form in FORMATS:
        for contestant in CONTESTANTS:
            record = results["cells"].get(f"{name}/{form}/{contestant}")
            if record:
                yield form.upper(), contestant, record["runs"]


def _speed(results: Record, name: str, workload: Record) -> str:
    batches = workload["batches"]
    head = ["format", "", "load s", f"prefill {workload['prefill']}, tokens/s"]
    head += [*(f"decode, batch {rows}, tokens/s" for rows in batches), "logits", "logits, median token"]
    rows = []
    for form, contestant, runs in _rows(results, name):
        if "failed" in runs[0]:
            rows.append([form, contestant, "cannot load", *["-"] * (len(batches) + 3)])
            continue
        rates = [_range([rate for run in runs for rate in run[key]]) for key in _rates(workload)]
        load = _range([run["load_s"] for run in runs])
        logits = (f"{median([run[key] for run in runs]):.2%}" for key in ("difference", "token_difference"))
        rows.append([form, contestant, load, *rates, *logits])
    return "\n" + table(head, rows)


def _rates(workload: Record) -> list[str]:
    return ["prefill", *(f"decode_{rows}" for rows in workload["batches"])]


def _memory(results: Record, name: str) -> str:
    head = ["format", "", "weights MiB", "own MiB", "mapped MiB", "peak MiB, loading", "peak MiB, running"]
    rows = []
    for form, contestant, runs in _rows(results, name):
        if "failed" in runs[0]:
            continue
        columns = [
            [run["weight_bytes"] for run in runs],
            [run["loaded"]["own"] for run in runs],
            [run["loaded"]["mapped"] for run in runs],
            [run["loaded"]["peak"] for run in runs],
            [run["ran"]["peak"] for run in runs],
            [run["peak_own"] for run in runs],
        ]
        rows.append([form, contestant, *(_range([_mib(size) for size in sizes]) for sizes in columns)])
    return "\n" + table([*head, "peak own MiB"], rows)


def _against(results: Record, name: str, workload: Record) -> str:
    """Return our rates over the better of transformers' two, format by format."""
    rows = []
    for form in FORMATS:
        ratios = [ratio(results, name, form, key) for key in _rates(workload)]
        rows.append([form.upper(), *(f"{value:.2f}x" if value else "-" for value in ratios)])
    head = ["k2quant over the better of transformers'", "prefill"]
    return "\n" + table([*head, *(f"decode, batch {count}" for count in workload["batches"])], rows)


def _failures(results: Record) -> str:
    """Return what did not load, and why."""
    lines = []
    for record in results["cells"].values():
        run = record["runs"][0]
        if "failed" in run and record["contestant"] != PEER_LOOP:  # which fails in the same process
            said = "".join(f"\n  `{text}`" for text in run.get("remarks", []))
            lines.append(
                f"- {record['model']}, {record['format'].upper()}, {record['contestant']}: `{run['failed']}`{said}\n"
            )
    return "\n## What failed\n\n" + "".join(lines) if lines else ""


def _mib(size: float) -> float:
    return size / 2**20


def _range(values: Sequence[float]) -> str:
    """Return a median, with the range in brackets where there is one."""
    low, high = min(values), max(values)
    spread = f" ({_number(low)}-{_number(high)})" if _number(low) != _number(high) else ""
    return _number(median(values)) + spread


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
