"""What FP4's codecs on a GPU are tried on, beside `gpu.bit_cases`: weights of every kind, codes, scales, refusals.

A case is run twice, by the codecs of the device and by the reference in plain torch on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.fp4 import MXFP4_BLOCK, NVFP4_BLOCK, TensorScale, tensor_scale
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.codecs.values import U8, U16, float_to_bf16
from suites.gpu.bit_cases import Arrays, Bench, Case, figures, tensors, weights

FORMS = (False, True)
"""Whether NVFP4's tensor scale divides."""

SIZES = (1.0, 1e-4, 3e-38, 1e30)
"""Tensor scales at which codes are decoded: at the third, products are subnormal."""


def cases(bench: Bench) -> Iterator[Case]:
    """Yield every case."""
    small = weights(bench)
    for kind, bits in small.items():
        yield from _encoding(bench, kind, bits)
    yield from _decoding(bench)
    rows, columns = bench.matrix
    random = np.random.default_rng(17).standard_normal(bench.matrix, np.float32)
    yield from _encoding(bench, f"{rows}x{columns}", float_to_bf16(random * np.float32(0.02)))
    yield from _fake(bench, small["any size"])
    yield from _refusals(bench)


def encode_nvfp4(bits: U16, codecs: Codecs, *, divides: bool) -> Arrays:
    """BF16 to NVFP4, back, and at the scales that were chosen."""
    tensor = tensor_scale(codecs.nvfp4.amax(bits), divides=divides)
    codes, stored = (np.empty((bits.shape[0], bits.shape[1] // 2), np.uint8) for _ in range(2))
    scale, chosen = (np.empty((bits.shape[0], bits.shape[1] // NVFP4_BLOCK), np.uint8) for _ in range(2))
    found = codecs.nvfp4.encode(bits, tensor, codes, scale)
    codecs.nvfp4.choose(bits, tensor, chosen)
    codecs.nvfp4.store(bits, chosen, tensor, stored)
    back = np.empty_like(bits)
    codecs.nvfp4.decode(codes, scale, tensor, back)
    arrays: Arrays = {"codes": codes, "scale": scale, "chosen": chosen, "stored": stored, "decoded": back}
    return arrays | figures(found)


def encode_mxfp4(bits: U16, codecs: Codecs) -> Arrays:
    """BF16 to MXFP4, back, and again from there: codes and scales come back."""
    codes, again = (np.empty((bits.shape[0], bits.shape[1] // 2), np.uint8) for _ in range(2))
    scale, chosen = (np.empty((bits.shape[0], bits.shape[1] // MXFP4_BLOCK), np.uint8) for _ in range(2))
    found = codecs.mxfp4.encode(bits, codes, scale)
    codecs.mxfp4.choose(bits, chosen)
    back = np.empty_like(bits)
    codecs.mxfp4.decode(codes, scale, back)
    codecs.mxfp4.store(back, scale, again)
    arrays: Arrays = {"codes": codes, "scale": scale, "chosen": chosen, "decoded": back, "codes again": again}
    return arrays | figures(found)


def decode(codes: U8, scale: U8, tensor: TensorScale | None, codecs: Codecs) -> Arrays:
    """NVFP4 to BF16; without a tensor scale MXFP4."""
    out = np.empty((codes.shape[0], codes.shape[1] * 2), np.uint16)
    if tensor:
        codecs.nvfp4.decode(codes, scale, tensor, out)
    else:
        codecs.mxfp4.decode(codes, scale, out)
    return {"decoded": out}


def _form(divides: bool) -> str:  # noqa: FBT001 - one of `FORMS`
    return "whose tensor scale divides" if divides else "whose tensor scale multiplies"


def _encoding(bench: Bench, kind: str, bits: U16) -> Iterator[Case]:
    for divides in FORMS:
        name = f"BF16 -> NVFP4 {_form(divides)} -> BF16, {kind}"
        yield bench.case(name, partial(encode_nvfp4, bits, divides=divides))
    yield bench.case(f"BF16 -> MXFP4 -> BF16, {kind}", partial(encode_mxfp4, bits))


def _decoding(bench: Bench) -> Iterator[Case]:
    row = (np.arange(8) * 0x22 + 0x10).astype(np.uint8)  # 0x10, 0x32 ... 0xFE: all 16 codes
    scale = np.arange(0x7F, dtype=np.uint8)[:, None]
    for divides in FORMS:
        for value in SIZES[:2] if divides else SIZES:
            job = partial(decode, np.tile(row, (0x7F, 1)), scale, TensorScale(value, divides))
            yield bench.case(f"NVFP4 {_form(divides)}, {value:g} -> BF16, all codes at all block scales", job)
    powers = np.arange(253, dtype=np.uint8)[:, None]
    job = partial(decode, np.tile(row, (253, 2)), powers, None)
    yield bench.case("MXFP4 -> BF16, all codes at all powers up to 2^125", job)


def _fake(bench: Bench, bits: U16) -> Iterator[Case]:
    """Yield rounding for training, which has no place in the seam."""
    from k2quant.kernels.codecs.gpu import fp4

    cpu, given = torch.device("cpu"), torch.from_numpy(bits.copy()).view(torch.bfloat16)
    works: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[torch.Tensor, ...]]] = {
        "MXFP4": (fp4.fake_quantize_mxfp4, reference.fake_quantize_mxfp4, (given,))
    }
    for divides in FORMS:
        tensor = reference.nvfp4_tensor_scale(given.abs().max().float(), divides=divides)
        pair = (partial(each.fake_quantize_nvfp4, divides=divides) for each in (fp4, reference))
        works[f"NVFP4 {_form(divides)}"] = (*pair, (given, tensor))  # type: ignore[assignment]  # two of them
    for name, (ours, truth, inputs) in works.items():
        case = f"BF16 rounded to {name} and back, any size"
        yield Case(case, partial(tensors, ours, bench.device, *inputs), partial(tensors, truth, cpu, *inputs))


def _refusals(bench: Bench) -> Iterator[Case]:
    codes, scale, ones = np.zeros((2, 16), np.uint8), np.full((2, 2), 0x38, np.uint8), np.full((2, 1), 127, np.uint8)
    bits, out = np.zeros((2, 32), np.uint16), np.empty((2, 32), np.uint16)
    bits[1, 5] = 0xFF80
    good = TensorScale(1.0, divides=False)
    jobs: dict[str, Callable[[Codecs], object]] = {
        "a NaN block scale": lambda c: c.nvfp4.decode(codes, scale | np.uint8(0x7F), good, out),
        "a negative tensor scale": lambda c: c.nvfp4.decode(codes, scale, TensorScale(-1.0, divides=False), out),
        "a divisor of zero": lambda c: c.nvfp4.decode(codes, scale, TensorScale(0.0, divides=True), out),
        "a block scale of zero, written": lambda c: c.nvfp4.store(out * np.uint16(0), scale * np.uint8(0), good, codes),
        "an infinite weight, to NVFP4": lambda c: c.nvfp4.encode(bits, good, codes.copy(), scale.copy()),
        "an infinite weight, to MXFP4": lambda c: c.mxfp4.encode(bits, codes.copy(), ones.copy()),
        "a scale of 255": lambda c: c.mxfp4.decode(codes, ones | np.uint8(255), out),
        "a product beyond BF16": lambda c: c.mxfp4.decode(codes | np.uint8(7), ones * np.uint8(2), out),
    }

    def void(job: Callable[[Codecs], object], codecs: Codecs) -> Arrays:
        job(codecs)
        return {"refused": np.zeros(0, np.uint8)}

    for name, job in jobs.items():
        yield bench.case(f"refused: FP4, {name}", partial(void, job))
