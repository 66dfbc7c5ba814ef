"""Tune on the GPU at hand: inputs, truth and timing for `tuning`."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

import torch
from torch import Tensor

from k2quant.kernels import dispatch, linear_triton, moe_triton, tuning, w8a8_triton
from k2quant.kernels import matmul_reference as reference
from k2quant.kernels.compile_triton import compile_launch, rehearse
from k2quant.kernels.configs import Config, Product, Table
from k2quant.kernels.timing import time_graph
from k2quant.kernels.tuning import EXPERTS, HIDDEN, INNER, TOP, Cell, Trial
from k2quant.kernels.weights import Fp8Weight, Int4Weight

Weight = Int4Weight | Fp8Weight

CHECKED_ROWS = 512
"""Rows of x on which a configuration's numbers are checked; what a program does does not depend on how many follow."""

CHECKED_EXPERTS = 16
CALLS, SAMPLES = 20, 15
COLD = 4
"""Weights rotate over so many times the L2 cache."""


def tune(
    gpu: torch.device, *, minutes: float, products: tuple[Product, ...], show: Callable[[Cell, list[Trial]], None]
) -> Table:
    """Tune the products for Kimi K2's shapes, the most important first, until the time is over.

    Args:
        gpu: a CUDA device, with its number.
        minutes: when to stop; what was not reached keeps the configuration it had.
        products: what to tune.
        show: called with each finished cell and its trials.

    Returns:
        The table, named after the GPU.
    """
    base, name = dispatch.table_of(gpu), torch.cuda.get_device_name(gpu)
    end, chosen = time.monotonic() + 60 * minutes, {}
    with (
        torch.cuda.device(gpu),
        ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        for cell in tuning.cells(products):
            if time.monotonic() > end:
                break
            trials = _tune_cell(cell, base, gpu, pool)
            show(cell, trials)
            if trials and trials[0].seconds is not None:
                chosen[cell] = trials[0].config
    return tuning.table_of(name, chosen, base, _measured(name))


def _measured(name: str) -> dict[str, str]:
    import triton

    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _tune_cell(cell: Cell, base: Table, gpu: torch.device, pool: ProcessPoolExecutor) -> list[Trial]:
    properties = torch.cuda.get_device_properties(gpu)
    configs = tuning.candidates(cell, shared_limit=_shared_memory(gpu), processors=properties.multi_processor_count)
    arch = 10 * properties.major + properties.minor
    list(pool.map(_compile, [cell] * len(configs), configs, [arch] * len(configs)))
    work = _linear_work if cell.product in {"linear", "w8a8"} else _moe_work
    run, timer, exact, allowed = work(cell, base, gpu)
    return tuning.choose(cell, configs, run, timer, exact, allowed)


def _shared_memory(gpu: torch.device) -> int:
    """Return the bytes of shared memory that one program may use."""
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(gpu.index)["max_shared_mem"])


def _compile(cell: Cell, config: Config, arch: int) -> None:
    """Fill Triton's cache from another process; what fails here fails again, and is reported, where it is run."""
    if config.form == "dequantize":
        return
    try:
        for launch in rehearse(cell.product, cell.weight_format, cell.shape, config):
            compile_launch(launch, arch)
    except Exception:  # noqa: BLE001, S110 - see above
        pass


def _linear_work(cell: Cell, _: Table, gpu: torch.device) -> tuple[tuning.Run, tuning.Time, Tensor, float]:
    weight = tuning.random_weight(cell.weight_format, *cell.shape, device=gpu)
    x = torch.randn(cell.rows, cell.shape[1], device=gpu, dtype=torch.bfloat16)
    small = x[:CHECKED_ROWS]
    copies = [_copy(weight) for _ in range(_rotations(weight.nbytes, gpu))]

    def product(rows: Tensor, each: Weight, config: Config) -> Tensor:
        if config.form == "dequantize":
            return rows @ dispatch.dequantize(each, rows.dtype).T
        if cell.product == "w8a8" and isinstance(each, Fp8Weight):
            return w8a8_triton.linear_w8a8(rows, each, config)
        return linear_triton.linear(rows, each, config)

    def timer(_: Cell, config: Config) -> float:
        calls = [partial(product, x, each, config) for each in _cycle(copies)]
        return time_graph(calls, samples=SAMPLES, warm_up_seconds=0.05).median

    if cell.product == "w8a8" and isinstance(weight, Fp8Weight):
        exact = _w8a8_truth(small, weight)
        allowed = 1.05 * tuning.relative_error(reference.fp8_linear_w8a8(small, weight), exact) + tuning.ROUNDING
    else:
        exact = small.double() @ _truth(weight).T
        allowed = tuning.allowed_error(small, weight, exact)
    return (lambda config: product(small, weight, config)), timer, exact, allowed


