"""MLX's modes of quantised layers as formats: the same codes and scales under mlx's names.

A mode has `weight`, eight codes to a uint32 with the lowest column in the lowest bits, and `scales`; `affine` has
`biases` beside them, for a weight is code * scale + bias there, with codes from 0 to 15. Of NVFP4 mlx-lm keeps, for
stacks of experts alone, a `global_scale` (mlx 0.32.4, `mx.quantize`, mlx/backend/cpu/quantized.cpp; mlx-lm 0.32.2,
models/switch_layers.py, utils.py: `infer_quant_config`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from k2quant.exports.written import Written, check, multiplied
from k2quant.formats.bf16 import Bf16
from k2quant.formats.dtypes import TensorSpec, widened
from k2quant.formats.format import Format, Parts
from k2quant.formats.int4 import Int4
from k2quant.formats.mxfp4 import Mxfp4
from k2quant.formats.nvfp4 import Nvfp4

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.seam import Codecs

WEIGHT, SCALES, BIASES, GLOBAL = "weight", "scales", "biases", "global_scale"
"""What mlx calls the arrays of a layer."""

GROUPS = (32, 64, 128)
"""Sizes of groups that mlx's affine mode has kernels for."""

_LARGEST = 448 * 6
"""The largest E4M3 times the largest E2M1: mlx divides a global scale by it, and others' scales are that quotient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed(Written):
    """A mode."""

    mains: ClassVar[tuple[str, ...]] = (WEIGHT,)
    served: ClassVar[str] = "mlx-lm"

    group: int
    """Columns that share a scale."""

    @property
    def streamed(self) -> tuple[str, ...]:
        """Codes and scales."""
        return (WEIGHT, SCALES)

    def state(self, shape: tuple[int, ...], *, name: str = "weight") -> dict[str, TensorSpec]:
        """Return codes and scales of a weight."""
        rows, width = shape
        return {
            WEIGHT: TensorSpec("U32", (rows, width // 8)),
            SCALES: TensorSpec("U8", (rows, width // self.group)),
        }

    def restates(self, source: Format) -> bool:
        """Nothing else is written so."""
        return True

    @property
    def label(self) -> str:
        """The mode."""
        return f"{self.name} group {self.group}"

    @property
    def params(self) -> dict[str, Any]:
        """What a config says of a layer."""
        return {"group_size": self.group, "bits": 4, "mode": self.name}


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine(Packed):
    """INT4: codes and scales as they are, and -8 * scale beside them, exactly."""

    name: ClassVar[str] = str(Int4.mlx)

    dtype: str
    """Of the scales, and so of the biases."""

    @property
    def streamed(self) -> tuple[str, ...]:
        """Codes, scales and biases."""
        return (WEIGHT, SCALES, BIASES)

    def state(self, shape: tuple[int, ...], *, name: str = "weight") -> dict[str, TensorSpec]:
        """Return codes, scales and biases of a weight."""
        scales = TensorSpec(self.dtype, (shape[0], shape[1] // self.group))
        return {**Packed.state(self, shape, name=name), SCALES: scales, BIASES: scales}

    def restate(self, source: Format, parts: Parts, outputs: Parts, codecs: Codecs) -> None:
        """Take codes and scales.

        Raises:
            ValueAt: a scale is NaN, infinite or has a sign, or its bias is beyond its dtype.
        """
        import numpy as np

        from k2quant.kernels.codecs import values as explain
        from k2quant.kernels.codecs.cpu.checks import valid

        words, scale, group = source.reading(parts)
        if not valid(scale):
            raise explain.bad_int4(words, scale, group)
        outputs[WEIGHT], outputs[SCALES] = words.view(np.uint32), parts["weight_scale"]
        with np.errstate(over="ignore"):
            outputs[BIASES][...] = self._narrowed(scale * np.float32(-8))
            largest = self._narrowed(scale.max(keepdims=True, initial=0) * np.float32(-8))
        if not np.isfinite(widened(largest)).all():
            row, column = explain.first(~np.isfinite(widened(outputs[BIASES])))
            what = f"a scale of which {self.dtype} has no eightfold, {scale[row, column]:g},"
            raise explain.ValueAt(row=row, column=column, what=what, of="scale")

    def _narrowed(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """Return values in the dtype of the scales, which has them exactly or not at all: three powers of two more."""
        import numpy as np

        if self.dtype == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(np.float16) if self.dtype == "F16" else values


@dataclass(frozen=True, slots=True, kw_only=True)
class Mx(Packed):
    """MXFP4: the same bytes."""

    name: ClassVar[str] = str(Mxfp4.mlx)

    def restate(self, source: Format, parts: Parts, outputs: Parts, codecs: Codecs) -> None:
        """Take codes and scales, once they are known to stand for finite values.

        Raises:
            ValueAt: a value that no weight can have.
        """
        check(source, parts, codecs)
        _take(source.reading(parts), outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nv(Packed):
    """NVFP4 of an expert: the same bytes, and the scale of the whole as mlx has it, times 448 * 6."""

    name: ClassVar[str] = str(Nvfp4.mlx)
    whole: ClassVar[tuple[str, ...]] = (GLOBAL,)

    @property
    def streamed(self) -> tuple[str, ...]:
        """Codes, scales and the scale of the whole."""
        return (WEIGHT, SCALES, GLOBAL)

    def state(self, shape: tuple[int, ...], *, name: str = "weight") -> dict[str, TensorSpec]:
        """Return codes, scales and one number."""
        return {**Packed.state(self, shape, name=name), GLOBAL: TensorSpec("F32", (1,))}

    def rows(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        """Return rows as they are; of one number, that."""
        return (0, 1) if suffix in self.whole else (start, stop)

    @property
    def params(self) -> dict[str, Any]:
        """What a config says of a layer: that there is a scale of the whole, too."""
        return {**Packed.params.fget(self), GLOBAL: True}  # type: ignore[attr-defined]  # no super() in slots

    def restate(self, source: Format, parts: Parts, outputs: Parts, codecs: Codecs) -> None:
        """Take codes and scales, once they are known to stand for finite values.

        Raises:
            ValueAt: a value that no weight can have, a scale that divides and has no inverse, or none of mlx's.
        """
        import numpy as np

        from k2quant.kernels.codecs.values import ValueAt

        check(source, parts, codecs)
        codes, scale, whole, *_ = multiplied(source, parts)
        _take((codes, scale), outputs)
        with np.errstate(over="ignore"):
            outputs[GLOBAL][...] = whole.astype(np.float32) * np.float32(_LARGEST)
        if not np.isfinite(outputs[GLOBAL]).all():
            raise ValueAt(row=0, column=0, what="a scale of the whole that mlx cannot say", of="tensor scale")


def _take(found: tuple[NDArray[Any], ...], outputs: Parts) -> None:
    """Have bytes of codes and of scales written as they were read."""
    import numpy as np

    codes, scale = found
    outputs[WEIGHT], outputs[SCALES] = codes.view(np.uint32), scale.view(np.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Floats(Bf16):
    """A half of `kv_b_proj` in the dtype that the whole has."""

    def restates(self, source: Format) -> bool:
        """Tell floats of the same dtype."""
        return not source.quantised and source.unit == self.dtype

    def restate(self, source: Format, parts: Parts, outputs: Parts, codecs: Codecs) -> Figures | None:
        """Copy."""
        outputs[self.main][...] = parts[source.main]
        return None
