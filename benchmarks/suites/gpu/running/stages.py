"""The stages of a run in their order, and what of the time each may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of the run in a process of its own; `suites.gpu.<name>` has its `run`."""

    name: str
    share: float
    """Its part of the time, in seconds of a run of 8 minutes."""
    asks: str
    """What it answers, for people."""


STAGES = (
    Stage(name="identity", share=20, asks="which GPU, and what it can do at most"),
    Stage(name="bits", share=50, asks="whether every codec gives the bits of its reference"),
    Stage(name="numbers", share=80, asks="whether every product and gradient is as near to float64 as it must be"),
    Stage(name="solving", share=30, asks="whether GPTQ's solver is as good as the CPU's, and how fast"),
    Stage(name="tables", share=100, asks="which configurations are fastest, each checked before it is timed"),
    Stage(name="times", share=110, asks="how fast products, experts and codecs are, against the goals and others"),
    Stage(name="whole", share=90, asks="whether conversion, loading, decoding and training work, and how fast"),
)
"""A stage that ends early leaves its time to those behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a stage is told."""

    dry_run: bool
    """Whether this only proves the script: on the CPU, with tiny shapes, kernels interpreted."""
    out: Path
    """Folder of the results: a file for each stage, `<name>.json`."""
    work: Path
    """Folder for whatever is needed meanwhile."""
    until: float
    """`time.time()` at which nothing new may begin."""

    @property
    def device(self) -> str:
        """Where everything runs."""
        return "cpu" if self.dry_run else "cuda"

    @property
    def caches(self) -> Path:
        """What stands for the user's own cache: only tables that this run measured are used."""
        return self.work / "caches"


def limit(stage: Stage, left: float, following: Sequence[Stage]) -> float:
    """Return the seconds that a stage may take.

    Args:
        stage: that is to begin.
        left: seconds of the whole run.
        following: the stages behind it, which want their shares too.
    """
    return left * stage.share / (stage.share + sum(each.share for each in following))
