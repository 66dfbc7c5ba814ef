r"""Plant damage of known place into nano-K2, have `k2quant eval blame` look for it, and count how often it is right.

Example:
    python benchmarks/blame.py nano-k2

It trains a nano-K2 where there is none yet. Exits 3 when a bar is missed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch

from k2quant.conversion.convert import convert
from k2quant.eval.drift import blame
from k2quant.eval.drift.findings import Blame
from k2quant.ground import names
from k2quant.model import LayerHooks, stream_forward
from k2quant.model.generation import silence
from k2quant.nano import tasks
from k2quant.nano.run import run
from k2quant.nano.scoring import Accuracy
from suites.blame.plants import OTHERS, PLANTS, Planted, Tensors
from suites.common import machine

LETTERS = 16
"""Of question and answer together: with [BOS], each item is a chunk of its own."""
ITEMS = 256
SETTINGS = {
    "BF16": "planted in BF16, held against BF16: only the planted weights differ",
    "INT4": "planted in a healthy INT4, held against that INT4: only the planted weights differ",
    "INT4 as BF16": "planted in a healthy INT4, stored as BF16, held against that INT4: every matrix differs",
}
FIRST, FALSE = 0.9, 0.05
"""Bars: runs that name the planted class first, at least; runs without a plant that name anything, at most."""

PAGE = """# eval blame: is the planted damage found?

Written by `benchmarks/blame.py`; do not edit. `{command}`

{cpu}, {cores} cores, load {load:.1f}; {versions}; commit {commit}{dirty}.

Damage of known place is planted into nano-K2, in a layer and an expert drawn by a seed (experts that the text visits at
least half as often as their fair share), and `k2quant eval blame` looks for it. Text: {items} held-out items, others
for every seed, of {letters} characters each, which four of the six families have.

{settings}

In the first two, comparing bytes leaves one tensor class, and the search has only to find the weights in it and how
much they explain. The third is the test of the search: about 120 weights are candidates.

## Bars

{bars}

## Planted damage

"class first": the planted tensor class has the largest share of all that are named. "layer", "weights": the first
suspect lies in the planted layer, and is the planted weights or some of them. "no damage": the damage could not be told
from the noise of rounding, so that nothing was named; these count as misses. Shares with Wilson's 95% interval, in
percent. KL in nats a token, median.

{tables}

## Nothing planted

{nulls}

