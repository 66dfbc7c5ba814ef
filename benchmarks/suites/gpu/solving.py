"""GPTQ's solver on the GPU against that of the CPU: bits where there are no products, errors at K2's sizes, seconds.

Products of float32 are cuBLAS's, whose last bits are its own; a code that lies between two may fall to the other side,
and all later columns of its row make up for another error. So whole matrices are held to the error of their outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from k2quant.calib.collecting.moments import Hessian
from k2quant.ground.release import HIDDEN, INNER
from k2quant.kernels import ops
from k2quant.kernels.solvers.errors import output_error
from k2quant.kernels.solvers.factors import Factor, factorise
from k2quant.kernels.solvers.gptq import solve
from k2quant.kernels.solvers.reference import BLOCK, Solved
from suites.gpu.running import record
from suites.gpu.running.record import Entry, Record
from suites.gpu.running.stages import Setting
from suites.products.run import gpu_lost

ALLOWED = 1.01
"""Of the error that the CPU's codes have."""
SUMS = 1e-5
"""Largest difference of a Hessian's element from the CPU's, in units of its largest."""
HELD = 512
"""Tokens by which errors are measured."""


class Problem(NamedTuple):
    """What is solved together, and by how many tokens."""

    name: str
    rows: int
    columns: int
    tokens: int


PROBLEMS = (Problem("gate + up", 2 * INNER, HIDDEN, 14_336), Problem("down", HIDDEN, INNER, 8_192))
"""Of one expert of K2, with twice and four times as many tokens as there are columns."""
DRY = (Problem("gate + up", 96, 256, 512), Problem("down", 128, 192, 384))
_Given = TypeVar("_Given")


def run(kept: Record, setting: Setting) -> None:
    """Compare and measure everything."""
    device = torch.device(setting.device)
    kept.attempt("a block of columns, bits", partial(bits, device), fatal=gpu_lost)
    for problem in DRY if setting.dry_run else PROBLEMS:
        kept.attempt(f"{problem.name}, Hessian", partial(hessian, problem, device), fatal=gpu_lost)
        kept.attempt(f"{problem.name}, solved", partial(solved, problem, device), fatal=gpu_lost)


def bits(device: torch.device) -> Entry:
    """Solve matrices so narrow that no product of matrices is needed: all is one rounding after the other."""
    weights, inputs = _weights(256, BLOCK, 0), _inputs(4 * BLOCK, BLOCK)
    factor, scales = _factor(inputs.T.float() @ inputs.float()), _scales(weights)
    truth = solve(weights, scales, factor)
    ours = solve(weights.to(device), scales.to(device), Factor(factor.order.to(device), factor.upper.to(device)))
    off = int((ours.codes.cpu() != truth.codes).sum())
    if off or ours.saturated != truth.saturated:
        return {"outcome": record.MISSED, "said": f"{off} of {truth.codes.numel()} codes differ"}
    return {"outcome": record.PASSED, "said": f"{truth.codes.numel()} codes equal"}


def hessian(problem: Problem, device: torch.device) -> Entry:
    """Sum a Hessian on both sides."""
    inputs = _inputs(problem.tokens, problem.columns)

    def summed(place: torch.device) -> Tensor:
        found = Hessian(problem.columns, place)
        found.add(inputs.to(place))
        return torch.from_numpy(found.mean(float(problem.tokens)))

    truth, slow = _timed(partial(summed, torch.device("cpu")), torch.device("cpu"))
    ours, seconds = _timed(partial(summed, device), device)
    off = float((ours - truth).abs().max() / truth.abs().max())
    said = f"within {off:.1e} of the CPU's, allowed {SUMS}"
    outcome = record.PASSED if off <= SUMS else record.MISSED
    return {"outcome": outcome, "said": said, "seconds": seconds, "cpu_seconds": slow}


def solved(problem: Problem, device: torch.device) -> Entry:
    """Factorise and solve on both sides, twice on ours: as good as the CPU's, and the same bits again."""
    weights, inputs = _weights(problem.rows, problem.columns, 1), _inputs(problem.tokens, problem.columns)
    wide, scales = inputs.float(), _scales(weights)
    given = wide.T @ wide

    def made(place: torch.device) -> Solved:
        return solve(weights.to(place), scales.to(place), _factor(given.to(place)))

    truth, slow = _timed(partial(made, torch.device("cpu")), torch.device("cpu"))
    ours, seconds = _timed(partial(made, device), device)
    again = made(device)
    plain, cpu, gpu = (
        output_error(weights, values, inputs[:HELD], torch.ones(min(HELD, len(inputs))))
        for values in (_rounded(weights), truth.values, ours.values.cpu())
    )
    same = bool((again.codes == ours.codes).all())
    said = f"error {gpu / plain:.4f} of rounding's, the CPU's {cpu / plain:.4f}, saturated {ours.saturated}"
    said += "" if same else "; different bits in two runs"
    outcome = record.PASSED if same and gpu <= ALLOWED * cpu else record.MISSED
    return {"outcome": outcome, "said": said, "seconds": seconds, "cpu_seconds": slow}


def _timed(work: Callable[[], _Given], device: torch.device) -> tuple[_Given, float]:
    """Return what some work gives the second time, and its seconds; on a CPU the first time counts, for it is slow."""
    if device.type != "cpu":
        work()
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    found = work()
    if device.type != "cpu":
        torch.cuda.synchronize(device)
    return found, time.perf_counter() - begun


def _weights(rows: int, columns: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=random) * 0.02).bfloat16()


def _inputs(tokens: int, columns: int) -> Tensor:
    """Return BF16 inputs whose columns depend on each other, some of them much larger."""
    random = torch.Generator().manual_seed(2)
    found = torch.randn(tokens, columns, generator=random)
    found[:, 1:] += found[:, :-1]
    found[:, :: max(columns // 8, 1)] *= 6
    return found.bfloat16()


def _scales(weights: Tensor) -> Tensor:
    return ops.search_int4_scales(weights)


def _rounded(weights: Tensor) -> Tensor:
    return ops.fake_quantize_int4(weights, "moonshot")


def _factor(given: Tensor) -> Factor:
    found = factorise(given)
    if found is None:
        msg = "a Hessian of random inputs has no factor"
        raise AssertionError(msg)
    return found
