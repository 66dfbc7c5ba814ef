"""Matrix products of quantised weights on a CPU.

Three ways, the first that fits:

1. `cpu/dot`: CPUs that multiply BF16 themselves work straight from the checkpoint's own bytes.
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
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from k2quant.kernels.codecs import fp4
from k2quant.kernels.codecs.cpu import int4 as codec
from k2quant.kernels.codecs.cpu import mxfp4, nvfp4
from k2quant.kernels.codecs.values import F32, U8, U16, e8m0_to_float
from k2quant.kernels.devices.threads import over_rows, without_lock
from k2quant.kernels.products.cpu import dot as dot_cpu
from k2quant.kernels.products.cpu import panels as panels_cpu
from k2quant.kernels.products.packed.int4 import Int4Weight, torch_half
from k2quant.kernels.products.packed.weight import GROUP, Layout, PackedWeight

DOT_ROWS = 512
"""Rows of x up to which working from packed codes beats panels."""

ALONE = 1 << 19
"""Weights below which one thread is done before a second has woken up."""

FEW_ROWS = 16
"""Rows of x up to which torch's INT4 operator beats panels: it works row by row."""

PANEL_ROWS = 512
"""Rows of a panel: with K2's widest weights it takes some megabytes."""


class Dot(NamedTuple):
    """Products straight from a format's codes: functions of x, codes, scale, `_rest` of the weight, and the result."""

    task: Callable[..., dot_cpu.Task]
    work: Callable[..., dot_cpu.Work]


DOTS = {
    "int4": Dot(dot_cpu.int4_task, dot_cpu.int4_work),
    "fp8": Dot(dot_cpu.fp8_task, dot_cpu.fp8_work),
    "nvfp4": Dot(dot_cpu.nvfp4_task, dot_cpu.nvfp4_work),
    "mxfp4": Dot(dot_cpu.mxfp4_task, dot_cpu.mxfp4_work),
}
"""The formats whose codes `dot` multiplies, in the layout of a checkpoint."""


def linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """Return x @ weight.T, `[M, N]` in the dtype of x, for contiguous x `[M, K]` on the CPU."""
    if x.shape[0] == 0 or 0 in weight.shape:
        return x.new_zeros(x.shape[0], weight.shape[0])
    if x.dtype == torch.bfloat16:
        if x.shape[0] <= DOT_ROWS and _can_dot(weight):
            return _dot(x, weight)
        if x.shape[0] <= FEW_ROWS and weight.layout == "torch":
            return _torch_operator(x, weight)
    return _panels(x, weight)


def linear_grouped(x: Tensor, weight: PackedWeight, counts: list[int]) -> Tensor:
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
            out[first:last] = linear(x[first:last], weight.expert(number))
        return out
    dot, bits, result, codes, scale, rest = (
        DOTS[weight.format],
        _bits(x),
        _bits(out),
        _bits(weight.codes),
        _bits(weight.scale),
        _rest(weight),
    )
    for number, first, last in spans:  # on plain arrays: a small expert is done in less time than torch needs for views
        _dot_arrays(dot, bits[first:last], codes[number], scale[number], rest(number), result[first:last])
    return out


def linear_backward(grad: Tensor, weight: PackedWeight) -> Tensor:
    """Return grad @ weight, `[M, K]` in the dtype of grad, for grad `[M, N]` on the CPU.

    The sum runs over all rows of the weight, so it is dequantised as a whole, for as long as the product takes.
    """
    dtype = _panel_dtype(grad)
    return (grad.to(dtype) @ dequantize(weight, dtype)).to(grad.dtype)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
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
        weight = Int4Weight.laid_out(packed, scale, "torch")
        fast = _seconds(lambda: _torch_operator(x, weight))
    except (RuntimeError, AttributeError):  # this torch has no such operator for this CPU
        return False
    rows = Int4Weight.laid_out(packed, scale, "rows")
    return fast < _seconds(lambda: _panels(x, rows))


