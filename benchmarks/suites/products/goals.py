"""What the kernels are held to, and what a measured result says about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from suites.products import cases

H200_BYTES_PER_S = 4.3e12
"""Copy bandwidth of an H200, by which the goals for GPUs were set."""

ERROR = 1.05
"""Times the error of dequantising to BF16 and multiplying."""

CPU_RATIOS = {1: 1.10, 2: 1.10, 4: 1.10, 8: 1.10, 16: 1.10, 64: 1.25}
"""Times the best peer's time, by rows of x."""

Record = dict[str, Any]


class Verdict(NamedTuple):
    """One goal and what was measured."""

    goal: str
    what: str
    must: str
    stretch: str
    measured: str
    met: bool | None
    """None: not measured, or the contestants failed."""
    stretched: bool = False


class Cells:
    """The cells of a result, by what they are."""

    def __init__(self, results: Record) -> None:
        self.records = [record for record in results["cells"] if "section" in record]
        self.records += [_unmeasured(key) for key in results.get("left_out", [])]

    def find(
        self, section: str, shapes: Sequence[str] = (), rows: Sequence[int] = (), *, routing: str = ""
    ) -> list[Record]:
        """Return the cells of a section under the usual protocol, of these shapes and rows, or of any."""
        wanted = routing or ("uniform" if section.startswith("moe") else "")
        return [
            record
            for record in self.records
            if record["section"] == section
            and record["protocol"] == "rotating"
            and record["routing"] == wanted
            and (not shapes or record["shape"] in shapes)
            and (not rows or record["m"] in rows)
            and cases.GEMLITE not in record["contestants"]
        ]


def _unmeasured(key: str) -> Record:
    """Return a cell that had no time, from its name: a goal that wants it is not met by the others."""
    section, shape, *rest = key.split("/")
    rows = next((int(word[2:]) for word in rest if word.startswith("M=")), 0)
    routing = next((word for word in rest if word in {"uniform", "zipf"}), "")
    protocol = next((word for word in rest if word in {"rotating", "flushed", "eager"}), "rotating")
    what = {"key": key, "section": section, "shape": shape, "m": rows, "routing": routing, "protocol": protocol}
    return what | {"contestants": {cases.GEMLITE: {}} if cases.GEMLITE in rest else {}}


def microseconds(record: Record, name: str = cases.OURS) -> float | None:
    """Return a contestant's median, or nothing if it was not timed."""
    found = record["contestants"].get(name, {}).get("median_us")
    return None if found is None else float(found)


def faster(record: Record, peer: str) -> float | None:
    """Return how many times a peer's time ours goes into."""
    ours, theirs = microseconds(record), microseconds(record, peer)
    return theirs / ours if ours and theirs else None


def best_peer(record: Record) -> tuple[str, float] | None:
    """Return the fastest other contestant and its time, one that is not a part of ours."""
    names = [name for name in record["contestants"] if not name.startswith(cases.OURS)]
    times = [(time, name) for name in names if (time := microseconds(record, name))]
    return (min(times)[1], min(times)[0]) if times else None


def behind(record: Record) -> float | None:
    """Return our time over the best peer's."""
    ours, peer = microseconds(record), best_peer(record)
    return ours / peer[1] if ours and peer else None


def bandwidth(record: Record, ceiling: float = H200_BYTES_PER_S) -> float | None:
    """Return the share of the bandwidth, in percent, at which the bytes that must be moved were moved."""
    ours = microseconds(record)
    return 100 * record["bytes"] / (ours * 1e-6) / ceiling if ours else None


def teraflops(record: Record, name: str = cases.OURS) -> float | None:
    """Return 10^12 useful operations a second."""
    ours = microseconds(record, name)
    return record["flops"] / (ours * 1e-6) / 1e12 if ours else None


def error_ratio(record: Record) -> float | None:
    """Return our error over that of dequantising to BF16 and multiplying."""
    found = record["contestants"]
    plain: Record = next(
        (found[name] for name in (cases.DENSE, cases.LOOP, cases.GROUPED) if "error" in found.get(name, {})), {}
    )
    ours = found.get(cases.OURS, {})
    return ours["error"] / plain["error"] if "error" in ours and plain.get("error") else None


def verdicts(results: Record) -> Iterator[Verdict]:
    """Yield every goal for the device of a result, met, missed or not measured."""
    cells = Cells(results)
    yield from _cpu(cells) if results["device"] == "cpu" else _cuda(cells)


