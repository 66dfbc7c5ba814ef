"""What a training run leaves behind: its history, its summary, and the page drawn of them."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2quant.errors import BadValue, MalformedFile, OutputError
from k2quant.qat.report import PAGE, write_report
from k2quant.qat.report.page import page
from k2quant.qat.report.recovery import headline, nats, recovery
from k2quant.qat.run.history import HISTORY, Answers, Evaluation, History, Record, Records, StepRecord, read_history
from k2quant.qat.run.summary import (
    SUMMARY,
    Coverage,
    Oscillations,
    RouterSummary,
    Summary,
    read_summary,
    write_summary,
)

EVIL = "</p><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;\x1b[31m\u202e\n\udcff]]>"
"""Markup, a terminal's code, a mark that turns text around, half a surrogate pair."""


def step(number: int, **changes: Any) -> StepRecord:
    """Return a plausible step."""
    loss = 2.2 + 0.3 * math.exp(-number / 50)
    record = StepRecord(
        step=number, loss=loss, cross_entropy=loss, rate=1e-3, norm=0.7, bits=2, tokens=4096, seconds=0.5
    )
    return replace(record, **changes)


def evaluation(number: int = 100, **changes: Any) -> Evaluation:
    """Return an evaluation that recovers 63% of a gap of 0.1 nats."""
    found = Evaluation(
        step=number, loss=2.137, standard_error=0.01, unrounded=2.12, start_rounded=2.2, start=2.1, gap_error=0.002
    )
    return replace(found, **changes)


def router(layer: int, experts: int = 16, **changes: Any) -> RouterSummary:
    """Return a router whose experts differ in load."""
    draw = random.Random(layer)  # noqa: S311  # a picture's numbers
    load = tuple(int(1000 * draw.lognormvariate(0, 1)) for _ in range(experts))
    found = RouterSummary(
        name=f"model.layers.{layer}.mlp.gate", layer=layer, experts=experts, load=load, start_load=load, agreement=0.97
    )
    return replace(found, **changes)


def summary(**changes: Any) -> Summary:
    """Return what a finished run may say."""
    found = Summary(
        job={"model": "nano-K2", "grid": "moonshot, INT2, group 32"},
        coverage=(
            Coverage(kind="routed experts", quantised=900, parameters=900),
            Coverage(kind="attention", quantised=0, parameters=300),
        ),
        routers=(router(1), router(2)),
        least_tokens=512,
        starved=(("model.layers.1.mlp.experts.3", 7),),
        oscillation=(Oscillations(kind="routed experts", weights=1000, flipped=250, oscillating=100),),
    )
    return replace(found, **changes)


def history(count: int = 100, *evaluations: Evaluation) -> Records:
    """Return a history of so many steps."""
    return Records(tuple(step(number) for number in range(1, count + 1)), evaluations or (evaluation(count),))


FLOATS = st.floats(0, 1e9, allow_nan=False)
STEPS = st.builds(
    StepRecord,
    step=st.just(0),
    loss=FLOATS,
    cross_entropy=FLOATS,
    divergence=st.none() | st.floats(-1e9, 1e9),
    rate=FLOATS,
    norm=FLOATS,
    bits=st.none() | st.integers(1, 32),
    tokens=st.integers(0, 2**40),
    seconds=FLOATS,
)
ANSWERED = st.builds(
    Answers,
    count=st.just(9),
    right=st.integers(0, 9),
    unrounded=st.integers(0, 9),
    start_rounded=st.none() | st.integers(0, 9),
    start=st.none() | st.integers(0, 9),
)
EVALUATIONS = st.builds(
    Evaluation,
    step=st.just(0),
    loss=FLOATS,
    standard_error=st.none() | FLOATS,
    unrounded=st.none() | FLOATS,
    start_rounded=st.none() | FLOATS,
    start=st.none() | FLOATS,
    gap_error=st.none() | FLOATS,
    answers=st.none() | ANSWERED,
)
RECORDS = st.lists(STEPS | EVALUATIONS, max_size=6).map(
    lambda found: [replace(record, step=number) for number, record in enumerate(found, 1)]
)


