"""Conversions whose output goes to an object store: the bytes of a local one, whole or not there, whatever fails.

K2QUANT_KILLS sets how often a conversion is killed (by hand: 20), K2QUANT_SEED at which of its requests.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import k2quant
from k2quant.checkpoint.reader import CONFIG, INCOMPLETE, INDEX, REPORT
from k2quant.checkpoint.remote import retrying
from k2quant.checkpoint.remote.address import Address, spot
from k2quant.checkpoint.remote.opening import open_place
from k2quant.checkpoint.writing import s3
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.checkpoint.writing.opening import locked
from k2quant.cli import main
from k2quant.errors import (
    CheckpointError,
    DestinationForeign,
    DestinationInUse,
    DestinationStale,
    OutputError,
    UnsafePath,
    UsageError,
)
from served.s3 import KEY, SECRET, Asked, Store, serving

KILLS = int(os.environ.get("K2QUANT_KILLS", "2"))
SEED = int(os.environ.get("K2QUANT_SEED", "21"))
SHARDS, ROWS, WIDTH = 3, 128, 512
PART = 2**16
"""Bytes of a part of an upload here; stores ask for 5 MiB, and moto does as it is told."""
PREFIX = "models/k2/"


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    """An object store that takes small parts, which this process sends and which it reaches by its environment."""
    with serving() as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
        patch.setattr(s3, "PART_BYTES", PART)
        for name, value in found.environment.items():
            patch.setenv(name, value)
        yield found


@pytest.fixture
def bucket(store: Store) -> str:
    """An empty bucket."""
    return store.make("output")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Wait for nothing; remember for how long it would have been."""
    waited: list[float] = []
    monkeypatch.setattr(retrying, "pause", waited.append)
    monkeypatch.setattr(s3, "pause", waited.append)
    return waited


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 800 kB in block-FP8: in INT4 each has several parts of an upload."""
    folder = tmp_path_factory.mktemp("source") / "K2"
    random_ = np.random.default_rng(SEED)
    shards: dict[str, Shard] = {}
    for layer in range(SHARDS):
        shard: Shard = {}
        for expert in range(4):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                base = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
                codes = random_.integers(0, 256, (ROWS, WIDTH), np.uint8)
                codes[codes & 0x7F == 0x7F] = 0
                shard[f"{base}.weight"] = ("F8_E4M3", codes)
                scale = random_.random((ROWS // 128, WIDTH // 128), np.float32)
                shard[f"{base}.weight_scale_inv"] = ("F32", scale)
        shards[f"model-{layer + 1}-of-{SHARDS}.safetensors"] = shard
    write_checkpoint(folder, shards, {"model_type": "kimi_k2"})
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def local(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a conversion writes to a folder, but for what says where and when: report and card."""
    folder = k2quant.convert(source, tmp_path_factory.mktemp("local") / "k2", to="int4").folder
    return told({path.name: path.read_bytes() for path in folder.iterdir()})


