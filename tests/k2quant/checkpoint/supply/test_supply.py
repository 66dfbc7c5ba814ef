"""A supply gives the right bytes to many threads, within its memory, and proves them before it says so."""

from __future__ import annotations

import contextlib
import errno
import random
import shutil
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from k2quant.checkpoint.remote.fetching import marked, partial_path
from k2quant.checkpoint.supply.ahead import Ahead
from k2quant.checkpoint.supply.choosing import memory
from k2quant.checkpoint.supply.order import Ranges, Step, Use
from k2quant.checkpoint.supply.proofs import unproven
from k2quant.checkpoint.supply.supply import Supply
from k2quant.errors import CheckpointError, OutputError, UsageError

pytestmark = pytest.mark.usefixtures("small")

PIECE = 4096
SIZES = {"one": 100_000, "two": 70_123, "three": 4096, "four": 33_000}
PATIENCE = 300.0
"""Seconds after which something hangs, however slow the machine is."""
LAYOUTS = ("weights", "scales first", "scales last")


def files(seed: int = 0) -> dict[str, bytes]:
    """Return four files."""
    dice = random.Random(seed)  # noqa: S311  not for secrets
    return {name: dice.randbytes(size) for name, size in SIZES.items()}


def ranges_of(file: str, layout: str) -> Ranges:
    """Return what is read of a file: panels of weights, with scales of a ninth before or behind all weights."""
    size, head, panels = SIZES[file], 100, 16
    scales = 0 if layout == "weights" else (size - head) // 9
    first = head + (scales if layout == "scales first" else 0)
    weights = size - head - scales
    start = head if layout == "scales first" else size - scales
    found = []
    for panel in range(panels):
        found.append((file, first + weights * panel // panels, first + weights * (panel + 1) // panels))
        if scales:
            found.append((file, start + scales * panel // panels, start + scales * (panel + 1) // panels))
    return found


def uses_of(layout: str, partner: tuple[str, int, int] | None = None) -> list[Use]:
    """Return an output shard for each file; the first reads a partner too."""
    uses = [Use(f"out {name}", tuple(ranges_of(name, layout))) for name in SIZES]
    return uses if partner is None else [uses[0]._replace(ranges=(*uses[0].ranges, partner)), *uses[1:]]


class Run:
    """What a conversion does with a supply: ranges by some threads, some output shards in turn, then proofs."""

    def __init__(self, supply: Supply, uses: Sequence[Use], data: dict[str, bytes], **more: Any) -> None:
        """Begin; `more`: `done` output shards and what `Supply.begin` takes."""
        done = more.pop("done", ())
        self.supply, self.data, self.uses = supply, data, [use for use in uses if use.output not in done]
        self.records: dict[str, dict[str, Any]] = {}
        self.abreast = supply.begin(
            uses,
            **{
                "todo": {use.output for use in self.uses},
                "records": [],
                "stage": Path("/nowhere"),
                "low_disk": False,
                "once": True,
                "abreast": 2,
                "missing": {},
                **more,
            },
        )
        self.lock, self.left = threading.Lock(), {use.output: len(use.ranges) for use in self.uses}
        self.errors: list[BaseException] = []

    def ranges(self) -> Iterator[tuple[str, tuple[str, int, int]]]:
        """Yield ranges of some output shards in turn."""
        todo, live = iter(self.uses), deque[tuple[str, Iterator[tuple[str, int, int]]]]()

        def begin(use: Use | None) -> None:
            if use is not None:
                self.supply.open(use.output)
                live.append((use.output, iter(use.ranges)))

        for _ in range(self.abreast):
            begin(next(todo, None))
        while live:
            output, rest = live.popleft()
            if (found := next(rest, None)) is not None:
                live.append((output, rest))
                yield output, found
            else:
                begin(next(todo, None))

    def work(self, ranges: Iterator[tuple[str, tuple[str, int, int]]]) -> None:
        """Read until nothing is left."""
        try:
            while True:
                with self.lock:
                    found = next(ranges, None)
                if found is None:
                    return
                output, (file, start, stop) = found
                buffer = bytearray(stop - start)
                self.supply.read_into(file, start, memoryview(buffer))
                assert buffer == self.data[file][start:stop], (file, start)
                with self.lock:
                    self.left[output] -= 1
                    last = not self.left[output]
                if last:
                    self.records[output] = self.supply.prove(output)
                    self.supply.written(output)
        except BaseException as error:  # noqa: BLE001  raised by `go`
            self.errors.append(error)

    def go(self, workers: int = 3) -> Run:
        """Read all of it."""
        ranges = self.ranges()
        threads = [threading.Thread(target=self.work, args=(ranges,)) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a reader hangs"
        if self.errors:
            self.supply.close()
            raise self.errors[0]
        self.supply.finish()
        return self


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(LAYOUTS), st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_all_bytes_are_right_and_come_about_once(
    memory_place: Callable[..., Any],
    layout: str,
    workers: int,
    abreast: int,
    known: bool,  # noqa: FBT001
) -> None:
    """By range, with any number of threads and output shards in turn, whether or not digests are known."""
    data = files()
    place = memory_place(data, known=known)
    supply = Supply(place)
    run = Run(supply, uses_of(layout), data, abreast=abreast)
    ahead = supply._ahead  # noqa: SLF001
    run.go(workers)
    total = sum(SIZES.values())
    assert supply.way == "ranges"
    assert supply.traffic == sum(count for _, _, count in place.read)
    assert supply.traffic <= total * (1.0 if layout == "weights" else 1.35) + 2 * PIECE
    assert ahead is not None
    if workers == 1:  # of several, one that the system lets wait has the others take pieces that cannot be hashed yet
        assert ahead.peak <= memory(workers) + (abreast + 1) * PIECE  # one whose turn it is, of each output shard
    assert not any(run.records.values())


def test_a_reader_that_is_slow_does_not_have_others_fill_the_memory(
    memory_place: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it has yet to ask for a piece, the next fetches that first: nothing piles up that waits for its hash."""
    data = files()
    monkeypatch.setattr("k2quant.checkpoint.supply.ahead.FETCHERS", 0)
    supply = Supply(memory_place(data))
    uses = [Use("out one", tuple(ranges_of("one", "weights")))]
    Run(supply, uses, data, abreast=1)
    ahead = supply._ahead  # noqa: SLF001
    assert ahead is not None
    supply.open("out one")
    for file, start, stop in (*uses[0].ranges[1:], uses[0].ranges[0]):
        buffer = bytearray(stop - start)
        supply.read_into(file, start, memoryview(buffer))
        assert buffer == data[file][start:stop]
    assert ahead.peak <= 4 * PIECE < SIZES["one"] // 4  # those of the slow one's range, and one more
    supply.prove("out one")
    supply.finish()


def test_a_digest_that_is_wrong_is_found_before_the_output_shard_is_named(memory_place: Callable[..., Any]) -> None:
    """One bit at the very end of a file: its output shard is not proven, and the error says which file."""
    data = files()
    place = memory_place(data)
    place.data["two"] = data["two"][:-1] + bytes([data["two"][-1] ^ 1])
    run = Run(Supply(place), uses_of("weights"), place.data)
    with pytest.raises(CheckpointError, match=r"memory://place/two: .*expected sha256 .*fetches it anew"):
        run.go()
    assert "out two" not in run.records


def test_header_and_what_nobody_reads_are_part_of_the_digest(memory_place: Callable[..., Any]) -> None:
    """A file of which only the middle is read is hashed from its first byte to its last."""
    data = files()
    place = memory_place(data)
    place.data["one"] = bytes([data["one"][0] ^ 1]) + data["one"][1:]
    with pytest.raises(CheckpointError, match=r"memory://place/one: .*sha256"):
        Run(Supply(place), [Use("out one", (("one", 40_000, 50_000),))], place.data).go()


def test_a_failure_of_the_line_reaches_who_waits(memory_place: Callable[..., Any]) -> None:
    """Not only the thread that fetches: no reader hangs."""
    data = files()
    place = memory_place(data)
    del place.data["two"]
    with pytest.raises(KeyError):
        Run(Supply(place), uses_of("weights"), data).go()


def test_a_partner_is_proven_by_whoever_reads_its_shard_whole(memory_place: Callable[..., Any]) -> None:
    """What was read of another's shard before is noted, and what proves it too; all of it together is proven."""
    data = files()
    records = Run(Supply(memory_place(data)), uses_of("weights", ("four", 1000, 1200)), data, abreast=1).go(1).records
    assert [block for block, _ in records["out one"]["fetched"]["read"]["four"]] == [1, 2]
    assert [block for block, _ in records["out four"]["fetched"]["proven"]["four"]] == [1, 2]
    assert records.keys() == {f"out {name}" for name in SIZES}
    assert unproven(records.values()) == 0
    assert unproven([records["out one"]]) == 2
    records["out four"]["fetched"]["proven"]["four"][0][1] ^= 1
    with pytest.raises(CheckpointError, match=r"four: gave other bytes .*restart=True"):
        unproven(records.values())


def test_a_partner_that_was_read_otherwise_is_found(memory_place: Callable[..., Any]) -> None:
    """By the run that reads the shard whole, from what the journal says of the one before."""
    data = files()
    place = memory_place(data)
    uses = uses_of("weights", ("four", 1000, 1200))
    record = {"fetched": {"read": {"four": [[1, 12345]]}}}
    with pytest.raises(CheckpointError, match=r"memory://place/four: gave other bytes than before .*restart=True"):
        Run(Supply(place), uses, data, done=["out one"], records=[record]).go()


def test_what_nobody_will_read_is_not_fetched(memory_place: Callable[..., Any]) -> None:
    """A piece out of its turn, that its reader had otherwise: when all was read, only what is hashed still comes."""
    place = memory_place(files())
    steps = [Step("one", number, PIECE, hashed=True) for number in range(4)]
    steps += [Step("two", 0, PIECE, hashed=False)]
    steps += [Step("one", number, 0, hashed=True) for number in range(4, -(-SIZES["one"] // PIECE))]
    sizes = {name: file.size for name, file in place.files.items()}
    found = Ahead(place.read_into, sizes, {"one": place.files["one"].sha256}, str)
    found.begin([("out", steps)], abreast=1)  # room for four pieces
    found.prove("out")
    found.close()
    assert {name for name, _, _ in place.read} == {"one"}


def test_a_damaged_record_says_nothing(memory_place: Callable[..., Any]) -> None:
    """Whatever stands in a journal; a file that the place does not have is nobody's."""
    data = files()
    damaged: list[Any] = [None, 1, [], {"read": 3, "proven": {"four": [1, [2], ["a", 3]]}}]
    junk: list[Any] = [{"fetched": each} for each in damaged]
    junk.append({"fetched": {"read": {"none": [[0, 1]]}}})
    Run(Supply(memory_place(data)), uses_of("weights"), data, records=junk).go()
    assert unproven(junk[:-1]) == 0


def test_whole_shards_come_two_at_a_time_and_go(memory_place: Callable[..., Any], tmp_path: Path) -> None:
    """Where bytes are read again, on a low disk: never more than two are there, and none when all is written."""
    data = files()
    place = memory_place(data)
    begun: list[str] = []
    seen: list[int] = []
    first = threading.Barrier(2)  # who fetches first waits for who fetches second

    def count(name: str) -> None:
        if name in ("one", "two"):
            first.wait(PATIENCE)
        begun.append(name)
        gone = {each for each in begun if each in place.fetched and not list((tmp_path / "stage").glob(f"{each}.*"))}
        seen.append(len(begun) - len(gone))

    place.before = count
    supply = Supply(place)
    run = Run(supply, uses_of("scales first"), data, stage=tmp_path / "stage", low_disk=True, once=False, abreast=8)
    run.go(8)
    assert run.abreast == 1
    assert supply.way == "shards"
    assert max(seen) == 2
    assert not (tmp_path / "stage").exists()
    assert supply.traffic == sum(SIZES.values())
    assert not place.read


def test_what_a_stopped_run_left_is_taken_and_what_is_no_use_goes(
    memory_place: Callable[..., Any], tmp_path: Path
) -> None:
    """A whole shard is found again, the part of one stays for who fetches it, others are deleted."""
    data = files()
    place, stage = memory_place(data), tmp_path / "stage"
    stage.mkdir()
    one, two, four = (marked(stage / name, place.files[name]) for name in ("one", "two", "four"))
    part = partial_path(stage / "two", place.files["two"])
    for path, content in {one: data["one"], part: b"part", four: data["four"]}.items():
        path.write_bytes(content)
    found: list[set[Path]] = []
    place.before = lambda name: found.append(set(stage.iterdir())) if name == "two" else None
    supply = Supply(place)
    Run(supply, uses_of("weights"), data, stage=stage, low_disk=True, once=False).go()
    assert supply.traffic == sum(SIZES.values()) - SIZES["one"]
    assert [each - {one} for each in found] == [{part}]  # which may be read by then, and gone
    assert two.with_name(f"{two.name}.partial") == part == partial_path(two, place.files["two"])


def test_a_shard_of_another_version_is_not_taken_for_one_of_this(
    memory_place: Callable[..., Any], tmp_path: Path
) -> None:
    """Of the same name and size, as a fine-tune has them, it may lie where a store's earlier output was stopped."""
    old, new = files(1), files(2)
    before, stage = memory_place(old, known=False), tmp_path / "stage"
    stage.mkdir()
    marked(stage / "one", before.files["one"]).write_bytes(old["one"])
    place = memory_place(new, known=False)
    place.files = {name: file._replace(version="2") for name, file in place.files.items()}
    Run(Supply(place), uses_of("weights"), new, stage=stage, once=False).go()
    assert "one" in place.fetched


def test_a_link_in_place_of_the_folder_goes_and_what_it_leads_to_stays(
    memory_place: Callable[..., Any], tmp_path: Path
) -> None:
    """Whoever made the link would choose what is deleted as of no use."""
    data, others = files(), tmp_path / "others"
    others.mkdir()
    (others / "mine").write_bytes(b"mine")
    (tmp_path / "stage").symlink_to(others)
    Run(Supply(memory_place(data)), uses_of("weights"), data, stage=tmp_path / "stage", once=False).go()
    assert [path.name for path in others.iterdir()] == ["mine"]


def test_a_full_disk_is_named(memory_place: Callable[..., Any], tmp_path: Path) -> None:
    """It is the output's trouble, not the checkpoint's, and a reader that waits hears of it."""
    place = memory_place(files())

    def full(_name: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    place.before = full
    with pytest.raises(OutputError, match=r"stage/(one|two): the disk is full.*free some space"):
        Run(Supply(place), uses_of("weights"), place.data, stage=tmp_path / "stage", once=False).go()


def test_a_disk_that_never_has_room_is_refused(memory_place: Callable[..., Any], tmp_path: Path) -> None:
    """Beside the output there is no room for one shard: that is said at once, and nobody waits for ever."""
    place = memory_place(files())
    with pytest.raises(OutputError, match="too small for a shard of the source beside the output"):
        Run(
            Supply(place),
            uses_of("weights"),
            place.data,
            stage=tmp_path / "stage",
            once=False,
            missing={"out one": 2**60},
        ).go()


@pytest.mark.parametrize("left", [0, 1])
def test_a_low_disk_without_room_for_two_shards_is_refused_before_anything_comes(
    left: int, memory_place: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two largest beside the output: one byte less is said at once, and no run fills the disk and ends midway."""
    place, output = memory_place(files()), 10**6
    sizes = sorted((each.size for each in place.files.values()), reverse=True)
    free = output + sum(sizes[:2]) - 1 + left
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    missing, stage = {"out one": output}, tmp_path / "stage"
    run: dict[str, Any] = {"stage": stage, "low_disk": True, "once": False, "missing": missing}
    refused = pytest.raises(OutputError, match="too small for 2 shards of the source beside the output")
    expected: contextlib.AbstractContextManager[object] = contextlib.nullcontext() if left else refused
    with expected:
        Run(Supply(place), uses_of("weights"), place.data, **run).go()
    assert bool(place.fetched) == bool(left)


def test_an_output_of_many_shards_is_refused_on_a_low_disk(memory_place: Callable[..., Any], tmp_path: Path) -> None:
    """Three shards for one output cannot be there two at a time."""
    place = memory_place(files())
    uses = [Use("out", tuple(each for name in ("one", "two", "four") for each in ranges_of(name, "weights")))]
    with pytest.raises(UsageError, match="made of 3 shards of the source, and `low_disk=` has 2"):
        Run(Supply(place), uses, place.data, stage=tmp_path / "stage", low_disk=True, once=False)


def test_alone_a_supply_reads_just_what_is_asked(memory_place: Callable[..., Any]) -> None:
    """No run: large ranges come as they are, small ones by blocks that are kept for the next."""
    data = files()
    place = memory_place(data)
    supply = Supply(place)
    for start, count in ((3, 5000), (1000, 8), (1008, 8), (99_990, 10)):
        buffer = bytearray(count)
        supply.read_into("one", start, memoryview(buffer))
        assert buffer == data["one"][start : start + count]
    assert place.read == [("one", 3, 5000), ("one", 512, 512), ("one", 99_840, 160)]
    assert supply.traffic == 5000 + 512 + 160


def test_a_report_says_of_digests_and_traffic_what_is_so(memory_place: Callable[..., Any]) -> None:
    """Also where other machines read the source: what came to them is not known here, what the place knows is."""
    data = files()
    asked: dict[str, Any] = {"shards": ["one", "two"], "here": False}
    assert Supply(memory_place(data)).facts(**asked) == {"address": "memory://place", "sha256": "compared"}
    assert Supply(memory_place(data, known=False)).facts(**asked)["sha256"] == "not known to the place"
    assert (
        Supply(memory_place(data)).facts(["one"], here=True)["sha256"] == "compared, but for what the hub's cache had"
    )
    supply = Supply(memory_place(data))
    Run(supply, uses_of("weights"), data).go()
    assert supply.facts(**asked)["way"] == "ranges"
    assert supply.facts(**asked)["traffic"] == sum(SIZES.values())


def test_a_supply_serves_one_run_after_another(memory_place: Callable[..., Any]) -> None:
    """A process that writes shards as they are given to it begins anew with each."""
    data = files()
    supply = Supply(memory_place(data))
    uses = uses_of("scales last")
    for number in range(4):
        Run(supply, uses, data, done=[use.output for at, use in enumerate(uses) if at != number]).go()
    assert supply.traffic <= sum(SIZES.values()) * 1.35 + 8 * PIECE


def test_a_shard_that_is_wanted_later_makes_room_for_one_that_is_wanted_now(
    memory_place: Callable[..., Any], tmp_path: Path
) -> None:
    """Two shards stay for a last output shard, and one between needs a third: nobody waits for ever."""
    data = files()
    one, two, four = (ranges_of(name, "weights") for name in ("one", "two", "four"))
    uses = [Use("a", tuple(one)), Use("b", tuple(two)), Use("c", tuple(four)), Use("d", (*one, *two))]
    run = Run(Supply(memory_place(data)), uses, data, stage=tmp_path / "stage", low_disk=True, once=False, abreast=1)
    assert run.go().records.keys() == {"a", "b", "c", "d"}


@pytest.mark.parametrize("begun", [("c", "d"), ("c", "d", "e"), ("d", "c"), ("e", "d", "c")])
def test_who_is_begun_first_gets_what_it_needs(
    memory_place: Callable[..., Any], tmp_path: Path, begun: tuple[str, ...]
) -> None:
    """Whatever lies there for others, which are begun before it comes: nobody waits for ever, in whatever order."""
    data = files()
    read = {"a": ["one"], "b": ["two"], "c": ["four"], "d": ["one", "two"], "e": ["three"]}
    uses = [Use(output, tuple(each for name in names for each in ranges_of(name, "weights")))
            for output, names in read.items()]  # fmt: skip
    supply = Supply(memory_place(data))
    Run(supply, uses, data, stage=tmp_path / "stage", low_disk=True, once=False, abreast=1)
    assert supply._stage is not None  # noqa: SLF001
    for output in ("a", "b"):  # after that, both shards that may lie there are those of `d`
        in_time(supply.prove, output)
    for output in ("a", "b"):
        supply.written(output)
    with supply._stage._change:  # noqa: SLF001  nothing comes or goes between
        for output in begun:
            supply.open(output)
    for output in dict.fromkeys([*begun, "c", "d", "e"]):
        for name in read[output]:
            in_time(supply.read_into, name, 0, memoryview(bytearray(8)))
            assert len(list((tmp_path / "stage").iterdir())) <= 2
        in_time(supply.prove, output)
        supply.written(output)
    supply.finish()


def in_time(work: Callable[..., object], *asked: object) -> None:
    """Do something that must not wait for ever."""
    thread = threading.Thread(target=work, args=asked, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), f"{work.__name__} hangs"


def test_an_output_shard_that_fails_ends_who_waits_for_its_room(
    memory_place: Callable[..., Any], tmp_path: Path
) -> None:
    """What it used will never go; a reader that waits for the next source shard hears what went wrong."""
    data = files()
    supply = Supply(memory_place(data))
    uses = [Use(f"out {name}", tuple(ranges_of(name, "weights"))) for name in ("one", "two", "four")]
    Run(supply, uses, data, stage=tmp_path / "stage", low_disk=True, once=False, abreast=1)
    for use in uses:
        supply.open(use.output)
    heard: list[BaseException] = []

    def read() -> None:
        try:
            supply.read_into("four", 0, memoryview(bytearray(8)))
        except OutputError as error:
            heard.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    supply.fail(OutputError("the disk is full"))
    reader.join(PATIENCE)
    assert not reader.is_alive()
    assert [str(error) for error in heard] == ["the disk is full"]
    supply.close()


def test_a_shard_of_which_each_output_reads_little_is_proven(memory_place: Callable[..., Any], tmp_path: Path) -> None:
    """Where no output shard reads a sixteenth of it, it is fetched whole all the same, and so compared."""
    data = files()
    place = memory_place(data)
    whole = ranges_of("four", "weights")
    step = SIZES["four"] // 40
    uses = [
        Use(f"out {number}", (("four", whole[0][1] + number * step, whole[0][1] + (number + 1) * step),))
        for number in range(30)
    ]
    right = Run(Supply(place), uses, data, stage=tmp_path / "stage", once=False).go()
    assert place.fetched == ["four"]
    assert unproven(right.records.values()) == 0