def _seconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _can_dot(weight: PackedWeight) -> bool:
    return weight.views and weight.format in DOTS and dot_cpu.supported()


def _dot(x: Tensor, weight: PackedWeight) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0])
    codes, scale = _bits(weight.codes), _bits(weight.scale)
    _dot_arrays(DOTS[weight.format], _bits(x), codes, scale, _rest(weight)(...), _bits(out))
    return out


def _rest(weight: PackedWeight) -> Callable[[Any], tuple[Any, ...]]:
    """Return what a weight has beside codes and scale; of a stack, asked by an expert's number."""
    if weight.whole is None:
        return lambda _: weight.numbers
    whole, divides = weight.whole.numpy(), bool(weight.numbers[0])
    return lambda number: (fp4.block_scales(_LEAST, fp4.TensorScale(float(whole[number]), divides)),)


_LEAST = np.arange(16, dtype=np.uint8)


def _dot_arrays(
    dot: Dot, x: NDArray[Any], codes: NDArray[Any], scale: NDArray[Any], rest: tuple[Any, ...], out: NDArray[Any]
) -> None:
    """Write x @ weight.T into `out`, on several threads if the weight is large enough."""
    rows = out.shape[1]
    if rows * x.shape[1] < ALONE:
        dot.work(x, codes, scale, *rest, out)(0, rows)
        return
    whole = dot.task(x, codes, scale, *rest, out)
    if not without_lock(whole.entry, whole.parameters.ctypes.data):
        over_rows(rows, dot_cpu.rows_together(len(x)), dot.work(x, codes, scale, *rest, out))


def _torch_operator(x: Tensor, weight: PackedWeight) -> Tensor:
    product = torch.ops.aten._weight_int4pack_mm_for_cpu  # noqa: SLF001 - it has no public name
    return cast("Tensor", product(x, weight.codes, GROUP, weight.scale))


def _panels(x: Tensor, weight: PackedWeight) -> Tensor:
    dtype = _panel_dtype(x)
    wide = x.to(dtype)
    out = x.new_empty(x.shape[0], weight.shape[0])
    for first, last in _panel_rows(weight):
        out[:, first:last] = wide @ _panel(weight, first, last, dtype).T
    return out


def _panel_rows(weight: PackedWeight) -> list[tuple[int, int]]:
    rows = weight.shape[0]
    return [(first, min(first + PANEL_ROWS, rows)) for first in range(0, rows, PANEL_ROWS)]


def _panel_dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype == torch.bfloat16 and _multiplies_bf16() else torch.float32


