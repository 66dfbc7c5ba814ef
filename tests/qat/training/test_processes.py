"""QAT in two processes gives what one gives: data parallel, and with parameters in shards.

The processes are started with torchrun, over gloo: on a CPU, `accelerate launch --cpu` starts one process, whatever it
is told. Each start takes seconds, so there are few.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from torch import nn

from k2quant.errors import CheckFailed, UsageError
from k2quant.qat.exporting.export import export_run
from k2quant.qat.job import Job, job_from
from k2quant.qat.launch import main
from k2quant.qat.loading import load
from k2quant.qat.preparing import prepare, prepared
from k2quant.qat.run import checkpoints, naming
from k2quant.qat.run.folder import Run
from k2quant.qat.run.history import read_history
from k2quant.qat.training.processes import Processes, check_sharded
from k2quant.qat.training.training import train
from tiny import job_content, write_data, write_model

pytestmark = pytest.mark.usefixtures("sketched")

CLOSE = 2e-5
"""Relative difference of losses. Two processes add float32 gradients up in another order, some 1e-7 of each, and Adam
divides small ones by their own size, so that a difference grows from step to step."""
PATIENCE = 120.0
"""Seconds after which two processes count as hung."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a K2 of 100,000 weights and data."""
    folder = tmp_path_factory.mktemp("processes")
    write_model(folder / "model")
    write_data(folder / "data.jsonl")
    return folder


