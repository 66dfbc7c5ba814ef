"""An export of a model on a hub: the bytes of a local one, through faults and stops."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k2quant.checkpoint.remote import retrying
from k2quant.errors import CheckpointError
from k2quant.exports import export_gguf
from k2quant.exports.gguf import writing
from served.hub import Hub, hub


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


@pytest.mark.parametrize("low_disk", [False, True])
def test_it_comes_over_the_network_through_faults(
    *, low_disk: bool, server: Hub, k2_thinking: Path, tmp_path: Path
) -> None:
    """Whatever is dropped on the way, the file is that of a local export, and nothing is left beside it."""
    local = export_gguf(k2_thinking, tmp_path / "local.gguf").file.read_bytes()
    fault = server.fault("drop", file="*.safetensors", nth=4, after=70_000, times=2)
    done = export_gguf(f"hf://org/{k2_thinking.name}", tmp_path / "k2.gguf", low_disk=low_disk)
    assert fault.fired
    assert done.file.read_bytes() == local
    assert done.report["source"]["address"].startswith(f"hf://org/{k2_thinking.name}@")
    assert not (tmp_path / "k2.gguf.partial").exists()


def test_a_stopped_one_goes_on_with_its_commit(
    server: Hub, k2_thinking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the branch has moved on meanwhile: that is said, and finished parts are not fetched again."""
    address, there = f"hf://org/{k2_thinking.name}", tmp_path / "k2.gguf"
    record = writing.Output.record
    parts: list[str] = []

    def stop(self: Any, found: dict[str, Any]) -> None:
        if len(parts) == 2:
            raise KeyboardInterrupt
        parts.append(found["shard"])
        record(self, found)

    with monkeypatch.context() as patch:
        patch.setattr(writing.Output, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            export_gguf(address, there, workers=1)
    server.commit(f"org/{k2_thinking.name}", {"config.json": "{}"})
    done = export_gguf(address, there)
    assert done.resumed == 2
    assert "with which" in "".join(done.report["remarks"])
    assert there.read_bytes() == export_gguf(k2_thinking, tmp_path / "local.gguf").file.read_bytes()


def test_another_byte_ends_it(server: Hub, k2_thinking: Path, tmp_path: Path) -> None:
    """Bytes that are not those of the hub's digest get no name."""
    server.fault("wrong", file="model-2-of-3.safetensors", nth=3)
    with pytest.raises(CheckpointError):
        export_gguf(f"hf://org/{k2_thinking.name}", tmp_path / "k2.gguf")
    assert not (tmp_path / "k2.gguf").exists()