@settings(max_examples=25, deadline=None)
@given(RECORDS, st.integers(0, 7))
def test_histories_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record], kept: int
) -> None:
    """Every record is read as it was written, bit for bit; after a rewind, those up to its step are left."""
    path = tmp_path_factory.mktemp("run") / HISTORY
    path.touch()
    found = History(path)
    for record in records:
        found.append(record)
    assert [*read_history(path).steps] == [record for record in records if isinstance(record, StepRecord)]
    assert [*read_history(path).evaluations] == [record for record in records if isinstance(record, Evaluation)]
    found.rewind(kept)
    assert sum(map(len, read_history(path))) == sum(record.step <= kept for record in records)


def test_a_line_is_an_object_with_a_kind(tmp_path: Path) -> None:
    """Other programs read the file: a JSON object a line, named by what it is."""
    found = History(tmp_path / HISTORY)
    found.append(step(1))
    found.append(Evaluation(step=1, loss=2.5))
    lines = [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()]
    assert [line.pop("kind") for line in lines] == ["step", "evaluation"]
    assert lines == [asdict(step(1)), asdict(Evaluation(step=1, loss=2.5))]


def test_a_resumed_run_goes_on_where_its_checkpoint_was(tmp_path: Path) -> None:
    """After a kill in the middle of a line, the history is cut back to the checkpoint and goes on without a double."""
    path = tmp_path / HISTORY
    first = History(path)
    for number in (1, 2, 3, 4):
        first.append(step(number))
    with path.open("ab") as file:
        file.write(b'{"kind":"step","step":5,"lo')
    assert [record.step for record in read_history(path).steps] == [1, 2, 3, 4]
    resumed = History(path)
    resumed.rewind(2)
    resumed.append(step(3))
    assert [record.step for record in read_history(path).steps] == [1, 2, 3]
    assert path.read_bytes().endswith(b"\n")


def test_a_torn_line_never_swallows_the_next(tmp_path: Path) -> None:
    """A history that is taken up without a rewind drops the torn line before it adds one."""
    path = tmp_path / HISTORY
    History(path).append(step(1))
    with path.open("ab") as file:
        file.write(b'{"kind"')
    History(path).append(step(2))
    assert [record.step for record in read_history(path).steps] == [1, 2]


def test_rewinding_nothing_leaves_an_empty_history(tmp_path: Path) -> None:
    """A run that was killed before its first step has nothing to cut off."""
    found = History(tmp_path / HISTORY)
    found.rewind(0)
    assert read_history(tmp_path / HISTORY) == ((), ())
    found.append(step(1))
    assert len(read_history(tmp_path / HISTORY).steps) == 1


@pytest.mark.parametrize(
    "record",
    [
        step(2, loss=math.nan),
        step(2, divergence=math.inf),
        step(2, norm=-math.inf),
        step(2, tokens=-1),
        step(2, bits=True),
        step(2, seconds=1 + 2j),
        step(1),
        Evaluation(step=3, loss=math.nan),
    ],
    ids=repr,
)
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, record: Record) -> None:
    """NaN, infinity, negative counts and steps that are there already are refused, and the file stays as it was."""
    path = tmp_path / HISTORY
    found = History(path)
    found.append(step(1))
    before = path.read_bytes()
    with pytest.raises(BadValue, match=rf"step {record.step} cannot be recorded"):
        found.append(record)
    assert path.read_bytes() == before
    found.append(step(2))


GOOD = json.dumps({"kind": "step", **asdict(step(1))})
ANSWERING = json.dumps(
    {"kind": "evaluation", **asdict(evaluation(2, answers=Answers(count=9, right=6, unrounded=3, start=8)))}
)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "{}",
        "\x00\x00",
        GOOD[:-1],
        GOOD.replace('"step"', '"stop"', 1),
        GOOD.replace('"kind": "step"', '"kind": ["step"]'),
        GOOD.replace('"norm": 0.7', '"norm": NaN'),
        GOOD.replace('"norm": 0.7', '"norm": 1e999'),
        GOOD.replace('"norm": 0.7', '"norm": "0.7"'),
        GOOD.replace('"norm": 0.7', '"norms": 0.7'),
        GOOD.replace('"norm": 0.7', '"norm": 0.7, "more": 1'),
        GOOD.replace('"norm": 0.7', '"norm": 0.7, "norm": 0.7'),
        GOOD.replace('"tokens": 4096', f'"tokens": {2**70}'),
        GOOD.replace('"step": 1', '"step": 0'),
        GOOD,
        "[" * 100_000,
        ANSWERING.replace('"right": 6', '"right": 10'),
        ANSWERING.replace('"right": 6', '"right": 6.0'),
        ANSWERING.replace('"right": 6', '"rights": 6'),
        ANSWERING.replace('"count": 9', '"count": 0'),
        ANSWERING.replace('"start": 8', '"start": -1'),
        ANSWERING.replace('"answers": {', '"answers": [{').replace("}}", "}]}"),
    ],
    ids=lambda line: repr(line)[-40:],
)
def test_damage_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    """A whole line that is not a record, or comes twice, ends in an error with its number, for reader and writer."""
    path = tmp_path / HISTORY
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(MalformedFile, match=rf"{HISTORY}, line 2"):
        read_history(path)
    with pytest.raises(MalformedFile, match="line 2"):
        History(path)