"rounded at random": what comes out of every layer is moved by up to a last bit of BF16, otherwise in every pass, as
batches of other sizes and other orders of sums may do.
"""


def write_text(folder: Path, seed: int) -> Path:
    """Write the items of a seed, end to end."""
    items = [item for item in tasks.exam(400, seed=seed) if len(item.question + item.answer) == LETTERS]
    Random(seed).shuffle(items)  # noqa: S311  no secret depends on it
    path = folder / f"text-{seed}.txt"
    path.write_text("".join(item.question + item.answer for item in items[:ITEMS]))
    return path


def look(base: Path, candidate: Path, text: Path, dtype: str) -> tuple[Blame, float]:
    """Return what is blamed, and the seconds that it took."""
    begun = time.perf_counter()
    found = blame.find_blame(base, candidate, text=text, context=LETTERS + 1, tokens=ITEMS * LETTERS, dtype=dtype)
    gc.collect()
    return found, time.perf_counter() - begun


class _Visits(LayerHooks):
    """Counts how often each expert of each layer is chosen."""

    def __init__(self) -> None:
        self.counts: dict[int, torch.Tensor] = {}
        self._handle: Any = None

    def before(self, layer: int, module: Any) -> None:
        """Listen to the experts."""
        if hasattr(module.mlp, "experts"):
            count = functools.partial(self._count, layer, module.mlp.experts.num_experts)
            self._handle = module.mlp.experts.register_forward_pre_hook(count)

    def _count(self, layer: int, experts: int, module: Any, inputs: Any) -> None:
        del module
        chosen = torch.bincount(inputs[1].flatten(), minlength=experts)
        self.counts[layer] = self.counts.get(layer, 0) + chosen

    def after(self, layer: int, module: Any) -> bool:
        """Stop listening."""
        del layer, module
        if self._handle is not None:
            self._handle.remove()
        return False


def visited(model: Path, text: Path) -> dict[int, list[int]]:
    """Return the experts of each layer that get at least half of their fair share."""
    from k2quant.model.generation import load_tokenizer
    from k2quant.model.passes.texts import read_text

    hooks = _Visits()
    read = read_text(text, load_tokenizer(model), context=LETTERS + 1, limit_tokens=ITEMS * LETTERS)
    list(stream_forward(model, read.batches, hooks))
    return {
        layer: torch.nonzero(counts >= counts.sum() / len(counts) / 2).flatten().tolist()
        for layer, counts in hooks.counts.items()
    }


def named(found: Blame) -> dict[str, Any]:
    """Return what was named, with shares and intervals, for machines."""
    content = found.as_dict()
    return {key: content[key] for key in ("classes", "suspects", "together")}


def judged(found: Blame, planted: Planted) -> dict[str, Any]:
    """Say what was hit."""
    classes = [suspect.name for suspect in found.classes]
    first = found.suspects[0].name if found.suspects else ""
    layer = names.layer(first) if first.startswith("model.") else next(iter(re.findall(r"layer (\d+)$", first)), None)
    expert = names.expert(planted.weights[0])
    groups = {f"{planted.kind} of layer {planted.layer}"} if len(planted.weights) > 3 or expert is None else set()
    groups |= (
        {f"expert {expert} of layer {planted.layer}"} if len(planted.weights) == 3 and expert is not None else set()
    )
    listed = first in planted.weights or _is_list(first, planted)
    return {
        "class_first": classes[:1] == [planted.kind],
        "class_top3": planted.kind in classes[:3],
        "layer": layer is not None and int(layer) == planted.layer and classes[:1] == [planted.kind],
        "weights": first in groups or listed,
        "no_damage": found.passes == 3,  # baseline, noise, damage: the search did not begin
    }


def _is_list(title: str, planted: Planted) -> bool:
    """Tell whether a title lists some of the planted weights by their last names."""
    listed, _, where = title.partition(" of ")
    last = {weight.rpartition(".")[2] for weight in planted.weights}
    return where.endswith(f"layer {planted.layer}") and set(listed.split(", ")) <= last


def drawn(random: Random, experts: dict[int, list[int]], layer: int) -> int:
    """Draw an expert of a layer."""
    return random.choice(experts[layer])


def planted_runs(base: dict[str, Path], place: Path, seeds: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield each run over plants, settings and seeds."""
    texts = {seed: write_text(place, seed) for seed in range(max(seeds.values()))}
    experts = {seed: visited(base["BF16"], text) for seed, text in texts.items()}
    for plant, setting, dtype in ((p, s, d) for p in PLANTS for s in SETTINGS for d in seeds):
        for seed in range(seeds[dtype]):
            random = Random(f"{plant} {seed}")  # noqa: S311  the same
            source = base["BF16" if setting == "BF16" else "INT4"]
            tensors = Tensors(source)
            planted = PLANTS[plant](tensors, random, functools.partial(drawn, random, experts[seed]))
            if setting == "INT4 as BF16":
                tensors.expand()
            shutil.rmtree(place / "candidate", ignore_errors=True)
            found, seconds = look(source, tensors.write(place / "candidate"), texts[seed], dtype)
            row = {"plant": plant, "setting": setting, "dtype": dtype, "seed": seed, "planted": planted._asdict()}
            row |= judged(found, planted) | {"kl": found.damage.value, "noise": found.noise.value}
            row |= {"passes": found.passes, "seconds": seconds, "found": named(found)}
            print(f"{plant}, {setting}, {dtype}, {seed}: {'hit' if row['class_first'] else 'MISS'}", flush=True)
            yield row


class _RandomlyRounded(LayerHooks):
    """Moves what comes out of each layer by up to a last bit of BF16, otherwise for every seed."""

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._handle: Any = None

    def before(self, layer: int, module: Any) -> None:
        """Begin."""
        del layer
        self._handle = module.register_forward_hook(self._move)

    def _move(self, module: Any, inputs: Any, outputs: torch.Tensor) -> torch.Tensor:
        del module, inputs
        relative = (torch.rand(outputs.shape, generator=self._random) * 2 - 1) * torch.finfo(torch.bfloat16).eps
        return (outputs.float() * (1 + relative)).to(outputs.dtype)

    def after(self, layer: int, module: Any) -> bool:
        """End."""
        del layer, module
        self._handle.remove()
        return False


