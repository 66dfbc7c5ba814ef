"""INT4 weights as the products read them: groups of 32 columns with a scale each, in one of three layouts.

`rows`: the checkpoint's own. int32 words `[N, K/8]`, lowest column in the lowest nibble, nibble = code + 8, with BF16
scales `[N, K/32]`.

`groups`: on a GPU. int32 words `[K/32, N, 4]` with BF16 scales `[K/32, N]`: the 16 bytes of a group lie together, and
the groups of neighbouring rows lie side by side, so a tile of any height is read in whole cache lines. Nibble s + 4h of
word 2p + q (s = 0..3; h, p, q = 0..1) is column 16q + 4s + 2p + h: `gpu/tiles` unpacks the words 2p and 2p + 1
together, and result number 4q + s then holds two of the columns from 4(4q + s) on, one for each word. So a product can
be made in eight parts, each with x read in runs of 4 columns, and weights go to the matrix units from the registers
that they were unpacked in.

`torch`: on a CPU for torch's own operator, whose byte order depends on the CPU: uint8 `[N, K/2]` with BF16 pairs of
scale and zero point (always 0) `[K/32, N, 2]`. N is a multiple of 16. Never to be written to a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Self, cast

import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels.codecs import reference
from k2quant.kernels.devices.gpus import on_triton
from k2quant.kernels.products.packed.weight import GROUP, Layout, check_device, check_parts, check_scale
from k2quant.kernels.products.tables.configs import Product

WORDS = GROUP // 8
"""int32 words of a group."""

ROW_MULTIPLE = 16
"""torch's operator takes a multiple of so many rows."""

