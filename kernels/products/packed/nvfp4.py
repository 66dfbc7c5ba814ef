"""NVFP4 weights as the products read them: the checkpoint's own layout, everywhere.

E2M1 codes, two a byte, the even column in the low nibble, `[N, K/2]`; the bits of an E4M3 scale for each 16 columns,
`[N, K/16]`; and one float32 for the whole matrix, which multiplies the scales (ModelOpt) or divides them
(compressed-tensors). A code counts S = scale * whole, or scale / whole, rounded to float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels.codecs.fp4 import NAN_E4M3, NVFP4_BLOCK
from k2quant.kernels.products.packed.fp4 import check_codes, values
from k2quant.kernels.products.packed.weight import Layout, check_device, check_parts, check_rows
from k2quant.kernels.products.tables.configs import Product


@dataclass(frozen=True, slots=True, eq=False)
class Nvfp4Weight:
    """An NVFP4 weight, or a stack of those of all experts. Made by `prepare_nvfp4`; always in the layout `rows`."""

    codes: Tensor
    scale: Tensor
    """uint8 `[.., N, K/16]`: the bits of float8_e4m3fn."""
    whole: Tensor
    """float32 `[]`, or `[E]` for experts."""
    divides: bool
    """Whether `whole` divides the scales, as compressed-tensors has it, or multiplies them, as ModelOpt does."""

    format: ClassVar[str] = "nvfp4"
    layout: ClassVar[Layout] = "rows"
    layouts: ClassVar[tuple[Layout, ...]] = ("rows",)
    gpu_layout: ClassVar[Layout] = "rows"
    products: ClassVar[tuple[Product, ...]] = ("linear", "gate_up", "down")
    tile_in_block: ClassVar[bool] = False
    tile_bytes: ClassVar[float] = 0.5 + 1 / NVFP4_BLOCK
    block: ClassVar[tuple[int, int]] = (1, NVFP4_BLOCK)
    views: ClassVar[bool] = True

    @property
    def numbers(self) -> tuple[int, ...]:
        """Whether `whole` divides, 1 or 0."""
        return (int(self.divides),)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(N, K)`, or `(E, N, K)` for experts."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes that codes and scales take."""
        return self.codes.nbytes + self.scale.nbytes + self.whole.nbytes

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
        numbers: tuple[int, ...],
        whole: Tensor | None = None,
    ) -> Self:
        """Return the weight of these tensors and numbers, unchecked."""
        return cls(bits, scale, _there(whole), bool(numbers[0]))

    @classmethod
    def laid_out(
        cls,
        codes: Tensor,
        scale: Tensor,
        layout: Layout = "rows",
        numbers: tuple[int, ...] = (0,),
        whole: Tensor | None = None,
    ) -> Self:
        """Check codes, scales and the tensor scale as a checkpoint holds them, and keep them as they are.

        Raises:
            UsageError: dtype, shape or device do not fit, a scale is negative or NaN, or the tensor scale is no scale.
        """
        divides = bool((numbers or (0,))[0])
        check_rows(layout)
        check_codes(codes, scale, NVFP4_BLOCK, (torch.float8_e4m3fn, torch.uint8))
        bits, whole = scale.contiguous().view(torch.uint8), _there(whole)
        if bits.numel() and int(bits.amax()) >= NAN_E4M3:
            raise UsageError("weight_scale: found a negative or NaN scale; was the file damaged?")
        _check_whole(codes, whole, divides=divides)
        return cls(codes.contiguous(), bits, whole.reshape(codes.shape[:-2]).contiguous(), divides)

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        layout: Layout = "rows",
        numbers: tuple[int, ...] = (0,),
        *,
        device: torch.device | str,
    ) -> Self:
        """Return a weight `[N, K]` or `[E, N, K]` with whatever content; without numbers its scale multiplies."""
        check_rows(layout)
        *stack, rows, columns = shape
        return cls(
            torch.empty(*stack, rows, columns // 2, dtype=torch.uint8, device=device),
            torch.empty(*stack, rows, columns // NVFP4_BLOCK, dtype=torch.uint8, device=device),
            torch.empty(stack, dtype=torch.float32, device=device),
            bool((numbers or (0,))[0]),
        )

    def check(self) -> None:
        """Raise UsageError unless codes and scales fit each other, as those of `prepare_nvfp4` do."""
        shape = tuple(self.codes.shape)
        scales = (*shape[:-1], shape[-1] * 2 // NVFP4_BLOCK)
        check_parts(self.codes, self.scale, (torch.uint8, torch.uint8), scales)
        if tuple(self.whole.shape) != shape[:-2] or self.whole.dtype != torch.float32:
            raise UsageError(
                f"weight: expected float32 {list(shape[:-2])} tensor scales, found {self.whole.dtype} "
                f"{list(self.whole.shape)}"
            )
        check_device(self.codes, self.whole)

    def checkpoint(self) -> tuple[Tensor, ...]:
        """Return codes, scales and the tensor scale as they were given to `prepare_nvfp4`, bit for bit."""
        return self.codes, self.scale.view(torch.float8_e4m3fn), self.whole

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return the weights `[.., N, K]`: the float32 product code * S, rounded to `dtype`."""
        scale, whole = self.scale.view(torch.float8_e4m3fn).float(), self.whole[..., None, None]
        spread = scale / whole if self.divides else scale * whole
        return (values(self.codes) * spread.repeat_interleave(NVFP4_BLOCK, -1)).to(dtype)

    def expert(self, number: int) -> Self:
        """Return one expert's weight of a stack, as views."""
        return self.holding(self.codes[number], self.scale[number], self.whole[number])

    def rows(self, first: int, last: int) -> Self:
        """Return rows first..last as views."""
        return self.holding(self.codes[..., first:last, :], self.scale[..., first:last, :], self.whole)

    def holding(self, codes: Tensor, scale: Tensor, whole: Tensor | None = None) -> Self:
        """Return a weight with other tensors of the same kind, unchecked."""
        return type(self)(codes, scale, _there(whole), self.divides)

    def prepared(self, codes: Tensor, scale: Tensor, whole: Tensor | None = None) -> Self:
        """Do `laid_out` with a tensor scale of this kind."""
        return self.laid_out(codes, scale, numbers=self.numbers, whole=whole)

    def empty_like(self, device: torch.device | str) -> Self:
        """Return a weight of the same shape on a device, with whatever content."""
        return self.empty(self.shape, numbers=self.numbers, device=device)


def _there(whole: Tensor | None) -> Tensor:
    if whole is None:
        raise UsageError("an NVFP4 weight has a tensor scale beside its codes and block scales; found none")
    return whole


def _check_whole(codes: Tensor, whole: Tensor, *, divides: bool) -> None:
    count = codes.shape[:-2].numel()
    if whole.dtype != torch.float32 or whole.numel() != count or (count > 1 and whole.shape[0] != count):
        wanted = "one number" if codes.ndim == 2 else f"[{count}]"
        raise UsageError(f"tensor scale: expected float32, {wanted}, found {whole.dtype} {list(whole.shape)}")
    check_device(codes, whole)
    if not (whole.isfinite() & ~whole.signbit()).all() or (divides and not whole.all()):
        raise UsageError("tensor scale: found one that is negative, NaN, infinite or divides by zero; damaged?")
