"""The seam between the arithmetic and everything above it: a codec for each format, on each device, of the same bits.

Arrays are C-contiguous numpy arrays; inputs may be read-only views of mapped files; outputs are written into arrays
that the caller owns. R are rows, K columns. BF16 is uint16 bits `[R, K]`. FP8 is uint8 e4m3fn codes `[R, K]` with
float32 scales `[ceil(R/block[0]), ceil(K/block[1])]`. INT4 is int32 words `[R, K/8]`, lowest column in the lowest
nibble, nibble = code + 8. `decode` takes a scale of INT4 as float32 `[R, K/group]`; all else has it as BF16 bits
`[R, K/32]`.

Work is cut into panels: ranges of rows, multiples of a block's height. Codecs release the GIL and start no threads.
A bad value raises `values.ValueAt`, rows and columns counted within the arrays given; what was written by then is void.
A scale is bad when it is NaN, infinite or has a sign bit, -0 included.

`encode` is `choose`, then `store`, in one pass: who has better scales than `choose` gives them to `store`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from k2quant.kernels.codecs.figures import Figures
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


Fused = Callable[..., Figures]
"""Two codecs in one pass: the bits and the figures of the one's `decode` and the other's `encode`.

It takes what is read, how that is laid out, how what is written is to be laid out, and the arrays to write:
("fp8", "int4") as (codes, scale_in, block, grid, packed, scale_out), where groups that lie on the moonshot grid are
recovered, and ("int4", "fp8") as (packed, scale_in, group, block, codes, scale_out), with arrays as in the codecs.
"""


class Codecs(NamedTuple):
    """The codecs of one device."""

    floats: FloatCodec
    fp8: Fp8Codec
    int4: Int4Codec
    fused: Mapping[tuple[str, str], Fused]
    """By format read and format written; a pair that is missing goes through BF16."""
