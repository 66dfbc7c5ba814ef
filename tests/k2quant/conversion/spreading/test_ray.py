"""A conversion over a Ray cluster writes the bytes of one machine, whatever becomes of workers, nodes and the head.

The nodes are processes of this machine. To be sure that a worker is in the middle of a shard, it is stopped (SIGSTOP)
as soon as its partial file is there.
"""

from __future__ import annotations

import contextlib
import json
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
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.cli import main
from k2quant.conversion.spreading import cluster as spreading
from k2quant.errors import BadValue, ClusterError, UsageError
from places import ROOT
from served.s3 import Store, serving

pytest.importorskip("ray")

SHARDS, ROWS, WIDTH = 8, 512, 2048
CARD = "README.md"
"""Which says where the source lies."""
PATIENCE = 120.0
STORE = 80_000_000
"""Bytes of a node's object store; Ray takes no less."""


class Nodes:
    """A Ray cluster of this machine whose head has no core."""

    def __init__(self) -> None:
        """Start the head."""
        from ray.cluster_utils import Cluster

        self._cluster: Any = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False},
        )
        os.environ["RAY_ADDRESS"] = self._cluster.address

    def add(self, count: int) -> None:
        """Start nodes of one core each."""
        for _ in range(count):
            self._cluster.add_node(num_cpus=1, object_store_memory=STORE, wait=False)
        self._cluster.wait_for_nodes()

    def lose_head(self) -> None:
        """Kill all processes of the head."""
        self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)

    def workers(self) -> list[int]:
        """Return the processes that convert."""
        raylets = {entry.process.pid for node in self._cluster.list_all_nodes() for entry in raylets_of(node)}
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
        for pid in self.workers():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self._cluster.shutdown()


def raylets_of(node: Any) -> list[Any]:
    """Return the process of a node that starts workers."""
    return list(node.all_processes.get("raylet", ()))


class Whole(NamedTuple):
    """A source, and what one machine makes of it."""

    source: Path
    files: dict[str, bytes]
    tensors: dict[str, Any]


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of an output but its report."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {str(name): path.read_bytes() for name, path in found.items() if path.name != REPORT}


def tensors(folder: Path) -> dict[str, Any]:
    """Return what a report says of the tensors."""
    found: dict[str, Any] = json.loads((folder / REPORT).read_bytes())["tensors"]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Eight shards of block-FP8 experts, some scales in the next shard."""
    folder, random = tmp_path_factory.mktemp("ray"), np.random.default_rng(0)
    files = [f"model-{number + 1:05}-of-{SHARDS:05}.safetensors" for number in range(SHARDS)]
    shards: dict[str, Shard] = {file: {} for file in files}
    for layer, file in enumerate(files):
        for expert in range(2):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                base = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
                codes = random.integers(0, 0x7F, (ROWS, WIDTH), np.uint8)
                shards[file][f"{base}.weight"] = ("F8_E4M3", codes)
                scale = random.random((ROWS // 128, WIDTH // 128), np.float32)
                shards[files[(layer + expert) % SHARDS]][f"{base}.weight_scale_inv"] = ("F32", scale)
    write_checkpoint(folder / "source", shards, {"model_type": "kimi_k2"})
    k2quant.convert(folder / "source", folder / "whole", "int4")
    return Whole(folder / "source", contents(folder / "whole"), tensors(folder / "whole"))


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    """A store of objects that nodes started later can reach."""
    with serving() as found, pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        yield found


@pytest.fixture(scope="module")
def nodes(store: Store) -> Iterator[list[Nodes]]:
    """A cluster of one node, to which a test adds one, in a list: another test loses the head and puts in a new one."""
    assert store.url
    before = {name: os.environ.get(name) for name in ("RAY_ADDRESS", "RAY_USAGE_STATS_ENABLED")}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    found = [Nodes()]
    try:
        found[0].add(1)
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
        time.sleep(0.002)
    return found


@contextlib.contextmanager
def converting(source: Path, there: Path) -> Iterator[None]:
    """Convert beside the block, in a thread, for nodes start in the main one; raise at its end what that raised."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            k2quant.convert(source, there, "int4", cluster="auto")
        except BaseException as error:  # noqa: BLE001  raised below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(PATIENCE)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def stop_in_a_shard(found: Nodes, there: Path) -> list[int]:
    """Stop all workers while one at least is in the middle of a shard; return them."""
    while True:
        until(lambda: list(there.glob("*.safetensors.*.partial")))
        workers = found.workers()
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        if list(there.glob("*.safetensors.*.partial")):
            return workers
        go_on(workers)


def go_on(workers: list[int]) -> None:
    """Let stopped workers go on."""
    for pid in workers:
        os.kill(pid, signal.SIGCONT)


def check_equal(there: Path, whole: Whole) -> None:
    """Compare an output with that of one machine."""
    assert contents(there) == whole.files
    assert tensors(there) == whole.tensors


