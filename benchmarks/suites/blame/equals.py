"""Two checkpoints of equal values: what fidelity says of them by each backend, and what exactness costs an expert.

Example:
    PYTHONPATH=benchmarks python -m suites.blame.equals
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from k2quant.conversion.convert import convert
from k2quant.eval import measure_fidelity
from k2quant.ground.release import INSTRUCT_CONFIG
from k2quant.kernels.ops import moe, prepare_int4
from k2quant.kernels.products import reference
from k2quant.model.generation import silence
from k2quant.model.modules import decoded_linear
from k2quant.nano import architecture, writing
from suites.common import machine

RESULT = machine.ROOT / "benchmarks" / "results" / "equals"
DTYPES = ("bfloat16", "float32")
EXPERTS, TOP = 4, 2
"""Experts of a layer that are timed, and how many each token goes to."""
TOKENS = (42, 170)
"""In a layer of K2's 384 experts, 21 and 85 tokens an expert are those of 1,024 and 4,096."""
RUNS = 3

PAGE = """# Fidelity of equal values, and what it costs

Written by `benchmarks/suites/blame/equals.py`; do not edit. `{command}`

{cpu}, {cores} cores, load {load:.1f}; {versions}; commit {commit}{dirty}.

A nano-K2 with random weights (seed 0) in FP8 and in INT4, each against its own exact conversion to BF16, on k2quant's
sample text, {tokens} tokens. `decoded` is the default of `eval fidelity` and `eval blame`; `auto` are the fused
kernels, as a model is run.

{drift}

One layer of INT4 experts of K2's size, {experts} of them, milliseconds an expert, least of {runs} runs.

{times}
"""


def pairs(place: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield the name of a format, a checkpoint in it, and what that means in BF16."""
    (place / "nano").mkdir()
    torch.manual_seed(0)
    writing.write(place / "nano", architecture.build(), {})
    for name in ("int4", "fp8"):
        own = convert(place / "nano", place / name, to=name).folder
        yield name, own, convert(own, place / f"{name}-bf16", to="bf16").folder


def drifts(tokens: int) -> Iterator[dict[str, Any]]:
    """Yield what fidelity finds between two that are equal."""
    with tempfile.TemporaryDirectory() as place:
        for name, own, plain in pairs(Path(place)):
            for dtype in DTYPES:
                for backend in ("auto", "decoded"):
                    found = measure_fidelity(own, plain, tokens=tokens, dtype=dtype, backend=backend)
                    row = {"format": name, "dtype": dtype, "backend": backend}
                    yield row | {"kl": found.kl.value, "kl_max": found.kl_max, "same_top": found.same_top.value}


def least(work: Callable[[], object]) -> float:
    """Return the milliseconds of the fastest run."""
    times = []
    for _ in range(RUNS + 1):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return 1000 * min(times[1:])


def costs() -> Iterator[dict[str, Any]]:
    """Yield the time of a layer of experts by each backend, and by BF16 weights that lie decoded in memory."""
    torch.manual_seed(0)
    width, inner = INSTRUCT_CONFIG["hidden_size"], INSTRUCT_CONFIG["moe_intermediate_size"]

    def weight(rows: int, columns: int) -> Any:
        packed = torch.randint(-(2**31), 2**31 - 1, (EXPERTS, rows, columns // 8), dtype=torch.int32)
        return prepare_int4(packed, (torch.rand(EXPERTS, rows, columns // 32) * 0.01).bfloat16())

    gate, up, down = weight(inner, width), weight(inner, width), weight(width, inner)
    for tokens in TOKENS:
        ids = torch.stack([torch.randperm(EXPERTS)[:TOP] for _ in range(tokens)])
        shares = torch.rand(tokens, TOP)
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(tokens, width).to(dtype)
            given = (x, gate, up, down, ids, shares)
            fused = least(lambda given=given: moe(*given))  # type: ignore[misc]
            exact = least(lambda given=given: reference.moe(*given, product=decoded_linear))  # type: ignore[misc]
            row = {"tokens": tokens * TOP / EXPERTS, "dtype": str(dtype).removeprefix("torch.")}
            yield row | {"auto": fused / EXPERTS, "decoded": exact / EXPERTS}


def table(rows: list[list[str]]) -> str:
    """Return Markdown; the first row is the head."""
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rest))


def _figures(row: dict[str, Any]) -> list[str]:
    return [f"{row['kl']:.2g}", f"{row['kl_max']:.2g}", f"{row['same_top']:.2%}"]


def main() -> None:
    """Measure, and write JSON and page."""
    silence()
    command, tokens = "PYTHONPATH=benchmarks python -m suites.blame.equals", 1024
    facts = machine.facts(command, "k2quant", "kernels", "eval", "benchmarks")
    found = facts | {"tokens": tokens, "drift": list(drifts(tokens)), "times": list(costs())}
    RESULT.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    drift = [["format", "activations", "backend", "KL, nats a token", "largest", "same likeliest token"]]
    drift += [[one["format"], one["dtype"], one["backend"], *_figures(one)] for one in found["drift"]]
    times = [["tokens an expert", "activations", "auto", "decoded"]]
    times += [
        [f"{row['tokens']:.0f}", row["dtype"], f"{row['auto']:.0f}", f"{row['decoded']:.0f}"] for row in found["times"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    dirty = ", changed since" if found["dirty"] else ""
    page = found | {"versions": versions, "dirty": dirty, "drift": table(drift), "times": table(times)}
    RESULT.with_suffix(".md").write_text(PAGE.format(**page, experts=EXPERTS, runs=RUNS))


if __name__ == "__main__":
    main()
