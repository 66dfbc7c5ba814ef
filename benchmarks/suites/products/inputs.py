"""Weights and inputs of the benchmarks of kernels: random, the same in every run, in as many copies as are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from k2quant.kernels.codecs import reference
from k2quant.kernels.ops import Int4Weight, PackedWeight, prepare_fp8, prepare_int4
from k2quant.kernels.tuning.choosing import random_weight
from suites.products import cases

Call = Callable[[], Any]
Copied = TypeVar("Copied")

BLOCK = 128

TENSOR = 4e-5
"""A tensor scale of NVFP4 for weights of the deviation 0.02: a 2688th of their largest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One contestant's part in a cell."""

    calls: Sequence[Call]
    """One for each copy of the weights."""
    weight_bytes: int
    """What one copy takes."""
    error: Callable[[], float]
    """Runs the first call and returns ||y - exact|| / ||exact||; for a codec the share of bytes that are wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a cell costs at least, in k2quant's format."""

    bytes: float
    """Weights, x and result, once."""
    flops: float


class Bank:
    """The weights `[N, K]` of one shape in one format, in as many copies as are needed to leave the caches."""

    def __init__(self, section: str, size: tuple[int, ...], device: str, rotate_bytes: int) -> None:
        self.size, self.device, self.rotate_bytes = size, torch.device(device), rotate_bytes
        self.weight, self.plain = MAKERS.get(section, _fp8)(size, self.device)
        self._copies: dict[str, list[Any]] = {}

    @cached_property
    def dense(self) -> Tensor:
        """The weights as BF16."""
        return self.plain.dequantize()

    @cached_property
    def exact(self) -> Tensor:
        """The weights as float64, code * scale unrounded."""
        return self.plain.dequantize(torch.float64)

    def copies(
        self, name: str, make: Callable[[], Copied], copy: Callable[[Copied], Copied], size: int
    ) -> list[Copied]:
        """Return what `make` makes, and copies of it, of `rotate_bytes` together and at least two."""
        if name not in self._copies:
            first = make()
            more = max(2, -(-self.rotate_bytes // size)) - 1
            self._copies[name] = [first, *(copy(first) for _ in range(more))]
        return self._copies[name]

    def weights(self) -> list[PackedWeight]:
        """Return k2quant's copies."""
        return self.copies(cases.OURS, lambda: self.weight, _clone, self.weight.nbytes)

    def tensors(self, name: str, make: Callable[[], Tensor]) -> list[Tensor]:
        """Return copies of a tensor."""
        first = make()
        return self.copies(name, lambda: first, Tensor.clone, first.nbytes)


class ExpertsBank:
    """The weights of one layer of experts; far larger than any cache, so there are no copies."""

    def __init__(self, section: str, size: tuple[int, ...], device: str) -> None:
        self.size, self.device = size, torch.device(device)
        experts, inner, hidden = size
        make = _int4 if section == "moe-int4" else _fp8
        shapes = ((experts, inner, hidden), (experts, inner, hidden), (experts, hidden, inner))
        made = [make(shape, self.device) for shape in shapes]
        self.parts = tuple(weight for weight, _ in made)
        self.plain = tuple(plain for _, plain in made)
        self.expert_bytes = sum(part.nbytes for part in self.parts) / experts

    @cached_property
    def dense(self) -> tuple[Tensor, ...]:
        """Gate, up and down as BF16."""
        return tuple(_dense_experts(part) for part in self.plain)


class CodecBank:
    """A matrix in every format; each codec is checked on its first rows against the reference."""

    def __init__(self, size: tuple[int, ...], device: str) -> None:
        self.size, self.device = size, torch.device(device)
        self.bf16 = (normal(size, self.device, seed=1) * 0.02).bfloat16()
        self.packed, self.scale4 = _int4_parts(size, self.device)
        self.codes, self.scale8 = _fp8_parts(size, self.device)
        self.mean = normal(size[1:], self.device, seed=2)
        self.importance = self.mean.square() + 1
        self.nvfp4, self.mxfp4 = (random_weight(name, *size, device=self.device) for name in ("nvfp4", "mxfp4"))
        self.tensor = torch.tensor(TENSOR, device=self.device)


def _int4(shape: tuple[int, ...], device: torch.device) -> tuple[PackedWeight, PackedWeight]:
    """Return a weight as it is used on a device, and one with the same numbers that is quickly dequantised."""
    packed, scale = _int4_parts(shape, device)
    weight = prepare_int4(packed, scale)
    return weight, Int4Weight(packed, scale, "rows") if device.type == "cpu" else weight


def _int4_parts(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    words = (*shape[:-1], shape[-1] // 8)
    packed = torch.randint(-(2**31), 2**31, words, dtype=torch.int32, device=device, generator=generator)
    scale = torch.rand(*shape[:-1], shape[-1] // reference.GROUP, device=device, generator=generator)
    return packed, (scale * 0.004 + 0.001).bfloat16()


def _fp8(shape: tuple[int, ...], device: torch.device) -> tuple[PackedWeight, PackedWeight]:
    weight = prepare_fp8(*_fp8_parts(shape, device))
    return weight, weight


def _fp8_parts(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    for number, part in enumerate(codes.view(-1, *shape[-2:])):  # one expert's weights at a time are float32
        part.copy_((normal(part.shape, device, seed=number) * 100).clamp(-448, 448))
    generator = torch.Generator(device).manual_seed(0)
    blocks = (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))
    return codes, torch.rand(blocks, device=device, generator=generator) * 1e-4 + 1e-4


def _fp4(weight_format: str, shape: tuple[int, ...], device: torch.device) -> tuple[PackedWeight, PackedWeight]:
    weight = random_weight(weight_format, *shape, device=device)
    return weight, weight


MAKERS: dict[str, Callable[[tuple[int, ...], torch.device], tuple[PackedWeight, PackedWeight]]] = {
    "int4": _int4,
    "nvfp4": partial(_fp4, "nvfp4"),
    "mxfp4": partial(_fp4, "mxfp4"),
}
"""Makes the weights of a section; those of all others are FP8."""


def normal(shape: Sequence[int], device: torch.device, *, seed: int) -> Tensor:
    """Return float32 numbers of mean 0 and deviation 1."""
    return torch.randn(tuple(shape), device=device, generator=torch.Generator(device).manual_seed(seed))


def _dense_experts(weight: PackedWeight) -> Tensor:
    out = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.codes.device)
    for expert, part in enumerate(out):
        part.copy_(weight.expert(expert).dequantize())
    return out


def _clone(weight: PackedWeight) -> PackedWeight:
    whole = None if weight.whole is None else weight.whole.clone()
    return weight.holding(weight.codes.clone(), weight.scale.clone(), whole)


def relative(out: Tensor, exact: Tensor) -> float:
    """Return ||out - exact|| / ||exact||."""
    return float((out.double() - exact).norm() / exact.norm())


def aten(name: str) -> Callable[..., Any]:
    """Return an operator that torch has no public name for."""
    operator: Callable[..., Any] = getattr(torch.ops.aten, name)
    return operator
