"""The two INT4 rounding rules."""

from __future__ import annotations

from typing import Literal

Grid = Literal["moonshot", "compressed-tensors"]
"""`moonshot`: scale = amax/7, codes -7..7. `compressed-tensors`: scale = amax/7.5, codes -8..7."""
