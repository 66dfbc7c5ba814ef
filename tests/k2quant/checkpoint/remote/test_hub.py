"""A checkpoint on a hub: opened by its small files and headers, read by range, at one commit."""

from __future__ import annotations

import json
import os
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

from k2quant.checkpoint.beside import other_files
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.reading import check_constants, read_tensor
from k2quant.checkpoint.remote import fetching, ranges, retrying
from k2quant.checkpoint.remote.address import parse
from k2quant.checkpoint.remote.opening import open_place
from k2quant.checkpoint.remote.retrying import TRIES, WORTH
from k2quant.checkpoint.weights import group_tensors
from k2quant.checkpoint.writing.in_memory import write_checkpoint
from k2quant.errors import CheckpointError, MalformedFile, ShapeMismatch, UnsafePath, UsageError
from served.hub import Hub
from served.repos import Blob
from served.small import SHARDS

ADDRESS = "hf://org/tiny"
PATTERN = "*.safetensors"
TOKEN = "hf_abcdefghijkl"  # noqa: S105  nobody's


def tensors(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return what a checkpoint's tensors hold."""
    return {name: read_tensor(checkpoint, entry) for name, entry in checkpoint.tensors.items()}


def whole(name: str = SHARDS[1]) -> bytes:
    """Return a file of the model as the hub gives it."""
    place = open_place(parse(ADDRESS))
    data = bytearray(place.files[name].size)
    place.read_into(name, 0, memoryview(data))
    return bytes(data)


def test_a_model_is_opened_as_its_folder_is(server: Hub, model: Path) -> None:
    """The same tensors, config, files beside them and bytes; no shard came whole, and none lies here."""
    here, there = open_checkpoint(model), open_checkpoint(ADDRESS)
    assert there.tensors == here.tensors
    assert (there.config, there.config_bytes()) == (here.config, here.config_bytes())
    assert other_files(there) == other_files(here)
    assert tensors(there) == tensors(here)
    assert str(there.place) == f"{ADDRESS}@{server.repos['org/tiny'].branches['main']}"
    assert there.rate is not None
    assert not list(server.home.rglob(PATTERN))
    assert repr(there).startswith("Checkpoint(")


def test_a_branch_that_moves_is_read_at_the_commit_that_it_had(server: Hub, model: Path) -> None:
    """Another shard of the same name comes in between: bytes are those that were listed; a new opening has the new."""
    before = open_checkpoint(ADDRESS)
    other = bytearray((model / SHARDS[0]).read_bytes())
    other[-1] ^= 1
    server.commit("org/tiny", {SHARDS[0]: bytes(other)})
    assert tensors(before) == tensors(open_checkpoint(model))
    after = open_checkpoint(ADDRESS)
    assert tensors(after) != tensors(before)
    assert after.fingerprint() != before.fingerprint()
    assert open_checkpoint(str(before.place)).fingerprint() == before.fingerprint()


def test_the_token_goes_to_the_hub_alone(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sent to the hub, from wherever its login keeps it, and to no other host, wherever redirects lead."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.token = TOKEN
    server.fault("elsewhere", file=PATTERN)
    tensors(open_checkpoint(ADDRESS))
    assert {seen.token for seen in server.seen if seen.host == "hub"} == {f"Bearer {TOKEN}"}
    others = [seen for seen in server.seen if seen.host != "hub"]
    assert {seen.host for seen in others} == {"cdn", "other"}
    assert all(seen.token is None for seen in others)


def test_a_redirect_is_remembered_until_it_expires(server: Hub) -> None:
    """The hub is asked once for each shard; when the signed address is not good any more, once again."""
    opened = open_checkpoint(ADDRESS)
    assert opened.supply is not None
    place, size = opened.supply.place, opened.shards[SHARDS[0]].size

    def read() -> bytes:
        found = bytearray(size)
        place.read_into(SHARDS[0], 0, memoryview(found))
        return bytes(found)

    def asked() -> int:
        return sum(seen.host == "hub" and seen.file == SHARDS[0] for seen in server.seen)

    first = read()
    assert asked() == 1
    server.expire()
    assert read() == read() == first
    assert asked() == 2


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "drop", "after": 1000, "times": 3},
        {"kind": "status", "status": 503, "times": 2},
        {"kind": "status", "status": 429, "headers": {"Retry-After": "3"}},
        {"kind": "html"},
        {"kind": "bare"},
        {"kind": "whole", "nth": 2},
        {"kind": "shifted"},
    ],
    ids=lambda fault: fault["kind"] + str(fault.get("status", "")),
)
def test_what_passes_costs_a_wait(fault: dict[str, object], server: Hub, model: Path, waits: list[float]) -> None:
    """Whatever went wrong for a moment, the bytes are those of the file, and where nothing came it was waited."""
    server.fault(str(fault.pop("kind")), file=SHARDS[1], **fault)
    begin, rest = 5000, whole()[5000:]
    assert rest == (model / SHARDS[1]).read_bytes()[begin:]
    if fault.get("status") == 429:
        assert waits == [3]


