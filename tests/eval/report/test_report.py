"""Reports of a verdict: what they say, whose words they must not trust, and how long they may become."""

from __future__ import annotations

import json
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytest
from matplotlib import style
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import DestinationForeign, MalformedResults, OutputError
from k2quant.eval.drift.findings import Blame, Fidelity, LayerFidelity, Suspect
from k2quant.eval.drift.reading import read_blame, read_fidelity
from k2quant.eval.gating.flips import Flip
from k2quant.eval.gating.policy import Policy
from k2quant.eval.gating.verdict import Comparison, Decision, Side, Verdict
from k2quant.eval.report import Reports, github_annotations, job_summary, publish_to_github, write_reports
from k2quant.eval.report.drift_pictures import blame_pictures
from k2quant.eval.report.markdown import markdown
from k2quant.eval.report.pictures import _curve, accuracies, drops, power_curve
from k2quant.ground.intervals import Estimate
from k2quant.report.drawing import NARROW

EVIL = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>]]>&amp;\x1b[31m\x00\u202e\n"
    "::error::owned\n| a | b |\n# head ![x](http://evil.example/x) @someone `code` \udcff\ufffe%0A"
)
"""Markup of four languages, a terminal's code, what XML cannot hold, half a surrogate pair."""

HASH = "0123456789abcdef" * 4


def comparison(name: str, lost: int = 0, gained: int = 0, n: int = 200, *, decision: Decision = "PASS") -> Comparison:
    """Return a comparison with counts that fit together, and other numbers that are only plausible."""
    drop, spread = (lost - gained) / n, 0.01 + ((lost + gained) / n) ** 0.5 / 10
    return Comparison(
        name=name,
        n=n,
        base_answers=n,
        candidate_answers=n,
        base_right=n // 2 + lost,
        candidate_right=n // 2 + gained,
        repeats=(1, 1),
        lost=lost,
        gained=gained,
        margin=0.01,
        interval=(drop - spread, drop + spread),
        p_good=0.012,
        p_bad=0.98,
        p_worse=0.4,
        power=0.42,
        needed=2473,
        decision=decision,
    )


def flip(lost: bool = True, words: str = "Q: 2 + 2?\nA:", task: str = "gsm8k") -> Flip:  # noqa: FBT001, FBT002  # reads well
    """Return a flip."""
    right, wrong = "4", f"5 {words}"[:50]
    return Flip(
        task=task,
        doc_id=7,
        lost=lost,
        prompt=words,
        target="4",
        base_answer=right if lost else wrong,
        candidate_answer=wrong if lost else right,
        base_right=int(lost),
        base_asked=1,
        candidate_right=int(not lost),
        candidate_asked=1,
    )


def side(name: str) -> Side:
    """Return a run."""
    return Side(folder=f"runs/{name}", model=name, model_hash=HASH, tokenizer_hash=None)


def verdict(decision: Decision = "PASS", **changes: Any) -> Verdict:
    """Return a verdict over three tasks, with changes."""
    tasks = (
        comparison("gsm8k", 2, 1),
        comparison("mmlu_stem", 5, 0, decision="FAIL" if decision == "FAIL" else "INCONCLUSIVE"),
        comparison("ifeval"),
    )
    whole = Verdict(
        decision=decision,
        reason="accuracy fell by 1.00 pp [drop -0.64 to +2.64]",
        warnings=("mmlu_stem: 5 lost against 0 gained",),
        pooled=comparison("all", 7, 1, 600, decision=decision),
        tasks=tasks,
        flips=tuple(flip(number < 7, task="mmlu_stem") for number in range(8)),
        base=side("K2-BF16"),
        candidate=side("K2-INT4"),
        policy=Policy(tasks={"gsm8k": None, "mmlu_stem": 0.02, "ifeval": None}),
        same_model=False,
    )
    return replace(whole, **changes)


def fidelity(layers: int = 4) -> Fidelity:
    """Return what a comparison of two models' numbers may find."""
    return Fidelity(
        base=side("K2-BF16"),
        candidate=side("K2-INT4"),
        text="sample",
        text_hash=HASH,
        tokens=4096,
        chunks=8,
        kl=Estimate(value=0.0123, error=0.0004),
        kl_median=0.004,
        kl_99=0.131,
        kl_max=3.2,
        reverse_kl=Estimate(value=0.0131, error=0.0005),
        same_top=Estimate(value=0.963, error=0.002),
        base_perplexity=4.213,
        candidate_perplexity=4.251,
        log_ratio=Estimate(value=0.009, error=0.0011),
        layers=tuple(layer(number) for number in range(layers)),
    )


def layer(number: int) -> LayerFidelity:
    """Return a layer; the first one is dense."""
    routed = number > 0
    return LayerFidelity(
        layer=number,
        relative_mse=1e-6 * 10**number,
        cosine=0.9999,
        kl=0.001 * number,
        same_experts=0.9 if routed else None,
        overlap=0.98 if routed else None,
        load_shift=0.01 if routed else None,
        never=(3, 17) if number == 2 else (),
        starved=(9,) if number == 3 else (),
    )


def suspect(name: str, share: float) -> Suspect:
    """Return a group of tensors."""
    return Suspect(name=name, tensors=24, share=share, interval=(share - 0.05, share + 0.05))


