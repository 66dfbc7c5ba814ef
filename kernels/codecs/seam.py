"""The seam between the arithmetic and everything above it: a codec for each format, on each device, of the same bits.

Arrays are C-contiguous numpy arrays; inputs may be read-only views of mapped files; outputs are written into arrays
that the caller owns. R are rows, K columns. BF16 is uint16 bits `[R, K]`. FP8 is uint8 e4m3fn codes `[R, K]` with
float32 scales `[ceil(R/block[0]), ceil(K/block[1])]`. INT4 is int32 words `[R, K/8]`, lowest column in the lowest
nibble, nibble = code + 8. `decode` takes a scale of INT4 as float32 `[R, K/group]`; all else has it as BF16 bits
`[R, K/32]`. FP4, of both kinds, is uint8 codes `[R, K/2]`, the even column in the low nibble; NVFP4's block scales are
E4M3 bits, uint8 `[R, K/16]`, beside a `TensorScale`; MXFP4's are bytes of E8M0, uint8 `[R, K/32]`.

Work is cut into panels: ranges of rows, multiples of a block's height. Codecs release the GIL and start no threads.
A bad value raises `values.ValueAt`, rows and columns counted within the arrays given; what was written by then is void.
A scale is bad when it is NaN, infinite or has a sign bit, -0 included. An array of another shape is a `ValueError`.

`encode` is `choose`, then `store`, in one pass: who has better scales than `choose` gives them to `store`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.fp4 import TensorScale
from k2quant.kernels.codecs.grids import Grid
from k2quant.kernels.codecs.values import F32, I32, U8, U16


class FloatCodec(Protocol):
    """Numbers that are no codes: rounding to BF16, and what became of BF16."""

    def to_bf16(self, values: F32 | NDArray[np.float16], out: U16) -> None:
        """Round to BF16, half to even; what is or would become NaN or infinite is an error."""

    def compare(self, before: U16, after: U16) -> Figures:
        """Return the figures of `after` against the truth `before`."""


class Fp8Codec(Protocol):
    """Block FP8."""

    def decode(self, codes: U8, scale: F32, block: tuple[int, int], out: U16) -> None:
        """Write bf16(fp32(code) * scale), the product rounded to float32 first; a scale of zero is valid."""

    def encode(self, weights: U16, block: tuple[int, int], codes: U8, scale: F32) -> Figures:
        """Encode each block; -0 keeps its sign.

        A block whose weights are all bf16(code * scale) for one scale, the largest with the code 448, gets the one of
        such scales that is nearest to amax/448, and one whose weights are codes times a power of two gets amax/448
        rounded up to a normal power of two; so both lose nothing. Any other block gets scale = amax/448 and codes =
        w/scale, in float32, rounded half to even and saturated at +-448. A block of zeros gets the scale 1.
        """

    def choose(self, weights: U16, block: tuple[int, int], scale: F32) -> None:
        """Write the scale of each block that `encode` would take, recovery included."""

    def store(self, weights: U16, scale: F32, block: tuple[int, int], codes: U8) -> Figures:
        """Write codes at scales that are given: w/scale in float32, rounded half to even, saturated at +-448.

        At the scales of `choose` these are the codes, and always the figures, of `encode`. One corner aside: where a
        scale near amax/448 is recovered, `encode` takes the codes of amax/448. Two codes there may stand for a
        weight of at most 15 * 2^-133; `encode` then keeps the one, and `store` finds the other. Both decode to it.

        A scale that is bad or zero, and a product that exceeds BF16, are errors.
        """


class Int4Codec(Protocol):
    """INT4 in groups of columns: of any size to be read, of 32 to be written."""

    def decode(self, packed: I32, scale: F32, group: int, out: U16) -> None:
        """Write bf16(code * scale) for codes -8..7; any `group` that divides K. Code 0 gives +0."""

    def encode(
        self, weights: U16, grid: Grid, packed: I32, scale: U16, *, recover: bool = True, bits: int = 4
    ) -> Figures:
        """Encode each group of 32 columns; K is a multiple of 32.

        moonshot: the first scale of `recovery.CANDIDATES` that gives all weights of the group, if `recover`; else
        bf16(amax/7), codes -7..7. compressed-tensors: bf16(amax/7.5), codes -8..7, the quotient rounded to BF16; it
        knows no recovery.

        With 3 or 2 bits, on the moonshot grid alone, the scale is bf16(amax/3) or bf16(amax) and codes in the nibbles
        are -3..3 or -1..1. `recover` has no effect; what the plain rule made comes back by the plain rule.
        """

    def choose(self, weights: U16, grid: Grid, scale: U16, *, recover: bool = True, bits: int = 4) -> None:
        """Write the scale of each group that `encode` would take."""

    def store(self, weights: U16, scale: U16, grid: Grid, packed: I32, *, bits: int = 4) -> Figures:
        """Write codes at scales that are given, rounded by the grid's rule and clamped to its codes.

        At the scales of `choose` these are the words and the figures of `encode`. A scale that is bad or zero, and a
        product that exceeds BF16, are errors.
        """

    def search(
        self,
        weights: U16,
        importance: F32 | None,
        scale: U16,
        *,
        mean: F32 | None = None,
        bits: int = 4,
        recover: bool = True,
    ) -> None:
        """Write for each group, on the moonshot grid, the scale of least error among 16: the plain one and lesser ones.

        `scales.search` has the rule. Each of the scales comes back by the plain rule from what is decoded at it, with
        the same codes. A group that `recover` finds on the grid keeps the scale that `choose` would take, and so does
        one of zeros, one whose columns all weigh nothing, and one whose largest weight is below 2^-122, or 2^126 and
        more. By its own measure no group is worse than at the plain scale.

        `importance` is float32 `[K]`, finite and not negative: what a squared error in each column weighs, in every
        row, such as E[x^2] of what it is multiplied with. Nothing stands for ones. `mean` is float32 `[K]`, finite:
        E[x] beside it, so that columns may err against each other; nothing stands for zeros. Anything else is a
        `UsageError`; a weight that is not finite is an error, as in `choose`. Rows know nothing of each other: panels
        give the scales of the whole.
        """

    def weighted_error(
        self, weights: U16, scale: U16, importance: F32 | None, *, mean: F32 | None = None, bits: int = 4
    ) -> float:
        """Return the sum of importance * (w - w')^2, where w' is what `store` at these scales on moonshot decodes to.

        With a mean, of each row: the sum of (importance - mean^2) * (w - w')^2, and the square of that of
        mean * (w - w'), over all its columns; which is the expected square of what an output loses.

        `importance`, `mean` and scales as in `search` and `store`, with their errors. w - w' is float32, all else
        float64. In a row, 32 lanes add what stands there in each group, in order; then the lanes are added in halves,
        and the rows exactly. So the bits are those of any device. Panels are added by the caller, in an order of his
        own.
        """


class Nvfp4Codec(Protocol):
    """NVFP4: K is a multiple of 16. S is a block's scale in use, float32, rounded: `fp4.TensorScale` says how.

    A tensor scale that is bad, or zero where something is divided by it, is an error at `of="tensor scale"`.
    """

    def decode(self, codes: U8, scale: U8, tensor: TensorScale, out: U16) -> None:
        """Write bf16(float32(code * S)); code 8 gives -0. A scale of zero is valid, a tensor scale of zero too.

        Errors: E4M3 bits 0x7F and above, so NaN and what has a sign; a tensor scale that is bad, or zero and divides;
        a product that exceeds BF16, which a code 0 at an infinite S is too.
        """

    def amax(self, weights: U16) -> float:
        """Return the largest magnitude, 0.0 of nothing: what `fp4.tensor_scale` asks for. NaN and infinity are errors.

        The amax of a tensor, or of all that share a tensor scale, is the largest of its panels' ones.
        """

    def choose(self, weights: U16, tensor: TensorScale, scale: U8) -> None:
        """Write the scale of each block by the rule of the layout's own tool, from its largest magnitude.

        It multiplies (ModelOpt): q = float32(amax / float32(6 * value)); 1.0 (0x38) if q is zero; else e4m3(q), q being
        raised to 2^-9 and lowered to 448. It divides (compressed-tensors): e4m3(float32(value * bf16(amax / 6))),
        lowered to 448; 0.125 (0x20) if that is zero. e4m3 rounds half to even.
        """

    def store(self, weights: U16, scale: U8, tensor: TensorScale, codes: U8) -> Figures:
        """Write codes at block scales that are given: float32(w / S) rounded to E2M1, a tie to the even code.

        More than 6 becomes 6. A quotient below zero has the sign bit, also where it becomes zero (code 8); -0 has none.
        At the scales of `choose` these are the codes and figures of `encode`.

        A block scale that is bad or zero, an S that is zero or infinite, and a product that exceeds BF16, are errors.
        """

    def encode(self, weights: U16, tensor: TensorScale, codes: U8, scale: U8) -> Figures:
        """Do `choose`, then `store`. Where a product exceeds BF16, the largest weight is blamed."""

    def search(
        self, weights: U16, importance: F32 | None, tensor: TensorScale, scale: U8, *, mean: F32 | None = None
    ) -> None:
        """Write for each block the scale of least error among a few: that of `choose` and its neighbours in E4M3.

        `scales.fp4` has the rule. Blocks of zeros, blocks whose columns all weigh nothing, and blocks whose largest
        weight is below 2^-122, or 2^126 and more, keep the scale of `choose`. `importance` and `mean` as for INT4.
        """

    def weighted_error(
        self, weights: U16, scale: U8, tensor: TensorScale, importance: F32 | None, *, mean: F32 | None = None
    ) -> float:
        """Return the sum of importance * (w - w')^2, where w' is what `store` at these scales decodes to.

        All as `Int4Codec.weighted_error` has it, but with 16 lanes.
        """

    def restate(self, codes_in: U8, scale_in: U8, exponent: int, tensor: TensorScale, codes: U8, scale: U8) -> int:
        """Write MXFP4 as NVFP4, without BF16; `tensor` means 2^exponent (`fp4.closed_form` has both).

        Each block of 32 becomes two of 16 with the same codes, at the scale 2^(byte - 127 - exponent). A half with no
        code but 0 and 8 gets `tensor.empty`, as `choose` has it for zeros. Where the scale is below 2^-9 it is 2^-9,
        and codes are rounded there, ties to even, signs kept: the count of such halves is returned, 0 where nothing is
        lost. A scale above 2^8 in use is an error, and so is what MXFP4's `decode` refuses.
        """


class Mxfp4Codec(Protocol):
    """MXFP4: K is a multiple of 32, a scale is 2^(byte - 127)."""

    def decode(self, codes: U8, scale: U8, out: U16) -> None:
        """Write code * 2^(byte - 127), which is exact; code 8 gives -0.

        The byte 255, and a product that exceeds BF16, are errors.
        """

    def choose(self, weights: U16, scale: U8) -> None:
        """Write each block's byte by the rule of compressed-tensors, which is "even" in other words: from its amax.

        With 2^e <= amax < 2^(e+1) it is 2^(e-2), or 2^(e-1) from amax = 1.75 * 2^e on; so the largest weight becomes 4
        or 6. In BF16 bits: ((amax + 0x20) >> 7) - 2. At least the byte 0, which zeros get too.
        """

    def store(self, weights: U16, scale: U8, codes: U8) -> Figures:
        """Write codes at scales that are given: w / 2^(byte - 127) rounded to E2M1, a tie to the even code.

        More than 6 becomes 6. A weight's sign stays, that of -0 too: what `encode` wrote and `decode` read gives the
        same bytes again. The byte 255, and a product that exceeds BF16, are errors.
        """

    def encode(self, weights: U16, codes: U8, scale: U8) -> Figures:
        """Do `choose`, then `store`. Where a product exceeds BF16, the largest weight is blamed."""

    def search(self, weights: U16, importance: F32 | None, scale: U8, *, mean: F32 | None = None) -> None:
        """Write for each block the scale of least error among that of `choose`, half of it, and twice it.

        All else as `Nvfp4Codec.search`.
        """

    def weighted_error(self, weights: U16, scale: U8, importance: F32 | None, *, mean: F32 | None = None) -> float:
        """Return what `Int4Codec.weighted_error` says of FP4 at these scales, with 32 lanes."""

    def exponents(self, codes: U8, scale: U8) -> tuple[int, int] | None:
        """Return the least and the largest byte - 127 of blocks with a code other than 0 and 8; nothing if none has.

        That is what a tensor tells before `restate`. The byte 255 in such a block is an error.
        """


Fused = Callable[..., Figures]
"""Two codecs in one pass: the bits and the figures of the one's `decode` and the other's `encode`.

It takes what is read, how that is laid out, how what is written is to be laid out, and the arrays to write:
("fp8", "int4") as (codes, scale_in, block, grid, packed, scale_out), where groups that lie on the moonshot grid are
recovered, and ("int4", "fp8") as (packed, scale_in, group, block, codes, scale_out), with arrays as in the codecs.
FP4 is read as (codes, scale), for NVFP4 with its tensor scale behind, and written as (codes, scale), for NVFP4 with its
tensor scale in front.
"""


class Codecs(NamedTuple):
    """The codecs of one device."""

    floats: FloatCodec
    fp8: Fp8Codec
    int4: Int4Codec
    nvfp4: Nvfp4Codec
    mxfp4: Mxfp4Codec
    fused: Mapping[tuple[str, str], Fused]
    """By format read and format written; a pair that is missing goes through BF16."""