def _cpu(cells: Cells) -> Iterator[Verdict]:
    c1, c2 = cells.find("int4", ["expert gate"], [1]), cells.find("int4", ["expert gate"], [64])
    yield _most("C1", "W4A16, 2048x7168, M=1", 1.2, 0.62, "ms", [_milliseconds(record) for record in c1])
    against = [1 / ratio if (ratio := faster(record, cases.DENSE32)) else None for record in c2]
    yield _most("C2", "W4A16, 2048x7168, M=64, against float32", 1.25, 1.10, "x", against)
    for section, name in (("int4", "W4A16"), ("fp8", "W8A16")):
        for m, bar in CPU_RATIOS.items():
            found = cells.find(section, rows=[m])
            if found:
                what = f"{name}, M={m}, all shapes, against the best peer"
                yield _most("", what, bar, 1.0, "x", [behind(record) for record in found])
        yield _errors(cells, section, name)
    yield _errors(cells, "moe-int4", "experts, W4A16")


def _cuda(cells: Cells) -> Iterator[Verdict]:
    for m, must, stretch in ((1, 75, 85), (8, 70, 82), (16, 65, 78)):
        found = cells.find("int4", cases.BIG, [m])
        yield _least("G1", f"W4A16, big shapes, M={m}", must, stretch, "%", [bandwidth(each) for each in found])
    small = cells.find("int4", cases.SMALL, (1, 2, 4, 8, 16))
    yield _most("G2", "W4A16, q_a, q_b, kv_a, kv_b, M <= 16", 5, 3.5, "us", [microseconds(each) for each in small])
    queries = cells.find("int4", ("q_a", "q_b"), (1, 2, 4, 8, 16))
    yield _least("G2", "q_a and q_b against cuBLAS, M <= 16", 1.3, None, "x", _against(queries, cases.DENSE))
    for m, bar, hope in ((1, 2.6, 3.2), (16, 2.4, 3.0), (32, 2.2, 2.7), (64, 1.7, 2.2)):
        found = cells.find("int4", cases.BIG, [m])
        yield _least("G3", f"big shapes against cuBLAS, M={m}", bar, hope, "x", _against(found, cases.DENSE))
    for m, must, stretch in ((256, 420, 520), (4096, 560, 660)):
        found = cells.find("int4", ["gate"], [m])
        yield _least("G4", f"W4A16, 18432x7168, M={m}", must, stretch, "TFLOP/s", [teraflops(each) for each in found])
    every = cells.find("int4")
    yield _least("G4", "W4A16 against cuBLAS, every cell", 0.9, 1.0, "x", _against(every, cases.DENSE))
    yield from _gemlite(cells)
    tiled = [ratio for each in every if (ratio := faster(each, cases.GROUP_TILES))]
    what = f"W4A16 against Triton with K tiles of 32, geometric mean of {len(tiled)} cells"
    yield _least("G6", what, 1.5, 2, "x", _mean(tiled))
    yield from _experts(cells)
    yield from _fp8(cells)
    codecs = cells.find("codecs")
    left_out = (cases.SEARCH, *cases.FP4_CODECS)
    rates = [bandwidth(each) for each in codecs if each["m"] == 0 and each["shape"] not in left_out]
    yield _least("G13", "codecs and repacking, at 64 MB and more", 85, 92, "%", rates)
    ours = [each["contestants"].get(cases.OURS, {}) for each in cells.records]
    same = [found["same_bits"] for found in ours if "same_bits" in found]
    met = all(same) if same else None
    yield Verdict("G14", "same bits in every run", "all cells", "", f"{sum(same)} of {len(same)} cells", met)
    for section, name in (("int4", "W4A16"), ("fp8", "W8A16"), ("moe-int4", "experts, W4A16")):
        yield _errors(cells, section, name)


def _experts(cells: Cells) -> Iterator[Verdict]:
    for m, must, stretch in ((1, 75, 60), (8, 520, 430), (16, 950, 790), (64, 2500, 2050)):
        found = cells.find("moe-int4", ["K2"], [m])
        yield _most("G7", f"experts, W4A16, M={m}", must, stretch, "us", [microseconds(each) for each in found])
    found = cells.find("moe-int4", ["K2, TP8"], [16])
    yield _most("G8", "experts, inner width 256, M=16", 120, 95, "us", [microseconds(each) for each in found])
    for m, must, stretch in ((4096, 350, 450), (16384, 430, 550)):
        found = cells.find("moe-int4", ["K2"], [m])
        yield _least("G9", f"experts, W4A16, M={m}", must, stretch, "TFLOP/s", [teraflops(each) for each in found])


