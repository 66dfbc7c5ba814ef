"""What a BF16, block-FP8 or INT4 weight is on disk: suffixes, dtypes, shapes and how its rows lie.

A weight is one matrix `[N, K]`, N output rows by K input columns. A format stores it as one tensor that carries the
values and, beside it, partners: scales and, for INT4, the shape. Source of the layouts: the headers and configs of
moonshotai/Kimi-K2-Instruct (FP8) and moonshotai/Kimi-K2.5 (INT4).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

from k2quant.errors import ShapeMismatch
from k2quant.formats.dtypes import TensorSpec
from k2quant.kernels.codecs.grids import Grid

FormatName = Literal["bf16", "fp8", "int4"]

FP8_BLOCK = (128, 128)
"""Rows and columns that share one FP8 scale in every K2 and DeepSeek-V3 release (`weight_block_size`)."""

INT4_GROUP = 32
"""Columns that share one INT4 scale in every K2 release (`group_size`)."""

PARTNER_SUFFIXES = frozenset({"weight_scale_inv", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"})
"""Suffixes of tensors that mean nothing without the weight they belong to."""


def ceil_div(count: int, size: int) -> int:
    """Return how many pieces of `size` cover `count`."""
    return -(-count // size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bf16:
    """A weight stored as it is. Sources may hold F16 or F32, which are read as BF16; output is BF16."""

    name: ClassVar[FormatName] = "bf16"
    main: ClassVar[str] = "weight"

    dtype: str = "BF16"
    """BF16, or F16 or F32 in a source."""

    def state(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Return the tensors of a weight of this shape, by suffix."""
        return {"weight": TensorSpec(self.dtype, shape)}

    def rows(self, suffix: str, start: int, stop: int) -> tuple[int, int]:  # noqa: ARG002  one signature for all formats
        """Return the rows of a tensor that belong to rows `start` to `stop` of the weight."""
        return start, stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """Float8 E4M3 codes with a float32 scale for each block. The scale multiplies, though its name says `inv`."""

    name: ClassVar[FormatName] = "fp8"
    main: ClassVar[str] = "weight"

    block: tuple[int, int] = FP8_BLOCK
    """Rows and columns that share one scale. Blocks at the edges may be cut off: `kv_a_proj_with_mqa` has 576 rows."""

    def state(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Return the tensors of a weight of this shape, by suffix."""
        blocks = tuple(ceil_div(size, step) for size, step in zip(shape, self.block, strict=True))
        return {"weight": TensorSpec("F8_E4M3", shape), "weight_scale_inv": TensorSpec("F32", blocks)}

    def rows(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        """Return the rows of a tensor that belong to rows `start` to `stop` of the weight.

        `start` is a multiple of the block's rows, and so is `stop` unless it is the last row.
        """
        if suffix == "weight":
            return start, stop
        return start // self.block[0], ceil_div(stop, self.block[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4:
    """Four-bit codes, eight to an int32 with the lowest column in the lowest nibble, and a scale for each group."""

    name: ClassVar[FormatName] = "int4"
    main: ClassVar[str] = "weight_packed"

    group: int = INT4_GROUP
    """Columns that share one scale."""
    grid: Grid = "moonshot"
    """How a weight is rounded when it is written. It does not matter for reading."""
    scale_dtype: str = "BF16"
    """BF16 as Moonshot writes it; sources of other tools may hold F16 or F32."""
    shape_dtype: str = "I32"
    """I32 as Moonshot writes it; compressed-tensors writes I64."""

    def state(self, shape: tuple[int, ...], *, name: str = "weight") -> dict[str, TensorSpec]:
        """Return the tensors of a weight of this shape, by suffix.

        Raises:
            ShapeMismatch: the group does not divide the width.
        """
        rows, width = shape
        if width % self.group or width % 8:
            raise ShapeMismatch(
                "this width cannot be INT4",
                tensor=name,
                expected=f"a width that {self.group} divides",
                found=shape,
                remedy="keep it out of the conversion with --ignore",
            )
        return {
            "weight_packed": TensorSpec("I32", (rows, width // 8)),
            "weight_scale": TensorSpec(self.scale_dtype, (rows, width // self.group)),
            "weight_shape": TensorSpec(self.shape_dtype, (2,)),
        }

    def rows(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        """Return the rows of a tensor that belong to rows `start` to `stop` of the weight; `weight_shape` has two."""
        return (0, 2) if suffix == "weight_shape" else (start, stop)


Format = Bf16 | Fp8 | Int4


def row_bytes(spec: TensorSpec) -> int:
    """Return the bytes of one row (one step along the first dimension) of a tensor."""
    return TensorSpec(spec.dtype, spec.shape[1:]).nbytes


def weight_count(shape: tuple[int, ...]) -> int:
    """Return the number of weights in a shape."""
    return prod(shape)
