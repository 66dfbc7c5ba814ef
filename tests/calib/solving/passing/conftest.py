"""A sink in memory, a rule of rounding so coarse that whoever is given its outputs shows it, and passes over both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k2quant.calib.inputs import Samples
from k2quant.calib.solving.choosing import Settled
from k2quant.calib.solving.evidence import Evidence
from k2quant.calib.solving.passing import Pass, groups
from k2quant.calib.solving.settings import Settings
from k2quant.checkpoint.reader import Checkpoint
from k2quant.ground import names

PLENTY = 4 * 10**9  # bytes: enough for any test


class Sink:
    """Keeps values in memory; `full` matrices on, it fails as a process that is killed."""

    def __init__(self, full: int | None = None) -> None:
        """Begin with nothing."""
        self.values: dict[str, Tensor] = {}
        self.layers: dict[str, int] = {}
        self.full = full

    def find(self, base: str) -> Tensor | None:
        """Return what was put."""
        return self.values.get(base)

    def put(self, layer: int, found: Mapping[str, Settled]) -> None:
        """Keep it."""
        if self.full is not None and len(self.values) >= self.full:
            raise KeyboardInterrupt
        self.values.update({base: each.values for base, each in found.items()})
        self.layers.update(dict.fromkeys(found, layer))


class Coarse:
    """Settles every weight at its sign times the row's mean size, and notes what it was asked."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.seen: list[tuple[tuple[str, ...], Evidence]] = []

    def __call__(self, weights: Mapping[str, Tensor], evidence: Evidence, settings: Settings) -> dict[str, Settled]:
        """Return values that are far from the weights; a change of any bit of the evidence changes the last of them."""
        assert settings == Settings(propagate=settings.propagate)
        self.seen.append((tuple(weights), evidence))
        mark = bits(evidence)
        return {
            name: Settled(_coarse(each, mark), each.new_zeros(0), {"method": "rtn"}) for name, each in weights.items()
        }


def _coarse(weights: Tensor, mark: str) -> Tensor:
    values = weights.sign() * weights.float().abs().mean(1, keepdim=True).to(weights.dtype)
    values[-1, -1] = int(mark[:2], 16) / 2**14
    return values


def bits(evidence: Evidence) -> str:
    """Return the SHA-256 of what an input was seen to be."""
    tensors = [evidence.hessian, evidence.mean, evidence.held, evidence.held_weights]
    tensors += [evidence.prior.hessian, evidence.prior.mean, evidence.prior.held] if evidence.prior else []
    whole = hashlib.sha256(f"{evidence.weight} {evidence.tokens}".encode())
    for each in tensors:
        whole.update(each.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> Coarse:
    """Have matrices settled by that rule."""
    rule = Coarse()
    monkeypatch.setattr(groups, "settle", rule)
    return rule


def every_matrix(source: Checkpoint) -> list[str]:
    """Return all projections of a checkpoint in BF16."""
    bases = (name.removesuffix(".weight") for name in source.tensors)
    return [base for base in bases if names.is_projection(base)]


Through = Callable[..., Pass]


@pytest.fixture
def through(tmp_path: Path) -> Through:
    """Give the function that takes a pass through all layers, or up to one."""

    def run(
        source: Checkpoint,
        samples: Samples,
        sink: Sink,
        *,
        bases: Collection[str] | None = None,
        propagate: bool = True,
        work: str = "work",
        upto: int | None = None,
        memory: int = PLENTY,
        workers: int = 1,
        **options: Any,
    ) -> Pass:
        asked = every_matrix(source) if bases is None else bases
        found = Pass(
            source,
            samples,
            asked,
            Settings(propagate=propagate),
            sink=sink,
            work=tmp_path / work,
            memory=memory,
            workers=workers,
            **options,
        )
        while found.next < (found.layers if upto is None else upto):
            found.advance()
        return found

    return run


@pytest.fixture(scope="session")
def matrices() -> Callable[[Checkpoint], list[str]]:
    """Give the function that names all projections."""
    return every_matrix


@pytest.fixture(scope="session")
def sinks() -> Callable[..., Sink]:
    """Give what makes a sink."""
    return Sink
