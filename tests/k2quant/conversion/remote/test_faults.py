"""A conversion from a hub on which things go wrong: each ends in the bytes of a local one, or in one clear line."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import k2quant
from k2quant.checkpoint.remote import retrying
from k2quant.checkpoint.remote.hub import HubPlace
from k2quant.cli import main
from k2quant.errors import CheckpointError, K2QuantError
from k2quant.ground import pool
from served.hub import Hub, hub

NAME = "org/Kimi-K2-Small"
SHARD = "model-2-of-3.safetensors"
APART = {"README.md", "k2quant_report.json"}
"""Files of an output that name the source."""


@pytest.fixture(scope="module")
def local(k2_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What a local conversion writes, by format."""
    place = tmp_path_factory.mktemp("local")
    return {to: written(k2quant.convert(k2_source, place / to, to).folder) for to in ("int4", "nvfp4")}


@pytest.fixture
def server(k2_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has the model; nobody waits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    with hub(tmp_path / "hub") as made:
        made.repo(NAME, k2_source)
        made.here(monkeypatch, "hf_known")
        monkeypatch.setattr(retrying, "pause", lambda _: None)
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
        yield made


def written(folder: Path) -> dict[str, bytes]:
    """The files of an output but those that name its source."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name not in APART}


PASSING: dict[str, dict[str, Any]] = {
    "connections that drop": {"kind": "drop", "after": 70_000, "times": 3},
    "connections that drop at once": {"kind": "drop", "after": 0, "times": 3},
    "429 with Retry-After": {"kind": "status", "status": 429, "headers": {"Retry-After": "1"}, "times": 2},
    "500": {"kind": "status", "status": 500},
    "502": {"kind": "status", "status": 502},
    "503": {"kind": "status", "status": 503, "times": 3},
    "a slow line": {"kind": "slow", "rate": 4e7, "times": 2},
    "slow headers": {"kind": "hang", "seconds": 0.3},
    "another host": {"kind": "elsewhere", "times": 2},
}
"""Faults that pass, of the bytes of a shard."""


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_borne(name: str, server: Hub, local: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    """The bytes are those of a local conversion, and the token went to nobody but the hub."""
    fault = server.fault(file="*.safetensors", nth=2, **PASSING[name])
    found = k2quant.convert(f"hf://{NAME}", tmp_path / "out", "int4").folder
    assert fault.fired
    assert written(found) == local["int4"]
    assert {seen.host for seen in server.seen if seen.token} == {"hub"}


def test_faults_of_the_listing_and_of_redirects_are_borne(
    server: Hub, local: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """Wherever on its way to the bytes a request fails."""
    faults = [server.fault("status", on=on, status=503, times=2) for on in ("info", "resolve")]
    faults += [server.fault("drop", on="content", file="config.json", after=10)]
    found = k2quant.convert(f"hf://{NAME}", tmp_path / "out", "int4").folder
    assert all(fault.fired for fault in faults)
    assert written(found) == local["int4"]


def test_signed_addresses_that_expire_are_asked_for_anew(
    server: Hub, local: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """A conversion takes hours, a signature is good for one."""
    server.fault("then", file="*.safetensors", nth=5, then=server.expire)
    found = k2quant.convert(f"hf://{NAME}", tmp_path / "out", "int4").folder
    assert written(found) == local["int4"]


@pytest.mark.parametrize("low_disk", [False, True])
def test_whole_shards_are_fetched_through_faults(
    *, low_disk: bool, server: Hub, local: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """Where bytes are read twice, shards come whole: with dropped connections and a 503 they are as they were."""
    server.fault("drop", file="*.safetensors", nth=6, after=100_000, times=2)
    server.fault("status", file="*.safetensors", nth=9, status=503)
    found = k2quant.convert(f"hf://{NAME}", tmp_path / "out", "nvfp4", low_disk=low_disk).folder
    assert written(found) == local["nvfp4"]
    assert not (found / ".k2quant").exists()


FINAL: dict[str, tuple[dict[str, Any], str]] = {
    "another byte": ({"kind": "wrong"}, r"sha256|digest"),
    "a file that shrank": ({"kind": "shrink", "size": 100_000}, r"bytes"),
    "a file that grew": ({"kind": "grow", "size": 30_000_000}, r"bytes"),
    "206 without Content-Range": ({"kind": "bare"}, r"Content-Range|range"),
    "another range": ({"kind": "shifted"}, r"range|bytes"),
    "a page of HTML": ({"kind": "html"}, r"."),
    "401": ({"kind": "status", "status": 401}, r"401|log in"),
    "403": ({"kind": "status", "status": 403}, r"403"),
    "404": ({"kind": "status", "status": 404}, r"404|no such"),
    "a redirect in a circle": ({"kind": "loop"}, r"redirect"),
    "a redirect to no host": (
        {"kind": "status", "status": 302, "headers": {"Location": "http://a..b/"}},
        r"cannot be read",
    ),
    "a redirect to no address": (
        {"kind": "status", "status": 302, "headers": {"Location": "http://\x01/"}},
        r"cannot be read",
    ),
    "a server that is down": ({"kind": "status", "status": 503}, r"cannot be reached, tried"),
}
"""Faults that do not pass, of the bytes of one shard, and what the error says."""


@pytest.mark.parametrize(
    ("name", "to"),
    [*((name, "int4") for name in FINAL), *((name, "nvfp4") for name in ("another byte", "a file that shrank", "403"))],
)
def test_what_does_not_pass_is_said_and_the_same_command_goes_on(
    name: str, to: Any, server: Hub, local: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """An error of ours that names the file; the output is marked unfinished, and whole once the hub is."""
    how, says = FINAL[name]
    server.fault(file=SHARD, times=None, nth=2, **how)
    with pytest.raises(K2QuantError, match=says) as refused:
        k2quant.convert(f"hf://{NAME}", tmp_path / "out", to)
    assert SHARD in str(refused.value)
    assert "Signature=" not in str(refused.value)
    assert (tmp_path / "out" / "INCOMPLETE").exists()
    assert not (tmp_path / "out" / "config.json").exists()
    server.faults.clear()
    assert written(k2quant.convert(f"hf://{NAME}", tmp_path / "out", to).folder) == local[to]


@pytest.mark.parametrize("to", ["int4", "nvfp4"])
def test_ctrl_c_ends_a_wait(to: Any, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sits out what a Retry-After asks for, neither who fetches ahead nor who waits for that."""
    server.fault("status", file=SHARD, times=None, nth=2, status=429, headers={"Retry-After": "300"})
    paused, cut = threading.Event(), []

    def pause(seconds: float) -> None:
        paused.set()
        try:
            pool.pause(seconds)
        except CheckpointError:
            cut.append(seconds)
            raise

    def tick(*_: int) -> None:
        if paused.is_set():
            raise KeyboardInterrupt

    monkeypatch.setattr(retrying, "pause", pause)
    with pytest.raises(KeyboardInterrupt):
        k2quant.convert(f"hf://{NAME}", tmp_path / "out", to, workers=2, progress=tick)
    assert set(cut) == {300}
    assert (tmp_path / "out" / "INCOMPLETE").exists()


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("to", ["int4", "nvfp4"])
def test_a_header_that_only_came_once_is_refused(
    to: Any, local: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a shard is read by is what it begins with when all of it comes, with the right sha256."""
    read_into, lies = HubPlace.read_into, [SHARD]

    def lying(self: HubPlace, name: str, start: int, buffer: memoryview) -> None:
        read_into(self, name, start, buffer)
        if start == 0 and name in lies:
            lies.remove(name)
            stop = 8 + int.from_bytes(buffer[:8], "little")
            said = bytes(buffer[8:stop]).replace(b".experts.0.", b".experts.?.").replace(b".experts.1.", b".experts.0.")
            buffer[8:stop] = said.replace(b".experts.?.", b".experts.1.")

    monkeypatch.setattr(HubPlace, "read_into", lying)
    with pytest.raises(CheckpointError, match="another header than the one that was read") as refused:
        k2quant.convert(f"hf://{NAME}", tmp_path / "out", to)
    assert SHARD in str(refused.value)
    assert (tmp_path / "out" / "INCOMPLETE").exists()
    done = k2quant.convert(f"hf://{NAME}", tmp_path / "out", to, restart=True)
    assert written(done.folder) == local[to]


def test_a_branch_that_moves_midway_changes_nothing(
    server: Hub, local: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """The commit is pinned: other files under the same branch are not seen; the report names the one that was read."""
    first = server.repos[NAME].branches["main"]
    server.fault(
        "then", file="*.safetensors", nth=3, then=lambda: server.commit(NAME, {SHARD: b"other", "config.json": "{}"})
    )
    done = k2quant.convert(f"hf://{NAME}", tmp_path / "out", "int4")
    assert server.repos[NAME].branches["main"] != first
    assert written(done.folder) == local["int4"]
    assert first in str(done.report["source"])
    assert first in (done.folder / "README.md").read_text()


def test_a_branch_that_moved_between_two_runs_is_said_first_and_stands_in_no_file(
    server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on with the commit that it began with and says so before it works; card and remarks are as ever."""
    whole = k2quant.convert(f"hf://{NAME}", tmp_path / "whole", "int4")
    first = server.repos[NAME].branches["main"]
    gone = server.fault("status", file=SHARD, nth=2, status=404, times=None)
    line = ["convert", "--to", "int4", f"hf://{NAME}", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(line)
    server.faults.remove(gone)
    server.commit(NAME, {SHARD: b"other", "config.json": "{}"})
    assert "note:" not in capsys.readouterr().err
    for last in ("the rest exact", "already finished"):
        with pytest.raises(SystemExit):
            main(line)
        text = capsys.readouterr()
        assert text.err.startswith(f"note: the source is hf://{NAME}@{first}, with which {tmp_path / 'out'} was begun")
        assert last in text.out
    card = (tmp_path / "out" / "README.md").read_bytes()
    assert card == (whole.folder / "README.md").read_bytes()
    assert json.loads((tmp_path / "out" / "k2quant_report.json").read_text())["remarks"] == whole.report["remarks"]


@pytest.mark.usefixtures("server")
def test_a_dry_run_reckons_with_what_of_the_source_must_lie_on_the_disk_and_with_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The largest shard, or two with --low-disk, beside the output; and no run is faster than what it waits for."""
    line = ["convert", "--to", "nvfp4", "--dry-run", "--bandwidth", "100kB/s", f"hf://{NAME}", str(tmp_path / "out")]
    found: dict[tuple[str, ...], Any] = {}
    for low in ((), ("--low-disk",)):
        with pytest.raises(SystemExit):
            main([*line, *low, "--json"])
        found[low] = json.loads(capsys.readouterr().out)
        with pytest.raises(SystemExit):
            main([*line, *low])
        text = capsys.readouterr().out
        assert ", most of it for the network" in text
        assert ("with --low-disk" in text) is (low == ())
        assert found[low]["seconds"] >= found[low]["source"]["seconds"]
    plain, few = found.values()
    more = few["disk_needed"] - plain["disk_needed"]
    assert 0 < more == few["source"]["source_on_low_disk"] - few["source"]["source_least"]


def test_answers_that_are_no_listing_are_refused(server: Hub, tmp_path: Path) -> None:
    """JSON of another kind, HTML, a redirect in a circle: one line, nothing written."""
    for kind in ("junk", "html", "loop"):
        server.faults.clear()
        server.fault(kind, on="info", times=None)
        with pytest.raises(CheckpointError):
            k2quant.convert(f"hf://{NAME}", tmp_path / kind, "int4")
        assert not (tmp_path / kind).exists()


def test_nothing_secret_is_logged_of_all_this(
    server: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Retries are told at the finest level without signatures and without the token."""
    caplog.set_level(logging.DEBUG, logger="k2quant")
    server.fault("status", file="*.safetensors", nth=2, status=503, times=2)
    server.fault("drop", file="*.safetensors", nth=5, after=1000, times=2)
    server.fault("drop", on="content", file="tokenizer_config.json", after=3, times=2)
    k2quant.convert(f"hf://{NAME}", tmp_path / "out", "int4")
    said = caplog.text + "".join(capfd.readouterr())
    assert "503" in said
    assert server.secret not in said
    assert "hf_known" not in said
