"""x times one weight: the contestants.

Each function makes the calls of one contestant. Everything runs on any device; what a device or a version of torch does
not offer raises, and the caller notes why.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from k2quant.kernels.codecs import reference
from k2quant.kernels.ops import (
    Fp8Weight,
    PackedWeight,
    fp8_linear,
    fp8_linear_w8a8,
    int4_linear,
    linear,
    prepare_int4,
)
from k2quant.kernels.products import dispatch
from k2quant.kernels.products import reference as matmul_reference
from suites.products import cases
from suites.products.cases import Cell
from suites.products.inputs import BLOCK, Bank, Call, Entry, Work, aten, normal, relative

CHECKED_ROWS = 64
"""Rows of x that are held against the truth; a kernel treats all of them alike."""


class LinearProblem:
    """x times a weight."""

    def __init__(self, bank: Bank, cell: Cell) -> None:
        self.bank, self.cell = bank, cell
        self.x = normal((cell.m, bank.size[1]), bank.device, seed=1).bfloat16()
        self.rows = torch.linspace(0, cell.m - 1, min(cell.m, CHECKED_ROWS), device=bank.device).long()

    @property
    def work(self) -> Work:
        """What the product costs."""
        n, k = self.bank.size
        activations = 2 * self.cell.m * (n + k)
        return Work(bytes=self.bank.weight.nbytes + activations, flops=2.0 * self.cell.m * n * k)

    @cached_property
    def exact(self) -> Tensor:
        """The result of the checked rows, float64."""
        return self.x[self.rows].double() @ self.bank.exact.T

    @cached_property
    def exact_rounded(self) -> Tensor:
        """The same with x rounded to FP8 first, as the products of FP8 by FP8 are defined."""
        codes, scale = matmul_reference.fp8_quantize_activations(self.x[self.rows])
        return (codes.double() * scale.double().repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]) @ self.bank.exact.T

    def entry(self, calls: Sequence[Call], weight_bytes: int, *, rounded: bool = False) -> Entry:
        """Return an entry whose first call is checked."""

        def error() -> float:
            return relative(calls[0]()[self.rows], self.exact_rounded if rounded else self.exact)

        return Entry(calls=calls, weight_bytes=weight_bytes, error=error)


OURS: dict[str, Callable[..., Tensor]] = {
    "int4": int4_linear,
    "fp8": fp8_linear,
    "w8a8": fp8_linear_w8a8,
    "nvfp4": linear,
    "mxfp4": linear,
}


def _ours(problem: LinearProblem) -> Entry:
    product = OURS[problem.cell.section]
    calls = [partial(product, problem.x, weight) for weight in problem.bank.weights()]
    return problem.entry(calls, problem.bank.weight.nbytes, rounded=problem.cell.section == "w8a8")


def _gemm_only(problem: LinearProblem) -> Entry:
    """FP8 by FP8 with x rounded beforehand."""
    from k2quant.kernels.products.gpu import w8a8 as w8a8_triton

    x, weight = problem.x, problem.bank.weight
    config = dispatch.table_of(x.device).choose("w8a8", "fp8", weight.shape, x.shape[0])
    rounded, quantize = w8a8_triton.quantize_activations(x), w8a8_triton.quantize_activations

    def product(weight: Fp8Weight) -> Tensor:
        w8a8_triton.quantize_activations = lambda x: rounded  # noqa: ARG005 - it keeps its signature
        try:
            return w8a8_triton.linear_w8a8(x, weight, config)
        finally:
            w8a8_triton.quantize_activations = quantize

    calls = [partial(product, weight) for weight in problem.bank.weights() if isinstance(weight, Fp8Weight)]
    return problem.entry(calls, weight.nbytes, rounded=True)


def _dense(problem: LinearProblem) -> Entry:
    weights = problem.bank.tensors("dense", lambda: problem.bank.dense)
    return problem.entry([partial(functional.linear, problem.x, each) for each in weights], weights[0].nbytes)


def _dense32(problem: LinearProblem) -> Entry:
    weights = problem.bank.tensors("dense32", lambda: problem.bank.plain.dequantize(torch.float32))
    x = problem.x.float()
    return problem.entry([partial(functional.linear, x, each) for each in weights], weights[0].nbytes)


def _dequantized(problem: LinearProblem) -> Entry:
    def product(weight: PackedWeight) -> Tensor:
        return functional.linear(problem.x, dispatch.dequantize(weight, torch.bfloat16))

    return problem.entry([partial(product, each) for each in problem.bank.weights()], problem.bank.weight.nbytes)


def _int4pack(problem: LinearProblem) -> Entry:
    bank, on_cpu = problem.bank, problem.bank.device.type == "cpu"
    make = _packed_for_cpu if on_cpu else _packed_for_cuda
    pairs = bank.copies(
        "int4pack", lambda: make(bank.plain), lambda pair: (pair[0].clone(), pair[1].clone()), bank.weight.nbytes
    )
    product = aten("_weight_int4pack_mm_for_cpu" if on_cpu else "_weight_int4pack_mm")
    calls = [partial(product, problem.x, codes, reference.GROUP, scale) for codes, scale in pairs]
    return problem.entry(calls, sum(part.nbytes for part in pairs[0]))


def _packed_for_cpu(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    packed = prepare_int4(*weight.checkpoint(), layout="torch")
    return packed.codes, packed.scale


def _packed_for_cuda(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """Pack as torch's operator wants it: an even column in the high half of a byte, K in tiles of 128."""
    packed, scale = weight.checkpoint()
    nibbles = (reference.unpack_int4(packed) + 8).to(torch.uint8)
    codes = aten("_convert_weight_to_int4pack")((nibbles[:, ::2] << 4 | nibbles[:, 1::2]).contiguous(), 8)
    return codes, torch.stack([scale.T, torch.zeros_like(scale.T)], -1).contiguous()