def blame() -> Blame:
    """Return what a search for damage may find."""
    return Blame(
        base=side("K2-BF16"),
        candidate=side("K2-INT4"),
        text="sample",
        text_hash=HASH,
        damage=Estimate(value=0.0123, error=0.0004),
        noise=Estimate(value=0.0001, error=0.00001),
        changed=1152,
        passes=41,
        classes=(suspect("routed experts", 0.91),),
        suspects=(suspect("layer 3 routed experts", 0.61), suspect("layer 1 shared experts", 0.11)),
        together=suspect("all suspects", 0.72),
    )


class Page(HTMLParser):
    """An HTML page: its elements, its text, and whether every element ends where it should."""

    VOID = frozenset({"meta", "br", "wbr", "img", "link", "input", "hr", "path", "use"})
    OPEN_ENDED = frozenset({"li"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element, and that it is open."""
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element that is closed already."""
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Close the element that was opened last."""
        if tag not in self.VOID:
            assert self.open.pop() == tag

    @property
    def text(self) -> str:
        """The words of the page, in single spaces."""
        plain = re.sub(r"<style>.*?</style>|<(?!wbr)[^>]*>", " ", self.html, flags=re.DOTALL).replace("<wbr>", "")
        return re.sub(r"\s+", " ", unescape(plain))


def written(tmp_path: Path, shown: Verdict, **more: Any) -> tuple[Reports, Page]:
    """Write the reports and return them with the page."""
    reports = write_reports(shown, tmp_path / "gate", **more)
    page = Page(reports.html.read_text())
    assert page.open == []
    return reports, page


def cases(reports: Reports) -> dict[str, ET.Element]:
    """Return the test cases of the JUnit file by name."""
    return {case.attrib["name"]: case for case in ET.parse(reports.junit).iter("testcase")}  # noqa: S314  # our own file


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reports, Page]:
    """Return the reports of a PASS with everything else that can be measured."""
    return written(tmp_path_factory.mktemp("full"), verdict(), fidelity=fidelity(), blame=blame())


# --- what they say ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decision", ["PASS", "FAIL", "INCONCLUSIVE"])
def test_the_verdict_comes_first(tmp_path: Path, decision: Decision) -> None:
    """The headline of page and Markdown is the verdict, the sentence after it the reason; JSON and XML agree."""
    reports, page = written(tmp_path, verdict(decision))
    assert re.search(rf"<h1>{decision}</h1><p>Accuracy fell by 1.00 pp \[drop -0.64 to \+2.64\]</p>", page.html)
    assert re.match(rf"<!-- .* -->\n# \S+ {decision}\n\naccuracy fell by 1.00 pp", reports.markdown.read_text())
    assert json.loads(reports.json.read_text())["decision"] == decision
    outcome = {"PASS": [], "FAIL": ["failure"], "INCONCLUSIVE": ["skipped"]}[decision]
    assert [part.tag for part in cases(reports)["all together"] if part.tag != "properties"] == outcome


def test_an_aa_run_has_no_verdict(tmp_path: Path) -> None:
    """The same model twice is called noise everywhere, and no task of it passes or fails."""
    noise = verdict("INCONCLUSIVE", same_model=True)
    reports, page = written(tmp_path, noise)
    assert "<h1>NOISE FLOOR, no verdict</h1>" in page.html
    assert "NOISE FLOOR, no verdict" in reports.markdown.read_text()
    assert "good enough, all of it right" not in page.text
    for content in (page.text, reports.markdown.read_text()):
        assert "INCONCLUSIVE" not in content
        assert "PASS |" not in content
    assert all(case.find("skipped") is not None for case in cases(reports).values())
    assert [line.split("::")[1] for line in github_annotations(noise)] == [
        "warning title=Accuracy gate%3A NOISE FLOOR%2C no verdict",
        "warning title=Accuracy gate",
    ]


def test_every_number_of_a_task_is_there(full: tuple[Reports, Page]) -> None:
    """Page and Markdown show items, accuracies, drop with interval, flips, margin and power of each task."""
    reports, page = full
    cells = "200 52.5% 50.0% +2.50 [\N{MINUS SIGN}0.08, +5.08] 5 / 0 42% 2,473"
    assert f"mmlu_stem INCONCLUSIVE {cells}" in page.text
    assert "mmlu_stem 1 pp 0.012 0.98 0.40" in page.text
    row = "| `mmlu_stem` | 200 | 52.5% | 50.0% | +2.50 pp | [-0.08, +5.08] | 5 / 0 | 1 pp | 42% | INCONCLUSIVE |"
    assert row in reports.markdown.read_text()


def test_no_drop_stands_without_its_interval(full: tuple[Reports, Page]) -> None:
    """The drop of all items comes with its interval in the tile, the picture and the table."""
    _, page = full
    assert "Drop in accuracy +1.00 pp [\N{MINUS SIGN}1.15, +3.15], 90% interval" in page.text
    assert (
        page.text.count("+1.00 [\N{MINUS SIGN}1.15, +3.15]") == 3
    )  # the picture for wide and for narrow screens, the table


def test_tiles_say_what_matters(full: tuple[Reports, Page]) -> None:
    """Margin, items with accuracies, flips and power stand at the top."""
    _, page = full
    for tile in (
        "Margin 1 pp largest drop that is good enough; alpha 5%",
        "Items 600 in 3 tasks; accuracy 51.2% → 50.2%",
        "Flips 1.3% 7 lost, 1 gained; McNemar p 0.40",
        "Power 42% chance of PASS if nothing was lost; 2,473 items give 80%",
    ):
        assert tile in page.text


def test_warnings_are_everywhere(full: tuple[Reports, Page]) -> None:
    """A warning stands on the page and in the Markdown, and is an annotation."""
    reports, page = full
    warning = "mmlu_stem: 5 lost against 0 gained"
    assert f"Warnings {warning}" in page.text
    assert f"- {warning}" in reports.markdown.read_text()
    assert f"::warning title=Accuracy gate::{warning}" in github_annotations(verdict())


def test_flips_stand_side_by_side(full: tuple[Reports, Page]) -> None:
    """Lost items and gained ones are apart, with prompt and both answers, line breaks kept; Markdown lists all."""
    reports, page = full
    assert re.findall(r"<span class='badge (?:good|bad)'>(lost|gained)</span>(\d+)", page.html) == [
        ("lost", "7"),
        ("gained", "1"),
    ]
    assert '<dt>#7</dt><dd class="">Q: 2 + 2?\nA:</dd>' in page.html
    line = "| lost | `mmlu_stem` | 7 | <code>Q: 2 + 2&#63;"
    assert line.replace("&#63;", "&#63; A:</code> | <code>4</code> |") in reports.markdown.read_text()


def test_who_is_who(full: tuple[Reports, Page]) -> None:
    """Models, short hashes, folders, policy and version stand at the end; a hash that is missing is said to be."""
    _, page = full
    assert "K2-BF16 , model 0123456789ab, tokenizer not recorded, run in runs/K2-BF16" in page.text
    assert "1 pp over all items, mmlu_stem 2 pp" in page.text
    assert HASH not in page.text


def test_fidelity_and_blame_have_pictures_and_numbers(full: tuple[Reports, Page]) -> None:
    """With them the page has eight pictures for two kinds of screens, and says which experts nobody visits."""
    reports, page = full
    assert page.html.count("<svg") == 16
    assert "KL divergence 0.0123 ± 0.0004 nats a token; median 0.004, 99% 0.131, max 3.2" in page.text
    assert "2 \N{EN DASH} 2: 3, 17" in page.text
    assert "3 1: 9 \N{EN DASH}" in page.text
    assert "All of them put back together take away 72.0% [67.0%, 77.0%] of the damage." in page.text
    assert "- layer 3 routed experts (24 tensors): 61.0% &#91;56.0%, 66.0%&#93;" in reports.markdown.read_text()
    content = parse_object(reports.json.read_bytes(), file=reports.json)
    assert content["fidelity"]["kl"] == {"value": 0.0123, "error": 0.0004}
    assert content["blame"]["passes"] == 41


def test_fidelity_and_blame_name_their_models(tmp_path: Path) -> None:
    """A file of other models than those of the runs is seen to be one."""
    other = side("other-INT3")
    found = {"fidelity": replace(fidelity(), candidate=other), "blame": replace(blame(), candidate=other)}
    reports, page = written(tmp_path, verdict(), **found)
    for words in (page.text, reports.markdown.read_text().replace("`", "")):
        assert words.count("other-INT3 against K2-BF16 on sample") == 2


def test_a_text_with_prompts_is_said_to_be_one(tmp_path: Path) -> None:
    """Where only completions were scored, page and Markdown say so beside the number of tokens."""
    reports, page = written(tmp_path, verdict(), fidelity=replace(fidelity(), completions=True))
    assert "4,096 tokens of completions in 8 chunks" in page.text
    assert "4,096 tokens of completions: KL divergence" in reports.markdown.read_text()


def test_blame_without_suspects_says_so(tmp_path: Path) -> None:
    """Where no damage could be told from none, there is a sentence and no empty picture."""
    nothing = replace(blame(), classes=(), suspects=(), together=None)
    reports, page = written(tmp_path, verdict(), blame=nothing)
    assert "No group of tensors could be told to do damage." in page.text
    assert "No group of tensors could be told to do damage." in reports.markdown.read_text()
    assert page.html.count("<svg") == 6


def test_json_is_the_whole_verdict(full: tuple[Reports, Page]) -> None:
    """`gate.json` holds what `as_dict` gives, readable by a strict reader."""
    reports, _ = full
    content = parse_object(reports.json.read_bytes(), file=reports.json)
    expected = json.loads(json.dumps(verdict().as_dict()))
    assert {key: content[key] for key in expected} == expected


def test_junit_counts_its_cases(tmp_path: Path) -> None:
    """The numbers of tests, failures and skipped ones are those of the cases; properties hold the numbers in full."""
    reports, _ = written(tmp_path, verdict("FAIL"))
    root = ET.parse(reports.junit).getroot()  # noqa: S314  # our own file
    assert root.tag == "testsuites"
    for element in (root, root[0]):
        assert {name: element.attrib[name] for name in ("tests", "failures", "errors", "skipped")} == {
            "tests": "4",
            "failures": "2",
            "errors": "0",
            "skipped": "0",
        }
    found = cases(reports)
    assert list(found) == ["all together", "gsm8k", "mmlu_stem", "ifeval"]
    properties = {part.attrib["name"]: part.attrib["value"] for part in found["mmlu_stem"].iter("property")}
    assert (properties["n"], properties["lost"], properties["drop"]) == ("200", "5", "0.025")
    failure = found["mmlu_stem"].find("failure")
    assert failure is not None
    assert failure.attrib["message"].startswith("FAIL: drop +2.50 pp [-0.08, +5.08]")


def test_a_gate_that_fails_by_a_task_fails_in_junit(tmp_path: Path) -> None:
    """The case of all items together carries the gate's verdict, even where its own numbers would pass."""
    failed = verdict("FAIL", pooled=comparison("all", 7, 1, 600, decision="PASS"))
    reports, _ = written(tmp_path, failed)
    assert cases(reports)["all together"].find("failure") is not None


# --- few, many, none -------------------------------------------------------------------------------------------------


def test_no_flips(tmp_path: Path) -> None:
    """Without a flip there is no table of them, and the power is still drawn."""
    tasks = (comparison("gsm8k"),)
    reports, page = written(tmp_path, verdict(tasks=tasks, pooled=comparison("all"), flips=(), warnings=()))
    assert "No item changed between right and wrong." in page.text
    assert "Warnings" not in page.text
    assert "details" not in reports.markdown.read_text()
    assert "Chance of PASS for a candidate that lost nothing, at the 0.0% of flips" in page.text


def test_sixty_tasks(tmp_path: Path) -> None:
    """Each of many tasks has its line in pictures and table; long names are cut in pictures alone."""
    names = [f"mmlu_high_school_european_history_{number:02}_of_sixty" for number in range(60)]
    tasks = tuple(comparison(name) for name in names)
    reports, page = written(tmp_path, verdict(tasks=tasks, pooled=comparison("all", n=12_000)))
    assert all(f"{name} PASS" in page.text for name in names)
    for number in range(60):
        assert page.text.count(f"mmlu_high_school_europ…{number:02}_of_sixty") == 2  # two pictures, for wide screens
    assert all(f"`{name}`" in reports.markdown.read_text() for name in names)
    assert len(cases(reports)) == 61


def test_a_thousand_tasks_are_not_all_drawn() -> None:
    """A picture shows the largest drops, and says how many there are."""
    tasks = tuple(comparison(f"task-{number}", lost=number % 7) for number in range(1000))
    picture = drops(verdict(tasks=tasks))
    assert "The 79 tasks of the largest drop of 1,000." in picture
    assert picture.count("<text") < 400


def test_many_flips_are_cut_and_counted(tmp_path: Path) -> None:
    """Of a hundred thousand flips the page lists two hundred and says how many more there are; JSON has all."""
    many = verdict(flips=(flip(),) * 100_000)
    reports, page = written(tmp_path, many)
    assert "99,800 more are left out here; gate.json has all." in page.text
    assert page.html.count("<dl class=flip>") == 200
    assert len(page.html) < 500_000
    assert "99,800 flips left out here" in reports.markdown.read_text()
    assert reports.json.read_text().count('"doc_id"') == 100_000


def test_the_power_curve_ends_where_the_gate_stands() -> None:
    """The picture names the gate's own number of items, its power and what the policy wants."""
    picture = power_curve(verdict())
    assert picture.count("here: 600 items, 42%") == 2
    assert "2,473 items reach the 80% that the policy wants" in picture
    never = replace(verdict().pooled, needed=None)
    assert "no number of items reaches the 80%" in power_curve(verdict(pooled=never))


def test_the_power_curve_passes_through_what_it_marks() -> None:
    """Without flips power is one step, from nothing to all, at the number of items that are needed."""
    pooled = replace(verdict().pooled, lost=0, gained=0, n=1080, power=1.0, needed=299)
    found = dict(_curve(pooled, 0.05))
    assert (found[298], found[299], found[1080]) == (0, 100, 100)


def test_a_share_beyond_all_measure_is_drawn_in_silence(tmp_path: Path) -> None:
    """A picture whose words leave it no room is a poor one, and nothing that the user has to hear of."""
    huge = Suspect(name="layer 3", tensors=1, share=1e99, interval=(0.0, 1e99))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, page = written(tmp_path, verdict(), blame=replace(blame(), suspects=(huge,)))
    assert "Suspects" in page.text


def test_accuracy_at_its_ends_is_drawn() -> None:
    """A task in which everything is right, or nothing, has an interval inside 0% to 100%."""
    perfect = replace(comparison("perfect"), base_right=200, candidate_right=200)
    hopeless = replace(comparison("hopeless"), base_right=0, candidate_right=0)
    picture = accuracies(verdict(tasks=(perfect, hopeless)))
    assert "100.0% → 100.0%" in picture
    assert "0.0% → 0.0%" in picture


@pytest.mark.parametrize("own_margins", [False, True])
def test_no_line_strikes_through_a_label(own_margins: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """On a narrow screen, where names stand inside the picture, no line and no bar runs through one."""
    struck: list[str] = []
    seen: list[str] = []

    def look(_: str, __: str, draw: Any, sizes: tuple[int, int], **___: Any) -> str:
        picture = Figure(figsize=(NARROW.width / 72, sizes[1] / 72), layout="constrained")
        FigureCanvasSVG(picture)
        with style.context(["default", {"font.size": NARROW.font}]):
            draw(picture.add_subplot(), NARROW)
            picture.draw_without_rendering()
            axes = picture.axes[0]
            marks = [*axes.lines, *axes.patches, *(line for line in axes.get_xgridlines() if line.get_visible())]
            for words in axes.texts:
                box = words.get_window_extent()
                seen.append(words.get_text())
                struck.extend(words.get_text() for mark in marks if mark.get_window_extent().padded(0.1).overlaps(box))
        return ""

    for module in ("pictures", "drift_pictures"):
        monkeypatch.setattr(f"k2quant.eval.report.{module}.figure", look)
    shown = verdict()
    if own_margins:
        shown = replace(shown, tasks=tuple(replace(task, margin=0.02) for task in shown.tasks))
    drops(shown)
    accuracies(shown)
    tuple(blame_pictures(blame()))
    assert len(seen) == 2 * (4 + 4 + 1 + 2)
    assert struck == []


# --- whose words they must not trust ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile() -> Verdict:
    """Return a verdict in which every word is a stranger's."""
    stranger = Side(folder=EVIL, model=EVIL, model_hash=EVIL, tokenizer_hash=EVIL)
    return verdict(
        "FAIL",
        reason=EVIL,
        warnings=(EVIL,),
        tasks=(comparison(EVIL, 5, decision="FAIL"),),
        flips=tuple(
            replace(flip(), task=EVIL, doc_id=1, prompt=EVIL, target=EVIL, base_answer=EVIL * 50, candidate_answer=EVIL)
            for _ in range(3)
        ),
        base=stranger,
        candidate=stranger,
        policy=Policy(tasks={EVIL: 0.01}),
    )


@pytest.fixture(scope="module")
def poisoned(hostile: Verdict, tmp_path_factory: pytest.TempPathFactory) -> tuple[Reports, Page]:
    """Return its reports, with hostile fidelity and blame."""
    drift = replace(fidelity(), text=EVIL, unread=EVIL, base=hostile.base)
    found = replace(blame(), text=EVIL, classes=(suspect(EVIL, 0.5),), suspects=(suspect(EVIL, 0.5),))
    return written(tmp_path_factory.mktemp("evil"), hostile, fidelity=drift, blame=found)


def test_markup_is_text_on_the_page(poisoned: tuple[Reports, Page]) -> None:
    """No stranger's word becomes an element, an attribute or a control character of the page."""
    _, page = poisoned
    tags = {tag for tag, _ in page.found}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form", "a", "foreignobject"}
    for _, attributes in page.found:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in {"src", "srcset", "action"}
            assert name != "href" or (value or "").startswith("#")
    assert page.html.count("&lt;script&gt;alert(1)") > 20
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e\ud800-\udfff]", page.html) is None


def test_page_loads_nothing(full: tuple[Reports, Page]) -> None:
    """No script, no address; a policy in the page forbids both; ids of pictures are unique."""
    _, page = full
    assert not re.search(r"https?:|@import|url\((?!#)|javascript:|<script", page.html)
    policies = [found["content"] for tag, found in page.found if tag == "meta" and "http-equiv" in found]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    ids = [found["id"] for _, found in page.found if "id" in found]
    assert len(ids) == len(set(ids))


def test_junit_of_strangers_parses(poisoned: tuple[Reports, Page]) -> None:
    """Control characters, surrogates and `]]>` leave XML that parses, with the words inside."""
    reports, _ = poisoned
    found = cases(reports)
    (name,) = found.keys() - {"all together"}
    assert name.startswith("<script>alert(1)</script>")
    assert "\x1b" not in reports.junit.read_text()


def test_markdown_of_strangers_is_text(poisoned: tuple[Reports, Page]) -> None:
    """No stranger's word opens a tag, a cell, a link, a heading or a mention, or breaks a line."""
    reports, _ = poisoned
    text = reports.markdown.read_text()
    assert "alert(1)" in text
    assert not re.search(r"<(?!/?(?:code|details|summary|i)>|!-- k2quant)", text)
    assert not re.search(r"[@\x1b\x00\u202e]|http://|!\[|^::|^# head", text, flags=re.MULTILINE)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in rows} == {11, 8}


def test_json_of_strangers_is_json(poisoned: tuple[Reports, Page]) -> None:
    """Half a surrogate pair does not make a file that strict readers refuse."""
    reports, _ = poisoned
    assert parse_object(reports.json.read_bytes(), file=reports.json)["tasks"][0]["name"].startswith("<script>")


def test_annotations_are_one_line_each(hostile: Verdict) -> None:
    """A stranger's line break cannot begin another workflow command, nor end a title early."""
    lines = github_annotations(hostile)
    assert len(lines) == 3
    for line in lines:
        assert re.fullmatch(r"::(error|warning) title=[^:,\n\r]*::[^\n\r\x1b]*", line)
    assert "%250A" in lines[0]
    assert "%0A::error" in lines[0]


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 10, 500, 3000, 20_000, 1_000_000])
def test_the_summary_keeps_its_limit(hostile: Verdict, limit: int) -> None:
    """Whatever is in it, a summary has at most so many bytes, and the verdict is what stays."""
    many = replace(hostile, flips=tuple(hostile.flips) * 2000, tasks=hostile.tasks * 300, warnings=(EVIL * 20,) * 500)
    text = job_summary(many, limit=limit)
    assert len(text.encode()) <= limit
    if limit >= 500:
        assert text.splitlines()[1].endswith(" FAIL")


