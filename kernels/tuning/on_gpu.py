"""Tune on the GPU at hand: inputs, truth and timing for `choosing`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import cast

import torch
from torch import Tensor

from k2quant.ground.release import EXPERTS, HIDDEN, INNER, TOP
from k2quant.kernels.products import dispatch, reference
from k2quant.kernels.products.gpu import linear as linear_triton
from k2quant.kernels.products.gpu import moe as moe_triton
from k2quant.kernels.products.gpu import w8a8 as w8a8_triton
from k2quant.kernels.products.packed.fp8 import Fp8Weight
from k2quant.kernels.products.packed.weight import PackedWeight
from k2quant.kernels.products.tables.configs import Config, Product, Table
from k2quant.kernels.tuning import choosing as tuning
from k2quant.kernels.tuning.candidates import CANDIDATES, TUNED_BUCKETS, Cell, candidates, cells
from k2quant.kernels.tuning.choosing import Trial
from k2quant.kernels.tuning.compiling import compilers, most_direct, precompile
from k2quant.kernels.tuning.timing import time_eager, time_graph

CHECKED_ROWS = 512
"""Rows of x on which a configuration's numbers are checked; what a program does does not depend on how many follow."""

CHECKED_EXPERTS = 16
"""Experts that the checked tokens use, of all there are: the truth is made in float64 for these only."""

CALLS, SAMPLES = 20, 15
"""Calls that are timed together, unless they are long, and how often."""

COLD = 4
"""Weights rotate over so many times the L2 cache."""


def tune(
    gpu: torch.device, *, minutes: float, products: tuple[Product, ...]
) -> Iterator[tuple[Cell, list[Trial], Table]]:
    """Tune the products for Kimi K2's shapes, the most important first, until the time is over.

    Args:
        gpu: a CUDA device, with its number.
        minutes: when to stop; what was not reached keeps the configuration it had.
        products: what to tune.

    Yields:
        Each finished cell, its trials, and the table so far, named after the GPU.
    """
    end = time.monotonic() + 60 * minutes

    def over() -> bool:
        return time.monotonic() > end

    with trying(gpu, over) as attempt:
        found = tuning.tune_cells(cells(products), name_of(gpu), dispatch.table_of(gpu), measured(gpu), attempt, over)
        yield from found


@contextmanager
def trying(gpu: torch.device, over: tuning.Over, *, most: int = CANDIDATES) -> Iterator[tuning.TryCell]:
    """Offer what tries a cell on a GPU: `most` configurations of it, compiled on all cores, checked, then timed."""
    with torch.cuda.device(gpu), compilers() as pool:
        yield partial(_tune_cell, gpu=gpu, pool=pool, over=over, most=most)


def name_of(gpu: torch.device) -> str:
    """Return a GPU's name, which its table has."""
    return torch.cuda.get_device_name(gpu)


def measured(gpu: torch.device) -> dict[str, str]:
    """Return what a table says of its measurement: device, versions, date."""
    import triton

    return {
        "device": name_of(gpu),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _tune_cell(
    cell: Cell, table: Table, *, gpu: torch.device, pool: ProcessPoolExecutor, over: tuning.Over, most: int
) -> list[Trial]:
    properties = torch.cuda.get_device_properties(gpu)
    configs = candidates(
        cell, base=table, shared_limit=_shared_memory(gpu), processors=properties.multi_processor_count
    )[:most]
    arch = 10 * properties.major + properties.minor
    with suppress(BrokenProcessPool):  # then each is compiled where it is run
        list(pool.map(partial(_compile, cell, arch=arch), configs))
    work = _linear_work if cell.product in {"linear", "w8a8"} else _moe_work
    run, timer, exact, allowed = work(cell, table, gpu)
    return tuning.choose(cell, configs, run, timer, exact, allowed, over=over)


def checked_tokens(cell: Cell) -> tuple[int, ...]:
    """Return with how many tokens to check a layer of experts: the cell's own, as far as needed.

    Where only some of the numbers of tokens that share a configuration have them sorted by expert, it is one of each.
    """
    own, few = min(cell.rows, CHECKED_ROWS), most_direct()
    below = max((rows for rows in TUNED_BUCKETS if rows < cell.rows), default=0)
    return (own, few) if below < few < own else (own,)


def _shared_memory(gpu: torch.device) -> int:
    """Return the bytes of shared memory that one program may use."""
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(gpu.index)["max_shared_mem"])


def _compile(cell: Cell, config: Config, *, arch: int) -> None:
    """Fill Triton's cache from another process."""
    precompile(cell.product, cell.weight_format, cell.shape, config, arch=arch, tokens=checked_tokens(cell))


