"""A checkpoint where fsspec looks: the same as its folder, and refused when it changes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import AsyncMock

import fsspec
import pytest

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.remote import bucket, retrying
from k2quant.checkpoint.remote.address import Address, parse
from k2quant.checkpoint.remote.opening import open_place
from k2quant.checkpoint.remote.retrying import Transient
from k2quant.errors import CheckpointError, MissingExtra, UsageError
from served.small import SHARDS

ADDRESS = "memory://shelf/tiny"


@pytest.fixture(autouse=True)
def store(model: Path) -> Iterator[fsspec.AbstractFileSystem]:
    """Return a store in memory that has the model."""
    found = fsspec.filesystem("memory")
    for path in model.rglob("*"):
        if path.is_file():
            found.pipe_file(f"/shelf/tiny/{path.relative_to(model)}", path.read_bytes())
    yield found
    found.rm("/shelf", recursive=True)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_store_is_opened_as_a_folder_is(scheme: str, model: Path, cache: Path) -> None:
    """The same tensors and bytes, small files in a cache of this version, and nothing of the shards on the disk."""
    address = parse(ADDRESS) if scheme == "memory" else Address("file", str(model))
    here, there = open_checkpoint(model), open_checkpoint(address)
    assert there.tensors == here.tensors
    assert all(read_tensor(there, entry) == read_tensor(here, entry) for entry in here.tensors.values())
    assert there.folder.parent == cache / "k2quant" / "places"
    assert not list(cache.rglob("*.safetensors"))
    assert (there.folder / "docs" / "notes.txt").read_text() == "notes"
    again = open_checkpoint(address)
    assert (again.folder, again.fingerprint()) == (there.folder, there.fingerprint())


def test_what_changed_since_is_not_read(store: fsspec.AbstractFileSystem, model: Path) -> None:
    """Neither a shard of another size nor one of the same; a new opening has the new one, in a cache of its own."""
    before = open_checkpoint(ADDRESS)
    entry = next(iter(before.tensors.values()))
    other = bytearray((model / SHARDS[0]).read_bytes())
    other[-1] ^= 1
    store.pipe_file(f"/shelf/tiny/{SHARDS[0]}", bytes(other))
    assert before.supply is not None
    with pytest.raises(CheckpointError, match=f"{ADDRESS}/{SHARDS[0]}: changed while it was read"):
        before.supply.place.read_into(SHARDS[0], entry.start, memoryview(bytearray(entry.nbytes)))
    store.pipe_file("/shelf/tiny/docs/notes.txt", b"others")
    after = open_checkpoint(ADDRESS)
    read_tensor(after, entry)
    assert after.folder != before.folder
    assert after.fingerprint() != before.fingerprint()
    store.rm(f"/shelf/tiny/{SHARDS[0]}")
    assert after.supply is not None
    with pytest.raises(CheckpointError, match="is not there"):
        after.supply.place.read_into(SHARDS[0], entry.start, memoryview(bytearray(entry.nbytes)))


def test_digests_come_from_the_report_of_a_conversion(
    store: fsspec.AbstractFileSystem, model: Path, tmp_path: Path
) -> None:
    """A store has none; where the report beside the shards has some, a file with another content is refused."""
    data = (model / SHARDS[0]).read_bytes()
    facts = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    store.pipe_file("/shelf/tiny/k2quant_report.json", json.dumps({"files": {SHARDS[0]: facts}}).encode())
    opened = open_checkpoint(ADDRESS)
    assert opened.supply is not None
    files = opened.supply.place.files
    assert (files[SHARDS[0]].sha256, files[SHARDS[1]].sha256) == (facts["sha256"], None)
    opened.supply.place.fetch(SHARDS[0], tmp_path / "shard", add=lambda _: None)
    assert (tmp_path / "shard").read_bytes() == data


def test_what_is_not_there_is_said() -> None:
    """An empty prefix, one without a checkpoint, and a store whose library is missing."""
    with pytest.raises(CheckpointError, match="memory://shelf/nothing: nothing is there"):
        open_place(parse("memory://shelf/nothing"))
    with pytest.raises(CheckpointError, match=r"memory://shelf: no checkpoint here.*tiny/config.json"):
        open_checkpoint("memory://shelf")
    with pytest.raises((MissingExtra, UsageError), match="abfs://"):
        open_place(parse("abfs://container/a"))


def test_who_has_no_credentials_is_told_so(tmp_path: Path) -> None:
    """The library's own error, which is none of the system's, becomes a line that says where they come from."""
    there = {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path), "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    command = [sys.executable, "-m", "k2quant", "inspect", "s3://nobody/none"]
    done = subprocess.run(command, env=kept | there, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "s3://nobody/none: may not be read, found Unable to locate credentials; credentials come from" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_store_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object whose bytes come one a minute is tried again, and not waited for to its end."""
    body = SimpleNamespace(read=AsyncMock(return_value=b"x"))
    answer = {"Body": AsyncMock(__aenter__=AsyncMock(return_value=body))}
    filesystem = SimpleNamespace(split_path=lambda _: ("b", "k", None), _call_s3=AsyncMock(return_value=answer))
    monkeypatch.setattr(retrying, "clock", iter(range(0, 10**9, 40)).__next__)
    with pytest.raises(Transient, match="too slowly"):
        asyncio.run(bucket._of_s3(filesystem, "b/k", "tag", 0, 2**24))  # noqa: SLF001
    assert body.read.await_count == 2


def test_what_a_library_of_a_store_logs_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """It logs a traceback of each try; who listens nowhere would have Python write that to the terminal."""
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: None)
    bucket.filesystem_of(parse("gs://bucket/x"))
    assert len(logging.getLogger("gcsfs").handlers) == 1
    bucket.filesystem_of(parse("gs://bucket/x"))
    assert len(logging.getLogger("gcsfs").handlers) == 1


def test_digests_of_a_report_are_taken_where_they_are_some(store: fsspec.AbstractFileSystem, model: Path) -> None:
    """In capitals too; what is no sha256, or is said of another size, says nothing of a file."""
    one, other = SHARDS
    data = (model / one).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    for said, size, known in ((digest.upper(), len(data), digest), ("zz", len(data), None), (digest, 1, None)):
        files = {one: {"sha256": said, "size": size}, other: 7, "../x": {"sha256": digest, "size": 1}}
        store.pipe_file("/shelf/tiny/k2quant_report.json", json.dumps({"files": files}).encode())
        place = open_place(parse(ADDRESS))
        place.folder(["k2quant_report.json"])
        assert [place.files[name].sha256 for name in SHARDS] == [known, None]