def _scaled(problem: LinearProblem) -> Entry:
    """Call torch's own product of FP8 blocks, 1x128 of x by 128x128 of the weight; x is rounded beforehand."""
    rows = problem.x.shape[0]
    codes, scale = matmul_reference.fp8_quantize_activations(functional.pad(problem.x, (0, 0, 0, -rows % 4)))
    scale = scale.T.contiguous().T
    copies = [each for each in problem.bank.weights() if isinstance(each, Fp8Weight)]
    # torch wants the scales of a row of blocks padded to a multiple of four.
    factors = functional.pad(copies[0].scale, (0, -copies[0].scale.shape[1] % 4)).T
    kinds = functional.ScalingType.BlockWise1x128, functional.ScalingType.BlockWise128x128

    def product(weight: Tensor) -> Tensor:
        out = functional.scaled_mm(codes, weight.T, scale, kinds[0], factors, kinds[1], output_dtype=torch.bfloat16)
        return out[:rows]

    return problem.entry([partial(product, each.codes) for each in copies], copies[0].nbytes, rounded=True)


def _gemlite(problem: LinearProblem) -> Entry:
    gemlite: Any = importlib.import_module("gemlite")
    bank = problem.bank
    packed, scale = bank.plain.checkpoint()
    nibbles, n, k = (reference.unpack_int4(packed) + 8).to(torch.uint8), *bank.size

    def make() -> Any:
        kind = gemlite.DType.BF16
        layer = gemlite.GemLiteLinearTriton(
            4, group_size=32, in_features=k, out_features=n, input_dtype=kind, output_dtype=kind
        )
        layer.pack(nibbles, scale, torch.full_like(scale, 8.0), None)
        return layer

    layers = bank.copies("gemlite", make, lambda _: make(), bank.weight.nbytes)
    return problem.entry([partial(layer, problem.x) for layer in layers], bank.weight.nbytes)


def _group_tiles(problem: LinearProblem) -> Entry:
    from suites.products import group_tiles  # only here: it loads Triton

    return problem.entry(group_tiles.calls(problem.bank, problem.x), problem.bank.weight.nbytes)


LINEAR: dict[str, Callable[[LinearProblem], Entry]] = {
    cases.OURS: _ours,
    cases.GEMM: _gemm_only,
    cases.DENSE: _dense,
    cases.DENSE32: _dense32,
    cases.DEQUANTIZED: _dequantized,
    cases.INT4PACK: _int4pack,
    cases.SCALED: _scaled,
    cases.GEMLITE: _gemlite,
    cases.GROUP_TILES: _group_tiles,
}
