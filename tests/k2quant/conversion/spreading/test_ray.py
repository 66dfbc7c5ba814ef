"""A conversion over a Ray cluster writes the bytes of one machine, whatever becomes of workers, nodes and the head.

The nodes are processes of this machine. To be sure that a worker is in the middle of a shard, the hub that it reads
from holds back what comes next. Nothing here depends on how fast anything is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import k2quant
from k2quant.checkpoint.reader import INCOMPLETE, REPORT
from k2quant.checkpoint.supply.order import PIECE_BYTES
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.cli import main
from k2quant.conversion.spreading import cluster as spreading
from k2quant.errors import BadValue, ClusterError, UsageError
from places import ROOT
from served.hub import Hub, hub
from served.s3 import Store, serving

pytest.importorskip("ray")

NAME = "org/Kimi-K2-Small"
CARD = "README.md"
"""Which says where the source lies."""
PATIENCE = 300.0
"""Seconds after which something will not happen any more, however slow the machine is."""
STORE = 80_000_000
"""Bytes of a node's object store; Ray takes no less."""


class Nodes:
    """A Ray cluster of this machine: a head of one core, and nodes that come."""

    def __init__(self) -> None:
        """Start the head, without what watches logs and load."""
        from ray.cluster_utils import Cluster

        self._cluster: Any = Cluster()
        self._cluster.add_node(
            num_cpus=1,
            object_store_memory=STORE,
            include_dashboard=False,
            include_log_monitor=False,
            no_monitor=True,
            wait=False,
        )
        self._cluster.wait_for_nodes(PATIENCE)
        os.environ["RAY_ADDRESS"] = self._cluster.address

    def add(self) -> None:
        """Start a node of one core."""
        self._cluster.add_node(num_cpus=1, object_store_memory=STORE, wait=False)
        self._cluster.wait_for_nodes(PATIENCE)

    def lose_head(self) -> None:
        """Kill all processes of the head, its worker too."""
        workers = self.workers(self._cluster.head_node)
        self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)
        kill(workers)

    def workers(self, *nodes: Any) -> list[int]:
        """Return the processes that convert, on these nodes or on all."""
        raylets = {entry.process.pid for node in nodes or self._cluster.list_all_nodes() for entry in raylets_of(node)}
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                pid, rest = int(status.parent.name), status.read_text().rsplit(")", 1)[1].split()
                named = (status.parent / "cmdline").read_bytes()
                if int(rest[1]) in raylets and named.startswith(b"ray::") and b"Seat" in named:
                    found.append(pid)
        return found

    def end(self) -> None:
        """End every process."""
        kill(self.workers())
        self._cluster.shutdown()


def kill(processes: list[int]) -> None:
    """End processes that may have ended."""
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def raylets_of(node: Any) -> list[Any]:
    """Return the process of a node that starts workers."""
    return list(node.all_processes.get("raylet", ()))


class Whole(NamedTuple):
    """A source, and what one machine makes of it."""

    source: Path
    files: dict[str, bytes]
    tensors: dict[str, Any]


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of an output but those that say where and when."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {str(name): path.read_bytes() for name, path in found.items() if path.name not in {REPORT, CARD}}


def tensors(folder: Path) -> dict[str, Any]:
    """Return what a report says of the tensors."""
    found: dict[str, Any] = json.loads((folder / REPORT).read_bytes())["tensors"]
    return found


