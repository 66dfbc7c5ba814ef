"""Equal bits: whatever memory there is, however many work, wherever a pass was stopped."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from k2quant.calib.collecting import experts, memory
from k2quant.calib.inputs import Samples
from k2quant.calib.solving.choosing import Settled
from k2quant.calib.solving.passing import groups, layers, mlps
from k2quant.calib.solving.passing.turns import Turns
from k2quant.calib.stats.digests import digests_of, shown
from k2quant.calib.stats.manifest import canonical
from k2quant.checkpoint.files.checksum import crc32
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.weights import group_tensors
from k2quant.errors import BadValue, DestinationForeign, DestinationStale, MalformedFile, OutputError, UsageError
from tiny import write_model

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 64

FACTS = {"layer": 0, "solved": 8, "relative": 0.1, "tokens": 91}
"""Of a first layer, as its note has them."""


@pytest.fixture(scope="module")
def data(drawn: Callable[..., Samples]) -> Samples:
    """Rows for the tiny model."""
    return drawn(VOCABULARY)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut so finely that even a tiny model has several blocks, and experts of which not everything is kept."""
    monkeypatch.setattr(memory, "PIECE_TOKENS", 96)
    monkeypatch.setattr(experts, "BLOCK", 32)
    for module in (mlps, layers):
        monkeypatch.setattr(module, "KEPT", 64)


def equal(one: Any, other: Any) -> bool:
    """Tell whether two sinks hold the same bits."""
    return one.values.keys() == other.values.keys() and all(
        torch.equal(each, other.values[base]) for base, each in one.values.items()
    )


@pytest.mark.usefixtures("small", "coarse")
@pytest.mark.parametrize("propagate", [True, False])
def test_neither_memory_nor_workers_change_a_bit(
    tiny: Checkpoint, data: Samples, through: Any, sinks: Any, monkeypatch: pytest.MonkeyPatch, *, propagate: bool
) -> None:
    """Several experts at a time, tokens in files, everything kept or nothing: what is settled sees equal bits."""
    plain = sinks()
    first = through(tiny, data, plain, propagate=propagate)
    assert first.needs.in_files == 0
    facts = [first.facts]
    for number, (kept, workers, least) in enumerate([(64, 3, False), (0, 2, True)]):
        for module in (mlps, layers):
            monkeypatch.setattr(module, "KEPT", kept)
        sink, taken = sinks(), first.needs.least if least else 4 * 10**9
        found = through(tiny, data, sink, propagate=propagate, work=f"{number}", workers=workers, memory=taken)
        assert (found.needs.kept == 0) == least
        assert equal(sink, plain)
        facts.append(found.facts)
    assert all(each == facts[0] for each in facts)


@pytest.mark.usefixtures("small")
def test_a_stopped_pass_goes_on_with_equal_bits(
    tiny: Checkpoint, data: Samples, coarse: Any, through: Any, sinks: Any, tmp_path: Path
) -> None:
    """Stopped before any of its matrices, the same call solves those that are left, once, and ends with equal bits."""
    whole = sinks()
    through(tiny, data, whole)
    for full in (0, 5, 8, 17, 38):
        sink = sinks(full)
        with pytest.raises(KeyboardInterrupt):
            through(tiny, data, sink, work="stopped", workers=2)
        before, sink.full = len(sink.values), None
        coarse.seen.clear()
        found = through(tiny, data, sink, work="stopped")
        assert sum(len(group) for group, _ in coarse.seen) == len(whole.values) - before
        assert equal(sink, whole), f"stopped after {before}"
        assert [each.layer for each in found.facts] == [0, 1]
        assert found.digests.keys() == whole.values.keys()
        shutil.rmtree(tmp_path / "stopped")


