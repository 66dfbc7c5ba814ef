"""What a quantised weight is to the matrix products: its tensors, a layout, and what their format says of them.

A weight keeps its codes and scales in one of a few layouts, each invertible; where a format has one more scale for a
whole matrix, it has that, too. N are rows (outputs), K columns (inputs); a weight of experts has a dimension E in front
of everything. `int4`, `fp8`, `nvfp4` and `mxfp4` beside this file hold one format each;
`prepare` makes weights for a device, and has the table of all formats.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels.codecs import reference
from k2quant.kernels.products.tables.configs import Product

Layout = Literal["rows", "groups", "torch"]
"""`rows` is the checkpoint's own; the others are those of `int4`."""

GROUP = reference.GROUP
"""Columns of a group of INT4; those of a block are a multiple of it."""


class PackedWeight(Protocol):
    """A quantised weight `[N, K]`, or a stack of those of all experts `[E, N, K]`, in the layout of a device."""

    format: ClassVar[str]
    """The name of its format: in tables, operators and kernels."""
    layouts: ClassVar[tuple[Layout, ...]]
    """The layouts that it may have."""
    gpu_layout: ClassVar[Layout]
    """The one that Triton's kernels read."""
    products: ClassVar[tuple[Product, ...]]
    """What can be made of it, as the tables have it."""
    tile_in_block: ClassVar[bool]
    """Whether a kernel's tile must lie in one block, so that its product is scaled instead of its codes."""
    tile_bytes: ClassVar[float]
    """Bytes that a tile takes for each of its weights."""

    @property
    def codes(self) -> Tensor:
        """The codes, as the layout has them."""

    @property
    def scale(self) -> Tensor:
        """The scales, as the layout has them."""

    @property
    def whole(self) -> Tensor | None:
        """The scale of a whole matrix, float32 `[]`, or `[E]` for experts; None where the format has none."""

    @property
    def layout(self) -> Layout:
        """How codes and scales lie in memory."""

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """What its format leaves open: the block of FP8, whether NVFP4's `whole` divides, nothing for INT4."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(N, K)`, or `(E, N, K)` for experts."""

    @property
    def nbytes(self) -> int:
        """Bytes that codes and all scales take."""

    @property
    def bits(self) -> Tensor:
        """The codes as whole numbers, which operators and kernels take; `of` undoes it."""

    @property
    def views(self) -> bool:
        """Whether memory has the checkpoint's own layout, so that `checkpoint` copies nothing."""

    @classmethod
    def of(
        cls, bits: Tensor, scale: Tensor, layout: Layout, numbers: tuple[int, ...], whole: Tensor | None = None
    ) -> Self:
        """Return the weight of `bits`, `scale`, `layout`, `numbers` and `whole`, unchecked."""

    @classmethod
    def laid_out(
        cls,
        codes: Tensor,
        scale: Tensor,
        layout: Layout,
        numbers: tuple[int, ...] = (),
        whole: Tensor | None = None,
    ) -> Self:
        """Check tensors as a checkpoint holds them, and lay them out; no numbers mean Kimi K2's.

        Raises:
            UsageError: they do not fit each other or the layout, or hold what no weight can hold.
        """

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], layout: Layout, numbers: tuple[int, ...] = (), *, device: torch.device | str
    ) -> Self:
        """Return a weight with whatever content; no numbers mean Kimi K2's.

        Raises:
            UsageError: the layout cannot have this shape.
        """

    def check(self) -> None:
        """Raise UsageError unless codes and scale fit each other and the layout, as those of `laid_out` do."""

    def checkpoint(self) -> tuple[Tensor, ...]:
        """Return codes, scale and, where there is one, `whole`, as they were given to `laid_out`, bit for bit."""

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return the weights `[.., N, K]`, each rounded once to `dtype`."""

    def expert(self, number: int) -> Self:
        """Return one expert's weight of a stack, as views."""

    def rows(self, first: int, last: int) -> Self:
        """Return rows first..last, as views where the layout has them together; they need not pass `check`."""

    def holding(self, codes: Tensor, scale: Tensor, whole: Tensor | None = None) -> Self:
        """Return a weight with other tensors in the same layout and with the same numbers, unchecked."""

    def prepared(self, codes: Tensor, scale: Tensor, whole: Tensor | None = None) -> Self:
        """Do `laid_out` with this weight's layout and numbers."""

    def empty_like(self, device: torch.device | str) -> Self:
        """Return a weight of the same shape and layout on a device, with whatever content."""


def check_rows(layout: str) -> None:
    """Raise UsageError for any layout but a checkpoint's own."""
    if layout != "rows":
        raise UsageError(f"layout: expected rows, found {layout}")


def check_parts(codes: Tensor, scale: Tensor, kinds: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...]) -> None:
    """Raise UsageError unless tensors of a layout have these dtypes, fit each other and lie together."""
    if (codes.dtype, scale.dtype) != kinds:
        raise UsageError(
            f"weight: expected {kinds[0]} codes and {kinds[1]} scales, found {codes.dtype} and {scale.dtype}"
        )
    if tuple(scale.shape) != shape:
        raise UsageError(
            f"weight: expected scales {list(shape)} for codes {list(codes.shape)}, found {list(scale.shape)}"
        )
    if not (codes.is_contiguous() and scale.is_contiguous()):
        raise UsageError(
            "weight: expected contiguous codes and scales; cut the checkpoint's tensors, then prepare them"
        )
    check_device(codes, scale)


def check_device(codes: Tensor, scale: Tensor) -> None:
    """Raise UsageError unless codes and scale lie on one device."""
    if codes.device != scale.device:
        raise UsageError(f"codes lie on {codes.device} but their scale on {scale.device}; put both on one device")


def check_scale(scale: Tensor, name: str) -> None:
    """Raise UsageError for a scale that no checkpoint holds."""
    if not (scale.isfinite() & ~scale.signbit()).all():
        raise UsageError(f"{name}: found a negative, NaN or infinite scale; was the file damaged?")