@pytest.fixture(autouse=True)
def alone() -> Any:
    """Forget what accelerate keeps of a process, before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001  accelerate has no other way
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001
    PartialState._reset_state()  # noqa: SLF001


def make(home: Path, output: str, **changes: dict[str, Any]) -> tuple[Job, Path]:
    """Return a job of four steps, and its file."""
    content = job_content(home, output, **changes)
    path = home / f"{output}.yaml"
    path.write_text(yaml.safe_dump(content))
    return job_from(content), path


def launch(*arguments: object, processes: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m k2quant.qat` in processes of one job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    return subprocess.run(
        [sys.executable, *(start if processes > 1 else []), "-m", "k2quant.qat", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def losses(job: Job) -> list[float]:
    """Return the losses of all steps and evaluations."""
    history = read_history(Path(job.output) / "history.jsonl")
    return [record.loss for record in history.steps] + [record.loss for record in history.evaluations]


def state(job: Job) -> dict[str, Any]:
    """Return what the last checkpoint says of itself."""
    return checkpoints.read_state(naming.found(Run(Path(job.output)).checkpoints)[-1])


def differing(one: Job, other: Job) -> tuple[int, int]:
    """Export two runs; return how many packed words differ, and how many there are."""
    count = words = 0
    folders = [export_run(Path(job.output), Path(f"{job.output}-export"), restart=True).folder for job in (one, other)]
    for path in sorted(folders[0].glob("*.safetensors")):
        ours, theirs = load_file(path), load_file(folders[1] / path.name)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            if name.endswith("weight_packed"):
                count += int((tensor != theirs[name]).sum())
                words += tensor.numel()
    return count, words


def again_from_first(job: Job) -> None:
    """Take a run back to its first checkpoint."""
    last = naming.found(Run(Path(job.output)).checkpoints)[-1]
    (last / naming.STATE).unlink()


LATER: dict[str, Any] = {
    "training": {"micro_batch": 1},
    "quantize": {"estimator": "learned", "bits": {0: None, 2: 4}},
}
"""Several passes a step, and scales that have no part in the first steps."""


def test_data_parallel(home: Path) -> None:
    """Two processes give the losses and the export of one, and one goes on from what two have saved."""
    (one, _), (two, path) = make(home, "one", **LATER), make(home, "two", **LATER)
    train(one)
    done = launch(path)
    assert done.returncode == 0, done.stderr
    assert state(two)["processes"] == 2
    assert losses(two) == pytest.approx(losses(one), rel=CLOSE)
    count, words = differing(one, two)
    assert count <= words // 500, "a weight at the border of two codes may fall to either side"
    again_from_first(two)
    assert train(two).resumed == 2
    assert state(two)["processes"] == 1
    assert losses(two) == pytest.approx(losses(one), rel=CLOSE)


def test_shards(home: Path) -> None:
    """Two processes with half of each parameter go on from what one has saved, and end where it would; and back."""
    (one, _), (two, path) = make(home, "whole"), make(home, "shards")
    train(one)
    train(two)
    again_from_first(two)
    make(home, "shards", training={"shard": True})
    done = launch(path)
    assert done.returncode == 0, done.stderr
    assert state(two)["processes"] == 2
    assert losses(two) == pytest.approx(losses(one), rel=CLOSE)
    count, words = differing(one, two)
    assert count <= words // 500
    again_from_first(two)
    assert train(two).resumed == 2
    assert losses(two) == pytest.approx(losses(one), rel=CLOSE)


def test_error_in_one_process(home: Path) -> None:
    """When the first process finds a folder that is not ours, the others do not wait for it, and one line says why."""
    _, path = make(home, "foreign")
    (home / "foreign").mkdir()
    (home / "foreign" / "thesis.tex").write_text("mine")
    begun = time.monotonic()
    done = launch(path)
    assert done.returncode != 0
    assert done.stderr.count("k2quant: ") == 1
    assert "no training of ours" in done.stderr
    assert time.monotonic() - begun < PATIENCE / 2


def test_plugin_on_cpu(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The FSDP plugin of accelerate, which shards nothing on a CPU and says nothing, is refused with exit 2."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    _, path = make(home, "plugin")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert main([str(path)]) == 2
    assert "FSDP plugin has no effect on CPUs" in capsys.readouterr().err.splitlines()[-1]


def test_shards_alone() -> None:
    """Shards need somebody to share with."""
    with pytest.raises(UsageError, match="one process"):
        Processes(shard=True)


def test_precision_is_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate config` says of mixed precision has no effect: the job alone says it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert Processes(shard=False).accelerator.mixed_precision == "no"


def test_unsharded_parameters_are_noticed(home: Path) -> None:
    """A model that should be in shards and is not, is refused with the name of a parameter."""
    model = prepare(load(home / "model"))
    with pytest.raises(CheckFailed, match=r"`model\.embed_tokens\.weight`.*not sharded"):
        check_sharded(model, prepared(model).targets, 2)


def test_shards_along_groups_are_noticed() -> None:
    """Shards that take groups apart are refused: each process would make scales of a part of one."""

    class DTensor(nn.Parameter):  # shards are known by this name
        placements = (SimpleNamespace(dim=1),)

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = DTensor(torch.zeros(2, 32))

    module = Module()
    target = SimpleNamespace(master=module.weight, name="weight")
    with pytest.raises(CheckFailed, match="sharded along its groups"):
        check_sharded(module, (target,), 2)  # type: ignore[arg-type]  # what of a target it looks at


def test_muon_beside_the_plugin(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon is refused wherever parameters lie in shards."""
    job, _ = make(home, "muon", optimizer={"method": "muon"})
    monkeypatch.setattr(Processes, "sharded", property(lambda _: True))
    with pytest.raises(UsageError, match="muon works on whole matrices"):
        train(job)


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [1, 2])
def test_plugin_on_gpus(home: Path, processes: int) -> None:
    """The FSDP2 plugin of accelerate shards over GPUs, and ends within rounding where `shard` and one process end."""
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    (one, reference), (two, path) = make(home, f"gpu-{processes}"), make(home, f"plugin-{processes}")
    devices = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(processes)))}
    done = launch(reference, processes=1, **devices)
    assert done.returncode == 0, done.stderr
    plugin = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    }
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    done = subprocess.run(
        [*start, "-m", "k2quant.qat", str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        env={**os.environ, **plugin, **devices},
    )
    assert done.returncode == 0, done.stderr
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    count, words = differing(one, two)
    assert count <= words // 100
