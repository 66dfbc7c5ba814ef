"""Flips on the page: which are shown, and what of two answers is marked."""

from __future__ import annotations

import random
import re
import time
from html import unescape

import pytest

from k2quant.eval.gating.flips import CUT, Flip
from k2quant.eval.gating.policy import Policy
from k2quant.eval.gating.verdict import Comparison, Side, Verdict
from k2quant.eval.report.differences import differences
from k2quant.eval.report.flips import SHOWN, flips

_SIDE = Side(folder="run", model="K2", model_hash=None, tokenizer_hash=None)


def _flip(task: str, number: int, *, lost: bool = True, target: str = "20", base: str = "20") -> Flip:
    other = "18"
    answers = (base, other) if lost else (other, base)
    return Flip(
        task=task,
        doc_id=number,
        lost=lost,
        prompt="ask:",
        target=target,
        base_answer=answers[0],
        candidate_answer=answers[1],
        base_right=int(lost),
        base_asked=1,
        candidate_right=int(not lost),
        candidate_asked=1,
    )


def _verdict(found: list[Flip]) -> Verdict:
    lost = sum(flip.lost for flip in found)
    pooled = Comparison(
        name="all",
        n=1000,
        base_answers=1000,
        candidate_answers=1000,
        base_right=500,
        candidate_right=500,
        repeats=(1, 1),
        lost=lost,
        gained=len(found) - lost,
        margin=0.01,
        interval=(0, 0),
        p_good=0.5,
        p_bad=0.5,
        p_worse=0.5,
        power=0.5,
        needed=None,
        decision="INCONCLUSIVE",
    )
    return Verdict(
        decision="INCONCLUSIVE",
        reason="",
        warnings=(),
        pooled=pooled,
        tasks=(),
        flips=tuple(found),
        base=_SIDE,
        candidate=_SIDE,
        policy=Policy(),
        same_model=False,
    )


@pytest.mark.parametrize(
    ("one", "other", "marked"),
    [
        ("hnruebgh", "hnruubgh", ("hnru[e]bgh", "hnru[u]bgh")),
        ("}]}]}", "}]}}]", ("}]}[]}]", "}]}[}]]")),
        ("1347", "137", ("13[4]7", "137")),
        ("4", "", ("[4]", "empty")),
        ("12", "97", ("[12]", "[97]")),
        ("18", "18 ", ("18", "18[\N{OPEN BOX}]")),
        ("a\nb", "a b", ("a[\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n]b", "a[\N{OPEN BOX}]b")),
        ("a\tb", "ab", ("a[\N{RIGHTWARDS ARROW TO BAR}]b", "ab")),
        ("a\u200bb", "a\u202eb", ("a[[U+200B]]b", "a[[U+202E]]b")),
        ("x\ty\x1b", "x\ty\x1b", ("x y\N{REPLACEMENT CHARACTER}",) * 2),
        ("same", "same", ("same", "same")),
    ],
)
def test_what_differs_is_marked(one: str, other: str, marked: tuple[str, str]) -> None:
    """Letter by letter, in their places where both are equally long; blanks are made visible only there."""
    found = [re.sub(r"</?i>", "", html) for html in differences(one, other)]
    assert tuple(unescape(html.replace("<mark>", "[").replace("</mark>", "]")) for html in found) == marked


def test_long_answers_are_compared_word_by_word() -> None:
    """In a long answer a word is marked whole, and letters that two other words happen to share are not."""
    one = "She has 16 eggs and eats three of them, which leaves thirteen; at two dollars each that makes 26 in all."
    other = "She has 16 eggs and bakes four of them, which leaves twelve; at two dollars each that makes 24 in all."
    assert re.findall("<mark>(.*?)</mark>", differences(one, other)[1]) == ["bakes", "four", "twelve", "24"]


def test_a_difference_far_behind_is_seen() -> None:
    """Of answers longer than there is room, what stands around the first difference is shown."""
    head = "word " * 80
    one, other = differences(f"{head}yes{head}", f"{head}no{head}")
    assert one.startswith("&hellip;")
    assert one.endswith("&hellip;")
    assert "word <mark>yesword</mark> word" in one
    assert "word <mark>noword</mark> word" in other
    assert len(one) < 300


def test_no_answer_is_not_held_against_one() -> None:
    """Where one side was cut in thought, that is said, and nothing is marked."""
    page = flips(_verdict([_flip("t", 0), _flip("t", 1, base=CUT, lost=False)]))
    assert re.findall(r"<dt>candidate</dt><dd class=.*?>(.*?)</dd>", page) == ["<mark>18</mark>", f"<i>{CUT}</i>"]
    assert re.findall(r"<dt>baseline</dt><dd class=.*?>(.*?)</dd>", page)[1] == "18"


def test_hostile_answers_stay_text_and_cost_little() -> None:
    """Markup is escaped inside marks and outside; answers made to be hard to compare take no time to speak of."""
    one, other = differences("<b>&'\"", "<i>&'\"")
    assert (one, other) == ("&lt;<mark>b</mark>&gt;&amp;&#x27;&quot;", "&lt;<mark>i</mark>&gt;&amp;&#x27;&quot;")
    draw = random.Random(0)  # noqa: S311  no secret
    begun = time.perf_counter()
    for letters in ("ab", "a b", " ", "aab"):
        for _ in range(10):
            differences(*("".join(draw.choices(letters, k=600)) for _ in range(2)))
    assert time.perf_counter() - begun < 10


def test_a_few_of_each_task_are_open() -> None:
    """Three of a kind stand open and the rest is folded; the task that lost most comes first, lost before gained."""
    found = [_flip("few", 1), *(_flip("many", number) for number in range(9)), _flip("many", 70, lost=False)]
    html = flips(_verdict(found))
    assert re.findall(r"<h3><code>(\w+)</code>", html) == ["many", "few"]
    many = html[: html.index("<code>few")]
    assert re.findall(r"'>(lost|gained)</span>(\d+)", many) == [("lost", "9"), ("gained", "1")]
    assert "6 more</summary>" in many
    assert many[: many.index("<details>")].count("<li>") == 3
    assert many.count("<li>") == 10


def test_every_task_has_its_share_of_the_room() -> None:
    """A task of many flips leaves room for the others; what is left out is counted."""
    small = [_flip(f"small-{number}", number) for number in range(20)]
    html = flips(_verdict([*(_flip("large", number) for number in range(5000)), *small]))
    assert html.count("<li>") == SHOWN
    assert all(f"small-{number}" in html for number in range(20))
    assert f"{5020 - SHOWN:,} more are left out here" in html
    crowd = flips(_verdict([_flip(f"task-{number}", number, lost=bool(number % 3)) for number in range(5000)]))
    assert crowd.count("<li>") <= SHOWN


def test_the_right_answer_is_told_from_the_wrong_one() -> None:
    """What is wanted is said where no answer has it word for word; marks of the wrong answer look otherwise."""
    lost, gained = (flips(_verdict([_flip("t", 1, lost=lost, target=" 20\n")])) for lost in (True, False))
    assert "<dt>wanted</dt>" not in lost + gained
    assert '<dt>baseline</dt><dd class="right"><mark>20</mark>' in lost
    assert '<dt>candidate</dt><dd class="wrong"><mark>18</mark>' in lost
    assert '<dt>baseline</dt><dd class="wrong"><mark>18</mark>' in gained
    reasoned = flips(_verdict([_flip("t", 1, target="two times ten: #### 20")]))
    assert '<dt>wanted</dt><dd class="">two times ten: #### 20</dd>' in reasoned
