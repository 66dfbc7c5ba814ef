"""Matrix products of quantised weights on a CPU.

Three ways, the first that fits:

1. `dot_cpu`: CPUs that multiply BF16 themselves work straight from the checkpoint's own bytes.
2. torch's INT4 operator, for a few rows of x, where a probe finds it faster than what follows: it wants the layout
   `torch`, which the probe therefore decides when a weight is prepared.
3. Panels: some rows of the weight are dequantised into the cache, multiplied by torch, and forgotten.

BF16 x only is given to the first two; products with FP16 and float32 are made in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor

from k2quant.kernels.codecs.cpu import int4 as codec
from k2quant.kernels.devices.threads import over_rows, without_lock
from k2quant.kernels.products.cpu import dot as dot_cpu
from k2quant.kernels.products.cpu import panels as panels_cpu
from k2quant.kernels.products.weights import GROUP, Fp8Weight, Int4Weight, Layout, prepare_int4, select, torch_half

DOT_ROWS = 512
"""Rows of x up to which working from packed codes beats panels."""

ALONE = 1 << 19
"""Weights below which one thread is done before a second has woken up."""

TORCH_ROWS = 16
"""Rows of x up to which torch's INT4 operator beats panels: it works row by row."""

PANEL_ROWS = 512
"""Rows of a panel: with K2's widest weights it takes some megabytes."""


def linear(x: Tensor, weight: Int4Weight | Fp8Weight) -> Tensor:
    """Return x @ weight.T, `[M, N]` in the dtype of x, for contiguous x `[M, K]` on the CPU."""
    if x.shape[0] == 0 or 0 in weight.shape:
        return x.new_zeros(x.shape[0], weight.shape[0])
    if x.dtype == torch.bfloat16:
        if x.shape[0] <= DOT_ROWS and _can_dot(weight):
            return _dot(x, weight)
        if x.shape[0] <= TORCH_ROWS and isinstance(weight, Int4Weight) and weight.layout == "torch":
            return _torch_operator(x, weight)
    return _panels(x, weight)


def linear_grouped(x: Tensor, weight: Int4Weight | Fp8Weight, counts: list[int]) -> Tensor:
    """Return the products of a stack of weights `[E, N, K]`, each with its own rows of x.

    Args:
        x: `[M, K]`, contiguous: first the rows of weight 0, then those of weight 1, and so on.
        weight: the stack.
        counts: how many rows each weight has.

    Returns:
        `[M, N]` in the dtype of x, each row as `linear` gives it.
    """
    out = x.new_empty(x.shape[0], weight.shape[1])
    ends = list(accumulate(counts))
    spans = [(number, end - count, end) for number, (count, end) in enumerate(zip(counts, ends, strict=True)) if count]
    if x.dtype != torch.bfloat16 or max(counts, default=0) > DOT_ROWS or 0 in weight.shape or not _can_dot(weight):
        for number, first, last in spans:
            out[first:last] = linear(x[first:last], select(weight, number))
        return out
    bits, result, (codes, scale), block = _bits(x), _bits(out), _arrays(weight), _block(weight)
    for number, first, last in spans:  # on plain arrays: a small expert is done in less time than torch needs for views
        _dot_arrays(bits[first:last], codes[number], scale[number], block, result[first:last])
    return out


def linear_backward(grad: Tensor, weight: Int4Weight | Fp8Weight) -> Tensor:
    """Return grad @ weight, `[M, K]` in the dtype of grad, for grad `[M, N]` on the CPU.

    The sum runs over all rows of the weight, so it is dequantised as a whole, for as long as the product takes.
    """
    dtype = _panel_dtype(grad)
    return (grad.to(dtype) @ dequantize(weight, dtype)).to(grad.dtype)


def dequantize(weight: Int4Weight | Fp8Weight, dtype: torch.dtype) -> Tensor:
    """Return a weight `[N, K]` on the CPU in `dtype`, each number rounded once."""
    out = torch.empty(weight.shape, dtype=dtype)
    for first, last in _panel_rows(weight):
        out[first:last] = _panel(weight, first, last, dtype if dtype == torch.bfloat16 else torch.float32)
    return out


@lru_cache(maxsize=1)
def best_layout() -> Layout:
    """Return the layout in which this CPU reads INT4 weights fastest; the first call may probe, for milliseconds."""
    if dot_cpu.supported():
        return "rows"
    return "torch" if _torch_operator_wins() else "rows"


