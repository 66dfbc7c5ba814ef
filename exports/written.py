"""What formats are that are written and never read: those of other engines' files.

No checkpoint has them, so they stand in no registry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from k2quant.formats.dtypes import as_array
from k2quant.formats.format import Entry, Format, Neighbours, Parts, Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.seam import Codecs
    from k2quant.kernels.codecs.values import U16


class Written(Format):
    """A format of an engine's files."""

    reads: ClassVar[str] = "nothing: it is written, never read"

    @property
    def streamed(self) -> tuple[str, ...]:
        """The one tensor."""
        return self.mains

    @property
    def unit(self) -> object:
        """Its name."""
        return self.label

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


def check(source: Format, parts: Parts, codecs: Codecs) -> None:
    """Look for values that no weight can have.

    Raises:
        ValueAt: there is one.
    """
    import numpy as np

    source.decode(parts, np.empty(source.extent(parts), np.uint16), codecs)


def multiplying(source: Format) -> Format:
    """Return NVFP4 as ModelOpt has it, whose scales multiply, with what goes along with a source."""
    return source.asked_for().taking(source)


def multiplied(source: Format, parts: Parts) -> tuple[NDArray[Any], ...]:
    """Return a panel of NVFP4 in that layout: codes, block scales, the tensor's scale, and the inputs' if it has one.

    Raises:
        ValueAt: a scale divides and has no inverse.
    """
    import numpy as np

    usual = multiplying(source)
    found = parts
    if usual.streamed != source.streamed:
        specs = {name: spec for name, spec in usual.state(source.extent(parts)).items() if name in usual.streamed}
        found = {name: as_array(np.empty(spec.nbytes, np.uint8), spec) for name, spec in specs.items()}
        source.relabel(parts, found, usual)
    return tuple(found[suffix] for suffix in usual.streamed)
