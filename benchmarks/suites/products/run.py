"""Measure cells: check each contestant's numbers, then time all of them in turn, and keep what there is."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from k2quant.kernels.tuning import timing
from k2quant.kernels.tuning.timing import Call, Times
from suites.common import machine
from suites.products import cases
from suites.products.cases import Cell, Protocol
from suites.products.contestants import AnyBank, Problem, bank_for, enter, problem_for
from suites.products.inputs import Entry
from suites.products.results import Results

PACKAGES = ("torch", "triton", "numba", "numpy", "gemlite")
REPLAY_SECONDS = 0.1
"""A CUDA graph of long calls is made no longer than this; caches and launches play no part in these."""

Timer = Callable[[Mapping[str, Sequence[Call]], Protocol], dict[str, Times | str]]
"""Times each contestant's calls, or says why not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How thoroughly to measure."""

    device: str
    """cpu or cuda."""
    seconds: float
    """For each cell on a CPU, for each contestant on a GPU at most."""
    samples: int = 50
    warm_up_seconds: float = 0.2
    rotate_bytes: int = 240_000_000
    """Bytes that the copies of one contestant's weights take together, at least."""


def run(cells: Sequence[Cell], results: Results, settings: Settings, timer: Timer, *, until: float) -> None:
    """Measure the cells that are not in the results yet, until `time.time()` passes `until`."""
    results.save()
    bank: AnyBank | None = None
    made_for: object = None
    left = [cell for cell in cells if cell.key not in results.done()]
    while left and time.time() < until:
        cell = left.pop(0)
        results.running.write_text(json.dumps([cell.key, ""]))
        begin = time.perf_counter()
        if made_for != cell.bank:
            bank = None  # or the old weights would stand beside the new ones
            _forget(settings.device)
        try:
            if bank is None:
                bank, made_for = bank_for(cell, settings.device, settings.rotate_bytes), cell.bank
            record = measure(cell, problem_for(bank, cell), timer, results)
        except Exception as error:  # noqa: BLE001 - no memory for it, or no Triton: a result too
            failed = {name: {"failed": machine.reason(error)} for name in cell.contestants}
            record = cell.record() | {"contestants": failed}
            _still_there()
        print(f"{time.perf_counter() - begin:5.1f} s  {cell.key}: {_line(record)}", flush=True)
        results.data["cells"].append(record)
        results.save(left_out=[cell.key for cell in left])
    results.save(left_out=[cell.key for cell in left])
    results.running.unlink(missing_ok=True)


def measure(cell: Cell, problem: Problem, timer: Timer, results: Results) -> dict[str, Any]:
    """Check and time the contestants of a cell."""
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, Sequence[Call]] = {}
    crashed = results.data["crashed"].get(cell.key, {})
    for name in cell.contestants:
        if name in crashed:
            found[name] = {"failed": crashed[name]}
            continue
        results.running.write_text(json.dumps([cell.key, name]))
        try:
            found[name], calls[name] = _check(name, enter(problem, name))
        except Exception as error:  # noqa: BLE001 - whatever a library raises is a result
            found[name] = {"failed": machine.reason(error)}
            _still_there()
    results.running.write_text(json.dumps([cell.key, ""]))
    for name, times in timer(calls, cell.protocol).items():
        found[name] |= {"failed": times} if isinstance(times, str) else _microseconds(times)
    work = {} if "failed" in found[cell.contestants[0]] else asdict(problem.work)
    return cell.record() | work | {"contestants": found}


def _check(name: str, entry: Entry) -> tuple[dict[str, Any], Sequence[Call]]:
    begin = time.perf_counter()
    entry.calls[0]()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    record: dict[str, Any] = {"first_s": round(time.perf_counter() - begin, 4)}  # what is compiled or tuned is in it
    record |= {"error": entry.error(), "weight_bytes": entry.weight_bytes}
    if name == cases.OURS:
        record["same_bits"] = all(_equal(entry.calls[0](), entry.calls[0]()) for _ in range(3))
    return record, entry.calls


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    return all(map(_equal, one, other))


def cpu_timer(settings: Settings) -> Timer:
    """Return a timer that lets the contestants take turns."""

    def timer(works: Mapping[str, Sequence[Call]], _: Protocol) -> dict[str, Times | str]:
        return dict(timing.time_interleaved(works, seconds=settings.seconds))

    return timer