ROW_BLOCK = 64
"""Rows that torch's operator keeps together on the CPUs with the widest registers; elsewhere it is a part of that."""


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """An INT4 weight, or a stack of those of all experts, in the layout of a device. Made by `prepare_int4`."""

    codes: Tensor
    scale: Tensor
    layout: Layout

    format: ClassVar[str] = "int4"
    layouts: ClassVar[tuple[Layout, ...]] = ("rows", "groups", "torch")
    gpu_layout: ClassVar[Layout] = "groups"
    products: ClassVar[tuple[Product, ...]] = ("linear", "gate_up", "down")
    tile_in_block: ClassVar[bool] = False
    tile_bytes: ClassVar[float] = 0.5 + 2 / GROUP
    block: ClassVar[tuple[int, int]] = (1, GROUP)
    numbers: ClassVar[tuple[int, ...]] = ()
    whole: ClassVar[None] = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`(N, K)`, or `(E, N, K)` for experts."""
        if self.layout == "groups":
            groups, rows = self.scale.shape[-2:]
            return (*self.scale.shape[:-2], rows, groups * GROUP)
        per_item = 8 if self.layout == "rows" else 2
        return (*self.codes.shape[:-1], self.codes.shape[-1] * per_item)

    @property
    def nbytes(self) -> int:
        """Bytes that codes and scales take."""
        return self.codes.nbytes + self.scale.nbytes

    @property
    def bits(self) -> Tensor:
        """The codes: they are whole numbers."""
        return self.codes

    @property
    def views(self) -> bool:
        """Whether memory has the checkpoint's own layout, so that `checkpoint` copies nothing."""
        return self.layout == "rows"

    @classmethod
    def of(
        cls,
        bits: Tensor,
        scale: Tensor,
        layout: Layout,
        numbers: tuple[int, ...] = (),  # noqa: ARG003 - it has none
        whole: Tensor | None = None,  # noqa: ARG003 - likewise
    ) -> Self:
        """Return the weight of `bits`, `scale` and `layout`, unchecked."""
        return cls(bits, scale, layout)

    @classmethod
    def laid_out(
        cls,
        codes: Tensor,
        scale: Tensor,
        layout: Layout,
        numbers: tuple[int, ...] = (),  # noqa: ARG003 - it has none
        whole: Tensor | None = None,  # noqa: ARG003 - likewise
    ) -> Self:
        """Check `weight_packed` and `weight_scale` as a checkpoint holds them, and lay them out.

        Raises:
            UsageError: dtype, shape or device do not fit, the layout does not, or a scale is negative or not finite.
        """
        _check_int4(codes, scale)
        if layout not in cls.layouts:
            raise UsageError(f"layout: expected {', '.join(cls.layouts)}, found {layout}")
        if layout == "torch" and (codes.shape[-2] % ROW_MULTIPLE or 0 in codes.shape):
            raise UsageError(f"layout torch: expected a multiple of {ROW_MULTIPLE} rows, found {list(codes.shape)}")
        return cls(*_DO[layout](codes.contiguous(), scale.contiguous()), layout)

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        layout: Layout,
        numbers: tuple[int, ...] = (),  # noqa: ARG003 - it has none
        *,
        device: torch.device | str,
    ) -> Self:
        """Return a weight `[N, K]` or `[E, N, K]` with whatever content.

        Raises:
            UsageError: the layout cannot have this shape.
        """
        *stack, rows, columns = shape
        if columns % GROUP or (layout == "torch" and rows % ROW_MULTIPLE):
            raise UsageError(f"layout {layout}: expected a multiple of {GROUP} columns, found {list(shape)}")
        groups = columns // GROUP
        codes, scale = {
            "rows": ((rows, columns // 8), (rows, groups)),
            "groups": ((groups, rows, WORDS), (groups, rows)),
            "torch": ((rows, columns // 2), (groups, rows, 2)),
        }[layout]
        return cls(
            torch.empty(*stack, *codes, dtype=_kind(layout), device=device),
            torch.empty(*stack, *scale, dtype=torch.bfloat16, device=device),
            layout,
        )

    def check(self) -> None:
        """Raise UsageError unless codes and scale fit each other and the layout, as those of `prepare_int4` do."""
        shape = tuple(self.codes.shape)
        scales = {
            "rows": (*shape[:-1], shape[-1] // WORDS),
            "groups": shape[:-1],
            "torch": (*shape[:-2], shape[-1] * 2 // GROUP, shape[-2], 2),
        }
        if self.layout not in scales:
            raise UsageError(f"layout: expected {', '.join(scales)}, found {self.layout}")
        check_parts(self.codes, self.scale, (_kind(self.layout), torch.bfloat16), scales[self.layout])

    def checkpoint(self) -> tuple[Tensor, Tensor]:
        """Return `weight_packed` and `weight_scale` as they were given to `prepare_int4`, bit for bit."""
        return _UNDO[self.layout](self.codes, self.scale)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return the weights `[.., N, K]`, each rounded once from its unrounded product code * scale."""
        packed, scale = self.checkpoint()
        codes = reference.unpack_int4(packed)
        return (codes.float() * scale.float().repeat_interleave(GROUP, -1)).to(dtype)

    def expert(self, number: int) -> Self:
        """Return one expert's weight of a stack, as views."""
        return self.holding(self.codes[number], self.scale[number])

    def rows(self, first: int, last: int) -> Self:
        """Return rows first..last as views; where `torch` keeps more rows together, as copies in the layout `rows`."""
        if self.layout == "torch" and (first % ROW_BLOCK or last % ROW_BLOCK) and (first, last) != (0, self.shape[-2]):
            return type(self)(*self.checkpoint(), "rows").rows(first, last)
        codes = self.codes[..., first:last, :]
        scale = self.scale[..., first:last] if self.layout == "groups" else self.scale[..., first:last, :]
        return self.holding(codes, scale)

    def holding(self, codes: Tensor, scale: Tensor, whole: Tensor | None = None) -> Self:  # noqa: ARG002 - it has none
        """Return a weight with other tensors in the same layout, unchecked."""
        return type(self)(codes, scale, self.layout)

    def prepared(self, codes: Tensor, scale: Tensor, whole: Tensor | None = None) -> Self:  # noqa: ARG002 - likewise
        """Do `laid_out` with this weight's layout."""
        return self.laid_out(codes, scale, self.layout)

    def empty_like(self, device: torch.device | str) -> Self:
        """Return a weight of the same shape and layout on a device, with whatever content."""
        return self.empty(self.shape, self.layout, device=device)


def _kind(layout: Layout) -> torch.dtype:
    return torch.uint8 if layout == "torch" else torch.int32


def _check_int4(packed: Tensor, scale: Tensor) -> None:
    if packed.dtype != torch.int32 or scale.dtype != torch.bfloat16:
        raise UsageError(
            f"expected int32 weight_packed and bfloat16 weight_scale, found {packed.dtype} and {scale.dtype}"
        )
    if packed.ndim not in (2, 3) or packed.shape[-1] % WORDS:
        raise UsageError(
            f"weight_packed: expected [N, K/8] or [E, N, K/8] with K a multiple of {GROUP}, found {list(packed.shape)}"
        )
    expected = [*packed.shape[:-1], packed.shape[-1] // WORDS]
    if list(scale.shape) != expected:
        raise UsageError(
            f"weight_scale: expected {expected} for weight_packed {list(packed.shape)}, found {list(scale.shape)}"
        )
    check_device(packed, scale)
    check_scale(scale, "weight_scale")


def _as_is(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return codes, scale


def _to_groups(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    if on_triton(packed):
        from k2quant.kernels.products.gpu.repack import repack_int4

        return repack_int4(packed, scale)
    words = _interleaved(packed.unflatten(-1, (-1, WORDS))).transpose(-3, -2)
    return words.contiguous(), scale.transpose(-2, -1).contiguous()


def _from_groups(words: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    if on_triton(words):
        from k2quant.kernels.products.gpu.repack import unpack_int4

        return unpack_int4(words, scale)
    packed = _in_column_order(words.transpose(-3, -2)).flatten(-2)
    return packed.contiguous(), scale.transpose(-2, -1).contiguous()


def _interleaved(words: Tensor) -> Tensor:
    """Return the words of groups `[.., 4]`, in column order, with their nibbles as the layout `groups` has them."""
    first, second = words.unflatten(-1, (2, 2)).unbind(-1)
    result = []
    for p in range(2):
        # Bytes p and p + 2 of both words; then all low nibbles in the low half, all high ones in the high half.
        taken = _even_bytes(first >> 8 * p) | _even_bytes(second >> 8 * p) << 16
        result.append(_low_nibbles(taken) | _low_nibbles(taken >> 4) << 16)
    return torch.stack(result, -2).flatten(-2)


def _in_column_order(words: Tensor) -> Tensor:
    """Undo `_interleaved`."""
    taken = [_apart(word) | _apart(word >> 16) << 4 for word in words.unflatten(-1, (2, 2)).unbind(-2)]
    first = _bytes_apart(taken[0]) | _bytes_apart(taken[1]) << 8
    second = _bytes_apart(taken[0] >> 16) | _bytes_apart(taken[1] >> 16) << 8
    return torch.stack([first, second], -1).flatten(-2)


def _even_bytes(words: Tensor) -> Tensor:
    return words & 0xFF | words >> 8 & 0xFF00


def _bytes_apart(words: Tensor) -> Tensor:
    return words & 0xFF | (words & 0xFF00) << 8


def _low_nibbles(words: Tensor) -> Tensor:
    """Return the low nibbles of the four bytes, side by side in the low half."""
    pairs = words & 0x0F0F0F0F
    pairs = (pairs | pairs >> 4) & 0x00FF00FF
    return (pairs | pairs >> 8) & 0xFFFF


def _apart(words: Tensor) -> Tensor:
    """Return the four nibbles of the low half as the low nibbles of four bytes."""
    pairs = words & 0xFFFF
    pairs = (pairs | pairs << 8) & 0x00FF00FF
    return (pairs | pairs << 4) & 0x0F0F0F0F


def _to_torch(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.stack([_torch_packed(part) for part in packed.reshape(-1, *packed.shape[-2:])])
    pairs = torch.stack([scale.transpose(-2, -1), torch.zeros_like(scale.transpose(-2, -1))], -1)
    return codes.reshape(*packed.shape[:-1], -1), pairs.contiguous()


def _from_torch(codes: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    packed = torch.stack([_torch_unpacked(part) for part in codes.reshape(-1, *codes.shape[-2:])])
    return packed.reshape(*codes.shape[:-1], -1), pairs[..., 0].transpose(-2, -1).contiguous()


def _torch_packed(packed: Tensor) -> Tensor:
    nibbles = (reference.unpack_int4(packed) + 8).int()
    return _torch_pack(nibbles)


def _torch_pack(nibbles: Tensor) -> Tensor:
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu  # noqa: SLF001 - it has no public name
    return cast("Tensor", pack(nibbles, 1))


def _torch_unpacked(codes: Tensor) -> Tensor:
    """Undo `_torch_packed`, a block of rows at a time."""
    blocks = []
    for block in codes.split(ROW_BLOCK):
        rows, columns = block.shape[0], 2 * block.shape[1]
        nibbles = torch.empty(rows * columns, dtype=torch.int8)
        nibbles[_torch_order(rows, columns)] = _nibbles(block)
        blocks.append(reference.pack_int4(nibbles.reshape(rows, columns) - 8))
    return torch.cat(blocks)


@lru_cache(maxsize=8)
def _torch_order(rows: int, columns: int) -> Tensor:
    """Return for each nibble of a packed block which weight it is, learnt by packing the weights' numbers.

    The order is torch's own business and differs between CPUs, so it is asked for, four bits of a number at a time.
    """
    number = torch.arange(rows * columns).reshape(rows, columns)
    order = torch.zeros(rows * columns, dtype=torch.long)
    for shift in range(0, (rows * columns).bit_length(), 4):
        packed = _torch_pack((number >> shift & 15).int())
        order |= _nibbles(packed).long() << shift
    return order


@lru_cache(maxsize=1)
def torch_half() -> int | None:
    """Return H if a byte of the layout `torch` holds rows i and i + H of a block of 2 H rows, column after column.

    None: this CPU's torch does otherwise.
    """
    order = _torch_order(ROW_BLOCK, GROUP)
    number = torch.arange(ROW_BLOCK * GROUP).reshape(ROW_BLOCK, GROUP)
    for half in (32, 16, 8):
        blocks = number.reshape(-1, 2, half, GROUP).permute(0, 3, 2, 1)  # block, column, row, which nibble
        if torch.equal(order, blocks.flatten()):
            return half
    return None


def _nibbles(codes: Tensor) -> Tensor:
    return torch.stack([codes & 15, codes >> 4], -1).flatten().to(torch.int8)


_DO = {"rows": _as_is, "groups": _to_groups, "torch": _to_torch}
_UNDO = {"rows": _as_is, "groups": _from_groups, "torch": _from_torch}
