"""A conversion from a hub that is killed or watched: what comes twice over the network, and what lies on the disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import k2quant
from k2quant.checkpoint.supply.stage import Stage
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.formats.known import FormatName
from served.hub import Hub, hub

NAME = "org/Kimi-K2-Small"
SHARDS, ROWS, WIDTH = 6, 128, 2048
APART = {"README.md", "k2quant_report.json"}
"""Files of an output that name the source."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of 1.6 MB in block-FP8."""
    folder = tmp_path_factory.mktemp("source") / "K2"
    random = np.random.default_rng(21)
    shards: dict[str, Shard] = {}
    for layer in range(SHARDS):
        shard: Shard = {}
        for expert in range(2):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                base = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
                codes = random.integers(0, 256, (ROWS, WIDTH), np.uint8)
                codes[codes & 0x7F == 0x7F] = 0
                shard[f"{base}.weight"] = ("F8_E4M3", codes)
                scale = random.random((ROWS // 128, WIDTH // 128), np.float32)
                shard[f"{base}.weight_scale_inv"] = ("F32", scale)
        shards[f"model-{layer + 1}-of-{SHARDS}.safetensors"] = shard
    write_checkpoint(folder, shards, {"model_type": "kimi_k2"})
    return folder


@pytest.fixture
def server(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has the model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    with hub(tmp_path / "hub") as made:
        made.repo(NAME, source)
        made.here(monkeypatch)
        yield made


def written(folder: Path) -> dict[str, bytes]:
    """The files of an output but those that name its source."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name not in APART}


def sent(server: Hub, file: str) -> int:
    """Bytes of a file that the hub has sent."""
    return sum(seen.sent for seen in server.seen if seen.kind == "content" and seen.file == file)


def test_after_a_kill_only_what_is_missing_comes(server: Hub, source: Path, tmp_path: Path) -> None:
    """Killed when some output shards stand, the same command fetches no shard again that only these needed."""
    there, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-m", "k2quant", "convert", "--to", "int4", "--workers", "1", f"hf://{NAME}", str(there)]
    gate = threading.Event()  # the hub holds the fifth shard back behind its header, so the sixth cannot stand either
    server.fault("then", file=f"model-5-of-{SHARDS}.safetensors", nth=2, times=None, then=gate.wait)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **server.environment()}, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + 300
            while len(list(there.glob("*.safetensors"))) < 3:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            gate.set()
    stand = sorted(there.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    assert len(stand) < SHARDS
    assert (there / "INCOMPLETE").exists()
    noted = [path.name for path in stand[:-1]]  # the last may have had its name and no line in the journal yet
    before = {name: sent(server, name) for name in noted}
    done = k2quant.convert(f"hf://{NAME}", there, "int4")
    assert done.resumed >= len(noted)
    for name in noted:  # its header is read anew, with what lies in its first megabyte
        assert sent(server, name) - before[name] <= 2**20 < (source / name).stat().st_size
    assert written(there) == written(k2quant.convert(source, tmp_path / "local", "int4").folder)


@pytest.mark.parametrize(("to", "most"), [("int4", 0), ("nvfp4", 2)])
def test_a_low_disk_holds_two_shards_at_most(
    to: FormatName, most: int, server: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more of the source lies on the disk whenever something is asked for or has come; of INT4, by ranges, nothing.

    Shards come and go with the stage's lock held, so what is counted with it was there at once.
    """
    there = tmp_path / "out"
    stage = there / ".k2quant" / "source"
    asked: list[int] = []
    come: list[int] = []
    fetch = Stage._fetch  # noqa: SLF001  the only place from which shards come

    def on_disk() -> int:
        return sum(path.stat().st_size for path in stage.iterdir()) if stage.exists() else 0

    def fetching(self: Stage, file: str) -> None:
        fetch(self, file)
        with self._change:
            come.append(on_disk())

    monkeypatch.setattr(Stage, "_fetch", fetching)
    if not most:
        server.fault("then", times=None, then=lambda: asked.append(on_disk()))
    k2quant.convert(f"hf://{NAME}", there, to, workers=4, low_disk=True)
    if most:
        assert len(come) >= SHARDS
        assert 0 < max(come) <= most * max(path.stat().st_size for path in source.glob("*.safetensors"))
    else:
        assert not come
        assert {*asked} == {0}
    assert not stage.exists()
    assert written(there) == written(k2quant.convert(source, tmp_path / "local", to).folder)


@pytest.mark.usefixtures("server")
def test_the_card_is_called_by_the_model_and_its_command_can_be_repeated(tmp_path: Path) -> None:
    """Neither title nor the folder of the command has an address in it; the source has, with its commit."""
    done = k2quant.convert(f"hf://{NAME}", tmp_path / "out", "int4")
    card, source = (done.folder / "README.md").read_text(), done.report["source_name"]
    assert "\n# Kimi-K2-Small-INT4\n" in card
    assert f"\nk2quant convert --to int4 --scope experts --grid moonshot {source} Kimi-K2-Small-INT4\n" in card
    assert source.startswith(f"hf://{NAME}@")
    assert f"\nbase_model: {NAME}\n" in card
