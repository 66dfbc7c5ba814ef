"""How long kernels take: on a GPU by CUDA graphs and events, on a CPU by turns; and what the device can do at most.

Weights must come from memory, as they do in a model. The caller therefore hands over several calls, each with a copy of
the weights, that together are several times as large as the last cache, and they are run in order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

Call = Callable[[], object]

TURN_SECONDS = 0.02
"""A turn on a CPU lasts about as long, or one call: what waking the threads costs is then lost in it."""

FEWEST = 4
"""Samples of each work, however long one takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds for one call."""

    median: float
    p20: float
    """A fifth of the samples are shorter."""
    p80: float
    """A fifth of the samples are longer."""
    samples: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """Sum up the seconds of each sample."""
        return cls(
            median=_quantile(seconds, 0.5),
            p20=_quantile(seconds, 0.2),
            p80=_quantile(seconds, 0.8),
            samples=len(seconds),
        )


@dataclass(frozen=True, slots=True)
class Graph:
    """Some calls, captured once."""

    graph: torch.cuda.CUDAGraph
    calls: int

    def seconds(self, samples: int) -> list[float]:
        """Replay the graph so many times; return the seconds of one call in each."""
        events = _events(samples)
        for start, end in events:
            start.record()
            self.graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 / self.calls for start, end in events]

    def warm_up(self, seconds: float) -> float:
        """Replay the graph for so long, at least once; return the seconds of one replay."""
        begin, replays = time.perf_counter(), 0
        while not replays or time.perf_counter() - begin < seconds:
            self.graph.replay()
            torch.cuda.synchronize()
            replays += 1
        return (time.perf_counter() - begin) / replays


def capture(calls: Sequence[Call]) -> Graph:
    """Run each call once, so that everything is compiled and tuned, then capture all of them in one CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return Graph(graph, len(calls))


def time_graph(calls: Sequence[Call], *, samples: int = 50, warm_up_seconds: float = 0.2) -> Times:
    """Time calls on the current GPU, without what it costs to launch them.

    Args:
        calls: at least 20, over copies of the weights of at least four times the L2 cache together.
        samples: replays of the graph that runs all of them.
        warm_up_seconds: of replays before these, until clocks have settled.
    """
    return time_graphs({"": capture(calls)}, samples=samples, warm_up_seconds=warm_up_seconds)[""]


def time_graphs(
    graphs: Mapping[str, Graph], *, samples: int = 50, warm_up_seconds: float = 0.2, seconds: float | None = None
) -> dict[str, Times]:
    """Time several works in turn, there and back: A B B A.

    Args:
        graphs: what `capture` made of each.
        samples: replays of each graph, half of them in each direction.
        warm_up_seconds: of replays of each graph in each direction, half of it each time.
        seconds: stop earlier, if the samples of one work would take longer than this; but not below `FEWEST`.
    """
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for names in (list(graphs), list(graphs)[::-1]):
        for name in names:
            once = graphs[name].warm_up(warm_up_seconds / 2)
            most = samples if seconds is None else int(seconds / once)
            found[name] += graphs[name].seconds(max(FEWEST, min(samples, most)) // 2)
    return {name: Times.of(runs) for name, runs in found.items()}


def time_flushed(call: Call, *, samples: int = 50, flush_bytes: int = 1 << 28) -> Times:
    """Time one call on the current GPU, its L2 cache overwritten before each; the start of a CUDA graph is included."""
    graph = capture([call])
    flush = torch.empty(flush_bytes, dtype=torch.uint8, device="cuda")
    events = _events(samples)
    for start, end in events:
        flush.zero_()
        start.record()
        graph.graph.replay()
        end.record()
    torch.cuda.synchronize()
    return Times.of([start.elapsed_time(end) / 1e3 for start, end in events])


def time_eager(call: Call, *, samples: int = 20, calls: int = 20) -> Times:
    """Time a call as Python makes it: what is seen of a small product is the cost of launching it."""
    call()
    runs = []
    for _ in range(samples):
        _synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        _synchronize()
        runs.append((time.perf_counter() - begin) / calls)
    return Times.of(runs)


def time_interleaved(
    works: Mapping[str, Sequence[Call]], *, seconds: float = 5.0, rounds: int | None = None
) -> dict[str, Times]:
    """Time several works on a CPU in turn, there and back: A B B A, so that a slow moment of the machine hits all.

    Args:
        works: the calls of each, over copies of the weights that are larger than the cache together; each turn goes on
            where the one before it stopped.
        seconds: go on for about so long, but for at least `FEWEST` rounds.
        rounds: do exactly so many rounds instead.
    """
    turns = {name: _Turns(calls) for name, calls in works.items()}
    begin, done = time.perf_counter(), 0
    while done < (FEWEST if rounds is None else rounds) or (rounds is None and time.perf_counter() - begin < seconds):
        for name in list(turns) if done % 2 == 0 else list(turns)[::-1]:
            turns[name].take()
        done += 1
    return {name: Times.of(turn.runs) for name, turn in turns.items()}


class _Turns:
    """One work's turns: each of as many calls as take `TURN_SECONDS`."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls, self.next, self.each = calls, 0, 1
        self.runs: list[float] = []
        self._run(1)  # compiles and allocates
        self.each = max(1, min(1000, int(TURN_SECONDS / self._run(1))))

    def take(self) -> None:
        """Do one turn; before a turn of several calls, one is not timed: another work's threads may still be awake."""
        if self.each > 1:
            self._run(1)
        self.runs.append(self._run(self.each))

    def _run(self, count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            self.calls[self.next]()
            self.next = (self.next + 1) % len(self.calls)
        return max(time.perf_counter() - begin, 1e-9) / count


def copy_bandwidth(device: torch.device | str, *, size: int = 1 << 30) -> float:
    """Return the bytes that copying a tensor of `size` bytes reads and writes in a second."""
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _median_seconds(lambda: target.copy_(source), source.device)


def read_bandwidth(device: torch.device | str, *, size: int = 1 << 30) -> float:
    """Return the bytes that torch reads in a second, on all threads, to sum a float32 tensor of `size` bytes.

    It is the ceiling of a product with one row on a CPU, where writing costs more than reading.
    """
    source = torch.rand(size // 4, device=device)  # zeros would all be one page of the system
    return size / _median_seconds(source.sum, source.device)


def matmul_rate(device: torch.device | str, dtype: torch.dtype = torch.bfloat16, *, size: int | None = None) -> float:
    """Return the floating point operations a second of torch's product of two square matrices of random numbers.

    Args:
        device: where.
        dtype: of the matrices; float8_e4m3fn is multiplied with one scale for each matrix, into BF16.
        size: their rows and columns; 8192 on a GPU and 1024 on a CPU if left out.
    """
    device = torch.device(device)
    side = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    if dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=device)
        product = torch.ops.aten._scaled_mm  # noqa: SLF001 - it has no public name
        seconds = _median_seconds(lambda: product(a, b.T, one, one, None, None, torch.bfloat16), device)
    else:
        seconds = _median_seconds(lambda: a @ b.T, device)
    return 2 * side**3 / seconds


def _median_seconds(call: Call, device: torch.device) -> float:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return time_graph([call] * 5, samples=10).median
    return time_interleaved({"": [call]}, rounds=7)[""].median


def _events(count: int) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
    make = cast("Callable[..., torch.cuda.Event]", torch.cuda.Event)  # its constructor has no types
    return [(make(enable_timing=True), make(enable_timing=True)) for _ in range(count)]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _quantile(values: Sequence[float], part: float) -> float:
    """Return the value below which this part of the values lies, interpolated."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
