"""An export for mlx-lm of a model on a hub: the bytes of a local one, through faults and stops."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k2quant.checkpoint.reader import CONFIG, INDEX
from k2quant.checkpoint.remote import retrying
from k2quant.checkpoint.writing.destination import Destination
from k2quant.errors import CheckpointError
from k2quant.exports import export_mlx
from served.hub import Hub, hub

SHARD = 3_000_000


def shards(folder: Path) -> dict[str, bytes]:
    """Return what mlx-lm reads."""
    return {path.name: path.read_bytes() for path in (*folder.glob("model-*"), folder / CONFIG, folder / INDEX)}


@pytest.fixture
def server(k2_thinking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has the model, under its folder's name; nobody waits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    with hub(tmp_path / "hub") as made:
        made.repo(f"org/{k2_thinking.name}", k2_thinking)
        made.here(monkeypatch, "hf_known")
        monkeypatch.setattr(retrying, "pause", lambda _: None)
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
        yield made


def test_it_comes_over_the_network_through_faults_and_stops(
    server: Hub, k2_thinking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is dropped on the way, and wherever it stops, the shards are those of a local export of that commit."""
    address, there = f"hf://org/{k2_thinking.name}", tmp_path / "out"
    record = Destination.record
    done: list[str] = []

    def stop(self: Any, found: dict[str, Any]) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(found["shard"])
        record(self, found)

    fault = server.fault("drop", file="*.safetensors", nth=4, after=70_000, times=2)
    with monkeypatch.context() as patch:
        patch.setattr(Destination, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            export_mlx(address, there, workers=1, shard_size=SHARD)
    server.commit(f"org/{k2_thinking.name}", {"config.json": "{}"})
    export = export_mlx(address, there, shard_size=SHARD)
    assert fault.fired
    assert export.resumed == 2
    assert "with which" in "".join(export.report["remarks"])
    assert shards(there) == shards(export_mlx(k2_thinking, tmp_path / "local", shard_size=SHARD).folder)


def test_another_byte_ends_it(server: Hub, k2_thinking: Path, tmp_path: Path) -> None:
    """Bytes that are not those of the hub's digest never look finished."""
    server.fault("wrong", file="model-2-of-3.safetensors", nth=3)
    with pytest.raises(CheckpointError):
        export_mlx(f"hf://org/{k2_thinking.name}", tmp_path / "out")
    assert not (tmp_path / "out" / CONFIG).exists()