def test_flips_are_cut_before_tasks() -> None:
    """Where room is short, all tasks stay and the summary says how many flips it leaves out."""
    many = verdict(flips=(flip(),) * 100_000)
    text = job_summary(many, limit=5000)
    assert "`ifeval`" in text
    shown = text.count("| lost |")
    assert 0 < shown < 40
    assert f"{100_000 - shown:,} flips left out here; gate.json has all." in text
    assert text.endswith("</details>\n")


def test_a_summary_of_many_flips_is_below_a_mebibyte() -> None:
    """With the usual limit, a hundred thousand flips of long prompts still fit under GitHub's 1 MiB."""
    many = verdict(flips=(flip(words="\N{SNOWMAN}" * 5000),) * 100_000)
    assert len(job_summary(many).encode()) <= 1_000_000


def test_at_most_ten_annotations() -> None:
    """GitHub drops the eleventh without a word, so the tenth says how many more there are."""
    tasks = tuple(comparison(f"task-{number:02}", lost=number, decision="FAIL") for number in range(30))
    lines = github_annotations(verdict("FAIL", tasks=tasks))
    assert len(lines) == 10
    assert lines[0].startswith("::error title=Accuracy gate%3A FAIL::accuracy fell")
    assert lines[1].startswith("::error title=Accuracy of task-29::drop +14.50 pp")  # the largest drop first
    assert lines[9] == "::warning title=Accuracy gate::23 more stand in the report"
    assert len(github_annotations(verdict("FAIL", tasks=tasks[:8], warnings=()))) == 9
    assert len(github_annotations(verdict("FAIL", tasks=tasks[:8]))) == 10


