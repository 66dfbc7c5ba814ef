"""Tiles of quantised weights for the Triton kernels: read packed, unpacked in registers, used, never written.

A kernel is written once for every format: it takes pointers to codes, scales and what scales a whole matrix, and the
constants FORMAT, SCALE_ROWS, SCALE_COLUMNS and DIVIDES, and calls `multiply` and then `finished`, or `weight_tile`. To
add a format, add its branch there and its loader beside those that follow.

Under the interpreter (no GPU, `TRITON_INTERPRET=1`) there is no inline assembly, no BF16 constant, and BF16 matrix
products are garbage; so it takes the plain form of the same arithmetic, and products are made in float32.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from k2quant.kernels.codecs.gpu.fp4_rules import fp4_step, fp4_value, mxfp4_step
from k2quant.kernels.codecs.gpu.fp8_rules import fp8_value
from k2quant.kernels.devices.rounding import INTERPRETED, round_to


def _ptx(registers: str, *lines: str) -> Any:
    """Return a block of assembly with registers of its own."""
    block = "".join(f"    {line};\n" for line in (f".reg .b32 {registers}", *lines))
    return tl.constexpr(f"\n{{\n{block}}}\n")


def _unpacked_word(word: str, shifted: str, outputs: tuple[str, ...]) -> list[str]:
    """Return the lines that make the eight codes of a word, two to a register."""
    sources = (word, *(f"{shifted}{step}" for step in range(1, 4)))
    return [
        *(f"shr.u32 {shifted}{step}, {word}, {4 * step}" for step in range(1, 4)),
        *(f"lop3.b32 n{step}, {source}, 0x000f000f, 0x43004300, 0xea" for step, source in enumerate(sources)),
        *(f"fma.rn.bf16x2 {output}, n{step}, one, minus136" for step, output in enumerate(outputs)),
    ]


def _scaled_pair(number: int) -> list[str]:
    """Return the lines that make one of eight results: nibbles step and step + 4 of a word, times their scales."""
    word, step = f"${8 + number // 4}", number % 4
    source = "word" if step else word
    return [
        *([f"shr.u32 word, {word}, {4 * step}"] if step else []),
        f"lop3.b32 code, {source}, 0x000f000f, 0x43004300, 0xea",
        "fma.rn.bf16x2 code, code, one, minus136",
        f"fma.rn.bf16x2 ${number}, code, $10, nothing",
    ]


def _widened_pair(pair: str, output: str) -> list[str]:
    """Return the lines that make two BF16 numbers of two e4m3 codes that stand at the top of half words."""
    return [
        f"shr.u32 magnitude, {pair}, 4",
        "and.b32 magnitude, magnitude, 0x07f007f0",
        f"lop3.b32 {pair}, {pair}, 0x80008000, magnitude, 0xea",
        f"fma.rn.bf16x2 {output}, {pair}, up, nothing",
    ]


def _fp4_pair(number: int) -> list[str]:
    """Return the lines that make one of eight results: the E2M1 codes at one place of two words."""
    source, place = ("second" if number > 3 else "first"), 4 * (number % 4)
    magnitude = f"shl.b32 bits, {source}, {6 - place}" if place < 6 else f"shr.u32 bits, {source}, {place - 6}"
    sign = f"shl.b32 sign, {source}, {12 - place}" if place < 12 else f"mov.b32 sign, {source}"
    return [
        magnitude,
        sign,
        "and.b32 bits, bits, 0x01c001c0",
        "lop3.b32 bits, sign, 0x80008000, bits, 0xea",
        f"fma.rn.bf16x2 ${number}, bits, up, nothing",
    ]


_CODE_CONSTANTS = ("mov.b32 one, 0x3F803F80", "mov.b32 minus136, 0xC308C308")

_UNPACK_INT4 = _ptx(
    "a1, a2, a3, b1, b2, b3, n0, n1, n2, n3, one, minus136",
    *_CODE_CONSTANTS,
    *_unpacked_word("$8", "a", ("$0", "$1", "$2", "$3")),
    *_unpacked_word("$9", "b", ("$4", "$5", "$6", "$7")),
)
"""Two words to sixteen BF16 codes. `lop3` 0xEA is (a & b) | c: a nibble under the exponent of 128 reads as 128 + n, and
adding -136 leaves n - 8, exactly. Each instruction works on the two halves of a word, that is on columns 8 apart.
A plain sum of two BF16 numbers needs sm_90; the fused one with a factor of 1 needs sm_80 and costs the same."""

_UNPACK_SCALED_INT4 = _ptx(
    "word, code, one, minus136, nothing",
    *_CODE_CONSTANTS,
    "mov.b32 nothing, 0x80008000",
    *(line for number in range(8) for line in _scaled_pair(number)),
)
"""The same, and each code times its scale, rounded once: $10 holds the scales of the two words. Left to itself, the
compiler pairs the halves of the products anew, which costs as much as the products."""

_UNPACK_FP8 = _ptx(
    "low, high, magnitude, up, nothing",
    "mov.b32 up, 0x7B807B80",
    "mov.b32 nothing, 0x80008000",
    "prmt.b32 low, $2, 0, 0x1404",
    "prmt.b32 high, $2, 0, 0x3424",
    *_widened_pair("low", "$0"),
    *_widened_pair("high", "$1"),
)
"""Four e4m3 codes to four BF16 numbers: each byte to the top of a half word, its seven low bits four bits further down,
below the sign, where BF16's exponent is one bit longer, then times 2^120 (plus -0: no change), subnormals included."""


