"""Killed at any moment, a conversion resumes and writes the same bytes as one that was left alone.

K2QUANT_KILLS sets how often a conversion is killed from outside (here 4, once in each way; `make torture`: 50),
K2QUANT_SEED the moments, K2QUANT_TO the format that is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import k2quant
from k2quant.checkpoint.reader import CONFIG, INCOMPLETE, INDEX, REPORT
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from places import SHARED

KILLS = int(os.environ.get("K2QUANT_KILLS", "4"))
SEED = int(os.environ.get("K2QUANT_SEED", "20"))
TO = os.environ.get("K2QUANT_TO", "int4")
SHARDS, EXPERTS, ROWS, WIDTH = 8, 8, 512, 2048
PATIENCE = 60.0
"""Seconds after which a conversion that takes two counts as hung."""


def write_source(folder: Path) -> None:
    """Write 8 shards of 25 MB: block-FP8 experts, some scales in the next shard, one BF16 matrix each."""
    random_ = np.random.default_rng(SEED)
    shards: dict[str, Shard] = {f"model-{number + 1}-of-{SHARDS}.safetensors": {} for number in range(SHARDS)}
    files = list(shards)
    for layer, file in enumerate(files):
        for expert in range(EXPERTS):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                base = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
                codes = random_.integers(0, 256, (ROWS, WIDTH), np.uint8)
                codes[codes & 0x7F == 0x7F] = 0
                home = files[(layer + (expert == 1)) % SHARDS]
                shards[file][f"{base}.weight"] = ("F8_E4M3", codes)
                scale = random_.random((ROWS // 128, WIDTH // 128), np.float32)
                shards[home][f"{base}.weight_scale_inv"] = ("F32", scale)
        gate = random_.integers(0x3C00, 0x3F80, (EXPERTS, WIDTH), np.uint16)
        shards[file][f"model.layers.{layer}.mlp.gate.weight"] = ("BF16", gate)
    write_checkpoint(folder, shards, {"model_type": "kimi_k2"})
    (folder / "tokenizer.json").write_text("{}")


class Undisturbed(NamedTuple):
    """A conversion that was left alone."""

    source: Path
    files: dict[str, bytes]
    """What it wrote, the report aside."""
    tensors: dict[str, Any]
    """What its report says of the tensors."""
    seconds: float
    """From the first entry of the journal to the end."""


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of an output but its report."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != REPORT
    }


@contextlib.contextmanager
def converting(source: Path, destination: Path, workers: int) -> Iterator[subprocess.Popen[str]]:
    """Convert in a process of its own, which does not outlive the block."""
    command = [sys.executable, "-m", "k2quant", "convert", str(source), str(destination), "--to", TO]
    with subprocess.Popen(
        [*command, "--workers", str(workers)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(process: subprocess.Popen[str], happened: Callable[[], bool]) -> bool:
    """Wait until something has happened or the process has ended; tell whether it still runs."""
    begun = time.monotonic()
    while not happened():
        if process.poll() is not None:
            return False
        assert time.monotonic() - begun < PATIENCE, "the conversion hangs"
        time.sleep(0.0005)
    return process.poll() is None


def finish(source: Path, destination: Path, workers: int = 1) -> str:
    """Convert to the end and return what was printed."""
    with converting(source, destination, workers) as process:
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Convert the source once, watching how long the work takes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source, destination = folder / "source", folder / "destination"
    write_source(source)
    finish(source, folder / "first")  # compiles what is not compiled yet, and fills the page cache
    with converting(source, destination, 1) as process:
        wait_until(process, (destination / ".k2quant" / "journal.jsonl").exists)
        begun = time.monotonic()
        process.communicate(timeout=PATIENCE)
        seconds = time.monotonic() - begun
    files = contents(destination)
    assert files == contents(folder / "first")
    assert files.keys() - {"hf_quant_config.json"} == {
        CONFIG,
        INDEX,
        "README.md",
        "tokenizer.json",
        *(f"model-{n + 1}-of-{SHARDS}.safetensors" for n in range(8)),
    }
    return Undisturbed(source, files, json.loads((destination / REPORT).read_text())["tensors"], seconds)


def check_stopped(folder: Path, whole: dict[str, bytes]) -> int:
    """Check that a folder that a kill left behind does not look like a model unless it is one; count its shards."""
    found = contents(folder) if folder.exists() else {}
    model = {name: data for name, data in found.items() if not name.startswith((".k2quant", INCOMPLETE))}
    shards = [name for name in model if name.endswith(".safetensors")]
    if model != whole:
        assert not model or INCOMPLETE in found
        assert not {CONFIG, INDEX} & model.keys() or len(shards) == SHARDS
        assert CONFIG not in model or INDEX in model
    for name, data in model.items():
        assert name.endswith(".partial") or data == whole[name], f"{name} is broken"
    return len(shards)


class Moment(NamedTuple):
    """When a conversion is killed."""

    after: float = 0.0
    """Seconds after its work began."""
    file: str | None = None
    """The file of the destination that must be there."""
    delay: float = 0.0
    """Seconds that pass once it is."""

    def come(self, destination: Path, begun: float) -> bool:
        """Tell whether the moment has come, the delay aside."""
        return time.monotonic() >= begun + self.after and (self.file is None or (destination / self.file).exists())


def moments(dice: random.Random, seconds: float) -> Iterator[Moment]:
    """Yield moments all through the work, just after a shard has its name, and while the last files are written."""
    for number in range(KILLS):
        if number % 4 < 2:
            yield Moment(after=(number + dice.random()) / KILLS * seconds)
        elif number % 4 == 2:
            delay = dice.choice([0, 0, dice.random() * 0.005])
            yield Moment(file=f"model-{dice.randint(1, SHARDS)}-of-{SHARDS}.safetensors", delay=delay)
        else:
            yield Moment(file=dice.choice(["tokenizer.json", REPORT, INDEX, CONFIG]) + dice.choice(["", ".partial"]))


def kill(case: Undisturbed, destination: Path, moment: Moment, workers: int) -> bool:
    """Start a conversion and kill it when the moment has come; tell whether it was still at work."""
    journal = destination / ".k2quant" / "journal.jsonl"
    with converting(case.source, destination, workers) as process:
        wait_until(process, journal.exists)
        begun = time.monotonic()
        working = wait_until(process, lambda: moment.come(destination, begun))
        time.sleep(moment.delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    return working


def test_killed_at_random(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Killed at random moments, once or more, the same command resumes to the same bytes and the same figures."""
    dice = random.Random(SEED)  # noqa: S311  not for secrets
    hits = resumed = 0
    for number, moment in enumerate(moments(dice, undisturbed.seconds)):
        destination = tmp_path / str(number)
        again = dice.choice([0, 0, 1, 2])
        print(f"kill {number} of seed {SEED}: {moment}, then {again} times more")  # noqa: T201  to repeat a failure
        hits += kill(undisturbed, destination, moment, dice.choice([1, 2]))
        shards = check_stopped(destination, undisturbed.files)
        for _ in range(again):
            kill(undisturbed, destination, Moment(after=dice.random() * undisturbed.seconds), 1)
            assert check_stopped(destination, undisturbed.files) >= shards, "finished work was lost"
        output = finish(undisturbed.source, destination, dice.choice([1, 2]))
        resumed += "resumed" in output
        assert contents(destination) == undisturbed.files
        assert json.loads((destination / REPORT).read_text())["tensors"] == undisturbed.tensors
        assert "already finished" in finish(undisturbed.source, destination)
        for path in destination.iterdir():
            path.unlink()
    assert hits >= KILLS // 2, "most kills came too late to prove anything"
    assert resumed >= KILLS // 4, "hardly a run had anything to resume"


