"""Fidelity in parts: whoever measures which batches, killed or not, the figures are those of one run, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from k2quant.cli import main
from k2quant.conversion.spreading.part import Part
from k2quant.errors import (
    DestinationForeign,
    DestinationInUse,
    DestinationStale,
    HarnessFault,
    MalformedFile,
    UsageError,
)
from k2quant.eval import measure_fidelity
from k2quant.eval.drift import batches, comparing
from k2quant.eval.drift.batches import Layout, Measured
from k2quant.eval.drift.findings import Fidelity, Unfinished
from k2quant.eval.drift.parts import RESULT, RUN, Parts, meeting
from k2quant.model import stream_forward
from k2quant.nano import architecture, vocabulary, writing

pytestmark = pytest.mark.usefixtures("one_thread")

LETTERS = "".join(vocabulary.CHARACTERS[:-1]) * 9
OPTIONS: dict[str, Any] = {"context": 17, "tokens": 112}
COUNT = 4
"""Batches: seven chunks of [BOS] and 16 characters, two by two."""


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have two chunks in a batch."""
    monkeypatch.setattr("k2quant.model.passes.texts._AT_ONCE", 34)


@pytest.fixture(scope="module")
def other(base: Path) -> Path:
    """A candidate: another nano-K2 with fresh weights."""
    folder = base.parent / "other"
    folder.mkdir()
    torch.manual_seed(1)
    writing.write(folder, architecture.build(), {})
    return folder


@pytest.fixture(scope="module")
def text(base: Path) -> Path:
    """A text in characters that nano-K2's tokenizer reads."""
    path = base.parent / "text.txt"
    path.write_text(LETTERS)
    return path


@pytest.fixture(scope="module")
def whole(base: Path, other: Path, text: Path) -> Fidelity:
    """What one run finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("k2quant.model.passes.texts._AT_ONCE", 34)
        found: Fidelity = measure_fidelity(base, other, text=text, **OPTIONS)
    return found


@pytest.fixture(scope="module")
def half(base: Path, other: Path, text: Path) -> Path:
    """The folder of a measurement whose first half is done."""
    folder = base.parent / "half.parts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("k2quant.model.passes.texts._AT_ONCE", 34)
        done = measure_fidelity(base, other, text=text, part="1/2", shared=folder, **OPTIONS)
    assert done == Unfinished(part="1/2", missing=(2, 3), batches=COUNT)
    return folder


class Job:
    """A measurement in parts."""

    def __init__(self, base: Path, other: Path, text: Path, shared: Path) -> None:
        self.given: dict[str, Any] = {"base": base, "candidate": other, "text": text, "shared": shared, **OPTIONS}

    def part(self, part: str, **changes: Any) -> Fidelity | Unfinished:
        """Run a part of it."""
        given = self.given | changes
        return measure_fidelity(given.pop("base"), given.pop("candidate"), part=part, **given)


@pytest.fixture
def job(base: Path, other: Path, text: Path, tmp_path: Path) -> Job:
    """One that was not begun."""
    return Job(base, other, text, tmp_path / "found.parts")


@pytest.fixture
def begun(base: Path, other: Path, text: Path, half: Path, tmp_path: Path) -> Job:
    """One whose first half is done."""
    return Job(base, other, text, Path(shutil.copytree(half, tmp_path / "begun.parts")))


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches of each pass that is run."""
    seen: list[int] = []

    def counted(folder: Path, run: list[Tensor], *rest: Any, **options: Any) -> Iterator[Tensor]:
        seen.append(len(run))
        return stream_forward(folder, run, *rest, **options)

    monkeypatch.setattr(comparing, "stream_forward", counted)
    return seen