def test_histories_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They counted no answers, and a run that they began goes on."""
    path = tmp_path / HISTORY
    values = {"kind": "evaluation", **asdict(evaluation(0))}
    del values["answers"]
    path.write_text(f"{json.dumps(values)}\n")
    assert read_history(path).evaluations == (evaluation(0),)
    History(path).append(evaluation(1, answers=ANSWERS))
    assert [found.answers for found in read_history(path).evaluations] == [None, ANSWERS]


def test_histories_that_are_no_files_are_refused(tmp_path: Path) -> None:
    """A folder in its place, or nothing, is an error that names it."""
    with pytest.raises(MalformedFile, match=r"history\.jsonl.*cannot be read"):
        read_history(tmp_path / HISTORY)
    (tmp_path / HISTORY).mkdir()
    with pytest.raises(MalformedFile, match=r"history\.jsonl"):
        read_history(tmp_path / HISTORY)


def test_summaries_come_back_as_they_were(tmp_path: Path) -> None:
    """A summary is read as it was written, with names that are no ordinary text."""
    said = summary(job={"model": "K2 \u202e <b>"}, routers=(router(1), router(2, start_load=None, agreement=None)))
    write_summary(tmp_path, said)
    assert read_summary(tmp_path) == said
    assert not list(tmp_path.glob("*.partial"))


def test_paths_that_are_no_text_do_not_spoil_a_summary(tmp_path: Path) -> None:
    """A path whose bytes are no UTF-8 is written with a mark in their place, and can be read again."""
    write_summary(tmp_path, summary(job={"model": "/models/K2\udcff"}))
    assert read_summary(tmp_path).job == {"model": "/models/K2?"}


def _set(*keys: Any) -> Callable[[dict[str, Any]], None]:
    *path, last, value = keys

    def change(values: Any) -> None:
        for key in path:
            values = values[key]
        values[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("job"),
        lambda values: values["routers"][0].pop("agreement"),
        _set("job", "model", 3),
        _set("job", []),
        _set("least_tokens", -1),
        _set("coverage", 0, "quantised", 901),
        _set("routers", 0, "load", [1, 2]),
        _set("routers", 0, "load", 0, -1),
        _set("routers", 0, "load", 0, 0.5),
        _set("routers", 0, "experts", 2**40),
        _set("routers", 0, "agreement", 1.5),
        _set("routers", 0, "layer", "1"),
        _set("routers", {}),
        _set("starved", [["name"]]),
        _set("starved", [[1, 1]]),
        _set("oscillation", 0, "oscillating", 251),
        _set("oscillation", 0, "flipped", True),
    ],
)
def test_damaged_summaries_are_refused(tmp_path: Path, change: Callable[[Any], None]) -> None:
    """A part that is missing, of the wrong kind, or contradicts another is an error that names the file."""
    values = json.loads(summary().to_json())
    change(values)
    (tmp_path / SUMMARY).write_text(json.dumps(values))
    with pytest.raises(MalformedFile, match=SUMMARY):
        read_summary(tmp_path)


@pytest.mark.parametrize("text", ["", "null", "{", '{"job": NaN}', "[" * 100_000])
def test_summaries_that_are_no_json_are_refused(tmp_path: Path, text: str) -> None:
    """So is what does not parse, and a file that is not there."""
    with pytest.raises(MalformedFile, match=SUMMARY):
        read_summary(tmp_path)
    (tmp_path / SUMMARY).write_text(text)
    with pytest.raises(MalformedFile, match=SUMMARY):
        read_summary(tmp_path)


SMALL = "The loss that rounding to INT2 adds is too small here to speak of"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "QAT recovers 63% of the loss that rounding to INT2 adds"),
        ({"loss": 2.1}, "QAT recovers 100% of the loss that rounding to INT2 adds"),
        ({"loss": 2.1001}, "QAT recovers 99% of the loss that rounding to INT2 adds"),
        ({"loss": 2.0999}, "QAT recovers all of the loss that rounding to INT2 adds, and 0.0001 nats more"),
        ({"loss": 2.1999}, "QAT recovers less than 1% of the loss that rounding to INT2 adds"),
        ({"loss": 2.2}, "QAT recovers nothing of the loss that rounding to INT2 adds"),
        ({"gap_error": 0.0334}, SMALL),
        ({"gap_error": 0.0332}, "QAT recovers 63% of the loss that rounding to INT2 adds"),
        ({"gap_error": None, "standard_error": 0.0334}, SMALL),
        ({"gap_error": None, "standard_error": None}, "QAT recovers 63% of the loss that rounding to INT2 adds"),
        ({"start_rounded": 2.1}, SMALL),
        ({"start": None}, "Held-out loss 2.1370 nats a token after 100 steps"),
    ],
)
def test_headline_says_no_more_than_was_measured(changes: dict[str, Any], said: str) -> None:
    """A share of the gap, unless the gap is noise, nothing came back, or the start point is not known."""
    assert headline(history(100, evaluation(100, **changes))) == said


def test_headline_is_of_the_last_evaluation() -> None:
    """Earlier evaluations and widths of a ramp do not enter it."""
    steps = (step(1, bits=None), step(2, bits=8), step(3, bits=3))
    records = Records(steps, (evaluation(1, loss=2.2), evaluation(3, loss=2.15)))
    assert headline(records) == "QAT recovers 50% of the loss that rounding to INT3 adds"
    assert headline(Records(steps, ())) == "3 steps trained; nothing was evaluated"
    found = recovery(evaluation())
    assert found is not None
    assert math.isclose(found.gap, 0.1)
    assert math.isclose(found.share, 0.63)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare tests of words the pictures."""
    monkeypatch.setattr("k2quant.report.drawing._svg", lambda *_: "")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("unrounded", "warned"), [(2.09, True), (2.1, False), (2.12, False), (None, False)])
