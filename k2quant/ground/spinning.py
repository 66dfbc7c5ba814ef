"""How long OpenMP's threads spin for the next piece of work before they sleep.

GNU's OpenMP, which torch brings, lets a thread that waits spin for some milliseconds. On cores that others use too, it
burns the time that the thread it waits for needs: a job beside two busy processes takes many times as long. libgomp
itself spins 1,000 rounds instead of 300,000 where it sees more threads than cores; it cannot see other processes'.
`benchmarks/neighbours.py` measures both.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

ROUNDS = "1000"
"""What libgomp takes for crowded cores (gomp_throttled_spin_count_var in its env.c)."""

_OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""What a user says it with."""


def shorten_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have OpenMP's threads sleep soon, unless the user has said how they shall wait.

    libgomp reads this once, when it is loaded: where torch was imported before k2quant, nothing changes. Results are
    the same to the last bit, for threads get the same work.

    Args:
        environment: that of this process and of those it starts.
    """
    if not any(name in environment for name in _OWN):
        environment["GOMP_SPINCOUNT"] = ROUNDS
