"""Slips are answered at once: nothing that takes seconds to load is loaded before what the user named was looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from k2quant.checkpoint.writing.in_memory import write_checkpoint
from k2quant.cli import main
from k2quant.kernels.devices import driver

_SLIPS = {
    "generate nowhere --prompt x": (1, "nowhere: no such folder"),
    "generate empty --prompt x": (1, "no checkpoint here"),
    "generate dumb --prompt x": (1, "dumb: has no tokenizer"),
    "generate empty": (2, "name one text to continue"),
    "generate empty --prompt x --prompt-file y": (2, "name one text to continue"),
    "generate empty --prompt=": (2, "the prompt is empty"),
    "generate empty --prompt-file nofile": (1, "nofile: No such file"),
    "generate empty --prompt x --device tpu": (2, "unknown device `tpu`"),
    "convert --to int4 --device tpu empty out": (2, "unknown device `tpu`"),
    "calibrate empty stats": (2, "Missing option '--data'"),
    "calibrate nowhere stats --data job.yaml": (1, "nowhere: no such folder"),
    "calibrate empty stats --data job.yaml": (1, "no checkpoint here"),
    "calibrate dumb stats --data job.yaml": (1, "dumb: has no tokenizer"),
    "calibrate empty stats --data nofile.jsonl": (2, "--data: 'nofile.jsonl': no such file"),
    "calibrate empty stats --data job.yaml --test nofile": (2, "--test: 'nofile': no such file"),
    "calibrate empty stats --data job.yaml --memory much": (2, "'much' is no size"),
    "calibrate empty stats --data job.yaml --device auto": (2, "unknown device `auto`"),
    "eval fidelity nowhere empty": (1, "nowhere: no such folder"),
    "eval fidelity empty nowhere": (1, "no checkpoint here"),
    "eval blame nowhere empty": (1, "nowhere: no such folder"),
    "eval fidelity empty empty -o nowhere/f.json": (1, "nowhere/f.json: cannot be written"),
    "eval blame empty empty -o nowhere/f.json": (1, "nowhere/f.json: cannot be written"),
    "eval run nowhere --tasks x -o out": (2, "nowhere: no such folder"),
    "eval run empty --tasks x -o out": (1, "no checkpoint here"),
    "eval run empty --tasks x -o out --model-args a=1": (2, "--model-args go with hf, vllm and api"),
    "eval run empty --tasks x -o out --model-args a": (2, "--model-args: expected NAME=VALUE"),
    "eval run empty --tasks x -o out --header X-Key=KEY": (2, "go with --backend api"),
    "qat train nofile.yaml": (2, "nofile.yaml"),
    "qat train empty.yaml": (2, "empty.yaml"),
    "qat train job.yaml": (2, "model: nowhere: no such folder"),
    "qat plan nofile.yaml": (2, "nofile.yaml"),
    "qat plan job.yaml": (2, "model: nowhere: no such folder"),
    "qat train nodata.yaml": (2, "data: path: nofile.jsonl: no such file or folder"),
    "qat plan nodata.yaml": (2, "data: path: nofile.jsonl: no such file or folder"),
    "qat export empty out": (1, "no training of k2quant's"),
    "qat export job.yaml out": (2, "model: nowhere: no such folder"),
    "nano foreign": (1, "no nano-K2"),
    "tune --device cpu": (2, "unknown device `cpu`"),
}
"""What is typed, with the exit code and a part of the answer."""

_WITHOUT_DRIVER = {
    "generate empty --prompt x --device cuda": (2, "`cuda` is not available"),
    "convert --to int4 --device cuda:1 empty out": (2, "`cuda:1` is not available"),
    "eval run empty --tasks x -o out --device CUDA": (2, "`cuda` is not available"),
    "eval blame empty empty --device cuda": (2, "`cuda` is not available"),
    "tune": (2, "`cuda` is not available"),
}

_TRY = """
import json, sys
from click.testing import CliRunner
from k2quant.cli import main