def small(folder: Path) -> Path:
    """Write a source of three shards of two weights, an expert's in all of them, and a file beside them."""
    shards: dict[str, Shard] = {}
    for number, (name, part) in enumerate((("q_a_proj", "gate"), ("q_b_proj", "up"), ("o_proj", "down"))):
        shard: Shard = {}
        for base in (f"model.layers.1.self_attn.{name}", f"model.layers.1.mlp.experts.0.{part}_proj"):
            shard[f"{base}.weight"] = ("F8_E4M3", np.full((64, 64), 0x38 + number, np.uint8))
            shard[f"{base}.weight_scale_inv"] = ("F32", np.ones((1, 1), np.float32))
        shards[f"model-{number + 1}-of-3.safetensors"] = shard
    write_checkpoint(folder, shards, {"model_type": "kimi_k2"})
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize(("to", "restart"), [("nvfp4", False), ("int4", True)], ids=["new", "restart"])
def test_killed_before_every_file_operation(ram: Path, to: Any, *, restart: bool) -> None:
    """Killed before its first, second ... last file operation, a conversion leaves no half model and resumes.

    To NVFP4, gate and up of an expert lie in two shards and share a scale, whichever of them stands already.
    """
    source = small(ram / "source")
    k2quant.convert(source, ram / "reference", to=to)
    k2quant.convert(source, ram / "old", to="bf16")
    script = SHARED / "kill_everywhere.py"
    folders = [source, ram / "destination", ram / "reference", *([ram / "old"] if restart else [])]
    command = [sys.executable, script, to, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > 50
