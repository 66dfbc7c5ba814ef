"""Which GPU this is, with which software, and what it can do at most; it is measured first, all else is held to it."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from functools import partial
from importlib import metadata

import torch

from suites.common import machine
from suites.gpu.running import record
from suites.gpu.running.record import Entry, Record
from suites.gpu.running.stages import Setting
from suites.products import run as products_run

PACKAGES = ("torch", "triton", "transformers", "accelerate", "numba", "numpy", "safetensors", "peft")
PEERS = ("gemlite", "vllm", "deep_gemm", "flag_gems", "fbgemm_gpu", "torchao", "compressed_tensors")
"""What others have for these products; which of them can be imported is noted."""
LITTLE = 1 << 22
"""Bytes that a dry run copies."""


def run(kept: Record, setting: Setting) -> None:
    """Describe the machine, then measure its ceilings; each is on the disk at once."""
    settings = products_run.Settings(
        device=setting.device,
        seconds=0.5,
        rotate_bytes=LITTLE if setting.dry_run else products_run.rotate_bytes(setting.device),
    )
    kept.attempt("machine", partial(describe, settings))
    kept.attempt("ceilings", partial(measure, settings))


def describe(settings: products_run.Settings) -> Entry:
    """Return device, driver, versions and clocks."""
    facts = products_run.described(settings)
    facts["versions"] |= versions()
    facts["peers"] = [name for name in PEERS if importlib.util.find_spec(name)]
    facts["capability"] = list(torch.cuda.get_device_capability()) if settings.device == "cuda" else None
    box = facts["machine"]
    return {"outcome": record.PASSED, "said": box.get("gpu") or box["cpu"], "facts": facts}


def versions() -> dict[str, str]:
    """Return the versions of packages that are installed under the names they are imported by."""
    found = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def measure(settings: products_run.Settings) -> Entry:
    """Return bytes and operations a second, and clocks right after."""
    rates = products_run.ceilings(settings)
    after = machine.graphics() if settings.device == "cuda" else []
    said = ", ".join(f"{name} {rate:.4g}" for name, rate in rates.items() if isinstance(rate, float))
    return {"outcome": record.PASSED, "said": said, "ceilings": rates, "after": after}
