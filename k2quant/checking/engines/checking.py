"""A checkpoint against what an engine's loader requires."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from k2quant.checking.engines.known import ktransformers, llama_cpp, sglang, tensorrt_llm, transformers, vllm
from k2quant.checking.engines.memory import Memory, memory_needed
from k2quant.checking.engines.rule import Finding, Outcome, Rule, failed, looked_at, passed, unknown
from k2quant.checking.engines.subject import Subject, subject
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.remote.address import Address, spot
from k2quant.conversion.metadata import relatives
from k2quant.errors import UsageError
from k2quant.ground.engines import LABELS
from k2quant.ground.saying.showing import as_html, brief
from k2quant.ground.units import enough, one_of, size

_KNOWN: Mapping[str, tuple[str, tuple[Rule, ...]]] = {
    "vllm": (vllm.VERSION, vllm.RULES),
    "sglang": (sglang.VERSION, sglang.RULES),
    "tensorrt-llm": (tensorrt_llm.VERSION, tensorrt_llm.RULES),
    "ktransformers": (ktransformers.VERSION, ktransformers.RULES),
    "llama.cpp": (llama_cpp.VERSION, llama_cpp.RULES),
    "transformers": (transformers.VERSION, transformers.RULES),
}

_UNSPREAD = frozenset({"llama.cpp", "transformers"})
"""Engines that lay whole layers on devices: what counts is the memory of all of them together."""

_HOLD: dict[str, dict[str, Any]] = {
    "ktransformers": {"experts_on_host": True},
    "llama.cpp": {"absorbs": False},
    "transformers": {"absorbs": False, "latent": False, "decoded": transformers.DECODED},
}
"""What an engine holds otherwise than vLLM and SGLang do, for `memory_needed`."""

_GGUF = ".gguf"

_RESERVED = {"vllm": 0.92}
"""The share of a device's memory that an engine takes at the most where nobody says another (vllm/config/cache.py)."""


_OF_ANY = frozenset({"tensors", "model_type", "index", "fused", "block", "one meaning", "method", "tokenizer", "chats"})
"""Rules that hold for K3 and for other relatives, too."""

_COPIED = frozenset({"model_type", "tokenizer", "chats", "memory"})
"""Rules of files that a conversion copies, and of the machine."""


class EngineCheck(NamedTuple):
    """What a checkpoint has of all that an engine requires."""

    folder: str
    engine: str
    version: str
    """Of the engine, from which its rules were read."""
    tensor_parallel: int
    findings: list[Finding]
    """Failures first, then what cannot be told."""
    memory: Memory
    """What each device needs to hold; of engines that lay whole layers on devices, all of them together."""

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def failures(self) -> list[Finding]:
        """What failed."""
        return [finding for finding in self.findings if finding.result == "fail"]

    def facts(self) -> dict[str, object]:
        """Return what it comes to, in a few words."""
        doubts = sum(finding.result == "cannot tell" for finding in self.findings)
        counts = {"rules": len(self.findings), "failed": len(self.failures), "cannot_tell": doubts}
        return {"engine": f"{LABELS[self.engine]} {self.version}", "folder": self.folder, **counts}

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def _repr_html_(self) -> str:
        """Return it as a small table, for notebooks."""
        return as_html(self)


