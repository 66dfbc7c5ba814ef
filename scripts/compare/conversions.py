"""Commands on checkpoints: the demo, conversions, merges, and what describes, compares and draws them."""

from __future__ import annotations

from compare.commands import Group, called
from compare.inputs import damage_conversion, write_adapters

_SOURCES = {"bf16": "demo/fp8-bf16", "fp8": "demo/fp8", "int4": "demo/fp8-int4"}

_NINE = {
    f"{source}-{to}": f"convert --to {to} {folder} convert/{source}-{to}" + (" --sha256" if to == "int4" else "")
    for source, folder in _SOURCES.items()
    for to in _SOURCES
}

_CONVERSIONS = {
    **_NINE,
    "grid": "convert --to int4 --grid compressed-tensors demo/fp8-bf16 convert/grid",
    "grid-fp8": "convert --to int4 --grid compressed-tensors demo/fp8 convert/grid-fp8 --json",
    "grid-back": "convert --to bf16 convert/grid convert/grid-back",
    "grid-moonshot": "convert --to int4 --grid moonshot convert/grid convert/grid-moonshot",
    "linear": "convert --to int4 --scope linear demo/fp8-bf16 convert/linear --workers 1",
    "experts": "convert --to fp8 --scope experts demo/fp8-bf16 convert/experts",
    "ignore": "convert --to int4 --scope linear --ignore 'q_a_proj|kv_a_proj' demo/fp8-bf16 convert/ignore",
    "ignore-two": r"convert --to fp8 --ignore '1\.mlp\.experts' --ignore 'layers\.2' demo/fp8-int4 convert/ignore-two",
    "shards": "convert --to int4 --shard-size 1MB --sha256 demo/fp8 convert/shards --workers 3",
    "one-shard": "convert --to bf16 --shard-size 1GiB demo/fp8 convert/one-shard --json",
    "again": "convert --to int4 --sha256 demo/fp8 convert/fp8-int4",
    "again-json": "convert --to int4 --shard-size 1MB --sha256 demo/fp8 convert/shards --json",
    "restart": "convert --to fp8 demo/fp8-int4 convert/grid-back --restart --sha256",
    "dry": "convert --dry-run --to int4 demo/fp8 convert/never",
    "dry-json": "convert --dry-run --to fp8 demo/fp8-bf16 convert/never --json --workers 2",
    "dry-grid": "convert --dry-run --to int4 --grid compressed-tensors --scope linear demo/fp8 convert/never --json",
    "dry-copied": "convert --dry-run --to int4 --shard-size 3MB demo/fp8-int4 convert/never",
    "dry-finished": "convert --dry-run --to int4 --sha256 demo/fp8 convert/fp8-int4 --json",
}

_INSPECTED = {
    **_SOURCES,
    "grid": "convert/grid",
    "linear": "convert/linear",
    "experts": "convert/experts",
    "nano": "demo/nano",
}

_VERIFIED = {
    "bf16-int4": "verify demo/fp8-bf16 convert/bf16-int4",
    "fp8-bf16": "verify demo/fp8 convert/fp8-bf16 --workers 1",
    "int4-fp8": "verify demo/fp8-int4 convert/int4-fp8",
    "grid": "verify demo/fp8-bf16 convert/grid",
    "linear-json": "verify demo/fp8-bf16 convert/linear --json",
    "fp8-int4-json": "verify demo/fp8 convert/fp8-int4 --json",
    "checksums": "verify --checksums convert/fp8-int4",
    "checksums-json": "verify --checksums convert/shards --json",
    "against": "verify demo/fp8 convert/fp8-int4 --against convert/fp8-int4/k2quant_report.json",
    "against-worse": "verify demo/fp8 convert/grid-fp8 --against convert/fp8-int4/k2quant_report.json",
    "other": "verify demo/fp8 demo/nano",
    "damaged": "verify demo/fp8 verify/damaged",
    "damaged-checksums": "verify --checksums verify/damaged --json",
    "diff-none": "diff demo/fp8-int4 convert/shards",
    "diff-formats": "diff demo/fp8 demo/fp8-int4",
    "diff-damaged": "diff convert/fp8-int4 verify/damaged",
    "diff-json": "diff convert/fp8-int4 verify/damaged --json --workers 1",
    "diff-grids": "diff convert/grid convert/bf16-int4",
}

_MERGED = {
    **{
        f"{name}-{name}": f"merge {folder} merge/linears merge/{name}-{name} --to {name}"
        for name, folder in _SOURCES.items()
    },
    "fp8-int4": "merge demo/fp8 merge/linears merge/fp8-int4 --to int4 --scope linear --json",
    "int4-bf16": "merge demo/fp8-int4 merge/fused merge/int4-bf16 --to bf16 --sha256",
    "bf16-fp8": "merge demo/fp8-bf16 merge/fused merge/bf16-fp8 --to fp8 --shard-size 2MB",
    "bf16-grid": "merge demo/fp8-bf16 merge/fused merge/bf16-grid --to int4 --grid compressed-tensors",
    "again": "merge demo/fp8-bf16 merge/fused merge/bf16-fp8 --to fp8 --shard-size 2MB",
    "dry": "merge demo/fp8 merge/linears merge/never --to int4 --dry-run",
    "dry-json": "merge demo/fp8 merge/fused merge/never --to fp8 --dry-run --json",
    "dora": "merge demo/fp8 merge/dora merge/never --to fp8",
    "astray": "merge demo/nano merge/linears merge/never --to fp8",
    "no-adapter": "merge demo/fp8 demo/fp8 merge/never --to fp8",
}

DEMO = Group(name="demo", commands=tuple(called({"demo": "demo demo --steps 2"})))

GROUPS = (
    Group(name="convert", commands=tuple(called(_CONVERSIONS)), needs=("demo",)),
    Group(
        name="inspect",
        commands=tuple(
            called(
                {
                    f"{name}{suffix}": f"inspect {folder}{option}"
                    for name, folder in _INSPECTED.items()
                    for suffix, option in {"": "", "-json": " --json"}.items()
                }
            )
        ),
        needs=("demo", "convert"),
    ),
    Group(name="verify", commands=tuple(called(_VERIFIED)), needs=("demo", "convert"), prepare=damage_conversion),
    Group(name="merge", commands=tuple(called(_MERGED)), needs=("demo",), prepare=write_adapters),
    Group(
        name="report",
        commands=tuple(
            called(
                {
                    **{
                        name: f"report convert/{name} -o report/{name}.html"
                        for name in ("fp8-int4", "bf16-fp8", "int4-bf16", "grid", "ignore", "shards")
                    },
                    "merged": "report merge/fp8-int4 -o report/merged.html",
                    "in-place": "report merge/bf16-fp8",
                }
            )
        ),
        needs=("demo", "convert", "merge"),
    ),
)
