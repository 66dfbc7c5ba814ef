"""Commands that train nano-K2 and fine-tune it, and that run the result."""

from __future__ import annotations

from compare.commands import Command, Group, called
from compare.inputs import lose_last_step, write_jobs

_NANO = {
    # Forty steps of this seed answer nearly half of a multiple choice of four, so that the gate has something to judge.
    "train": "nano nano/k2 --steps 40 --seed 1 --tasks nano/tasks",
    "train-json": "nano nano/seven --steps 1 --seed 7 --json",
    "int4": "convert --to int4 nano/k2 nano/k2-int4",
    "fp8": "convert --to fp8 nano/k2 nano/k2-fp8",
    "ask": "generate nano/k2 --prompt A0478+3= --max-new-tokens 12",
    "ask-int4": "generate nano/k2-int4 --prompt Rabcd= --max-new-tokens 12 --json",
    "ask-fp8": "generate nano/k2-fp8 --prompt Rabcd= --max-new-tokens 12 --json --dtype float32 --backend reference",
}

_QAT = {
    **{f"plan-{job}": f"qat plan qat/{job}.yaml" for job in ("int4", "fp8")},
    "plan-json": "qat plan qat/int4.yaml --json --processes 2",
    "train-int4": "qat train qat/int4.yaml",
    "train-fp8": "qat train qat/fp8.yaml --json",
    "train-adapters": "qat train qat/adapters.yaml",
    "resume-int4": "qat train qat/int4.yaml",
    "again-int4": "qat train qat/int4.yaml",
    "export-int4": "qat export qat/int4 qat/out-int4",
    "export-fp8": "qat export qat/fp8 qat/out-fp8 --to fp8 --json",
    "export-adapters": "qat export qat/adapters qat/out-adapters --shard-size 1MB",
    "export-again": "qat export qat/fp8 qat/out-fp8",
    "export-rounded": "qat export qat/fp8.yaml qat/out-rounded",
    "report-int4": "report qat/out-int4",
    "verify-fp8": "verify qat/out-rounded qat/out-fp8",
    "unknown-key": "qat train qat/unknown.yaml",
    "other-job": "qat train qat/other.yaml",
    "other-format": "qat export qat/fp8 qat/never --to int4",
    "no-run": "qat export nano/k2 qat/never",
}

GROUPS = (
    Group(name="nano", commands=tuple(called(_NANO))),
    Group(
        name="qat",
        commands=(
            *called(_QAT, {"resume-int4": lose_last_step}),
            Command("launched", ("-m", "k2quant.qat", "qat/control.yaml")),
            Command("launched-export", ("-m", "k2quant", "qat", "export", "qat/control", "qat/out-control")),
            Command("launched-wrongly", ("-m", "k2quant.qat", "--colour")),
        ),
        needs=("nano",),
        prepare=write_jobs,
    ),
)
