"""The benchmark of whole models: a quick run measures both tools, and the page says who won, lost and failed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from places import ROOT

BENCHMARKS = ROOT / "benchmarks"
DRIVER = BENCHMARKS / "model.py"


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The benchmark's modules. Their folder is on the path only meanwhile: its `kernels.py` must not be importable."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("report", "run", "sources", "worker")
        found = {name: importlib.import_module(f"suites.models.{name}") for name in names}
        yield SimpleNamespace(**found, driver=_driver())
    finally:
        sys.path.remove(str(BENCHMARKS))


def _driver() -> ModuleType:
    """Import `benchmarks/model.py` by another name."""
    spec = importlib.util.spec_from_file_location("benchmark_of_models", DRIVER)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestRun:
    """A whole run, on a tiny layer."""

    def test_both_tools_are_measured_and_agree(self, tmp_path: Path) -> None:
        """INT4 is loaded and run by k2quant and by both of transformers' loops, with logits that BF16 explains."""
        words = ["--quick", "--only", "layer/int4", "--work", str(tmp_path)]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, str(DRIVER), *words], check=True, env=env, capture_output=True)
        results = json.loads((tmp_path / "model-cpu.json").read_text())
        assert [key.split("/")[2] for key in results["cells"]] == ["k2quant", "transformers", "transformers, eager"]
        for record in results["cells"].values():
            (run,) = record["runs"]
            assert all(min(run[rate]) > 0 for rate in ("prefill", "decode_1", "decode_8"))
            assert run["token_difference"] < 0.02
            assert run["loaded"]["own"] > run["before"]["own"] > 0
            assert run["peak_own"] >= run["loaded"]["own"]
        held = {key: record["runs"][0]["weight_bytes"] for key, record in results["cells"].items()}
        assert held["layer/int4/k2quant"] < held["layer/int4/transformers"]
        page = (tmp_path / "model-cpu.md").read_text()
        assert "| INT4 | k2quant |" in page
        assert "python benchmarks/model.py --quick --only layer/int4" in page
        assert str(tmp_path) not in page + (tmp_path / "model-cpu.json").read_text()


class TestSources:
    """The checkpoints that are loaded."""

    def test_the_layer_is_k2s_and_transformers_gets_the_same_bytes(
        self, bench: SimpleNamespace, tmp_path: Path
    ) -> None:
        """K2's ranks and 576 rows, as many experts as asked for, and links beside a config that transformers knows."""
        made = bench.sources.layer(tmp_path, 9, tiny=True)
        shape = made.record()["shape"]
        assert (shape["n_routed_experts"], shape["kv_lora_rank"], shape["first_k_dense_replace"]) == (9, 512, 0)
        for form in bench.sources.FORMATS:
            peer = made.peer(form)
            assert json.loads((peer / "config.json").read_text())["model_type"] == "deepseek_v3"
            shards = sorted(path.name for path in made.source(form).glob("*.safetensors"))
            assert shards
            assert all((peer / name).samefile(made.source(form) / name) for name in shards)

    def test_what_is_there_is_not_made_again(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        """A second call leaves files alone; a given BF16 checkpoint stays where it is."""
        made = bench.sources.layer(tmp_path, 9, tiny=True)
        before = made.source("int4").stat().st_mtime_ns
        assert bench.sources.layer(tmp_path, 9, tiny=True) == made
        assert made.source("int4").stat().st_mtime_ns == before
        assert bench.sources.nano(tmp_path, made.bf16).source("bf16") == made.bf16


def run(rate: float, **more: Any) -> dict[str, Any]:
    """Return a made-up run: 1 MiB of everything."""
    memory = {"own": 2**20, "mapped": 2**20, "peak": 2**20}
    rates = {"prefill": [rate], "decode_1": [rate / 2, rate, 2 * rate], "decode_8": [rate]}
    sizes = {"before": memory, "loaded": memory, "ran": memory, "weight_bytes": 2**20, "peak_own": 2**20}
    return {"load_s": 1.0, "difference": 0.001, "token_difference": 0.002, "threads": 2} | rates | sizes | more


def results(**runs: dict[str, Any]) -> dict[str, Any]:
    """Return made-up results of the layer in FP8."""
    names = {"ours": "k2quant", "peer": "transformers", "loop": "transformers, eager"}
    shape = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "hidden_size": 7168, "num_attention_heads": 64}
    shape |= {"n_routed_experts": 80, "moe_intermediate_size": 2048, "num_experts_per_tok": 8, "n_shared_experts": 1}
    workload = {"prompt": 32, "prefill": 512, "new_tokens": 12, "batches": [1, 8], "samples": 3}
    model = {"shape": shape | {"vocab_size": 2048}, "bytes": {"fp8": 10**6}, "workload": workload}
    cells = {
        f"layer/fp8/{names[name]}": {"model": "layer", "format": "fp8", "contestant": names[name], "runs": [found]}
        for name, found in runs.items()
    }
    box = {"cpu": "a CPU", "cores": 2, "memory": 2**34, "disk": "ext4 on sda", "load": 0.1}
    said = {"date": "2026-01-01", "commit": "abc", "dirty": False, "versions": {"torch": "2"}, "command": "python it"}
    return said | {"machine": box, "models": {"layer": model}, "cells": cells, "repetitions": 1}


class TestPage:
    """What is written about made-up results."""

    def test_a_loss_is_reported_like_a_win(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        """The better of transformers' two ways counts: half its speed is 0.50x."""
        made = results(ours=run(10.0), peer=run(2.0), loop=run(20.0, default_experts="grouped_mm"))
        page = bench.report.page(made, tmp_path / "model-cpu.json")
        assert "| FP8 | 0.50x | 0.50x | 0.50x |" in page
        assert "| FP8 | k2quant | 1.00 | 10.0 | 10.0 (5.00-20.0) | 10.0 | 0.10% | 0.20% |" in page
        assert "`grouped_mm`" in page

    def test_what_failed_stands_with_its_reason(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        """A tool that cannot load a format has no numbers, and its error is on the page once."""
        failed = {"failed": "RuntimeError: some issues", "remarks": ["ValueError: not divisible"], "threads": 2}
        page = bench.report.page(results(ours=run(1.0), peer=failed, loop=failed), tmp_path / "model-cpu.json")
        assert "| FP8 | transformers | cannot load | - | - | - | - | - |" in page
        assert page.count("- layer, FP8, transformers: `RuntimeError: some issues`\n  `ValueError: not divisible`") == 1
        assert "| FP8 | - | - | - |" in page

    def test_the_command_repeats_the_run(self, bench: SimpleNamespace) -> None:
        """Options that change what is measured stand in it; folders do not."""
        given = bench.driver.parse(["--nano", "/data/nano-k2", "--repetitions", "5", "--work", "somewhere"])
        assert bench.driver.command(given) == "python benchmarks/model.py --nano nano-k2 --repetitions 5"

    def test_errors_name_no_folders(self, bench: SimpleNamespace) -> None:
        """The first line of an error stands in the results, with the last part of each path."""
        error = ValueError("\ncannot read /opt/somewhere/model.safetensors\nmore")
        assert bench.worker.reason(error) == "ValueError: cannot read model.safetensors"
