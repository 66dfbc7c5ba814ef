"""MXFP4 weights as the products read them: the checkpoint's own layout, everywhere.

E2M1 codes, two a byte, the even column in the low nibble, `[N, K/2]`, with a byte b for each 32 columns, `[N, K/32]`,
which stands for the scale 2^(b - 127).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.fp4 import MXFP4_BLOCK, NAN_E8M0
from k2quant.kernels.products.packed.fp4 import check_codes, values
from k2quant.kernels.products.packed.weight import Layout, check_parts, check_rows
from k2quant.kernels.products.tables.configs import Product


@dataclass(frozen=True, slots=True, eq=False)
class Mxfp4Weight:
    """An MXFP4 weight, or a stack of those of all experts. Made by `prepare_mxfp4`; always in the layout `rows`."""

    codes: Tensor
    scale: Tensor
    """uint8 `[.., N, K/32]`."""

    format: ClassVar[str] = "mxfp4"
    layout: ClassVar[Layout] = "rows"
    layouts: ClassVar[tuple[Layout, ...]] = ("rows",)
    gpu_layout: ClassVar[Layout] = "rows"
    products: ClassVar[tuple[Product, ...]] = ("linear", "gate_up", "down")
    tile_in_block: ClassVar[bool] = False
    tile_bytes: ClassVar[float] = 0.5 + 1 / MXFP4_BLOCK
    block: ClassVar[tuple[int, int]] = (1, MXFP4_BLOCK)
    numbers: ClassVar[tuple[int, ...]] = ()
    whole: ClassVar[None] = None
    views: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        """`(N, K)`, or `(E, N, K)` for experts."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes that codes and scales take."""
        return self.codes.nbytes + self.scale.nbytes

    @property
    def bits(self) -> Tensor:
        """The codes: they are whole numbers."""
        return self.codes

    @classmethod
    def of(
        cls,
        bits: Tensor,
        scale: Tensor,
        layout: Layout,  # noqa: ARG003 - rows
        numbers: tuple[int, ...],  # noqa: ARG003 - it has none
        whole: Tensor | None = None,  # noqa: ARG003 - likewise
    ) -> Self:
        """Return the weight of these tensors, unchecked."""
        return cls(bits, scale)

    @classmethod
    def laid_out(
        cls,
        codes: Tensor,
        scale: Tensor,
        layout: Layout = "rows",
        numbers: tuple[int, ...] = (),  # noqa: ARG003 - it has none
        whole: Tensor | None = None,  # noqa: ARG003 - likewise
    ) -> Self:
        """Check codes and scales as a checkpoint holds them, and keep them as they are.

        Raises:
            UsageError: dtype, shape or device do not fit, or a scale is NaN.
        """
        check_rows(layout)
        check_codes(codes, scale, MXFP4_BLOCK, (torch.uint8,))
        if scale.numel() and int(scale.amax()) == NAN_E8M0:
            raise UsageError("weight_scale: found a NaN scale, the byte 255; was the file damaged?")
        return cls(codes.contiguous(), scale.contiguous())

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        layout: Layout = "rows",
        numbers: tuple[int, ...] = (),  # noqa: ARG003 - it has none
        *,
        device: torch.device | str,
    ) -> Self:
        """Return a weight `[N, K]` or `[E, N, K]` with whatever content."""
        check_rows(layout)
        *stack, rows, columns = shape
        return cls(
            torch.empty(*stack, rows, columns // 2, dtype=torch.uint8, device=device),
            torch.empty(*stack, rows, columns // MXFP4_BLOCK, dtype=torch.uint8, device=device),
        )

    def check(self) -> None:
        """Raise UsageError unless codes and scales fit each other, as those of `prepare_mxfp4` do."""
        shape = tuple(self.codes.shape)
        scales = (*shape[:-1], shape[-1] * 2 // MXFP4_BLOCK)
        check_parts(self.codes, self.scale, (torch.uint8, torch.uint8), scales)

    def checkpoint(self) -> tuple[Tensor, ...]:
        """Return codes and scales as they were given to `prepare_mxfp4`, bit for bit."""
        return self.codes, self.scale

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return the weights `[.., N, K]`, each exact, or rounded once to `dtype` where that cannot hold it."""
        powers = reference.e8m0_powers(self.scale)
        return (values(self.codes) * powers.repeat_interleave(MXFP4_BLOCK, -1)).to(dtype)

    def expert(self, number: int) -> Self:
        """Return one expert's weight of a stack, as views."""
        return self.holding(self.codes[number], self.scale[number])

    def rows(self, first: int, last: int) -> Self:
        """Return rows first..last as views."""
        return self.holding(self.codes[..., first:last, :], self.scale[..., first:last, :])

    def holding(self, codes: Tensor, scale: Tensor, whole: Tensor | None = None) -> Self:  # noqa: ARG002 - it has none
        """Return a weight with other tensors, unchecked."""
        return type(self)(codes, scale)

    def prepared(self, codes: Tensor, scale: Tensor, whole: Tensor | None = None) -> Self:
        """Do `laid_out`."""
        return self.laid_out(codes, scale, whole=whole)

    def empty_like(self, device: torch.device | str) -> Self:
        """Return a weight of the same shape on a device, with whatever content."""
        return self.empty(self.shape, device=device)
