"""What a QAT step costs, as JSON: suites.qat.cost WORKDIR EXPERTS times [torchao], or WORKDIR EXPERTS memory TOOL.

EXPERTS is `fused` or `separate`. Times: the contestants take turns, a step each, in one process on the same rows.
Memory: each contestant in a process of its own; the peak of its resident memory less what it had with all libraries
loaded and before the model.
"""

from __future__ import annotations

import json
import resource
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from k2quant.qat import fake_quantize, load
from suites.qat import peers as qat_peers

WARM, TURNS = 5, 40
_BITS = 4


def contestant(base: Path, experts: str, tool: str) -> nn.Module:
    """Return a model that a tool has prepared; its router is frozen in all."""
    model: Any = load(base)
    if experts == "separate":
        model = qat_peers.separate(model)
    found = qat_peers.prepared_by(tool, model, _BITS)
    for name, parameter in found.named_parameters():
        parameter.requires_grad_(not name.endswith("mlp.gate.weight"))
    return found


def times(base: Path, data: Path, experts: str, tools: list[str]) -> dict[str, list[float]]:
    """Return the seconds of every step of each tool."""
    rows = qat_peers.rows_of(base, data)
    models = {tool: contestant(base, experts, tool) for tool in tools}
    optimizers = {tool: qat_peers.optimizer_of(model, _BITS) for tool, model in models.items()}
    found: dict[str, list[float]] = {tool: [] for tool in tools}
    for number, part in enumerate(islice(qat_peers.batches(rows, 0), WARM + TURNS)):
        for tool, model in models.items():
            seconds = qat_peers.step(model, optimizers[tool], part)
            if number >= WARM:
                found[tool].append(seconds)
    return found


def memory(base: Path, data: Path, experts: str, tool: str) -> dict[str, int]:
    """Return bytes of this process: with its libraries and data, and at the peak of ten steps."""
    rows = qat_peers.rows_of(base, data)
    fake_quantize(torch.zeros(1, 32))  # compiled code is loaded at its first use; a library is no cost of a step
    if tool == "torchao":
        import torchao.quantization.qat  # noqa: F401  the same
    before = _resident()
    model = contestant(base, experts, tool)
    optimizer = qat_peers.optimizer_of(model, _BITS)
    for part in islice(qat_peers.batches(rows, 0), 10):
        qat_peers.step(model, optimizer, part)
    return {"before": before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main(arguments: list[str]) -> None:
    """Measure what is asked for."""
    torch.set_num_threads(1)
    workdir, experts = Path(arguments[0]), arguments[1]
    base, data = workdir / "base-0", workdir / "tasks" / "train.jsonl"
    if arguments[2] == "memory":
        found: Any = memory(base, data, experts, arguments[3])
    else:
        tools = ["none", "k2quant"] + (["torchao"] if experts == "separate" and "torchao" in arguments else [])
        found = times(base, data, experts, tools)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
