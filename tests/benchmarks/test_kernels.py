"""The benchmark of the kernels: on tiny shapes it measures, records what fails, and judges what it finds."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from k2quant.kernels.tuning import timing
from k2quant.kernels.tuning.timing import Times
from places import ROOT

BENCHMARKS = ROOT / "benchmarks"
MODULES = {
    "cases": "suites.products.cases",
    "contestants": "suites.products.contestants",
    "goals": "suites.products.goals",
    "linear": "suites.products.linear",
    "report": "suites.products.report",
    "results": "suites.products.results",
    "run": "suites.products.run",
    "render": "suites.conversion.render",
}


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The benchmark's modules. Their folder is on the path only meanwhile: its `kernels.py` must not be importable."""
    sys.path.insert(0, str(BENCHMARKS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products on a busy machine would wait for the other threads
    try:
        found = {name: importlib.import_module(home) for name, home in MODULES.items()}
        yield SimpleNamespace(**found, driver=_driver())
    finally:
        sys.path.remove(str(BENCHMARKS))
        torch.set_num_threads(threads)


def _driver() -> ModuleType:
    """Import `benchmarks/kernels.py` by another name."""
    spec = importlib.util.spec_from_file_location("benchmark_of_kernels", BENCHMARKS / "kernels.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_timer(works: Mapping[str, Sequence[Callable[[], Any]]], _: str) -> dict[str, Times | str]:
    """Make the first and the last call of each, and say that it took 10 microseconds."""
    for calls in works.values():
        for call in (calls[0], calls[-1]):
            call()
    return {name: Times(median=1e-5, p20=0.9e-5, p80=1.1e-5, samples=1) for name in works}


def small(cell: Any) -> Any:
    """Return a cell on a tiny shape."""
    size = (16, 64, 128) if cell.section.startswith("moe") else (128, 128)
    return replace(cell, size=size, m=min(cell.m, 5))


def settings(bench: SimpleNamespace) -> Any:
    """Return settings that cost next to nothing."""
    return bench.run.Settings(device="cpu", seconds=0.0, rotate_bytes=0)


@pytest.fixture(scope="module")
def description(bench: SimpleNamespace) -> dict[str, Any]:
    """What a run says of itself, the device's rates measured on small matrices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.run.timing, "matmul_rate", partial(timing.matmul_rate, size=64))
        found: dict[str, Any] = bench.run.describe(settings(bench))
    return found | {"command": "python benchmarks/kernels.py --device cpu"}


@pytest.fixture
def results(bench: SimpleNamespace, description: dict[str, Any], tmp_path: Path) -> Any:
    """Results that nothing was added to yet."""
    found = bench.results.Results.open(tmp_path / "kernels-cpu.json", resume=False)
    found.save(**description)
    return found


class TestTiming:
    """What `k2quant.kernels.tuning.timing` returns."""

    def test_works_in_turn_get_positive_times_in_order(self) -> None:
        """A long work's median is above a short one's, and quantiles are in order."""
        works = {"short": [lambda: None], "long": [lambda: time.sleep(0.002)] * 3}
        times = timing.time_interleaved(works, rounds=3)
        assert times["short"].median < times["long"].median
        for found in times.values():
            assert 0 < found.p20 <= found.median <= found.p80
            assert found.samples == 3

    def test_works_are_run_at_least_a_few_rounds(self) -> None:
        """However little time is given, each work has some samples."""
        assert timing.time_interleaved({"": [lambda: None]}, seconds=0.0)[""].samples == timing.FEWEST

    def test_calls_take_turns_over_the_copies(self) -> None:
        """Each copy of the weights is used before one is used again."""
        used: list[int] = []

        def work(copy: int) -> None:
            used.append(copy)
            time.sleep(timing.TURN_SECONDS)

        timing.time_interleaved({"": [partial(work, copy) for copy in range(3)]}, rounds=4)
        assert used == [0, 1, 2, 0, 1, 2]

    def test_quantiles_are_interpolated(self) -> None:
        """Of five samples the median is the third; a fifth lies below the second's place."""
        found = Times.of([5.0, 1.0, 2.0, 4.0, 3.0])
        assert (found.median, found.p20, found.p80) == pytest.approx((3.0, 1.8, 4.2))

    def test_ceilings_are_positive(self) -> None:
        """Bandwidths and rates are finite and above zero."""
        rates = [timing.copy_bandwidth("cpu", size=1 << 16), timing.read_bandwidth("cpu", size=1 << 16)]
        rates.append(timing.matmul_rate("cpu", torch.float32, size=64))
        assert all(0 < rate < float("inf") for rate in rates)

    def test_eager_calls_are_timed(self) -> None:
        """Python's own cost of a call is above zero."""
        assert timing.time_eager(lambda: None, samples=2, calls=2).median > 0


class TestCases:
    """The list of what is measured."""

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_cells_have_names_of_their_own(self, bench: SimpleNamespace, device: str) -> None:
        """No two cells have one key, or a resumed run would take one for the other."""
        keys = [cell.key for cell in bench.cases.cells(device, full=True)]
        assert len(keys) == len(set(keys)) > 50

    def test_cells_with_goals_come_first(self, bench: SimpleNamespace) -> None:
        """When the time is over, the goals have been measured; a quick run measures nothing else."""
        cells = bench.cases.cells("cuda")
        quick = bench.cases.cells("cuda", quick=True)
        assert cells[: len(quick)] == quick
        assert {16384, 4096, 1} <= {cell.m for cell in quick}

    def test_weights_are_made_once_for_neighbours(self, bench: SimpleNamespace) -> None:
        """Within a priority, cells with the same weights stand together."""
        banks = [(cell.priority, cell.bank) for cell in bench.cases.cells("cuda")]
        changes = sum(one != other for one, other in pairwise(banks))
        assert changes + 1 == len(set(banks))


class TestRun:
    """Measuring, on tiny shapes."""

    def test_cpu_cells_give_results_page_and_plot(
        self, bench: SimpleNamespace, results: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every contestant is timed, with an error that BF16 explains, and page and plot are written."""
        monkeypatch.setattr(timing, "TURN_SECONDS", 1e-4)
        file = results.file
        kinds = {(cell.section, cell.m): cell for cell in reversed(bench.cases.cells("cpu"))}
        cells = [small(cell) for (_, m), cell in kinds.items() if m in {1, 4}]
        timer = bench.run.cpu_timer(settings(bench))
        bench.run.run(cells, results, settings(bench), timer, until=time.time() + 60)
        found = json.loads(file.read_text())
        assert [record["key"] for record in found["cells"]] == [cell.key for cell in cells]
        for record in found["cells"]:
            for contestant in record["contestants"].values():
                assert contestant["median_us"] > 0
                assert 0 < contestant["error"] < 0.01
            assert record["contestants"]["k2quant"]["same_bits"]
            assert record["bytes"] > 0
        bench.report.write(file)
        page = file.with_suffix(".md").read_text()
        assert "## Goals" in page
        assert "| expert gate | 4 |" in page
        assert "python benchmarks/kernels.py --device cpu" in page
        assert "<svg" in file.with_suffix(".svg").read_text()
        assert str(file.parent) not in file.read_text() + page

    def test_gpu_cells_run_on_tensors_anywhere(self, bench: SimpleNamespace, results: Any) -> None:
        """One cell of each kind of the list for GPUs runs; what needs a GPU says so, and the rest is kept."""
        kinds = {(cell.section, cell.protocol): cell for cell in reversed(bench.cases.cells("cuda"))}
        cells = [small(cell) for cell in kinds.values() if cell.section != "codecs"]
        bench.run.run(cells, results, settings(bench), fake_timer, until=time.time() + 60)
        results.save(device="cuda")
        for record in results.data["cells"]:
            assert record["contestants"]["k2quant"]["median_us"] == 10.0
            assert all("failed" in found or found["error"] < 0.05 for found in record["contestants"].values())
        bench.report.write(results.file)
        assert "## What failed" in results.file.with_suffix(".md").read_text()

    def test_codecs_are_held_to_their_references(self, bench: SimpleNamespace, results: Any) -> None:
        """A codec's error is the share of wrong bytes: none, in Triton's interpreter too."""
        pytest.importorskip("triton")
        cells = [small(cell) for cell in bench.cases.cells("cuda") if cell.section == "codecs"]
        cells = [cell for cell in cells if cell.shape in {"INT4 -> BF16", "repack INT4"}]
        bench.run.run(cells, results, settings(bench), fake_timer, until=time.time() + 60)
        assert [record["contestants"]["k2quant"].get("error") for record in results.data["cells"]] == [0.0, 0.0]

    def test_a_peer_that_raises_is_recorded(
        self, bench: SimpleNamespace, results: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The reason stands in the results, without folders of the machine, and the others are timed."""

        def broken(_: Any) -> Any:
            raise RuntimeError("no kernel image\nin /opt/somewhere/lib/peer.so")

        cases = bench.cases
        monkeypatch.setitem(bench.linear.LINEAR, cases.DENSE, broken)
        cell = small(cases.cells("cpu")[0])
        bench.run.run([cell], results, settings(bench), fake_timer, until=time.time() + 60)
        found = results.data["cells"][0]["contestants"]
        assert found[cases.DENSE] == {"failed": "RuntimeError: no kernel image in peer.so"}
        assert found[cases.OURS]["median_us"] == 10.0

    def test_what_cannot_be_captured_is_recorded(self, bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        """A contestant that waits for the GPU cannot be in a graph: it has a reason instead of a time."""

        def refuse(_: object) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(bench.run.timing, "capture", refuse)
        timer = bench.run.cuda_timer(settings(bench))
        expected = "not timed: RuntimeError: operation not permitted when stream is capturing"
        assert timer({"peer": [lambda: None]}, "rotating") == {"peer": expected}
        assert timer({"peer": [lambda: None]}, "eager")["peer"].median > 0

    def test_a_resumed_run_measures_what_is_missing(self, bench: SimpleNamespace, results: Any) -> None:
        """Cells that stand in the file are kept; a contestant that ended the process before is not tried again."""
        first, second = (small(cell) for cell in bench.cases.cells("cpu")[:2])
        bench.run.run([first], results, settings(bench), fake_timer, until=time.time() + 60)
        results.running.write_text(json.dumps([second.key, bench.cases.DENSE32]))
        assert results.blame("ended the process with -11")
        resumed = bench.results.Results.open(results.file, resume=True)
        bench.run.run([first, second], resumed, settings(bench), fake_timer, until=time.time() + 60)
        assert [record["key"] for record in resumed.data["cells"]] == [first.key, second.key]
        failed = resumed.data["cells"][1]["contestants"][bench.cases.DENSE32]
        assert failed == {"failed": "ended the process with -11"}

    def test_nothing_is_begun_when_the_time_is_over(self, bench: SimpleNamespace, results: Any) -> None:
        """What was left out is named."""
        cells = bench.cases.cells("cpu")
        bench.run.run(cells, results, settings(bench), fake_timer, until=0.0)
        assert json.loads(results.file.read_text())["left_out"] == [cell.key for cell in cells]


def record(section: str, shape: str, m: int, **microseconds: float) -> dict[str, Any]:
    """Return a made-up cell: 1 MB, 1 GFLOP."""
    names = {"ours": "k2quant", "dense": "F.linear BF16", "dense32": "F.linear float32"}
    contestants = {
        names[name]: {
            "median_us": time,
            "p20_us": time,
            "p80_us": time,
            "error": 1e-3,
            "weight_bytes": 1,
            "same_bits": True,
        }
        for name, time in microseconds.items()
    }
    routing = "uniform" if section.startswith("moe") else ""
    what = {"key": f"{section}/{shape}/{m}", "section": section, "shape": shape, "m": m, "routing": routing}
    return what | {"protocol": "rotating", "bytes": 1e6, "flops": 1e9, "contestants": contestants}


class TestGoals:
    """What is said about made-up results."""

    def verdicts(self, bench: SimpleNamespace, device: str, *cells: dict[str, Any]) -> dict[str, Any]:
        """Return the verdicts by goal and what it is about."""
        found = bench.goals.verdicts({"device": device, "cells": list(cells)})
        return {f"{item.goal} {item.what}".strip(): item for item in found}

    def test_met_missed_and_not_measured(self, bench: SimpleNamespace) -> None:
        """C1 is met at 1 ms, the ratio to the best peer is missed at 1.25, and C2 was not measured."""
        found = self.verdicts(bench, "cpu", record("int4", "expert gate", 1, ours=1000, dense=800, dense32=3000))
        c1 = found["C1 W4A16, 2048x7168, M=1"]
        assert (c1.met, c1.stretched, c1.measured) == (True, False, "1 ms")
        ratio = found["W4A16, M=1, all shapes, against the best peer"]
        assert (ratio.met, ratio.measured) == (False, "1.25 x")
        assert found["C2 W4A16, 2048x7168, M=64, against float32"].met is None

    def test_the_worst_cell_decides(self, bench: SimpleNamespace) -> None:
        """One shape of three below the bandwidth misses the goal."""
        fast, slow = 1e6 / 4.3e12 / 0.80 * 1e6, 1e6 / 4.3e12 / 0.50 * 1e6
        times = {"o": fast, "gate": fast, "down": slow}
        cells = [record("int4", shape, 1, ours=time) for shape, time in times.items()]
        g1 = self.verdicts(bench, "cuda", *cells)["G1 W4A16, big shapes, M=1"]
        assert (g1.met, g1.measured) == (False, "50 %, worst of 3")

    def test_a_failed_cell_leaves_a_goal_open(self, bench: SimpleNamespace) -> None:
        """With one of the shapes not timed, what the others reach does not meet the goal."""
        cells = [record("int4", "gate", 1, ours=0.3), record("int4", "o", 1)]
        g1 = self.verdicts(bench, "cuda", *cells)["G1 W4A16, big shapes, M=1"]
        assert (g1.met, g1.measured) == (None, "77.5 %, 1 not measured")

    def test_a_stretch_goal_is_recognised(self, bench: SimpleNamespace) -> None:
        """55 us for one token's experts is better than the stretch of 60."""
        g7 = self.verdicts(bench, "cuda", record("moe-int4", "K2", 1, ours=55))["G7 experts, W4A16, M=1"]
        assert (g7.met, g7.stretched) == (True, True)

    def test_different_bits_are_a_miss(self, bench: SimpleNamespace) -> None:
        """One cell whose bits change from run to run misses G14."""
        changing = record("int4", "gate", 1, ours=5)
        changing["contestants"]["k2quant"]["same_bits"] = False
        found = self.verdicts(bench, "cuda", changing, record("int4", "o", 1, ours=5))
        assert found["G14 same bits in every run"].met is False


class TestPages:
    """What is written, and where."""

    def test_the_page_of_all_benchmarks_links_the_kernels(
        self, bench: SimpleNamespace, results: Any, tmp_path: Path
    ) -> None:
        """It names the device and how many goals were met, and says nothing where there are no results."""
        assert not bench.render.render_kernels(tmp_path / "elsewhere")
        results.save(cells=[record("int4", "expert gate", 1, ours=1000, dense=2000, dense32=3000)])
        text = bench.render.render_kernels(tmp_path)
        assert "(results/kernels-cpu.md): 3 of 3 goals met." in text

    def test_the_command_repeats_the_run(self, bench: SimpleNamespace) -> None:
        """Options that change what is measured stand in it; the file's place does not."""
        given = bench.driver.parse(["--device", "cpu", "--only", "int4/q a", "--quick", "--out", "somewhere.json"])
        assert bench.driver.command(given) == "python benchmarks/kernels.py --device cpu --quick --only 'int4/q a'"
