"""The machine code behind `dot`: instructions that numba does not know, and the loops that are made of them.

This file is long because it must be one: numba's cache notices changes only in the file of the function that is
compiled, so jitted code and all the code that it calls, the intrinsics included, stay together.

**One instruction does the arithmetic.** `vdpbf16ps` multiplies 16 pairs of BF16 by 16 pairs and adds each pair's two
products to one of 16 float32 sums. The codes of all formats are exact in BF16, so what is multiplied is the plain code.
The scale comes afterwards, in float32: total += scale * sum, once for each 32 columns, or 16 of FP4.

**A lane is a row of W.** Were a lane a column, every sum would need its own scale, and 16 lanes added up at the end.
With a row of W in each lane, x is one pair of columns, broadcast; 16 such products make a group of 32 columns; and one
multiplication takes care of 16 rows' scales. For this a tile of 16 rows times 64 bytes is transposed in registers,
as 32-bit words: word j of row i goes to lane i of register j.

**Two instructions unpack 32 INT4 codes.** A 32-bit word holds 8 nibbles. For columns 2i and 2i + 1,
`vpmultishiftqb` moves the bits that start at nibble 2i to the lower half of the lane, and those at nibble 2i + 1 to the
upper half. `vpermw` then looks each half up in a table of the 16 codes as BF16, held in one register. It regards the
lowest 5 bits, a nibble and a bit of the next one; the table has 32 entries, the 16 codes twice.

FP4 codes are nibbles too: their table holds the numbers of E2M1. NVFP4 and MXFP4 share all code but that which makes
float32 of their scales; MXFP4's count for two times 16 columns each.

**An E4M3 scale and its matrix's own scale become one float32** by a table of 16: what the 16 least E4M3 scales become,
subnormals and the first with an exponent. Any other is one of the latter times a power of two. So S is rounded once, as
it is defined, unless it is so small that float32 has fewer bits for it.

**Four or five unpack 32 FP8 codes.** A byte shuffle copies each code to both bytes of its half lane; `vpermi2b` looks
up the lower byte, and again the higher byte, in tables of the 128 magnitudes; the sign is copied over. Tables make
subnormals and NaN no special case.

**Up to `FEW` rows of x**, the unpacked codes go from register to multiplier. **For more**, a tile of 64 rows of W is
unpacked once into 16 KiB, which stay in the first-level cache while all rows of x pass by, up to 6 at a time: 24 sums
in registers.

Addresses are plain integers in the jitted code. Numba's cache key holds the CPU's name and features, so machine code
of another CPU is never loaded; `supported` guards against compiling for a CPU that lacks the instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, config, njit, types  # type: ignore[attr-defined]  # carray is exported, untold
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numpy.typing import NDArray

from k2quant.kernels.codecs.fp4 import E2M1
from k2quant.kernels.codecs.values import F32, U8, U16

Int = Any  # what numba makes of integers is no one Python type

GROUP = 32
"""Columns that are summed before a scale is applied."""

BLOCK = 16
"""Those of FP4."""

ROWS = 64
"""Rows of W that are unpacked together: four registers' lanes."""

FEW = 4
"""Rows of x up to which codes are multiplied as they are unpacked: at 4 it takes 0.8 of the time of the other way."""

CHAINS = 8
"""Sums that grow by turns, where there are so many: an addition waits for the one before it in the same sum."""

ABREAST = 6
"""Rows of x that are multiplied together at most: with 64 rows of W their sums fill 24 of the 32 registers."""

MANY = 256
"""Rows of x that pass by a tile at most. Their totals take 64 KiB of the second-level cache."""

AHEAD = 4
"""Tiles between the one that is unpacked and the one that is fetched from memory; without, it takes twice the time."""

_FEATURES = {"avx512f", "avx512bw", "avx512vbmi", "avx512bf16"}
_INT4, _FP8, _FP4 = 0, 1, 2
_TILE_BYTES = 64  # of each row: one register
_COLUMNS = {_INT4: 128, _FP8: 64, _FP4: 128}  # of a tile
_GROUPS = {_INT4: GROUP, _FP8: GROUP, _FP4: BLOCK}
STRIP = 16  # rows of W in a register
_STRIPS = ROWS // STRIP

_jit = njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")


@lru_cache(maxsize=1)
def supported() -> bool:
    """Return whether numba compiles here, for a CPU that has the instructions."""
    if config.DISABLE_JIT:  # type: ignore[attr-defined]  # numba sets its options by name
        return False
    features = set(str(cpu_target.target_context.codegen().magic_tuple()[2]).split(","))
    return {f"+{feature}" for feature in _FEATURES} <= features


# --- instructions ---------------------------------------------------------------------------------------------------