def _linear_work(cell: Cell, _: Table, gpu: torch.device) -> tuple[tuning.Run, tuning.Time, Tensor, float]:
    weight = tuning.random_weight(cell.weight_format, *cell.shape, device=gpu)
    x = torch.randn(cell.rows, cell.shape[1], device=gpu, dtype=torch.bfloat16)
    small = x[:CHECKED_ROWS]
    copies = [_copy(weight) for _ in range(_rotations(weight.nbytes, gpu))]

    def product(rows: Tensor, each: PackedWeight, config: Config) -> Tensor:
        if config.form == "dequantize":
            return rows @ dispatch.dequantize(each, rows.dtype).T
        if cell.product == "w8a8":
            return w8a8_triton.linear_w8a8(rows, cast("Fp8Weight", each), config)
        return linear_triton.linear(rows, each, config)

    def timer(_: Cell, config: Config) -> float:
        return _seconds([partial(product, x, each, config) for each in _cycle(copies)])

    if cell.product == "w8a8":
        exact, fp8 = _w8a8_truth(small, weight), cast("Fp8Weight", weight)
        allowed = tuning.allowed(reference.fp8_linear_w8a8(small, fp8), exact)
    else:
        exact = small.double() @ _truth(weight).T
        allowed = tuning.allowed_error(small, weight, exact)
    return (lambda config: product(small, weight, config)), timer, exact, allowed


def _moe_work(cell: Cell, table: Table, gpu: torch.device) -> tuple[tuning.Run, tuning.Time, Tensor, float]:
    gate, up = (tuning.random_weight(cell.weight_format, EXPERTS, INNER, HIDDEN, device=gpu) for _ in range(2))
    parts = gate, up, tuning.random_weight(cell.weight_format, EXPERTS, HIDDEN, INNER, device=gpu)
    x = torch.randn(cell.rows, HIDDEN, device=gpu, dtype=torch.bfloat16)
    weights = torch.rand(cell.rows, TOP, device=gpu)
    routings = [torch.rand(cell.rows, EXPERTS, device=gpu).topk(TOP).indices for _ in range(CALLS)]
    other: Product = "down" if cell.product == "gate_up" else "gate_up"
    partner = table.choose(other, cell.weight_format, cell.shape[::-1], cell.rows)

    def layer(ids: Tensor, config: Config) -> Tensor:
        # Both products of a layer cut the tokens of an expert alike.
        second = replace(partner, rows=config.rows)
        pair = (config, second) if cell.product == "gate_up" else (second, config)
        return moe_triton.moe(x[: len(ids)], *parts, ids, weights[: len(ids)], *pair)

    def timer(_: Cell, config: Config) -> float:
        return _seconds([partial(layer, ids, config) for ids in routings])

    few = _some_experts(gpu)
    checked = [few[torch.rand(tokens, len(few), device=gpu).topk(TOP).indices] for tokens in checked_tokens(cell)]
    exact = torch.cat([_moe_truth(x, parts, ids, weights) for ids in checked])
    usual = torch.cat([reference.moe(x[: len(ids)], *parts, ids, weights[: len(ids)]) for ids in checked])
    allowed = tuning.allowed(usual, exact)
    return (lambda config: torch.cat([layer(ids, config) for ids in checked])), timer, exact, allowed


def _some_experts(gpu: torch.device) -> Tensor:
    """Return the numbers of some experts, the last among them: its codes lie beyond what int32 can index."""
    return torch.cat([torch.randperm(EXPERTS - 1)[: CHECKED_EXPERTS - 1], torch.tensor([EXPERTS - 1])]).to(gpu)


def _seconds(calls: list[Callable[[], Tensor]]) -> float:
    """Return the seconds of one call, timed together with as many others as do not take too long."""
    once = time_eager(calls[0], samples=3, calls=1).median
    return time_graph(calls[: tuning.calls_for(once, len(calls))], samples=SAMPLES, warm_up_seconds=0.05).median


def _truth(weight: PackedWeight) -> Tensor:
    """Return float64 weights with unrounded code * scale: in float32 one of INT4 or MXFP4 is exact, others nearly."""
    return weight.dequantize(torch.float32).double()


def _w8a8_truth(x: Tensor, weight: PackedWeight) -> Tensor:
    codes, scale = reference.fp8_quantize_activations(x)
    rounded = codes.float() * scale.repeat_interleave(128, 1)[:, : x.shape[1]]
    return rounded.double() @ _truth(weight).T


def _moe_truth(
    x: Tensor, parts: tuple[PackedWeight, PackedWeight, PackedWeight], ids: Tensor, weights: Tensor
) -> Tensor:
    out = torch.zeros(len(ids), x.shape[1], dtype=torch.float64, device=x.device)
    for expert in ids.unique().tolist():
        gate, up, down = (_truth(part.expert(expert)) for part in parts)
        token, slot = torch.where(ids == expert)
        rows = x[token].double()
        hidden = torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)
        out.index_add_(0, token, hidden @ down.T * weights[token, slot].double()[:, None])
    return out


def _copy(weight: PackedWeight) -> PackedWeight:
    whole = None if weight.whole is None else weight.whole.clone()
    return weight.holding(weight.codes.clone(), weight.scale.clone(), whole)


def _rotations(nbytes: int, gpu: torch.device) -> int:
    return max(2, -(-COLD * torch.cuda.get_device_properties(gpu).L2_cache_size // nbytes))


def _cycle(copies: list[PackedWeight]) -> list[PackedWeight]:
    return [copies[number % len(copies)] for number in range(max(CALLS, len(copies)))]
