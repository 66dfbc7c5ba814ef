"""BF16: a weight stored as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from k2quant.errors import MalformedFile
from k2quant.formats.dtypes import FLOATS, TensorSpec
from k2quant.formats.format import Buffers, Entry, Format, Neighbours, Parts, Stored

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.seam import Codecs
    from k2quant.kernels.codecs.values import U16


@dataclass(frozen=True, slots=True, kw_only=True)
class Bf16(Format):
    """A weight stored as it is. Sources may hold F16 or F32, which are read as BF16; output is BF16."""

    name: ClassVar[str] = "bf16"
    served: ClassVar[str] = "every engine that runs the model"
    mains: ClassVar[tuple[str, ...]] = ("weight",)
    streamed: ClassVar[tuple[str, ...]] = ("weight",)
    quantised: ClassVar[bool] = False
    reads: ClassVar[str] = "BF16, F16 or F32 weights"

    dtype: str = "BF16"
    """BF16, or F16 or F32 in a source."""

    def state(self, shape: tuple[int, ...], *, name: str = "weight") -> dict[str, TensorSpec]:
        """Return the one tensor of a weight."""
        return {"weight": TensorSpec(self.dtype, shape)}

    @property
    def unit(self) -> str:
        """The dtype."""
        return self.dtype

    @property
    def label(self) -> str:
        """The dtype."""
        return self.dtype.lower()

    @property
    def unwritable(self) -> str | None:
        """F16 and F32, which would round a second time."""
        return None if self.dtype == "BF16" else self.dtype

    @classmethod
    def recognise(cls, suffix: str, entry: Entry, beside: Neighbours) -> Stored | None:
        """Take any tensor of floats that is called a weight."""
        if suffix not in cls.mains or entry.dtype not in FLOATS:
            return None
        check_stored_once(entry, beside)
        return Stored(cls(dtype=entry.dtype), entry.shape, cls.streamed)

    def decode(self, parts: Parts, out: U16, codecs: Codecs) -> None:
        """Copy BF16; round F16 and F32. A single column, as tensors that are no matrices come, counts as a row."""
        import numpy as np

        from k2quant.kernels.codecs.values import ValueAt

        values = parts["weight"]
        if self.dtype == "BF16":
            np.copyto(out, values)
        elif values.shape[1] != 1:
            codecs.floats.to_bf16(values, out)
        else:
            try:
                codecs.floats.to_bf16(values.reshape(1, -1), out.reshape(1, -1))
            except ValueAt as error:
                raise ValueAt(row=error.column, column=0, what=error.what) from error

    def values(self, parts: Parts, codecs: Codecs, scratch: Buffers) -> U16:
        """Return what is BF16 as it is."""
        return parts["weight"] if self.dtype == "BF16" else Format.values(self, parts, codecs, scratch)

    def choose(self, weights: U16, codecs: Codecs) -> NDArray[Any]:
        """Return no scales."""
        return weights[:, :0]

    def store(self, weights: U16, scales: NDArray[Any], parts: Parts, codecs: Codecs) -> Figures:
        """Copy the weights."""
        import numpy as np

        np.copyto(parts["weight"], weights)
        return codecs.floats.compare(weights, weights)

    def outside(self, before: U16, after: U16, parts: Parts) -> int:
        """Count every weight that differs in more than the sign of a zero."""
        import numpy as np

        return int(np.count_nonzero((before != after) & ((before | after) & 0x7FFF != 0)))

    def unrunnable(self, shape: tuple[int, ...]) -> None:
        """Return None: it is multiplied by torch."""

    def fake_quantized(self, weights: torch.Tensor, bits: int, largest: torch.Tensor | None = None) -> torch.Tensor:
        """Return them."""
        return weights

    def exported(self, weights: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """Return them."""
        return {"weight": weights}


def check_stored_once(entry: Entry, beside: Neighbours) -> None:
    """Refuse a weight that also stands there packed.

    Raises:
        MalformedFile: it does.
    """
    packed = beside.get("weight_packed")
    if packed is not None and packed.name != entry.name:
        raise MalformedFile("stored twice, also as weight_packed", tensor=entry.name, file=entry.file)