found = {}
for typed in json.load(sys.stdin):
    done = CliRunner().invoke(main, typed.split())
    heavy = sorted({"torch", "transformers", "lm_eval"} & set(sys.modules))
    found[typed] = [done.exit_code, done.stderr, heavy]
print(json.dumps(found))
"""

_JOB = """
model: nowhere
output: out
quantize: {to: int4}
data: {path: nofile.jsonl}
training: {steps: 2}
"""


def test_slips_are_answered_before_torch_is_loaded(tmp_path: Path) -> None:
    """A path, a prompt, a device or a job that cannot be is refused while neither torch nor transformers is loaded."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine").write_text("mine")
    write_checkpoint(tmp_path / "dumb", {"model.safetensors": {"norm.weight": ("BF16", np.ones(2, np.uint16))}}, {})
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "job.yaml").write_text(_JOB)
    (tmp_path / "nodata.yaml").write_text(_JOB.replace("nowhere", "empty"))
    slips = _SLIPS if driver.has_driver() else _SLIPS | _WITHOUT_DRIVER
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    tried = subprocess.run(
        [sys.executable, "-c", _TRY],
        input=json.dumps([*slips]),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    for typed, (exit_code, stderr, heavy) in json.loads(tried.stdout).items():
        code, part = slips[typed]
        assert (exit_code, heavy) == (code, []), f"{typed}: {stderr}"
        assert part in stderr, typed
    assert not (tmp_path / "out").exists()


def test_a_machine_with_the_driver_of_a_gpu_asks_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The early answer is a no alone: where a driver is, whether a GPU is there is torch's to say."""
    monkeypatch.setattr(driver, "_NODES", (str(tmp_path),))
    assert driver.has_driver()
    monkeypatch.setattr(driver, "_NODES", ())
    monkeypatch.setattr(driver, "_DRIVERS", ("libc.so.6",))
    assert driver.has_driver()
    monkeypatch.setattr(driver, "_DRIVERS", ("libnone.so.1",))
    assert not driver.has_driver()


@pytest.mark.parametrize(
    ("content", "wrong"),
    [(b"a\xff", "a wrong byte at 1"), (b"", "the prompt is empty"), (b"\xef\xbb\xbf\n", "the prompt is empty")],
)
@pytest.mark.parametrize("how", ["--prompt", "--prompt-file", "stdin file"])
def test_a_prompt_from_elsewhere_is_checked(content: bytes, wrong: str, how: str, tmp_path: Path) -> None:
    """From a file or stdin it is text in UTF-8, and there is some."""
    (tmp_path / "prompt.txt").write_bytes(content)
    options = {
        "--prompt": ["--prompt", "-"],
        "--prompt-file": ["--prompt-file", str(tmp_path / "prompt.txt")],
        "stdin file": ["--prompt-file", "-"],
    }[how]
    done = CliRunner().invoke(main, ["generate", str(tmp_path), *options], input=content)
    assert done.exit_code in {1, 2}
    assert wrong in done.stderr


@pytest.mark.parametrize("options", [["--prompt", "-"], ["--prompt-file", "PATH"]], ids=["stdin", "file"])
def test_a_prompt_beyond_all_measure_is_refused(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not read to its end, which a pipe need not have; and what is no regular file is not waited for."""
    monkeypatch.setattr("k2quant.cli.running.generate._LIMIT", 10)
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"x" * 11)
    named = [str(path) if option == "PATH" else option for option in options]
    done = CliRunner().invoke(main, ["generate", str(tmp_path), *named], input=b"x" * 11)
    assert (done.exit_code, "at most 10 bytes" in done.stderr) == (1, True), done.stderr
    os.mkfifo(tmp_path / "pipe")
    done = CliRunner().invoke(main, ["generate", str(tmp_path), "--prompt-file", str(tmp_path / "pipe")])
    assert (done.exit_code, "not a regular file" in done.stderr) == (1, True)