def test_a_server_that_drips_is_given_up(server: Hub, waits: list[float]) -> None:
    """A byte is not worth eight more tries; it is not asked for again either."""
    server.fault("drop", file=SHARDS[1], after=1, times=None)
    with pytest.raises(CheckpointError, match="tried 8 times, found an answer that ended after 1 bytes"):
        whole()
    assert len(waits) == TRIES - 1
    asked = [seen.range for seen in server.seen if seen.fault == "drop"]
    assert [str(each).split("-")[0] for each in asked] == [f"bytes={number}" for number in range(TRIES)]


@pytest.mark.parametrize(("count", "taken"), [(1000, 2000), (WORTH, 10 * WORTH)])
def test_an_answer_is_left_when_a_minute_brings_too_little(
    count: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came of it is kept; one that brings enough is read to its end, however long that takes."""
    monkeypatch.setattr(retrying, "clock", iter(range(0, 10**9, 40)).__next__)
    answer = SimpleNamespace(iter_raw=lambda: repeat(bytes(count), 10))
    assert ranges._fill(answer, memoryview(bytearray(20 * WORTH))) == taken  # noqa: SLF001


@pytest.mark.parametrize("kind", ["shrink", "grow"])
def test_a_file_of_another_size_is_refused(kind: str, server: Hub, model: Path) -> None:
    """One that ends early or went on is not the one that was listed."""
    server.fault(
        kind, file=SHARDS[1], size=(model / SHARDS[1]).stat().st_size + (9 if kind == "grow" else -9), times=None
    )
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors: (changed while|cannot be reached)"):
        whole()


def test_redirects_end(server: Hub) -> None:
    """A hub that redirects for ever is an error, not a loop."""
    server.fault("loop", file=PATTERN, times=None)
    with pytest.raises(CheckpointError, match=r"redirects without end|cannot be reached"):
        whole()


@pytest.mark.parametrize("location", ["http://127.0.0.1:99999/x", "http://[x/", "file:///etc/passwd", ""])
def test_redirects_that_lead_nowhere_are_refused(location: str) -> None:
    """No port or host that none can be, and nothing but a server, ends in anything but a line."""
    with pytest.raises(CheckpointError, match="a redirect that leads nowhere"):
        ranges._next("http://127.0.0.1/a", location, "hf://org/name/file")  # noqa: SLF001  a server cannot be asked for all


def test_a_whole_file_is_fetched_checked_and_resumed(server: Hub, model: Path, tmp_path: Path) -> None:
    """It is there with the right digest, or not there; what came of it is not asked for again."""
    place, target = open_place(parse(ADDRESS)), tmp_path / "shard"
    came: list[int] = []
    server.fault("wrong", file=SHARDS[0])
    with pytest.raises(MalformedFile, match="the content is not what the place says"):
        place.fetch(SHARDS[0], target, add=came.append)
    assert not list(tmp_path.glob("shard*"))
    place.fetch(SHARDS[0], target, add=came.append)
    assert target.read_bytes() == (model / SHARDS[0]).read_bytes()
    assert sum(came) == 2 * target.stat().st_size
    assert [path.name for path in tmp_path.glob("shard*")] == ["shard"]


@pytest.mark.parametrize("known", [True, False])
def test_what_lay_there_is_taken_as_far_as_it_is_sure(
    *, known: bool, server: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A digest tells zeros of a power cut; without one only what was pushed to the disk counts."""
    monkeypatch.setattr(fetching, "_PIECE", 1000)
    monkeypatch.setattr(fetching, "_SYNCED", 4000)
    pushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda of: pushed.append(os.fstat(of).st_size))
    place, target = open_place(parse(ADDRESS)), tmp_path / "shard"
    if not known:
        place.files = {SHARDS[0]: place.files[SHARDS[0]]._replace(sha256=None)}  # type: ignore[misc]
    data, came = (model / SHARDS[0]).read_bytes(), list[int]()
    partial = fetching.partial_path(target, place.files[SHARDS[0]])
    partial.write_bytes(data[:5000] + bytes(2500))
    sure = 4000
    if known:
        partial.write_bytes(data[:7500])
        sure = 7000
    place.fetch(SHARDS[0], target, add=came.append)
    assert target.read_bytes() == data
    assert sum(came) == len(data) - sure
    assert [size for size in pushed if size % 4000 == 0][:2] == ([] if known else [8000, 12000])
    assert server.seen


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("hf://org/nothing", "not found on the hub: misspelt, or private"),
        ("hf://org/tiny@nowhere", "the hub knows no such revision"),
        ("hf://org/gated", "accept it at"),
        ("hf://org/hidden", "hf auth login"),
    ],
)
def test_a_refusal_says_what_to_do(address: str, said: str, server: Hub) -> None:
    """Each in words of its own, with the address."""
    server.token = TOKEN
    server.repo("org/gated", {"config.json": "{}"}, gated=True)
    server.repo("org/hidden", {"config.json": "{}"}, private=True)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(address)
    assert str(caught.value).startswith(address)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("siblings", "error"),
    [
        ([{"rfilename": "../x", "size": 1, "blobId": "a"}], UnsafePath),
        ([{"rfilename": "/x", "size": 1, "blobId": "a"}], UnsafePath),
        ([{"rfilename": "a\u202eb", "size": 1, "blobId": "a"}], UnsafePath),
        ([{"rfilename": "x", "size": -1, "blobId": "a"}], MalformedFile),
        ([{"rfilename": "x", "size": 2**60, "blobId": "a"}], CheckpointError),
        ([{"rfilename": "x", "size": 1, "blobId": "a", "lfs": {"sha256": "short", "size": 1}}], MalformedFile),
        ([{"rfilename": f"{number}", "size": 1, "blobId": "a"} for number in range(100_001)], CheckpointError),
        ("none", MalformedFile),
    ],
    ids=["up", "root", "marks", "negative", "huge", "digest", "many", "kind"],
)
def test_a_hostile_listing_is_refused(siblings: object, error: type[Exception], server: Hub) -> None:
    """Before a file is asked for."""
    body = json.dumps({"sha": "0" * 40, "siblings": siblings}).encode()
    server.fault("status", on="info", status=200, body=body, headers={"Content-Type": "application/json"})
    with pytest.raises(error):
        open_checkpoint(ADDRESS)
    assert not [seen for seen in server.seen if seen.kind == "content"]