_Build = Callable[[Any, Any, Any, Any], Any]
_Write = Callable[[Any, Any], Any]
_INT1, _INT8, _INT16, _INT32, _INT64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_BYTES = ir.VectorType(_INT8, 64)
_HALVES = ir.VectorType(_INT16, 32)
_WORDS = ir.VectorType(_INT32, 16)
_FLOATS = ir.VectorType(ir.FloatType(), 16)


def _constant(kind: Any, values: list[Any]) -> Any:
    return ir.Constant(kind, values)


def _bf16(value: float) -> int:
    """Return the BF16 bits of a number that BF16 holds exactly."""
    return int(np.float32(value).view(np.uint32)) >> 16


def _e4m3(magnitude: int) -> int:
    """Return the BF16 bits of an e4m3fn code without its sign."""
    if magnitude == 0x7F:
        return 0x7FC0
    exponent, mantissa = magnitude >> 3, magnitude & 7
    return _bf16(mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


_TABLES = {
    _INT4: _constant(_HALVES, [_bf16(code) for code in range(-8, 8)] * 2),
    _FP4: _constant(_HALVES, [_bf16(code) for code in (*E2M1, *(-number for number in E2M1))] * 2),
}
_E4M3 = [_e4m3(magnitude) for magnitude in range(128)]
_ZEROS = _constant(_FLOATS, [0.0] * 16)


class _Code:
    """The few instructions that the kernels are made of, written where a numba builder stands."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def load(self, kind: Any, address: Any, offset: int = 0, *, align: int = 64) -> Any:
        """Return the `kind` that lies `offset` bytes after an address."""
        pointer = self.builder.inttoptr(self.builder.add(address, _INT64(offset)), kind.as_pointer())
        return self.builder.load(pointer, align=align)

    def store(self, value: Any, address: Any, offset: int = 0) -> None:
        """Store a register, at a multiple of its size."""
        pointer = self.builder.inttoptr(self.builder.add(address, _INT64(offset)), value.type.as_pointer())
        self.builder.store(value, pointer, align=64)

    def call(self, name: str, kind: Any, *arguments: Any) -> Any:
        """Return what an instruction, known to LLVM by a name, makes of registers."""
        module = self.builder.module
        function = module.globals.get(name) or ir.Function(
            module, ir.FunctionType(kind, [argument.type for argument in arguments]), name
        )
        return self.builder.call(function, arguments)

    def prefetch(self, address: Any) -> None:
        """Ask for the cache line at an address, which need not exist."""
        pointer = self.builder.inttoptr(address, _INT8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _INT32, _INT32, _INT32])
        function = self.builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        self.builder.call(function, [pointer, _INT32(0), _INT32(3), _INT32(1)])  # to read, for all caches, data

    def shuffle(self, a: Any, b: Any, lanes: list[int]) -> Any:
        """Return chosen lanes of two registers; those of b count on from those of a."""
        return self.builder.shuffle_vector(a, b, _constant(ir.VectorType(_INT32, len(lanes)), lanes))

    def broadcast(self, address: Any, offset: int) -> Any:
        """Return the pair of BF16 at an address in every lane."""
        word = self.load(_INT32, address, offset, align=4)
        one = self.builder.insert_element(_constant(_WORDS, [0] * 16), word, _INT32(0))
        return self.shuffle(one, one, [0] * 16)

    def multiply(self, total: Any, a: Any, b: Any) -> Any:
        """Return total + a * b, for pairs of BF16."""
        return self.call("llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, total, a, b)

    def scaled(self, total: Any, part: Any, scale: Any) -> Any:
        """Return total + part * scale, rounded once."""
        return self.call("llvm.fma.v16f32", _FLOATS, part, scale, total)

    def least(self, a: Any, b: Any) -> Any:
        """Return the lesser of each pair of words."""
        return self.builder.select(self.builder.icmp_unsigned("<", a, b), a, b)

    def most(self, a: Any, b: Any) -> Any:
        """Return the greater of each pair of words."""
        return self.builder.select(self.builder.icmp_unsigned(">", a, b), a, b)

    def rows(self, address: Any, stride: Any) -> list[Any]:
        """Return the addresses of 16 rows."""
        addresses = [address]
        while len(addresses) < STRIP:
            addresses.append(self.builder.add(addresses[-1], stride))
        return addresses

    def transposed(self, address: Any, stride: Any) -> list[Any]:
        """Load 64 bytes of each of 16 rows; return register j with word j of every row."""
        rows = [self.load(_WORDS, row, align=1) for row in self.rows(address, stride)]
        # Within quarters of a register first: the four words of four rows, then of 16.
        fours = []
        for i in range(0, 16, 4):
            low, high = self._both(rows[i], rows[i + 1], _INTERLEAVED, 2)
            next_low, next_high = self._both(rows[i + 2], rows[i + 3], _INTERLEAVED, 2)
            fours.append([*self._both(low, next_low, _PAIRS, 2), *self._both(high, next_high, _PAIRS, 2)])
        columns: list[Any] = [None] * 16
        for j in range(4):
            even, odd = self._both(fours[0][j], fours[1][j], _QUARTERS, 4)
            next_even, next_odd = self._both(fours[2][j], fours[3][j], _QUARTERS, 4)
            columns[j], columns[j + 8] = self._both(even, next_even, _QUARTERS, 4)
            columns[j + 4], columns[j + 12] = self._both(odd, next_odd, _QUARTERS, 4)
        return columns

    def _both(self, a: Any, b: Any, lanes: list[int], step: int) -> tuple[Any, Any]:
        return self.shuffle(a, b, lanes), self.shuffle(a, b, [lane + step for lane in lanes])

    def codes(self, form: int, columns: list[Any], pair: int) -> Any:
        """Return columns 2 * pair and 2 * pair + 1 of a transposed tile as pairs of BF16."""
        if form == _FP8:
            return self._fp8_codes(self.builder.bitcast(columns[pair // 2], _BYTES), pair % 2)
        return self._nibbles(_TABLES[form], self.builder.bitcast(columns[pair // 4], _BYTES), pair % 4)

    def _nibbles(self, table: Any, column: Any, pair: int) -> Any:
        # For each byte, the bit of its 64-bit word where the 8 bits begin that it gets; of two bytes one is unused.
        begins = [byte // 4 % 2 * 32 + pair * 8 + byte % 4 // 2 * 4 for byte in range(64)]
        index = self.call("llvm.x86.avx512.pmultishift.qb.512", _BYTES, _constant(_BYTES, begins), column)
        index = self.builder.bitcast(index, _HALVES)
        found = self.call("llvm.x86.avx512.permvar.hi.512", _HALVES, table, index)
        return self.builder.bitcast(found, _WORDS)

    def _fp8_codes(self, column: Any, pair: int) -> Any:
        index = self.shuffle(column, column, [byte // 4 * 4 + pair * 2 + byte % 4 // 2 for byte in range(64)])
        low = self._look_up(index, [bits & 255 for bits in _E4M3])
        high = self._look_up(index, [bits >> 8 for bits in _E4M3])
        is_high = _constant(ir.VectorType(_INT1, 64), [byte % 2 for byte in range(64)])
        found = self.builder.bitcast(self.builder.select(is_high, high, low), _WORDS)
        signs = _constant(_WORDS, [0x80008000] * 16)
        return self.builder.or_(found, self.builder.and_(self.builder.bitcast(index, _WORDS), signs))

    def _look_up(self, index: Any, table: list[int]) -> Any:
        """Return table[lowest 7 bits] for each byte."""
        first, second = _constant(_BYTES, table[:64]), _constant(_BYTES, table[64:])
        return self.call("llvm.x86.avx512.vpermi2var.qi.512", _BYTES, first, index, second)

    def choose(self, number: Any, choices: tuple[int, ...], write: Callable[[int], None]) -> None:
        """Write one piece of code for each choice; the one that equals a number runs, or else the last one."""
        blocks = [self.builder.append_basic_block() for _ in choices]
        after = self.builder.append_basic_block()
        switch = self.builder.switch(number, blocks[-1])
        for choice, block in zip(choices, blocks, strict=True):
            if block is not blocks[-1]:
                switch.add_case(_INT64(choice), block)
            self.builder.position_at_end(block)
            write(choice)
            self.builder.branch(after)
        self.builder.position_at_end(after)

    def repeat(self, times: int, values: list[Any], write: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """Return values = write(turn, values), done so many times."""
        before, body = self.builder.block, self.builder.append_basic_block()
        self.builder.branch(body)
        self.builder.position_at_end(body)
        turn, *held = (self.builder.phi(value.type) for value in (_INT64(0), *values))
        results = write(turn, [*held])
        following = self.builder.add(turn, _INT64(1))
        for phi, first, later in zip((turn, *held), (_INT64(0), *values), (following, *results), strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(later, body)
        after = self.builder.append_basic_block()
        self.builder.cbranch(self.builder.icmp_unsigned("<", following, _INT64(times)), body, after)
        self.builder.position_at_end(after)
        return results


_INTERLEAVED = [quarter + lane for quarter in (0, 4, 8, 12) for lane in (0, 16, 1, 17)]
_PAIRS = [quarter + lane for quarter in (0, 4, 8, 12) for lane in (0, 1, 16, 17)]
_QUARTERS = [quarter + lane for quarter in (0, 8, 16, 24) for lane in range(4)]


def _instructions(arguments: int, write: Callable[..., None]) -> Any:
    """Return a function of a tuple of so many integers, for jitted code; write(code, *integers) emits what it does."""

    @intrinsic
    def emitted(_typing: Any, _integers: Any) -> tuple[Any, _Build]:
        def build(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            write(_Code(builder), *(builder.extract_value(values[0], i) for i in range(arguments)))
            return context.get_dummy_value()

        return types.void(types.UniTuple(types.int64, arguments)), build

    return emitted


def _few(form: int) -> Any:
    """Multiply 16 rows of W, 64 bytes of each, by up to `FEW` rows of x, as they are unpacked."""
    pairs, size = _COLUMNS[form] // 2, _GROUPS[form]

    def write(code: _Code, count: Any, tile: Any, stride: Any, x: Any, factors: Any, totals: Any) -> None:
        columns = code.transposed(tile, stride)

        def rows(count: int) -> None:
            total = [code.load(_FLOATS, totals, m * 64) for m in range(count)]
            groups = min(_COLUMNS[form] // size, max(CHAINS // count, 1))
            for top in range(0, _COLUMNS[form] // size, groups):
                sums = [[_ZEROS] * count for _ in range(groups)]
                for turn in range(size // 2):
                    for group in range(groups):
                        pair = (top + group) * size // 2 + turn
                        codes = code.codes(form, columns, pair)
                        for m in range(count):
                            both = code.broadcast(x, (m * pairs + pair) * 4)
                            sums[group][m] = code.multiply(sums[group][m], codes, both)
                for group in range(groups):
                    factor = code.load(_FLOATS, factors, (top + group) * 64)
                    total = [code.scaled(total[m], sums[group][m], factor) for m in range(count)]
            for m in range(count):
                code.store(total[m], totals, m * 64)

        code.choose(count, tuple(range(1, FEW + 1)), rows)

    return _instructions(6, write)


def _unpack(form: int) -> Any:
    """Unpack 16 rows of W, 64 bytes of each, to a panel: all 64 rows' first pair of columns, then their second, ..."""

    def write(code: _Code, tile: Any, stride: Any, panel: Any) -> None:
        columns = code.transposed(tile, stride)
        for pair in range(_COLUMNS[form] // 2):
            code.store(code.codes(form, columns, pair), panel, pair * ROWS * 4)

    return _instructions(3, write)


def _group(form: int) -> Any:
    """Multiply a group of a panel, 64 rows of W, by 3 to `ABREAST` rows of x."""
    unrolled = 4  # pairs of columns

    def write(code: _Code, count: Any, panel: Any, x: Any, factors: Any, totals: Any) -> None:
        def rows(count: int) -> None:
            def some_pairs(turn: Any, sums: list[Any]) -> list[Any]:
                weights = code.builder.add(panel, code.builder.mul(turn, _INT64(unrolled * ROWS * 4)))
                inputs = code.builder.add(x, code.builder.mul(turn, _INT64(unrolled * 4)))
                for pair in range(unrolled):
                    codes = [code.load(_WORDS, weights, (pair * _STRIPS + strip) * 64) for strip in range(_STRIPS)]
                    for m in range(count):
                        both = code.broadcast(inputs, m * _COLUMNS[form] * 2 + pair * 4)
                        for strip in range(_STRIPS):
                            at = m * _STRIPS + strip
                            sums[at] = code.multiply(sums[at], codes[strip], both)
                return sums

            sums = code.repeat(_GROUPS[form] // 2 // unrolled, [_ZEROS] * (count * _STRIPS), some_pairs)
            for at in range(count * _STRIPS):
                factor = code.load(_FLOATS, factors, at % _STRIPS * 64)
                code.store(code.scaled(code.load(_FLOATS, totals, at * 64), sums[at], factor), totals, at * 64)

        code.choose(count, tuple(range(3, ABREAST + 1)), rows)

    return _instructions(5, write)


def _widen_scales(code: _Code, tile: Any, stride: Any, factors: Any, step: Any) -> None:
    """Widen the BF16 scales of 16 rows and 32 groups to float32, rows in lanes; each group `step` bytes further."""
    high = _constant(_WORDS, [0xFFFF0000] * 16)
    for column in code.transposed(tile, stride):
        code.store(code.builder.shl(column, _constant(_WORDS, [16] * 16)), factors)
        factors = code.builder.add(factors, step)
        code.store(code.builder.and_(column, high), factors)
        factors = code.builder.add(factors, step)


def _multiply_e4m3(code: _Code, tile: Any, stride: Any, factors: Any, step: Any, table: Any) -> None:
    """Make float32 of the E4M3 scales of 16 rows and 64 blocks, rows in lanes; each block `step` bytes further.

    `table` is the address of float32 `[16]`: what the scales 0 to 15 become.
    """
    least = code.load(_FLOATS, table, align=4)
    splat = partial(_constant, _WORDS)
    for column in code.transposed(tile, stride):
        for byte in range(4):
            bits = code.builder.and_(code.builder.lshr(column, splat([8 * byte] * 16)), splat([0xFF] * 16))
            # The 3 bits of the mantissa, below an 8 where there is an exponent; that of subnormals counts as the least.
            normal = code.builder.or_(code.builder.and_(bits, splat([7] * 16)), splat([8] * 16))
            number = code.least(bits, normal)
            exponent = code.builder.and_(code.most(bits, splat([8] * 16)), splat([0x78] * 16))
            power = code.builder.add(code.builder.shl(exponent, splat([20] * 16)), splat([(127 - 1) << 23] * 16))
            found = code.call("llvm.x86.avx512.permvar.sf.512", _FLOATS, least, number)
            code.store(code.builder.fmul(found, code.builder.bitcast(power, _FLOATS)), factors)
            factors = code.builder.add(factors, step)


def _widen_e8m0(code: _Code, tile: Any, stride: Any, factors: Any, step: Any) -> None:
    """Make float32 of the powers of two of 16 rows and 64 blocks of 32, twice each: for blocks of 16."""
    splat = partial(_constant, _WORDS)
    for column in code.transposed(tile, stride):
        for byte in range(4):
            bits = code.builder.and_(code.builder.lshr(column, splat([8 * byte] * 16)), splat([0xFF] * 16))
            power = code.most(code.builder.shl(bits, splat([23] * 16)), splat([1 << 22] * 16))  # 0 means 2^-127
            for _ in range(GROUP // BLOCK):
                code.store(power, factors)
                factors = code.builder.add(factors, step)


def _fetch_rows(code: _Code, tile: Any, stride: Any) -> None:
    """Fetch one cache line of each of 16 rows."""
    for row in code.rows(tile, stride):
        code.prefetch(row)


_int4_few, _int4_unpack, _int4_group = _few(_INT4), _unpack(_INT4), _group(_INT4)
_fp8_few, _fp8_unpack, _fp8_group = _few(_FP8), _unpack(_FP8), _group(_FP8)
_fp4_few, _fp4_unpack, _fp4_group = _few(_FP4), _unpack(_FP4), _group(_FP4)
_scales, _fetch = _instructions(4, _widen_scales), _instructions(2, _fetch_rows)
_e4m3_scales, _e8m0_scales = _instructions(5, _multiply_e4m3), _instructions(4, _widen_e8m0)


# --- loops ----------------------------------------------------------------------------------------------------------


@_jit
def int4_rows(x: U16, packed: U8, scale: U8, out: U16, first: int, last: int) -> None:
    """Do `int4_dot`, `MANY` rows of x at a time; W and its scales are bytes."""
    groups = -(-scale.shape[1] // _TILE_BYTES) * (_TILE_BYTES // 2)
    for top in range(0, x.shape[0], MANY):
        tiles = _tiles(x[top : top + MANY], 128)
        rows = tiles.shape[1]
        height = STRIP if rows <= FEW else ROWS
        totals, factors, panel = _aligned(rows, height), _aligned(groups, height), _aligned(64, ROWS)
        edge = np.empty((STRIP, _TILE_BYTES), np.uint8)
        for row in range(first, last, height):
            totals[:] = 0
            _int4_factors(scale, row, last, factors, edge)
            if rows <= FEW:
                _multiply_few(_INT4, tiles, packed, row, factors, edge, totals)
            else:
                _multiply_many(_INT4, tiles, packed, row, last, factors, panel, edge, totals)
            _finish(totals, out[top : top + MANY, row : min(row + height, last)])


@_jit
def fp8_rows(
    x: U16, codes: U8, scale: F32, block_rows: int, block_columns: int, out: U16, first: int, last: int
) -> None:
    """Do `fp8_dot`, `MANY` rows of x at a time."""
    groups = -(-x.shape[1] // _TILE_BYTES) * (_TILE_BYTES // GROUP)
    for top in range(0, x.shape[0], MANY):
        tiles = _tiles(x[top : top + MANY], 64)
        rows = tiles.shape[1]
        height = STRIP if rows <= FEW else ROWS
        totals, factors, panel = _aligned(rows, height), _aligned(groups, height), _aligned(32, ROWS)
        edge = np.empty((STRIP, _TILE_BYTES), np.uint8)
        for row in range(first, last, height):
            totals[:] = 0
            _fp8_factors(scale, row, last, block_rows, block_columns, factors)
            if rows <= FEW:
                _multiply_few(_FP8, tiles, codes, row, factors, edge, totals)
            else:
                _multiply_many(_FP8, tiles, codes, row, last, factors, panel, edge, totals)
            _finish(totals, out[top : top + MANY, row : min(row + height, last)])


@_jit
def fp4_rows(x: U16, codes: U8, scale: U8, least: F32, out: U16, first: int, last: int) -> None:
    """Do `nvfp4_dot`, or `mxfp4_dot` where there are no least scales, `MANY` rows of x at a time."""
    per_byte = 1 if least.size else GROUP // BLOCK
    groups = -(-scale.shape[1] // _TILE_BYTES) * _TILE_BYTES * per_byte
    for top in range(0, x.shape[0], MANY):
        tiles = _tiles(x[top : top + MANY], 128)
        rows = tiles.shape[1]
        height = STRIP if rows <= FEW else ROWS
        totals, factors, panel = _aligned(rows, height), _aligned(groups, height), _aligned(64, ROWS)
        edge = np.empty((STRIP, _TILE_BYTES), np.uint8)
        for row in range(first, last, height):
            totals[:] = 0
            _fp4_factors(scale, row, last, least, per_byte, factors, edge)
            if rows <= FEW:
                _multiply_few(_FP4, tiles, codes, row, factors, edge, totals)
            else:
                _multiply_many(_FP4, tiles, codes, row, last, factors, panel, edge, totals)
            _finish(totals, out[top : top + MANY, row : min(row + height, last)])


PIECES = 4
"""Pieces that a task is cut into, for each thread takes the next one that is free: 2, 4 and 8 take the same time."""

_NEXT = 9  # where the parameters of a task hold the number of the next piece


def task_parameters(values: list[int]) -> NDArray[np.int64]:
    """Return the nine parameters of a task, with room for the number of its next piece."""
    return np.array([*values, 0], np.int64)


def _on_address(result: Any, write: _Write) -> Any:
    """Return a function of an address, for jitted code; write(builder, address) emits what it does."""

    @intrinsic
    def emitted(_typing: Any, _address: Any) -> tuple[Any, _Build]:
        def build(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            return write(builder, values[0])

        return result(types.int64), build

    return emitted


_pointer = _on_address(types.voidptr, lambda builder, address: builder.inttoptr(address, _INT8.as_pointer()))
"""An address as a pointer."""

_next_piece = _on_address(
    types.int64,
    lambda builder, address: builder.atomic_rmw(
        "add", builder.inttoptr(address, _INT64.as_pointer()), _INT64(1), "monotonic"
    ),
)
"""The number at an address, to which one is added, whatever other threads do at the same time."""


@_jit
def _piece(number: int, height: int, together: int) -> tuple[Int, Int]:
    """Return the first row of a piece and the row to stop before."""
    blocks = -(-height // together)
    first, last = number * blocks // PIECES * together, (number + 1) * blocks // PIECES * together
    return first, min(last, height)


def _int4_pieces(data: Any) -> None:
    """Do pieces of an `int4_task` until there are none."""
    job = carray(data, (10,), np.int64)
    rows, columns, height = job[0], job[1], job[2]
    x = carray(_pointer(job[3]), (rows, columns), np.uint16)
    packed = carray(_pointer(job[4]), (height, columns // 2), np.uint8)
    scale = carray(_pointer(job[5]), (height, columns // 16), np.uint8)
    out = carray(_pointer(job[6]), (rows, height), np.uint16)
    together = STRIP if rows <= FEW else ROWS
    number = _next_piece(_address(job) + 8 * _NEXT)
    while number < PIECES:
        first, last = _piece(number, height, together)
        int4_rows(x, packed, scale, out, first, last)
        number = _next_piece(_address(job) + 8 * _NEXT)


def _fp8_pieces(data: Any) -> None:
    """Do pieces of an `fp8_task` until there are none."""
    job = carray(data, (10,), np.int64)
    rows, columns, height, block_rows, block_columns = job[0], job[1], job[2], job[7], job[8]
    blocks = (-(-height // block_rows), -(-columns // block_columns))
    x = carray(_pointer(job[3]), (rows, columns), np.uint16)
    codes = carray(_pointer(job[4]), (height, columns), np.uint8)
    scale = carray(_pointer(job[5]), blocks, np.float32)
    out = carray(_pointer(job[6]), (rows, height), np.uint16)
    together = STRIP if rows <= FEW else ROWS
    number = _next_piece(_address(job) + 8 * _NEXT)
    while number < PIECES:
        first, last = _piece(number, height, together)
        fp8_rows(x, codes, scale, block_rows, block_columns, out, first, last)
        number = _next_piece(_address(job) + 8 * _NEXT)


def _fp4_pieces(data: Any) -> None:
    """Do pieces of an `nvfp4_task` or an `mxfp4_task` until there are none."""
    job = carray(data, (10,), np.int64)
    rows, columns, height, least, block = job[0], job[1], job[2], job[7], job[8]
    x = carray(_pointer(job[3]), (rows, columns), np.uint16)
    codes = carray(_pointer(job[4]), (height, columns // 2), np.uint8)
    scale = carray(_pointer(job[5]), (height, columns // block), np.uint8)
    out = carray(_pointer(job[6]), (rows, height), np.uint16)
    table = carray(_pointer(least), (16 if block == BLOCK else 0,), np.float32)
    together = STRIP if rows <= FEW else ROWS
    number = _next_piece(_address(job) + 8 * _NEXT)
    while number < PIECES:
        first, last = _piece(number, height, together)
        fp4_rows(x, codes, scale, table, out, first, last)
        number = _next_piece(_address(job) + 8 * _NEXT)


@lru_cache(maxsize=1)
def int4_entry() -> Any:
    """Return `int4_task`'s C function, compiled when it is first asked for."""
    return cfunc(types.void(types.voidptr), cache=True)(_int4_pieces)


@lru_cache(maxsize=1)
def fp8_entry() -> Any:
    """Return that of `fp8_task`."""
    return cfunc(types.void(types.voidptr), cache=True)(_fp8_pieces)


@lru_cache(maxsize=1)
def fp4_entry() -> Any:
    """Return that of `nvfp4_task` and `mxfp4_task`."""
    return cfunc(types.void(types.voidptr), cache=True)(_fp4_pieces)


@_jit
def _address(array: NDArray[Any]) -> np.int64:
    """Return where an array begins; signed, because numba makes a float of a sum of both kinds."""
    return np.int64(array.ctypes.data)


@_jit
def _aligned(rows: int, columns: int) -> F32:
    """Return room for float32 `[rows, columns]` that begins at a cache line."""
    room = np.empty(rows * columns + 16, np.float32)
    start = (-_address(room) % 64) // 4
    return room[start : start + rows * columns].reshape((rows, columns))


@_jit
def _tiles(x: U16, columns: int) -> U16:
    """Return x `[M, K]` as `[ceil(K/columns), M, columns]`, zeros behind the last column: what one tile of W meets."""
    rows, width = x.shape
    tiles = np.empty((-(-width // columns), rows, columns), np.uint16)
    for tile in range(tiles.shape[0]):
        start = tile * columns
        there = min(columns, width - start)
        for row in range(rows):
            for column in range(there):
                tiles[tile, row, column] = x[row, start + column]
            for column in range(there, columns):
                tiles[tile, row, column] = 0
    return tiles


@_jit
def _tile(source: U8, row: int, column: int, edge: U8) -> tuple[Int, Int]:
    """Return where 16 rows of 64 bytes lie, and how far apart.

    Where a row has fewer bytes, those of the next row follow: they meet zeros of x, or a scale that is not used. Only
    where the array ends is a copy made, filled up with zeros.
    """
    height, width = source.shape
    if (row + STRIP - 1) * width + column + _TILE_BYTES <= source.size:
        return _address(source) + row * width + column, width
    edge[:] = 0
    there = min(_TILE_BYTES, width - column)
    for i in range(min(STRIP, height - row)):
        for j in range(there):
            edge[i, j] = source[row + i, column + j]
    return _address(edge), _TILE_BYTES


@_jit
def _int4_factors(scale: U8, row: int, last: int, factors: F32, edge: U8) -> None:
    """Write the scales of 16 or 64 rows to `[groups, rows]`; behind the last group they are 0."""
    height = factors.shape[1]
    for strip in range(row, min(row + height, last), STRIP):
        for column in range(0, scale.shape[1], _TILE_BYTES):
            address, stride = _tile(scale, strip, column, edge)
            _fetch((address + height * stride, stride))
            _scales((address, stride, _address(factors) + (column // 2 * height + strip - row) * 4, height * 4))
    factors[scale.shape[1] // 2 :] = 0


@_jit
def _fp8_factors(scale: F32, row: int, last: int, block_rows: int, block_columns: int, factors: F32) -> None:
    """Write the scale of each group of 32 columns of 16 or 64 rows to `[groups, rows]`."""
    before = -1
    for group in range(factors.shape[0]):
        block = min(group * GROUP // block_columns, scale.shape[1] - 1)
        if block == before:
            factors[group] = factors[group - 1]
            continue
        before = block
        for i in range(factors.shape[1]):
            factors[group, i] = scale[min(row + i, last - 1) // block_rows, block]


@_jit
def _fp4_factors(scale: U8, row: int, last: int, least: F32, per_byte: int, factors: F32, edge: U8) -> None:
    """Write the scales of 16 or 64 rows to `[groups, rows]`; behind the last group they are 0."""
    height = factors.shape[1]
    for strip in range(row, min(row + height, last), STRIP):
        for column in range(0, scale.shape[1], _TILE_BYTES):
            address, stride = _tile(scale, strip, column, edge)
            _fetch((address + height * stride, stride))
            place = _address(factors) + (column * per_byte * height + strip - row) * 4
            if least.size:
                _e4m3_scales((address, stride, place, height * 4, _address(least)))
            else:
                _e8m0_scales((address, stride, place, height * 4))
    factors[scale.shape[1] * per_byte :] = 0


@_jit
def _multiply_few(form: int, tiles: U16, source: U8, row: int, factors: F32, edge: U8, totals: F32) -> None:
    """Add x @ W.T, for up to `FEW` rows of x and 16 rows of W, to `totals` `[M, 16]`."""
    rows, columns = tiles.shape[1:]
    size = BLOCK if form == _FP4 else GROUP
    for tile in range(tiles.shape[0]):
        # What lies 16 rows below, in the order of memory: that is faster than row by row, tile by tile.
        _fetch((_address(source) + (row + STRIP) * source.shape[1] + tile * STRIP * _TILE_BYTES, _TILE_BYTES))
        address, stride = _tile(source, row, tile * _TILE_BYTES, edge)
        x = _address(tiles) + tile * rows * columns * 2
        scale = _address(factors) + tile * columns // size * STRIP * 4
        if form == _INT4:
            _int4_few((rows, address, stride, x, scale, _address(totals)))
        elif form == _FP8:
            _fp8_few((rows, address, stride, x, scale, _address(totals)))
        else:
            _fp4_few((rows, address, stride, x, scale, _address(totals)))


@_jit
def _multiply_many(
    form: int, tiles: U16, source: U8, row: int, last: int, factors: F32, panel: F32, edge: U8, totals: F32
) -> None:
    """Add x @ W.T, for more rows of x and 64 rows of W, to `totals` `[M, 64]`; lanes behind `last` hold anything."""
    rows, columns = tiles.shape[1:]
    parts = -(-rows // ABREAST)
    size = BLOCK if form == _FP4 else GROUP
    for tile in range(tiles.shape[0]):
        for strip in range(row, min(row + ROWS, last), STRIP):
            _fetch_ahead(source, strip, tile * _TILE_BYTES)
            address, stride = _tile(source, strip, tile * _TILE_BYTES, edge)
            if form == _INT4:
                _int4_unpack((address, stride, _address(panel) + (strip - row) * 4))
            elif form == _FP8:
                _fp8_unpack((address, stride, _address(panel) + (strip - row) * 4))
            else:
                _fp4_unpack((address, stride, _address(panel) + (strip - row) * 4))
        for part in range(parts):  # as equal as can be: 7 rows are 3 and 4
            top, end = part * rows // parts, (part + 1) * rows // parts
            for group in range(columns // size):
                codes = _address(panel) + group * size // 2 * ROWS * 4
                x = _address(tiles) + ((tile * rows + top) * columns + group * size) * 2
                scale = _address(factors) + (tile * columns // size + group) * ROWS * 4
                total = _address(totals) + top * ROWS * 4
                if form == _INT4:
                    _int4_group((end - top, codes, x, scale, total))
                elif form == _FP8:
                    _fp8_group((end - top, codes, x, scale, total))
                else:
                    _fp4_group((end - top, codes, x, scale, total))


@_jit
def _fetch_ahead(source: U8, row: int, column: int) -> None:
    """Fetch the tile `AHEAD` of one; past the end of its rows, at the beginning of the 64 rows below."""
    column += AHEAD * _TILE_BYTES
    if column >= source.shape[1]:
        row, column = row + ROWS, column - source.shape[1]
    _fetch((_address(source) + row * source.shape[1] + column, source.shape[1]))


@_jit
def _finish(totals: F32, out: U16) -> None:
    """Round to BF16, half to even; NaN stays NaN."""
    for row in range(out.shape[0]):
        bits, rounded = totals[row].view(np.uint32), out[row]
        for column in range(rounded.size):
            word = bits[column]
            odd = np.uint32(np.uint32(word >> np.uint32(16)) & np.uint32(1))
            half = np.uint32(np.uint32(word + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))
            is_nan = np.uint32(word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            rounded[column] = np.uint32(0x7FC0) if is_nan else half
