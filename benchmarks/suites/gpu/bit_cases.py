"""What the codecs of a GPU are tried on: every BF16 number and FP8 code, grids, denormals, bad values, whole matrices.

A case is run twice, by the codecs of the device and by the reference in plain torch on the CPU, and gives arrays by
name, or the sentence with which it was refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from k2quant.ground.release import HIDDEN, INNER
from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.grids import BLOCK, FAKE_BITS, GROUP, Grid
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.codecs.values import F32, U16, ValueAt, float_to_bf16
from k2quant.kernels.products import reference as product_reference
from k2quant.kernels.products.packed.int4 import Int4Weight

Arrays = dict[str, NDArray[Any]]
Job = Callable[[Codecs], Arrays]

FINITE = 0x7F80
"""BF16 magnitudes below infinity."""
TOP_BINADE = 0x7F00
"""The magnitudes of the largest binade begin here: rounded up, they can exceed BF16."""
NANS = (0x7F, 0xFF)
"""FP8 codes that are no numbers."""
FP8_LARGEST_SCALE = 2.0**118
"""Times 448 it stays below the largest BF16."""
INT4_LARGEST_SCALE = 0x7D80
"""BF16 bits of 2^124: times 8 it stays below the largest BF16."""
BLOCKS = (BLOCK, (1, 128), (24, 40))
GRIDS: tuple[tuple[Grid, bool], ...] = (("moonshot", True), ("moonshot", False), ("compressed-tensors", True))
MATRIX = (INNER, HIDDEN)
"""An expert's gate."""
RAGGED = (393, 1056)
"""Rows and columns that divide no block and no tile."""


@dataclass(frozen=True, slots=True)
class Case:
    """One codec on one input."""

    name: str
    ours: Callable[[], Arrays]
    truth: Callable[[], Arrays]


@dataclass(frozen=True, slots=True)
class Bench:
    """Whom to compare, and on how much."""

    ours: Codecs
    truth: Codecs
    device: torch.device
    every: int = 1
    """Of all values each so many-th is taken: more than one only in a dry run."""
    ragged: tuple[int, int] = RAGGED
    matrix: tuple[int, int] = MATRIX

    def case(self, name: str, job: Job) -> Case:
        """Return a case of the seam."""
        return Case(name, partial(outcome, job, self.ours), partial(outcome, job, self.truth))


def outcome(job: Job, codecs: Codecs) -> Arrays:
    """Return what a job gives; a refusal's sentence as bytes."""
    try:
        return job(codecs)
    except ValueAt as error:
        return {"refused": np.frombuffer(str(error).encode(), np.uint8)}


def cases(bench: Bench) -> Iterator[Case]:
    """Yield every case: what K2's checkpoints have first, other blocks and widths last."""
    small = weights(bench)
    for kind, bits in small.items():
        yield from _encoding(bench, kind, bits, BLOCKS[:1])
    yield from _decoding(bench)
    yield from _fused(bench)
    yield from _matrices(bench)
    yield from _extremes(bench)
    yield from _floats(bench)
    yield from _refusals(bench)
    yield from _operators(bench, small)
    for kind, bits in small.items():
        yield from _encoding(bench, kind, bits, BLOCKS[1:])


