"""Rows of random tokens, of which some hold several texts and some padding, and a small model to be measured."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from k2quant.calib.collecting import memory
from k2quant.calib.inputs import Part, Samples
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.data.learning import Census
from tiny import write_model

LENGTH = 24


def rows(seed: int, count: int, vocabulary: int) -> Part:
    """Return rows of random tokens; the first holds two texts, the last one ends in padding."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (count, LENGTH), generator=draw)
    positions = torch.arange(LENGTH).repeat(count, 1)
    positions[0, 10:] -= 10
    real = torch.ones(count, LENGTH, dtype=torch.bool)
    real[-1, -5:] = False
    positions[-1, -5:] = 0
    digest = hashlib.sha256(tokens.numpy().tobytes() + positions.numpy().tobytes()).hexdigest()
    hashes = (hashlib.sha256(f"{seed}".encode()).hexdigest(),)
    return Part(tokens=tokens, positions=positions, real=real, hashes=hashes, digest=digest)


def samples(vocabulary: int, *, seed: int = 0, wanted: int = 12) -> Samples:
    """Return rows of all parts."""
    parts = [rows(3 * seed + number, count, vocabulary) for number, count in enumerate((12, 4, 2))]
    return Samples(
        train=parts[0],
        validation=parts[1],
        test=parts[2],
        wanted=wanted,
        duplicates=0,
        reasoning="split",
        census=Census(),
        unread="",
    )


@pytest.fixture(scope="session")
def drawn() -> Callable[..., Samples]:
    """Give the function that makes rows."""
    return samples


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A K2 of two layers in BF16, one of them with eight experts."""
    folder = tmp_path_factory.mktemp("tiny") / "K2-Tiny"
    write_model(folder)
    return open_checkpoint(folder)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pieces of a row and segments of two, so that even a small pass has several of each."""
    monkeypatch.setattr(memory, "PIECE_TOKENS", LENGTH)
    monkeypatch.setattr(memory, "SEGMENT_TOKENS", 2 * LENGTH)


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Give the function that returns every file of a folder, by its name below it."""
    return lambda folder: {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
