"""GGUF's types of tensors as formats: what a weight is in them, and how codes of ours become theirs.

They are written and never read, and no checkpoint has them, so they stand in no registry. A weight is one tensor,
`blocks`: bytes, a row for each row of the weight; NVFP4 has a scale of the whole beside it, in a tensor of its own. For
BF16 there is no class: k2quant's own format is copied or decoded.

Numbers and sizes are those of ggml/include/ggml.h and gguf-py's constants (gguf 0.19.0): `GGMLQuantizationType`,
`GGML_QUANT_SIZES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from k2quant.errors import ShapeMismatch
from k2quant.exports.written import Written, check, multiplied
from k2quant.formats.dtypes import TensorSpec, widened
from k2quant.formats.format import Format, Parts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.seam import Codecs
    from k2quant.kernels.codecs.values import U16


class Type(NamedTuple):
    """A type of tensors."""

    name: str
    number: int
    """As a header has it."""
    per: int
    """Elements of a block."""
    nbytes: int
    """Bytes of a block."""
    file_type: int
    """`general.file_type` of a file that is mostly of it (`LlamaFileType`)."""

    def bytes_of(self, width: int) -> int:
        """Return the bytes of a row."""
        return width // self.per * self.nbytes


F32 = Type("F32", 0, 1, 4, 0)
Q4_0 = Type("Q4_0", 2, 32, 18, 2)
Q8_0 = Type("Q8_0", 8, 32, 34, 7)
BF16 = Type("BF16", 30, 1, 2, 32)
MXFP4 = Type("MXFP4", 39, 32, 17, 38)
NVFP4 = Type("NVFP4", 40, 64, 36, 39)

BLOCKS, SCALE, INPUTS = "blocks", "scale", "input_scale"
"""Parts of a weight: its blocks, and for NVFP4 the numbers that llama.cpp keeps in tensors beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block(Written):
    """A type of GGUF."""

    mains: ClassVar[tuple[str, ...]] = (BLOCKS,)
    served: ClassVar[str] = "llama.cpp"
    type: ClassVar[Type]

    def state(self, shape: tuple[int, ...], *, name: str = "weight") -> dict[str, TensorSpec]:
        """Return the bytes of a weight's blocks.

        Raises:
            ShapeMismatch: blocks do not divide the width.
        """
        rows, width = shape
        if width % self.type.per:
            raise ShapeMismatch(
                f"this width cannot be {self.type.name}",
                tensor=name,
                expected=f"a width that {self.type.per} divides",
                found=shape,
            )
        return {BLOCKS: TensorSpec("U8", (rows, self.type.bytes_of(width)))}

    @classmethod
    def misfit(cls, source: Format, shape: tuple[int, ...]) -> str | None:
        """Say why codes of a source cannot be kept in this type; None: they can, if it has their scales."""
        return f"{cls.type.per} does not divide {shape[-1]} columns" if shape[-1] % cls.type.per else None

    @property
    def unit(self) -> str:
        """The type."""
        return self.type.name

    @property
    def label(self) -> str:
        """The type."""
        return self.type.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain(Block):
    """Float32, as norms and the router have to be."""

    name: ClassVar[str] = "f32"
    type: ClassVar[Type] = F32

    def restates(self, source: Format) -> bool:
        """Tell floats from codes: the former are widened without rounding."""
        return not source.quantised

    def restate(self, source: Format, parts: Parts, outputs: Parts, codecs: Codecs) -> None:
        """Widen floats."""
        _floats(outputs)[...] = widened(parts[source.main])

    def encode(self, weights: U16, parts: Parts, codecs: Codecs) -> Figures:
        """Widen what codes stand for."""
        _floats(parts)[...] = widened(weights)
        return codecs.floats.compare(weights, weights)


