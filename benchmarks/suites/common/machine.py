"""Say on what machine, with which versions and at which commit a benchmark ran."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = {
    "k2quant": ["numpy", "numba", "torch"],
    "peers": ["torch", "transformers", "compressed-tensors", "llmcompressor"],
}
"""Whose versions matter, in each environment."""
SMI = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,power.limit"
"""What nvidia-smi is asked."""
ASK = """
import importlib.metadata as metadata, json, platform, sys
found = {"Python": platform.python_version()}
found |= {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"] in sys.argv[1:]}
print(json.dumps(found))
"""


def versions(python: str, packages: list[str]) -> dict[str, str]:
    """Return the versions that an environment has of some packages."""
    answer = subprocess.run([python, "-c", ASK, *packages], check=True, capture_output=True).stdout
    found: dict[str, str] = json.loads(answer)
    return found


def git(*arguments: str) -> str:
    """Return what git says in this repository, or nothing where it fails or is missing."""
    program = shutil.which("git")
    if not program:
        return ""
    command = [program, "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()


def graphics() -> list[str]:
    """Return what nvidia-smi says of each GPU: see `SMI`."""
    program = shutil.which("nvidia-smi")
    if not program:
        return []
    command = [program, f"--query-gpu={SMI}", "--format=csv,noheader"]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip().splitlines()


def reason(error: BaseException) -> str:
    """Say in one line what went wrong, without folders of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' '.join(lines)}"
    return re.sub(r"(?:/[\w.@+-]+)+/([\w.@+-]+)", r"\1", text)[:300]


def disk(folder: Path) -> str:
    """Say on what kind of disk a folder lies, such as `ext4 on nvme0n1`."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    device, _, kind = max((item for item in mounts if folder.is_relative_to(item[1])), key=lambda item: len(item[1]))
    name = Path(device).name
    return f"{kind} on {name}" + (", a virtual disk" if name.startswith(("vd", "xvd")) else "")


def processor() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def facts(command: str, *code: str) -> dict[str, Any]:
    """Return the entries of a result that say where, with what and how it was measured.

    Args:
        command: repeats it.
        code: files and folders of the repository that are measured.
    """
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "versions": versions(sys.executable, ["torch", "transformers", "numpy"]),
        "commit": git("rev-parse", "--short", "HEAD") or "none",
        "dirty": bool(git("status", "--porcelain", "--", *code)),
        "command": command,
    }


def describe(workdir: Path, python: str, peers_python: str) -> dict[str, Any]:
    """Return the entries of a result that say where it comes from."""
    return {
        "machine": {
            "cpu": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "disk": disk(workdir),
            "load": os.getloadavg()[0],
        },
        "versions": {
            "k2quant": versions(python, PACKAGES["k2quant"]),
            "peers": versions(peers_python, PACKAGES["peers"]),
        },
        "commit": git("rev-parse", "--short", "HEAD") or "none",
        "dirty": bool(git("status", "--porcelain", "--", "k2quant", "kernels")),
    }
