"""The run for the day a GPU is there: proved without one, on a bare machine, killed in the middle, and in its parts."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from k2quant.kernels.codecs.reference.seam import torch_codecs
from k2quant.kernels.codecs.values import ValueAt
from k2quant.kernels.products import dispatch
from k2quant.kernels.products.tables.configs import TABLES, read_table
from k2quant.kernels.tuning.candidates import Cell
from k2quant.kernels.tuning.choosing import Trial
from places import ROOT

BENCHMARKS = ROOT / "benchmarks"
SCRIPT = BENCHMARKS / "gpu.py"
STAGES = ["identity", "bits", "numbers", "solving", "tables", "times", "whole"]
MISSING = ("compressed_tensors", "lm_eval", "datasets", "k2quant")
"""What the bare machine does not have installed."""
SM_90 = read_table(TABLES / "sm_90.json")
PATIENCE = 900.0
"""Seconds after which a run counts as hung, on however busy a machine."""


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The parts of the benchmark, with their folder on the path meanwhile."""
    sys.path.insert(0, str(BENCHMARKS))
    names = [
        "bit_cases",
        "bits",
        "number_cases",
        "numbers",
        "page",
        "tables",
        "times",
        "whole",
        "running.ahead",
        "running.record",
        "running.stages",
        "running.supervise",
    ]
    try:
        yield SimpleNamespace(
            cases=importlib.import_module("suites.products.cases"),
            **{name.rpartition(".")[2]: importlib.import_module(f"suites.gpu.{name}") for name in names},
        )
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with this environment's packages, but for some; k2quant is not installed there."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True, with_pip=False)
    target = next((folder / "lib").glob("python*")) / "site-packages"
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        name = path.name.lower().removeprefix("__editable___")
        if not (name.startswith(MISSING) or name.endswith(".pth") or (target / path.name).exists()):
            (target / path.name).symlink_to(path)
    return folder / "bin" / "python"


