"""A checkpoint, the hub that has it, and waits that take no time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from k2quant.checkpoint.remote import retrying
from served.hub import Hub, hub
from served.small import write_small


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small checkpoint, not to be changed."""
    return write_small(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def server(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Return a hub that has the model as `org/tiny`, and that this process takes for its own."""
    with hub(tmp_path / "hub") as made:
        made.repo("org/tiny", model)
        made.here(monkeypatch)
        yield made


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the seconds that were to be waited; nobody waits."""
    found: list[float] = []
    monkeypatch.setattr(retrying, "pause", found.append)
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the user's caches, an empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches"