def weights(bench: Bench) -> dict[str, U16]:
    """Return BF16 bits `[R, K]` by kind, K a multiple of 32; the same in every run."""
    random = np.random.default_rng(7)
    every = np.concatenate([np.arange(TOP_BINADE) | sign for sign in (0, 0x8000)]).astype(np.uint16)[:: bench.every]
    every = every[: len(every) // 128 * 128]
    alone = np.zeros((len(every), GROUP), np.uint16)
    alone[:, 5] = every
    rows, columns = bench.ragged
    scale = random.random((rows, -(-columns // 128)), np.float32)
    sign = random.integers(0, 2, bench.ragged, np.uint16) << 15
    fp8, multiples, int4 = (np.empty(bench.ragged, np.uint16) for _ in range(3))
    bench.truth.fp8.decode(random.integers(0, 0x7F, bench.ragged, np.uint8), scale, (1, 128), fp8)
    powers = np.exp2(random.integers(-12, -9, scale.shape)).astype(np.float32)
    bench.truth.fp8.decode(random.integers(0, 0x77, bench.ragged, np.uint8), powers, (1, 128), multiples)
    bench.truth.int4.decode(words(random, rows, columns), random.random((rows, columns // GROUP), np.float32), 32, int4)
    near = int4.copy()
    near[::2, ::GROUP] += 1
    return {
        "every BF16 number": every.reshape(-1, 128),
        "every BF16 number, shuffled": random.permutation(every).reshape(-1, 128),
        "every BF16 number, alone in a group": alone.reshape(-1, 4 * GROUP),
        "random": float_to_bf16(random.standard_normal(bench.ragged, np.float32) * np.float32(0.02)),
        "any size": random.integers(0, 0x7E00, bench.ragged, np.uint16) | sign,
        "denormal": random.integers(0, 0x300, bench.ragged, np.uint16) | sign,
        "few values": random.integers(0, 4, bench.ragged, np.uint16) | sign,
        "on the FP8 grid": fp8 | sign,
        "FP8 codes times powers of two": multiples | sign,
        "on the INT4 grid": int4,
        "near the INT4 grid": near,
    }


def words(random: np.random.Generator, rows: int, columns: int) -> NDArray[np.int32]:
    """Return random INT4 words `[R, K/8]`."""
    return random.integers(-(2**31), 2**31, (rows, columns // 8)).astype(np.int32)


def figures(found: Figures) -> Arrays:
    """Return figures as arrays: what must be equal, and sums, which another order of adding may round otherwise."""
    return {
        "count, changed, worst": np.array([found.count, found.changed, found.worst]),
        "sums": np.array([found.energy, found.error]),
    }


def scales(bits: U16, block: tuple[int, int]) -> tuple[int, int]:
    """Return how many blocks there are, down and across."""
    return -(-bits.shape[0] // block[0]), -(-bits.shape[1] // block[1])


def encode_fp8(bits: U16, block: tuple[int, int], codecs: Codecs) -> Arrays:
    """BF16 to FP8, back, and again from there: codes and scales come back."""
    codes, again = np.empty(bits.shape, np.uint8), np.empty(bits.shape, np.uint8)
    scale, chosen = (np.empty(scales(bits, block), np.float32) for _ in range(2))
    found = codecs.fp8.encode(bits, block, codes, scale)
    codecs.fp8.choose(bits, block, chosen)
    stored = np.empty_like(codes)
    codecs.fp8.store(bits, chosen, block, stored)
    back, scale_again = np.empty_like(bits), np.empty_like(scale)
    codecs.fp8.decode(codes, scale, block, back)
    codecs.fp8.encode(back, block, again, scale_again)
    arrays: Arrays = {"codes": codes, "scale": scale, "chosen": chosen, "stored": stored, "decoded": back}
    return {**arrays, "codes again": again, "scale again": scale_again, **figures(found)}


def encode_int4(bits: U16, grid: Grid, codecs: Codecs, *, recover: bool = True, width: int = 4) -> Arrays:
    """BF16 to INT4, and back."""
    packed, scale = np.empty((bits.shape[0], bits.shape[1] // 8), np.int32), bits[:, ::GROUP].copy()
    found = codecs.int4.encode(bits, grid, packed, scale, recover=recover, bits=width)
    chosen, stored = np.empty_like(scale), np.empty_like(packed)
    codecs.int4.choose(bits, grid, chosen, recover=recover, bits=width)
    codecs.int4.store(bits, chosen, grid, stored, bits=width)
    back = np.empty_like(bits)
    codecs.int4.decode(packed, _wide(scale), GROUP, back)
    arrays = {"packed": packed, "scale": scale, "chosen": chosen, "stored": stored, "decoded": back}
    return arrays | figures(found)


def search_int4(bits: U16, codecs: Codecs, *, width: int = 4, weighed: bool = True) -> Arrays:
    """Search INT4 scales, columns weighed by moments of every size or not at all, and judge them."""
    random = np.random.default_rng(13)
    size = np.ldexp(random.random(bits.shape[1], np.float32), random.integers(-16, 16, bits.shape[1]))
    importance = size.astype(np.float32) if weighed else None
    mean = (np.sqrt(size) * random.uniform(-1, 1, len(size))).astype(np.float32) if weighed else None
    scale = np.empty((len(bits), bits.shape[1] // GROUP), np.uint16)
    codecs.int4.search(bits, importance, scale, mean=mean, bits=width)
    error = codecs.int4.weighted_error(bits, scale, importance, mean=mean, bits=width)
    return {"searched": scale, "error": np.array([error])}


def _wide(bits: U16) -> F32:
    """Return BF16 bits as float32 numbers."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _encoding(bench: Bench, kind: str, bits: U16, blocks: tuple[tuple[int, int], ...]) -> Iterator[Case]:
    for block in blocks:
        name = f"BF16 -> FP8 {block[0]}x{block[1]} -> BF16, {kind}"
        yield bench.case(name, partial(encode_fp8, bits, block))
    if BLOCK not in blocks:
        for width in (3, 2):
            name = f"BF16 -> INT{width} moonshot -> BF16, {kind}"
            yield bench.case(name, partial(encode_int4, bits, "moonshot", width=width))
            yield bench.case(f"INT{width} scales, searched, {kind}", partial(search_int4, bits, width=width))
        return
    for grid, recover in GRIDS:
        name = f"BF16 -> INT4 {grid}{'' if recover else ' without recovery'} -> BF16, {kind}"
        yield bench.case(name, partial(encode_int4, bits, grid, recover=recover))
    for weighed in (True, False):
        name = f"INT4 scales, searched{', columns weighed' if weighed else ''}, {kind}"
        yield bench.case(name, partial(search_int4, bits, weighed=weighed))


def fp8_everything(bench: Bench) -> tuple[NDArray[np.uint8], F32]:
    """Return each of the 254 codes, and two zeros, `[R, 256]` times scales `[R, 1]` of every size, 0 among them."""
    codes = np.array([code for code in range(256) if code not in NANS] + [0, 0], np.uint8)
    random = np.random.default_rng(3)
    exponents = np.linspace(-149, np.log2(FP8_LARGEST_SCALE) - 1, 512 // min(bench.every, 64))
    size = np.exp2(exponents) * (1 + random.random(len(exponents)))
    edges = [0.0, 2.0**-149, 2.0**-127, 2.0**-126, 1.0, 1 / 448, FP8_LARGEST_SCALE]
    scale = np.concatenate([edges, size]).astype(np.float32)[:, None]
    return np.tile(codes, (len(scale), 1)), scale


def int4_everything(bench: Bench) -> tuple[NDArray[np.int32], U16]:
    """Return each of the 16 codes at each of the 8 places of a word, `[R, 16]`, times BF16 scales `[R, 4]`, 0 too."""
    nibbles = (np.arange(16)[:, None] + np.arange(8)) % 16
    row = np.bitwise_or.reduce(nibbles.astype(np.uint32) << (4 * np.arange(8, dtype=np.uint32)), axis=1)
    scale = np.arange(0, INT4_LARGEST_SCALE, bench.every).astype(np.uint16)[:, None].repeat(4, 1)
    return np.tile(row.view(np.int32), (len(scale), 1)), scale


def _decoding(bench: Bench) -> Iterator[Case]:
    codes, scale = fp8_everything(bench)
    packed, factors = int4_everything(bench)

    def decode_fp8(codecs: Codecs) -> Arrays:
        out = np.empty(codes.shape, np.uint16)
        codecs.fp8.decode(codes, scale, (1, 256), out)
        return {"decoded": out}

    def decode_int4(codecs: Codecs) -> Arrays:
        out = np.empty((len(packed), 128), np.uint16)
        codecs.int4.decode(packed, _wide(factors), GROUP, out)
        return {"decoded": out}

    yield bench.case("FP8 -> BF16, all 254 codes, scales of every size", decode_fp8)
    yield bench.case("INT4 -> BF16, all codes at all places, all BF16 scales below 2^124", decode_int4)


def to_int4(codes: NDArray[np.uint8], scale: F32, block: tuple[int, int], grid: Grid, codecs: Codecs) -> Arrays:
    """FP8 to INT4 in one pass."""
    packed = np.empty((codes.shape[0], codes.shape[1] // 8), np.int32)
    out = np.empty((codes.shape[0], codes.shape[1] // GROUP), np.uint16)
    found = codecs.fused["fp8", "int4"](codes, scale, block, grid, packed, out)
    return {"packed": packed, "scale": out} | figures(found)


def to_fp8(packed: NDArray[np.int32], scale: F32, block: tuple[int, int], codecs: Codecs) -> Arrays:
    """INT4 to FP8 in one pass."""
    codes = np.empty((packed.shape[0], packed.shape[1] * 8), np.uint8)
    out = np.empty((-(-codes.shape[0] // block[0]), -(-codes.shape[1] // block[1])), np.float32)
    found = codecs.fused["int4", "fp8"](packed, scale, GROUP, block, codes, out)
    return {"codes": codes, "scale": out} | figures(found)


def _fused(bench: Bench) -> Iterator[Case]:
    codes, scale = fp8_everything(bench)
    packed, factors = int4_everything(bench)
    for grid in ("moonshot", "compressed-tensors"):
        job = partial(to_int4, codes, scale, (1, 256), grid)
        yield bench.case(f"FP8 -> INT4 {grid}, all 254 codes, scales of every size", job)
    for block in BLOCKS:
        job = partial(to_fp8, packed, _wide(factors), block)
        yield bench.case(
            f"INT4 -> FP8 {block[0]}x{block[1]}, all codes at all places, all BF16 scales below 2^124", job
        )


def one_by_one(job: Callable[[U16, Codecs], Arrays], parts: list[U16], codecs: Codecs) -> Arrays:
    """Do a job on each of several arrays: one that is refused hides none of the others."""
    found: Arrays = {}
    for number, part in enumerate(parts):
        found |= {f"{number}: {name}": array for name, array in outcome(partial(job, part), codecs).items()}
    return found


def _extremes(bench: Bench) -> Iterator[Case]:
    """Yield what `weights` leaves out of all BF16 values: the largest binade, infinities and NaN."""
    signs = (0, 0x8000)
    large = np.concatenate([np.arange(TOP_BINADE, FINITE) | sign for sign in signs]).astype(np.uint16)
    other = np.concatenate([np.arange(FINITE, 0x8000) | sign for sign in signs]).astype(np.uint16)
    kinds = {
        "the largest binade": [each.repeat(GROUP)[None, :] for each in large[:: min(bench.every, 61), None]],
        "infinities and NaN": [each.repeat(GROUP)[None, :] for each in other[:: min(bench.every, 61), None]],
    }
    for kind, parts in kinds.items():
        fp8, int4 = (lambda bits, c: encode_fp8(bits, BLOCK, c)), (lambda bits, c: encode_int4(bits, "moonshot", c))
        yield bench.case(f"BF16 -> FP8 128x128 -> BF16, {kind}", partial(one_by_one, fp8, parts))
        yield bench.case(f"BF16 -> INT4 moonshot -> BF16, {kind}", partial(one_by_one, int4, parts))


def _floats(bench: Bench) -> Iterator[Case]:
    random = np.random.default_rng(11)
    high = np.arange(0, 1 << 16, bench.every, dtype=np.uint32)[:, None] << 16
    wide = (high | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).view(np.float32)
    wide = np.where(np.isfinite(_wide(float_to_bf16(wide))), wide, np.float32(1))
    half = np.arange(0, 1 << 16, bench.every).astype(np.uint16).view(np.float16)
    half = np.where(np.isfinite(half), half, np.float16(1))[:, None]
    one, other = (random.integers(0, FINITE, bench.ragged, np.uint16) for _ in range(2))

    def rounded(values: Any, codecs: Codecs) -> Arrays:
        out = np.empty(values.shape, np.uint16)
        codecs.floats.to_bf16(values, out)
        return {"rounded": out}

    yield bench.case("float32 -> BF16, every BF16 number, ties, and what is just off them", partial(rounded, wide))
    yield bench.case("float16 -> BF16, every number", partial(rounded, half))
    yield bench.case("comparing BF16", lambda codecs: figures(codecs.floats.compare(one, other)))


def _refusals(bench: Bench) -> Iterator[Case]:
    codes, out = np.zeros((2, 32), np.uint8), np.empty((2, 32), np.uint16)
    codes[1, 3] = NANS[0]
    bits = np.zeros((2, 32), np.uint16)
    bits[1, 5] = 0xFF80
    packed, scale = np.zeros((2, 4), np.int32), np.empty((2, 1), np.uint16)
    ones = np.ones((1, 1), np.float32)
    jobs: dict[str, Callable[[Codecs], object]] = {
        "a NaN code": lambda c: c.fp8.decode(codes, ones, (128, 128), out),
        "a negative FP8 scale": lambda c: c.fp8.decode(codes, -ones, (128, 128), out),
        "an overflow": lambda c: c.int4.decode(packed, np.full((2, 1), 1e38, np.float32), GROUP, out),
        "a NaN INT4 scale": lambda c: c.int4.decode(packed, np.full((2, 1), np.nan, np.float32), GROUP, out),
        "an infinite weight, to INT4": lambda c: c.int4.encode(bits, "moonshot", packed.copy(), scale),
        "an infinite weight, to FP8": lambda c: c.fp8.encode(bits, (128, 128), codes.copy(), ones.copy()),
        "an infinite float32": lambda c: c.floats.to_bf16(np.full((1, 32), np.inf, np.float32), out[:1]),
    }

    def void(job: Callable[[Codecs], object], codecs: Codecs) -> Arrays:
        job(codecs)
        return {"refused": np.zeros(0, np.uint8)}

    for name, job in jobs.items():
        yield bench.case(f"refused: {name}", partial(void, job))


def tensors(function: Callable[..., Any], device: torch.device, *inputs: Tensor) -> Arrays:
    """Return a function's results on tensors there, as bytes."""
    found = function(*(each.to(device) for each in inputs))
    results = found if isinstance(found, tuple) else (found,)
    return {f"result {place}": as_array(each) for place, each in enumerate(results)}


def as_array(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor's bits as unsigned integers of its own size."""
    kind = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[tensor.element_size()]
    found: NDArray[Any] = tensor.contiguous().view(kind).cpu().numpy()
    return found


def _operators(bench: Bench, small: dict[str, U16]) -> Iterator[Case]:
    """Yield what has no place in the seam: rounding for training, activations, layouts."""
    from k2quant.kernels.codecs.gpu import fp8, int4
    from k2quant.kernels.products.gpu import repack, w8a8

    def case(name: str, ours: Callable[..., Any], truth: Callable[..., Any], *inputs: Tensor) -> Case:
        cpu = torch.device("cpu")
        return Case(name, partial(tensors, ours, bench.device, *inputs), partial(tensors, truth, cpu, *inputs))

    for kind in (
        "every BF16 number, shuffled",
        "random",
        "denormal",
        "on the INT4 grid",
        "on the FP8 grid",
        "FP8 codes times powers of two",
    ):
        given = torch.from_numpy(small[kind].copy()).view(torch.bfloat16)
        for width in FAKE_BITS:
            name = f"BF16 rounded to INT{width} and back, {kind}"
            ours = partial(int4.fake_quantize_int4, grid="moonshot", bits=width)
            yield case(name, ours, partial(reference.fake_quantize_int4, grid="moonshot", bits=width), given)
        ours = partial(fp8.fake_quantize_fp8, block=BLOCK, recover=True)
        yield case(f"BF16 rounded to FP8 and back, {kind}", ours, _fake_fp8, given)
        truth = product_reference.fp8_quantize_activations
        yield case(f"activations -> FP8 1x128, {kind}", w8a8.quantize_activations, truth, given)
    random = np.random.default_rng(5)
    packed = torch.from_numpy(words(random, *bench.ragged))
    scale = torch.from_numpy(random.random((bench.ragged[0], bench.ragged[1] // GROUP), np.float32)).bfloat16()
    yield case("INT4 regrouped for a GPU", repack.repack_int4, _regrouped, packed, scale)
    yield case(
        "INT4 regrouped and back", lambda *pair: repack.unpack_int4(*repack.repack_int4(*pair)), _same, packed, scale
    )


def _fake_fp8(given: Tensor) -> Tensor:
    codes, scale, _ = reference.bf16_to_fp8(given, BLOCK)
    return reference.fp8_to_bf16(codes, scale, BLOCK)


def _regrouped(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    weight = Int4Weight.laid_out(packed, scale, "groups")
    return weight.codes, weight.scale


def _same(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return packed, scale


def _matrices(bench: Bench) -> Iterator[Case]:
    """Yield each codec on one matrix of K2's size."""
    rows, columns = bench.matrix
    random = np.random.default_rng(1)
    bits = float_to_bf16(random.standard_normal(bench.matrix, np.float32) * np.float32(0.02))
    size = f"{rows}x{columns}"
    yield bench.case(f"BF16 -> FP8 128x128 -> BF16, {size}", partial(encode_fp8, bits, BLOCK))
    for grid, recover in GRIDS:
        name = f"BF16 -> INT4 {grid}{'' if recover else ' without recovery'} -> BF16, {size}"
        yield bench.case(name, partial(encode_int4, bits, grid, recover=recover))
    codes = random.integers(0, 0x7F, bench.matrix, np.uint8)
    scale = random.random((-(-rows // 128), -(-columns // 128)), np.float32)
    yield bench.case(f"FP8 -> INT4 moonshot, {size}", partial(to_int4, codes, scale, BLOCK, "moonshot"))
    factors = random.random((rows, columns // GROUP), np.float32)
    factors = _wide(float_to_bf16(factors))
    packed = words(random, rows, columns)
    yield bench.case(f"INT4 -> FP8 128x128, {size}", partial(to_fp8, packed, factors, BLOCK))
    yield bench.case(f"INT4 scales, searched, columns weighed, {size}", partial(search_int4, bits))