@pytest.mark.usefixtures("coarse", "small")
def test_how_far_a_pass_is(tiny: Checkpoint, data: Samples, through: Any, sinks: Any) -> None:
    """Tokens times layers, never backwards, within a layer too, those of layers that an earlier run did counted."""
    told: list[tuple[int, int]] = []
    sink = sinks()
    for upto in (1, 2):
        through(tiny, data, sink, upto=upto, progress=lambda *now: told.append(now))
    assert all(before[0] <= after[0] for before, after in itertools.pairwise(told))
    assert {total for _, total in told} == {2 * 16 * 24}
    assert told[-1][0] == 2 * 16 * 24
    assert len({done for done, _ in told}) > 10


def test_lost_hidden_states_are_made_again(
    tiny: Checkpoint, data: Samples, coarse: Any, through: Any, sinks: Any, tmp_path: Path
) -> None:
    """Without its folder a pass is replayed from what the sink has: nothing is solved, and it says the same."""
    sink = sinks()
    first = through(tiny, data, sink)
    coarse.seen.clear()
    again = through(tiny, data, sink, work="new")
    assert coarse.seen == []
    assert again.facts == first.facts
    assert again.digests == first.digests
    states = [tmp_path / work / "states" / "0002-000000.bin" for work in ("work", "new")]
    assert states[0].read_bytes() == states[1].read_bytes()
    again.clear()
    assert not list((tmp_path / "new").rglob("*.bin"))


def test_digests_are_those_of_the_source(
    tiny: Checkpoint, data: Samples, coarse: Any, through: Any, sinks: Any, matrices: Any
) -> None:
    """Of each matrix that is solved, and of no other, the crc32 of what the source holds."""
    del coarse
    asked = [base for base in matrices(tiny) if ".experts.3." in base or "o_proj" in base]
    found = through(tiny, data, sinks(), bases=asked)
    weights = [each for each in group_tensors(tiny.tensors).weights if each.base in asked]
    assert found.digests == digests_of(tiny, weights)
    assert [each.solved for each in found.facts] == [1, 4]


def test_only_what_is_asked_for_is_solved(
    tiny: Checkpoint, data: Samples, coarse: Any, through: Any, sinks: Any
) -> None:
    """One matrix of a group alone, an expert among eight, a layer not at all: the rest stays as the source has it."""
    asked = [f"model.layers.1.mlp.experts.{each}" for each in ("2.up_proj", "5.down_proj")]
    sink = sinks()
    found = through(tiny, data, sink, bases=asked)
    assert list(sink.values) == asked
    assert [group for group, _ in coarse.seen] == [("up_proj",), ("down_proj",)]
    assert found.facts[0].relative is None
    assert 0 < found.facts[1].relative < 0.5


def test_experts_without_data_have_the_layers(
    tiny: Checkpoint, data: Samples, coarse: Any, through: Any, sinks: Any
) -> None:
    """Three tokens reach six experts at most: the others are settled all the same, by what the layer has."""
    real = torch.zeros_like(data.train.real)
    real[0, :3] = True
    few = replace(data, train=replace(data.train, real=real, digest="few"))
    sink = sinks()
    through(tiny, few, sink)
    assert len(sink.values) == 40
    assert all(each.isfinite().all() for each in sink.values.values())
    pairs = [evidence for group, evidence in coarse.seen if evidence.prior is not None and len(group) == 2]
    empty = [evidence for evidence in pairs if not evidence.tokens]
    assert len(pairs) == 8
    assert len(empty) >= 2
    for evidence in empty:
        assert not evidence.hessian.any()
        assert (evidence.weight, evidence.prior.tokens) == (0, 3)
        assert evidence.prior.hessian.trace() > 0
    assert sum(evidence.tokens for evidence in pairs) == 6


