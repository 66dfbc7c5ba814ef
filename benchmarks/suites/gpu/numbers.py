"""Every product and gradient on the GPU against float64, on poisoned memory, 20 times, compiled, and in a CUDA graph.

How far a result may be from float64, with weights unrounded, `choosing.allowed` says, and `chance`. What torch leaves
uninitialised is filled with NaN in the first run; what lies around x, gradients and the router's weights is NaN always.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from k2quant.kernels.products import dispatch
from k2quant.kernels.products.tables.configs import Product
from k2quant.kernels.tuning import choosing
from suites.gpu.number_cases import LINEAR, MOE, Problem, Sizes, problems
from suites.gpu.running import ahead, record
from suites.gpu.running.record import Entry, Record
from suites.gpu.running.stages import Setting
from suites.products.run import gpu_lost

RUNS, DRY_RUNS = 20, 2
"""Runs whose bits must be equal."""


def run(kept: Record, setting: Setting) -> None:
    """Check everything, each problem by itself; then all operators compiled and captured."""
    device = torch.device(setting.device)
    sizes = Sizes.tiny() if setting.dry_run else Sizes()
    found = problems(device, sizes)
    runs = DRY_RUNS if setting.dry_run else RUNS
    if not setting.dry_run:
        ahead.compile_products(jobs(sizes), torch.cuda.get_device_capability())
    for each in (each for each in found if not each.late):
        kept.attempt(each.name, partial(check, each, runs), fatal=gpu_lost)
    for each in (each for each in found if each.small):
        kept.attempt(f"{each.name}, torch.compile", partial(compiled, each), fatal=gpu_lost)
    for each in (each for each in found if each.small):
        work = partial(captured, each) if device.type == "cuda" else no_graphs
        kept.attempt(f"{each.name}, CUDA graph", work, fatal=gpu_lost)
    for each in (each for each in found if each.late):
        kept.attempt(each.name, partial(check, each, runs), fatal=gpu_lost)


def jobs(sizes: Sizes) -> list[ahead.Job]:
    """Return what the problems will have compiled; of layers of experts the large one, where most is to be gained."""
    table = dispatch.table_of(torch.device("cuda"))
    found = []
    for shape in sizes.shapes:
        for product, (weight_format, _) in LINEAR.items():
            kind: Product = "w8a8" if product == "fp8_linear_w8a8" else "linear"
            configs = [table.choose(kind, weight_format, shape, rows) for rows in (*sizes.rows, sizes.many)]
            found += [ahead.Job(kind, weight_format, shape, config) for config in configs]
    _, inner, hidden = sizes.layers[-1]
    for weight_format, _ in MOE.values():
        for tokens in sizes.tokens:
            found += ahead.of_layer(table, weight_format, inner, hidden, tokens, backward=True)
    return list(dict.fromkeys(found))


def check(problem: Problem, runs: int) -> Entry:
    """Hold result and gradients to float64, and all runs to the first."""
    problem.bound()  # its weights are made before memory is poisoned
    with poisoned():
        first = problem.results()
    repeated = all(_same(first, problem.results()) for _ in range(runs - 1))
    exact, usual = problem.exact(), problem.usual()
    errors = {name: choosing.relative_error(first[name], exact[name]) for name in exact}
    slack = {name: chance(each.numel()) if problem.unrounded else 1.0 for name, each in exact.items()}
    allowed = {name: slack[name] * choosing.allowed(usual[name], exact[name]) for name in exact}
    wrong = [
        f"{name} is off by {errors[name]:.2e}, allowed {allowed[name]:.2e}"
        for name in exact
        if not errors[name] <= allowed[name]
    ]
    if not repeated:
        wrong.append(f"{runs} runs gave different bits")
    said = "; ".join(wrong) or ", ".join(f"{name} {errors[name]:.1e} of {allowed[name]:.1e}" for name in exact)
    outcome = record.MISSED if wrong else record.PASSED
    return {"outcome": outcome, "said": said, "errors": errors, "allowed": allowed, "same_bits": repeated}


def chance(count: int) -> float:
    """Return by what factor the errors of so many numbers, rounded twice independently, hardly ever differ by chance.

    The norm of n errors varies by 1 / sqrt(2 n) of itself, and the ratio of two by 1 / sqrt(n): three times that. It
    counts where weights are not rounded as `usual` rounds them, and most for a token's eight router weights.
    """
    return 1 + 3 / math.sqrt(max(count, 1))


def compiled(problem: Problem) -> Entry:
    """Hold what torch.compile makes of the operator, as one graph, to eager bits."""
    torch.compiler.reset()
    forward = problem.bound()
    found = torch.compile(forward, fullgraph=True)(*problem.inputs)
    return _equal(found, forward(*problem.inputs), "compiled")


def captured(problem: Problem) -> Entry:
    """Capture the operator in a CUDA graph and replay it on other inputs: it must follow them."""
    forward, inputs = problem.bound(), [each.clone() for each in problem.inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(*inputs)
    for given, other in zip(inputs, problem.others(), strict=True):
        given.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    return _equal(out, forward(*inputs), "replayed")


def no_graphs() -> Entry:
    """Say why there is nothing to capture."""
    return {"outcome": record.LEFT_OUT, "said": "a CPU has no CUDA graphs"}


@contextmanager
def poisoned() -> Iterator[None]:
    """Have torch fill what it leaves uninitialised with NaN."""
    switches: Any = torch.utils.deterministic
    filled = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switches.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what else would have to be deterministic
            yield
    finally:
        switches.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(False)


def _equal(found: Tensor, eager: Tensor, how: str) -> Entry:
    if torch.equal(found, eager):
        return {"outcome": record.PASSED, "said": f"{how}, the bits of eager code"}
    off = (found != eager).flatten()
    place = int(off.int().argmax())
    one, other = (float(each.flatten()[place]) for each in (eager, found))
    said = f"{how}: element {place} is {other}, expected {one}; {int(off.sum())} of {off.numel()} differ"
    return {"outcome": record.MISSED, "said": said}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)
