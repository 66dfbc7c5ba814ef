"""Task accuracy of the arms of seed 0, through `k2quant eval run` and `k2quant eval gate`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from suites.qat import arms as qat_arms

MARGIN = "2pp"
_GATE_CODES = frozenset({0, 3, 4})


def measure(workdir: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Return the gate's verdicts: base against the base rounded, the rounded control, and QAT, at each width."""
    base = workdir / "base-0"
    runs = workdir / "eval"
    _evaluate(base, runs / "base", workdir, tell)
    rows = []
    for bits in qat_arms.BITS:
        for name, folder in _candidates(workdir, bits):
            _evaluate(folder, runs / folder.name, workdir, tell)
            rows.append({"name": f"INT{bits}, {name}", **_gate(runs / "base", runs / folder.name)})
    return {"margin": MARGIN, "rows": rows}


def _candidates(workdir: Path, bits: int) -> list[tuple[str, Path]]:
    rounded = workdir / "exports" / f"0-rounded-{bits}"
    if not (rounded / "config.json").exists():
        job = qat_arms.job(
            str(workdir / "base-0"), "unused", str(workdir / "tasks" / "train.jsonl"), kind="plain", bits=bits, seed=0
        )
        file = workdir / f"rounded-{bits}.yaml"
        file.write_text(yaml.safe_dump(job))
        _k2quant("qat", "export", file, rounded)
    return [
        ("rounded", rounded),
        ("control, rounded", workdir / "exports" / f"0-control-{bits}"),
        ("QAT, plain STE", workdir / "exports" / f"0-plain-{bits}"),
    ]


def _evaluate(model: Path, run: Path, workdir: Path, tell: Callable[[str], None]) -> None:
    if not (run / "k2quant_eval.json").exists():
        tell(f"eval run {model.name}")
        _k2quant("eval", "run", model, "--include", workdir / "tasks", "--tasks", "nano", "-o", run)


def _gate(base: Path, candidate: Path) -> dict[str, Any]:
    found = json.loads(_k2quant("eval", "gate", base, candidate, "--margin", MARGIN, "--json", codes=_GATE_CODES))
    pooled = found["pooled"]
    low, high = pooled["interval"]
    return {
        "n": pooled["n"],
        "base": pooled["base_accuracy"],
        "candidate": pooled["candidate_accuracy"],
        "drop": pooled["drop"],
        "low": low,
        "high": high,
        "lost": pooled["lost"],
        "gained": pooled["gained"],
        "decision": found["decision"],
    }


def _k2quant(*arguments: object, codes: frozenset[int] = frozenset({0})) -> str:
    command = [sys.executable, "-m", "k2quant", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in codes:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout
