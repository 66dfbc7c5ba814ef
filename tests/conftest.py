"""Small checkpoints that many tests convert."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.conversion.convert import convert
from k2quant.formats.dtypes import TensorSpec, as_array
from k2quant.nano.demo import K2_CONFIG, write_k2

# A slow machine is no error: without this, a busy one fails tests whose examples take long to make, or to run.
settings.register_profile(
    "slow machines", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("slow machines")


def pytest_configure(config: pytest.Config) -> None:
    """Have Triton interpret its kernels where there is no GPU; it looks at this once, when it is imported.

    And forget how wide a terminal is: processes of xdist say 80 columns, where output is read by a test. And hear
    Ctrl-C, which tests send: a shell that starts them in the background has it ignored, here and in all they start.
    And have xdist give files out in our order: by itself it begins with those of most tests, which are short ones.
    """
    config.option.loadscopereorder = False
    os.environ.pop("COLUMNS", None)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


THREADS = torch.get_num_threads()


@pytest.fixture(scope="module", autouse=True)
def as_many_threads() -> None:
    """Begin each file with the threads that torch began with: sums of another number of them differ in their last bits.

    A file before may have left one.
    """
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep notes of digests out of the home of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("caches")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


ON_ANY_DEVICE = (
    "products/test_linear_triton",
    "products/test_w8a8_triton",
    "products/test_moe_triton",
    "codecs/test_powers_of_two",
    "codecs/test_triton",
    "fp4/test_fp4_triton",
)
"""Files of tests/arithmetic whose tests run on a GPU where there is one."""


LONGEST = (
    "documents/test_commands",
    "documents/test_readme",
    "eval/gating/test_gate",
    "examples/test_qat",
    "qat/training/test_processes",
    "qat/training/test_train",
)
"""Files of tests that take longest, each about a minute."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files: one that begins last is waited for by the other process, which has no more to do.

    And count tests that would run on a GPU among those that `-m gpu` asks for.
    """
    items.sort(key=lambda item: not str(item.path.with_suffix("")).endswith(LONGEST))
    if torch.cuda.is_available():
        for item in items:
            if str(item.path.with_suffix("")).endswith(ON_ANY_DEVICE):
                item.add_marker("gpu")


@pytest.fixture(scope="session")
def k2_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small K2-Instruct: block FP8, three shards, 160-row kv_a, scales astray. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("k2") / "Kimi-K2-Small"
    write_k2(folder)
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run a file's models on one thread: those that are small enough are faster so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def sketched() -> Iterator[pytest.MonkeyPatch]:
    """Have the pictures of pages drawn by our code, and not set by matplotlib, which takes most of a small run's time.

    For files that look at no picture; `undo` has them set after all.
    """

    def savefig(_figure: object, file: TextIO, **_options: object) -> None:
        file.write("<svg><defs></defs></svg>")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", savefig)
        yield patch


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """A folder for many small files: in memory where the machine has such a place, so that fsync costs nothing."""
    shared = Path("/dev/shm")  # noqa: S108  a fresh folder of our own is made in it
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="k2quant-", dir=shared) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def k2_bf16(k2_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small K2 in BF16."""
    return convert(k2_source, tmp_path_factory.mktemp("bf16") / "K2-BF16", to="bf16").folder


@pytest.fixture(scope="session")
def k2_thinking(k2_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small K2-Thinking: INT4 experts, everything else BF16."""
    return convert(k2_source, tmp_path_factory.mktemp("int4") / "K2-INT4", to="int4").folder


@pytest.fixture(scope="session")
def k25(k2_thinking: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small K2.5: the same below `language_model.`, with a vision tower and a projector, config in `text_config`."""
    folder = tmp_path_factory.mktemp("k25") / "K2.5"
    source = open_checkpoint(k2_thinking)
    shards: dict[str, Shard] = {}
    for name, (dtype, array) in _tensors(source).items():
        if not name.endswith("inv_freq"):
            shards.setdefault(source.tensors[name].file, {})[f"language_model.{name}"] = (dtype, array)
    ones = np.full((64, 32), 0x3F80, np.uint16)
    shards["model-vision.safetensors"] = {
        "mm_projector.proj.0.weight": ("BF16", ones),
        "vision_tower.encoder.blocks.0.wqkv.weight": ("BF16", ones),
    }
    text = dict(source.config or {})
    text.pop("architectures")
    config = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": text}
    write_checkpoint(folder, shards, config)
    return folder


@pytest.fixture(scope="session")
def k2_mixed(k2_source: Path, k2_thinking: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """INT4 experts beside FP8 attention, made by hand: the suffixes of the tensors alone say so."""
    folder = tmp_path_factory.mktemp("mixed") / "K2-Mixed"
    experts = {name: t for name, t in _tensors(open_checkpoint(k2_thinking)).items() if ".mlp.experts." in name}
    rest = {name: t for name, t in _tensors(open_checkpoint(k2_source)).items() if ".mlp.experts." not in name}
    write_checkpoint(folder, {"model.safetensors": experts | rest}, K2_CONFIG)
    return folder


def _tensors(checkpoint: Checkpoint) -> Shard:
    """Return all tensors of a small checkpoint."""
    return {
        name: (entry.dtype, as_array(np.frombuffer(read_tensor(checkpoint, entry), np.uint8), entry_spec(entry)))
        for name, entry in checkpoint.tensors.items()
    }


def entry_spec(entry: TensorEntry) -> TensorSpec:
    """Return dtype and shape of a tensor."""
    return TensorSpec(entry.dtype, entry.shape)