_UNPACK_FP4 = _ptx(
    "first, second, bits, sign, up, nothing",
    "mov.b32 up, 0x7E807E80",
    "mov.b32 nothing, 0x80008000",
    "prmt.b32 first, $8, $9, 0x5410",
    "prmt.b32 second, $8, $9, 0x7632",
    *(line for number in range(8) for line in _fp4_pair(number)),
)
"""Two words to sixteen BF16 numbers, one E2M1 code of each to a register: first the low halves of both words side by
side, then the high ones. The magnitude's three bits go to the lowest of the exponent and the highest of the mantissa,
the sign to the top; then times 2^126 (plus -0: no change), the subnormal 0.5 included."""


@triton.jit
def _unpack_words(words):
    """Return the sixteen BF16 codes of each pair of words `[N, W]`, in column order: `[N, 8 * W]`."""
    n0, n1, n2, n3, n4, n5, n6, n7 = tl.inline_asm_elementwise(
        _UNPACK_INT4,
        "=r,=r,=r,=r,=r,=r,=r,=r,r,r",
        [words],
        dtype=(tl.bfloat16,) * 8,
        is_pure=True,
        pack=2,
    )
    even = tl.join(tl.join(n0, n4), tl.join(n2, n6))
    odd = tl.join(tl.join(n1, n5), tl.join(n3, n7))
    W: tl.constexpr = words.shape[1]
    runs = tl.join(even, odd).reshape(words.shape[0], W // 4, 4, 8)
    return tl.permute(runs, (0, 1, 3, 2)).reshape(words.shape[0], W * 8)


@triton.jit
def _unpack_words_plainly(words):
    """Do `_unpack_words` in integers, on any device; returns int32 codes."""
    W: tl.constexpr = words.shape[1]
    pairs = tl.permute(words.reshape(words.shape[0], W // 4, 2, 2), (0, 1, 3, 2))  # q before p
    pairs = pairs.reshape(words.shape[0], W // 4, 2, 1, 2, 1)
    step = tl.arange(0, 4)[None, None, None, :, None, None]
    half = tl.arange(0, 2)[None, None, None, None, None, :]
    return (((pairs >> (4 * step + 16 * half)) & 15) - 8).reshape(words.shape[0], W * 8)


@triton.jit
def int4_codes(words):
    """Return the codes of words `[N, W]` in column order, `[N, 8 * W]`: BF16, or int32 under the interpreter."""
    return _unpack_words_plainly(words) if INTERPRETED else _unpack_words(words)


@triton.jit
def int4_tile(codes_ptr, scale_ptr, rows, rows_ok, k, N, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr):
    """Return INT4 weights `[BN, BLOCK_K]` in the layout `groups` of `packed/int4`, each code * scale rounded once."""
    word = tl.arange(0, BLOCK_K // 8)
    column = (k // 32 + word // 4).to(tl.int64) * (N * 4) + word % 4
    words = tl.load(codes_ptr + column[None, :] + (rows * 4)[:, None], mask=rows_ok[:, None], other=0)
    group = (k // 32 + tl.arange(0, BLOCK_K // 32)).to(tl.int64) * N
    scale = tl.load(scale_ptr + group[None, :] + rows[:, None], mask=rows_ok[:, None], other=0.0)
    if tl.bfloat16 == DTYPE and not INTERPRETED:
        codes = _unpack_words(words).reshape(words.shape[0], BLOCK_K // 32, 32)
        tile = codes * scale[:, :, None]
    else:
        codes = _unpack_words_plainly(words).to(tl.float32).reshape(words.shape[0], BLOCK_K // 32, 32)
        tile = round_to(codes * scale.to(tl.float32)[:, :, None], DTYPE)
    return tile.reshape(words.shape[0], BLOCK_K)


@triton.jit
def _fp4_numbers(words):
    """Return the BF16 numbers of the codes of words `[N, W]` in column order, `[N, 8 * W]`."""
    n0, n1, n2, n3, n4, n5, n6, n7 = tl.inline_asm_elementwise(
        _UNPACK_FP4,
        "=r,=r,=r,=r,=r,=r,=r,=r,r,r",
        [words],
        dtype=(tl.bfloat16,) * 8,
        is_pure=True,
        pack=2,
    )
    even = tl.join(tl.join(n0, n4), tl.join(n2, n6))
    odd = tl.join(tl.join(n1, n5), tl.join(n3, n7))
    return tl.join(even, odd).reshape(words.shape[0], words.shape[1] * 8)


@triton.jit
def _fp4_numbers_plainly(words):
    """Do `_fp4_numbers` in integers, on any device; returns float32."""
    nibbles = (words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15
    return fp4_value(nibbles).reshape(words.shape[0], words.shape[1] * 8)


@triton.jit
def fp4_codes(words):
    """Return the numbers that E2M1 codes mean, of words `[N, W]`, in column order: BF16, or float32 if interpreted."""
    return _fp4_numbers_plainly(words) if INTERPRETED else _fp4_numbers(words)


@triton.jit
def fp4_words(codes_ptr, rows, rows_ok, k, K, BLOCK_K: tl.constexpr):
    """Return the words `[BN, BLOCK_K / 8]` of a row-major matrix of FP4."""
    place = rows.to(tl.int64)[:, None] * (K // 8) + (k // 8 + tl.arange(0, BLOCK_K // 8))[None, :]
    return tl.load(codes_ptr + place, mask=rows_ok[:, None], other=0)


@triton.jit
def fp4_scales(scale_ptr, rows, rows_ok, k, K, SCALE_COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the bytes of the block scales, int32 `[BN, BLOCK_K / SCALE_COLUMNS]`."""
    place = rows.to(tl.int64)[:, None] * (K // SCALE_COLUMNS)
    place += (k // SCALE_COLUMNS + tl.arange(0, BLOCK_K // SCALE_COLUMNS))[None, :]
    return tl.load(scale_ptr + place, mask=rows_ok[:, None], other=0).to(tl.int32)


@triton.jit
def fp4_factor(scale, FORMAT: tl.constexpr):
    """Return what block scales, bytes as int32, multiply codes with, float32; of NVFP4 without the tensor scale."""
    return fp8_value(scale) if FORMAT == "nvfp4" else mxfp4_step(scale)


@triton.jit
def fp4_tile(
    codes_ptr,
    scale_ptr,
    rows,
    rows_ok,
    k,
    K,
    FORMAT: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return FP4 weights `[BN, BLOCK_K]` of a row-major matrix, NVFP4's without the tensor scale: `finished` has it.

    E2M1 times e4m3 has six bits, and times a power of two has two: they are exact in BF16, and but for the ends of its
    range in FP16.
    """
    words = fp4_words(codes_ptr, rows, rows_ok, k, K, BLOCK_K)
    scale = fp4_factor(fp4_scales(scale_ptr, rows, rows_ok, k, K, SCALE_COLUMNS, BLOCK_K), FORMAT)
    if tl.bfloat16 == DTYPE and not INTERPRETED:
        codes = _fp4_numbers(words).reshape(words.shape[0], BLOCK_K // SCALE_COLUMNS, SCALE_COLUMNS)
        tile = codes * scale.to(tl.bfloat16)[:, :, None]
    else:
        codes = _fp4_numbers_plainly(words).reshape(words.shape[0], BLOCK_K // SCALE_COLUMNS, SCALE_COLUMNS)
        tile = round_to(codes * scale[:, :, None], DTYPE)
    return tile.reshape(words.shape[0], BLOCK_K)


@triton.jit
def finished(acc, whole_ptr, FORMAT: tl.constexpr, DIVIDES: tl.constexpr):
    """Return sums of products with tiles of `fp4_tile` times NVFP4's tensor scale, or divided by it; others as are."""
    if FORMAT == "nvfp4":
        whole = tl.load(whole_ptr)
        if DIVIDES:
            acc = tl.div_rn(acc, whole)
        else:
            acc = acc * whole
    return acc


@triton.jit
def fp8_codes(codes_ptr, rows, rows_ok, k, K, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr):
    """Return e4m3 codes `[BN, BLOCK_K]` of a row-major matrix as numbers of DTYPE, exactly."""
    place = rows.to(tl.int64)[:, None] * K + (k + tl.arange(0, BLOCK_K))[None, :]
    return fp8_numbers(tl.load(codes_ptr + place, mask=rows_ok[:, None], other=0), DTYPE)


@triton.jit
def _fp8_to_bf16(bits):
    """Return e4m3 codes as BF16 numbers, four at a time."""
    return tl.inline_asm_elementwise(_UNPACK_FP8, "=r,=r,r", [bits], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def fp8_numbers(bits, DTYPE: tl.constexpr):
    """Return e4m3 codes, given as bytes in a tensor of any shape, as numbers of DTYPE, exactly.

    The assembly does for BF16 what `fp8_value` does for float32.
    """
    if tl.bfloat16 == DTYPE and not INTERPRETED:
        return _fp8_to_bf16(bits)
    return fp8_value(bits.to(tl.int32)).to(DTYPE)


@triton.jit
def fp8_scale(scale_ptr, rows, rows_ok, k, K, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr):
    """Return the float32 scale `[BN]` of `rows` in the block of column k."""
    place = (rows // SCALE_ROWS).to(tl.int64) * tl.cdiv(K, SCALE_COLUMNS) + k // SCALE_COLUMNS
    return tl.load(scale_ptr + place, mask=rows_ok, other=0.0)


@triton.jit
def weight_tile(
    codes_ptr,
    scale_ptr,
    whole_ptr,
    rows,
    rows_ok,
    k,
    N,
    K,
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    DIVIDES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return the weights of `rows` and of BLOCK_K columns from k on, each rounded once to DTYPE.

    Args:
        codes_ptr: the matrix `[N, K]`; of a stack, that of one expert.
        scale_ptr: its scales.
        whole_ptr: its one tensor scale, of "nvfp4".
        rows: `[BN]`, row numbers; those that are not `rows_ok` give zeros.
        rows_ok: `[BN]`.
        k: first column, a multiple of BLOCK_K.
        N: rows of the matrix.
        K: columns of the matrix, a multiple of BLOCK_K.
        FORMAT: "int4", "fp8", "nvfp4" or "mxfp4".
        SCALE_ROWS: rows of a block of "fp8".
        SCALE_COLUMNS: columns of a block: of "fp8" a multiple of BLOCK_K, else a divisor.
        DIVIDES: whether the tensor scale divides.
        BLOCK_K: columns of the tile: a power of two, 32 or more; of "nvfp4" 16 or more.
        DTYPE: dtype of the result.

    Returns:
        `[BN, BLOCK_K]`.
    """
    if FORMAT == "int4":
        tile = int4_tile(codes_ptr, scale_ptr, rows, rows_ok, k, N, BLOCK_K, DTYPE)
    elif FORMAT == "fp8":
        codes = fp8_codes(codes_ptr, rows, rows_ok, k, K, BLOCK_K, DTYPE)
        scale = fp8_scale(scale_ptr, rows, rows_ok, k, K, SCALE_ROWS, SCALE_COLUMNS)
        tile = round_to(codes.to(tl.float32) * scale[:, None], DTYPE)
    else:
        scale = fp4_scales(scale_ptr, rows, rows_ok, k, K, SCALE_COLUMNS, BLOCK_K)
        if FORMAT == "nvfp4":
            step = fp4_step(scale, tl.load(whole_ptr), FORMAT, DIVIDES)
        else:
            step = mxfp4_step(scale)
        words = fp4_words(codes_ptr, rows, rows_ok, k, K, BLOCK_K)
        codes = fp4_codes(words).to(tl.float32).reshape(words.shape[0], BLOCK_K // SCALE_COLUMNS, SCALE_COLUMNS)
        tile = round_to(codes * step[:, :, None], DTYPE).reshape(words.shape[0], BLOCK_K)
    return tile


@triton.jit
def multiply(
    acc,
    x,
    codes_ptr,
    scale_ptr,
    rows,
    rows_ok,
    k,
    N,
    K,
    FORMAT: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr = False,  # noqa: FBT002  a compile-time constant
):
    """Return acc + x @ tile.T, float32 `[BM, BN]`, for x `[BM, BLOCK_K]` and the tile that `weight_tile` describes.

    ONE_BLOCK says that all rows lie in one block of "fp8", whose scale is then one number.

    FP8 codes are multiplied as they are, and each block's product by its scale in float32: nothing is rounded. Of NVFP4
    the tensor scale is missing, until `finished` has seen the sum.
    """
    if FORMAT == "int4":
        tile = int4_tile(codes_ptr, scale_ptr, rows, rows_ok, k, N, BLOCK_K, x.dtype)
        acc = dot(x, tile.T, acc)
    elif FORMAT == "fp8":
        tile = fp8_codes(codes_ptr, rows, rows_ok, k, K, BLOCK_K, x.dtype)
        if ONE_BLOCK:
            scale = fp8_scale(scale_ptr, tl.min(rows, 0), True, k, K, SCALE_ROWS, SCALE_COLUMNS)
            acc += dot(x, tile.T, tl.zeros_like(acc)) * scale
        else:
            scale = fp8_scale(scale_ptr, rows, rows_ok, k, K, SCALE_ROWS, SCALE_COLUMNS)
            acc += dot(x, tile.T, tl.zeros_like(acc)) * scale[None, :]
    else:
        tile = fp4_tile(codes_ptr, scale_ptr, rows, rows_ok, k, K, FORMAT, SCALE_COLUMNS, BLOCK_K, x.dtype)
        acc = dot(x, tile.T, acc)
    return acc


@triton.jit
def multiply_thin(acc, x_rows, x_ok, codes_ptr, scale_ptr, rows, rows_ok, k, N, BLOCK_K: tl.constexpr):
    """Return acc + x @ tile.T like `multiply`, for INT4, BF16 and few rows of x: a tile never leaves the registers.

    Each of the eight results of unpacking is a product's factor as it stands; x is read in the same order. For tiles
    of less than 64 rows of x, whose products take both factors from registers.

    Args:
        acc: float32 `[BM, BN]`.
        x_rows: pointers `[BM]` to the first column of rows of x.
        x_ok: `[BM]`, rows to be read.
        codes_ptr: the matrix, as for `weight_tile`.
        scale_ptr: its scales.
        rows: `[BN]`, row numbers.
        rows_ok: `[BN]`.
        k: first column, a multiple of BLOCK_K.
        N: rows of the matrix.
        BLOCK_K: columns of the tile: a power of two, 128 or more.
    """
    tiles = thin_tiles(codes_ptr, scale_ptr, rows, rows_ok, k, N, BLOCK_K)
    for part in tl.static_range(8):
        acc = dot(thin_x(x_rows, x_ok, k, part, BLOCK_K), tiles[part].T, acc)
    return acc


@triton.jit
def thin_tiles(codes_ptr, scale_ptr, rows, rows_ok, k, N, BLOCK_K: tl.constexpr):
    """Return eight BF16 tiles `[BN, BLOCK_K / 8]` of scaled weights, the columns of each in the order of `thin_x`."""
    words: tl.constexpr = BLOCK_K // 8
    word = tl.arange(0, words)
    place = (k // 32 + word // 4).to(tl.int64) * (N * 4) + word % 4
    packed = tl.load(codes_ptr + place[None, :] + (rows * 4)[:, None], mask=rows_ok[:, None], other=0)
    group = (k // 32 + tl.arange(0, BLOCK_K // 32)).to(tl.int64) * N
    scale = tl.load(scale_ptr + group[None, :] + rows[:, None], mask=rows_ok[:, None], other=0.0)
    scale = tl.broadcast_to(scale[:, :, None], (rows.shape[0], BLOCK_K // 32, 4)).reshape(rows.shape[0], words)
    return _scaled_words_plainly(packed, scale) if INTERPRETED else _scaled_words(packed, scale)


@triton.jit
def _scaled_words(words, scale):
    """Return the `thin_tiles` of words `[N, W]` with the scale of each."""
    return tl.inline_asm_elementwise(
        _UNPACK_SCALED_INT4,
        "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r",
        [words, scale],
        dtype=(tl.bfloat16,) * 8,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _scaled_words_plainly(words, scale):
    """Do `_scaled_words` in integers, on any device."""
    return (
        _scaled_nibbles(words, scale, 0, 0),
        _scaled_nibbles(words, scale, 0, 1),
        _scaled_nibbles(words, scale, 0, 2),
        _scaled_nibbles(words, scale, 0, 3),
        _scaled_nibbles(words, scale, 1, 0),
        _scaled_nibbles(words, scale, 1, 1),
        _scaled_nibbles(words, scale, 1, 2),
        _scaled_nibbles(words, scale, 1, 3),
    )


@triton.jit
def _scaled_nibbles(words, scale, WORD: tl.constexpr, STEP: tl.constexpr):
    """Return one of the `thin_tiles`: nibbles STEP and STEP + 4 of the first or second word of each pair, scaled."""
    first, second = tl.split(words.reshape(words.shape[0], words.shape[1] // 2, 2))
    word = second if WORD else first
    nibbles = tl.join((word >> 4 * STEP) & 15, (word >> (4 * STEP + 16)) & 15).reshape(words.shape[0], words.shape[1])
    return round_to((nibbles - 8).to(tl.float32) * scale.to(tl.float32), tl.bfloat16)


@triton.jit
def thin_x(x_rows, x_ok, k, part: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the columns of x, `[BM, BLOCK_K / 8]`, that belong to one of the `thin_tiles`: runs of four."""
    word = tl.arange(0, BLOCK_K // 8)
    column = k + word // 4 * 32 + 4 * part + word % 4
    return tl.load(x_rows[:, None] + column[None, :], mask=x_ok[:, None], other=0.0)


@triton.jit
def dot(a, b, acc):
    """Return acc + a @ b in float32; float32 inputs are multiplied as such, not as TF32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")