def _json(found: Fidelity | Unfinished) -> str:
    assert isinstance(found, Fidelity)
    return json.dumps(found.as_dict())


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("of", [1, 3, 6])
def test_parts_find_what_one_run_finds(of: int, job: Job, whole: Fidelity, passed: list[int]) -> None:
    """To the last bit, in whatever order, and with more parts than batches; each batch is measured once."""
    order = [*range(2, of + 1), 1]
    found = [job.part(f"{number}/{of}") for number in order]
    assert [isinstance(one, Fidelity) for one in found] == [False] * (of - 1) + [True]
    assert _json(found[-1]) == json.dumps(whole.as_dict())
    assert sum(passed) == 2 * COUNT
    assert _names(job.given["shared"]) == [RUN, RESULT]


def test_a_batch_knows_nothing_of_the_others(half: Path, job: Job) -> None:
    """Alone it gives the same bytes as beside another, those of the layers' outputs included."""
    assert job.part("2/4") == Unfinished(part="2/4", missing=(0, 2, 3), batches=COUNT)
    name = "batch-000001.safetensors"
    assert (job.given["shared"] / name).read_bytes() == (half / name).read_bytes()


def test_another_division_goes_on(begun: Job, whole: Fidelity, passed: list[int]) -> None:
    """What is measured is not measured again, whatever N it was measured with."""
    assert isinstance(begun.part("3/4"), Unfinished)
    assert passed == [1, 1]
    assert _json(begun.part("1/1")) == json.dumps(whole.as_dict())
    assert passed == [1, 1, 1, 1]


