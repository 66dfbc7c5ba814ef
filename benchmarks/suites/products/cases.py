"""What `kernels.py` measures: products, shapes, numbers of rows, and against whom; the most important cells first."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Section = Literal["int4", "fp8", "w8a8", "nvfp4", "mxfp4", "moe-int4", "moe-fp8", "codecs"]
Protocol = Literal["rotating", "flushed", "eager"]

OURS = "k2quant"
GEMM = "k2quant, GEMM only"
DENSE = "F.linear BF16"
DENSE32 = "F.linear float32"
DEQUANTIZED = "dequantise + F.linear"
INT4PACK = "torch int4pack"
SCALED = "torch scaled_mm"
GEMLITE = "gemlite"
GROUP_TILES = "Triton, K tiles of 32"
GROUPED = "torch grouped_mm BF16"
LOOP = "loop over BF16 experts"

TOP = 8
"""Experts of a token."""

SHAPES = {
    "q_a": (1536, 7168),
    "q_b": (12288, 1536),
    "kv_a": (576, 7168),
    "kv_b": (16384, 512),
    "o": (7168, 8192),
    "gate": (18432, 7168),
    "gate+up": (36864, 7168),
    "down": (7168, 18432),
    "expert gate": (2048, 7168),
    "expert gate+up": (4096, 7168),
    "expert down": (7168, 2048),
    "7168x16384": (7168, 16384),
}
"""N and K: rows and columns of the weight. All but the last are Kimi K2's; that one is DeepGEMM's."""

BIG, SMALL = ("o", "gate", "down"), ("q_a", "q_b", "kv_a", "kv_b")
EXPERTS = {"K2": (384, 2048, 7168), "K2, TP8": (384, 256, 7168), "K2, 16 experts": (16, 2048, 7168)}
"""Experts, inner width and hidden width of a layer."""

CODEC_SHAPE = (18432, 7168)
"""132 M weights: more than 64 MB in every format."""

POWERS = tuple(1 << power for power in range(15))
"""Rows of x: 1 to 16384."""

ODD = (3, 17, 33, 129)
CPU_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One product and all who make it."""

    section: Section
    shape: str
    """Its name in `SHAPES` or `EXPERTS`; a codec's own name."""
    size: tuple[int, ...]
    """`(N, K)`, or `(E, I, H)` for a layer of experts."""
    m: int
    """Rows of x, or tokens."""
    contestants: tuple[str, ...]
    routing: str = ""
    """How tokens are spread over experts: `uniform`, or `zipf`: an expert's share is 1 over its rank."""
    protocol: Protocol = "rotating"
    priority: int = 0
    """Cells with smaller numbers are measured first."""

    @property
    def key(self) -> str:
        """Name the cell."""
        against = GEMLITE if GEMLITE in self.contestants else ""
        return "/".join(filter(None, (self.section, self.shape, f"M={self.m}", self.routing, self.protocol, against)))

    @property
    def bank(self) -> tuple[str, tuple[int, ...]]:
        """Name the weights, which cells share."""
        return self.section, self.size

    def record(self) -> dict[str, Any]:
        """Describe it for JSON."""
        described = {"section": self.section, "shape": self.shape, "size": list(self.size), "m": self.m}
        return {"key": self.key, **described, "routing": self.routing, "protocol": self.protocol}


PEERS: dict[tuple[str, str], tuple[str, ...]] = {
    ("int4", "cpu"): (DENSE, DENSE32, INT4PACK),
    ("fp8", "cpu"): (DENSE, DENSE32),
    ("moe-int4", "cpu"): (LOOP,),
    ("int4", "cuda"): (DENSE, DEQUANTIZED, INT4PACK),
    ("fp8", "cuda"): (DENSE, DEQUANTIZED),
    ("w8a8", "cuda"): (GEMM, DENSE, SCALED),
    ("nvfp4", "cuda"): (DENSE, DEQUANTIZED),
    ("mxfp4", "cuda"): (DENSE, DEQUANTIZED),
    ("moe-int4", "cuda"): (GROUPED,),
    ("moe-fp8", "cuda"): (GROUPED,),
}
"""Who meets k2quant in each section, on each device."""

SEARCH = "INT4 scales, searched"
"""A codec that tries each weight at 16 scales: it is no copy of memory, and G13 does not ask the speed of one."""

FP4_CODECS = ("NVFP4 -> BF16", "MXFP4 -> BF16", "BF16 -> NVFP4", "BF16 -> MXFP4")
"""Codecs for whose speed no goal is set."""

CODECS = (
    "INT4 -> BF16",
    "FP8 -> BF16",
    "BF16 -> INT4, no recovery",
    "BF16 -> INT4",
    "BF16 -> FP8, no recovery",
    "BF16 -> FP8",
    "activations -> FP8 1x128",
    "repack INT4",
    SEARCH,
    *FP4_CODECS,
)