def told(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return files without those that say where and when."""
    return {name: data for name, data in files.items() if name not in {REPORT, "README.md"}}


def at(bucket: str) -> str:
    """Return the address of the output."""
    return f"s3://{bucket}/{PREFIX.rstrip('/')}"


def check_whole(store: Store, bucket: str, local: dict[str, bytes]) -> None:
    """Check that what stands there is a whole conversion and nothing else, and that no upload is open."""
    found = store.contents(bucket, PREFIX)
    assert told(found) == local
    assert json.loads(found[REPORT])["files"].keys() >= local.keys()
    assert store.uploads(bucket) == []


def test_an_output_on_a_store_has_the_bytes_of_a_folder(
    store: Store, bucket: str, source: Path, local: dict[str, bytes], caches: Path
) -> None:
    """Shards go in parts and nothing stays on the disk here; the same call once more does nothing."""
    done = k2quant.convert(source, at(bucket), to="int4", sha256=True)
    check_whole(store, bucket, local)
    assert str(done.spot) == at(bucket)
    assert sum("partNumber" in asked.query for asked in store.asked) >= 2 * SHARDS
    assert not [path for path in (caches / "k2quant" / "outputs").rglob("*") if path.is_file()]
    store.asked.clear()
    assert k2quant.convert(source, at(bucket), to="int4").already_done
    assert not [asked for asked in store.asked if asked.method in {"PUT", "POST"} and ".k2quant" not in asked.path
                and "delete" not in asked.query]  # fmt: skip
    with pytest.raises(UsageError, match="is no folder"):
        _ = done.folder


def test_what_must_come_last_comes_last(store: Store, bucket: str, source: Path) -> None:
    """First the mark of an unfinished output, then shards, each before its record, then all else, config.json last."""
    store.asked.clear()
    k2quant.convert(source, at(bucket), to="int4", workers=1)
    named = [asked.path.removeprefix(f"/{bucket}/{PREFIX}") for asked in store.asked
             if asked.method == "PUT" or "uploadId" in asked.query]  # fmt: skip
    order = list(dict.fromkeys(name for name in named if not name.endswith("lock.json")))
    assert order[:2] == [INCOMPLETE, ".k2quant/journal.json"]
    shards = [f"model-{number + 1}-of-{SHARDS}.safetensors" for number in range(SHARDS)]
    assert order[2:8] == [name for shard in shards for name in (shard, f".k2quant/shards/{shard}.json")]
    assert order[-3:] == [REPORT, INDEX, CONFIG]


class Killer:
    """Kills a process at one of its requests."""

    def __init__(self, number: int) -> None:
        """Say at which, counted from 0."""
        self.number = number
        self.process: subprocess.Popen[str] | None = None
        self._ready = threading.Event()

    def arm(self, process: subprocess.Popen[str]) -> None:
        """Say which process."""
        self.process = process
        self._ready.set()

    def __call__(self, asked: Asked) -> str | None:
        """Kill it, before the request is answered or after, by its number."""
        if asked.number != self.number:
            return None
        self._ready.wait()
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        return "drop" if self.number % 2 else None


def converting(source: Path, bucket: str, store: Store, caches: Path) -> subprocess.Popen[str]:
    """Begin a conversion in a process of its own."""
    script = f"from k2quant.checkpoint.writing import s3; s3.PART_BYTES = {PART}; from k2quant.cli import main; main()"
    command = [sys.executable, "-c", script, "convert", str(source), at(bucket), "--to", "int4", "--workers", "1"]
    environment = {**os.environ, **store.environment, "XDG_CACHE_HOME": str(caches)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def check_stopped(store: Store, bucket: str, local: dict[str, bytes]) -> None:
    """Check that what a kill left does not look like a model unless it is one, and that no shard is half there."""
    found = store.contents(bucket, PREFIX)
    model = told({name: data for name, data in found.items() if not name.startswith((".k2quant", INCOMPLETE))})
    if model != local:
        assert not model or INCOMPLETE in found
        assert CONFIG not in model
    assert {name: local[name] for name in model} == model


def test_killed_at_random_requests(
    store: Store, bucket: str, source: Path, local: dict[str, bytes], caches: Path
) -> None:
    """Killed at any of its requests, the same command resumes to the same bytes, and no upload stays open."""
    store.asked.clear()
    k2quant.convert(source, at(bucket), to="int4", workers=1)
    total, dice = len(store.asked), random.Random(SEED)  # noqa: S311  not for secrets
    for turn in range(KILLS):
        bucket = store.make("output")
        theirs = store.begin_upload(bucket, "models/k2/not-ours.bin")
        number = int((turn + dice.random()) / KILLS * total)
        print(f"kill {turn} of seed {SEED}: at request {number} of {total}")  # noqa: T201  to repeat a failure
        killer = Killer(number)
        with store.failing(killer), converting(source, bucket, store, caches) as process:
            killer.arm(process)
            process.communicate(timeout=300)
        check_stopped(store, bucket, local)
        with converting(source, bucket, store, caches) as process:
            output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
        assert theirs
        assert store.uploads(bucket) == ["models/k2/not-ours.bin"]
        assert told(store.contents(bucket, PREFIX)) == local


@pytest.mark.parametrize("what", ["SlowDown", "InternalError", "drop"])
def test_what_fails_for_a_moment_is_tried_again(
    what: str, store: Store, bucket: str, source: Path, local: dict[str, bytes], no_waiting: list[float]
) -> None:
    """Every fifth request goes wrong; the bytes are those of a quiet day."""
    with store.failing(lambda asked: what if asked.number % 5 == 3 else None):
        k2quant.convert(source, at(bucket), to="int4")
    assert no_waiting
    check_whole(store, bucket, local)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("AccessDenied", "may not be written or read"),
        ("ExpiredToken", "may not be written or read"),
        ("InternalError", "cannot be reached, tried 8 times, found status 500"),
    ],
)
def test_what_fails_for_good_is_an_error_that_names_it(
    code: str, said: str, store: Store, bucket: str, source: Path, local: dict[str, bytes]
) -> None:
    """From the second shard on: it names what was being written and no secret; better days resume, one shard spared."""
    late = f"{PREFIX}model-2-of-{SHARDS}.safetensors"
    with (
        store.failing(lambda asked: code if asked.path.endswith(late) else None),
        pytest.raises(OutputError, match=said) as caught,
    ):
        k2quant.convert(source, at(bucket), to="int4", workers=1)
    assert f"{at(bucket)}/model-2-of-3.safetensors" in str(caught.value)
    assert KEY not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "resumes" in str(caught.value)
    assert k2quant.convert(source, at(bucket), to="int4").resumed >= 1
    check_whole(store, bucket, local)
    assert not [
        name for name, data in store.contents(bucket).items() if KEY.encode() in data or SECRET.encode() in data
    ]


def test_a_bucket_that_is_not_there_is_said_before_anything_is_read(store: Store, source: Path) -> None:
    """It is not made: who pays for it decides that."""
    assert store.url
    with pytest.raises(OutputError, match=r"s3://nowhere-at-all/x: there is no such bucket.*make it first"):
        k2quant.convert(source, "s3://nowhere-at-all/x", to="int4")


def test_a_part_that_came_otherwise_is_refused(
    store: Store, bucket: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's own sum of a part is compared with ours; nothing gets the shard's name, and no upload is left."""
    real = s3.S3Objects._call  # noqa: SLF001  what stands between us and the store

    def call(self: s3.S3Objects, method: str, **asked: Any) -> dict[str, Any]:
        if method == "upload_part":
            asked["Body"] = bytes([asked["Body"][0] ^ 1]) + asked["Body"][1:]
            asked.pop("ContentMD5")
        return real(self, method, **asked)

    monkeypatch.setattr(s3.S3Objects, "_call", call)
    with pytest.raises(OutputError, match=r"came to the store otherwise than it was sent.*part \d with MD5"):
        k2quant.convert(source, at(bucket), to="int4")
    assert store.uploads(bucket) == []
    assert not [name for name in store.contents(bucket, PREFIX) if name.endswith(".safetensors")]


def test_a_disk_without_room_for_what_waits_is_refused(
    store: Store, bucket: str, source: Path, monkeypatch: pytest.MonkeyPatch, caches: Path
) -> None:
    """Before anything is written, by name of the disk and with what to do."""
    usage = type("Usage", (), {"free": 100_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"the disk is too small.*XDG_CACHE_HOME") as caught:
        k2quant.convert(source, at(bucket), to="int4")
    assert str(caches) in str(caught.value)
    assert store.contents(bucket) == {}


def test_what_is_not_ours_is_refused_and_stays(store: Store, bucket: str, source: Path) -> None:
    """Be it restarted: whose it is, nobody here knows."""
    store.put(bucket, f"{PREFIX}thesis.txt", b"mine")
    for restart in (False, True):
        with pytest.raises(DestinationForeign, match=r"s3://output/models/k2: not empty.*thesis\.txt"):
            k2quant.convert(source, at(bucket), to="int4", restart=restart)
    assert store.contents(bucket) == {f"{PREFIX}thesis.txt": b"mine"}


def test_other_options_are_refused_and_a_restart_throws_away_what_is_ours(
    store: Store, bucket: str, source: Path, local: dict[str, bytes]
) -> None:
    """What somebody put beside a finished output stays."""
    k2quant.convert(source, at(bucket), to="fp8")
    store.put(bucket, f"{PREFIX}notes.txt", b"mine")
    with pytest.raises(DestinationStale, match="finished conversion of other options"):
        k2quant.convert(source, at(bucket), to="int4")
    k2quant.convert(source, at(bucket), to="int4", restart=True)
    found = store.contents(bucket, PREFIX)
    assert found.pop("notes.txt") == b"mine"
    assert told(found) == local


def test_one_run_at_a_time(store: Store, bucket: str, source: Path) -> None:
    """A lock of a live process is respected, of a dead one on this machine taken over, of another machine named."""
    from k2quant.checkpoint.files.locks import Holder

    lock, me = f"{PREFIX}.k2quant/lock.json", Holder.me()

    def locked(**changes: object) -> None:
        facts = {"host": me.host, "machine": me.machine, "pid": me.pid, "started": me.started, "taken": "today"}
        store.put(bucket, lock, json.dumps(facts | changes).encode())

    locked()
    with pytest.raises(DestinationInUse, match=rf"another k2quant works here.*process {me.pid}.*since today"):
        k2quant.convert(source, at(bucket), to="int4")
    locked(host="elsewhere")
    with pytest.raises(DestinationInUse, match=r"from another machine.*elsewhere.*delete s3://.*lock\.json"):
        k2quant.convert(source, at(bucket), to="int4")
    assert store.contents(bucket).keys() == {lock}
    locked(started=me.started + 1)
    k2quant.convert(source, at(bucket), to="int4")
    assert not [name for name in store.contents(bucket) if ".k2quant" in name]


def test_memory_is_a_store_too(source: Path, local: dict[str, bytes]) -> None:
    """As long as the process lives; fsspec alone does it, with none of what S3 can more."""
    import fsspec

    k2quant.convert(source, "memory://place/k2", to="int4")
    filesystem = fsspec.filesystem("memory")
    found = {Path(path).name: filesystem.cat_file(path) for path in filesystem.find("/place/k2")}
    assert told(found) == local
    filesystem.rm("/place", recursive=True)


def test_an_output_that_is_not_finished_is_not_opened(store: Store, bucket: str, source: Path) -> None:
    """Whoever reads it meanwhile is told so."""
    late = f"{PREFIX}{CONFIG}"
    with (
        store.failing(lambda asked: "AccessDenied" if asked.path.endswith(late) and asked.method == "PUT" else None),
        pytest.raises(OutputError),
    ):
        k2quant.convert(source, at(bucket), to="int4")
    from k2quant.checkpoint.reader import open_checkpoint
    from k2quant.checkpoint.remote.address import parse
    from k2quant.errors import CheckpointError

    with pytest.raises(CheckpointError, match="not finished"):
        open_checkpoint(parse(at(bucket)))


def test_parts_of_an_output_on_a_store(store: Store, bucket: str, source: Path, local: dict[str, bytes]) -> None:
    """Parts keep out their like and whole runs; the last completes, and aborts what a killed one began to upload."""
    where: dict[str, Any] = {"report": REPORT, "incomplete": INCOMPLETE}
    first = k2quant.convert(source, at(bucket), to="int4", part="1/3")
    assert repr(first).endswith("still_to_come='2 of 3 shards')")
    store.begin_upload(bucket, f"{PREFIX}model-2-of-{SHARDS}.safetensors")
    with locked(spot(at(bucket)), share="2-of-3", **where) as other:
        with other.alone():
            pass
        for part in ("2/3", None):
            with pytest.raises(DestinationInUse, match="another k2quant works here"):
                k2quant.convert(source, at(bucket), to="int4", part=part)
        assert len(k2quant.convert(source, at(bucket), to="int4", part="3/3").missing) == 1
    with (
        locked(spot(at(bucket)), **where),
        pytest.raises(DestinationInUse, match="another k2quant works here"),
    ):
        k2quant.convert(source, at(bucket), to="int4", part="2/3")
    with pytest.raises(DestinationStale, match="other options"):
        k2quant.convert(source, at(bucket), to="fp8", part="2/3")
    done = k2quant.convert(source, at(bucket), to="int4", part="2/3", restart=True)
    assert done.report["resumed_shards"] == 2
    check_whole(store, bucket, local)
    assert k2quant.convert(source, at(bucket), to="int4", part="2/3").already_done


def test_clean_names_and_removes_what_a_killed_run_left(
    store: Store, bucket: str, source: Path, local: dict[str, bytes]
) -> None:
    """An upload of our own and another machine's lock are named, and go with --yes; others' uploads and shards stay."""
    late = f"{PREFIX}{CONFIG}"
    with (
        store.failing(lambda asked: "AccessDenied" if asked.path.endswith(late) and asked.method == "PUT" else None),
        pytest.raises(OutputError),
    ):
        k2quant.convert(source, at(bucket), to="int4")
    store.begin_upload(bucket, f"{PREFIX}model-2-of-{SHARDS}.safetensors")
    store.begin_upload(bucket, f"{PREFIX}not-ours.bin")
    lock = f"{PREFIX}.k2quant/lock.json"
    store.put(bucket, lock, b'{"host": "elsewhere", "machine": "m", "pid": 7, "started": 1, "taken": "today"}')
    head = f"{PREFIX}.k2quant/journal.json"
    told_before = store.contents(bucket)[head]
    store.put(bucket, head, b'{"files": [["forged"], 7]}')  # no names: nothing is ours then
    assert CliRunner().invoke(main, ["clean", at(bucket)]).exit_code == 0
    store.put(bucket, head, told_before)
    before = store.contents(bucket)
    named = CliRunner().invoke(main, ["clean", at(bucket)])
    assert named.exit_code == 0, named.output
    assert "upload   model-2-of-3.safetensors: begun" in named.stdout
    assert "lock     .k2quant/lock.json: of process 7 on elsewhere, since today" in named.stdout
    assert "2 things left over" in named.stdout
    assert store.contents(bucket) == before
    removed = CliRunner().invoke(main, ["clean", at(bucket), "--yes", "--json"])
    assert json.loads(removed.stdout) | {"left": []} == {
        "destination": at(bucket),
        "left": [],
        "removed": True,
        "goes_on": True,
    }
    assert store.uploads(bucket) == [f"{PREFIX}not-ours.bin"]
    assert store.contents(bucket).keys() == before.keys() - {lock}
    k2quant.convert(source, at(bucket), to="int4")
    assert told(store.contents(bucket, PREFIX)) == local


def test_a_source_in_no_bucket_is_told_apart_from_an_empty_one(store: Store, bucket: str) -> None:
    """As an output is; and an object with a second slash in its name is not taken for the one with one."""
    with pytest.raises(CheckpointError, match="s3://nowhere/model: there is no such bucket"):
        open_place(Address("s3", "nowhere/model"))
    with pytest.raises(CheckpointError, match="nothing is there"):
        open_place(Address("s3", f"{bucket}/model"))
    store.put(bucket, "model/docs/", b"")
    store.put(bucket, "model/config.json", b"{}")
    assert set(open_place(Address("s3", f"{bucket}/model")).files) == {"config.json"}
    store.put(bucket, "model//config.json", b"[]")
    with pytest.raises(UnsafePath, match=r"found '/config\.json'"):
        open_place(Address("s3", f"{bucket}/model"))


def test_uploads_that_are_listed_without_end_are_no_loop(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that goes on and does not say where is an error of ours."""
    monkeypatch.setattr(s3.S3Objects, "_call", lambda *_, **__: {"IsTruncated": True})
    with pytest.raises(OutputError, match="a listing without an end"):
        s3.S3Objects(Address("s3", f"{bucket}/out")).uploads()


def test_what_a_store_says_of_a_deletion_is_cleaned(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each object of one request has a message of its own."""
    failed = {"Errors": [{"Code": "Denied", "Message": f"to {SECRET}"}]}
    monkeypatch.setattr(s3.S3Objects, "_call", lambda *_, **__: failed)
    with pytest.raises(OutputError, match=r"Denied: to \[hidden\]"):
        s3.S3Objects(Address("s3", f"{bucket}/out")).delete(["a"])


@pytest.mark.parametrize("low_disk", [False, True])
def test_a_source_on_the_disk_leaves_room_for_what_waits_to_be_uploaded_and_no_more(
    store: Store, bucket: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, low_disk: bool
) -> None:
    """The output goes to a store: of its shards five at most lie here, so a disk need not hold all of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for path in source.iterdir():
        store.put(bucket, f"source/{path.name}", path.read_bytes())
    asked: dict[str, Any] = {"to": "int4", "shard_size": 150_000, "method": "mse"}
    local = k2quant.convert(source, tmp_path / "local", **asked).folder
    sizes = sorted(path.stat().st_size for path in local.glob("*.safetensors"))
    shard = max(path.stat().st_size for path in source.glob("*.safetensors"))
    assert len(sizes) > 5
    free = sum(sizes[-5:]) + (2 if low_disk else 1) * shard
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    k2quant.convert(f"s3://{bucket}/source", f"s3://{bucket}/output", low_disk=low_disk, **asked)
    found = store.contents(bucket, "output/")
    assert {name: found[name] for name in told(found)} == told({p.name: p.read_bytes() for p in local.iterdir()})