def test_a_part_that_was_killed_is_repeated(
    begun: Job, whole: Fidelity, passed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It measures what it had not kept; a file that was being written is nobody's, and goes."""
    put = Parts.put

    def killed(self: Parts, number: int, *rest: Any) -> None:
        put(self, number, *rest)
        (begun.given["shared"] / "batch-000003.safetensors.2-of-2-0000aaaa.partial").write_bytes(b"torn")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            begun.part("2/2")
    assert _json(begun.part("2/2")) == json.dumps(whole.as_dict())
    assert passed == [2, 2, 1, 1]
    assert _names(begun.given["shared"]) == [RUN, RESULT]


def test_a_kill_before_the_result_loses_no_batch(
    begun: Job, whole: Fidelity, passed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any part completes then, whether it has something to measure or not."""

    def killed(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            begun.part("2/2")
    assert _json(begun.part("1/2")) == json.dumps(whole.as_dict())
    assert passed == [2, 2]


def test_a_late_part_returns_the_result(
    begun: Job, whole: Fidelity, passed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it comes when all is done, or another completes while it measures; and the last tidies up."""
    put = Parts.put

    def overtaken(self: Parts, number: int, *rest: Any) -> None:
        put(self, number, *rest)
        if number == COUNT - 1:
            assert isinstance(begun.part("1/1"), Fidelity)

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "put", overtaken)
        assert _json(begun.part("2/2")) == json.dumps(whole.as_dict())
    assert _names(begun.given["shared"]) == [RUN, RESULT]
    assert _json(begun.part("1/2")) == json.dumps(whole.as_dict())
    assert passed == [2, 2]


@pytest.mark.parametrize("what", ["text", "dtype", "candidate"])
def test_another_measurement_is_refused(what: str, begun: Job, tmp_path: Path, passed: list[int]) -> None:
    """By the folder's name and what differs, before a weight is read; all that was measured stays."""
    (tmp_path / "text.txt").write_text(LETTERS[1:])
    changed = {"text": tmp_path / "text.txt", "dtype": "float32", "candidate": begun.given["base"]}[what]
    before = _names(begun.given["shared"])
    with pytest.raises(DestinationStale, match=f"begun.parts: parts of another measurement.*other {what}"):
        begun.part("2/2", **{what: changed})
    assert passed == []
    assert set(before) - {"share-1-of-2"} <= set(_names(begun.given["shared"]))


def test_a_finished_measurement_binds_nobody(begun: Job, whole: Fidelity) -> None:
    """Another one takes its folder, and has nothing of its result."""
    assert isinstance(begun.part("2/2"), Fidelity)
    assert isinstance(begun.part("1/2", candidate=begun.given["base"]), Unfinished)
    assert not (begun.given["shared"] / RESULT).exists()
    found = begun.part("2/2", candidate=begun.given["base"])
    assert isinstance(found, Fidelity)
    assert found.kl.value == 0 < whole.kl.value


def test_one_process_does_a_part_at_a_time(job: Job, passed: list[int]) -> None:
    """Another that is to do the same is refused; one that does another is not."""
    with meeting(job.given["shared"], Part(6, 6), {}, soft_lock=False):
        with pytest.raises(DestinationInUse, match="writes part 6 of 6 here"):
            job.part("6/6")
        with pytest.raises(DestinationStale):  # it got in, and found what is not its own
            job.part("5/6")
    assert passed == []
    assert not job.given["shared"].exists()


def test_a_folder_of_something_else_is_refused(job: Job, passed: list[int]) -> None:
    """By what lies in it."""
    job.given["shared"].mkdir()
    (job.given["shared"] / "notes.txt").write_text("mine")
    with pytest.raises(DestinationForeign, match=r"not empty.*notes\.txt"):
        job.part("1/2")
    assert passed == []


def test_a_part_that_fails_leaves_nothing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch was measured, so there is nothing to go on from."""

    def broken(*_: object) -> NoReturn:
        raise HarnessFault("no numbers")

    monkeypatch.setattr(comparing, "check_finite", broken)
    with pytest.raises(HarnessFault):
        job.part("1/2")
    assert not job.given["shared"].exists()


def test_a_folder_that_goes_meanwhile_is_told(begun: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured for a folder that somebody deleted is no part of anything."""
    put = Parts.put

    def emptied(self: Parts, number: int, *rest: Any) -> None:
        shutil.rmtree(begun.given["shared"], ignore_errors=True)
        put(self, number, *rest)

    monkeypatch.setattr(Parts, "put", emptied)
    with pytest.raises(DestinationStale, match="was emptied while this part was measured"):
        begun.part("2/2")


def test_a_damaged_batch_is_refused_by_name(begun: Job, passed: list[int]) -> None:
    """A part that has it to itself says so at once, and one that completes at the end."""
    path = begun.given["shared"] / "batch-000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for part, passes in (("1/2", []), ("2/2", [2, 2])):
        with pytest.raises(MalformedFile, match=r"batch-000001\.safetensors: not what was written.*run its part again"):
            begun.part(part)
        assert passed == passes
    path.unlink()
    assert isinstance(begun.part("1/2"), Fidelity)


def test_part_and_folder_belong_together(job: Job) -> None:
    """One without the other is refused, as is what is no part."""
    for given in ({"part": "1/2"}, {"shared": "here"}, {"soft_lock": True}, {"part": "3/2", "shared": "here"}):
        with pytest.raises(UsageError, match="part"):
            measure_fidelity(job.given["base"], job.given["base"], **given)


def _run(job: Job, *words: object) -> Any:
    given = job.given
    options = ("--text", given["text"], "--context", 17, "--tokens", 112, *words)
    return CliRunner().invoke(main, ["eval", "fidelity", *map(str, (given["base"], given["candidate"], *options))])


def test_the_command_says_what_is_still_to_come(begun: Job, whole: Fidelity, tmp_path: Path) -> None:
    """And exits 0; the last part writes the file and prints it, as one run does."""
    output = tmp_path / "begun"
    first = _run(begun, "--part", "1/2", "-o", output)
    assert (first.exit_code, first.stdout) == (
        0,
        f"{output}: part 1 of 2 done; the rest is still to come: 2 of 4 batches\n",
    )
    told = json.loads(_run(begun, "--part", "1/2", "-o", output, "--json").stdout)
    assert told == {"output": str(output), "part": "1/2", "missing": [2, 3], "batches": 4}
    assert not output.exists()
    last = _run(begun, "--part", "2/2", "-o", output)
    assert last.exit_code == 0
    assert output.read_text() == json.dumps(whole.as_dict(), indent=1) + "\n"
    assert f"{whole.base_perplexity:.5g}" in last.stdout


def test_the_command_wants_a_file_for_the_result(job: Job) -> None:
    """Beside which the parts meet; what is no part is refused too, before anything is read."""
    for words, said in (
        (("--part", "1/2"), "--part without --output"),
        (("--part", "0/2", "-o", "x"), "part is '0/2'"),
    ):
        done = _run(job, *words)
        assert (done.exit_code, done.stdout) == (2, "")
        assert said in done.stderr


LAYOUT = Layout(scored=3, tokens=4, places=2, layers=2, routers=1, experts=8, chosen=2, hidden=5, dtype=torch.bfloat16)
RUN_DIGEST = bytes(range(32))


def _measured() -> Measured:
    torch.manual_seed(0)
    return Measured(
        scores=torch.rand(5, 3, dtype=torch.float64),
        sums=torch.rand(2, 3, dtype=torch.float64),
        routes=torch.randint(0, 8, (2, 1, 4, 2), dtype=torch.int32),
        early=torch.randn(2, 2, 2, 5).bfloat16(),
    )


def _saved(path: Path, measured: Measured, layout: Layout = LAYOUT) -> Path:
    batches.save(path, measured, layout, run=RUN_DIGEST, attempt="1-of-1")
    return path


@pytest.mark.parametrize("layout", [LAYOUT, LAYOUT._replace(places=0), LAYOUT._replace(routers=0)])
def test_a_batch_comes_back_bit_for_bit(layout: Layout, tmp_path: Path) -> None:
    """One too where nothing is read out early, or a model has no router."""
    kept = _measured()
    kept = kept._replace(early=kept.early[:, :, : layout.places], routes=kept.routes[:, : layout.routers])
    found = batches.load(_saved(tmp_path / "batch", kept, layout), layout, run=RUN_DIGEST)
    for one, two in zip(kept, found, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("scores", float("nan"), "`scores` holds NaN"),
        ("sums", float("inf"), "`sums` holds NaN or infinity"),
        ("early", float("nan"), "`early` holds NaN"),
        ("routes", 8, "`routes` names an expert that is none of 8"),
        ("routes", -1, "`routes` names an expert that is none of 8"),
    ],
)
def test_figures_that_no_model_gives_are_refused(field: str, value: float, said: str, tmp_path: Path) -> None:
    """Though the file is as it was written."""
    measured = _measured()
    getattr(measured, field).view(-1)[1] = value
    path = _saved(tmp_path / "batch", measured)
    with pytest.raises(MalformedFile, match=f"batch: {said}"):
        batches.load(path, LAYOUT, run=RUN_DIGEST)


def test_files_that_lie_are_refused(tmp_path: Path) -> None:
    """Another shape, another dtype, another run, another batch, something behind, something cut off, no file at all."""
    path = _saved(tmp_path / "batch", _measured())

    def refused(said: str, layout: Layout = LAYOUT, run: bytes = RUN_DIGEST, at: Path = path) -> None:
        with pytest.raises(MalformedFile, match=f"{at.name}: {said}"):
            batches.load(at, layout, run=run)

    refused(r"no measurement of this batch.*F64 \[5, 4\].*found.*F64 \[5, 3\]", LAYOUT._replace(scored=4))
    refused("no measurement of this batch", LAYOUT._replace(dtype=torch.float16))
    refused("measured by another run", run=bytes(32))
    refused("not what was written", at=Path(shutil.copy(path, tmp_path / "renamed")))
    data = path.read_bytes()
    for name, content in (("longer", data + b"\0"), ("shorter", data[:-1]), ("empty", b""), ("huge", data * 300)):
        (tmp_path / name).write_bytes(content)
        refused("", at=tmp_path / name)
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(Exception, match="a link that leaves the folder"):
        batches.load(tmp_path / "link", LAYOUT, run=RUN_DIGEST)