def test_training_that_helps_by_itself_is_pointed_out(unrounded: float | None, *, warned: bool) -> None:
    """Every page but a control's own asks for a control; where the loss fell without rounding too, it says how far."""
    records = history(100, evaluation(unrounded=unrounded))
    shown = page(records, summary(), "run")
    assert "A control says how much" in shown
    assert ("fell too, from 2.1000 to 2.0900, by 0.0100" in shown) is warned
    assert "A control says how much" not in page(records, summary(control=True), "run")


ANSWERS = Answers(count=200, right=136, unrounded=98, start_rounded=1, start=167)


def test_answers_stand_beside_the_loss_they_are_no_share_of() -> None:
    """Headline, tile and a bar of their own say how many answers are right, rounded and in BF16."""
    records = history(100, evaluation(answers=ANSWERS))
    said = "QAT recovers 63% of the loss that rounding to INT2 adds; 68.0% of the answers are right"
    assert headline(records) == said
    text = check(page(records, summary(), "run")).text
    for words in (
        "Of the answers 0.5% were right when it was rounded untrained, and 83.5% in BF16.",
        "0.5% → 68.0%",
        "rounded, at the start and now, 83.5% in BF16 at the start; 136 of 200 held out, 95% interval 61.2 to 74.1%",
        "Answers that came back",
        "start, BF16: 83.5%",
        "trained, rounded: 68.0%",
    ):
        assert words in text, words


