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
from k2quant.formats.dtypes import TensorSpec, widened
from k2quant.formats.format import Entry, Format, Neighbours, Parts, Stored

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
class Block(Format):
    """A type of GGUF."""

    mains: ClassVar[tuple[str, ...]] = (BLOCKS,)
    reads: ClassVar[str] = "nothing: GGUF is written, never read"
    served: ClassVar[str] = "llama.cpp"
    type: ClassVar[Type]

    @property
    def streamed(self) -> tuple[str, ...]:
        """The blocks."""
        return (BLOCKS,)

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

    @classmethod
    def recognise(cls, suffix: str, entry: Entry, beside: Neighbours) -> Stored | None:
        """Take nothing: no checkpoint has it."""
        return None

    def decode(self, parts: Parts, out: U16, codecs: Codecs) -> None:
        """Not asked."""
        raise AssertionError(f"{self.label} is written, never read")

    def choose(self, weights: U16, codecs: Codecs) -> NDArray[Any]:
        """Not asked."""
        raise AssertionError(f"{self.label} has no scales that others choose")

    def store(self, weights: U16, scales: NDArray[Any], parts: Parts, codecs: Codecs) -> Figures:
        """Not asked."""
        raise AssertionError(f"{self.label} has no scales that others choose")

    def outside(self, before: U16, after: U16, parts: Parts) -> int:
        """Not asked."""
        raise AssertionError(f"{self.label} is written, never read")


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

        _check(source, parts, codecs)
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
        import numpy as np

        from k2quant.formats.dtypes import as_array
        from k2quant.kernels.codecs.cpu import gguf

        _check(source, parts, codecs)
        usual = multiplying(source)
        found = parts
        if usual.streamed != source.streamed:
            specs = {name: spec for name, spec in usual.state(source.extent(parts)).items() if name in usual.streamed}
            found = {name: as_array(np.empty(spec.nbytes, np.uint8), spec) for name, spec in specs.items()}
            source.relabel(parts, found, usual)
        codes, scale, *numbers = (found[suffix] for suffix in usual.streamed)
        gguf.nvfp4(codes, scale, outputs[BLOCKS])
        for suffix, number in zip(self.streamed[1:], numbers, strict=True):
            outputs[suffix][...] = number


def multiplying(source: Format) -> Format:
    """Return NVFP4 as ModelOpt has it, whose scales multiply as llama.cpp's do, with what goes along with a source."""
    return source.asked_for().taking(source)


def _check(source: Format, parts: Parts, codecs: Codecs) -> None:
    """Look for values that no weight can have.

    Raises:
        ValueAt: there is one.
    """
    import numpy as np

    source.decode(parts, np.empty(source.extent(parts), np.uint16), codecs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads(Block):
    """`kv_b_proj` as MLA's absorption takes it: for each head its keys' rows transposed, and its values' rows.

    See llama.cpp, conversion/deepseek.py: `attn_k_b` is `[heads, rank, nope]`, `attn_v_b` is `[heads, v, rank]`.
    """

    name: ClassVar[str] = "heads"
    mains: ClassVar[tuple[str, ...]] = ("k_b", "v_b")

    for_keys: Format
    """What the keys' half is written in: a type of GGUF, or BF16."""
    for_values: Format
    """The values' half, likewise."""
    nope: int
    """Rows of a head that make keys."""
    v: int
    """Rows that make values."""
    rank: int
    """Columns."""

    @property
    def streamed(self) -> tuple[str, ...]:
        """Both halves."""
        return self.mains

    @property
    def row_step(self) -> int:
        """Rows of a head."""
        return self.nope + self.v

    @property
    def label(self) -> str:
        """Those of its halves."""
        return " and ".join(dict.fromkeys((self.for_keys.label.upper(), self.for_values.label.upper())))

    def state(self, shape: tuple[int, ...], *, name: str = "weight") -> dict[str, TensorSpec]:
        """Return both halves: matrices that have the rows of all heads one after another."""
        heads = shape[0] // self.row_step
        halves = (self.for_keys, (heads * self.rank, self.nope)), (self.for_values, (heads * self.v, self.rank))
        specs = (half.state(inner, name=name)[half.main] for half, inner in halves)
        return dict(zip(self.mains, specs, strict=True))

    def rows(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        """Return the rows of a half that belong to whole heads."""
        each = self.rank if suffix == self.main else self.v
        return start // self.row_step * each, stop // self.row_step * each

    def restates(self, source: Format) -> bool:
        """Tell floats that stay floats: those of F32 and F16 are not rounded on the way."""
        return not source.quantised and isinstance(self.for_keys, Plain) and isinstance(self.for_values, Plain)

    def restate(self, source: Format, parts: Parts, outputs: Parts, codecs: Codecs) -> None:
        """Widen floats and divide them among the halves."""
        for suffix, half in zip(self.mains, self._halves(widened(parts[source.main])), strict=True):
            _floats({BLOCKS: outputs[suffix]})[...] = half

    def encode(self, weights: U16, parts: Parts, codecs: Codecs) -> Figures:
        """Divide weights among the halves, and write each as its type has it."""
        keys, others = self._halves(weights)
        done = _written(self.for_keys, keys, parts[self.mains[0]], codecs)
        return done + _written(self.for_values, others, parts[self.mains[1]], codecs)

    def _halves(self, weights: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        import numpy as np

        heads = weights.reshape(-1, self.row_step, self.rank)
        keys = np.ascontiguousarray(heads[:, : self.nope].transpose(0, 2, 1)).reshape(-1, self.nope)
        return keys, np.ascontiguousarray(heads[:, self.nope :]).reshape(-1, self.rank)


def _written(half: Format, weights: U16, out: NDArray[Any], codecs: Codecs) -> Figures:
    """Write BF16 weights `[R, K]` in a type, or as they are; return what that did."""
    return half.encode(weights, {half.main: out}, codecs)