def test_the_error_of_a_layer_is_its_mlps(
    tiny: Checkpoint, data: Samples, coarse: Any, through: Any, sinks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that ship as they were lose nothing; zeros lose all that an MLP gives, and no more."""
    del coarse
    for factor, wanted in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.25)):

        def settle(weights: Any, *_: Any, factor: float = factor) -> Any:
            return {
                name: Settled(each * (factor if name == "down_proj" else 1), each[:0], {})
                for name, each in weights.items()
            }

        monkeypatch.setattr(groups, "settle", settle)
        for propagate in (True, False):
            found = through(tiny, data, sinks(), work=f"{factor} {propagate}", propagate=propagate)
            assert [each.tokens for each in found.facts] == [data.validation.count] * 2
            assert [each.relative for each in found.facts] == pytest.approx([wanted] * 2, abs=1e-6)


@pytest.mark.usefixtures("coarse")
def test_a_folder_of_another_pass_is_refused(
    tiny: Checkpoint, data: Samples, through: Any, sinks: Any, matrices: Any, drawn: Callable[..., Samples]
) -> None:
    """Other data, other settings, other matrices: the hidden states are none of theirs."""
    through(tiny, data, sinks(), upto=1)
    for change in (
        {"samples": drawn(VOCABULARY, seed=1)},
        {"propagate": False},
        {"bases": matrices(tiny)[1:]},
    ):
        samples = change.pop("samples", data)
        with pytest.raises(DestinationStale):
            through(tiny, samples, sinks(), **change)
    through(tiny, data, sinks())


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[]",
        '{"facts": {}, "digests": {}}',
        {"facts": {}, "digests": {}},
        {"facts": FACTS | {"layer": 1}, "digests": {}},
        {"facts": FACTS | {"relative": "0.1"}, "digests": {}},
        {"facts": FACTS | {"relative": True}, "digests": {}},
        {"facts": FACTS | {"solved": -8}, "digests": {}},
        {"facts": FACTS, "digests": {"a": "b"}},
        '{"facts": {"layer": 0, "solved": 8, "relative": NaN, "tokens": 91}, "digests": {}}',
    ],
)
def test_a_damaged_note_is_refused_by_name(
    tiny: Checkpoint, data: Samples, through: Any, sinks: Any, tmp_path: Path, content: str | dict[str, Any] | None
) -> None:
    """What a layer's note says is checked before anything is built on it, a sound checksum or not."""
    through(tiny, data, sinks(), upto=1)
    note = tmp_path / "work" / "layers" / "layer-00000.json"
    if content is None:
        note.unlink()
    else:
        text = (
            content if isinstance(content, str) else json.dumps(content | {"crc32": shown(crc32(canonical(content)))})
        )
        note.write_text(text)
    with pytest.raises(MalformedFile, match="layer-00000"):
        through(tiny, data, sinks())


@pytest.mark.usefixtures("coarse")
def test_a_note_has_a_checksum(tiny: Checkpoint, data: Samples, through: Any, sinks: Any, tmp_path: Path) -> None:
    """A number that could be right, and is not what was noted, comes into no report."""
    through(tiny, data, sinks(), upto=1)
    note = tmp_path / "work" / "layers" / "layer-00000.json"
    note.write_text(note.read_text().replace('"solved":8', '"solved":7'))
    with pytest.raises(MalformedFile, match=r"layer-00000.*not what was noted"):
        through(tiny, data, sinks())


@pytest.mark.parametrize("name", ["states", "layers", "tokens"])
def test_no_pass_works_through_a_link(
    tiny: Checkpoint, data: Samples, through: Any, sinks: Any, tmp_path: Path, name: str
) -> None:
    """None of its folders may lead elsewhere; what lies there stays as it is."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.bin").write_bytes(b"kept")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / name).symlink_to(elsewhere)
    with pytest.raises(DestinationForeign, match="a link where k2quant keeps"):
        through(tiny, data, sinks())
    assert [path.read_bytes() for path in elsewhere.iterdir()] == [b"kept"]


@pytest.mark.usefixtures("coarse")
def test_a_full_disk_is_an_error_and_no_more(
    tiny: Checkpoint, data: Samples, through: Any, sinks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens in files have their place before memory maps them; with room again, the same call ends well."""
    sink = sinks()
    least = through(tiny, data, sinks(), work="other", upto=0).needs.least

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OutputError, match="No space left"):
            through(tiny, data, sink, memory=least)
    through(tiny, data, sink, memory=least)
    assert len(sink.values) == 40


