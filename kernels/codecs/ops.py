"""The codecs as torch operators on tensors, and fake quantisation.

The bits are those of a conversion, on every device: on a CPU the codecs of a conversion run on views of the tensors, on
a GPU the Triton kernels, one launch each. On a GPU nothing waits for the device, so a value that no codec can carry
(NaN, infinity, a negative scale) gives undefined codes there; on a CPU it raises `values.ValueAt`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.library import custom_op

from k2quant.errors import UsageError
from k2quant.kernels.codecs import cpu as codecs_cpu
from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.grids import FAKE_BITS, PACKED_BITS, Grid, largest_code
from k2quant.kernels.codecs.values import ValueAt
from k2quant.kernels.devices.threads import over_rows
from k2quant.kernels.products import dispatch
from k2quant.kernels.products.linear import as_bytes, as_codes
from k2quant.kernels.products.weights import GROUP

Pair = tuple[Tensor, Tensor]
BLOCK = (128, 128)
E4M3 = torch.float8_e4m3fn


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
    _expect_grid(grid, bits, PACKED_BITS)
    _expect(weights, "weights", torch.bfloat16, multiple=GROUP)
    return cast("Pair", torch.ops.k2quant.bf16_to_int4(weights, grid, recover, bits))


def int4_to_bf16(packed: Tensor, scale: Tensor) -> Tensor:
    """Decode int32 words `[R, K/8]` with BF16 scales `[R, K/32]` to BF16 `[R, K]`."""
    _expect_int4(packed, scale)
    return cast("Tensor", torch.ops.k2quant.int4_to_bf16(packed, scale))


def bf16_to_fp8(weights: Tensor, block: tuple[int, int] = BLOCK) -> Pair:
    """Encode BF16 `[R, K]` as e4m3 codes `[R, K]` with float32 scales `[ceil(R/block[0]), ceil(K/block[1])]`."""
    _expect_block(block)
    _expect(weights, "weights", torch.bfloat16)
    codes, scale = torch.ops.k2quant.bf16_to_fp8(weights, *block)
    return as_codes(codes), scale


def fp8_to_bf16(codes: Tensor, scale: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """Decode e4m3 codes `[R, K]` with float32 scales `[ceil(R/block[0]), ceil(K/block[1])]` to BF16 `[R, K]`."""
    _expect_fp8(codes, scale, block)
    return cast("Tensor", torch.ops.k2quant.fp8_to_bf16(as_bytes(codes), scale, *block))


def fp8_to_int4(codes: Tensor, scale: Tensor, block: tuple[int, int] = BLOCK, grid: Grid = "moonshot") -> Pair:
    """Do `fp8_to_bf16` and `bf16_to_int4` without writing BF16."""
    _expect_grid(grid)
    _expect_fp8(codes, scale, block)
    _expect(codes, "codes", E4M3, multiple=GROUP)
    return cast("Pair", torch.ops.k2quant.fp8_to_int4(as_bytes(codes), scale, *block, grid))


def int4_to_fp8(packed: Tensor, scale: Tensor, block: tuple[int, int] = BLOCK) -> Pair:
    """Do `int4_to_bf16` and `bf16_to_fp8` without writing BF16."""
    _expect_block(block)
    _expect_int4(packed, scale)
    codes, out_scale = torch.ops.k2quant.int4_to_fp8(packed, scale, *block)
    return as_codes(codes), out_scale


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
    _expect_grid(grid, bits, FAKE_BITS)
    _expect(weights, "weights", torch.bfloat16, multiple=GROUP)
    return cast("Tensor", torch.ops.k2quant.fake_quantize_int4(weights, grid, bits))


def fake_quantize_fp8(weights: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """Round BF16 `[R, K]` to block FP8 and back, in one pass. It has no gradient either."""
    _expect_block(block)
    _expect(weights, "weights", torch.bfloat16)
    return cast("Tensor", torch.ops.k2quant.fake_quantize_fp8(weights, *block))


def _expect(tensor: Tensor, name: str, dtype: torch.dtype, multiple: int = 1) -> None:
    if tensor.dtype != dtype or tensor.ndim != 2:
        raise UsageError(f"{name}: expected {dtype} [R, K], found {tensor.dtype} {list(tensor.shape)}")
    if tensor.shape[1] == 0:
        raise UsageError(f"{name}: expected at least one column, found {list(tensor.shape)}")
    if tensor.shape[1] % multiple:
        raise UsageError(f"{name}: expected a multiple of {multiple} columns, found {tensor.shape[1]}")


def _expect_int4(packed: Tensor, scale: Tensor) -> None:
    _expect(packed, "packed", torch.int32, multiple=GROUP // 8)
    _expect(scale, "scale", torch.bfloat16)
    _expect_shape(packed, scale, (packed.shape[0], packed.shape[1] * 8 // GROUP), f"packed {list(packed.shape)}")


def _expect_fp8(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
    _expect_block(block)
    _expect(codes, "codes", E4M3)
    _expect(scale, "scale", torch.float32)
    _expect_shape(codes, scale, _blocks(codes, block), f"codes {list(codes.shape)} in blocks of {block[0]}x{block[1]}")


def _expect_grid(grid: Grid, bits: int = 4, known: tuple[int, ...] = PACKED_BITS) -> None:
    if grid not in get_args(Grid):
        raise UsageError(f"grid: expected {' or '.join(get_args(Grid))}, found {grid}")
    largest_code(grid, bits, known)


def _expect_block(block: tuple[int, int]) -> None:
    if not (isinstance(block, tuple) and len(block) == 2 and min(block) > 0):
        raise UsageError(f"block: expected its rows and columns, such as (128, 128), found {block}")


def _expect_shape(codes: Tensor, scale: Tensor, shape: tuple[int, ...], what: str) -> None:
    if scale.device != codes.device:
        raise UsageError(f"codes lie on {codes.device} but their scale on {scale.device}; put both on one device")
    if tuple(scale.shape) != shape:
        raise UsageError(f"scale: expected {list(shape)} for {what}, found {list(scale.shape)}")


def _blocks(matrix: Tensor, block: tuple[int, int]) -> tuple[int, int]:
    return -(-matrix.shape[0] // block[0]), -(-matrix.shape[1] // block[1])


def _over_rows(rows: int, height: int, work: Callable[[int, int], object]) -> None:
    """Share rows out among threads, in multiples of a block's height; an error counts rows from the first."""

    def located(first: int, last: int) -> None:
        try:
            work(first, last)
        except ValueAt as error:
            row = error.row + (first if error.of == "weight" else first // height)
            raise ValueAt(row=row, column=error.column, what=error.what, of=error.of) from None

    over_rows(rows, height, located)


def _bits(tensor: Tensor) -> NDArray[Any]:
    """Return a CPU tensor's bits as a numpy view, of the types that the codecs take."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _wide(scale: Tensor) -> NDArray[np.float32]:
    return cast("NDArray[np.float32]", scale.float().contiguous().numpy())


def _new_int4(weights: Tensor) -> Pair:
    rows, columns = weights.shape
    return (
        weights.new_empty(rows, columns // 8, dtype=torch.int32),
        weights.new_empty(rows, columns // GROUP, dtype=torch.bfloat16),
    )


def _new_fp8(weights: Tensor, block: tuple[int, int]) -> Pair:
    return weights.new_empty(weights.shape, dtype=torch.uint8), weights.new_empty(
        _blocks(weights, block), dtype=torch.float32
    )


def _stored(encoded: tuple[Tensor, Tensor, Any]) -> Pair:
    return as_bytes(encoded[0]), encoded[1]


def _new_bf16(codes: Tensor, columns: int) -> Tensor:
    return codes.new_empty(codes.shape[0], columns, dtype=torch.bfloat16)


@custom_op("k2quant::bf16_to_int4", mutates_args=())
def _bf16_to_int4(weights: Tensor, grid: str, recover: bool, bits: int = 4) -> tuple[Tensor, Tensor]:  # noqa: FBT001 - an operator's schema
    rule = cast("Grid", grid)
    if dispatch.on_triton(weights):
        from k2quant.kernels.codecs.gpu import int4 as int4_codecs_triton

        return int4_codecs_triton.bf16_to_int4(weights, rule, recover=recover, bits=bits)[:2]
    if weights.device.type != "cpu":
        return reference.bf16_to_int4(weights, rule, recover=recover, bits=bits)[:2]
    packed, scale = _new_int4(weights)
    source, words, factors = _bits(weights), _bits(packed), _bits(scale)
    _over_rows(
        len(source),
        1,
        lambda a, b: codecs_cpu.bf16_to_int4(source[a:b], rule, words[a:b], factors[a:b], recover=recover, bits=bits),
    )
    return packed, scale


@custom_op("k2quant::int4_to_bf16", mutates_args=())
def _int4_to_bf16(packed: Tensor, scale: Tensor) -> Tensor:
    if dispatch.on_triton(packed):
        from k2quant.kernels.codecs.gpu import int4 as int4_codecs_triton

        return int4_codecs_triton.int4_to_bf16(packed, scale)
    if packed.device.type != "cpu":
        return reference.int4_to_bf16(packed, scale.float(), GROUP)
    out = _new_bf16(packed, packed.shape[1] * 8)
    words, factors, bits = _bits(packed), _wide(scale), _bits(out)
    _over_rows(len(words), 1, lambda a, b: codecs_cpu.int4_to_bf16(words[a:b], factors[a:b], GROUP, bits[a:b]))
    return out


@custom_op("k2quant::bf16_to_fp8", mutates_args=())
def _bf16_to_fp8(weights: Tensor, block_rows: int, block_columns: int) -> tuple[Tensor, Tensor]:
    block = block_rows, block_columns
    if dispatch.on_triton(weights):
        from k2quant.kernels.codecs.gpu import fp8 as fp8_codecs_triton

        return _stored(fp8_codecs_triton.bf16_to_fp8(weights, block))
    if weights.device.type != "cpu":
        return _stored(reference.bf16_to_fp8(weights, block))
    codes, scale = _new_fp8(weights, block)
    source, out, factors = _bits(weights), _bits(codes), _bits(scale)
    _over_rows(
        len(source),
        block_rows,
        lambda a, b: codecs_cpu.bf16_to_fp8(source[a:b], block, out[a:b], _part(factors, a, b, block_rows)),
    )
    return codes, scale


@custom_op("k2quant::fp8_to_bf16", mutates_args=())
def _fp8_to_bf16(codes: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Tensor:
    block = block_rows, block_columns
    if dispatch.on_triton(codes):
        from k2quant.kernels.codecs.gpu import fp8 as fp8_codecs_triton

        return fp8_codecs_triton.fp8_to_bf16(as_codes(codes), scale, block)
    if codes.device.type != "cpu":
        return reference.fp8_to_bf16(as_codes(codes), scale, block)
    out = _new_bf16(codes, codes.shape[1])
    source, factors, bits = _bits(codes), _wide(scale), _bits(out)
    _over_rows(
        len(source),
        block_rows,
        lambda a, b: codecs_cpu.fp8_to_bf16(source[a:b], _part(factors, a, b, block_rows), block, bits[a:b]),
    )
    return out


@custom_op("k2quant::fp8_to_int4", mutates_args=())
def _fp8_to_int4(codes: Tensor, scale: Tensor, block_rows: int, block_columns: int, grid: str) -> tuple[Tensor, Tensor]:
    block, rule = (block_rows, block_columns), cast("Grid", grid)
    if dispatch.on_triton(codes):
        from k2quant.kernels.codecs.gpu import int4 as int4_codecs_triton

        return int4_codecs_triton.fp8_to_int4(as_codes(codes), scale, block, rule)[:2]
    if codes.device.type != "cpu":
        return reference.fp8_to_int4(as_codes(codes), scale, block, rule)[:2]
    packed, out_scale = _new_int4(codes)
    source, factors, words, narrow = _bits(codes), _wide(scale), _bits(packed), _bits(out_scale)
    _over_rows(
        len(source),
        block_rows,
        lambda a, b: codecs_cpu.fp8_to_int4(
            source[a:b], _part(factors, a, b, block_rows), block, rule, words[a:b], narrow[a:b]
        ),
    )
    return packed, out_scale


@custom_op("k2quant::int4_to_fp8", mutates_args=())
def _int4_to_fp8(packed: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> tuple[Tensor, Tensor]:
    block = block_rows, block_columns
    if dispatch.on_triton(packed):
        from k2quant.kernels.codecs.gpu import fp8 as fp8_codecs_triton

        return _stored(fp8_codecs_triton.int4_to_fp8(packed, scale, block=block))
    if packed.device.type != "cpu":
        return _stored(reference.int4_to_fp8(packed, scale.float(), GROUP, block))
    codes, out_scale = _new_fp8(_new_bf16(packed, packed.shape[1] * 8), block)
    words, wide, out, factors = _bits(packed), _wide(scale), _bits(codes), _bits(out_scale)
    _over_rows(
        len(words),
        block_rows,
        lambda a, b: codecs_cpu.int4_to_fp8(
            words[a:b], wide[a:b], GROUP, block, out[a:b], _part(factors, a, b, block_rows)
        ),
    )
    return codes, out_scale


@custom_op("k2quant::fake_quantize_int4", mutates_args=())
def _fake_quantize_int4(weights: Tensor, grid: str, bits: int = 4) -> Tensor:
    rule = cast("Grid", grid)
    if dispatch.on_triton(weights):
        from k2quant.kernels.codecs.gpu import int4 as int4_codecs_triton

        return int4_codecs_triton.fake_quantize_int4(weights, rule, bits=bits)
    if weights.device.type != "cpu":
        return reference.fake_quantize_int4(weights, rule, bits)
    out = _new_bf16(weights, weights.shape[1])
    source, values = _bits(weights), _bits(out)
    _over_rows(len(source), 1, lambda a, b: codecs_cpu.fake_quantize_int4(source[a:b], rule, values[a:b], bits=bits))
    return out


@custom_op("k2quant::fake_quantize_fp8", mutates_args=())
def _fake_quantize_fp8(weights: Tensor, block_rows: int, block_columns: int) -> Tensor:
    if dispatch.on_triton(weights):
        from k2quant.kernels.codecs.gpu import fp8 as fp8_codecs_triton

        return fp8_codecs_triton.fake_quantize_fp8(weights, (block_rows, block_columns), recover=True)
    return cast("Tensor", _fp8_to_bf16(*_bf16_to_fp8(weights, block_rows, block_columns), block_rows, block_columns))


def _part(scale: NDArray[np.float32], first: int, last: int, block_rows: int) -> NDArray[np.float32]:
    """Return the scales of rows first..last, which begin with a block."""
    return scale[first // block_rows : -(-last // block_rows)]


@_bf16_to_int4.register_fake
def _(weights: Tensor, grid: str, recover: bool, bits: int = 4) -> tuple[Tensor, Tensor]:  # noqa: FBT001 - an operator's schema
    return _new_int4(weights)


@_fp8_to_int4.register_fake
def _(codes: Tensor, scale: Tensor, block_rows: int, block_columns: int, grid: str) -> tuple[Tensor, Tensor]:
    return _new_int4(codes)


@_bf16_to_fp8.register_fake
def _(weights: Tensor, block_rows: int, block_columns: int) -> tuple[Tensor, Tensor]:
    return _new_fp8(weights, (block_rows, block_columns))


@_int4_to_fp8.register_fake
def _(packed: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> tuple[Tensor, Tensor]:
    return _new_fp8(_new_bf16(packed, packed.shape[1] * 8), (block_rows, block_columns))


@_int4_to_bf16.register_fake
def _(packed: Tensor, scale: Tensor) -> Tensor:
    return _new_bf16(packed, packed.shape[1] * 8)


@_fp8_to_bf16.register_fake
def _(codes: Tensor, scale: Tensor, block_rows: int, block_columns: int) -> Tensor:
    return _new_bf16(codes, codes.shape[1])


@_fake_quantize_int4.register_fake
@_fake_quantize_fp8.register_fake
def _(weights: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weights, memory_format=torch.contiguous_format)
