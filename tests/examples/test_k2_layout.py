"""The layout of the real K2-Instruct, without its weights."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from k2quant.calib import plan_calibration, planning
from k2quant.cli import main
from places import ROOT

TENSORS, ELEMENTS = 139_644, 1_026_470_731_056
"""As the safetensors headers of moonshotai/Kimi-K2-Instruct say."""


def write(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the script."""
    command = [sys.executable, str(ROOT / "examples" / "k2_layout.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout, written by the script."""
    folder = tmp_path_factory.mktemp("layout") / "K2-layout"
    done = write(folder)
    assert done.returncode == 0, done.stderr
    return folder


def headers(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the headers of the shards, each checked against the size of its file."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        assert path.stat().st_size == 8 + length + max(entry["data_offsets"][1] for entry in header.values())
        yield header


def test_it_is_k2_in_everything_but_weights(layout: Path) -> None:
    """Tensors, parameters and shards are those of the release, and the disk keeps the headers alone."""
    shards = list(headers(layout))
    assert len(shards) == 61
    assert sum(map(len, shards)) == TENSORS
    assert sum(prod(entry["shape"]) for shard in shards for entry in shard.values()) == ELEMENTS
    assert sum(path.stat().st_blocks * 512 for path in layout.iterdir()) < 100e6


def test_a_calibration_of_the_release_is_planned(layout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of 512 rows of 2,048 tokens that were worked out on paper, in the memory that is asked for."""
    monkeypatch.setattr(planning, "product_rate", lambda *_: 1e12)
    monkeypatch.setattr(planning, "read_rate", lambda *_: 1e9)
    plan = plan_calibration(layout, tmp_path / "stats", memory=48_000_000_000)  # a layer fits: each expert is read once
    assert plan.tokens == 512 * 2048
    assert plan.judging == 64 * 2048
    assert plan.mean == plan.tokens / 48
    assert plan.passes.hidden / (plan.tokens + plan.judging) == 7168 * 2  # 15.0 GB of them for what is measured
    assert 1.4e9 < plan.stats_bytes < 4e9
    assert plan.disk_needed == plan.stats_bytes + 2 * plan.passes.hidden
    assert 1.02e12 < plan.bytes_read < 1.03e12
    routed = 60 * 8 * 3 * 7168 * 2048
    assert routed < plan.work / (plan.tokens + plan.judging) < 1.6 * routed
    assert plan.seconds == plan.work / 1e12 + plan.bytes_read / 1e9
    smaller = plan_calibration(layout, tmp_path / "stats", memory=32_000_000_000)
    assert 2.9 < smaller.bytes_read / plan.bytes_read < 3  # experts three times, all else once


def test_a_dry_run_plans_the_release(layout: Path, tmp_path: Path) -> None:
    """1.03 TB become the 594 GB of K2-Thinking, by every routed expert as INT4; nothing is written."""
    command = ["convert", "--to", "int4", "--dry-run", "--json", str(layout), str(tmp_path / "out")]
    plan = json.loads(CliRunner().invoke(main, command).stdout)
    assert plan["bytes_read"] == pytest.approx(1029.2e9, rel=1e-4)
    assert plan["bytes_written"] == pytest.approx(594.2e9, rel=2e-4)
    assert plan["work"]["routed experts"] == {"fp8 -> int4": 60 * 384 * 3}
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(layout: Path) -> None:
    """A second run says so in a line."""
    done = write(layout)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "exists" in done.stderr
