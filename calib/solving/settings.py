"""How matrices are solved: what a user may ask for, and nothing that follows from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from k2quant.errors import UsageError
from k2quant.kernels.codecs.grids import PACKED_BITS, largest_code

Scales = Literal["rtn", "mse", "imatrix"]
"""Who chooses the scales that a matrix is solved with: the plain rule, or a search, without or with inputs' moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How every matrix of a run is solved.

    Raises:
        UsageError: a value that has no meaning.
    """

    scales: Scales = "imatrix"
    """Chosen before the first column is rounded and kept: `weight_g_idx` is never needed."""
    damping: float = 0.1
    """What is added to the diagonal of a Hessian, in units of its mean. QMoE (arXiv 2310.16795) and MoE-Quant's command
    take 0.1 for experts, the paper of GPTQ 0.01. On a nano-K2, with a hundred tokens a column, 0.03 leaves 6 % less
    error than 0.1 with INT4 and INT3, and as much with INT2."""
    propagate: bool = True
    """Whether a layer sees what the quantised layers before it give; else what the original ones give."""
    bits: int = 4
    """Width of the codes; 3 and 2 are for measurements, no checkpoint has them."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.scales not in get_args(Scales):
            raise UsageError(f"`scales=`: expected {', '.join(get_args(Scales))}, found {self.scales!r}")
        if not (math.isfinite(self.damping) and self.damping > 0):
            raise UsageError(f"`damping=`: expected a positive number, such as 0.1, found {self.damping}")
        largest_code("moonshot", self.bits, PACKED_BITS)

    def as_json(self) -> dict[str, Any]:
        """Return the fields, as they are written."""
        return asdict(self)
