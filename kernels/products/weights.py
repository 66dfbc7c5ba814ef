"""Quantised weights as the matrix products read them, and how they are made from what a checkpoint holds.

A weight keeps its codes and scales in one of a few layouts, each invertible. N are rows (outputs), K columns (inputs);
a weight of experts has a dimension E in front of everything.

`rows`: the checkpoint's own. INT4: int32 words `[N, K/8]`, lowest column in the lowest nibble, nibble = code + 8, with
BF16 scales `[N, K/32]`. FP8: e4m3 codes `[N, K]` with float32 scales `[ceil(N/rows), ceil(K/columns)]` of a block.

`groups`: INT4 on a GPU. int32 words `[K/32, N, 4]` with BF16 scales `[K/32, N]`: the 16 bytes of a group lie together,
and the groups of neighbouring rows lie side by side, so a tile of any height is read in whole cache lines. Nibble
s + 4h of word 2p + q (s = 0..3; h, p, q = 0..1) is column 16q + 4s + 2p + h: `tiles_triton` unpacks the words 2p and
2p + 1 together, and result number 4q + s then holds two of the columns from 4(4q + s) on, one for each word. So a
product can be made in eight parts, each with x read in runs of 4 columns, and weights go to the matrix units from the
registers that they were unpacked in.

`torch`: INT4 on a CPU for torch's own operator, whose byte order depends on the CPU: uint8 `[N, K/2]` with BF16 pairs
of scale and zero point (always 0) `[K/32, N, 2]`. N is a multiple of 16. Never to be written to a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, cast

import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels.codecs import reference

Layout = Literal["rows", "groups", "torch"]

GROUP = reference.GROUP
WORDS = GROUP // 8
"""int32 words of a group."""


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """An INT4 weight, or a stack of those of all experts, in the layout of a device. Made by `prepare_int4`."""

    codes: Tensor
    scale: Tensor
    layout: Layout

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
        kind = torch.uint8 if self.layout == "torch" else torch.int32
        _check_parts(self.codes, self.scale, (kind, torch.bfloat16), scales[self.layout])

    def checkpoint(self) -> tuple[Tensor, Tensor]:
        """Return `weight_packed` and `weight_scale` as they were given to `prepare_int4`, bit for bit."""
        return _UNDO[self.layout](self.codes, self.scale)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return the weights `[.., N, K]`, each rounded once from its unrounded product code * scale."""
        packed, scale = self.checkpoint()
        codes = reference.unpack_int4(packed)
        return (codes.float() * scale.float().repeat_interleave(GROUP, -1)).to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight:
    """A block-FP8 weight, or a stack of those of all experts. Made by `prepare_fp8`; always in the layout `rows`."""

    codes: Tensor
    scale: Tensor
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """`(N, K)`, or `(E, N, K)` for experts."""
        return tuple(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that codes and scales take."""
        return self.codes.nbytes + self.scale.nbytes

    def check(self) -> None:
        """Raise UsageError unless codes and scale fit each other and the block, as those of `prepare_fp8` do."""
        expected = _fp8_scales(self.codes, self.block)
        _check_parts(self.codes, self.scale, (torch.float8_e4m3fn, torch.float32), expected)

    def checkpoint(self) -> tuple[Tensor, Tensor]:
        """Return `weight` and `weight_scale_inv` as they were given to `prepare_fp8`, bit for bit."""
        return self.codes, self.scale

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return the weights `[.., N, K]`: the float32 product code * scale, rounded to `dtype`."""
        return (self.codes.float() * spread(self.scale, self.block, self.shape)).to(dtype)


Weight = Int4Weight | Fp8Weight


def empty_int4(shape: tuple[int, ...], *, layout: Layout, device: torch.device | str) -> Int4Weight:
    """Return an INT4 weight `[N, K]` or `[E, N, K]` in a layout, with whatever content.

    Raises:
        UsageError: the layout cannot have this shape.
    """
    *stack, rows, columns = shape
    if columns % GROUP or (layout == "torch" and rows % TORCH_ROWS):
        raise UsageError(f"layout {layout}: expected a multiple of {GROUP} columns, found {list(shape)}")
    groups = columns // GROUP
    codes, scale = {
        "rows": ((rows, columns // 8), (rows, groups)),
        "groups": ((groups, rows, WORDS), (groups, rows)),
        "torch": ((rows, columns // 2), (groups, rows, 2)),
    }[layout]
    kind = torch.uint8 if layout == "torch" else torch.int32
    return Int4Weight(
        torch.empty(*stack, *codes, dtype=kind, device=device),
        torch.empty(*stack, *scale, dtype=torch.bfloat16, device=device),
        layout,
    )


def empty_fp8(shape: tuple[int, ...], *, block: tuple[int, int], device: torch.device | str) -> Fp8Weight:
    """Return a block-FP8 weight `[N, K]` or `[E, N, K]` with whatever content."""
    codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    return Fp8Weight(codes, torch.empty(_fp8_scales(codes, block), dtype=torch.float32, device=device), block)


def select(weight: Weight, expert: int) -> Weight:
    """Return one expert's weight of a stack, as views."""
    if isinstance(weight, Fp8Weight):
        return Fp8Weight(weight.codes[expert], weight.scale[expert], weight.block)
    return Int4Weight(weight.codes[expert], weight.scale[expert], weight.layout)


def prepare_int4(weight_packed: Tensor, weight_scale: Tensor, *, layout: Layout | None = None) -> Int4Weight:
    """Lay an INT4 weight out for the device on which its tensors lie.

    Args:
        weight_packed: int32 words `[N, K/8]`, or `[E, N, K/8]` for experts, as a checkpoint holds them. Either grid.
        weight_scale: BF16 `[.., N, K/32]`, on the same device.
        layout: take this one instead of the one that is best for the device.

    Raises:
        UsageError: dtype, shape or device do not fit each other, or a scale is negative, NaN or infinite.
    """
    _check_int4(weight_packed, weight_scale)
    layout = layout or best_layout(weight_packed.device, 0 if 0 in weight_packed.shape else weight_packed.shape[-2])
    if layout not in _DO:
        raise UsageError(f"layout: expected {', '.join(_DO)}, found {layout}")
    if layout == "torch" and (weight_packed.shape[-2] % TORCH_ROWS or 0 in weight_packed.shape):
        raise UsageError(f"layout torch: expected a multiple of {TORCH_ROWS} rows, found {list(weight_packed.shape)}")
    codes, scale = _DO[layout](weight_packed.contiguous(), weight_scale.contiguous())
    return Int4Weight(codes, scale, layout)


def prepare_fp8(weight: Tensor, weight_scale_inv: Tensor, *, block: tuple[int, int] = (128, 128)) -> Fp8Weight:
    """Check a block-FP8 weight and keep it as it is: its own layout is the one that the products read.

    Args:
        weight: e4m3 codes `[N, K]`, or `[E, N, K]` for experts.
        weight_scale_inv: float32 `[.., ceil(N/block[0]), ceil(K/block[1])]`; it multiplies, whatever its name says.
        block: rows and columns that share a scale; columns are a multiple of 32.

    Raises:
        UsageError: dtype, shape or device do not fit each other, a code is NaN, or a scale is negative or not finite.
    """
    _check_fp8(weight, weight_scale_inv, block)
    return Fp8Weight(weight.contiguous(), weight_scale_inv.contiguous(), block)


def _check_parts(codes: Tensor, scale: Tensor, kinds: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...]) -> None:
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
    _check_device(codes, scale)


def _fp8_scales(codes: Tensor, block: tuple[int, int]) -> tuple[int, ...]:
    return (*codes.shape[:-2], -(-codes.shape[-2] // block[0]), -(-codes.shape[-1] // block[1]))


def spread(scale: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """Return a block's scale for each weight of `shape`."""
    wide = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., : shape[-2], : shape[-1]]


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
    _check_device(packed, scale)
    _check_scale(scale, "weight_scale")


def _check_fp8(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
    if codes.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32:
        raise UsageError(
            f"expected float8_e4m3fn weight and float32 weight_scale_inv, found {codes.dtype} and {scale.dtype}"
        )
    if codes.ndim not in (2, 3) or block[0] < 1 or block[1] < GROUP or block[1] % GROUP:
        raise UsageError(
            f"weight: expected [N, K] or [E, N, K] with blocks of a multiple of {GROUP} columns, found "
            f"{list(codes.shape)} with blocks of {block[0]}x{block[1]}"
        )
    if codes.shape[-1] % GROUP:
        raise UsageError(f"weight: expected a multiple of {GROUP} columns, found {codes.shape[-1]}")
    expected = list(_fp8_scales(codes, block))
    if list(scale.shape) != expected:
        raise UsageError(
            f"weight_scale_inv: expected {expected} for weight {list(codes.shape)} in blocks of {block[0]}x{block[1]}, "
            f"found {list(scale.shape)}"
        )
    _check_device(codes, scale)
    _check_scale(scale, "weight_scale_inv")
    if _has_nan(codes):
        raise UsageError("weight: found NaN among the FP8 codes; such a weight cannot be used")


def _has_nan(codes: Tensor) -> bool:
    """Look for the two NaN of e4m3fn, 0x7F and 0xFF: each is the largest byte, with and without a sign, if it is there.

    Two reductions without a temporary read 20 GB/s on a core where comparing each byte made 1.2.
    """
    if not codes.numel():
        return False
    bits = codes.view(torch.uint8)
    return int(bits.amax()) == 0xFF or int(bits.view(torch.int8).amax()) == 0x7F


def _check_device(codes: Tensor, scale: Tensor) -> None:
    if codes.device != scale.device:
        raise UsageError(f"codes lie on {codes.device} but their scale on {scale.device}; put both on one device")


def _check_scale(scale: Tensor, name: str) -> None:
    if not (scale.isfinite() & ~scale.signbit()).all():
        raise UsageError(f"{name}: found a negative, NaN or infinite scale; was the file damaged?")


def best_layout(device: torch.device, rows: int) -> Layout:
    """Return the layout in which a device reads INT4 weights of so many rows fastest."""
    if device.type == "cpu":
        from k2quant.kernels.products.cpu.linear import best_layout as best_on_cpu

        layout = best_on_cpu()
        return layout if layout != "torch" or (rows and rows % TORCH_ROWS == 0) else "rows"
    return "groups" if device.type == "cuda" else "rows"


def _as_is(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return codes, scale


def _to_groups(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    if packed.device.type == "cuda" and find_spec("triton"):
        from k2quant.kernels.products.gpu.repack import repack_int4

        return repack_int4(packed, scale)
    words = _interleaved(packed.unflatten(-1, (-1, WORDS))).transpose(-3, -2)
    return words.contiguous(), scale.transpose(-2, -1).contiguous()


def _from_groups(words: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    if words.device.type == "cuda" and find_spec("triton"):
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


TORCH_ROWS = 16
"""torch's operator takes a multiple of so many rows."""

ROW_BLOCK = 64
"""Rows that torch's operator keeps together on the CPUs with the widest registers; elsewhere it is a part of that."""


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
