"""Small checkpoints that many tests convert."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from k2quant.demo import write_k2


def pytest_configure() -> None:
    """Have Triton interpret its kernels where there is no GPU; it looks at this once, when it is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


ON_ANY_DEVICE = ("test_linear_triton", "test_w8a8_triton", "test_moe_triton", "test_codecs_triton")
"""Files whose tests run on a GPU where there is one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count tests that would run on a GPU among those that `-m gpu` asks for."""
    if torch.cuda.is_available():
        for item in items:
            if item.path.stem in ON_ANY_DEVICE:
                item.add_marker("gpu")


@pytest.fixture(scope="session")
def k2_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small K2-Instruct: block FP8, three shards, 160-row kv_a, scales astray. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("k2") / "Kimi-K2-Small"
    write_k2(folder)
    return folder


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """A folder for many small files: in memory where the machine has such a place, so that fsync costs nothing."""
    shared = Path("/dev/shm")  # noqa: S108  a fresh folder of our own is made in it
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="k2quant-", dir=shared) as folder:
        yield Path(folder)
