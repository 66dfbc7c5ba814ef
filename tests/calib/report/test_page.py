"""The page of a calibration: what it says, that its cells are the experts, and whose words it must not trust."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from k2quant.calib.coverage import LayerLoad, coverage_of
from k2quant.calib.report import write_html
from k2quant.calib.report.grid import LEVELS, cells, levels
from k2quant.calib.stats.reading import open_stats
from k2quant.checkpoint.reader import INCOMPLETE
from k2quant.cli import main
from k2quant.errors import CheckpointError, UsageError

Pages = Callable[..., str]

EVIL = "</p><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;\x1b[31m\u202e\n"
"""Markup, a terminal's code, a mark that turns text around."""


def words(page: str) -> str:
    """Return a page's text without markup, in single spaces."""
    plain = re.sub(r"<style>.*?</style>|</?(b|code|wbr)\b[^>]*>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", plain)))


class Elements(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.found.append((tag, dict(attrs)))


def painted(svg: str, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Return the level that each cell [layers, experts] has in a drawing; -1 where none is, and each has but one."""
    grid = np.full(shape, -1)
    for path, paint, strength in re.findall(
        r'<path d="([^"]*)" style="stroke:var\(--(\S+)\);stroke-opacity:(\S+)"', svg
    ):
        level = [(one.paint, f"{one.strength:g}") for one in LEVELS].index((paint, strength))
        column = row = 0
        for kind, first, second in re.findall(r"([Mmh])(\d+)(?: (\d+))?", path):
            if kind == "h":
                assert (grid[row, column : column + int(first)] == -1).all()
                grid[row, column : column + int(first)] = level
                column += int(first)
            elif kind == "m":
                column += int(first)
            else:
                column, row = int(first), int(second)
    return grid


# --- the cells -------------------------------------------------------------------------------------------------------

WIDTH = 64
MARKS = (0, 1, 2, 3, 4, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 1023, 1024, 10**6)


def test_marks_begin_a_level() -> None:
    """No token is a level of its own; with d = 64 the others begin at 1, 4, 16, 32, 64, 128, 256 and 1,024 tokens."""
    tokens = np.array(MARKS, np.int64)
    found = levels(LayerLoad(1, tokens, tokens / 4, 2), WIDTH)
    starts = np.searchsorted([0, 1, 1, 4, 16, 32, 64, 128, 256, 1024], tokens, side="right") - 1
    assert found.tolist() == starts.tolist()


@given(
    st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(st.sampled_from(MARKS), min_size=n, max_size=n), min_size=1))
)
def test_cells_are_the_experts(layers: list[list[int]]) -> None:
    """Read back, the paths fill every cell once, with the level of the expert that stands there."""
    rows = [levels(LayerLoad(1, np.array(tokens, np.int64), np.ones(len(tokens)), 2), WIDTH) for tokens in layers]
    assert painted(cells("x", rows), (len(rows), len(rows[0]))).tolist() == [row.tolist() for row in rows]


def test_a_k2_is_small(drawn: Pages) -> None:
    """A page of 60 x 384 experts of the most various loads has less than 400 kB."""
    random = np.random.default_rng(0)
    layers = [random.lognormal(3, 2.5, 384).astype(int).tolist() for _ in range(60)]
    assert len(drawn(*layers)) < 400_000


def test_an_expert_without_a_token_is_ringed(drawn: Pages) -> None:
    """One is: in the legend, in words and by a ring in each of the two pictures; where none is, there is no ring."""
    page, ring = drawn([5, 0, 90, 105]), "stroke:var(--ink);stroke-width:2"
    assert page.count(ring) == 2
    assert "no token: 1" in words(page)
    assert "Experts without a token are ringed." in words(page)
    assert ring not in drawn([5, 1, 90, 104])


# --- what it says ----------------------------------------------------------------------------------------------------


def test_the_command_draws_the_page_of_a_calibration(made_up: Any) -> None:
    """`k2quant report STATS` writes the page into the folder, says where, and the statistics stay what they were."""
    folder = made_up.write(empty=2)
    before = open_stats(folder).fingerprint
    result = CliRunner().invoke(main, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(folder / "k2quant_report.html")
    stats = open_stats(folder)
    assert stats.fingerprint == before
    said = words((folder / "k2quant_report.html").read_text())
    train = coverage_of(stats).train
    assert train.empty == 1
    assert "1 of 4 experts saw no token" in said
    assert f"Median expert {train.median:,.0f}" in said
    assert before in said


def test_json_has_the_figures_of_the_page(made_up: Any) -> None:
    """`--json` prints fingerprint, data and coverage, and draws nothing."""
    folder = made_up.write(empty=2)
    before = sorted(path.name for path in folder.iterdir())
    result = CliRunner().invoke(main, ["report", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    found, stats = json.loads(result.output), open_stats(folder)
    assert found["fingerprint"] == stats.fingerprint
    assert found["data"]["train"]["tokens"] == stats.manifest.data["train"].tokens
    assert found["coverage"] == coverage_of(stats).as_json()
    assert sorted(path.name for path in folder.iterdir()) == before


def test_figures_are_those_of_the_counts(drawn: Pages) -> None:
    """Thin experts, entropy, what is missing and the worst expert, by hand, are on the page."""
    said = words(drawn([1, 40, 79, 80], [50, 50, 50, 50]))
    assert "No token 0 of 8 routed experts" in said
    assert "Thin experts 1 below 10% of the mean of their layer; 1 of them below 5%" in said
    assert "Median expert 50 tokens, 0.78 d; the least has 1 (layer 1, expert 0)" in said
    assert "Tokens missing 6,300 of such data" in said
    assert "layer 1, expert 0 1 2.00% 0.0156 0.0312 0.25" in said


def test_tiers_stand_in_the_table(drawn: Pages) -> None:
    """Gate and up have d = 64, down has 32: no token, below d/4, below d, below 4d, and the rest."""
    said = words(drawn([0, 15, 16, 300]))
    assert "gate and up 64 1 1 1 0 1" in said
    assert "down 32 1 0 2 0 1" in said


@pytest.mark.parametrize(
    ("layers", "title", "advice"),
    [
        ([[0, 90, 90, 20]], "1 of 4 experts saw no token", "1 expert without a token."),
        ([[20, 60, 60, 60]], "Each of 4 experts saw tokens, none as many", "1 expert with fewer than 32 tokens"),
        ([[40, 60, 70, 130]], "Each of 4 experts saw tokens; 50% saw as many", "Enough for a search of scales:"),
        ([[70, 60, 70, 100]], "Each of 4 experts saw tokens; 75% saw as many", "--samples 547"),
        ([[70, 64, 70, 100]], "Each of 4 experts saw as many tokens as its input has columns", "enough for methods"),
    ],
    ids=["empty", "few", "some", "most", "all"],
)
def test_the_page_says_what_to_do(drawn: Pages, layers: list[list[int]], title: str, advice: str) -> None:
    """The headline and the advice follow the worst experts; 512 samples that lack 1 part in 15 are 547."""
    page = drawn(*layers)
    assert f"<h1>{title}" in page
    assert advice in words(page)


def test_few_held_out_tokens_are_said(drawn: Pages) -> None:
    """Experts with fewer than 64 held-out tokens are counted, and the page says how they are judged."""
    said = words(drawn([70, 70, 70, 90], held=[[63, 64, 70, 90]]))
    assert "Not measurable 1 experts with fewer than 64" in said
    assert "1 expert with fewer than 64 held-out tokens: they are judged on a blend" in said


def test_a_model_without_experts_has_a_page(drawn: Pages) -> None:
    """Where no layer has routed experts there is no picture of them, and the rest of the page."""
    page = drawn()
    assert "without routed experts" in page
    assert "<figure" not in page
    assert "Every token passes every matrix" in words(page)
    assert "ab" * 32 in words(page)


def test_experts_that_no_token_reached_make_a_page(drawn: Pages) -> None:
    """Without a single token every figure is still a figure."""
    said = words(drawn([0, 0, 0, 0]))
    assert "4 of 4 experts saw no token" in said
    assert "nan" not in said.lower()
    assert "inf" not in said.lower().replace("information", "")


# --- what it must not do ---------------------------------------------------------------------------------------------


def test_page_is_self_contained(drawn: Pages) -> None:
    """No script, no address, nothing to load, and no id twice; what refers to something refers to this page."""
    page = drawn([5, 0, 90, 105], [50, 50, 50, 50])
    assert not re.search(r"https?:|@import|url\((?!#)|javascript:", page)
    found = Elements(page).found
    assert not {"script", "link", "iframe", "object", "img", "image", "form"} & {tag for tag, _ in found}
    for _, attributes in found:
        assert not any(name.startswith("on") or name in {"src", "srcset", "action"} for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    ids = [attributes["id"] for _, attributes in found if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_pictures_have_words_and_no_colours_of_their_own(drawn: Pages) -> None:
    """Each picture is labelled for those who hear the page, and takes its colours from the page's two schemes."""
    page = drawn([5, 0, 90, 105], [50, 50, 50, 50])
    pictures = [attributes for tag, attributes in Elements(page).found if tag == "svg" and "role" in attributes]
    assert [one["class"] for one in pictures] == ["wide", "narrow"] * 3
    assert all(len(one["aria-label"] or "") > 50 for one in pictures)
    assert not re.search(r"#[0-9a-fA-F]{6}\b", page[page.index("<body>") :])


def test_hostile_words_are_text(drawn: Pages) -> None:
    """Markup in settings, version, config and folder shows as text and is no element."""
    honest = {tag for tag, _ in Elements(drawn([5, 5, 90, 100])).found}
    page = drawn([5, 5, 90, 100], version=EVIL, settings={EVIL: EVIL, "samples": EVIL, "length": None, "damping": 0.1})
    assert page.count("&lt;script&gt;") >= 4
    assert {tag for tag, _ in Elements(page).found} <= honest | {"wbr"}
    assert not re.search("[\u202e\x1b]", page)


def test_a_large_calibration_makes_a_small_page(drawn: Pages) -> None:
    """Of many documents and settings the first are listed, and the rest is counted."""
    from k2quant.calib.stats.manifest import DataPart

    part = DataPart(hashes=tuple(f"{n:064x}" for n in range(10_000)), tokens=1, rows=1, digest="ef" * 32)
    data = dict.fromkeys(("train", "validation", "test"), part)
    page = drawn([5, 5, 90, 100], data=data, settings={f"setting {n}": n for n in range(10_000)})
    assert "and 9,800 more" in page
    assert len(page) < 200_000


def test_many_layers_and_experts_are_cut(drawn: Pages) -> None:
    """A model of 200 layers shows the first 128, and says so."""
    said = words(drawn(*[[5, 5, 90, 100]] * 200))
    assert "The first 128 of 200 layers." in said


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_unfinished_statistics_are_refused(made_up: Any) -> None:
    """A calibration that is still at work has no page."""
    folder = made_up.write()
    (folder / INCOMPLETE).touch()
    with pytest.raises(CheckpointError, match="not finished"):
        write_html(folder)


def test_damaged_statistics_are_refused(made_up: Any) -> None:
    """A layer that changed since it was written is an error that names its file, and nothing is written."""
    folder = made_up.write()
    path = folder / "layer-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"layer-00001\.safetensors"):
        write_html(folder)
    assert not (folder / "k2quant_report.html").exists()


@pytest.mark.parametrize("name", ["page", "k2quant_stats.json"])
def test_only_pages_are_written(made_up: Any, name: str) -> None:
    """A name that is no page's is refused."""
    folder = made_up.write()
    with pytest.raises(UsageError, match=r"\.html"):
        write_html(folder, folder / name)