def _torch_operator_wins() -> bool:
    """Time one row of x times a small weight, by torch's operator and by panels."""
    packed = torch.randint(-(2**31), 2**31 - 1, (512, 1024 // 8), dtype=torch.int32)
    scale = torch.rand(512, 1024 // GROUP).bfloat16()
    x = torch.rand(1, 1024).bfloat16()
    try:
        weight = prepare_int4(packed, scale, layout="torch")
        fast = _seconds(lambda: _torch_operator(x, weight))
    except (RuntimeError, AttributeError):  # this torch has no such operator for this CPU
        return False
    rows = prepare_int4(packed, scale, layout="rows")
    return fast < _seconds(lambda: _panels(x, rows))


def _seconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _can_dot(weight: Int4Weight | Fp8Weight) -> bool:
    if isinstance(weight, Fp8Weight):
        return dot_cpu.supported() and weight.block[1] % GROUP == 0
    return dot_cpu.supported() and weight.layout == "rows"


def _dot(x: Tensor, weight: Int4Weight | Fp8Weight) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0])
    codes, scale = _arrays(weight)
    _dot_arrays(_bits(x), codes, scale, _block(weight), _bits(out))
    return out


def _arrays(weight: Int4Weight | Fp8Weight) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return codes and scales as `dot_cpu` takes them, without a copy."""
    if isinstance(weight, Int4Weight):
        return weight.codes.numpy(), _bits(weight.scale)
    return _bits(weight.codes), weight.scale.numpy()


def _block(weight: Int4Weight | Fp8Weight) -> tuple[int, int] | None:
    return weight.block if isinstance(weight, Fp8Weight) else None


def _dot_arrays(
    x: NDArray[Any], codes: NDArray[Any], scale: NDArray[Any], block: tuple[int, int] | None, out: NDArray[Any]
) -> None:
    """Write x @ weight.T into `out`, on several threads if the weight is large enough; no block means INT4."""
    rows, alone = out.shape[1], out.shape[1] * x.shape[1] < ALONE
    parts = (x, codes, scale, out) if block is None else (x, codes, scale, *block, out)
    task, work = (dot_cpu.int4_task, dot_cpu.int4_work) if block is None else (dot_cpu.fp8_task, dot_cpu.fp8_work)
    if alone:
        work(*parts)(0, rows)
        return
    whole = task(*parts)
    if not without_lock(whole.entry, whole.parameters.ctypes.data):
        over_rows(rows, dot_cpu.rows_together(len(x)), work(*parts))


def _torch_operator(x: Tensor, weight: Int4Weight) -> Tensor:
    product = torch.ops.aten._weight_int4pack_mm_for_cpu  # noqa: SLF001 - it has no public name
    return cast("Tensor", product(x, weight.codes, GROUP, weight.scale))


def _panels(x: Tensor, weight: Int4Weight | Fp8Weight) -> Tensor:
    dtype = _panel_dtype(x)
    wide = x.to(dtype)
    out = x.new_empty(x.shape[0], weight.shape[0])
    for first, last in _panel_rows(weight):
        out[:, first:last] = wide @ _panel(weight, first, last, dtype).T
    return out


def _panel_rows(weight: Int4Weight | Fp8Weight) -> list[tuple[int, int]]:
    rows = weight.shape[0]
    return [(first, min(first + PANEL_ROWS, rows)) for first in range(0, rows, PANEL_ROWS)]


def _panel_dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype == torch.bfloat16 and _multiplies_bf16() else torch.float32


def _panel(weight: Int4Weight | Fp8Weight, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return rows first..last of a weight, each number rounded once to BF16, or not at all to float32."""
    if isinstance(weight, Fp8Weight):
        return _fp8_panel(weight, first, last).to(dtype)
    if weight.layout == "torch":
        return _torch_panel(weight, first, last).to(dtype)
    if weight.layout == "groups":
        weight = Int4Weight(*weight.checkpoint(), "rows")
    packed, scale = weight.codes[first:last], weight.scale[first:last]
    panel = torch.empty(last - first, weight.shape[1], dtype=dtype)
    if dtype == torch.bfloat16:
        words, wide, bits = packed.numpy(), scale.float().numpy(), _bits(panel)
        over_rows(last - first, 16, lambda a, b: codec.decode(words[a:b], wide[a:b], GROUP, bits[a:b]))
    else:
        pairs, narrow, floats = packed.view(torch.uint8).numpy(), _bits(scale), panel.numpy()
        over_rows(last - first, 16, lambda a, b: panels_cpu.int4_to_float(pairs[a:b], narrow[a:b], floats[a:b]))
    return panel


def _fp8_panel(weight: Fp8Weight, first: int, last: int) -> Tensor:
    codes, scale = _bits(weight.codes), weight.scale.numpy()
    panel = torch.empty(last - first, weight.shape[1])
    floats, (height, width) = panel.numpy(), weight.block
    over_rows(
        last - first,
        16,
        lambda a, b: panels_cpu.fp8_to_float(
            codes[first + a : first + b], scale, height, width, first + a, floats[a:b]
        ),
    )
    return panel


def _torch_panel(weight: Int4Weight, first: int, last: int) -> Tensor:
    half, columns = torch_half(), weight.shape[1]
    part = Int4Weight(weight.codes[first:last], weight.scale[:, first:last], "torch")
    if half is None or (last - first) % (2 * half):
        return part.dequantize(torch.float32)
    codes = part.codes.reshape(-1, columns, half).numpy()
    scale = _bits(part.scale[..., 0].reshape(columns // GROUP, -1, 2, half).contiguous())
    panel = torch.empty(codes.shape[0], columns, 2, half)
    floats = panel.numpy()
    over_rows(len(codes), 1, lambda a, b: panels_cpu.torch_to_float(codes[a:b], scale[:, a:b].copy(), floats[a:b]))
    return panel.permute(0, 2, 3, 1).reshape(last - first, columns)


def _bits(tensor: Tensor) -> NDArray[Any]:
    """Return a CPU tensor's bits as a numpy view."""
    return tensor.view({1: torch.uint8, 2: torch.uint16}[tensor.element_size()]).numpy()


@lru_cache(maxsize=1)
def _multiplies_bf16() -> bool:
    """Return whether this CPU multiplies BF16 matrices faster than float32 ones, found by trying."""
    x, weight = torch.rand(64, 1024), torch.rand(512, 1024)
    narrow_x, narrow_weight = x.bfloat16(), weight.bfloat16()
    return _seconds(lambda: narrow_x @ narrow_weight.T) < _seconds(lambda: x @ weight.T)
