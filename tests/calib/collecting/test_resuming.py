"""A killed pass goes on, gives the same bytes whatever memory it has, and refuses what it was not begun with."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from k2quant.calib.collecting import collect
from k2quant.calib.collecting.memory import needs
from k2quant.calib.inputs import Samples
from k2quant.calib.stats.reading import open_stats
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.errors import BadValue, CheckpointError, DestinationStale, OutputError, UsageError
from tiny import write_model

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 24
PLENTY = 4 * 10**9  # bytes: enough for any test
VOCABULARY = 64
Contents = Callable[[Path], dict[str, bytes]]


class Killed(BaseException):
    """Ends a run where a kill would."""


def dies(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], int]:
    """Have the file operation of a number, and all after it, fail as if the process were gone; return what counts."""
    count = itertools.count(1)
    last = [0]

    def armed(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            last[0] = next(count)
            if number and last[0] >= number:
                raise Killed
            return operation(*given, **options)

        return call

    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # a dead process's lock is gone, this one's is not
    for name in ("pwrite", "fsync", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, armed(getattr(os, name)))
    return lambda: last[0]


@pytest.fixture(scope="module")
def data(drawn: Callable[..., Samples]) -> Samples:
    """Rows for the tiny model."""
    return drawn(VOCABULARY)


def test_a_killed_pass_goes_on_with_equal_bytes(tiny: Checkpoint, data: Samples, ram: Path, contents: Contents) -> None:
    """Killed at file operations all over a pass: nothing looks finished, and the same call ends with the same bytes."""
    with pytest.MonkeyPatch.context() as patch:
        operations = dies(patch, 0)
        collect(tiny, ram / "whole", data, memory=PLENTY)
        total = operations()
    whole = contents(ram / "whole")
    for number in [1, *range(5, total, 8), total - 2, total - 1, total]:
        folder = ram / "killed"
        with pytest.MonkeyPatch.context() as patch:
            dies(patch, number)
            with pytest.raises(Killed):
                collect(tiny, folder, data, memory=PLENTY)
        left = contents(folder)
        assert "INCOMPLETE" in left or whole.items() <= left.items() or not set(left) & set(whole)
        collect(tiny, folder, data, memory=PLENTY)
        assert contents(folder) == whole, f"killed at {number} of {total}"
        shutil.rmtree(folder)


def test_layers_that_are_done_are_not_run_again(tiny: Checkpoint, data: Samples, tmp_path: Path) -> None:
    """Stopped in the second layer, a pass says how much is done and measures that layer alone."""
    told: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(tiny, tmp_path / "STATS", data, memory=PLENTY, progress=stop)
    assert all(before[0] <= after[0] for before, after in itertools.pairwise(told))
    told.clear()
    found = collect(tiny, tmp_path / "STATS", data, memory=PLENTY, progress=lambda *now: told.append(now))
    assert (found.layers, found.measured) == (2, 1)
    assert told[-1] == (2 * 16 * LENGTH, 2 * 16 * LENGTH)
    assert collect(tiny, tmp_path / "STATS", data, memory=PLENTY).measured == 0
    assert not (tmp_path / "STATS" / ".k2quant").exists()


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("hessians", [False, True])
def test_memory_changes_no_byte(
    tiny: Checkpoint, data: Samples, tmp_path: Path, contents: Contents, *, hessians: bool
) -> None:
    """One expert at a time or all, one wave or several, hidden states in memory or in files."""
    plan = needs(tiny, rows=[12, 4], length=LENGTH, memory=PLENTY, hessians=hessians)
    ways, found = [], []
    for memory in (PLENTY, plan.least, plan.least + 80_000):
        plan = collect(tiny, tmp_path / f"{memory}", data, memory=memory, hessians=hessians).needs
        ways.append((plan.chunk, plan.waves))
        found.append(contents(tmp_path / f"{memory}"))
    assert found[0] == found[1] == found[2]
    assert ways == [(8, 8), (1, 1), (7, 1)] if hessians else [(8, 8), (1, 8), (3, 4)]


def test_a_lower_precision_of_the_process_changes_no_byte(
    tiny: Checkpoint, data: Samples, tmp_path: Path, contents: Contents
) -> None:
    """Sums are whole float32 where the process lets torch multiply with less, which it may do again afterwards."""
    collect(tiny, tmp_path / "highest", data, memory=PLENTY)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        collect(tiny, tmp_path / "medium", data, memory=PLENTY)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert contents(tmp_path / "medium") == contents(tmp_path / "highest")


def test_too_little_memory_names_the_least(tiny: Checkpoint, data: Samples, tmp_path: Path) -> None:
    """Refused before anything is written, and what is named works."""
    least = needs(tiny, rows=[12, 4], length=LENGTH, memory=PLENTY).least
    with pytest.raises(UsageError, match=r"`memory=` is too small: .* takes at least"):
        collect(tiny, tmp_path / "STATS", data, memory=least - 1)
    assert not (tmp_path / "STATS").exists()


def stopped(source: Checkpoint, folder: Path, data: Samples) -> None:
    """Leave a pass behind that was stopped in its second layer."""

    def stop(done: int, total: int) -> None:
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(source, folder, data, memory=PLENTY, progress=stop)


def changed(folder: Path, name: str) -> Checkpoint:
    """Change one bit of a weight."""
    source = open_checkpoint(folder)
    entry = source.tensors[name]
    with (folder / entry.file).open("r+b") as file:
        file.seek(entry.start)
        first = file.read(1)[0]
        file.seek(entry.start)
        file.write(bytes([first ^ 1]))
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"]
)
def test_one_changed_weight_is_refused(name: str, data: Samples, tmp_path: Path) -> None:
    """Of what was read already: embedding, matrix or norm; half-finished. With `restart=True` it is measured anew."""
    write_model(tmp_path / "model")
    stopped(open_checkpoint(tmp_path / "model"), tmp_path / "STATS", data)
    other = changed(tmp_path / "model", name)
    with pytest.raises(DestinationStale, match="restart=True"):
        collect(other, tmp_path / "STATS", data, memory=PLENTY)
    assert collect(other, tmp_path / "STATS", data, memory=PLENTY, restart=True).measured == 2
    assert open_stats(tmp_path / "STATS").layers == (0, 1)


def test_a_finished_calibration_of_a_changed_weight_is_refused(data: Samples, tmp_path: Path) -> None:
    """Whether it is the same model is told by all bytes that were read; a copy elsewhere is the same."""
    write_model(tmp_path / "model")
    collect(open_checkpoint(tmp_path / "model"), tmp_path / "STATS", data, memory=PLENTY)
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    for path in (tmp_path / "moved").iterdir():
        os.utime(path, (0, 0))
    assert collect(open_checkpoint(tmp_path / "moved"), tmp_path / "STATS", data, memory=PLENTY).measured == 0
    for base in ("model.layers.1.mlp.experts.5.down_proj", "model.embed_tokens"):
        with pytest.raises(DestinationStale, match=rf"`{re.escape(base)}`"):
            collect(changed(tmp_path / "moved", f"{base}.weight"), tmp_path / "STATS", data, memory=PLENTY)
        changed(tmp_path / "moved", f"{base}.weight")  # back again


def test_a_moved_model_goes_on(data: Samples, tmp_path: Path) -> None:
    """Neither the path nor the times of a checkpoint matter, half-way too."""
    write_model(tmp_path / "model")
    stopped(open_checkpoint(tmp_path / "model"), tmp_path / "STATS", data)
    (tmp_path / "model").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").iterdir():
        os.utime(path, (0, 0))
    assert collect(open_checkpoint(tmp_path / "moved"), tmp_path / "STATS", data, memory=PLENTY).measured == 1


def test_other_data_or_settings_are_refused(
    tiny: Checkpoint, data: Samples, tmp_path: Path, drawn: Callable[..., Samples]
) -> None:
    """Other rows, another number of samples that was asked for, Hessians that were not: each is named."""
    stopped(tiny, tmp_path / "STATS", data)
    with pytest.raises(DestinationStale, match="other data"):
        collect(tiny, tmp_path / "STATS", drawn(VOCABULARY, seed=1), memory=PLENTY)
    with pytest.raises(DestinationStale, match="other settings"):
        collect(tiny, tmp_path / "STATS", drawn(VOCABULARY, wanted=13), memory=PLENTY)
    with pytest.raises(DestinationStale, match="hessians"):
        collect(tiny, tmp_path / "STATS", data, memory=PLENTY, hessians=True)
    assert collect(tiny, tmp_path / "STATS", data, memory=PLENTY).measured == 1


@pytest.mark.parametrize("bits", [0x7FC0, 0x7E00])
def test_a_model_that_computes_no_numbers_is_refused_at_that_layer(bits: int, data: Samples, tmp_path: Path) -> None:
    """NaN, or what is too large to be squared, ends a pass where it shows: not days later, with every layer done."""
    write_model(tmp_path / "model")
    source = open_checkpoint(tmp_path / "model")
    entry = source.tensors["model.layers.0.mlp.up_proj.weight"]
    with (tmp_path / "model" / entry.file).open("r+b") as file:
        file.seek(entry.start)
        file.write(bits.to_bytes(2, "little") * (entry.nbytes // 2))
    told: list[int] = []
    with pytest.raises(BadValue, match=r"layers\.0\.mlp\.down_proj.*found NaN or infinity") as error:
        collect(
            open_checkpoint(source.folder),
            tmp_path / "STATS",
            data,
            memory=PLENTY,
            progress=lambda n, _: told.append(n),
        )
    assert "calibrate again" not in str(error.value)
    assert max(told) == 16 * LENGTH  # of one layer
    assert not list((tmp_path / "STATS").glob("layer-*"))


def test_what_is_damaged_beside_the_layers_is_mended(
    tiny: Checkpoint, data: Samples, tmp_path: Path, contents: Contents
) -> None:
    """Whoever reads `calibrate again` and does it has a whole folder, and is not told that it was finished before."""
    collect(tiny, tmp_path / "STATS", data, memory=PLENTY)
    whole = contents(tmp_path / "STATS")
    (tmp_path / "STATS" / "outside.json").write_text("{}")
    with pytest.raises(CheckpointError, match="calibrate again"):
        open_stats(tmp_path / "STATS")
    assert collect(tiny, tmp_path / "STATS", data, memory=PLENTY).measured == 2
    assert contents(tmp_path / "STATS") == whole


def test_damaged_hidden_states_are_an_error(tiny: Checkpoint, data: Samples, tmp_path: Path) -> None:
    """A file that is not what was written is named, and never measured."""
    stopped(tiny, tmp_path / "STATS", data)
    victim = min((tmp_path / "STATS" / ".k2quant" / "hidden").glob("*.bin"))
    victim.write_bytes(victim.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=victim.name):
        collect(tiny, tmp_path / "STATS", data, memory=PLENTY)


def test_restart_forgets_hidden_states(tiny: Checkpoint, data: Samples, tmp_path: Path) -> None:
    """A pass that is begun anew and stopped at once does not go on from what an older one left."""
    stopped(tiny, tmp_path / "STATS", data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("k2quant.calib.collecting.running.shutil.rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            collect(tiny, tmp_path / "STATS", data, memory=PLENTY, restart=True)
    assert collect(tiny, tmp_path / "STATS", data, memory=PLENTY).measured == 2


def interrupt(*_: object, **__: object) -> None:
    """Stop, as Ctrl-C does."""
    raise KeyboardInterrupt


def test_tokens_of_another_vocabulary_are_refused(tiny: Checkpoint, tmp_path: Path, data: Samples) -> None:
    """Found before anything is written."""
    tokens = data.train.tokens.clone()
    tokens[0, 0] = 4096
    data.train.tokens.copy_(tokens)
    try:
        with pytest.raises(UsageError, match="4096"):
            collect(tiny, tmp_path / "STATS", data, memory=PLENTY)
    finally:
        data.train.tokens[0, 0] = 0
    assert not (tmp_path / "STATS").exists()


def test_a_folder_that_cannot_be_made_is_named(tiny: Checkpoint, data: Samples, tmp_path: Path) -> None:
    """Below a file there is no folder."""
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file.*: cannot be written, found Not a directory"):
        collect(tiny, tmp_path / "file" / "STATS", data, memory=PLENTY)


def test_a_full_disk_is_said_before_the_first_layer(
    tiny: Checkpoint, data: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states of two stages and the statistics must have room."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(OutputError, match="too small"):
        collect(tiny, tmp_path / "STATS", data, memory=PLENTY)
