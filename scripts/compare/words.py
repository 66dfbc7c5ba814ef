"""Commands that do nothing: help, and what is refused. And what the package offers to Python."""

from __future__ import annotations

import shutil
from pathlib import Path

from compare.commands import Command, Group, called
from compare.inputs import write_damaged

_COMMANDS = (
    "",
    *("convert", "merge", "inspect", "verify", "diff", "report", "generate", "tune", "demo", "nano"),
    *("qat", "qat plan", "qat train", "qat export"),
    *("eval", "eval run", "eval gate", "eval plan", "eval fidelity", "eval blame"),
)

_HELP = {
    **{f"help {name}".strip().replace(" ", "-"): f"{name} --help" for name in _COMMANDS},
    "version": "--version",
    "nothing": "",
    "short": "-h",
}

_DAMAGED = (
    *("dtype", "partner", "scale-shape", "negative-scale", "nan", "width"),
    *("config", "cut", "header", "index", "empty", "foreign", "missing"),
)

_TO = "convert --to int4"

_ERRORS = {
    "unknown-command": "frobnicate",
    "unknown-option": f"{_TO} --frobnicate demo/fp8 errors/never",
    "unknown-format": "convert --to int8 demo/fp8 errors/never",
    "no-format": "convert demo/fp8 errors/never",
    "no-destination": f"{_TO} demo/fp8",
    "grid-bf16": "convert --to bf16 --grid compressed-tensors demo/fp8 errors/never",
    "scope-bf16": "convert --to bf16 --scope experts demo/fp8 errors/never",
    "size": f"{_TO} --shard-size nonsense demo/fp8 errors/never",
    "size-zero": f"{_TO} --shard-size 0 demo/fp8 errors/never",
    "pattern": f"{_TO} --ignore '(' demo/fp8 errors/never",
    "workers": f"{_TO} --workers 0 demo/fp8 errors/never",
    "device": f"{_TO} --device cuda demo/fp8 errors/never",
    "destination-foreign": f"{_TO} demo/fp8 errors/foreign",
    "destination-restart": f"{_TO} --restart demo/fp8 errors/foreign",
    "destination-nested": f"{_TO} demo/fp8 demo/fp8/inside",
    "destination-same": f"{_TO} demo/fp8 demo/fp8",
    "destination-stale": f"{_TO} --scope linear demo/fp8 demo/fp8-int4",
    "destination-stale-dry": f"{_TO} --scope linear --dry-run demo/fp8 demo/fp8-int4",
    "destination-file": f"{_TO} demo/fp8 errors/foreign/letters.txt",
    **{f"convert-{what}": f"{_TO} errors/{what} errors/out-{what}" for what in _DAMAGED},
    **{f"inspect-{what}": f"inspect errors/{what}" for what in _DAMAGED},
    "verify-alone": "verify demo/fp8",
    "verify-both": "verify --checksums demo/fp8 demo/fp8-int4",
    "verify-no-report": "verify --checksums demo/fp8",
    "verify-against": "verify --checksums demo/fp8-int4 --against demo/fp8-int4/k2quant_report.json",
    "verify-missing": "verify demo/fp8 errors/missing",
    "diff-missing": "diff errors/missing demo/fp8",
    "report-missing": "report errors/missing",
    "report-none": "report demo/fp8",
    "generate-none": "generate demo/fp8 --prompt hello",
    "generate-missing": "generate errors/missing --prompt hello",
    "tune": "tune --minutes 1",
    "tune-cpu": "tune --device cpu",
    "nano-foreign": "nano errors/foreign --steps 1",
    "nano-steps": "nano errors/never --steps 0",
    "demo-foreign": "demo errors/foreign --steps 0",
    "qat-missing": "qat train errors/missing.yaml",
    "qat-no-job": "qat plan errors/foreign/letters.txt",
}

_SCRIPTS = ("print_names", "print_arrays", "print_models")


def copy_scripts(work: Path) -> None:
    """Put the scripts where they run: a checkout's own package must be the only one that they see."""
    for name in _SCRIPTS:
        shutil.copy(Path(__file__).with_name(f"{name}.py"), work / "python")


GROUPS = (
    Group(name="help", commands=tuple(called(_HELP))),
    Group(name="errors", commands=tuple(called(_ERRORS)), needs=("demo",), prepare=write_damaged),
    Group(
        name="python",
        commands=tuple(Command(name, (f"python/{name}.py",)) for name in _SCRIPTS),
        needs=("nano",),
        prepare=copy_scripts,
    ),
)
