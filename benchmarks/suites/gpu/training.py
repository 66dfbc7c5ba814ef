"""Steps of QAT on the GPU, in processes of their own, as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from k2quant.nano import architecture, tasks, writing
from k2quant.qat.run.history import read_history
from suites.common import machine
from suites.gpu.running import record
from suites.gpu.running.record import Entry
from suites.gpu.running.stages import Setting

LOSS = 1e-3
"""Relative difference that the loss of a training step may have from the CPU's."""
FSDP2_TEST = "tests/qat/training/test_processes.py::test_plugin_on_gpus[1]"
TRAIN = """
import sys, torch
from k2quant.qat.launch import main
status = main(sys.argv[1:])
print("bytes of the GPU:", torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
sys.exit(status)
"""
"""What `python -m k2quant.qat` does, and whether the GPU took part."""
TAIL = 300
"""Characters of a failed process's output that are kept."""


class Child:
    """A process and its output."""

    def __init__(self, command: Sequence[str], folder: Path, variables: dict[str, str]) -> None:
        """Start it in a folder, with variables added to ours."""
        self.output = ""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env={**os.environ, **variables},
        )

    def end(self, until: float) -> str:
        """Wait for its end, until `time.time()` is `until`; return why it did not succeed, or nothing."""
        try:
            self.output, _ = self._process.communicate(timeout=max(1.0, until - time.time()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return "its time was over"
        if self._process.returncode:
            return f"ended with {self._process.returncode}: {' '.join(self.output.split())[-TAIL:]}"
        return ""


def step(folder: Path, setting: Setting) -> Entry:
    """Train nano-K2, with fresh weights, for one step on the GPU and on the CPU: the losses must agree."""
    torch.manual_seed(0)
    with writing.claimed(folder / "model"):
        writing.write(folder / "model", architecture.build(), {})
    lines = [{"text": item.question + item.answer} for name in tasks.FAMILIES for item in tasks.items(name, 1, 16)]
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    works = {name: _start_step(folder, name) for name in ("cpu", "gpu")}
    failed = [f"{name}: {end}" for name, work in works.items() if (end := work.end(setting.until))]
    if failed:
        return {"outcome": record.FAILED, "said": "; ".join(failed)}
    if not setting.dry_run and works["gpu"].output.strip().endswith("bytes of the GPU: 0"):
        return {"outcome": record.FAILED, "said": "the GPU took no part in it"}
    losses = {name: _losses(folder / name) for name in works}
    off = max(abs(one - other) / abs(one) for one, other in zip(losses["cpu"], losses["gpu"], strict=True))
    said = f"losses within {off:.1e} of the CPU's, allowed {LOSS}"
    return {"outcome": record.PASSED if off <= LOSS else record.MISSED, "said": said, "losses": losses}


def _start_step(folder: Path, name: str) -> Child:
    job = {
        "model": str(folder / "model"),
        "output": str(folder / name),
        "data": {"path": str(folder / "data.jsonl"), "length": 64, "held_out": 4},
        "training": {"steps": 1, "batch": 8, "evaluate_every": 1, "least_tokens": 0},
        "optimizer": {"rate": 1e-3},
        "saving": {"every": 1},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(job))
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if name == "cpu" else {}
    return Child([sys.executable, "-c", TRAIN, str(file)], folder, hidden)


def _losses(run: Path) -> list[float]:
    history = read_history(run / "history.jsonl")
    return [entry.loss for entry in history.steps] + [entry.loss for entry in history.evaluations]


def fsdp2(setting: Setting) -> Entry:
    """Run the test of FSDP2's plugin with one process."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", FSDP2_TEST]
    work = Child(command, machine.ROOT, {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    if end := work.end(setting.until):
        return {"outcome": record.FAILED, "said": end}
    summary = work.output.strip().splitlines()[-1].strip("= ")
    return {"outcome": record.PASSED if "1 passed" in summary else record.LEFT_OUT, "said": summary}