def start(python: Path, home: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a dry run that leaves everything in a folder."""
    variables = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "TRITON_INTERPRET"}}
    return subprocess.Popen(
        [
            python,
            SCRIPT,
            "--dry-run",
            "--out",
            home / "gpu-dry",
            "--work",
            home / "work",
            "--commit",
            "abc",
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=variables,
        cwd=home,
    )


def kept(home: Path) -> dict[str, dict[str, Any]]:
    """Return what the stages left, by stage; each file must be whole."""
    return {
        path.stem: json.loads(path.read_text()) for path in (home / "gpu-dry").glob("*.json") if path.stem in STAGES
    }


def test_a_dry_run_on_a_bare_machine_passes_every_stage(bare: Path, tmp_path: Path) -> None:
    """Without compressed-tensors, lm-eval and an installed k2quant, every stage comes to its end and finds no fault."""
    probe = "import importlib.util as u, sys; print([name for name in sys.argv[1:] if u.find_spec(name)])"
    found = subprocess.run([bare, "-c", probe, *MISSING], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert found.stdout.strip() == "[]"
    run = start(bare, tmp_path, "--minutes", f"{PATIENCE / 60:g}")
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, output
    stages = kept(tmp_path)
    assert {name: each["done"] for name, each in stages.items()} == dict.fromkeys(STAGES, True), output
    outcomes = {f"{name}: {entry['what']}": entry for name, each in stages.items() for entry in each["entries"]}
    bad = [f"{what}: {entry['said']}" for what, entry in outcomes.items() if entry["outcome"] in {"missed", "failed"}]
    assert bad == []
    left = {what.partition(",")[2] for what, entry in outcomes.items() if entry["outcome"] == "left out"}
    assert {each.rpartition(", ")[2].strip() for each in left} == {"CUDA graph", "one process"}
    assert sum(entry["outcome"] == "passed" for entry in outcomes.values()) > 40
    timed = stages["times"]["results"]["cells"]
    assert {cell["section"] for cell in timed} == {"int4", "fp8", "w8a8", "nvfp4", "mxfp4", "moe-int4", "codecs"}
    assert all("median_us" in cell["contestants"]["k2quant"] for cell in timed)
    page = (tmp_path / "gpu-dry.md").read_text()
    assert "A dry run: it proves that the script works. Nothing here was measured on a GPU." in page
    assert "commit `abc`" in page
    for title in ("What was missed", "What ran", "Bits", "Numbers", "Solving", "Tables", "Times", "Whole"):
        assert f"\n## {title}\n" in page
    assert "compressed_tensors" not in page
    assert not list((tmp_path / "work").iterdir())


def test_a_killed_dry_run_leaves_whole_files(tmp_path: Path) -> None:
    """Killed while it is at work, it leaves every file whole, all that was done, and no process behind."""
    run = start(Path(sys.executable), tmp_path)
    until = time.time() + PATIENCE
    while len(kept(tmp_path).get("bits", {"entries": []})["entries"]) < 3:
        assert time.time() < until
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    run.kill()
    run.wait()
    until = time.time() + 60
    while alive(str(tmp_path)) and time.time() < until:
        time.sleep(0.1)
    assert not alive(str(tmp_path))
    stages = kept(tmp_path)
    assert stages["identity"]["done"]
    assert not stages["bits"]["done"]
    assert len(stages["bits"]["entries"]) >= 3
    assert all(entry["outcome"] == "passed" for entry in stages["bits"]["entries"])
    drawn = subprocess.run(
        [sys.executable, SCRIPT, "--render", "--out", tmp_path / "gpu-dry"], capture_output=True, text=True, check=True
    )
    assert drawn.stdout.strip() == str(tmp_path / "gpu-dry.md")
    page = (tmp_path / "gpu-dry.md").read_text()
    assert "| did not end" in page
    assert "| did not run |" in page


def alive(words: str) -> bool:
    """Return whether there is a process with these words in its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if words.encode() in path.read_bytes():
                return True
    return False


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    """Where there is no GPU nothing is written, and the dry run is named."""
    if torch.cuda.is_available():
        pytest.skip("says what happens where there is no GPU")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path / "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no GPU is here; --dry-run proves the script without one" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stages", "bits,bytes"], "unknown stage `bytes`"),
        (["--minutes", "0"], "expected a number above 0"),
        (["--minutes", "nan"], "expected a number above 0"),
        (["--name", "../x"], "expected letters"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], said: str) -> None:
    """They are named, with what is expected."""
    command = [sys.executable, str(SCRIPT), "--dry-run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr


class TestRecord:
    """What a stage keeps."""

    def test_an_error_is_an_entry_and_the_next_step_runs(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        """A step that fails does not stop those behind it; its folders are not told."""
        record = bench.record.Record(tmp_path / "bits.json", until=time.time() + 60)

        def fail() -> dict[str, Any]:
            raise RuntimeError("no /home/somebody/kernel.so")

        record.attempt("one", fail)
        record.attempt("two", lambda: {"outcome": "passed"})
        record.finish()
        data = json.loads((tmp_path / "bits.json").read_text())
        assert [(entry["what"], entry["outcome"]) for entry in data["entries"]] == [
            ("one", "failed"),
            ("two", "passed"),
        ]
        assert data["entries"][0]["said"] == "RuntimeError: no kernel.so"
        assert data["done"]

    def test_a_gpu_that_is_lost_ends_the_process(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        """The failure is kept before the process ends."""
        record = bench.record.Record(tmp_path / "bits.json", until=time.time() + 60)
        with pytest.raises(SystemExit, match="lost"):
            record.attempt("one", lambda: 1 / 0, fatal=lambda: "lost")
        assert [entry["outcome"] for entry in bench.record.read(tmp_path / "bits.json")["entries"]] == ["failed"]

    def test_a_later_process_goes_on_behind_the_step_that_ended_one(
        self, bench: SimpleNamespace, tmp_path: Path
    ) -> None:
        """What was done stays, what the process was at is a failure, and only the rest is done."""
        file = tmp_path / "bits.json"
        first = bench.record.Record(file, until=time.time() + 60)
        first.attempt("one", lambda: {"outcome": "passed"})
        with pytest.raises(KeyboardInterrupt):
            first.attempt("two", interrupt)
        tried: list[str] = []
        second = bench.record.Record(file, until=time.time() + 60, resume=True)

        def work() -> dict[str, Any]:
            tried.append(second.data["running"])
            return {"outcome": "passed"}

        for what in ("one", "two", "three"):
            second.attempt(what, work)
        assert tried == ["three"]
        assert [entry["outcome"] for entry in second.data["entries"]] == ["passed", "failed", "passed"]

    def test_nothing_is_begun_when_the_time_is_over(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        """What was left out is named."""
        record = bench.record.Record(tmp_path / "bits.json", until=0.0)
        record.attempt("one", interrupt)
        assert record.data["entries"] == [{"what": "one", "outcome": "left out", "said": "the time was over"}]


def interrupt() -> dict[str, Any]:
    """End as a process ends that is killed."""
    raise KeyboardInterrupt


class TestSupervise:
    """How stages get their processes and their time."""

    def run(
        self, bench: SimpleNamespace, out: Path, codes: dict[str, str], seconds: float
    ) -> dict[str, dict[str, Any]]:
        """Run made-up stages, each a piece of Python; return what they left."""
        stages = [bench.stages.Stage(name=name, share=1.0, asks="") for name in codes]

        def command(stage: Any, until: float, resume: bool) -> list[str]:  # noqa: FBT001 - as it is called
            head = f"import json, sys, time; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
            head += "from pathlib import Path\nfrom suites.gpu.running.record import Record\n"
            file = out / f"{stage.name}.json"
            head += f"record = Record(Path({str(file)!r}), until={until}, resume={resume})\n"
            return [sys.executable, "-c", head + codes[stage.name]]

        bench.supervise.run(stages, out, command, seconds=seconds, after=lambda: None)
        return {name: bench.record.read(out / f"{name}.json") for name in codes}

    def test_a_stage_that_hangs_is_stopped_and_the_next_one_runs(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        """It keeps what it had, says so, and what it started ends with it."""
        hang = "record.attempt('one', lambda: {'outcome': 'passed'})\nimport subprocess\n"
        hang += f"subprocess.run(['sleep', '{4000 + os.getpid() % 1000}'])\n"
        fine = "record.attempt('one', lambda: {'outcome': 'passed'}); record.finish()\n"
        found = self.run(bench, tmp_path, {"hangs": hang, "works": fine}, 12.0)
        assert found["hangs"]["ended"] == "stopped: its time was over"
        assert [entry["outcome"] for entry in found["hangs"]["entries"]] == ["passed"]
        assert found["works"]["done"]
        assert "ended" not in found["works"]
        assert not alive(f"sleep\0{4000 + os.getpid() % 1000}")

    def test_a_stage_that_crashes_goes_on_behind_it(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        """A process that is gone costs one step; the stage is then whole."""
        code = "import os, signal\n"
        code += "record.attempt('one', lambda: {'outcome': 'passed'})\n"
        code += "record.attempt('two', lambda: os.kill(os.getpid(), signal.SIGSEGV))\n"
        code += "record.attempt('three', lambda: {'outcome': 'passed'})\nrecord.finish()\n"
        found = self.run(bench, tmp_path, {"crashes": code}, 60.0)["crashes"]
        assert [entry["outcome"] for entry in found["entries"]] == ["passed", "failed", "passed"]
        assert found["done"]

    def test_a_stage_that_never_works_is_given_up(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        """After a few processes its status is noted."""
        found = self.run(bench, tmp_path, {"broken": "sys.exit(7)\n"}, 60.0)["broken"]
        assert found["ended"] == "its process ended with 7"

    def test_time_that_is_left_goes_to_those_behind(self, bench: SimpleNamespace) -> None:
        """Each stage gets its share of what is left, the last all of it, and none more than there is."""
        stages = bench.stages.STAGES
        left = 480.0
        for place, stage in enumerate(stages):
            assert bench.stages.limit(stage, left, stages[place + 1 :]) == pytest.approx(stage.share)
            left -= stage.share
        assert bench.stages.limit(stages[-1], 33.0, []) == 33.0


class TestBits:
    """How arrays are compared."""

    def test_the_first_element_that_differs_is_named_with_both_values(self, bench: SimpleNamespace) -> None:
        """Its place, what was expected and what was found, and how many differ."""
        truth = np.zeros((3, 4), np.uint16)
        ours = truth.copy()
        ours[1, 2], ours[2, 0] = 0x3F80, 7
        said = bench.bits.differences({"codes": ours}, {"codes": truth})
        assert said == ["codes[1, 2]: expected 0x0, found 0x3f80; 2 differ"]

    def test_bits_count_not_values(self, bench: SimpleNamespace) -> None:
        """-0 is not 0, and NaN equals itself."""
        zero, minus = np.zeros(1, np.float32), -np.zeros(1, np.float32)
        assert bench.bits.differences({"scale": minus}, {"scale": zero}) == [
            "scale[0]: expected 0.0, found -0.0; 1 differ"
        ]
        nan = np.full(1, np.nan, np.float32)
        assert bench.bits.differences({"scale": nan}, {"scale": nan.copy()}) == []

    def test_a_refusal_is_held_to_the_same_sentence(self, bench: SimpleNamespace) -> None:
        """Another sentence, or none, differs."""
        one, other = ({"refused": np.frombuffer(text, np.uint8)} for text in (b"NaN at 1", b"NaN at 2"))
        (said,) = bench.bits.differences(one, other)
        assert said == "expected the refusal `NaN at 2`, found the refusal `NaN at 1`"
        assert bench.bits.differences({"1: refused": one["refused"]}, {"1: codes": np.zeros(1)}) == [
            "1: codes: missing"
        ]
        assert bench.bits.differences({"codes": np.zeros(1)}, other) == [
            "expected the refusal `NaN at 2`, found a result"
        ]

    def test_every_bf16_value_is_encoded(self, bench: SimpleNamespace) -> None:
        """All 65,536 go to FP8 and to INT4: ordinary ones in large arrays, those that may be refused one by one."""
        taken: dict[str, set[int]] = {"fp8": set(), "int4": set()}

        def taker(name: str) -> Any:
            def encode(weights: Any, *_: Any, **__: Any) -> Any:
                taken[name] |= set(np.unique(weights).tolist())
                raise ValueAt(row=0, column=0, what="refused")

            return SimpleNamespace(encode=encode, decode=lambda *_: None, search=encode)

        codecs = SimpleNamespace(fp8=taker("fp8"), int4=taker("int4"))
        made = bench.bit_cases.Bench(codecs, torch_codecs("cpu"), torch.device("cpu"))
        ordinary = bench.bit_cases.weights(made)["every BF16 number"]
        cases = bench.bit_cases._encoding(made, "all", ordinary, ((128, 128),))  # noqa: SLF001
        for case in [*cases, *bench.bit_cases._extremes(made)]:  # noqa: SLF001
            case.ours()
        assert {name: len(values) for name, values in taken.items()} == {"fp8": 65536, "int4": 65536}

    def test_a_refused_array_hides_no_other(self, bench: SimpleNamespace) -> None:
        """What is done one by one keeps the results of those that are not refused."""

        def job(bits: Any, _: Any) -> dict[str, Any]:
            if bits[0]:
                raise ValueAt(row=0, column=0, what="refused")
            return {"codes": bits}

        found = bench.bit_cases.one_by_one(job, [np.ones(1), np.zeros(1)], None)
        assert found.keys() == {"0: refused", "1: codes"}


class Fake:
    """A product that is whatever a test says."""

    name, small = "fake", False
    inputs: tuple[Any, ...] = ()

    def __init__(self, result: Callable[[], torch.Tensor], *, unrounded: bool = False) -> None:
        self.result, self.unrounded = result, unrounded

    def bound(self) -> None:
        """Have no weights."""

    def results(self) -> dict[str, torch.Tensor]:
        """Return its result."""
        return {"y": self.result()}

    def exact(self) -> dict[str, torch.Tensor]:
        """Return ones."""
        return {"y": torch.ones(8, dtype=torch.float64)}

    def usual(self) -> dict[str, torch.Tensor]:
        """Return something that is off by 1%."""
        return {"y": torch.full((8,), 1.01)}


class TestNumbers:
    """How products are judged."""

    def test_what_is_near_enough_passes(self, bench: SimpleNamespace) -> None:
        """As far off as plain torch is near enough, 6% farther is not, and NaN is not."""
        assert bench.numbers.check(Fake(lambda: torch.full((8,), 0.99)), 2)["outcome"] == "passed"
        for wrong in (1.0106, float("nan")):
            found = bench.numbers.check(Fake(partial(torch.full, (8,), wrong)), 2)
            assert found["outcome"] == "missed"
            assert "allowed 1.05e-02" in found["said"]

    def test_few_numbers_may_differ_by_chance(self, bench: SimpleNamespace) -> None:
        """Where weights are not rounded, the errors of eight numbers may be twice those of plain torch, no more."""
        assert bench.numbers.check(Fake(partial(torch.full, (8,), 1.021), unrounded=True), 2)["outcome"] == "passed"
        assert bench.numbers.check(Fake(partial(torch.full, (8,), 1.022), unrounded=True), 2)["outcome"] == "missed"

    def test_an_element_that_is_not_written_is_noticed(self, bench: SimpleNamespace) -> None:
        """Uninitialised memory is NaN meanwhile, and is not afterwards."""

        def forgets() -> torch.Tensor:
            out = torch.empty(8)
            out[:7] = 1.0
            return out

        found = bench.numbers.check(Fake(forgets), 2)
        assert found["outcome"] == "missed"
        assert "y is off by nan" in found["said"]
        assert not torch.are_deterministic_algorithms_enabled()

    def test_other_bits_in_another_run_are_noticed(self, bench: SimpleNamespace) -> None:
        """A result that moves, however little, is missed."""
        values = iter([1.0, 1.0, 1.0 + 2.0**-20])
        found = bench.numbers.check(Fake(lambda: torch.full((8,), next(values))), 3)
        assert (found["outcome"], found["said"]) == ("missed", "3 runs gave different bits")

    def test_inputs_lie_in_nan(self, bench: SimpleNamespace) -> None:
        """A copy's neighbours on both sides are NaN, its own values are kept, and it is aligned."""
        inside = bench.number_cases.surrounded(torch.arange(6.0).view(2, 3))
        assert torch.equal(inside, torch.arange(6.0).view(2, 3))
        assert inside.is_contiguous()
        assert inside.data_ptr() % 16 == 0
        around = torch.as_strided(inside, (8,), (1,), inside.storage_offset() - 1)
        assert around[[0, 7]].isnan().all()


def test_the_most_important_cells_are_tuned_first(bench: SimpleNamespace) -> None:
    """Decoding by INT4's experts first, at each M of the goals; all of K2's weights are there, FP8 last."""
    cells = list(bench.tables.cells())
    assert cells[:2] == [Cell("gate_up", "int4", (2048, 7168), 1), Cell("down", "int4", (7168, 2048), 1)]
    assert {cell.rows for cell in cells} == {1, 8, 16, 64, 256, 4096}
    formats = [cell.weight_format for cell in cells]
    assert formats == sorted(formats, key=["int4", "fp8"].index)
    dense = {cell.shape for cell in cells if cell.product == "linear" and cell.weight_format == "int4"}
    assert len(dense) == 7
    assert len(set(cells)) == len(cells)


KEYS = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from k2quant.kernels.products.tables.configs import TABLES, read_table
from k2quant.kernels.tuning.compiling import rehearse, rehearse_codecs, source_of

table, backend = read_table(TABLES / "sm_90.json"), make_backend(GPUTarget("cuda", 90, 32))
launches = rehearse_codecs(90)
CASES = (
    ("linear", "int4", (576, 7168)),
    ("w8a8", "fp8", (576, 7168)),
    ("down", "int4", (7168, 2048)),
)
for product, form, shape in CASES:
    launches += rehearse(product, form, shape, table.choose(product, form, shape, 1))
for launch in launches:
    kernel, options = launch.kernel, {"num_warps": launch.warps, "num_stages": launch.stages}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    given = {**launch.constants, **options}
    bound, specialization, rest = binder(*launch.arguments.values(), **given)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    same = ASTSource(kernel, signature, constants, attributes).hash() == source_of(launch).hash()
    print(kernel.__name__, "" if same else "other key")
"""
"""Compares keys where kernels are not interpreted."""


class TestAhead:
    """What is compiled on many cores before it counts."""

    def test_what_will_be_launched_is_compiled(
        self, bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Triton's cache holds the job's kernels afterwards; a job that cannot be compiled costs nothing."""
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        config = SM_90.choose("linear", "int4", (576, 7168), 1)
        wrong = replace(config, columns=1 << 20)
        jobs = [bench.ahead.Job("linear", "int4", (576, 7168), each) for each in (wrong, config)]
        bench.ahead.compile_products(jobs, (9, 0))
        assert any(path.name.startswith("_") for path in tmp_path.rglob("*.cubin"))

    def test_the_launcher_finds_what_was_compiled_ahead(self, tmp_path: Path) -> None:
        """The key under which a kernel was compiled ahead is the one that Triton's launcher looks for."""
        pytest.importorskip("triton")
        script = tmp_path / "keys.py"
        script.write_text(KEYS)
        variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, env=variables)
        assert done.returncode == 0, done.stderr
        assert "_linear" in done.stdout
        assert "other key" not in done.stdout

    def test_every_cell_of_the_goals_is_compiled_ahead(
        self, bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Products of all sections, and both of a layer with equal blocks of rows, as they are launched."""
        monkeypatch.setattr(dispatch, "table_of", lambda _: SM_90)
        jobs = bench.times.jobs(bench.cases.cells("cuda", quick=True))
        assert {job.product for job in jobs} == {"linear", "w8a8", "gate_up", "down"}
        assert bench.ahead.Job("w8a8", "fp8", (7168, 16384), SM_90.choose("w8a8", "fp8", (7168, 16384), 64)) in jobs
        for job in (job for job in jobs if job.product == "down"):
            (partner,) = (
                each
                for each in jobs
                if each.product == "gate_up" and (each.shape[::-1], each.tokens) == (job.shape, job.tokens)
            )
            assert job.config.rows == partner.config.rows

    def test_numbers_are_compiled_with_their_gradients(
        self, bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every number of rows has its configuration among the jobs; layers of experts are differentiated."""
        monkeypatch.setattr(dispatch, "table_of", lambda _: SM_90)
        sizes = bench.number_cases.Sizes()
        jobs = bench.numbers.jobs(sizes)
        for rows in sizes.rows:
            config = SM_90.choose("linear", "fp8", (576, 7168), rows)
            assert bench.ahead.Job("linear", "fp8", (576, 7168), config) in jobs
        assert all(job.backward for job in jobs if job.tokens)


class TestJudges:
    """A fault that is planted is found, by each judge."""

    def test_a_layer(self, bench: SimpleNamespace) -> None:
        """Experts that are off, or NaN, and kernels that are compiled late are missed; else it passes."""
        facts = {"difference": 0.01, "compiled_after": [], "tokens_per_s": {1: 2.0}, "bytes": 1, "load_s": 1.0}
        facts |= {"warmup_s": 1.0, "compiled_by_warmup": 3}
        assert bench.whole.judge(facts)["outcome"] == "passed"
        for change in ({"difference": 0.03}, {"difference": float("nan")}, {"compiled_after": ["_down"]}):
            assert bench.whole.judge(facts | change)["outcome"] == "missed"

    def test_a_captured_or_compiled_result_that_differs(self, bench: SimpleNamespace) -> None:
        """The first element that differs from eager code is named."""
        found = bench.numbers._equal(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), "replayed")  # noqa: SLF001
        assert (found["outcome"], found["said"]) == (
            "missed",
            "replayed: element 1 is 2.0, expected 3.0; 1 of 2 differ",
        )

    def test_bits_that_differ(self, bench: SimpleNamespace) -> None:
        """A case whose sides differ is missed."""
        case = SimpleNamespace(
            truth=lambda: {"codes": np.zeros(2, np.uint8)}, ours=lambda: {"codes": np.ones(2, np.uint8)}
        )
        assert bench.bits.compare(case)["outcome"] == "missed"

    def test_a_configuration_with_wrong_numbers(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        """It is missed though another one won; one that did not fit the GPU is not; the table is written."""
        cell, best = Cell("linear", "int4", (576, 7168), 1), SM_90.choose("linear", "int4", (576, 7168), 1)
        places = (tmp_path / "a" / "X.json",)
        for refusal, outcome in (
            ("error 1.0e+00, allowed 1.0e-02", "missed"),
            ("while it was run: no memory", "passed"),
        ):
            trials = [Trial(best, 1e-6), Trial(replace(best, columns=32), None, refusal)]
            found = bench.tables._kept(cell, trials, SM_90, SM_90, places)  # noqa: SLF001
            assert found["outcome"] == outcome
            assert found["shipped_us"] == pytest.approx(1.0)
        assert read_table(places[0]).products == SM_90.products

    def test_files_that_differ_or_are_missing(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        """Both are named; equal files are not."""
        for folder, content in (("one", b"a"), ("two", b"b")):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "x.safetensors").write_bytes(content)
            (tmp_path / folder / "same.safetensors").write_bytes(b"c")
        (tmp_path / "one" / "y.safetensors").write_bytes(b"")
        assert bench.whole._differing(tmp_path / "one", tmp_path / "two") == ["x.safetensors", "y.safetensors"]  # noqa: SLF001

    def test_a_conversion_without_its_source(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        """It fails by name instead of converting something else."""
        with pytest.raises(FileNotFoundError, match="its source was not made"):
            bench.whole.conversion(tmp_path, "bf16", "fp8", bench.whole.Sizes.tiny(), None)

    def test_cells_in_which_k2quant_failed_are_missed(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        """So are cells that were given up, other bits in other runs, and codecs with wrong bytes."""
        stages = finished()
        usual = stages["times"]["results"]["cells"][0]
        plants: list[dict[str, Any]] = [{"failed": "illegal access"}, {"same_bits": False}, {"error": 0.5}]
        stages["times"]["results"]["cells"] = [
            usual | {"key": f"cell {number}", "section": "codecs", "contestants": {"k2quant": plant}}
            for number, plant in enumerate(plants)
        ] + [{"key": "cell 3", "given_up": "ended", "contestants": {}}]
        page = bench.page.text(stages, tmp_path / "gpu-x")
        lost = page[page.index("## What was missed") : page.index("## What ran")]
        assert [f"times, cell {number}:" in lost for number in range(4)] == [True] * 4

    @pytest.mark.usefixtures("bench")
    def test_a_goal_is_not_met_by_some_of_its_cells(self) -> None:
        """A cell that had no time counts as not measured."""
        record = finished()["times"]["results"]["cells"][0]
        record |= {"section": "int4", "shape": "o", "routing": ""}
        results = {"device": "cuda", "cells": [record], "left_out": ["int4/gate/M=1/rotating"]}
        goals = importlib.import_module("suites.products.goals")
        fast = [verdict for verdict in goals.verdicts(results) if verdict.goal == "G1" and "M=1" in verdict.what]
        assert fast[0].met is False or "not measured" in fast[0].measured
        record["contestants"]["k2quant"]["median_us"] = 1.0
        fast = [verdict for verdict in goals.verdicts(results) if verdict.goal == "G1" and verdict.what.endswith("M=1")]
        assert (fast[0].met, "1 not measured" in fast[0].measured) == (None, True)


class TestPage:
    """The page, drawn from whatever there is."""

    def test_from_nothing(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        """Where no stage ran it says so."""
        page = bench.page.text({}, tmp_path / "gpu-x")
        assert page.count("did not run") == len(STAGES)

    def test_losses_stand_first(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        """What was missed, failed or stopped, and goals that were not met, are listed before everything else."""
        page = bench.page.text(finished(), tmp_path / "gpu-x")
        lost = page[page.index("## What was missed") : page.index("## What ran")]
        assert "- bits, BF16 -> FP8, random: missed: codes[0]: expected 0x1, found 0x2; 1 differ" in lost
        assert "- numbers: stopped: its time was over" in lost
        assert "- G7, experts, W4A16, M=1: 100 us, must be <= 75 us" in lost
        assert "- G15, kernels compiled after warmup(), one layer: 1, after 3.0 s for 9, must be 0" in lost
        assert "| G8 |" in page
        assert "# NVIDIA X" in page

    def test_what_a_stage_was_at_is_named(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        """A stage that was stopped shows the step that took its time."""
        assert "stopped: its time was over, at moe_int4 |" in bench.page.text(finished(), tmp_path / "gpu-x")


def finished() -> dict[str, Any]:
    """Return what the stages of a made-up run left."""
    facts = {
        "date": "2026-01-01",
        "device": "cuda",
        "machine": {"gpu": "NVIDIA X", "cpu": "some", "cores": 2},
        "versions": {"torch": "2"},
        "commit": "abc",
        "dirty": False,
        "peers": [],
        "settings": {"rotate_bytes": 1, "samples": 1, "warm_up_seconds": 0.0},
    }
    ceilings = {"copy_bytes_per_s": 4.3e12, "bf16_flops_per_s": 8e14}
    cell = {
        "key": "moe-int4/K2/M=1",
        "section": "moe-int4",
        "shape": "K2",
        "size": [384, 2048, 7168],
        "m": 1,
        "routing": "uniform",
        "protocol": "rotating",
        "bytes": 2e8,
        "flops": 7e8,
        "contestants": {
            "k2quant": {"error": 1e-3, "same_bits": True, "median_us": 100.0, "p20_us": 99.0, "p80_us": 101.0}
            | {"weight_bytes": 1}
        },
    }
    bits = {"what": "BF16 -> FP8, random", "outcome": "missed", "said": "codes[0]: expected 0x1, found 0x2; 1 differ"}
    layer: dict[str, Any] = {"what": "one layer, INT4", "outcome": "missed", "said": "compiled after warmup: _down"}
    layer |= {"compiled_after": ["_down"], "warmup_s": 3.0, "compiled_by_warmup": 9}
    machine = {"what": "machine", "outcome": "passed", "facts": facts}
    usual = {"seconds": 1.0, "done": True}
    return {
        "identity": usual | {"entries": [machine, {"what": "ceilings", "outcome": "passed", "ceilings": ceilings}]},
        "bits": usual | {"entries": [bits]},
        "numbers": usual | {"entries": [], "done": False, "ended": "stopped: its time was over", "running": "moe_int4"},
        "times": usual | {"entries": [], "results": {"cells": [cell], "crashed": {}, "left_out": []}},
        "whole": usual | {"entries": [layer]},
    }


def test_a_process_ends_with_whoever_started_it(tmp_path: Path) -> None:
    """When the pipe on its standard input is closed, it ends, and so does what it started."""
    number = 5000 + os.getpid() % 1000
    code = f"import sys, subprocess; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
    code += "from suites.gpu.running import supervise\nsupervise.end_with_parent()\n"
    code += f"print('ready', flush=True); subprocess.run(['sleep', '{number}'])\n"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        cwd=tmp_path,
    ) as run:
        assert run.stdout
        assert run.stdout.readline() == b"ready\n"
        assert run.stdin
        run.stdin.close()
        assert run.wait(60) == -signal.SIGKILL
    assert not alive(f"sleep\0{number}")