def _moe_work(cell: Cell, base: Table, gpu: torch.device) -> tuple[tuning.Run, tuning.Time, Tensor, float]:
    gate, up = (tuning.random_weight(cell.weight_format, EXPERTS, INNER, HIDDEN, device=gpu) for _ in range(2))
    down = tuning.random_weight(cell.weight_format, EXPERTS, HIDDEN, INNER, device=gpu)
    x = torch.randn(cell.rows, HIDDEN, device=gpu, dtype=torch.bfloat16)
    weights = torch.rand(cell.rows, TOP, device=gpu)
    routings = [torch.rand(cell.rows, EXPERTS, device=gpu).topk(TOP).indices for _ in range(CALLS)]
    other: Product = "down" if cell.product == "gate_up" else "gate_up"
    shape = (HIDDEN, INNER) if other == "down" else (INNER, HIDDEN)
    partner = base.choose(other, cell.weight_format, shape, cell.rows)

    def layer(rows: Tensor, parts: tuple[Weight, Weight, Weight], ids: Tensor, share: Tensor, config: Config) -> Tensor:
        # Both products of a layer cut the tokens of an expert alike.
        second = replace(partner, rows=config.rows)
        pair = (config, second) if cell.product == "gate_up" else (second, config)
        return moe_triton.moe(rows, *parts, ids, share, *pair)

    def timer(_: Cell, config: Config) -> float:
        calls = [partial(layer, x, (gate, up, down), ids, weights, config) for ids in routings]
        return time_graph(calls, samples=SAMPLES, warm_up_seconds=0.05).median

    few = (_experts(gate, CHECKED_EXPERTS), _experts(up, CHECKED_EXPERTS), _experts(down, CHECKED_EXPERTS))
    small, share = x[:CHECKED_ROWS], weights[:CHECKED_ROWS]
    ids = torch.rand(small.shape[0], CHECKED_EXPERTS, device=gpu).topk(TOP).indices
    exact = _moe_truth(small, few, ids, share)
    allowed = 1.05 * tuning.relative_error(reference.moe(small, *few, ids, share), exact) + tuning.ROUNDING
    return (lambda config: layer(small, few, ids, share, config)), timer, exact, allowed


def _truth(weight: Weight) -> Tensor:
    """Return float64 weights with unrounded code * scale: in float32 an INT4 product is exact, an FP8 one nearly."""
    return weight.dequantize(torch.float32).double()


def _w8a8_truth(x: Tensor, weight: Fp8Weight) -> Tensor:
    codes, scale = reference.fp8_quantize_activations(x)
    rounded = codes.float() * scale.repeat_interleave(128, 1)[:, : x.shape[1]]
    return rounded.double() @ _truth(weight).T


def _moe_truth(x: Tensor, parts: tuple[Weight, ...], ids: Tensor, weights: Tensor) -> Tensor:
    gate, up, down = (_truth(part) for part in parts)
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in range(gate.shape[0]):
        token, slot = torch.where(ids == expert)
        rows = x[token].double()
        hidden = torch.nn.functional.silu(rows @ gate[expert].T) * (rows @ up[expert].T)
        out.index_add_(0, token, hidden @ down[expert].T * weights[token, slot].double()[:, None])
    return out


def _experts(weight: Weight, count: int) -> Weight:
    return replace(weight, codes=weight.codes[:count], scale=weight.scale[:count])


def _copy(weight: Weight) -> Weight:
    return replace(weight, codes=weight.codes.clone(), scale=weight.scale.clone())


def _rotations(nbytes: int, gpu: torch.device) -> int:
    return max(2, -(-COLD * torch.cuda.get_device_properties(gpu).L2_cache_size // nbytes))


def _cycle(copies: list[Weight]) -> list[Weight]:
    return [copies[number % len(copies)] for number in range(max(CALLS, len(copies)))]
