"""How OpenMP's threads wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from k2quant.ground.spinning import ROUNDS, shorten_spinning


def test_threads_sleep_soon_unless_the_user_says_how_they_wait() -> None:
    """Nothing set: a short spin; the user's word, of either name and even empty, stays and nothing joins it."""
    silent: dict[str, str] = {}
    shorten_spinning(silent)
    assert silent == {"GOMP_SPINCOUNT": ROUNDS}
    for own in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": ""}):
        told = dict(own)
        shorten_spinning(told)
        assert told == own


def test_libgomp_hears_it_before_it_is_loaded() -> None:
    """In a process that imports k2quant and then torch, libgomp itself says that it spins so long."""
    clean = {name: value for name, value in os.environ.items() if name not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    done = subprocess.run(
        [sys.executable, "-c", "import k2quant, torch"],
        env=clean | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    if "GOMP_" not in done.stderr:
        pytest.skip("torch has another OpenMP library here")
    assert f"GOMP_SPINCOUNT = '{ROUNDS}'" in done.stderr