def test_answers_of_an_unknown_start_are_said_without_it() -> None:
    """A run that an earlier version began never counted those of its start: no bar is drawn of what is not known."""
    records = history(10, evaluation(10, answers=Answers(count=9, right=6, unrounded=3)))
    assert headline(records).endswith("adds; 67% of the answers are right")
    text = check(page(records, summary(), "run")).text
    assert "Answers that came back" not in text
    assert "Answers right67%" in text


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (2.137, "0.1000 → 0.0170nats a token, at the start and now"),
        (2.12, "0.1000 → nonenats a token at the start; the trained model is as good with its rounding as without"),
        (
            2.05,
            "0.1000 → nonenats a token at the start; the trained model is 0.0700 nats better with its rounding than",
        ),
    ],
)
def test_a_cost_is_never_negative(loss: float, said: str) -> None:
    """A model that is better with its rounding than without pays nothing for it, and the page says that in words."""
    assert said in check(page(history(100, evaluation(loss=loss)), summary(), "run")).text


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (2.137, "0.0370 above the start point in BF16"),
        (2.1, "as low as the start point in BF16"),
        (2.05, "0.0500 below the start point in BF16"),
        (2.3, "what training added to the rounded model. What is served now is 0.2000 above the start point in BF16"),
    ],
)
def test_recovery_is_one_bar(loss: float, said: str) -> None:
    """BF16, trained and rounded stand on one axis, with their losses; without a start point there is no bar."""
    html = page(history(100, evaluation(loss=loss)), summary(), "run")
    text = check(html).text
    assert said in text
    assert f"start, BF16: 2.1000 ● trained, rounded: {nats(loss)} ■ start, rounded: 2.2000" in " ".join(
        text.replace("\u25cf", " \u25cf").replace("\u25a0", " \u25a0").split()
    )
    assert "Loss that came back" not in page(history(100, evaluation(start=None)), summary(), "run")


def lines(html: str, title: str) -> int:
    """Return how many curves of three or more points the wide picture of a title has."""
    figure = html.split(f"<h2>{title}</h2>")[1].split("</figure>", maxsplit=1)[0]
    wide = figure.split("</svg>", maxsplit=1)[0]
    return len(
        re.findall(r'<path d="M [^"]*" [^>]*style="fill: none; stroke: var\(--(?:candidate|class-1|base)\)', wide)
    )


@pytest.mark.parametrize(("count", "drawn"), [(1, 0), (2, 0), (3, 2)])
def test_fewer_than_three_points_are_dots(count: int, drawn: int) -> None:
    """A line between two measurements would say what nobody measured between them."""
    losses = tuple(evaluation(number) for number in range(count))
    html = page(history(count, *losses), summary(), "run")
    assert lines(html, "Held-out loss") == drawn
    assert lines(html, "Training loss") == (count >= 3)