def cuda_timer(settings: Settings) -> Timer:
    """Return a timer that captures each contestant in a CUDA graph, and replays the graphs in turn."""

    def timer(works: Mapping[str, Sequence[Call]], protocol: Protocol) -> dict[str, Times | str]:
        found: dict[str, Times | str] = {}
        graphs: dict[str, timing.Graph] = {}
        for name, calls in works.items():
            try:
                if protocol == "eager":
                    found[name] = timing.time_eager(calls[0])
                elif protocol == "flushed":
                    found[name] = timing.time_flushed(calls[0], samples=settings.samples)
                else:
                    graphs[name] = timing.capture(_enough(calls))
            except Exception as error:  # noqa: BLE001 - a contestant that cannot be captured is a result
                found[name] = f"not timed: {machine.reason(error)}"
                _still_there()
        found |= timing.time_graphs(
            graphs, samples=settings.samples, warm_up_seconds=settings.warm_up_seconds, seconds=settings.seconds
        )
        for graph in graphs.values():
            graph.graph.reset()
        return found

    return timer


def _enough(calls: Sequence[Call]) -> list[Call]:
    """Return 20 calls, or one for each copy of the weights if these are more, or fewer if they take long."""
    once = timing.time_eager(calls[0], samples=3, calls=1).median
    count = max(20, len(calls))
    if count * once > REPLAY_SECONDS:
        count = max(2, min(count, int(REPLAY_SECONDS / once)))
    return [calls[number % len(calls)] for number in range(count)]


def describe(settings: Settings) -> dict[str, Any]:
    """Say where results come from, and what the device can do at most."""
    return described(settings) | {"ceilings": ceilings(settings)}


def described(settings: Settings) -> dict[str, Any]:
    """Say where results come from."""
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "device": settings.device,
        "machine": _machine(settings.device),
        "versions": _versions(),
        "commit": machine.git("rev-parse", "--short", "HEAD") or "none",
        "dirty": bool(machine.git("status", "--porcelain", "--", "k2quant", "kernels")),
        "settings": {key: value for key, value in asdict(settings).items() if key != "device"},
    }


def ceilings(settings: Settings) -> dict[str, Any]:
    """Measure the device itself: bytes and operations a second."""
    size = max(settings.rotate_bytes, 1 << 20)
    rates: dict[str, Any] = {
        "copy_bytes_per_s": timing.copy_bandwidth(settings.device, size=size),
        "read_bytes_per_s": timing.read_bandwidth(settings.device, size=size),
    }
    dtypes = [("bf16", torch.bfloat16), ("float32", torch.float32)]
    if settings.device == "cuda":
        dtypes = [("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)]
    for name, dtype in dtypes:
        try:
            rates[f"{name}_flops_per_s"] = timing.matmul_rate(settings.device, dtype)
        except RuntimeError as error:
            rates[f"{name}_failed"] = machine.reason(error)
    return rates


def rotate_bytes(device: str) -> int:
    """Return how many bytes of weights one contestant rotates over: four times the last cache, and then some."""
    if device == "cpu":
        return 112_000_000
    return max(240_000_000, 4 * torch.cuda.get_device_properties(0).L2_cache_size)


def _machine(device: str) -> dict[str, Any]:
    box: dict[str, Any] = {"cpu": machine.processor(), "cores": len(os.sched_getaffinity(0))}
    box |= {"memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "load": os.getloadavg()[0]}
    box["threads"] = torch.get_num_threads()
    box["instructions"] = torch.backends.cpu.get_cpu_capability()
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        box["gpu"] = properties.name
        box["processors"] = properties.multi_processor_count
        box["l2_bytes"] = properties.L2_cache_size
        box["nvidia_smi"] = {"asked": machine.SMI, "before": machine.graphics()}
    return box


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    return found


def _microseconds(times: Times) -> dict[str, Any]:
    rounded = {f"{name}_us": round(getattr(times, name) * 1e6, 3) for name in ("median", "p20", "p80")}
    return rounded | {"samples": times.samples}


def _line(record: dict[str, Any]) -> str:
    parts = []
    for name, found in record["contestants"].items():
        timed = "median_us" in found
        parts.append(f"{name} {found['median_us']:.1f} us" if timed else f"{name}: {found['failed'][:80]}")
    return ", ".join(parts)


def gpu_lost() -> str:
    """Return why this process can use the GPU no more, if so: an error in a kernel ends its context."""
    if torch.cuda.is_available():
        try:
            torch.zeros(1, device="cuda").add_(1)
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
            return f"the GPU takes no more work: {machine.reason(error)}"
    return ""


def _still_there() -> None:
    """Raise if an error has left the GPU unusable for this process."""
    if lost := gpu_lost():
        raise SystemExit(lost)


def _forget(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()
