"""Compile every shipped configuration of the GPU kernels without a GPU, and gate what the compiler reports.

    python benchmarks/kernels_aot.py                      # every table, one shape for each kernel: what CI runs
    python benchmarks/kernels_aot.py --all-shapes --out benchmarks/results/kernels-aot.json

A configuration passes when nothing spills, shared memory fits the GPU, the matrix instruction is the expected one
(mma.sync for tiles of fewer than 64 rows, wgmma or tcgen05 above on GPUs that have it), and ptxas does not say that it
serialises wgmma (C7515).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

os.environ["TRITON_INTERPRET"] = "0"

import triton

from k2quant.ground.release import HIDDEN, INNER
from k2quant.kernels.devices.launch import Launch
from k2quant.kernels.products.tables.configs import TABLES, Config, Product, Table, read_table
from k2quant.kernels.tuning.compiling import FP8_ARCH, compile_launch, rehearse, rehearse_codecs

SHAPES = [(18432, 7168), (7168, 18432), (7168, 8192), (16384, 512), (576, 7168), (12288, 1536), (1536, 7168)]
"""N and K of K2's dense weights; the first is the one that CI compiles."""

ODD = (200, 96)
"""N and K of a weight that lowers the depth of every tile to 32."""

SHARED_LIMIT = {80: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one program may use. The table `sm_80` also serves sm_86 and sm_89, which have 99 KB."""

HELPERS = ("_sum_splits", "_combine", "_count", "_place", "_quantize", "_activation_back")
"""Kernels that hardly depend on the configuration: one of each is enough."""

INT4_EXPONENT = "0x43004300"
"""What the assembly puts around INT4 codes, and around no others."""

WIDE_ROWS = 64
"""Rows of a tile from which the GPU's asynchronous matrix instruction is used."""

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class Build:
    """What came of compiling one kernel with one configuration for one architecture."""

    arch: int
    product: str
    shape: str
    config: dict[str, Any]
    kernel: str
    registers: int
    spilled: int
    shared: int
    instruction: str
    lop3: int
    conversions: int
    serialized: bool
    apart: bool
    """Whether words of INT4 codes that are unpacked together lie in different threads: silently wrong numbers."""
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel to compile, as plain data that another process can work on."""

    arch: int
    product: str
    shape: str
    config: Config
    number: int
    """Which of the launches of the product."""
    kernel: str


def main() -> int:
    """Compile, print a table, write results; return 3 if a gate says no."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all-shapes", action="store_true", help="every shape of K2, not one for each kernel")
    parser.add_argument("--arch", type=int, action="append", choices=(80, 90, 100), help="only this architecture")
    parser.add_argument("--out", type=Path, help="write a JSON file, and a table beside it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    tables = [read_table(path) for path in sorted(TABLES.glob("sm_*.json"))]
    cases = [
        case
        for table in tables
        if not options.arch or arch_of(table) in options.arch
        for case in cases_of(table, all_shapes=options.all_shapes)
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        builds = []
        for build in pool.map(compile_case, cases):
            builds.append(build)
            print(line(build), flush=True)
    if options.out:
        write(builds, options.out)
    bad = [build for build in builds if build.problems]
    print(f"{len(builds)} kernels compiled, {len(bad)} refused")
    for build in bad:
        print(f"  sm_{build.arch} {build.product} {build.shape} {build.config}: {'; '.join(build.problems)}")
    return 3 if bad else 0


def arch_of(table: Table) -> int:
    """Return 90 for the table `sm_90`."""
    return int(table.name.removeprefix("sm_"))


def cases_of(table: Table, *, all_shapes: bool) -> list[Case]:
    """Return what to compile for a table, each kernel once."""
    arch = arch_of(table)
    cases: dict[tuple[Any, ...], Case] = {}
    for number, launch in enumerate(rehearse_codecs(arch)):
        cases["codecs", number] = Case(arch, "codecs", "2048x7168", Config(), number, launch.kernel.__name__)
    for product, shapes in table.products.items():
        for shape, buckets in shapes.items():
            for config in {config for config in buckets.values() if config.form != "dequantize"}:
                for each in shapes_of(product, shape, all_shapes=all_shapes):
                    for number, launch in enumerate(launches(product, each, config, arch)):
                        name = launch.kernel.__name__
                        case = Case(arch, product, each, config, number, name)
                        cases.setdefault(kind_of(case, all_shapes=all_shapes), case)
    return list(cases.values())


def kind_of(case: Case, *, all_shapes: bool) -> tuple[Any, ...]:
    """Return what makes a case worth compiling beside others: without all shapes, one of each tile."""
    if case.kernel in HELPERS:
        return (case.kernel,)
    if all_shapes:
        return case.product, case.shape, case.config, case.number
    odd = case.shape == f"{ODD[0]}x{ODD[1]}"
    return case.product, replace(case.config, splits=1), case.kernel, case.number, odd


def shapes_of(product: str, shape: str, *, all_shapes: bool) -> list[str]:
    """Return the shapes `NxK` that stand for a table's entry."""
    if shape != "*":
        return [shape]
    if product.startswith(("gate_up", "down")):
        return [f"{INNER}x{HIDDEN}" if product.startswith("gate_up") else f"{HIDDEN}x{INNER}"]
    dense = [*SHAPES, ODD] if all_shapes else [SHAPES[0], ODD]
    return [f"{rows}x{columns}" for rows, columns in dense]


def launches(product: str, shape: str, config: Config, arch: int) -> list[Launch]:
    """Record what the host code of a product would launch, each kernel once."""
    if product == "codecs":
        return rehearse_codecs(arch)
    kind, weight_format = product.split("/")
    rows, columns = (int(part) for part in shape.split("x"))
    return rehearse(cast("Product", kind), weight_format, (rows, columns), config)


def compile_case(case: Case) -> Build:
    """Compile one kernel and read what ptxas says of it."""
    launch = launches(case.product, case.shape, case.config, case.arch)[case.number]
    # FP8 products run from sm_89 on, which uses the table of sm_80.
    case = replace(case, arch=max(case.arch, FP8_ARCH)) if case.product.startswith("w8a8") else case
    compiled = compile_launch(launch, case.arch)
    said, sass = assembled(compiled.asm["ptx"], case.arch)
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    build = Build(
        arch=case.arch,
        product=case.product,
        shape=case.shape,
        config={name: value for name, value in asdict(case.config).items() if value != getattr(Config(), name)},
        kernel=launch.kernel.__name__,
        registers=int(registers[1]) if registers else 0,
        spilled=int(spilled[1]) if spilled else 0,
        shared=compiled.metadata.shared,
        instruction=instruction_of(sass),
        lop3=len(re.findall(r"\bLOP3", sass)),
        conversions=len(re.findall(r"\b(?:I2F|F2F|I2FP|F2FP)", sass)),
        serialized="C7515" in said,
        apart=words_apart(compiled.asm["ttgir"]),
        problems=(),
    )
    return Build(**{**{name: getattr(build, name) for name in Build.__slots__}, "problems": problems_of(build, case)})


def problems_of(build: Build, case: Case) -> tuple[str, ...]:
    """Return what a gate has against a build."""
    wide = "wgmma" if build.arch == 90 else "tcgen05" if build.arch >= 100 else "mma.sync"
    expected = "none" if case.config.form == "vector" else wide if case.config.rows >= WIDE_ROWS else "mma.sync"
    if case.shape == f"{ODD[0]}x{ODD[1]}":
        expected = build.instruction  # a tile this small has too few warps for the wide instruction
    multiplies = build.kernel in {"_linear", "_vector", "_linear_w8a8", "_gate_up", "_down"}
    checks = {
        f"{build.spilled} bytes spilled": build.spilled > 0,
        f"{build.shared} bytes of shared memory, {SHARED_LIMIT[build.arch]} allowed": build.shared
        > SHARED_LIMIT[build.arch],
        f"expected {expected}, found {build.instruction}": multiplies and build.instruction != expected,
        "ptxas serialises wgmma (C7515)": build.serialized,
        "a thread does not hold both words that it unpacks": build.apart,
        "no register count: did ptxas fail?": build.registers == 0,
    }
    return tuple(text for text, holds in checks.items() if holds)


def assembled(ptx: str, arch: int) -> tuple[str, str]:
    """Return what ptxas says of a kernel, and its machine code as text."""
    suffix = "a" if arch >= 90 else ""
    ptxas = BIN / ("ptxas-blackwell" if arch >= 100 and (BIN / "ptxas-blackwell").exists() else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [str(ptxas), "-v", f"-arch=sm_{arch}{suffix}", str(source), "-o", str(binary)]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        if said.returncode:
            return said.stdout + said.stderr, ""
        sass = subprocess.run([str(BIN / "nvdisasm"), "-c", str(binary)], capture_output=True, text=True, check=False)
    return said.stdout + said.stderr, sass.stdout


def words_apart(ttgir: str) -> bool:
    """Return whether any INT4 words that inline assembly takes in pairs are not neighbours in one thread.

    The assembly works on registers, two at a time; whether these are neighbours along the last dimension is for the
    compiler's layout to say: at least two to a thread there, and that dimension first. Words of FP4 may be any two:
    each half of a result is of one word alone.
    """
    layouts = dict(re.findall(r"^(#\S+) = (.*)$", ttgir, re.MULTILINE))
    calls = [line for line in ttgir.splitlines() if "tt.elementwise_inline_asm" in line and INT4_EXPONENT in line]
    words = [re.findall(r": tensor<([\dx]+)xi32, (#\w+)>", line)[0] for line in calls]
    return not all(side_by_side(layouts[name], dimensions.count("x") + 1) for dimensions, name in words)


def side_by_side(layout: str, dimensions: int) -> bool:
    """Return whether registers 0 and 1 of a thread are neighbours along the last dimension."""
    if "#ttg.blocked" in layout:
        sizes, order = (numbers_of(layout, name) for name in ("sizePerThread", "order"))
        return sizes[-1] > 1 and order[0] == dimensions - 1
    first = re.search(r"register = \[\[([\d, ]+)\]", layout)
    return first is not None and [int(part) for part in first[1].split(",")] == [0] * (dimensions - 1) + [1]


def numbers_of(layout: str, name: str) -> list[int]:
    """Return the numbers of a layout's attribute."""
    found = re.search(rf"{name} = \[([\d, ]+)\]", layout)
    return [int(part) for part in found[1].split(",")] if found else []


def instruction_of(sass: str) -> str:
    """Return the kind of matrix instruction in machine code."""
    for pattern, name in ((r"\bUTC\w*MMA", "tcgen05"), (r"\b[HQ]GMMA", "wgmma"), (r"\b[HQ]MMA", "mma.sync")):
        if re.search(pattern, sass):
            return name
    return "none"


def line(build: Build) -> str:
    """Return one line for people."""
    verdict = "ok" if not build.problems else "REFUSED: " + "; ".join(build.problems)
    tile = "x".join(str(build.config.get(name, getattr(Config(), name))) for name in ("rows", "columns", "depth"))
    return (
        f"sm_{build.arch} {build.product:13} {build.shape:11} {build.kernel:16} {tile:11} {build.registers:4} registers"
        f" {build.shared:7} B shared  {build.instruction:8} {verdict}"
    )


def write(builds: list[Build], path: Path) -> None:
    """Write the results as JSON, and as a table in a Markdown file of the same name."""
    versions = {"triton": triton.__version__, "ptxas": version_of("ptxas")}
    path.write_text(json.dumps({"versions": versions, "builds": [asdict(build) for build in builds]}, indent=1) + "\n")
    rows = [
        "# Compiled without a GPU",
        "",
        f"Triton {versions['triton']}, ptxas {versions['ptxas']}. `{repeat(path)}` repeats it.",
        "Nothing here was run or timed.",
        "",
        "| arch | product | weight | kernel | tile | splits, warps, stages | registers | spilled | shared | unit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for build in builds:
        value = {name: build.config.get(name, getattr(Config(), name)) for name in asdict(Config())}
        launched = f"{value['splits']}, {value['warps']}, {value['stages']}"
        rows.append(
            f"| sm_{build.arch} | {build.product} | {build.shape} | {build.kernel.lstrip('_')} | "
            f"{value['rows']}x{value['columns']}x{value['depth']} | {launched} | "
            f"{build.registers} | {build.spilled} | {build.shared:,} | {build.instruction} |"
        )
    path.with_suffix(".md").write_text("\n".join(rows) + "\n")


def repeat(path: Path) -> str:
    """Return the command that makes this file."""
    return f"python benchmarks/kernels_aot.py --all-shapes --out benchmarks/results/{path.name}"


def version_of(tool: str) -> str:
    """Return the version of a tool that Triton brings."""
    said = subprocess.run([str(BIN / tool), "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", said)
    return found[1] if found else "unknown"


if __name__ == "__main__":
    sys.exit(main())
