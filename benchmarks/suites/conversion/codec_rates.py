"""Rates of the codecs in memory: two threads over panels of rows, outputs allocated before, files left out.

Example:
    python benchmarks/suites/conversion/codec_rates.py --json benchmarks/results/codecs.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from k2quant.kernels.codecs import cpu
from k2quant.kernels.codecs.values import U8, U16, float_to_bf16

SHAPE = (2048, 7168)
MATRICES = 4
"""58.7 M weights: 117 MB as BF16, larger than the cache."""

PANEL = 512
BLOCK = (128, 128)

Job = Callable[[slice], object]


def weights(generator: np.random.Generator) -> U16:
    """Return N(0, 0.02) weights as BF16 bits, `[MATRICES * 2048, 7168]`."""
    rows, columns = MATRICES * SHAPE[0], SHAPE[1]
    out = np.empty((rows, columns), np.uint16)
    for top in range(0, rows, PANEL):
        panel = generator.standard_normal((PANEL, columns), np.float32) * np.float32(0.02)
        out[top : top + PANEL] = float_to_bf16(panel)
    return out


def jobs() -> dict[str, Job]:
    """Return each codec as a function of a range of rows, its inputs made and its outputs allocated."""
    bf16 = weights(np.random.default_rng(0))
    rows, columns = bf16.shape
    codes: U8 = np.empty(bf16.shape, np.uint8)
    scale = np.empty((rows // 128, columns // 128), np.float32)
    cpu.fp8.encode(bf16, BLOCK, codes, scale)
    packed, scale4 = np.empty((rows, columns // 8), np.int32), np.empty((rows, columns // 32), np.uint16)
    cpu.int4.encode(bf16, "moonshot", packed, scale4)
    wide4 = (scale4.astype(np.uint32) << np.uint32(16)).view(np.float32)
    on_fp8, on_int4 = np.empty_like(bf16), np.empty_like(bf16)
    cpu.fp8.decode(codes, scale, BLOCK, on_fp8)
    cpu.int4.decode(packed, wide4, 32, on_int4)
    out, out8, outs8 = np.empty_like(bf16), np.empty_like(codes), np.empty_like(scale)
    out4, outs4 = np.empty_like(packed), np.empty_like(scale4)
    for array in (out, out8, outs8, out4, outs4):
        array.fill(0)

    def blocks(r: slice) -> slice:
        return slice(r.start // 128, r.stop // 128)

    return {
        "fp8 -> bf16": lambda r: cpu.fp8.decode(codes[r], scale[blocks(r)], BLOCK, out[r]),
        "int4 -> bf16": lambda r: cpu.int4.decode(packed[r], wide4[r], 32, out[r]),
        "bf16 -> int4": lambda r: cpu.int4.encode(bf16[r], "moonshot", out4[r], outs4[r]),
        "bf16 -> int4, on the grid": lambda r: cpu.int4.encode(on_int4[r], "moonshot", out4[r], outs4[r]),
        "bf16 -> int4, no recovery": lambda r: cpu.int4.encode(bf16[r], "moonshot", out4[r], outs4[r], recover=False),
        "bf16 -> int4, compressed-tensors": lambda r: cpu.int4.encode(bf16[r], "compressed-tensors", out4[r], outs4[r]),
        "bf16 -> fp8": lambda r: cpu.fp8.encode(bf16[r], BLOCK, out8[r], outs8[blocks(r)]),
        "bf16 -> fp8, on the grid": lambda r: cpu.fp8.encode(on_fp8[r], BLOCK, out8[r], outs8[blocks(r)]),
        "bf16 -> fp8, blocks of 1x128": _rows_of_blocks(bf16, out8),
        "fp8 -> int4": lambda r: cpu.fused.fp8_to_int4(
            codes[r], scale[blocks(r)], BLOCK, "moonshot", out4[r], outs4[r]
        ),
        "int4 -> fp8": lambda r: cpu.fused.int4_to_fp8(packed[r], wide4[r], 32, BLOCK, out8[r], outs8[blocks(r)]),
        "compare": lambda r: cpu.bf16.compare(bf16[r], on_fp8[r]),
    }


def _rows_of_blocks(bf16: U16, codes: U8) -> Job:
    scale = np.zeros((bf16.shape[0], bf16.shape[1] // 128), np.float32)
    return lambda r: cpu.fp8.encode(bf16[r], (1, 128), codes[r], scale[r])


def measure(job: Job, pool: ThreadPoolExecutor, runs: int) -> tuple[list[float], list[float]]:
    """Return each run's rate, in 10^9 weights a second: of the clock, and of one core's time."""
    rows = MATRICES * SHAPE[0]
    panels = [slice(top, top + PANEL) for top in range(0, rows, PANEL)]
    job(panels[0])  # compiles
    rates, core_rates = [], []
    for _ in range(runs):
        start, busy = time.perf_counter(), time.process_time()
        list(pool.map(job, panels))
        rates.append(rows * SHAPE[1] / (time.perf_counter() - start) / 1e9)
        core_rates.append(rows * SHAPE[1] / (time.process_time() - busy) / 1e9)
    return rates, core_rates


def main() -> None:
    """Print a table of median rates with their range; write it as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {}
    print(f"{'codec':34}{'G weights/s':>12}{'range':>16}{'per core':>12}")
    with ThreadPoolExecutor(arguments.threads) as pool:
        for name, job in jobs().items():
            rates, core_rates = measure(job, pool, arguments.runs)
            median, per_core = statistics.median(rates), statistics.median(core_rates)
            results[name] = {"median": median, "per_core": per_core, "runs": rates}
            print(f"{name:34}{median:12.2f}{min(rates):9.2f} -{max(rates):5.2f}{per_core:12.2f}", flush=True)
    if arguments.json:
        setup = {"threads": arguments.threads, "shape": SHAPE, "matrices": MATRICES, "panel_rows": PANEL}
        arguments.json.write_text(json.dumps({"setup": setup, "rates_1e9_weights_per_s": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