def test_a_pass_without_warnings_is_silent() -> None:
    """A PASS annotates nothing."""
    assert github_annotations(verdict(warnings=())) == []


# --- GitHub ----------------------------------------------------------------------------------------------------------


def test_the_summary_is_appended(tmp_path: Path) -> None:
    """What the step wrote before stays, counts towards the limit, and annotations are returned."""
    path = tmp_path / "summary"
    path.write_bytes(b"x" * 999_000)
    lines = publish_to_github(verdict("FAIL"), {"GITHUB_STEP_SUMMARY": str(path)})
    content = path.read_bytes()
    assert content.startswith(b"x" * 999_000 + b"<!--")
    assert b"FAIL" in content
    assert len(content) <= 1_000_000
    assert lines == github_annotations(verdict("FAIL"))


@pytest.mark.parametrize("environment", [{}, {"GITHUB_STEP_SUMMARY": ""}])
def test_without_github_nothing_is_written(environment: dict[str, str]) -> None:
    """Elsewhere there is no summary, and the annotations are returned all the same."""
    assert publish_to_github(verdict(), environment) == github_annotations(verdict())


def test_a_summary_that_cannot_be_written(tmp_path: Path) -> None:
    """The error names the file."""
    path = tmp_path / "nowhere" / "summary"
    with pytest.raises(OutputError, match=re.escape(str(path))):
        publish_to_github(verdict(), {"GITHUB_STEP_SUMMARY": str(path)})


