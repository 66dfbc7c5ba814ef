"""How fast FP4 is in memory: every conversion into and out of it, and products at one row of x beside INT4's.

Example:
    PYTHONPATH=benchmarks python -m suites.fp4.rates --threads 2

Writes fp4-rates.json and fp4-rates.md. Exits 3 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from k2quant.kernels import ops
from k2quant.kernels.codecs import cpu
from k2quant.kernels.codecs.fp4 import closed_form, tensor_scale
from k2quant.kernels.codecs.values import U8, U16, bf16_to_float, float_to_bf16
from k2quant.kernels.products.packed.weight import PackedWeight
from suites.calib.report import BARS, Show, facts, table
from suites.common import machine

CODE = ("k2quant", "kernels", "benchmarks/suites/fp4/rates.py")
SHAPE = (8192, 7168)
"""Of what is converted: 58.7 M weights, four matrices of an expert, more than caches hold."""
PANEL = 512
BLOCK = (128, 128)
LEAST = {
    "FP8 -> NVFP4": 1.0,
    "BF16 -> NVFP4": 1.0,
    "INT4 -> NVFP4, mse": 0.5,
    "NVFP4 -> BF16": 3.0,
    "MXFP4 -> BF16": 3.0,
    "MXFP4 -> NVFP4": 3.0,
}
"""The bars: 10^9 weights a second."""
MOST_TIMES = 1.3
"""The bar of products: times INT4's time at one row of x."""
PRODUCTS = ((2048, 7168), (7168, 2048))
COPIES = 12
"""Of each matrix that is multiplied: together more than caches hold."""

PAGE = """# FP4 in memory: rates of conversions and products

Written by `benchmarks/suites/fp4/rates.py`; do not edit.

{facts}

## Bars

{bars}

## Conversions

{rows} x {columns} Gaussian weights in panels of {panel} rows, {threads} threads; {runs} runs, median with least and
most, in 10^9 weights a second; beside it what one core does by its own clock, while the others rest.
INT4 and FP8 go through a panel of BF16; MXFP4 -> NVFP4 does not. `mse` searches each block's scale. A survey is what a
tensor scale needs before the first panel is written: it comes on top of a conversion to NVFP4.

{conversions}

## Products

x of one row times W, BF16, {threads} threads; {copies} matrices of each kind by turns, so that they come from memory.

{products}
"""

Job = Callable[[slice], object]