def check_engine(
    folder: str | os.PathLike[str] | Address,
    engine: str,
    *,
    tensor_parallel: int = 1,
    memory: int | None = None,
    context: int | None = None,
    follow_links: bool = False,
) -> EngineCheck:
    """Look for what an engine would stop at, or read wrong, before there is one.

    Headers, config and names of files are read, and scales of whole matrices, but no weight. That nothing fails is no
    promise: kernels are chosen on the machine itself.

    Args:
        folder: of the checkpoint, or its address; there, headers alone are read.
        engine: one of `vllm`, `sglang`, `tensorrt-llm`, `ktransformers`, `llama.cpp`, `transformers`.
        tensor_parallel: devices that each matrix is spread over.
        memory: bytes of each device; None: nothing is said of whether it is enough.
        context: tokens of a sequence; None: as many as the config allows.
        follow_links: whether its links may lead out of it.

    Raises:
        UsageError: another engine, or numbers that are none.
        CheckpointError: the folder holds no checkpoint, or its index or a header lies.
    """
    one_of("engine", engine, tuple(_KNOWN))
    if str(folder).endswith(_GGUF):
        remedy = "a GGUF file holds all that llama.cpp reads; check what it is made from"
        raise UsageError(f"{folder} is no folder of a checkpoint: {remedy}")
    for name, value in (("tensor_parallel", tensor_parallel), ("memory", memory), ("context", context)):
        if value is not None and value < 1:
            raise UsageError(f"`{name}=` must be positive, not {value}")
    checkpoint = open_checkpoint(spot(folder), follow_links=follow_links)
    place = folder if checkpoint.supply is None else checkpoint.place
    found = subject(checkpoint, ranks=tensor_parallel, memory=memory, context=context)
    return _check(str(place), engine, found)


def check_written(folder: str | os.PathLike[str]) -> list[EngineCheck]:
    """Return the checks of an output by the engines that its formats are for, of what a conversion writes itself.

    Files that it copies along, and memory, are left out: they are as they were in the source.

    Raises:
        CheckpointError: the folder holds no checkpoint, or its index or a header lies.
    """
    found = subject(open_checkpoint(spot(folder)))
    done = [_check(str(folder), engine, found) for engine in _meant(found)]
    return [
        each._replace(findings=[finding for finding in each.findings if finding.rule not in _COPIED]) for each in done
    ]


def _meant(found: Subject) -> list[str]:
    """Return the engines that take every format of a checkpoint, by what each says of itself."""
    served = {kind.weight.format.served for kind in found.quantised if kind.weight.format is not None}
    return [engine for engine, label in LABELS.items() if served and all(label in each for each in served)]


def _check(place: str, engine: str, found: Subject) -> EngineCheck:
    version, rules = _KNOWN[engine]
    spread = replace(found, ranks=1) if engine in _UNSPREAD else found
    need = memory_needed(spread, **_HOLD.get(engine, {}))
    findings = [_looked_at(rule, found) for rule in (*rules, _memory_rule(engine, need))]
    order = ("fail", "cannot tell", "pass")
    findings.sort(key=lambda finding: order.index(finding.result))
    return EngineCheck(place, engine, version, found.ranks, findings, need)


def _looked_at(rule: Rule, found: Subject) -> Finding:
    """Return what a rule comes to; of a relative, whose modules were not looked up, only where they do not matter."""
    relative = found.found.of_k3 or bool(relatives.other_types(found.config))
    if relative and rule.name not in _OF_ANY:
        outcome = unknown("what the engine does with the modules of this model_type was not looked up")
        return Finding(rule.name, *outcome, rule.why, rule.source)
    return looked_at(rule, found)


def _memory_rule(engine: str, need: Memory) -> Rule:
    """Return the rule of whether weights and one sequence have room."""
    where = "in all" if engine in _UNSPREAD else "on each device"

    def test(found: Subject) -> Outcome:
        said = f"{enough(need.weights + need.absorbed)} of weights"
        if need.cache is not None:
            said += f" and {enough(need.cache)} of keys and values of {need.context:,} tokens"
        said += f" {where}"
        if need.host:
            said += f", {enough(need.host)} of experts on the host"
        if found.memory is None:
            return unknown(f"{said}; what a device has was not said (`memory=`)")
        held = found.memory * (found.ranks if engine in _UNSPREAD else 1)
        room = int(held * _RESERVED.get(engine, 1.0))
        if need.needed > room:
            return failed(
                f"memory {where}",
                expected=f"{said}, and more for activations",
                found=f"{size(held)}, of which {LABELS[engine]} takes {size(room)}",
                remedy="more devices, fewer tokens of a sequence, or an FP8 cache",
            )
        return passed(f"{said}: {size(room - need.needed)} are left for activations, graphs, other sequences")

    return Rule("memory", "holds its weights, and keys and values of a sequence", _ARITHMETIC, test)


_ARITHMETIC = "by arithmetic; vllm/config/cache.py, gpu_memory_utilization"
