"""What the loaders of engines require, and whether a checkpoint has it: rules, each with the file it was read from."""

from __future__ import annotations

from k2quant.checking.engines.checking import EngineCheck, check_engine, check_written
from k2quant.checking.engines.memory import Memory
from k2quant.checking.engines.rule import Finding

__all__ = ["EngineCheck", "Finding", "Memory", "check_engine", "check_written"]
