"""How answers are drawn: greedily, or at a temperature, once or several times."""

from __future__ import annotations

import math
from typing import Any

from k2quant.errors import UsageError
from k2quant.eval.asking.request import Request

HOTTEST = 10
"""Of temperatures: a server's limit is 2; beyond this it is a typing error."""
LAST_SEED = 2**63 - 1
"""What fits in the JSON numbers of most readers, and in torch's generators."""
MOST_REPEATS = 10_000
"""Of a question: all are in memory, and more tell less than other questions would."""


def check_sampling(request: Request) -> None:
    """Refuse settings of sampling that make no sense, or do not go together.

    Raises:
        UsageError: so it is.
    """
    heat, top_p = request.temperature, request.top_p
    check_draws(heat, top_p, request.seed)
    if type(request.repeats) is not int or not 1 <= request.repeats <= MOST_REPEATS:
        raise UsageError(f"repeats: expected 1 to {MOST_REPEATS:,} answers to each question, found {request.repeats!r}")
    if top_p is not None and not heat:
        raise UsageError("`top_p=` draws, and so needs a `temperature=` above 0")
    if request.repeats > 1 and not heat:
        raise UsageError("`repeats=` needs a `temperature=` above 0: greedy answers are all the same")


def check_draws(temperature: float | None, top_p: float | None, seed: int | None) -> None:
    """Refuse numbers by which nothing can be drawn; what is None was not said.

    Raises:
        UsageError: so it is.
    """
    if temperature is not None and (not _is_number(temperature) or not 0 <= temperature <= HOTTEST):
        raise UsageError(f"temperature: expected 0 to {HOTTEST}, found {temperature!r}")
    if top_p is not None and (not _is_number(top_p) or not 0 < top_p <= 1):
        raise UsageError(f"top_p: expected more than 0 and at most 1, found {top_p!r}")
    if seed is not None and (type(seed) is not int or not 0 <= seed <= LAST_SEED):
        raise UsageError(f"seed: expected 0 to 2^63 - 1, found {seed!r:.100}")


def _is_number(value: object) -> bool:
    return type(value) in {int, float} and math.isfinite(value)  # type: ignore[arg-type]


def generation(request: Request) -> dict[str, Any]:
    """Return what a run's sampling puts in place of each task's own, in lm-eval's words; empty to leave that alone."""
    if request.temperature is None:
        return {}
    if request.temperature == 0:
        return {"do_sample": False, "temperature": 0.0}
    top_p = 1.0 if request.top_p is None else float(request.top_p)
    return {"do_sample": True, "temperature": float(request.temperature), "top_p": top_p}
