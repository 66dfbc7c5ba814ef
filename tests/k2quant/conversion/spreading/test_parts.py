"""Parts of a conversion, in any order and however often: the bytes of one process, completed once, by the last.

K2QUANT_KILLS sets how often parts are killed, K2QUANT_SEED the moments.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import k2quant
from k2quant.checkpoint.reader import CONFIG, INCOMPLETE, INDEX, REPORT
from k2quant.checkpoint.writing.destination import locked
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.conversion.stream import Stream
from k2quant.errors import DestinationInUse, DestinationStale, UsageError

KILLS = int(os.environ.get("K2QUANT_KILLS", "2"))
SEED = int(os.environ.get("K2QUANT_SEED", "20"))
PATIENCE = 300.0
"""Seconds after which a process hangs, however slow the machine is."""
SHARDS = 8
WORK = ".k2quant"


class Case(NamedTuple):
    """A source, and what one process makes of it."""

    source: Path
    files: dict[str, bytes]
    tensors: dict[str, Any]
    """What its report says of the tensors."""


def files(folder: Path) -> dict[str, bytes]:
    """Return every file of an output but its report."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != REPORT]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def write_source(folder: Path, width: int = 256) -> None:
    """Write a K2 of eight layers in eight shards: gate and up, which share a scale of NVFP4, lie in two of them."""
    random_ = np.random.default_rng(0)
    names = [f"model-{number + 1}-of-{SHARDS}.safetensors" for number in range(SHARDS)]
    shards: dict[str, Shard] = {name: {} for name in names}
    for layer in range(SHARDS):
        for number, projection in enumerate(("gate_proj", "up_proj", "down_proj")):
            base = f"model.layers.{layer}.mlp.experts.0.{projection}"
            home = shards[names[(layer + number) % SHARDS]]
            home[f"{base}.weight"] = ("F8_E4M3", random_.integers(0x20, 0x60, (width, width), np.uint8))
            home[f"{base}.weight_scale_inv"] = ("F32", random_.random((width // 128, width // 128), np.float32))
    write_checkpoint(folder, shards, {"model_type": "kimi_k2"})
    (folder / "tokenizer.json").write_text("{}")


def made(folder: Path, width: int = 256) -> Case:
    """Write a source and convert it in one process."""
    write_source(folder / "source", width)
    done = k2quant.convert(folder / "source", folder / "whole", "nvfp4")
    return Case(folder / "source", files(folder / "whole"), done.report["tensors"])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A source of small shards."""
    return made(tmp_path_factory.mktemp("parts"))


def convert(case: Case, there: Path, part: str | None = None, **more: Any) -> k2quant.Conversion:
    """Convert with one thread."""
    return k2quant.convert(case.source, there, "nvfp4", workers=1, part=part, **more)


def check_whole(case: Case, there: Path) -> None:
    """Check that an output is what one process writes, and that nothing of the work is left."""
    assert files(there) == case.files
    assert json.loads((there / REPORT).read_text())["tensors"] == case.tensors


def test_parts_in_any_order_are_one_conversion(case: Case, tmp_path: Path) -> None:
    """Each writes its share and says what is still to come; the last completes, and then there is nothing to do."""
    there = tmp_path / "there"
    for number, left in ((2, 5), (3, 3)):
        done = convert(case, there, f"{number}/3")
        assert len(done.missing) == left
        assert not done.report
        assert not {CONFIG, INDEX, REPORT} & {path.name for path in there.iterdir()}
        assert (there / INCOMPLETE).exists()
        assert repr(done).endswith(f"still_to_come='{left} of 8 shards')")
    last = convert(case, there, "1/3")
    assert last.missing == ()
    assert last.report["resumed_shards"] == 5
    check_whole(case, there)
    assert convert(case, there, "2/3").already_done
    check_whole(case, there)


@pytest.mark.parametrize("seed", range(4))
def test_what_some_began_others_end(case: Case, tmp_path: Path, seed: int) -> None:
    """Parts of other numbers go on from parts, a whole run from parts, and parts from a whole run that was stopped."""
    dice, there = random.Random(seed), tmp_path / "there"  # noqa: S311  not for secrets
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(patch, dice.randint(1, 4))
        with pytest.raises(KeyboardInterrupt):
            convert(case, there, dice.choice([None, "1/1"]))
    stood = len(list(there.glob("*.safetensors")))
    assert 0 < stood < SHARDS
    for of in (3, 5):
        done = convert(case, there, f"{dice.randint(1, of)}/{of}")
        assert SHARDS - len(done.missing) >= stood
    if seed % 2:
        assert convert(case, there).resumed >= stood
    else:
        for number in dice.sample(range(1, 7), 6):
            convert(case, there, f"{number}/6")
    check_whole(case, there)


def stopped_after(patch: pytest.MonkeyPatch, count: int) -> None:
    """Have a conversion stop as by Ctrl-C when some shards stand."""
    begin = Stream._begin  # noqa: SLF001
    left = [count]

    def stopping(self: Stream, plan: Any) -> Any:
        self._wait_for_disk(backlog=0)
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return begin(self, plan)

    patch.setattr(Stream, "_begin", stopping)


def test_more_parts_than_shards(case: Case, tmp_path: Path) -> None:
    """A part that has nothing to write says so, and completes if it is the last."""
    there = tmp_path / "there"
    for number in range(2, 11):
        convert(case, there, f"{number}/10")
    convert(case, there, "1/10")
    check_whole(case, there)


def test_a_part_keeps_out_its_like_and_whole_runs(case: Case, tmp_path: Path) -> None:
    """Two processes never write one part, nor does one write all beside it; other parts are let in."""
    there = tmp_path / "there"
    convert(case, there, "1/4")
    with locked(there, report=REPORT, incomplete=INCOMPLETE, share="2-of-4") as other:
        with other.alone():
            pass
        with pytest.raises(DestinationInUse, match="another k2quant writes part 2 of 4 here"):
            convert(case, there, "2/4")
        with pytest.raises(DestinationInUse, match="another k2quant works here"):
            convert(case, there)
        convert(case, there, "3/4")
    with (
        locked(there, report=REPORT, incomplete=INCOMPLETE),
        pytest.raises(DestinationInUse, match="another k2quant works here"),
    ):
        convert(case, there, "2/4")
    convert(case, there, "2/4")
    convert(case, there, "4/4")
    check_whole(case, there)


def test_soft_locks_of_parts(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has no locks, files keep a part's like and whole runs out, and let other parts in."""

    def flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    there = tmp_path / "there"
    with pytest.raises(k2quant.errors.OutputError, match="a file system without locks"):
        convert(case, there, "1/3")
    assert not there.exists()
    convert(case, there, "1/3", soft_lock=True)
    with locked(there, report=REPORT, incomplete=INCOMPLETE, share="2-of-3", soft=True) as other:
        with other.alone():
            pass
        for part in ("2/3", None):
            with pytest.raises(DestinationInUse, match="another k2quant works here"):
                convert(case, there, part, soft_lock=True)
        convert(case, there, "3/3", soft_lock=True)
    with (
        locked(there, report=REPORT, incomplete=INCOMPLETE, soft=True),
        pytest.raises(DestinationInUse, match="another k2quant works here"),
    ):
        convert(case, there, "2/3", soft_lock=True)
    convert(case, there, "2/3", soft_lock=True)
    check_whole(case, there)


def test_every_part_checks_what_is_made(case: Case, tmp_path: Path) -> None:
    """A part of other options is refused; with `restart` it clears what they left, and the next goes on from it."""
    there = tmp_path / "there"
    k2quant.convert(case.source, there, "fp8", part="1/2")
    with pytest.raises(DestinationStale, match="other options"):
        convert(case, there, "2/2")
    with locked(there, report=REPORT, incomplete=INCOMPLETE, share="2-of-2") as old:
        with old.alone():
            pass
        with pytest.raises(DestinationInUse, match="other parts of another conversion"):
            convert(case, there, "1/2", restart=True)
    assert len(convert(case, there, "1/2", restart=True).missing) == 4
    assert not convert(case, there, "2/2", restart=True).missing
    check_whole(case, there)
    assert convert(case, there, "1/2", restart=True).already_done
    (there / INDEX).unlink()
    with pytest.raises(DestinationStale, match="not whole any more"):
        convert(case, there, "1/2")
    assert len(convert(case, there, "1/2", restart=True).missing) == 4


def test_a_part_that_clears_lets_the_others_in(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `restart` the first of an array clears what is there; while it writes, the next write beside it."""
    there = tmp_path / "there"
    k2quant.convert(case.source, there, "fp8", part="1/2")
    run = Stream.run
    beside: list[k2quant.Conversion] = []

    def with_another(self: Stream, workers: int) -> Any:
        monkeypatch.setattr(Stream, "run", run)
        beside.append(convert(case, there, "2/2", restart=True))
        with pytest.raises(DestinationInUse, match="another k2quant works here"):
            convert(case, there)
        return run(self, workers)

    monkeypatch.setattr(Stream, "run", with_another)
    assert not convert(case, there, "1/2", restart=True).missing
    assert len(beside[0].missing) == 4
    check_whole(case, there)


def test_a_part_says_what_it_reads(case: Case, tmp_path: Path) -> None:
    """Progress is that of the part alone, from nothing to all of its bytes."""
    heard: list[tuple[int, int]] = []
    convert(case, tmp_path / "there", "1/4", progress=lambda *done: heard.append(done))
    total = sum(path.stat().st_size for path in case.source.glob("*.safetensors"))
    assert heard[-1][0] == heard[-1][1]
    assert 0.2 < heard[-1][1] / total < 0.3


def test_what_no_part_takes_is_refused(case: Case, tmp_path: Path) -> None:
    """A part that is none is refused before anything is written."""
    with pytest.raises(UsageError, match="expected K/N"):
        convert(case, tmp_path / "there", "0/4")
    assert not (tmp_path / "there").exists()


STOPPING = """
import sys
from pathlib import Path
from k2quant.cli import main
from k2quant.conversion.stream import Stream
write, left = Stream._write, [int(sys.argv.pop(1))]
mark = Path(sys.argv.pop(1))
def stopping(*asked):
    left[0] -= 1
    if left[0] < 0:
        mark.touch()
        sys.stdin.read()
    return write(*asked)
Stream._write = stopping
main()
"""
"""A command that says so and stays where it is, before it writes something to a shard, when it did so often enough."""


def process(case: Case, there: Path, part: str, *, stop: tuple[int, Path] | None = None) -> subprocess.Popen[str]:
    """Start a part in a process of its own, which may stop after so many writes and make a file then."""
    begin = ["-m", "k2quant"] if stop is None else ["-c", STOPPING, *map(str, stop)]
    command = [sys.executable, *begin, "convert", "--to", "nvfp4", "--workers", "1", "--part", part]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, str(case.source), str(there)], stdin=subprocess.PIPE, **pipes)


def test_four_processes_and_two_killed(tmp_path: Path) -> None:
    """Of four parts at a time any two are killed at work, and started again: the bytes of one process."""
    with pytest.MonkeyPatch.context() as patch:
        writes = counted(patch)
        case = made(tmp_path, 1024)
    dice = random.Random(SEED)  # noqa: S311  not for secrets
    for round_ in range(KILLS // 2):
        there = tmp_path / f"there{round_}"
        stops = {number: (dice.randrange(writes[0] // 8), tmp_path / f"{round_}-{number}")
                 for number in dice.sample(range(1, 5), 2)}  # fmt: skip
        print(f"round {round_} of seed {SEED}: {stops}")  # noqa: T201  to repeat a failure
        running = {number: process(case, there, f"{number}/4", stop=stops.get(number)) for number in range(1, 5)}
        try:
            for number, (_, mark) in stops.items():
                wait_for(mark, running[number])
        finally:
            for number in stops:
                running[number].send_signal(signal.SIGKILL)
        said = {number: each.communicate(timeout=PATIENCE)[0] for number, each in running.items()}
        assert all(running[number].returncode == 0 for number in running.keys() - stops.keys()), said
        again = [process(case, there, f"{number}/4") for number in stops]
        said |= {number: each.communicate(timeout=PATIENCE)[0] for number, each in zip(stops, again, strict=True)}
        assert all(each.returncode == 0 for each in again), said
        check_whole(case, there)


def counted(patch: pytest.MonkeyPatch) -> list[int]:
    """Count how often something is written to a shard, from now on."""
    write, count = Stream._write, [0]  # noqa: SLF001

    def counting(self: Stream, *asked: Any) -> Any:
        count[0] += 1
        return write(self, *asked)

    patch.setattr(Stream, "_write", counting)
    return count


def wait_for(mark: Path, process: subprocess.Popen[str]) -> None:
    """Wait for a file that a process makes."""
    begun = time.monotonic()
    while not mark.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - begun < PATIENCE, "it does not come so far"
        time.sleep(0.01)
