"""Where tests find the repository and what lies in it."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent

ROOT = TESTS.parent
"""The repository."""

DATA = TESTS / "data"
"""Slices of published checkpoints and questions of published benchmarks."""

SHARED = Path(__file__).resolve().parent
"""Modules that tests import by their bare names, and scripts that they run."""