def _panel(weight: PackedWeight, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Return rows first..last of a weight, each number rounded once to BF16, or not at all to float32."""
    make = PANELS.get((weight.format, weight.layout))
    return make(weight, first, last, dtype) if make else weight.rows(first, last).dequantize(dtype)


def _int4_panel(weight: PackedWeight, first: int, last: int, dtype: torch.dtype) -> Tensor:
    packed, scale = weight.codes[first:last], weight.scale[first:last]
    panel = torch.empty(last - first, weight.shape[1], dtype=dtype)
    if dtype == torch.bfloat16:
        words, wide, bits = packed.numpy(), scale.float().numpy(), _bits(panel)
        over_rows(last - first, 16, lambda a, b: codec.decode(words[a:b], wide[a:b], GROUP, bits[a:b]))
    else:
        pairs, narrow, floats = packed.view(torch.uint8).numpy(), _bits(scale), panel.numpy()
        over_rows(last - first, 16, lambda a, b: panels_cpu.int4_to_float(pairs[a:b], narrow[a:b], floats[a:b]))
    return panel


def _fp8_panel(weight: PackedWeight, first: int, last: int, dtype: torch.dtype) -> Tensor:
    codes, scale = _bits(weight.codes), _bits(weight.scale)
    panel = torch.empty(last - first, weight.shape[1])
    floats, (height, width) = panel.numpy(), weight.block
    over_rows(
        last - first,
        16,
        lambda a, b: panels_cpu.fp8_to_float(
            codes[first + a : first + b], scale, height, width, first + a, floats[a:b]
        ),
    )
    return panel.to(dtype)


def _nvfp4_panel(weight: PackedWeight, first: int, last: int, dtype: torch.dtype) -> Tensor:
    if weight.whole is None:
        raise AssertionError("NVFP4 without a tensor scale")
    tensor = fp4.TensorScale(float(weight.whole), bool(weight.numbers[0]))

    def decode(codes: U8, scale: U8, out: U16) -> None:
        nvfp4.decode(codes, scale, tensor, out)

    return _fp4_panel(weight, first, last, dtype, decode, fp4.block_scales(_BYTES, tensor))


def _mxfp4_panel(weight: PackedWeight, first: int, last: int, dtype: torch.dtype) -> Tensor:
    return _fp4_panel(weight, first, last, dtype, mxfp4.decode, e8m0_to_float(_BYTES))


_BYTES = np.arange(256, dtype=np.uint8)
_E2M1 = np.array([*fp4.E2M1, *(-number for number in fp4.E2M1)], np.float32)


def _fp4_panel(
    weight: PackedWeight,
    first: int,
    last: int,
    dtype: torch.dtype,
    decode: Callable[[U8, U8, U16], None],
    scales: F32,
) -> Tensor:
    """Make a panel as BF16 by a codec, or as float32 by what a code counts at each scale."""
    codes, scale = weight.codes[first:last].numpy(), weight.scale[first:last].numpy()
    panel = torch.empty(last - first, weight.shape[1], dtype=dtype)
    if dtype == torch.bfloat16:
        bits = _bits(panel)
        over_rows(last - first, 16, lambda a, b: decode(codes[a:b], scale[a:b], bits[a:b]))
    else:
        floats, numbers = panel.numpy(), _E2M1
        over_rows(
            last - first,
            16,
            lambda a, b: panels_cpu.fp4_to_float(codes[a:b], scale[a:b], numbers, scales, floats[a:b]),
        )
    return panel


def _torch_panel(weight: PackedWeight, first: int, last: int, dtype: torch.dtype) -> Tensor:
    half, columns = torch_half(), weight.shape[1]
    part = weight.rows(first, last)
    if half is None or (last - first) % (2 * half):
        return part.dequantize(torch.float32).to(dtype)
    codes = part.codes.reshape(-1, columns, half).numpy()
    scale = _bits(part.scale[..., 0].reshape(columns // GROUP, -1, 2, half).contiguous())
    panel = torch.empty(codes.shape[0], columns, 2, half)
    floats = panel.numpy()
    over_rows(len(codes), 1, lambda a, b: panels_cpu.torch_to_float(codes[a:b], scale[:, a:b].copy(), floats[a:b]))
    return panel.permute(0, 2, 3, 1).reshape(last - first, columns).to(dtype)


PANELS: dict[tuple[str, Layout], Callable[[PackedWeight, int, int, torch.dtype], Tensor]] = {
    ("int4", "rows"): _int4_panel,
    ("int4", "torch"): _torch_panel,
    ("fp8", "rows"): _fp8_panel,
    ("nvfp4", "rows"): _nvfp4_panel,
    ("mxfp4", "rows"): _mxfp4_panel,
}
"""How a panel is made by format and layout; without an entry, by torch."""


def _bits(tensor: Tensor) -> NDArray[Any]:
    """Return a CPU tensor as a numpy view: its bits, where numpy does not know the dtype."""
    plain = _PLAIN.get(tensor.dtype)
    return tensor.numpy() if plain is None else tensor.view(plain).numpy()


_PLAIN = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}


@lru_cache(maxsize=1)
def _multiplies_bf16() -> bool:
    """Return whether this CPU multiplies BF16 matrices faster than float32 ones, found by trying."""
    x, weight = torch.rand(64, 1024), torch.rand(512, 1024)
    narrow_x, narrow_weight = x.bfloat16(), weight.bfloat16()
    return _seconds(lambda: narrow_x @ narrow_weight.T) < _seconds(lambda: x @ weight.T)
