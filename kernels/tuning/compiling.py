"""Compile what a product would launch, without running it.

For gates where there is no GPU, and to fill Triton's cache on many cores before a GPU is tuned.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, get_args

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from k2quant.ground.release import EXPERTS, TOP
from k2quant.kernels.codecs.gpu import figures as figures_triton
from k2quant.kernels.codecs.gpu import fp4 as fp4_codecs_triton
from k2quant.kernels.codecs.gpu import fp8 as fp8_codecs_triton
from k2quant.kernels.codecs.gpu import int4 as int4_codecs_triton
from k2quant.kernels.codecs.gpu import search as search_triton
from k2quant.kernels.codecs.grids import Grid
from k2quant.kernels.devices.launch import Launch, recorded
from k2quant.kernels.products.gpu import dequantize as dequantize_triton
from k2quant.kernels.products.gpu import linear as linear_triton
from k2quant.kernels.products.gpu import moe as moe_triton
from k2quant.kernels.products.gpu import moe_backward as moe_backward_triton
from k2quant.kernels.products.gpu import repack as repack_triton
from k2quant.kernels.products.gpu import w8a8 as w8a8_triton
from k2quant.kernels.products.gpu.routing import SPARSITY_FACTOR
from k2quant.kernels.products.packed.fp8 import Fp8Weight
from k2quant.kernels.products.packed.int4 import Int4Weight
from k2quant.kernels.products.packed.weight import PackedWeight
from k2quant.kernels.products.prepare import PACKED
from k2quant.kernels.products.tables.configs import Config, Product

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


FEW_ROWS = 32
"""Rows of a tile up to which a layer of experts may have few tokens, and then does not sort them by expert."""

FP8_ARCH = 89
"""The first architecture that knows FP8 itself."""


def rehearse(
    product: Product,
    weight_format: str,
    shape: tuple[int, int],
    config: Config,
    *,
    tokens: tuple[int, ...] | None = None,
    backward: bool = True,
) -> list[Launch]:
    """Record what the host code of a product launches for a weight `[N, K]`; nothing is allocated and nothing runs.

    Args:
        product: of a layer of experts only this product's launches are returned; helpers count as those of gate_up.
        weight_format: one of `PACKED`.
        shape: N and K.
        config: rows are those of both products of a layer of experts.
        tokens: so many are sent through a layer of experts, in turn. If left out: many, which are sorted by expert, and
            where the tiles are low also few, which are not.
        backward: record the gradients of a layer of experts too.

    Returns:
        Each kernel once.
    """
    with torch.device("meta"), recorded() as found:
        x = torch.empty(2 * config.rows, shape[1], dtype=torch.bfloat16)
        if product == "w8a8":
            w8a8_triton.linear_w8a8(x, Fp8Weight.empty(shape, device="meta"), config)
        elif product == "linear":
            linear_triton.linear(x, _weight(weight_format, *shape), config)
        else:
            few = (most_direct(),) if config.rows <= FEW_ROWS else ()
            for count in tokens or (*few, EXPERTS):
                _rehearse_moe(product, weight_format, shape, config, count, backward=backward)
    wanted = [launch for launch in found if product not in {"gate_up", "down"} or _product_of(launch) == product]
    return list({_kind(launch): launch for launch in reversed(wanted)}.values())[::-1]


def most_direct() -> int:
    """Return the most tokens that Kimi K2's experts are given without sorting them by expert."""
    return EXPERTS // (SPARSITY_FACTOR * TOP)


def rehearse_codecs(arch: int) -> list[Launch]:
    """Record what the codecs launch on a GPU of an architecture, blocks of 128x128, both grids, all widths, FP4."""
    with torch.device("meta"), recorded() as found:
        weights = torch.empty(2048, 7168, dtype=torch.bfloat16)
        codes, scale_inv, _ = fp8_codecs_triton.bf16_to_fp8(weights, figures=True)
        packed, scale, _ = int4_codecs_triton.bf16_to_int4(weights, figures=True)
        fp8_codecs_triton.bf16_to_fp8(weights)
        fp8_codecs_triton.fake_quantize_fp8(weights, recover=True)
        fp8_codecs_triton.fp8_to_bf16(codes, scale_inv)
        fp8_codecs_triton.int4_to_fp8(packed, scale)
        for grid in get_args(Grid):
            int4_codecs_triton.bf16_to_int4(weights, grid)
            int4_codecs_triton.fake_quantize_int4(weights, grid)
            int4_codecs_triton.fp8_to_int4(codes, scale_inv, grid=grid)
        int4_codecs_triton.bf16_to_int4(weights, bits=3)
        int4_codecs_triton.fake_quantize_int4(weights, bits=8)
        int4_codecs_triton.int4_to_bf16(packed, scale)
        moments = torch.empty(weights.shape[1])
        for known, mean in ((None, None), (moments, None), (moments, moments)):
            search_triton.search_int4_scales(weights, known, mean)
            search_triton.weighted_errors(weights, scale, known, mean)
        search_triton.search_int4_scales(weights, moments, moments, bits=3)
        _rehearse_fp4(weights)
        figures_triton.compare(weights, weights)
        groups = repack_triton.repack_int4(packed, scale)
        repack_triton.unpack_int4(*groups)
        dequantize_triton.dequantize(Int4Weight(*groups, "groups"), torch.bfloat16)
        dequantize_triton.dequantize(Fp8Weight(codes, scale_inv, (128, 128)), torch.bfloat16)
    native = {"NATIVE": arch >= FP8_ARCH}  # a tensor without a device cannot tell
    return [replace(each, constants=each.constants | (native if "NATIVE" in each.constants else {})) for each in found]


