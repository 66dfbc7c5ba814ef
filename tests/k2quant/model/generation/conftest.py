"""The two files of a made tokenizer of K2's kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_files import merged_ranks, write_files


@pytest.fixture(scope="session")
def ranks() -> dict[bytes, int]:
    """The ranks of the made tokenizer."""
    return merged_ranks()


@pytest.fixture
def kimi(ranks: dict[bytes, int], tmp_path: Path) -> Path:
    """A folder with the two files of the made tokenizer."""
    folder = tmp_path / "kimi"
    folder.mkdir()
    write_files(folder, ranks)
    return folder
