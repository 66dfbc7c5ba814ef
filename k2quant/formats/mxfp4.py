"""MXFP4: E2M1 codes, two to a byte, and for each 32 columns a scale that is a power of two.

The layout is that of compressed-tensors' `mxfp4-pack-quantized` (compressed_tensors 0.20, compressors/mxfp4), which
Kimi-K3's routed experts have too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from k2quant.errors import CheckpointError, DtypeMismatch, ShapeMismatch, UnsupportedFormat
from k2quant.formats.configs import compressed_tensors
from k2quant.formats.configs.keys import FILE, empty, shown
from k2quant.formats.dtypes import TensorSpec
from k2quant.formats.format import Entry, Format, Layout, Method, Neighbours, Parts, Scope, Stored, matrix
from k2quant.kernels.codecs.grids import MXFP4_BLOCK

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.grids import Grid
    from k2quant.kernels.codecs.seam import Codecs
    from k2quant.kernels.codecs.values import F32, U16
    from k2quant.kernels.products.packed.weight import PackedWeight

_SCALES = ("U8", "F8_E8M0")
"""Dtypes of the scales in a file: the same bytes, the exponent plus 127."""

_SCHEME: dict[str, Any] = {"num_bits": 4, "symmetric": True, "type": "float"}


# The largest weight is 3.5 to 7 times the plain scale, and a search tries its half and its double. Zeros have 2^-127.
_BUDGET: dict[str, Any] = {"least": 6 / 14.1, "most": 6 / 1.74, "unit": (0.0, 2.0**-126), "zeros": 0.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4(Format):
    """E2M1 codes, the even column in the low nibble, times 2^(byte - 127) for each 32 columns."""

    name: ClassVar[str] = "mxfp4"
    served: ClassVar[str] = "vLLM, transformers with compressed-tensors, k2quant"
    mains: ClassVar[tuple[str, ...]] = ("weight_packed",)
    streamed: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")
    partners: ClassVar[tuple[str, ...]] = ("weight_scale",)
    scale_suffix: ClassVar[str | None] = "weight_scale"
    reads: ClassVar[str] = "MXFP4 mxfp4-pack-quantized weights"
    stands_for: ClassVar[str] = "MXFP4 weights with weight_packed, as format mxfp4-pack-quantized says"
    method: ClassVar[str | None] = compressed_tensors.METHOD
    scheme_words: ClassVar[str] = "symmetric 4-bit float"
    packing: ClassVar[str] = "mxfp4-pack-quantized"
    default_scope: ClassVar[Scope | None] = "experts"
    unfit: ClassVar[tuple[str, ...]] = ("kv_b_proj",)  # absorbed into its neighbours by MLA, which takes BF16 or FP8
    layouts: ClassVar[tuple[str, ...]] = ("compressed-tensors",)
    searches: ClassVar[bool] = True
    trained: ClassVar[bool] = True
    clips: ClassVar[bool] = True
    ggml: ClassVar[str | None] = "MXFP4"
    mlx: ClassVar[str | None] = "mxfp4"
    searched_from: ClassVar[tuple[str, ...]] = ("int4",)
    searched_by: ClassVar[tuple[Method, ...]] = ("mse", "imatrix")
    unit: ClassVar[int] = MXFP4_BLOCK
    label: ClassVar[str] = f"mxfp4 group {MXFP4_BLOCK}"

    scale_dtype: str = "U8"
    """U8 as it is written; a source may say F8_E8M0 of the same bytes."""

    def state(self, shape: tuple[int, ...], *, name: str = "weight") -> dict[str, TensorSpec]:
        """Return codes and scales of a weight.

        Raises:
            ShapeMismatch: 32 does not divide the width.
        """
        rows, width = shape
        check_width(width, MXFP4_BLOCK, name=name, shape=shape, called="MXFP4")
        return {
            "weight_packed": TensorSpec("U8", (rows, width // 2)),
            "weight_scale": TensorSpec(self.scale_dtype, (rows, width // MXFP4_BLOCK)),
        }

    @property
    def unwritable(self) -> str | None:
        """Scales that are called F8_E8M0."""
        return None if self.scale_dtype == "U8" else self.scale_dtype

    @property
    def in_memory(self) -> Mxfp4:
        """The products read bytes, whatever a file calls them."""
        return replace(self, scale_dtype="U8")

    # --- recognising it ---

    @classmethod
    def recognise(cls, suffix: str, entry: Entry, beside: Neighbours) -> Stored | None:
        """Take bytes of codes with a byte of scale for each 32 columns."""
        if suffix not in cls.mains or entry.dtype != "U8":
            return None
        shape = wide(entry)
        scale = beside.partner("weight_scale", entry)
        if scale.dtype not in _SCALES:
            raise DtypeMismatch(tensor=scale.name, file=scale.file, expected=" or ".join(_SCALES), found=scale.dtype)
        found = cls(scale_dtype=scale.dtype)
        check_shape(scale, found, shape, MXFP4_BLOCK)
        return Stored(found, shape, cls.streamed)

    @classmethod
    def owns(cls, suffix: str, beside: Neighbours) -> bool:
        """Tell whether scales have bytes of codes."""
        packed = beside.get("weight_packed")
        return suffix == "weight_scale" and packed is not None and packed.dtype == "U8"

    @classmethod
    def refusal(cls, suffix: str, entry: Entry, beside: Neighbours) -> CheckpointError | None:
        """Know MXFP4 of other tools."""
        weight, scale = beside.get("weight"), beside.get("weight_scale")
        if weight is None or weight.dtype != "U8" or scale is None or scale.dtype not in _SCALES:
            return None
        return beside.foreign(weight, "MXFP4 as Quark packs it (a U8 `weight` with U8 scales) is not supported")

    @classmethod
    def asked_for(
        cls, stored: Iterable[tuple[Format, Entry]] = (), grid: Grid | None = None, layout: Layout | None = None
    ) -> Format:
        """Return the one that is written."""
        return cls()

    # --- its values ---

    def extent(self, parts: Parts) -> tuple[int, int]:
        """Return rows, and two columns for each byte."""
        rows, pairs = parts[self.main].shape
        return rows, pairs * 2

    def decode(self, parts: Parts, out: U16, codecs: Codecs) -> None:
        """Multiply each block by its power of two."""
        codecs.mxfp4.decode(parts["weight_packed"], parts["weight_scale"], out)

    def encode(self, weights: U16, parts: Parts, codecs: Codecs) -> Figures:
        """Compute each block's exponent, and round."""
        return codecs.mxfp4.encode(weights, *self.writing(parts))

    def choose(self, weights: U16, codecs: Codecs) -> NDArray[Any]:
        """Return the byte of each block's exponent."""
        scale = _scales_for(weights)
        codecs.mxfp4.choose(weights, scale)
        return scale

    def store(self, weights: U16, scales: NDArray[Any], parts: Parts, codecs: Codecs) -> Figures:
        """Round at given exponents."""
        parts["weight_scale"][...] = scales
        return codecs.mxfp4.store(weights, scales, parts["weight_packed"])

    @property
    def candidates(self) -> int:
        """Those of the rule."""
        from k2quant.kernels.codecs.scales.fp4 import MXFP4_STEPS

        return len(MXFP4_STEPS)

    def search(self, weights: U16, importance: F32 | None, codecs: Codecs, mean: F32 | None = None) -> NDArray[Any]:
        """Return the byte of the best exponent of some for each block."""
        scale = _scales_for(weights)
        codecs.mxfp4.search(weights, importance, scale, mean=mean)
        return scale

    def weighted_error(
        self,
        weights: U16,
        scales: NDArray[Any],
        importance: F32 | None,
        codecs: Codecs,
        mean: F32 | None = None,
    ) -> float:
        """Sum what columns lose at given exponents."""
        return codecs.mxfp4.weighted_error(weights, scales, importance, mean=mean)

    def outside(self, before: U16, after: U16, parts: Parts) -> int:
        """Allow the distance to the nearest code, at the exponent of whichever rule, or of a search."""
        from k2quant.kernels.codecs.cpu.fp4.budget import outside
        from k2quant.kernels.codecs.values import e8m0_to_float

        return outside(before, after, e8m0_to_float(parts["weight_scale"]), **_BUDGET)

    def codes_changed(self, after: Parts, before: Parts) -> int:
        """Count nibbles that differ."""
        return nibbles_changed(after[self.main], before[self.main])

    # --- the config beside it ---

    def config(self, quantised: Iterable[str], kept: list[str]) -> dict[str, Any]:
        """Return a block of compressed-tensors."""
        return compressed_tensors.block([(self, list(quantised))], kept)

    def cache_scheme(self) -> dict[str, Any]:
        """Return what compressed-tensors says of an FP8 cache."""
        return compressed_tensors.CACHE

    def config_group(self) -> dict[str, Any]:
        """Return the scheme of the weights."""
        return compressed_tensors.scheme(group_size=MXFP4_BLOCK, **_SCHEME) | {"scale_dtype": "torch.uint8"}

    @classmethod
    def claims(cls, scheme: Mapping[str, Any]) -> bool:
        """Tell symmetric 4-bit floats from all else."""
        return {key: scheme.get(key) for key in _SCHEME} == _SCHEME

    @classmethod
    def check_config(cls, block: Mapping[str, Any], stored: list[tuple[Format, tuple[int, ...]]]) -> None:
        """Compare the group size with the weights that are there."""
        check_group(block, MXFP4_BLOCK, "group", "uint8")

    # --- in training ---

    def fake_quantized(self, weights: torch.Tensor, bits: int, largest: torch.Tensor | None = None) -> torch.Tensor:
        """Return codes times powers of two."""
        from k2quant.kernels import ops

        return ops.fake_quantize_mxfp4(weights)

    def inside(self, weights: torch.Tensor, bits: int, largest: torch.Tensor | None = None) -> torch.Tensor:
        """Tell weights up to 6 times their scale from those beyond."""
        from k2quant.kernels.codecs import reference

        return reference.mxfp4_inside(weights)

    def exported(self, weights: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """Return codes and scales."""
        from k2quant.kernels import ops

        return dict(zip(self.streamed, ops.bf16_to_mxfp4(weights), strict=True))

    # --- in memory ---

    def unrunnable(self, shape: tuple[int, ...]) -> None:
        """The products multiply by every weight of this format."""

    def packed(self, shape: tuple[int, ...], *, on: torch.device) -> PackedWeight:
        """Return a weight in the checkpoint's own layout."""
        from k2quant.kernels.products.prepare import empty

        return empty(self.name, shape, device="meta", for_device=on)


def check_group(scheme: Mapping[str, Any], block: int, strategy: str, scale_dtype: str) -> None:
    """Refuse a config group of compressed-tensors that says another block, strategy or dtype of the scales.

    Raises:
        UnsupportedFormat: it does.
    """
    said = {"group_size": block, "strategy": strategy, "scale_dtype": f"torch.{scale_dtype}"}
    for name, value in said.items():
        found = scheme.get(name)
        if found is None and name != "group_size":  # older versions do not say it
            continue
        if found != value and (name, found) != ("scale_dtype", scale_dtype):
            raise UnsupportedFormat(name, file=FILE, expected=value, found=shown(found))
    if not empty(scheme.get("block_structure")):
        raise UnsupportedFormat("block_structure", file=FILE, expected="none", found=shown(scheme["block_structure"]))


def wide(entry: Entry) -> tuple[int, int]:
    """Return the shape of a weight whose codes lie two to a byte.

    Raises:
        ShapeMismatch: it is no matrix, or empty.
    """
    rows, pairs = matrix(entry)
    return rows, pairs * 2


def check_width(width: int, block: int, *, name: str, shape: tuple[int, ...], called: str) -> None:
    """Refuse a width that blocks of columns do not divide.

    Raises:
        ShapeMismatch: it is such a one.
    """
    if width % block:
        raise ShapeMismatch(
            f"this width cannot be {called}",
            tensor=name,
            expected=f"a width that {block} divides",
            found=shape,
            remedy="keep it out of the conversion with `ignore=`",
        )


def check_shape(scale: Entry, stored: Format, shape: tuple[int, int], block: int) -> None:
    """Refuse scales that are not one for each block of columns.

    Raises:
        ShapeMismatch: they are of another shape.
    """
    expected = (shape[0], shape[1] // block)
    if shape[1] % block or scale.shape != expected:
        raise ShapeMismatch(
            tensor=scale.name,
            file=scale.file,
            expected=f"{expected} for {stored.name.upper()} codes of {shape} in blocks of {block} columns",
            found=scale.shape,
        )


def nibbles_changed(after: NDArray[Any], before: NDArray[Any]) -> int:
    """Count the codes that differ."""
    import numpy as np

    pairs = np.bitwise_xor(after.view(np.uint8), before.view(np.uint8))
    return int(np.count_nonzero(pairs & 15) + np.count_nonzero(pairs >> 4))


def _scales_for(weights: U16) -> NDArray[Any]:
    import numpy as np

    return np.empty((weights.shape[0], weights.shape[1] // MXFP4_BLOCK), np.uint8)
