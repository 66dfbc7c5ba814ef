"""float32 products that keep all of float32: torch may be told to round what it multiplies to TF32 or BF16."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from k2quant.errors import UsageError

_WHOLE = "highest"


@contextlib.contextmanager
def whole_float32() -> Iterator[None]:
    """Have products of float32 keep all of it, whatever the process has set: sums of squares need more than TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(_WHOLE)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def require_whole_products() -> None:
    """Refuse to go on where torch rounds what it multiplies.

    Raises:
        UsageError: it does.
    """
    if (found := torch.get_float32_matmul_precision()) != _WHOLE:
        raise UsageError(
            f"float32 products have the precision {found!r}; GPTQ needs all their bits: "
            f"torch.set_float32_matmul_precision('{_WHOLE}')"
        )
