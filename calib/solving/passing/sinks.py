"""Where what is solved goes, and where a run that was stopped finds it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from k2quant.calib.solving.choosing import Settled


class Sink(Protocol):
    """Keeps what matrices were settled at. Both methods are called from several threads, never for one matrix twice."""

    def find(self, base: str) -> Tensor | None:
        """Return the quantised values of a matrix that stands already, BF16 `[R, K]`; None: it does not.

        Args:
            base: the matrix's name in the language model without suffix, such as
                `model.layers.3.mlp.experts.17.gate_proj`.
        """

    def put(self, layer: int, found: Mapping[str, Settled]) -> None:
        """Keep matrices that were settled together, by base; they last when this returns.

        Either all of them are found afterwards or, after a kill, perhaps none.

        Args:
            layer: theirs.
            found: what each ships with.
        """