class Reader(HTMLParser):
    """Elements, text, and whether each element ends where it should."""

    VOID = frozenset({"meta", "br", "wbr", "img", "link", "hr", "path", "use"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element that is closed already."""
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Close the element that was opened last."""
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Keep what is read."""
        self.text += data


def check(html: str) -> Reader:
    """Return a page that is well-formed, runs nothing and loads nothing."""
    found = Reader(html)
    assert not found.open
    names = {tag for tag, _ in found.elements}
    assert not names & {"script", "img", "iframe", "object", "embed", "link", "image", "a", "form", "base"}
    for _, attributes in found.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "default-src 'none'" in html
    assert "url(http" not in html
    return found


def test_page_shows_what_was_recorded(tmp_path: Path) -> None:
    """Numbers of every part stand on the page, in both kinds of pictures, and the page is whole."""
    path = write_report(tmp_path, history(200), summary())
    assert path == tmp_path / PAGE
    found = check(path.read_text())
    for words in (
        "QAT recovers 63% of the loss that rounding to INT2 adds",
        "by 0.1000 ± 0.0020 nats a token, from 2.1000 to 2.2000",
        "0.1000 → 0.0170",
        "819,200",
        "1 min 40 s",
        "75.00%",
        "Starved experts: 1",
        "model.layers.1.mlp.experts.3",
        "25.00%",
        "10.00%",
        "moonshot, INT2, group 32",
        "97.0%",
    ):
        assert words in found.text, words
    pictures = [attributes["class"] for tag, attributes in found.elements if tag == "svg"]
    assert pictures.count("wide") == pictures.count("narrow") == 5


def test_page_of_next_to_nothing() -> None:
    """A run that was stopped at once still has a page, without pictures, numbers or a verdict of its own making."""
    found = check(page(Records((), ()), Summary(job={}), "run"))
    assert "nothing was evaluated" in found.text
    assert not [tag for tag, _ in found.elements if tag == "svg"]
    one = check(page(Records((step(1),), (Evaluation(step=0, loss=2.5),)), Summary(job={}), "run"))
    assert "Held-out loss 2.5000 nats a token after 0 steps" in one.text


def test_ramps_and_teachers_have_their_pictures() -> None:
    """Divergence and the schedule are drawn where there is something to see."""
    steps = tuple(
        step(n, divergence=0.1 / n, rate=1e-3 / n, bits=None if n < 9 else 8 if n < 60 else 2) for n in range(1, 101)
    )
    text = check(page(Records(steps, ()), summary(), "run")).text
    assert "Divergence from the teacher" in text
    assert "Codes: BF16, then INT8, then INT2." in text
    assert "BF16 → INT8 → INT2" in text
    plain = check(page(history(), summary(), "run")).text
    assert "Divergence from the teacher" not in plain
    assert "Learning rate" not in plain


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    """Markup in every text of a hostile summary stays text."""
    said = summary(
        job={EVIL: EVIL},
        coverage=(Coverage(kind=EVIL, quantised=1, parameters=2),),
        routers=(router(1, name=EVIL), replace(router(2, name=EVIL * 50), layer=None)),
        starved=((EVIL, 1),),
        oscillation=(Oscillations(kind=EVIL, weights=0, flipped=0, oscillating=0),),
    )
    folder = tmp_path / "<script>alert(3)</script>".replace("/", "_")
    folder.mkdir()
    html = write_report(folder, history(), said).read_text()
    found = check(html)
    assert "<script" not in html
    assert "\u202e" not in html
    assert "alert(1)" in found.text


@settings(max_examples=8, deadline=None)
@given(RECORDS)
def test_any_history_can_be_drawn(records: list[Record]) -> None:
    """Whatever numbers a history holds, there is a page of it."""
    check(
        page(
            Records(
                tuple(record for record in records if isinstance(record, StepRecord)),
                tuple(record for record in records if isinstance(record, Evaluation)),
            ),
            Summary(job={}),
            "run",
        )
    )


def test_wild_numbers_do_not_break_the_pictures() -> None:
    """The largest that a reader lets through, one number throughout, and no tokens at all can be drawn."""
    steps = tuple(step(n, cross_entropy=1e100 if n % 2 else -1e100, rate=1e100, seconds=1e12) for n in range(1, 40))
    losses = evaluation(39, loss=1e100, unrounded=-1e100, start=-1e100, start_rounded=1e100)
    idle = router(1, load=(0,) * 16, start_load=(0,) * 16, agreement=0.0)
    found = check(page(Records(steps, (losses,)), summary(routers=(idle,)), "run"))
    assert "16 of 16 experts had no token" in found.text
    check(page(Records(tuple(step(n, cross_entropy=2.0) for n in range(1, 40)), ()), Summary(job={}), "run"))
    check(page(Records((step(1, seconds=1e-308),), ()), Summary(job={}), "run"))


def test_a_whole_k2_stays_small() -> None:
    """60 routers of 384 experts, 100,000 steps and 5,000 starved experts: a page of less than a megabyte."""
    steps = tuple(step(1, step=n, rate=n * 1e-9) for n in range(1, 100_001))
    losses = tuple(evaluation(n) for n in range(0, 100_001, 100))
    said = summary(
        routers=tuple(router(layer, 384) for layer in range(1, 61)),
        starved=tuple((f"model.layers.1.mlp.experts.{n}", n % 512) for n in range(5000)),
    )
    html = page(Records(steps, losses), said, "run")
    assert len(html) < 1_000_000
    found = check(html)
    assert "Starved experts: 5,000" in found.text
    assert "and 4,980 more" in found.text


def test_no_starved_expert_is_said_only_where_it_was_measured() -> None:
    """Without routers or a limit there is nothing to praise."""
    assert "none is starved" in page(history(), summary(starved=()), "run")
    assert "starved" not in page(history(), summary(starved=(), routers=()), "run")
    assert "starved" not in page(history(), summary(starved=(), least_tokens=0), "run")


def test_layers_without_numbers_are_counted() -> None:
    """Routers whose layers are not told stand one after another."""
    routers = tuple(replace(router(number), layer=None) for number in (1, 2))
    html = page(history(), summary(routers=routers), "run")
    assert "decoder layer" not in html
    check(html)


def test_pages_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    """A folder that is not there ends in an error that names the page."""
    with pytest.raises(OutputError, match=r"report\.html.*cannot be written"):
        write_report(tmp_path / "nowhere", history(), summary())