def _floats(parts: Parts) -> NDArray[Any]:
    import numpy as np

    return parts[BLOCKS].view(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class EightBits(Block):
    """Q8_0: 32 codes of 8 bits with a scale in FP16."""

    name: ClassVar[str] = "q8_0"
    type: ClassVar[Type] = Q8_0

    def encode(self, weights: U16, parts: Parts, codecs: Codecs) -> Figures:
        """Round as ggml does."""
        from k2quant.kernels.codecs.cpu import gguf

        return gguf.q8_0(weights, parts[BLOCKS])


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBits(Block):
    """Q4_0: 32 codes of INT4 with their scale in FP16, which has all scales from 2^-17 to 65504 that BF16 has."""

    name: ClassVar[str] = "q4_0"
    type: ClassVar[Type] = Q4_0

    @classmethod
    def misfit(cls, source: Format, shape: tuple[int, ...]) -> str | None:
        """Know groups that are smaller than blocks, too."""
        whole = type(source.unit) is int and source.unit % cls.type.per == 0
        return None if whole else f"{source.label}, and blocks have {cls.type.per} columns"

    def restates(self, source: Format) -> bool:
        """Nothing else is written so."""
        return True

    def restate(self, source: Format, parts: Parts, outputs: Parts, codecs: Codecs) -> None:
        """Move nibbles.

        Raises:
            ValueAt: a scale is bad, or none of FP16.
        """
        from k2quant.kernels.codecs.cpu import gguf

        words, scale, group = source.reading(parts)
        gguf.q4_0(words, scale, group, outputs[BLOCKS])


@dataclass(frozen=True, slots=True, kw_only=True)
class Mx(Block):
    """MXFP4: 32 codes with a power of two."""

    name: ClassVar[str] = "mxfp4 blocks"
    type: ClassVar[Type] = MXFP4

    def restates(self, source: Format) -> bool:
        """Nothing else is written so."""
        return True

    def restate(self, source: Format, parts: Parts, outputs: Parts, codecs: Codecs) -> None:
        """Move nibbles, once they are known to stand for finite values.

        Raises:
            ValueAt: a value that no weight can have.
        """
        from k2quant.kernels.codecs.cpu import gguf

        check(source, parts, codecs)
        codes, scale = source.reading(parts)
        gguf.mxfp4(codes, scale, outputs[BLOCKS])


@dataclass(frozen=True, slots=True, kw_only=True)
class Nv(Block):
    """NVFP4: 64 codes with four scales; the scale of the whole, and that of the inputs, are tensors beside it."""

    name: ClassVar[str] = "nvfp4 blocks"
    type: ClassVar[Type] = NVFP4
    whole: ClassVar[tuple[str, ...]] = (SCALE, INPUTS)

    inputs: bool = False
    """Whether there is a scale of the inputs."""

    @property
    def streamed(self) -> tuple[str, ...]:
        """The blocks, and the numbers beside them."""
        return (BLOCKS, SCALE, INPUTS) if self.inputs else (BLOCKS, SCALE)

    def state(self, shape: tuple[int, ...], *, name: str = "weight") -> dict[str, TensorSpec]:
        """Return the bytes of a weight's blocks, and a number for each scale beside them.

        Raises:
            ShapeMismatch: blocks do not divide the width.
        """
        numbers = dict.fromkeys(self.streamed[1:], TensorSpec("F32", (1,)))
        return {**Block.state(self, shape, name=name), **numbers}

    def rows(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        """Return rows as they are; of one number, that."""
        return (0, 1) if suffix in self.whole else (start, stop)

    def restates(self, source: Format) -> bool:
        """Nothing else is written so."""
        return True

    def restate(self, source: Format, parts: Parts, outputs: Parts, codecs: Codecs) -> None:
        """Move nibbles, once they are known to stand for finite values, and say the scales as ModelOpt has them.

        Raises:
            ValueAt: a value that no weight can have, or a scale that divides and has no inverse.
        """
        from k2quant.kernels.codecs.cpu import gguf

        check(source, parts, codecs)
        codes, scale, *numbers = multiplied(source, parts)
        gguf.nvfp4(codes, scale, outputs[BLOCKS])
        for suffix, number in zip(self.streamed[1:], numbers, strict=True):
            outputs[suffix][...] = number
