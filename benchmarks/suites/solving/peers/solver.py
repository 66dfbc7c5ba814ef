"""GPTQ of matrices of K2's size in a process of its own, by k2quant or by llm-compressor: jobs come on stdin.

Usage: solver.py

A job is a line of JSON: `who` (`k2quant` or `llm-compressor`, whose environment this must be), `what` (`solve`: the
matrices of one input; `hessian`: of inputs; `chunk`: experts side by side, k2quant alone), `threads`, `inputs` (what
torch saved: `weights`, a list of BF16 `[R, K]`, `scales`, BF16 `[R, K/32]` each, and `hessian`, float32 `[K, K]`; for
`hessian` BF16 `inputs` `[n, K]`), `outputs` (where the values go, or nothing). The answer, a line on stdout, has
seconds, those of all cores, and the bytes of memory that the job took beyond what was there before it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DAMPING = 0.1
GROUP = 32
BLOCK = 2048
"""Tokens of a batch."""
Done = list[Any]


def peer_solves(given: dict[str, Any], _threads: int) -> Done:
    """Call llm-compressor's `quantize_weight` once a matrix; a Hessian is used up, so each has its own."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP, actorder="static"
    )
    found = []
    for weights, scales, hessian in zip(given["weights"], given["scales"], given["hessians"], strict=True):
        values, _, failed = quantize_weight(
            weights[None], hessian[None], scales[None], torch.zeros_like(scales)[None], None, args, percdamp=DAMPING
        )
        if failed.any():
            raise SystemExit("llm-compressor fell back to rounding")
        found.append(values[0])
    return found


def our_solves(given: dict[str, Any], _threads: int) -> Done:
    """Factorise once, solve each matrix."""
    from k2quant.kernels.solvers.factors import factorise
    from k2quant.kernels.solvers.gptq import solve

    factor = factorise(given["hessian"], damping=DAMPING)
    if factor is None:
        raise SystemExit("k2quant found no factor")
    return [solve(*each, factor).values for each in zip(given["weights"], given["scales"], strict=True)]


def our_chunk(given: dict[str, Any], threads: int) -> Done:
    """Solve experts, each on one thread."""
    from k2quant.ground import pool
    from k2quant.kernels.devices.single import single_threaded

    def expert(_number: int) -> None:
        for part in given["parts"]:
            our_solves(part, 1)

    with single_threaded():
        pool.run(iter(range(given["experts"])), expert, workers=threads)
    return []


def peer_hessian(given: dict[str, Any], _threads: int) -> Done:
    """Have llm-compressor add up batches."""
    from llmcompressor.modifiers.gptq.helpers import accumulate_hessian

    inputs = given["inputs"]
    module = torch.nn.Linear(inputs.shape[1], 1, bias=False)
    total, count = torch.zeros(inputs.shape[1], inputs.shape[1]), torch.zeros(())
    for start in range(0, len(inputs), BLOCK):
        total, count = accumulate_hessian(inputs[start : start + BLOCK], module, total, count)
    return [total / count]


def our_hessian(given: dict[str, Any], _threads: int) -> Done:
    """Add up blocks, as a calibration does."""
    from k2quant.calib.collecting.moments import Hessian

    inputs = given["inputs"]
    total = Hessian(inputs.shape[1], inputs.device)
    for start in range(0, len(inputs), BLOCK):
        total.add(inputs[start : start + BLOCK])
    return []


def bound(given: dict[str, Any], _threads: int) -> Done:
    """Multiply all inputs, widened before, with themselves in one product of torch's."""
    given["wide"].T @ given["wide"]
    return []


WAYS: dict[tuple[str, str], Callable[[dict[str, Any], int], Done]] = {
    ("llm-compressor", "solve"): peer_solves,
    ("k2quant", "solve"): our_solves,
    ("k2quant", "chunk"): our_chunk,
    ("llm-compressor", "hessian"): peer_hessian,
    ("k2quant", "hessian"): our_hessian,
    ("torch", "hessian"): bound,
}


def prepared(job: dict[str, Any]) -> dict[str, Any]:
    """Read what a job is for; what a contestant uses up is copied before it is timed."""
    given: dict[str, Any] = torch.load(job["inputs"], weights_only=True)
    if job["what"] == "chunk":
        parts = [torch.load(path, weights_only=True) for path in given["parts"]]
        return {"parts": parts, "experts": given["experts"]}
    if job["who"] == "llm-compressor" and job["what"] == "solve":
        given["hessians"] = [given["hessian"].clone() for _ in given["weights"]]
    if job["who"] == "torch":
        given["wide"] = given["inputs"].float()
    return given


def peak() -> int:
    """Return the most memory that this process has had since it was last asked, and begin anew."""
    found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(found.split()[1]) * 1024


def done(job: dict[str, Any]) -> dict[str, float]:
    """Do a job."""
    torch.set_num_threads(job["threads"])
    given = prepared(job)
    with torch.no_grad():
        peak()
        before, begun, busy = peak(), time.perf_counter(), time.process_time()
        found = WAYS[job["who"], job["what"]](given, job["threads"])
        answer = {"seconds": time.perf_counter() - begun, "cores": time.process_time() - busy, "own": peak() - before}
    if job["outputs"]:
        torch.save(found, job["outputs"])
    return answer


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # what contestants print is no answer
    for line in sys.stdin:
        print(json.dumps(done(json.loads(line))), file=answers, flush=True)