def cells(device: str, *, quick: bool = False, full: bool = False) -> list[Cell]:
    """Return the cells of a device, in the order in which they are measured.

    Args:
        device: cpu or cuda.
        quick: only those that goals are set for, of these only some on a CPU, and a few of FP4.
        full: odd numbers of rows too.
    """
    found = list(_cpu(quick=quick) if device == "cpu" else _cuda(full=full))
    unique: dict[str, Cell] = {}
    for cell in sorted(found, key=lambda cell: cell.priority):
        unique.setdefault(cell.key, cell)
    kept = [cell for cell in unique.values() if not quick or cell.priority == 0]
    # Cells with the same weights stand together, so that these are made once.
    first = {cell.bank: place for place, cell in reversed(list(enumerate(kept)))}
    return sorted(kept, key=lambda cell: (cell.priority, first[cell.bank]))


def _cell(device: str, section: Section, shape: str, m: int, **more: Any) -> Cell:
    size = EXPERTS[shape] if section.startswith("moe") else SHAPES[shape]
    peers = PEERS[section, device]
    routing = "uniform" if section.startswith("moe") else ""
    cell = Cell(section=section, shape=shape, size=size, m=m, contestants=(OURS, *peers), routing=routing)
    return replace(cell, **more)


def _cpu(*, quick: bool) -> Iterator[Cell]:
    rows = (1, 16, 64) if quick else CPU_ROWS
    sections: Sequence[Section] = ("int4", "fp8")
    for section in sections:
        for shape in ("expert gate", "expert down", "q_a"):
            for m in rows:
                yield _cell("cpu", section, shape, m)
    for m in (1,) if quick else (1, 4, 16):
        yield _cell("cpu", "moe-int4", "K2, 16 experts", m)


def _cuda(*, full: bool) -> Iterator[Cell]:
    yield from _goals()
    yield from _rest(full=full)
    for shape in BIG:
        for m in (1, 16):
            yield _cell("cuda", "int4", shape, m, protocol="flushed", priority=3)
    installed = importlib.util.find_spec("gemlite") is not None
    for shape in SHAPES if installed else ("gate",):  # one cell says that it is not installed
        for m in (1, 16, 256, 4096) if installed else (1,):
            yield _cell("cuda", "int4", shape, m, contestants=(OURS, GEMLITE), priority=4)


GOALS: tuple[tuple[Section, Sequence[str], Sequence[int]], ...] = (
    ("int4", BIG, (1, 8, 16, 32, 64)),
    ("int4", ("gate",), (256, 4096)),
    ("int4", SMALL, (1, 16)),
    ("moe-int4", ("K2",), (1, 8, 16, 64, 4096, 16384)),
    ("moe-int4", ("K2, TP8",), (16,)),
    ("w8a8", ("gate",), (4096, 64)),
    ("w8a8", ("7168x16384",), (64,)),
    ("fp8", BIG, (1, 16)),
)
"""Sections, shapes and rows that goals are set for."""


def _goals() -> Iterator[Cell]:
    """Yield the cells that goals are set for, and a few of FP4, for which there is none."""
    for section, shapes, rows in GOALS:
        for shape in shapes:
            for m in rows:
                cell = _cell("cuda", section, shape, m)
                tiled = section == "int4" and shape in BIG
                yield replace(cell, contestants=(*cell.contestants, GROUP_TILES)) if tiled else cell
    fp4: Sequence[Section] = ("nvfp4", "mxfp4")
    for section in fp4:
        for m in (1, 16, 256):
            yield _cell("cuda", section, "gate", m)
    for name in CODECS:
        yield Cell(section="codecs", shape=name, size=CODEC_SHAPE, m=0, contestants=(OURS,))
    eager: Sequence[Section] = ("int4", "fp8", "w8a8")
    for section in eager:
        yield _cell("cuda", section, "q_a", 1, contestants=(OURS, DENSE), protocol="eager")


def _rest(*, full: bool) -> Iterator[Cell]:
    """Yield what completes the tables and plots."""
    for routing in ("uniform", "zipf"):
        for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096):
            yield _cell("cuda", "moe-int4", "K2", m, routing=routing, priority=1)
    for m in (1, 4, 16, 64, 256, 4096):
        yield _cell("cuda", "moe-fp8", "K2", m, priority=2)
        yield _cell("cuda", "moe-int4", "K2, TP8", m, priority=2)
    sections: Sequence[Section] = ("int4", "w8a8", "fp8")
    for section in sections:
        for shape in SHAPES:
            for m in POWERS + (ODD if full else ()):
                first = shape in {"gate", "o", "expert gate+up"} and m not in ODD
                yield _cell("cuda", section, shape, m, priority=1 if first and section == "int4" else 2 if first else 3)