def test_a_node_is_added_midway(whole: Whole, nodes: list[Nodes], tmp_path: Path) -> None:
    """It takes shards too: with the only other one stopped, it does them alone."""
    with converting(whole.source, tmp_path / "there"):
        before = stop_in_a_shard(nodes[0], tmp_path / "there")
        notes = tmp_path / "there" / ".k2quant" / "shards"
        standing = len(list(notes.iterdir()))
        nodes[0].add(1)
        until(lambda: len(list(notes.iterdir())) > standing)
        go_on(before)
    check_equal(tmp_path / "there", whole)


def test_a_cluster_writes_the_bytes_of_one_machine(whole: Whole, nodes: list[Nodes], tmp_path: Path) -> None:
    """With progress for the whole; and the entrypoint of the example for KubeRay says before what the machines have."""
    job = yaml.safe_load((ROOT / "examples" / "cluster" / "rayjob.yaml").read_text())
    program, *command = shlex.split(job["spec"]["entrypoint"])
    assert (program, len(command)) == ("k2quant", 7)
    command[-2:] = [str(whole.source), str(tmp_path / "there")]
    dry = CliRunner().invoke(main, [*command, "--dry-run", "--json"])
    assert dry.exit_code == 0, dry.output
    said = json.loads(dry.stdout)["cluster"]
    assert [node["cores"] for node in said["nodes"]] == [1, 1]
    assert said["cores"] == 2
    assert all(node["disk_free"] > 0 and node["seconds"] > 0 for node in said["nodes"])
    assert not (tmp_path / "there").exists()
    seen: list[tuple[int, int]] = []
    done = k2quant.convert(
        whole.source, tmp_path / "there", "int4", cluster="auto", progress=lambda *told: seen.append(told)
    )
    check_equal(tmp_path / "there", whole)
    assert seen[-1][0] <= seen[-1][1] == done.report["bytes_read"]
    assert sorted(seen) == seen
    assert nodes[0].workers() == [] or until(lambda: not nodes[0].workers())
    again = k2quant.convert(whole.source, tmp_path / "there", "int4", cluster="auto")
    assert again.already_done


def test_a_worker_is_killed_midway(
    whole: Whole, nodes: list[Nodes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its shards are done again by others, which is said, and no partial file stays."""
    with converting(whole.source, tmp_path / "there"):
        workers = stop_in_a_shard(nodes[0], tmp_path / "there")
        os.kill(workers[0], signal.SIGKILL)
        go_on(workers[1:])
    check_equal(tmp_path / "there", whole)
    assert "was lost" in caplog.text


def test_a_cluster_converts_from_a_bucket_to_a_bucket(whole: Whole, nodes: list[Nodes], store: Store) -> None:
    """The same bytes, no journal and no upload stays, and no node needed a folder that another one sees."""
    assert nodes[0]
    store.make("models")
    for path in whole.source.iterdir():
        store.put("models", f"source/{path.name}", path.read_bytes())
    k2quant.convert("s3://models/source", "s3://models/there", "int4", cluster="auto")
    found = store.contents("models", "there/")
    assert {name: data for name, data in found.items() if name not in {REPORT, CARD}} == {
        name: data for name, data in whole.files.items() if name != CARD
    }
    assert json.loads(found[REPORT])["tensors"] == whole.tensors
    assert store.uploads("models") == []


def test_a_bad_value_ends_the_run_as_on_one_machine(whole: Whole, nodes: list[Nodes], tmp_path: Path) -> None:
    """With the very same words, and nothing that looks finished."""
    source = tmp_path / "source"
    source.mkdir()
    for path in whole.source.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    victim = source / f"model-00003-of-{SHARDS:05}.safetensors"
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
    whole: Whole, nodes: list[Nodes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command ends with a clear error; with a new cluster it goes on, to equal bytes."""
    there = tmp_path / "there"

    lost = pytest.raises(ClusterError, match=r"cluster was lost.* run the same command: it resumes")
    with lost, converting(whole.source, there):
        stop_in_a_shard(nodes[0], there)  # workers that went on would finish so short a work without a head
        monkeypatch.setattr(spreading, "_SILENCE", 2.0)  # only now: a slow machine is silent for longer at the start
        nodes[0].lose_head()
    assert (there / INCOMPLETE).exists()
    nodes.pop().end()
    with pytest.raises(ClusterError, match="no cluster answers"):
        k2quant.convert(whole.source, there, "int4", cluster="auto")
    nodes.append(Nodes())
    nodes[0].add(1)
    k2quant.convert(whole.source, there, "int4", cluster="auto")
    check_equal(there, whole)


@pytest.mark.parametrize("cluster", ["", "ray://", "ray://user:word@host:1", "ray://host", "http://host:1", "host:1"])
def test_what_is_no_address_is_refused(cluster: str, tmp_path: Path) -> None:
    """Without repeating it: it may hold a password."""
    with pytest.raises(UsageError, match="expected auto") as caught:
        k2quant.convert(tmp_path / "here", tmp_path / "there", "int4", cluster=cluster)
    assert "word" not in str(caught.value)