def converted(folder: Path, count: int, rows: int, width: int) -> Whole:
    """Make shards of block-FP8 experts, some scales in the next shard, and convert them here."""
    random = np.random.default_rng(0)
    files = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    shards: dict[str, Shard] = {file: {} for file in files}
    for layer, file in enumerate(files):
        for expert in range(2):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                base = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
                codes = random.integers(0, 0x7F, (rows, width), np.uint8)
                shards[file][f"{base}.weight"] = ("F8_E4M3", codes)
                scale = random.random((rows // 128, width // 128), np.float32)
                shards[files[(layer + expert) % count]][f"{base}.weight_scale_inv"] = ("F32", scale)
    write_checkpoint(folder / "source", shards, {"model_type": "kimi_k2"})
    k2quant.convert(folder / "source", folder / "whole", "int4")
    return Whole(folder / "source", contents(folder / "whole"), tensors(folder / "whole"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Six shards of 400 kB."""
    return converted(tmp_path_factory.mktemp("small"), 6, 128, 512)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, server: Hub) -> Whole:
    """Four shards, on the hub too, of a piece and a bit each."""
    found = converted(tmp_path_factory.mktemp("large"), 4, 384, 4096)
    assert all(path.stat().st_size > PIECE_BYTES for path in found.source.glob("*.safetensors"))
    server.repo(NAME, found.source)
    return found


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    """A store of objects that nodes started later can reach."""
    with serving() as found, pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub that nodes started later can reach."""
    with hub(tmp_path_factory.mktemp("hub")) as found, pytest.MonkeyPatch.context() as patch:
        found.here(patch)
        yield found


@pytest.fixture(scope="module")
def nodes(store: Store, server: Hub) -> Iterator[list[Nodes]]:
    """A cluster of one node, to which a test adds one, in a list: another test loses the head and puts in a new one."""
    assert store.url
    assert server.url
    before = {name: os.environ.get(name) for name in ("RAY_ADDRESS", "RAY_USAGE_STATS_ENABLED")}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    found: list[Nodes] = []
    try:
        found.append(Nodes())
        yield found
    finally:
        for each in found:
            each.end()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def until(happens: Callable[[], Any]) -> Any:
    """Wait for something, and return it."""
    begun = time.monotonic()
    while not (found := happens()):
        assert time.monotonic() - begun < PATIENCE, "it does not happen"
        time.sleep(0.01)
    return found


class Held:
    """A conversion beside a test, of which the hub holds back the second pieces of shards."""

    def __init__(self, server: Hub, there: Path, file: str) -> None:
        """Begin it, in a thread, for nodes start in the main one.

        Args:
            server: the hub that holds back.
            there: where to convert to.
            file: pattern of the shards that are held.
        """
        self.errors: list[BaseException] = []
        self.there = there
        self._gate = threading.Event()
        self._fault = server.fault("then", file=file, start=PIECE_BYTES, times=None, then=self._gate.wait)
        self._server = server
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            k2quant.convert(f"hf://{NAME}", self.there, "int4", cluster="auto")
        except BaseException as error:  # noqa: BLE001  raised by whoever waits
            self.errors.append(error)

    def wait_for(self, happens: Callable[[], Any]) -> None:
        """Wait for something that happens before the conversion ends; raise what that raised."""
        until(lambda: self.errors or happens())
        if self.errors:
            raise self.errors[0]

    def in_a_shard(self, file: str = "*") -> None:
        """Wait until a shard is half written."""
        self.wait_for(lambda: self._fault.fired and list(self.there.glob(f"{file}.*.partial")))

    def shards(self) -> int:
        """Return how many shards are finished."""
        notes = self.there / ".k2quant" / "shards"
        return len(list(notes.iterdir())) if notes.exists() else 0

    def go_on(self) -> None:
        """Hold nothing back any more."""
        self._server.faults.clear()
        self._gate.set()

    def end(self) -> None:
        """Wait until it has ended."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def held(server: Hub, there: Path, file: str) -> Iterator[Held]:
    """Convert beside the block, and go on when it ends; raise then what the conversion raised."""
    found = Held(server, there, file)
    try:
        yield found
    finally:
        found.go_on()
        found.end()
    if found.errors:
        raise found.errors[0]


class Hearing(logging.Handler):
    """Does something when a line of the log has some words."""

    def __init__(self, words: str, then: Callable[[], object]) -> None:
        """Listen to k2quant; `then` is called at most once."""
        super().__init__()
        self.heard: list[str] = []
        self._words, self._then = words, then

    def emit(self, record: logging.LogRecord) -> None:
        """Hear a line."""
        if not self.heard and self._words in record.getMessage():
            self.heard.append(record.getMessage())
            self._then()


@contextlib.contextmanager
def hearing(words: str, then: Callable[[], object]) -> Iterator[list[str]]:
    """Do something when a line of k2quant's log has some words; yield the line."""
    handler, log = Hearing(words, then), logging.getLogger("k2quant")
    log.addHandler(handler)
    try:
        yield handler.heard
    finally:
        log.removeHandler(handler)


def check_equal(there: Path, whole: Whole) -> None:
    """Compare an output with that of one machine."""
    assert contents(there) == whole.files
    assert tensors(there) == whole.tensors


def test_a_node_is_added_and_a_worker_killed_midway(
    large: Whole,
    server: Hub,
    nodes: list[Nodes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the only other one held in a shard, the new one does all others; the lost one's is done again, as is said.

    Meanwhile another job, of the example for KubeRay, waits for the cores of both: it says so, and then what they have.
    """
    shards = sorted(path.name for path in large.source.glob("*.safetensors"))
    with held(server, tmp_path / "there", shards[0]) as conversion:
        conversion.in_a_shard(shards[0])
        (worker,) = nodes[0].workers()
        nodes[0].add()
        conversion.wait_for(lambda: conversion.shards() == len(shards) - 1)

        def kill_and_go_on() -> None:
            kill([worker])
            conversion.go_on()

        monkeypatch.setattr(spreading, "_BEGIN", 0.5)
        with hearing("has not begun", kill_and_go_on) as heard:
            said = dry_run(large.source, tmp_path / "other")
    assert "it asks for 1 core there, free in the whole cluster: 0 of 2 cores;" in heard[0]
    assert [node["cores"] for node in said["nodes"]] == [1, 1]
    assert said["cores"] == 2
    assert all(node["disk_free"] > 0 and node["seconds"] > 0 for node in said["nodes"])
    assert not (tmp_path / "other").exists()
    check_equal(tmp_path / "there", large)
    assert "was lost; 1 shard will be written again" in caplog.text


def dry_run(source: Path, there: Path) -> dict[str, Any]:
    """Return what the entrypoint of the example for KubeRay says before it writes anything."""
    job = yaml.safe_load((ROOT / "examples" / "cluster" / "rayjob.yaml").read_text())
    program, *command = shlex.split(job["spec"]["entrypoint"])
    assert (program, len(command)) == ("k2quant", 7)
    command[-2:] = [str(source), str(there)]
    dry = CliRunner().invoke(main, [*command, "--dry-run", "--json"])
    assert dry.exit_code == 0, dry.output
    said: dict[str, Any] = json.loads(dry.stdout)["cluster"]
    return said


def test_a_cluster_writes_the_bytes_of_one_machine(small: Whole, nodes: list[Nodes], tmp_path: Path) -> None:
    """With progress for the whole; its workers end with it, and the same call once more does nothing."""
    seen: list[tuple[int, int]] = []
    done = k2quant.convert(
        small.source, tmp_path / "there", "int4", cluster="auto", progress=lambda *told: seen.append(told)
    )
    check_equal(tmp_path / "there", small)
    assert seen[-1][0] <= seen[-1][1] == done.report["bytes_read"]
    assert sorted(seen) == seen
    until(lambda: not nodes[0].workers())
    assert k2quant.convert(small.source, tmp_path / "there", "int4", cluster="auto").already_done


def test_a_cluster_converts_from_a_bucket_to_a_bucket(small: Whole, nodes: list[Nodes], store: Store) -> None:
    """The same bytes, no journal and no upload stays, and no node needed a folder that another one sees."""
    assert nodes[0]
    store.make("models")
    for path in small.source.iterdir():
        store.put("models", f"source/{path.name}", path.read_bytes())
    k2quant.convert("s3://models/source", "s3://models/there", "int4", cluster="auto")
    found = store.contents("models", "there/")
    assert {name: data for name, data in found.items() if name not in {REPORT, CARD}} == small.files
    assert json.loads(found[REPORT])["tensors"] == small.tensors
    assert store.uploads("models") == []


def test_a_bad_value_ends_the_run_as_on_one_machine(small: Whole, nodes: list[Nodes], tmp_path: Path) -> None:
    """With the very same words, and nothing that looks finished."""
    source = tmp_path / "source"
    source.mkdir()
    for path in small.source.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    victim = sorted(source.glob("*.safetensors"))[2]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] = 0x7F  # NaN in E4M3
    victim.write_bytes(content)
    said = []
    for there, cluster in (("one", None), ("many", "auto")):
        with pytest.raises(BadValue) as caught:
            k2quant.convert(source, tmp_path / there, "int4", cluster=cluster)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert (tmp_path / "many" / INCOMPLETE).exists()
    until(lambda: not nodes[0].workers())


def test_the_head_is_lost_and_the_command_repeated(
    large: Whole, server: Hub, nodes: list[Nodes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command ends with a clear error; with a new cluster it goes on, to equal bytes."""
    there = tmp_path / "there"
    lost = pytest.raises(ClusterError, match=r"cluster was lost.* run the same command: it resumes")
    with lost, held(server, there, "*.safetensors") as conversion:
        conversion.in_a_shard()  # and it stays there, or so short a work would be finished without a head
        monkeypatch.setattr(spreading, "_SILENCE", 2.0)  # only now: a slow machine is silent for longer at the start
        nodes[0].lose_head()
        conversion.end()
        nodes.pop().end()
    assert (there / INCOMPLETE).exists()
    with pytest.raises(ClusterError, match="no cluster answers"):
        k2quant.convert(f"hf://{NAME}", there, "int4", cluster="auto")
    monkeypatch.undo()
    nodes.append(Nodes())
    k2quant.convert(f"hf://{NAME}", there, "int4", cluster="auto")
    check_equal(there, large)


@pytest.mark.parametrize("cluster", ["", "ray://", "ray://user:word@host:1", "ray://host", "http://host:1", "host:1"])
def test_what_is_no_address_is_refused(cluster: str, tmp_path: Path) -> None:
    """Without repeating it: it may hold a password."""
    with pytest.raises(UsageError, match="expected auto") as caught:
        k2quant.convert(tmp_path / "here", tmp_path / "there", "int4", cluster=cluster)
    assert "word" not in str(caught.value)
