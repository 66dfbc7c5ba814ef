"""The benchmark of exports runs, and finds the bytes of an expert as they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from places import ROOT

SCRIPT = ROOT / "benchmarks" / "suites" / "exports" / "speed.py"


def test_a_small_slice_is_exported_without_error(tmp_path: Path) -> None:
    """A copy and the exports of a slice of 2 MB; how long they take is no matter here."""
    command = [sys.executable, str(SCRIPT), str(tmp_path / "work"), str(tmp_path / "found.json")]
    sizes = {"--size": "2MB", "--hidden": "512", "--inner": "256", "--runs": "1"}
    words = [word for pair in sizes.items() for word in pair]
    place = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, *words], check=True, capture_output=True, env=place)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["way"] for row in found["rows"]] == ["copy", "export mlx", "export gguf"]
    assert found["rows"][2]["error"] == {"worst": 0.0, "rms": 0.0}
    assert found["ratios"].keys() == {"export mlx", "export gguf"}