# --- the folder ------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare tests of the folder the pictures."""
    module = import_module("k2quant.eval.report.page")
    for name in ("drops", "accuracies", "power_curve"):
        monkeypatch.setattr(module, name, lambda _: "")


@pytest.mark.usefixtures("quick")
def test_our_own_reports_are_replaced_and_nothing_else(tmp_path: Path) -> None:
    """A second gate replaces the first one's reports; other files of the folder stay as they are."""
    folder = tmp_path / "new" / "gate"
    write_reports(verdict("FAIL"), folder)
    (folder / "notes.txt").write_text("mine")
    reports = write_reports(verdict(), folder)
    assert json.loads(reports.json.read_text())["decision"] == "PASS"
    names = ["gate.html", "gate.json", "gate.md", "gate.xml", "notes.txt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["gate.html", "gate.md", "gate.xml", "gate.json"])
@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling link"])
@pytest.mark.usefixtures("quick")
def test_foreign_files_are_not_replaced(tmp_path: Path, name: str, kind: str) -> None:
    """A file of such a name that is not ours, a folder or a link is refused before anything is written."""
    folder, target = tmp_path / "gate", tmp_path / "target"
    folder.mkdir()
    path = folder / name
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to(target)
        if kind == "link":
            target.write_text("k2quant eval gate")
    with pytest.raises(DestinationForeign, match=re.escape(name)):
        write_reports(verdict(), folder)
    assert [found.name for found in folder.iterdir()] == [name]


@pytest.mark.usefixtures("quick")
def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """Where a file stands in the way, the error is one of the output."""
    (tmp_path / "gate").write_text("a file")
    with pytest.raises(OutputError, match="gate"):
        write_reports(verdict(), tmp_path / "gate")


@pytest.mark.usefixtures("quick")
def test_a_full_disk_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When writing fails half-way, the report that stood there before still does."""
    reports = write_reports(verdict("FAIL"), tmp_path)
    before = reports.html.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full_disk)
        with pytest.raises(OutputError, match="No space left"):
            write_reports(verdict(), tmp_path)
    assert reports.html.read_bytes() == before


# --- reading back ----------------------------------------------------------------------------------------------------

Kind = Literal["fidelity", "blame"]
READERS: dict[str, Callable[[Path], Fidelity | Blame]] = {"fidelity": read_fidelity, "blame": read_blame}


def stored(tmp_path: Path, content: object) -> Path:
    """Write JSON to a file."""
    path = tmp_path / "drift.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("made", [fidelity(), fidelity(0), replace(fidelity(), unread="é", completions=True), blame()])
def test_what_was_written_is_read_back(tmp_path: Path, made: Fidelity | Blame) -> None:
    """JSON and back gives an equal object."""
    content = made.as_dict()
    assert READERS[content["kind"]](stored(tmp_path, content)) == made


def changed(made: Fidelity | Blame, where: str, value: object) -> dict[str, Any]:
    """Return the JSON of something with one part replaced, or taken away where the value is `...`."""
    content: dict[str, Any] = json.loads(json.dumps(made.as_dict()))
    *folders, last = [int(part) if part.isdigit() else part for part in where.split(".")]
    place: Any = content
    for part in folders:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


HARMS: list[tuple[Kind, str, object]] = [
    ("fidelity", "kind", "blame"),
    ("fidelity", "kind", ["fidelity"]),
    ("fidelity", "kind", ...),
    ("fidelity", "schema", 2),
    ("fidelity", "schema", True),
    ("fidelity", "base", "K2"),
    ("fidelity", "base.model", 1),
    ("fidelity", "base.model_hash", False),
    ("fidelity", "text", None),
    ("fidelity", "tokens", 0),
    ("fidelity", "tokens", 1.5),
    ("fidelity", "chunks", True),
    ("fidelity", "kl", 0.1),
    ("fidelity", "kl.value", "0.1"),
    ("fidelity", "kl.value", -1),
    ("fidelity", "kl.value", 10**400),
    ("fidelity", "kl.error", -0.1),
    ("fidelity", "kl_max", 1e200),
    ("fidelity", "kl_99", float("nan")),
    ("fidelity", "same_top.value", 1.5),
    ("fidelity", "base_perplexity", -1),
    ("fidelity", "log_ratio", ...),
    ("fidelity", "layers", {}),
    ("fidelity", "layers.1", []),
    ("fidelity", "layers.1.layer", 2),
    ("fidelity", "layers.1.layer", 10**6),
    ("fidelity", "layers.1.cosine", -2),
    ("fidelity", "layers.1.overlap", 2),
    ("fidelity", "layers.1.relative_mse", None),
    ("fidelity", "layers.1.never", "12"),
    ("fidelity", "layers.1.never", [1, -1]),
    ("fidelity", "layers.1.starved", ...),
    ("fidelity", "unread", 1),
    ("fidelity", "completions", 1),
    ("blame", "completions", "no"),
    ("blame", "kind", "fidelity"),
    ("blame", "changed", -1),
    ("blame", "passes", "41"),
    ("blame", "classes", None),
    ("blame", "suspects.0.interval", [0.1]),
    ("blame", "suspects.0.interval", [0.2, 0.1]),
    ("blame", "suspects.0.interval", [0.1, float("inf")]),
    ("blame", "suspects.0.share", "all"),
    ("blame", "suspects.0.name", None),
    ("blame", "suspects.0.tensors", 0),
    ("blame", "together", []),
    ("blame", "noise", ...),
]


@pytest.mark.parametrize(
    ("kind", "where", "value"), HARMS, ids=[f"{kind}-{where}-{v!r:.20}" for kind, where, v in HARMS]
)
def test_a_part_that_is_wrong_is_refused(tmp_path: Path, kind: Kind, where: str, value: object) -> None:
    """A part that is missing, of the wrong kind, not finite or out of range is MalformedResults and names the file."""
    path = stored(tmp_path, changed(fidelity() if kind == "fidelity" else blame(), where, value))
    with pytest.raises(MalformedResults, match=re.escape(str(path))):
        READERS[kind](path)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"\xff", b'{"kind": "fidelity"}', b'{"a": 1, "a": 2}', b"[" * 10**5]
)
@pytest.mark.parametrize("kind", ["fidelity", "blame"])
def test_what_is_no_such_file_is_refused(tmp_path: Path, kind: Kind, data: bytes) -> None:
    """Bytes that are no JSON object of this kind are MalformedResults."""
    path = tmp_path / "drift.json"
    path.write_bytes(data)
    with pytest.raises(MalformedResults):
        READERS[kind](path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A missing file and a folder are MalformedResults too."""
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(MalformedResults, match=re.escape(str(path))):
            read_fidelity(path)


def test_markdown_has_no_more_flips_than_asked_for() -> None:
    """The number of flips can be chosen; none of them leaves the note."""
    assert markdown(verdict(), flips=2).count("| lost |") == 2
    assert "8 flips left out here" in markdown(verdict(), flips=0)


def repeated(decision: Decision = "PASS", **changes: Any) -> Verdict:
    """Return the verdict over items that were asked four times each."""
    whole = verdict(decision)

    def of(one: Comparison) -> Comparison:
        return replace(one, base_answers=4 * one.n, candidate_answers=4 * one.n, repeats=(4, 4), spread=(0.1, 0.4))

    flips = tuple(replace(one, base_right=3, base_asked=4, candidate_right=1, candidate_asked=4) for one in whole.flips)
    return replace(whole, pooled=of(whole.pooled), tasks=tuple(map(of, whole.tasks)), flips=flips, **changes)


def test_items_asked_several_times_are_named_so(tmp_path: Path) -> None:
    """Page and Markdown name the method, how often, and each flip's shares; nothing is said of flips or McNemar."""
    reports, page = written(tmp_path, repeated())
    for words in (page.text, unescape(reports.markdown.read_text())):
        assert "Gaffke's bound over items, 4 answers each" in words
        assert "Items that changed: " in words
        assert "3 of 4, then 1 of 4" in words
        assert "McNemar" not in words
        assert not re.search(r"Flips|of flips|only the baseline|exact paired", words)
    xml = reports.junit.read_text()
    assert 'name="base_answers" value="2400"' in xml
    assert 'name="method" value="Gaffke\'s bound over items"' in xml
    assert json.loads(reports.json.read_text())["pooled"]["repeats"] == [4, 4]


def test_the_method_is_named_where_items_were_asked_once(full: tuple[Reports, Page]) -> None:
    """The exact paired test, in page, Markdown, JUnit and JSON."""
    reports, page = full
    for words in (page.text, reports.markdown.read_text(), reports.junit.read_text(), reports.json.read_text()):
        assert "exact paired test" in words


def test_answers_cut_in_thought_stand_on_both_sides_everywhere(tmp_path: Path) -> None:
    """In a tile, a column of the tasks, Markdown, JUnit and JSON; where nobody looked, nowhere."""
    tasks = (
        replace(comparison("gsm8k", 2, 1), base_cut=12, candidate_cut=40, base_truncated=13),
        comparison("ifeval", 5, 0),
    )
    pooled = replace(comparison("all", 7, 1, 400), base_cut=12, candidate_cut=40, base_truncated=13)
    reports, page = written(tmp_path / "looked", verdict(tasks=tasks, pooled=pooled))
    said = "cut in thought: 12 of 400 (baseline), 40 of 400 (candidate)"
    assert "Cut in thought 12 \N{RIGHTWARDS ARROW} 40 of 400 and 400 answers" in page.text
    assert said.partition(": ")[2] in page.text
    assert re.findall(r'data-head="cut in thought">(.*?)</td>', page.html) == [
        *["12&nbsp;/ 40"] * 2,
        "&ndash;&nbsp;/ &ndash;",
    ]
    text = reports.markdown.read_text()
    assert f"- {said}\n" in text
    assert "- `gsm8k`: cut in thought: 12 of 200 (baseline), 40 of 200 (candidate)\n" in text
    assert "- ended at the limit on new tokens: 13 of 400 (baseline), not known (candidate)\n" in text
    xml = reports.junit.read_text()
    assert [xml.count(f'name="{name}"') for name in ("base_cut", "candidate_cut", "candidate_truncated")] == [2, 2, 0]
    assert json.loads(reports.json.read_text())["tasks"][0]["candidate_cut"] == 40
    unseen, page = written(tmp_path / "unseen", verdict())
    assert "thought" not in page.text + unseen.markdown.read_text() + unseen.junit.read_text()


@pytest.mark.usefixtures("quick")
def test_tasks_where_no_answer_ended_early_are_not_listed(tmp_path: Path) -> None:
    """Zeros of many tasks would hide the one that counts; all together stand first, zero or not."""
    whole: dict[str, Any] = {"base_cut": 0, "candidate_cut": 0, "base_truncated": 0, "candidate_truncated": 0}
    names = [f"t{number}" for number in range(200)]
    tasks = tuple(replace(comparison(name, 2, 1), **whole) for name in names)
    struck = replace(tasks[-1], candidate_truncated=3)
    reports, _ = written(
        tmp_path, verdict(tasks=(*tasks[:-1], struck), pooled=replace(comparison("all", 7, 1), **whole))
    )
    text = reports.markdown.read_text()
    assert "\n- cut in thought: 0 of 200 (baseline), 0 of 200 (candidate)\n" in text
    assert "- `t199`: ended at the limit on new tokens: 0 of 200 (baseline), 3 of 200 (candidate)\n" in text
    assert "- `t1`: " not in text


def test_the_task_table_fits_a_desktop(tmp_path: Path) -> None:
    """Names may break at each underscore, numbers between their parts, and no box scrolls."""
    name = "a_long_name_of_a_task_as_people_have_them"
    tasks = (replace(comparison(name, 128_123, 131_456, 300_000), base_cut=1, candidate_cut=2),)
    _, page = written(tmp_path, verdict(tasks=tasks))
    css = page.html.partition("</style>")[0]
    assert ".tasks td{white-space:normal}" in css
    assert ".tasks thead th{white-space:normal" in css
    assert ".tasks tbody th wbr{display:inline}" in css
    assert ".tasks tbody th{width:140px}" in css
    table = page.html.partition('aria-label="every task"')[2].partition("</table>")[0]
    assert f"<code>{name.replace('_', '_<wbr>')}</code>" in table
    assert "128,123&nbsp;/ 131,456" in table
    assert re.search(r"\+?(&minus;)?[\d.]+ \[[^ \]]+&nbsp;[^ \]]+\]", table)
    assert "class=scroll" not in page.html.partition("Every task")[2].partition("</section>")[0]