def conversions(rows: int, columns: int) -> dict[str, Job]:
    """Return each conversion as a function of a range of rows, its inputs made and its outputs allocated."""
    weights = _gaussian(rows, columns)
    tensor = tensor_scale(cpu.nvfp4.amax(weights), divides=False)
    codes8, scale8 = np.empty((rows, columns), np.uint8), np.empty((rows // 128, columns // 128), np.float32)
    cpu.fp8.encode(weights, BLOCK, codes8, scale8)
    packed, scale4 = np.empty((rows, columns // 8), np.int32), np.empty((rows, columns // 32), np.uint16)
    cpu.int4.encode(weights, "moonshot", packed, scale4)
    wide4 = bf16_to_float(scale4)
    codes_nv, scale_nv = _room(rows, columns, 16)
    cpu.nvfp4.encode(weights, tensor, codes_nv, scale_nv)
    codes_mx, scale_mx = _room(rows, columns, 32)
    cpu.mxfp4.encode(weights, codes_mx, scale_mx)
    form = closed_form(*(cpu.mxfp4.exponents(codes_mx, scale_mx) or (0, 0)), divides=False)
    if form is None:
        raise SystemExit("Gaussian weights have no closed form")
    out, (out_codes, out16), (_, out32) = np.zeros_like(weights), _room(rows, columns, 16), _room(rows, columns, 32)
    out_packed, out_scale4 = np.zeros_like(packed), np.zeros_like(scale4)
    out_codes8, out_scale8 = np.zeros_like(codes8), np.zeros_like(scale8)
    own = threading.local()

    def of(r: slice) -> slice:
        return slice(r.start // 128, r.stop // 128)

    def pivot(decode: Callable[[slice, U16], object], r: slice) -> U16:
        if not hasattr(own, "panel") or len(own.panel) < r.stop - r.start:
            own.panel = np.empty((r.stop - r.start, columns), np.uint16)
        values: U16 = own.panel[: r.stop - r.start]
        decode(r, values)
        return values

    sources: dict[str, Callable[[slice], U16]] = {
        "BF16": lambda r: weights[r],
        "FP8": partial(pivot, lambda r, to: cpu.fp8.decode(codes8[r], scale8[of(r)], BLOCK, to)),
        "INT4": partial(pivot, lambda r, to: cpu.int4.decode(packed[r], wide4[r], 32, to)),
        "NVFP4": partial(pivot, lambda r, to: cpu.nvfp4.decode(codes_nv[r], scale_nv[r], tensor, to)),
        "MXFP4": partial(pivot, lambda r, to: cpu.mxfp4.decode(codes_mx[r], scale_mx[r], to)),
    }

    def nvfp4(source: str, r: slice) -> None:
        cpu.nvfp4.encode(sources[source](r), tensor, out_codes[r], out16[r])

    def nvfp4_searched(source: str, r: slice) -> None:
        values = sources[source](r)
        cpu.nvfp4.search(values, None, tensor, out16[r])
        cpu.nvfp4.store(values, out16[r], tensor, out_codes[r])

    def mxfp4(source: str, r: slice) -> None:
        cpu.mxfp4.encode(sources[source](r), out_codes[r], out32[r])

    def mxfp4_searched(source: str, r: slice) -> None:
        values = sources[source](r)
        cpu.mxfp4.search(values, None, out32[r])
        cpu.mxfp4.store(values, out32[r], out_codes[r])

    jobs: dict[str, Job] = {}
    for name in ("FP8", "BF16", "INT4"):
        jobs[f"{name} -> NVFP4"] = partial(nvfp4, name)
        jobs[f"{name} -> NVFP4, mse"] = partial(nvfp4_searched, name)
        jobs[f"{name} -> MXFP4"] = partial(mxfp4, name)
        jobs[f"{name} -> MXFP4, mse"] = partial(mxfp4_searched, name)
    return jobs | {
        "NVFP4 -> BF16": lambda r: cpu.nvfp4.decode(codes_nv[r], scale_nv[r], tensor, out[r]),
        "MXFP4 -> BF16": lambda r: cpu.mxfp4.decode(codes_mx[r], scale_mx[r], out[r]),
        "MXFP4 -> NVFP4": lambda r: cpu.nvfp4.restate(
            codes_mx[r], scale_mx[r], form.exponent, form.tensor, out_codes[r], out16[r]
        ),
        "NVFP4 -> FP8": lambda r: cpu.fp8.encode(sources["NVFP4"](r), BLOCK, out_codes8[r], out_scale8[of(r)]),
        "NVFP4 -> INT4": lambda r: cpu.int4.encode(sources["NVFP4"](r), "moonshot", out_packed[r], out_scale4[r]),
        "MXFP4 -> INT4": lambda r: cpu.int4.encode(sources["MXFP4"](r), "moonshot", out_packed[r], out_scale4[r]),
        "survey of BF16": lambda r: cpu.nvfp4.amax(sources["BF16"](r)),
        "survey of FP8": lambda r: cpu.nvfp4.amax(sources["FP8"](r)),
        "survey of INT4": lambda r: cpu.nvfp4.amax(sources["INT4"](r)),
        "survey of MXFP4": lambda r: cpu.mxfp4.exponents(codes_mx[r], scale_mx[r]),
    }


def _gaussian(rows: int, columns: int) -> U16:
    generator = np.random.default_rng(0)
    made = np.empty((rows, columns), np.uint16)
    for top in range(0, rows, PANEL):
        panel = generator.standard_normal(made[top : top + PANEL].shape, np.float32)
        made[top : top + PANEL] = float_to_bf16(panel * np.float32(0.02))
    return made


def _room(rows: int, columns: int, block: int) -> tuple[U8, U8]:
    return np.zeros((rows, columns // 2), np.uint8), np.zeros((rows, columns // block), np.uint8)


def rates(jobs: Mapping[str, Job], rows: int, columns: int, *, threads: int, runs: int) -> Iterator[dict[str, Any]]:
    """Yield each conversion's rate, in 10^9 weights a second."""
    panels = [slice(top, min(top + PANEL, rows)) for top in range(0, rows, PANEL)]
    with ThreadPoolExecutor(threads) as pool:
        for name, job in jobs.items():
            job(panels[0])  # compiles
            list(pool.map(job, panels))
            found, alone = [], []
            for _ in range(runs):
                start = time.perf_counter()
                list(pool.map(job, panels))
                found.append(rows * columns / (time.perf_counter() - start) / 1e9)
                start = time.thread_time()
                job(panels[0])
                alone.append((panels[0].stop - panels[0].start) * columns / (time.thread_time() - start) / 1e9)
            yield {
                "what": name,
                "median": statistics.median(found),
                "least": min(found),
                "most": max(found),
                "core": statistics.median(alone),
            }


def products(
    shapes: Sequence[tuple[int, int]], *, threads: int, runs: int, copies: int = COPIES
) -> Iterator[dict[str, Any]]:
    """Yield the time of a product at one row of x, for each shape and format, and how it compares with INT4's."""
    torch.set_num_threads(threads)
    for rows, columns in shapes:
        x = torch.randn(1, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
        kinds: dict[str, list[PackedWeight]] = {"INT4": [], "NVFP4": [], "MXFP4": []}
        for seed in range(copies):
            generator = torch.Generator().manual_seed(seed)
            weight = (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()
            for name, made in packed(weight).items():
                kinds[name].append(made)
        times = _in_turns(x, kinds, runs)
        usual = statistics.median(times["INT4"])
        for name, found in times.items():
            yield {
                "shape": f"{rows} x {columns}",
                "what": name,
                "median": statistics.median(found),
                "least": min(found),
                "most": max(found),
                "times": statistics.median(found) / usual,
            }


def packed(weight: Tensor) -> dict[str, PackedWeight]:
    """Return BF16 weights in each format."""
    tensor = ops.nvfp4_tensor_scale(weight.abs().amax().float(), divides=False)
    return {
        "INT4": ops.prepare_int4(*ops.bf16_to_int4(weight, "moonshot")),
        "NVFP4": ops.prepare_nvfp4(*ops.bf16_to_nvfp4(weight, tensor, divides=False), tensor, divides=False),
        "MXFP4": ops.prepare_mxfp4(*ops.bf16_to_mxfp4(weight)),
    }


def _in_turns(x: Tensor, kinds: Mapping[str, Sequence[PackedWeight]], runs: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(runs + 1):
        for name, weights in kinds.items():
            start = time.perf_counter()
            for weight in weights:
                ops.linear(x, weight)
            if turn:
                found[name].append((time.perf_counter() - start) / len(weights))
    return found


def bars(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what is promised, and what was measured."""
    for row in results["conversions"]:
        if (bar := LEAST.get(row["what"])) is not None:
            measured = f"{row['median']:.2f} G weights/s"
            yield {"what": row["what"], "bar": f"{bar:g}", "measured": measured, "met": row["median"] >= bar}
    for row in results["products"]:
        if row["what"] != "INT4":
            yield {
                "what": f"{row['what']} x one row, {row['shape']}: time over INT4's",
                "bar": f"{MOST_TIMES:g}x",
                "measured": f"{row['times']:.2f}x",
                "met": row["times"] <= MOST_TIMES,
            }


CONVERSIONS: dict[str, Show] = {
    "conversion": lambda row: row["what"],
    "G weights/s": lambda row: f"{row['median']:.2f} ({row['least']:.2f} to {row['most']:.2f})",
    "one core": lambda row: f"{row['core']:.2f}",
}
PRODUCT: dict[str, Show] = {
    "W": lambda row: row["shape"],
    "as": lambda row: row["what"],
    "ms": lambda row: f"{row['median'] * 1e3:.2f} ({row['least'] * 1e3:.2f} to {row['most'] * 1e3:.2f})",
    "over INT4's": lambda row: f"{row['times']:.2f}x",
}


def page(results: Mapping[str, Any]) -> str:
    """Return the page of the rates."""
    shown = {
        "facts": facts(results),
        "bars": table(BARS, results["bars"]),
        "conversions": table(CONVERSIONS, results["conversions"]),
        "products": table(PRODUCT, results["products"]),
    }
    return PAGE.format(**dict(results) | shown)


def measure(
    *,
    threads: int,
    runs: int,
    shape: tuple[int, int] = SHAPE,
    shapes: Sequence[tuple[int, int]] = PRODUCTS,
    copies: int = COPIES,
) -> dict[str, Any]:
    """Return all rates, and whether they meet their bars."""
    found: dict[str, Any] = {
        "threads": threads,
        "runs": runs,
        "rows": shape[0],
        "columns": shape[1],
        "panel": PANEL,
        "copies": copies,
        "conversions": list(rates(conversions(*shape), *shape, threads=threads, runs=runs)),
        "products": list(products(shapes, threads=threads, runs=runs, copies=copies)),
    }
    return found | {"bars": list(bars(found))}


def main() -> None:
    """Measure, and write results and their page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of conversions and of products")
    parser.add_argument("--runs", type=int, default=9, help="of each, after one that warms up")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "benchmarks" / "results", help="where results go")
    parser.add_argument("--page", action="store_true", help="measure nothing; write the page of the results anew")
    given = parser.parse_args()
    path = given.out / "fp4-rates.json"
    if given.page:
        results = json.loads(path.read_text())
    else:
        command = f"PYTHONPATH=benchmarks python -m suites.fp4.rates --threads {given.threads} --runs {given.runs}"
        results = machine.facts(command, *CODE) | measure(threads=given.threads, runs=given.runs)
        path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(results))
    print(table(BARS, results["bars"]))
    if not all(bar["met"] for bar in results["bars"]):
        sys.exit(3)


if __name__ == "__main__":
    main()
