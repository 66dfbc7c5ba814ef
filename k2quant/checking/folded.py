"""Powers of two that were moved from the rows of an `up_proj` to the columns of its `down_proj`.

Nothing is believed of it: what was taken out of a row of up is seen by up itself, before and after, and the column of
down must have just that.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from k2quant.checkpoint.panels import panel_rows, read_values

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from k2quant.checkpoint.reader import Checkpoint
    from k2quant.checkpoint.weights import StoredWeight
    from k2quant.kernels.codecs.values import U16

_PRODUCER, _CONSUMER = "up_proj", "down_proj"


def is_producer(base: str) -> bool:
    """Tell whether a weight is one whose rows may be folded."""
    return base.rpartition(".")[2] == _PRODUCER


def consumer(base: str) -> str:
    """Return the weight that has the powers of two that were taken out of this one."""
    return f"{base.removesuffix(_PRODUCER)}{_CONSUMER}"


class Fold:
    """What was taken out of the rows of one `up_proj`."""

    def __init__(self, a: Checkpoint, b: Checkpoint, before: StoredWeight, after: StoredWeight) -> None:
        """Read nothing yet.

        Args:
            a: the source.
            b: the output.
            before: the weight in the source.
            after: the same in the output.
        """
        self._a, self._b, self._before, self.after = a, b, before, after
        self._lock = threading.Lock()
        self._found: NDArray[np.int8] | None = None

    def of_rows(self, before: U16, after: U16) -> U16:
        """Return rows of up as they were before they were rounded; as they are where they are none that were folded.

        Args:
            before: BF16 bits `[R, K]` of the source.
            after: BF16 bits of the output.
        """
        from k2quant.conversion.searching.powers import shifted

        found = _powers(before, after)
        return shifted(before, -found[:, None]) if found.any() else before

    def of_columns(self, before: U16) -> U16:
        """Return rows of down as they were before they were rounded.

        Args:
            before: BF16 bits `[R, K]` of the source.
        """
        from k2quant.conversion.searching.powers import shifted

        with self._lock:
            if self._found is None:
                self._found = self._read()
        return shifted(before, self._found[None]) if self._found.any() else before

    def _read(self) -> NDArray[np.int8]:
        import numpy as np

        from k2quant.formats.transcode import Scratch
        from k2quant.kernels.codecs.choice import codecs

        cpu, scratch, found = codecs("cpu"), (Scratch(), Scratch()), []
        for start, stop in panel_rows(self._before.shape):
            before, after = (
                read_values(source, weight, start, stop, codecs=cpu, scratch=room).values
                for source, weight, room in zip((self._a, self._b), (self._before, self.after), scratch, strict=True)
            )
            found.append(_powers(before, after))
        return np.concatenate(found)


def _powers(before: U16, after: U16) -> NDArray[np.int8]:
    """Return int8 `[R]`; zeros where rows are no fold of what they were: rounding does not explain them."""
    import numpy as np

    from k2quant.conversion.searching.powers import fold_of
    from k2quant.kernels.codecs.values import ValueAt

    try:
        return fold_of(before, after)
    except ValueAt:
        return np.zeros(len(before), np.int8)
