"""Operators between BF16 and INT4, and rounding to INT4 and back."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.library import custom_op

from k2quant.errors import UsageError
from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.cpu import int4 as on_cpu
from k2quant.kernels.codecs.grids import FAKE_BITS, GROUP, PACKED_BITS, Grid
from k2quant.kernels.codecs.ops.checks import expect, expect_grid, expect_int4
from k2quant.kernels.codecs.ops.panels import Pair, new_bf16, new_int4, over_rows
from k2quant.kernels.codecs.views import bits_of, widened
from k2quant.kernels.devices.gpus import on_triton


def bf16_to_int4(weights: Tensor, grid: Grid = "moonshot", *, recover: bool = True, bits: int = 4) -> Pair:
    """Encode BF16 `[R, K]` as INT4; K is a multiple of 32.

    Args:
        weights: BF16 `[R, K]`.
        grid: the rounding rule.
        recover: give a moonshot group that already lies on the grid the scale that gives all its weights. It has an
            effect with 4 bits alone.
        bits: width of the codes, 4, 3 or 2: 3 and 2 put codes -3..3 and -1..1 of the moonshot grid into the nibbles.

    Returns:
        int32 words `[R, K/8]` and BF16 scales `[R, K/32]`; `int4_to_bf16` decodes them, whatever the width.

    Raises:
        UsageError: the weights do not fit, or there is no such width on this grid.
        ValueAt: on a CPU, a weight is not finite, or would not be after decoding.
    """
    expect_grid(grid, bits, PACKED_BITS)
    expect(weights, "weights", torch.bfloat16, multiple=GROUP)
    return cast("Pair", torch.ops.k2quant.bf16_to_int4(weights, grid, recover, bits))


def int4_to_bf16(packed: Tensor, scale: Tensor) -> Tensor:
    """Decode int32 words `[R, K/8]` with BF16 scales `[R, K/32]` to BF16 `[R, K]`."""
    expect_int4(packed, scale)
    return cast("Tensor", torch.ops.k2quant.int4_to_bf16(packed, scale))


def fake_quantize_int4(weights: Tensor, grid: Grid = "moonshot", *, bits: int = 4) -> Tensor:
    """Round BF16 `[R, K]` to the INT4 grid and back, in one pass: what plain rounding, not recovering, decodes to.

    It has no gradient: what takes its place is a matter of training.

    Args:
        weights: BF16 `[R, K]`; K is a multiple of 32.
        grid: the rounding rule.
        bits: width of the codes, 8, 4, 3 or 2; other than 4 on the moonshot grid alone.

    Returns:
        BF16 `[R, K]`.

    Raises:
        UsageError: the weights do not fit, or there is no such width on this grid.
        ValueAt: on a CPU, a weight is not finite, or would not be after decoding.
    """
    expect_grid(grid, bits, FAKE_BITS)
    expect(weights, "weights", torch.bfloat16, multiple=GROUP)
    return cast("Tensor", torch.ops.k2quant.fake_quantize_int4(weights, grid, bits))


def search_int4_scales(
    weights: Tensor,
    importance: Tensor | None = None,
    mean: Tensor | None = None,
    *,
    recover: bool = True,
    bits: int = 4,
) -> Tensor:
    """Choose for each group of the moonshot grid the scale of least error among 16: the plain one and lesser ones.

    Plain rounding of what is decoded at these scales gives them back, and the same codes.

    Args:
        weights: BF16 `[R, K]`; K is a multiple of 32.
        importance: float32 `[K]`, what a squared error in each column weighs, such as E[x^2] of the inputs; finite and
            not negative. Nothing stands for ones.
        mean: float32 `[K]`, E[x] of the inputs, beside their E[x^2]; finite. Nothing stands for zeros.
        recover: leave a group that already lies on the grid the scale that gives all its weights. It has an effect
            with 4 bits alone.
        bits: width of the codes, 4, 3 or 2.

    Returns:
        BF16 `[R, K/32]`.

    Raises:
        UsageError: the weights or the importance do not fit, or there is no such width.
        ValueAt: on a CPU, a weight is not finite; on a GPU such a group gets the scale NaN.
    """
    expect_grid("moonshot", bits, PACKED_BITS)
    expect(weights, "weights", torch.bfloat16, multiple=GROUP)
    for name, known in (("importance", importance), ("mean", mean)):
        if known is not None and known.device != weights.device:
            raise UsageError(f"{name}: expected on {weights.device}, as the weights, found on {known.device}")
    return cast("Tensor", torch.ops.k2quant.search_int4_scales(weights, importance, recover, bits, mean))


@custom_op("k2quant::bf16_to_int4", mutates_args=())
def _bf16_to_int4(weights: Tensor, grid: str, recover: bool, bits: int = 4) -> tuple[Tensor, Tensor]:  # noqa: FBT001 - an operator's schema
    rule = cast("Grid", grid)
    if on_triton(weights):
        from k2quant.kernels.codecs.gpu import int4 as on_gpu

        return on_gpu.bf16_to_int4(weights, rule, recover=recover, bits=bits)[:2]
    if weights.device.type != "cpu":
        return reference.bf16_to_int4(weights, rule, recover=recover, bits=bits)[:2]
    packed, scale = new_int4(weights)
    source, words, factors = bits_of(weights), bits_of(packed), bits_of(scale)
    over_rows(
        len(source),
        1,
        lambda a, b: on_cpu.encode(source[a:b], rule, words[a:b], factors[a:b], recover=recover, bits=bits),
    )
    return packed, scale


@_bf16_to_int4.register_fake
def _(weights: Tensor, grid: str, recover: bool, bits: int = 4) -> tuple[Tensor, Tensor]:  # noqa: FBT001 - an operator's schema
    return new_int4(weights)


@custom_op("k2quant::int4_to_bf16", mutates_args=())
def _int4_to_bf16(packed: Tensor, scale: Tensor) -> Tensor:
    if on_triton(packed):
        from k2quant.kernels.codecs.gpu import int4 as on_gpu

        return on_gpu.int4_to_bf16(packed, scale)
    if packed.device.type != "cpu":
        return reference.int4_to_bf16(packed, scale.float(), GROUP)
    out = new_bf16(packed, packed.shape[1] * 8)
    words, factors, bits = bits_of(packed), widened(scale), bits_of(out)
    over_rows(len(words), 1, lambda a, b: on_cpu.decode(words[a:b], factors[a:b], GROUP, bits[a:b]))
    return out


@_int4_to_bf16.register_fake
def _(packed: Tensor, scale: Tensor) -> Tensor:
    return new_bf16(packed, packed.shape[1] * 8)


@custom_op("k2quant::fake_quantize_int4", mutates_args=())
def _fake_quantize_int4(weights: Tensor, grid: str, bits: int = 4) -> Tensor:
    rule = cast("Grid", grid)
    if on_triton(weights):
        from k2quant.kernels.codecs.gpu import int4 as on_gpu

        return on_gpu.fake_quantize_int4(weights, rule, bits=bits)
    if weights.device.type != "cpu":
        return reference.fake_quantize_int4(weights, rule, bits)
    out = new_bf16(weights, weights.shape[1])
    source, values = bits_of(weights), bits_of(out)
    over_rows(len(source), 1, lambda a, b: on_cpu.fake_quantize(source[a:b], rule, values[a:b], bits=bits))
    return out


@_fake_quantize_int4.register_fake
def _(weights: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weights, memory_format=torch.contiguous_format)


@custom_op("k2quant::search_int4_scales", mutates_args=())
def _search_int4_scales(
    weights: Tensor,
    importance: Tensor | None,
    recover: bool,  # noqa: FBT001 - an operator's schema
    bits: int = 4,
    mean: Tensor | None = None,
) -> Tensor:
    if on_triton(weights):
        from k2quant.kernels.codecs.gpu import search as on_gpu

        return on_gpu.search_int4_scales(weights, importance, mean, recover=recover, bits=bits)
    if weights.device.type != "cpu":
        return reference.searched_int4_scales(weights, importance, mean, recover=recover, bits=bits)
    scale = new_int4(weights)[1]
    source, factors = bits_of(weights), bits_of(scale)
    known, shift = (None if part is None else part.contiguous().numpy() for part in (importance, mean))
    over_rows(
        len(source),
        1,
        lambda a, b: on_cpu.search(source[a:b], known, factors[a:b], mean=shift, bits=bits, recover=recover),
    )
    return scale


@_search_int4_scales.register_fake
def _(
    weights: Tensor,
    importance: Tensor | None,
    recover: bool,  # noqa: FBT001 - an operator's schema
    bits: int = 4,
    mean: Tensor | None = None,
) -> Tensor:
    return new_int4(weights)[1]