def _rehearse_fp4(weights: torch.Tensor) -> None:
    """Record the codecs of FP4, with a tensor scale that multiplies and one that divides."""
    tensor, bad = torch.empty(()), torch.empty(1, dtype=torch.int32)
    for divides in (False, True):
        codes, scale, _ = fp4_codecs_triton.bf16_to_nvfp4(weights, tensor, divides=divides, figures=True)
        fp4_codecs_triton.nvfp4_scales(weights, tensor, divides=divides)
        fp4_codecs_triton.bf16_to_nvfp4_at(weights, scale, tensor, divides=divides, figures=True)
        fp4_codecs_triton.fake_quantize_nvfp4(weights, tensor, divides=divides)
        fp4_codecs_triton.nvfp4_to_bf16(codes, scale, tensor, divides=divides, bad=bad)
    codes, scale, _ = fp4_codecs_triton.bf16_to_mxfp4(weights, figures=True)
    fp4_codecs_triton.mxfp4_scales(weights)
    fp4_codecs_triton.bf16_to_mxfp4_at(weights, scale, figures=True)
    fp4_codecs_triton.fake_quantize_mxfp4(weights)
    fp4_codecs_triton.mxfp4_to_bf16(codes, scale, bad=bad)


def _product_of(launch: Launch) -> Product:
    """Return which product of a layer of experts a launch belongs to; what serves both counts as gate_up."""
    down = launch.kernel.__name__ == "_down" or launch.constants.get("TWO") is False
    return "down" if down else "gate_up"


def _kind(launch: Launch) -> tuple[object, ...]:
    types = tuple(_type(value) for value in launch.arguments.values())
    constants = tuple(sorted(launch.constants.items()))
    return launch.kernel.__name__, types, constants, launch.warps, launch.stages, launch.exact


def _rehearse_moe(
    product: Product, weight_format: str, shape: tuple[int, int], config: Config, tokens: int, *, backward: bool
) -> None:
    inner, hidden = shape if product == "gate_up" else shape[::-1]
    shapes = ((EXPERTS, inner, hidden), (EXPERTS, inner, hidden), (EXPERTS, hidden, inner))
    gate, up, down = (_weight(weight_format, *each) for each in shapes)
    ids = torch.empty(tokens, TOP, dtype=torch.int64)
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16)
    weights = torch.empty(ids.shape)
    moe_triton.moe(x, gate, up, down, ids, weights, config, config)
    if backward:
        moe_backward_triton.moe_backward(x, x, gate, up, down, ids, weights, config, config)


def _weight(weight_format: str, *shape: int) -> PackedWeight:
    kind = PACKED[weight_format]
    return kind.empty(shape, kind.gpu_layout, device="meta")


def compile_launch(launch: Launch, arch: int) -> Any:
    """Return Triton's compiled kernel of a launch for an architecture such as 90, from its cache if it is there."""
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": not launch.exact}
    return triton.compile(source_of(launch), target=GPUTarget("cuda", arch, 32), options=options)


def precompile(
    product: Product,
    weight_format: str,
    shape: tuple[int, int],
    config: Config,
    *,
    arch: int,
    tokens: tuple[int, ...] | None = None,
    backward: bool = False,
) -> None:
    """Fill Triton's cache with what a product launches; what fails here fails again, and is noted, where it is run.

    Args:
        product: see `rehearse`, as for all but `arch`.
        weight_format: see there.
        shape: see there.
        config: see there; of the form `dequantize` there is nothing to compile.
        arch: an architecture such as 90.
        tokens: see there.
        backward: see there.
    """
    if config.form == "dequantize":
        return
    with suppress(Exception):
        for launch in rehearse(product, weight_format, shape, config, tokens=tokens, backward=backward):
            compile_launch(launch, arch)


@contextmanager
def compilers() -> Iterator[ProcessPoolExecutor]:
    """Open processes that compile; whoever is interrupted does not wait for what they have not begun."""
    pool = ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def source_of(launch: Launch) -> ASTSource:
    """Return the source of a launch, with the types and divisibilities that the launch itself would find.

    Its hash is that of Triton's launcher, which notes an empty list for texts and for numbers that 16 does not divide.
    """
    names = launch.kernel.arg_names
    free = {parameter.name for parameter in launch.kernel.params if parameter.do_not_specialize}
    signature: dict[str, str] = dict.fromkeys(names, "constexpr")
    constants = dict(launch.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for name, value in launch.arguments.items():
        if isinstance(value, int) and value == 1 and name not in free:
            constants[name] = 1  # Triton's own rule: a 1 becomes a constant
            continue
        signature[name] = _type(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and name not in free):
            divisible = isinstance(value, torch.Tensor) or value % 16 == 0
            attributes[names.index(name),] = [["tt.divisibility", 16]] if divisible else []
    for name, value in constants.items():
        if isinstance(value, str):
            attributes[names.index(name),] = []
    numbered = {(names.index(name),): value for name, value in constants.items()}
    return ASTSource(launch.kernel, signature, numbered, dict(sorted(attributes.items())))


def _type(value: torch.Tensor | float) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