def _fp8(cells: Cells) -> Iterator[Verdict]:
    prefill = cells.find("w8a8", ["gate"], [4096])
    rates = [teraflops(each, cases.GEMM) for each in prefill]
    yield _least("G10", "W8A8, 18432x7168, M=4096, x rounded before", 900, 1050, "TFLOP/s", rates)
    for m, must, stretch in ((4096, 0.8, 1.0), (64, None, 1.5)):
        found = cells.find("w8a8", ["gate"], [m])
        pairs = [(microseconds(each, cases.SCALED), microseconds(each, cases.GEMM)) for each in found]
        ratios = [theirs / ours if ours and theirs else None for theirs, ours in pairs]
        yield _least("G10", f"the same against torch scaled_mm, M={m}", must or stretch, stretch, "x", ratios)
    found = cells.find("w8a8", ["7168x16384"], [64])
    yield _least("G11", "W8A8, 7168x16384, M=64", 65, 80, "%", [bandwidth(each) for each in found])
    for m, must, stretch in ((1, 78, 88), (16, 70, 80)):
        found = cells.find("fp8", cases.BIG, [m])
        yield _least("G12", f"W8A16, big shapes, M={m}", must, stretch, "%", [bandwidth(each) for each in found])


def _gemlite(cells: Cells) -> Iterator[Verdict]:
    ratios = [faster(record, cases.GEMLITE) for record in cells.records if cases.GEMLITE in record["contestants"]]
    known = [ratio for ratio in ratios if ratio]
    yield _least("G5", f"W4A16 against gemlite, geometric mean of {len(known)} cells", 1.5, 2, "x", _mean(known))
    yield _least("G5", "W4A16 against gemlite, every cell", 1.0, None, "x", known)


def _mean(ratios: Sequence[float]) -> list[float | None]:
    """Return the geometric mean, if there is anything."""
    return [math.exp(sum(map(math.log, ratios)) / len(ratios))] if ratios else []


def _errors(cells: Cells, section: str, name: str) -> Verdict:
    ratios = [error_ratio(record) for record in cells.find(section)]
    return _most("", f"{name}: error over that of BF16 weights", ERROR, 1.0, "x", ratios)


def _against(records: Sequence[Record], peer: str) -> list[float | None]:
    return [faster(record, peer) for record in records]


def _milliseconds(record: Record) -> float | None:
    found = microseconds(record)
    return None if found is None else found / 1e3


def _most(
    goal: str, what: str, must: float, stretch: float | None, unit: str, values: Sequence[float | None]
) -> Verdict:
    return _judge(goal, what, (must, stretch), unit, values, worst=max, passes=lambda value, bar: value <= bar)


def _least(
    goal: str, what: str, must: float, stretch: float | None, unit: str, values: Sequence[float | None]
) -> Verdict:
    return _judge(goal, what, (must, stretch), unit, values, worst=min, passes=lambda value, bar: value >= bar)


def _judge(
    goal: str,
    what: str,
    bars: tuple[float, float | None],
    unit: str,
    values: Sequence[float | None],
    *,
    worst: Callable[[list[float]], float],
    passes: Callable[[float, float], bool],
) -> Verdict:
    """Hold the worst of the values to the bars; with a value missing, only a miss is certain."""
    sign = "<= " if passes(0, 1) else ">= "
    must, stretch = (None if bar is None else f"{sign}{bar:g} {unit}" for bar in bars)
    known = [value for value in values if value is not None]
    if not known:
        return Verdict(goal, what, must or "", stretch or "", "", None)
    found = worst(known)
    met: bool | None = passes(found, bars[0])
    measured = f"{found:.3g} {unit}" + (f", worst of {len(known)}" if len(known) > 1 else "")
    if met and len(known) < len(values):
        met, measured = None, f"{measured}, {len(values) - len(known)} not measured"
    stretched = bool(met) and bars[1] is not None and passes(found, bars[1])
    return Verdict(goal, what, must or "", stretch or "", measured, met, stretched)