def unsteady(seed: int) -> Callable[..., Any]:
    """Return a pass like `stream_forward` that rounds otherwise each time it is called without hooks."""
    calls = [0]

    def forward(source: Any, batches: Any, hooks: Any = None, **options: Any) -> Any:
        calls[0] += 1
        return stream_forward(source, batches, hooks or _RandomlyRounded(1000 * seed + calls[0]), **options)

    return forward


def null_runs(base: dict[str, Path], place: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yield runs in which nothing was planted."""
    written: dict[str, Path] = {}
    for name, source, change in (
        ("in other shards", "BF16", Tensors.shard_anew),
        ("stored as F32", "BF16", Tensors.widen),
        ("INT4 stored as BF16", "INT4", Tensors.expand),
    ):
        tensors = Tensors(base[source])
        change(tensors)
        written[name] = tensors.write(place / name.replace(" ", "-"))
    cases = [
        ("the same in other shards", "BF16", "in other shards", "bfloat16", 2),
        ("the same stored as F32", "BF16", "stored as F32", "bfloat16", count),
        ("the same stored as F32, rounded at random", "BF16", "stored as F32", "bfloat16", 2 * count),
        ("the same, rounded at random, float32 activations", "BF16", "stored as F32", "float32", 2 * count),
        ("INT4 stored as BF16", "INT4", "INT4 stored as BF16", "bfloat16", 2 * count),
        ("INT4 stored as BF16, float32 activations", "INT4", "INT4 stored as BF16", "float32", count),
    ]
    for name, ours, theirs, dtype, times in cases:
        for seed in range(times):
            text = write_text(place, seed)
            forward = unsteady(seed) if "random" in name else stream_forward
            with mock.patch("k2quant.eval.drift.measuring.stream_forward", forward):
                found, seconds = look(base[ours], written[theirs], text, dtype)
            anything = bool(found.classes or found.suspects)
            print(f"{name}, {seed}: {'NAMED' if anything else 'none'}", flush=True)
            yield {
                "case": name,
                "seed": seed,
                "named": anything,
                "kl": found.damage.value,
                "noise": found.noise.value,
                "passes": found.passes,
                "seconds": seconds,
                "found": named(found),
            }


def share(rows: list[dict[str, Any]], key: str) -> str:
    """Return how many of the rows are so, with Wilson's interval."""
    found = Accuracy(right=sum(row[key] for row in rows), count=len(rows))
    low, high = found.interval
    return f"{found.right}/{found.count} = {100 * found.share:.0f} ({100 * low:.0f}-{100 * high:.0f})"


def middle(rows: list[dict[str, Any]], key: str) -> float:
    """Return the median."""
    ordered = sorted(row[key] for row in rows)
    return float(ordered[len(ordered) // 2])


def table(rows: list[dict[str, Any]]) -> str:
    """Return the planted runs of one dtype as a Markdown table: each plant, each setting, all."""
    groups = [(name, [row for row in rows if row["plant"] == name]) for name in PLANTS]
    groups += [(f"all, {name}", [row for row in rows if row["setting"] == name]) for name in SETTINGS]
    groups.append(("**all**", rows))
    head = ["planted", "KL", "class first", "in top 3", "layer", "weights", "no damage", "passes", "s"]
    lines = [head, ["---"] * len(head)]
    for name, part in groups:
        hits = [share(part, key) for key in ("class_first", "class_top3", "layer", "weights")]
        none = str(sum(row["no_damage"] for row in part))
        costs = [f"{middle(part, 'passes'):.0f}", f"{middle(part, 'seconds'):.1f}"]
        lines.append([name, f"{middle(part, 'kl'):.1e}", *hits, none, *costs])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def null_table(rows: list[dict[str, Any]]) -> str:
    """Return the runs without a plant as a Markdown table."""
    lines = [["candidate", "KL", "noise", "named anything", "passes"], ["---"] * 5]
    for case in dict.fromkeys(row["case"] for row in rows):
        part = [row for row in rows if row["case"] == case]
        figures = [f"{middle(part, key):.1e}" for key in ("kl", "noise")]
        lines.append([case, *figures, share(part, "named"), f"{middle(part, 'passes'):.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bars(rows: list[dict[str, Any]], nulls: list[dict[str, Any]]) -> list[tuple[str, str, str, bool]]:
    """Return each bar: what, wanted, found, met."""
    sharp = [row for row in rows if row["dtype"] == "float32"]
    hard = [row for row in sharp if row["setting"] == "INT4 as BF16"]
    first, behind = (sum(row["class_first"] for row in part) / len(part) for part in (sharp, hard))
    false = sum(row["named"] for row in nulls) / len(nulls)
    return [
        (
            "planted class named first, float32 activations",
            f">= {FIRST:.0%}",
            share(sharp, "class_first"),
            first >= FIRST,
        ),
        (
            "the same where every matrix differs",
            f">= {FIRST:.0%}",
            share(hard, "class_first"),
            behind >= FIRST,
        ),
        ("named anything although nothing was planted", f"<= {FALSE:.0%}", share(nulls, "named"), false <= FALSE),
    ]


def page(facts: dict[str, Any], rows: list[dict[str, Any]], nulls: list[dict[str, Any]]) -> str:
    """Return the page."""
    lines = [("bar", "wanted", "found", ""), ("---",) * 4]
    lines += [(what, wanted, found, "met" if met else "**missed**") for what, wanted, found, met in bars(rows, nulls)]
    dtypes = {row["dtype"]: [other for other in rows if other["dtype"] == row["dtype"]] for row in rows}
    notes = {"float32": "activations in float32, the default", "bfloat16": "activations in bfloat16; no bar"}
    return PAGE.format(
        **facts
        | {"versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items())}
        | {"dirty": ", changed since" if facts["dirty"] else ""},
        items=ITEMS,
        letters=LETTERS,
        settings="\n".join(f"- {name}: {what}." for name, what in SETTINGS.items()),
        bars="\n".join(f"| {' | '.join(line)} |" for line in lines),
        tables="\n\n".join(f"{len(part)} runs, {notes[dtype]}:\n\n{table(part)}" for dtype, part in dtypes.items()),
        nulls=null_table(nulls),
    )


def prepared(folder: Path, place: Path) -> dict[str, Path]:
    """Return nano-K2 in BF16, trained where there is none, and in a healthy INT4."""
    if not (folder / "config.json").exists():
        run(folder)
    int4 = convert(folder, place / "int4", to="int4", scope="projections").folder
    for name in OTHERS:
        shutil.copy(folder / name, int4 / name)
    return {"BF16": folder, "INT4": int4}


def main() -> None:
    """Measure, write the results, and hold them against the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where a nano-K2 is, or shall be")
    parser.add_argument("--seeds", type=int, default=5, help="of each plant and setting; a third as many in bfloat16")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/blame.json"), help="where results go")
    parser.add_argument("--render", action="store_true", help="only draw the page anew, from the results")
    given = parser.parse_args()
    if not given.render:
        measure(given)
    results = json.loads(given.json.read_text())
    rows, nulls = results.pop("rows"), results.pop("nulls")
    text = page(results, rows, nulls)
    given.json.with_suffix(".md").write_text(text)
    print(text)
    if not all(met for *_, met in bars(rows, nulls)):
        raise SystemExit(3)


def measure(given: argparse.Namespace) -> None:
    """Plant, look, and write the results for machines."""
    silence()
    torch.set_num_threads(1)  # the model is so small that a second thread only waits
    facts = machine.facts(
        f"python benchmarks/blame.py {given.folder.name} --seeds {given.seeds}",
        "k2quant",
        "kernels",
        "eval",
    )
    with tempfile.TemporaryDirectory(prefix="k2quant-") as folder:
        base = prepared(given.folder, Path(folder))
        nulls = list(null_runs(base, Path(folder), given.seeds))
        seeds = {"float32": given.seeds, "bfloat16": (given.seeds + 2) // 3}
        rows = list(planted_runs(base, Path(folder), seeds))
    given.json.write_text(json.dumps(facts | {"rows": rows, "nulls": nulls}, indent=1) + "\n")


if __name__ == "__main__":
    main()