def test_too_little_memory_is_refused_with_the_least(tiny: Checkpoint, data: Samples, through: Any, sinks: Any) -> None:
    """Before anything is read."""
    with pytest.raises(UsageError, match=r"at least 8\d\d\.\d MB, found 500\.0 MB"):
        through(tiny, data, sinks(), memory=5 * 10**8)


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("bits", [0x7FC0, 0x7E00])
def test_an_input_that_is_not_finite_is_named(
    data: Samples, tmp_path: Path, through: Any, sinks: Any, bits: int
) -> None:
    """NaN, or what is too large to be squared, ends a pass where it shows; so does one that was stopped before it."""
    write_model(tmp_path / "model")
    entry = open_checkpoint(tmp_path / "model").tensors["model.layers.0.mlp.up_proj.weight"]
    with (tmp_path / "model" / entry.file).open("r+b") as file:
        file.seek(entry.start)
        file.write(bits.to_bytes(2, "little") * (entry.nbytes // 2))
    for _ in range(2):
        with pytest.raises(BadValue, match=r"layers\.0\.mlp\.down_proj.*found NaN or infinity"):
            through(open_checkpoint(tmp_path / "model"), data, sinks(), bases=["model.layers.0.mlp.down_proj"])


def test_a_weight_that_is_not_finite_is_named(data: Samples, tmp_path: Path, through: Any, sinks: Any) -> None:
    """Of two matrices that are settled together, the one that has it, with the place."""
    write_model(tmp_path / "model")
    entry = open_checkpoint(tmp_path / "model").tensors["model.layers.1.mlp.experts.6.up_proj.weight"]
    with (tmp_path / "model" / entry.file).open("r+b") as file:
        file.seek(entry.start + 2 * (entry.shape[1] + 7))
        file.write(b"\x80\x7f")
    with pytest.raises(BadValue, match=r"`model\.layers\.1\.mlp\.experts\.6\.up_proj\.weight`.*inf.*row 1, column 7"):
        through(open_checkpoint(tmp_path / "model"), data, sinks())


def test_an_output_that_is_not_finite_is_named(
    tiny: Checkpoint, data: Samples, through: Any, sinks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite weights may give what BF16 does not hold: the layer is named, and no note of it says so little."""

    def settle(weights: Any, *_: Any) -> Any:
        huge = {name: torch.full_like(each, 3e38) if name == "down_proj" else each for name, each in weights.items()}
        return {name: Settled(each, each[:0], {}) for name, each in huge.items()}

    monkeypatch.setattr(groups, "settle", settle)
    with pytest.raises(BadValue, match=r"model\.layers\.0\.mlp.*found NaN or infinity"):
        through(tiny, data, sinks())


def test_work_is_done_in_turn() -> None:
    """Handed in by three threads in any order, pieces are done in the order of their numbers, one at a time."""
    turns, done, numbers = Turns(2), [], itertools.count()
    lock = threading.Lock()

    def thread() -> None:
        while True:
            with lock:
                number = next(numbers)
            if number >= 60:
                return
            for _ in range(number * 7 % 5 * 1000):
                pass
            turns.hand(number, lambda number=number: done.append(number), wait=number % 7 == 0)  # type: ignore[misc]
            assert number % 7 or done[-1] >= number

    threads = [threading.Thread(target=thread) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(20)
    assert done == list(range(60))


def test_who_waits_is_let_go_when_another_fails() -> None:
    """Turn 0 never comes: whoever waits for it goes on, and its work is not done."""
    turns, done = Turns(0), []
    waiting = threading.Thread(target=lambda: turns.hand(1, lambda: done.append(1)))
    waiting.start()
    turns.stop()
    waiting.join(20)
    assert not waiting.is_alive()
    assert done == []