def test_no_tag_of_a_server_becomes_a_path(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files lie in the hub's cache by commit and name, where its library finds them; an ETag leads nowhere."""
    evil = tmp_path / "evil"
    monkeypatch.setattr(Blob, "etag", property(lambda _: str(evil)))
    opened = open_checkpoint(ADDRESS)
    assert not list(tmp_path.glob("evil*"))
    commit = server.repos["org/tiny"].branches["main"]
    assert try_to_load_from_cache("org/tiny", "config.json", revision=commit) == str(opened.folder / "config.json")
    assert not list(opened.folder.parents[1].glob("tmp*"))


def test_what_was_downloaded_before_is_read_here(server: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard in the hub's cache is not asked for; offline the whole model is read there, as the same source."""
    online = open_checkpoint(ADDRESS).fingerprint()
    snapshot_download("org/tiny")
    server.seen.clear()
    opened = open_checkpoint(ADDRESS)
    assert tensors(opened) == tensors(open_checkpoint(model))
    assert opened.fingerprint() == online
    assert not [seen for seen in server.seen if seen.kind == "content"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.seen.clear()
    assert open_checkpoint(ADDRESS).fingerprint() == online
    assert not server.seen
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids"):
        open_checkpoint("hf://org/other")


def test_weights_that_the_index_does_not_name_are_named(server: Hub) -> None:
    """They are not fetched, and no secret of the conversion either: `left_out` has them."""
    server.commit("org/tiny", {"extra.safetensors": b"x" * 100, "old/pytorch_model.bin": b"y", ".hidden": "z"})
    opened = open_checkpoint(ADDRESS)
    assert set(other_files(opened).left_out) == {"extra.safetensors", "old/pytorch_model.bin"}
    assert not (opened.folder / ".hidden").exists()


@pytest.mark.usefixtures("server")
def test_a_password_in_the_address_of_a_hub_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some hubs stand behind a gate of their own, whose key HF_ENDPOINT has; a remedy names the page without it."""
    monkeypatch.setattr(constants, "ENDPOINT", constants.ENDPOINT.replace("//", "//user:sesame@"))
    open_place(parse(ADDRESS))
    with pytest.raises(CheckpointError, match="look at http://") as refused:
        open_place(parse("hf://org/nothing"))
    assert "sesame" not in str(refused.value)


@pytest.mark.usefixtures("server")
def test_a_proxy_that_nothing_can_use_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheme that no library knows, or SOCKS without its package: a line, without the proxy's password."""
    monkeypatch.setenv("ALL_PROXY", "strange://user:sesame@host:1")
    with pytest.raises(UsageError, match=r"a proxy of the environment.*cannot be used") as refused:
        open_place(parse(ADDRESS))
    assert "sesame" not in str(refused.value)


def test_another_byte_in_a_small_file_is_found_out(server: Hub, model: Path) -> None:
    """What git itself holds has git's id: a config of the right size and another content is refused, and comes anew."""
    server.fault("wrong", file="config.json")
    with pytest.raises(MalformedFile, match=r"config\.json: the content is not what .* expected git's id [0-9a-f]{40}"):
        open_checkpoint(ADDRESS)
    assert open_checkpoint(ADDRESS).config == open_checkpoint(model).config


def test_constants_of_an_int4_come_alone(server: Hub, tmp_path: Path) -> None:
    """Eight bytes of each weight, from wherever they lie in the shard; a wrong one is named as it is of a folder."""
    tensors: dict[str, tuple[str, Any]] = {}
    for number, rows in enumerate((8, 8, 9, 8)):
        base = f"model.layers.1.mlp.experts.{number}.up_proj.weight"
        tensors[f"{base}_packed"] = "I32", np.zeros((8, 2**12), np.int32)
        tensors[f"{base}_scale"] = "BF16", np.zeros((8, 2**10), np.uint16)
        tensors[f"{base}_shape"] = "I32", np.array([rows, 2**15], np.int32)
    config = {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}
    write_checkpoint(tmp_path / "int4", {SHARDS[0]: tensors}, {"model_type": "kimi_k2", **config})
    server.repo("org/int4", tmp_path / "int4")
    opened = open_checkpoint("hf://org/int4")
    assert opened.supply is not None
    weights, _ = group_tensors(opened.tensors)
    before = opened.supply.traffic
    check_constants(opened, weights[:2])
    assert opened.supply.traffic == before + 16
    with pytest.raises(ShapeMismatch, match=r"experts\.2\.up_proj\.weight_shape.*expected.*8, 32768.*found.*9, 32768"):
        check_constants(opened, weights)
