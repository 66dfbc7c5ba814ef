"""The HTML page of a conversion: what it says, what it must not load, and whose names it must not trust."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from k2quant.checkpoint.reader import INCOMPLETE, REPORT
from k2quant.cli import main
from k2quant.conversion.convert import convert
from k2quant.errors import MalformedFile, OutputError, UsageError
from k2quant.ground.names import TENSOR_CLASSES
from k2quant.kernels.codecs.figures import Figures
from k2quant.report import write_html
from k2quant.report.drawing import PARTS
from k2quant.report.style import style_sheet
from k2quant.report.words import text as harmless

Json = dict[str, Any]

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&\u202e"
"""Markup, quotes, a mark that turns text around."""


@pytest.fixture(scope="module")
def int4(k2_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion to INT4: the routed experts are rounded, everything else is exact."""
    return convert(k2_source, tmp_path_factory.mktemp("report") / "Small-INT4", to="int4").folder


@pytest.fixture(scope="module")
def bf16(k2_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion to BF16, where nothing is rounded."""
    return convert(k2_source, tmp_path_factory.mktemp("report") / "Small-BF16", to="bf16").folder


def read(folder: Path) -> Json:
    """Return the JSON of a conversion."""
    report: Json = json.loads((folder / REPORT).read_text())
    return report


def write(folder: Path, report: Json) -> Path:
    """Make a folder that holds nothing but a report."""
    folder.mkdir(exist_ok=True)
    (folder / REPORT).write_text(json.dumps(report))
    return folder


def page(folder: Path, tmp_path: Path) -> str:
    """Return the page of a conversion, written beside it and not into it."""
    return write_html(folder, tmp_path / "page.html").read_text()


def words(html: str) -> str:
    """Return a page's text without markup, in single spaces."""
    from html import unescape

    return re.sub(r"\s+", " ", unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL)))


class Elements(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.ends: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Note an end."""
        self.ends.append(tag)


# --- what it says ----------------------------------------------------------------------------------------------------


def test_default_name_is_in_the_folder(int4: Path, tmp_path: Path) -> None:
    """Without a name, the page is k2quant_report.html beside the JSON, and the command says where."""
    folder = write(tmp_path / "Small-INT4", read(int4))
    result = CliRunner().invoke(main, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(folder / "k2quant_report.html")
    assert sorted(path.name for path in folder.iterdir()) == ["k2quant_report.html", REPORT]


def test_the_figures_are_those_of_the_json(int4: Path, tmp_path: Path) -> None:
    """Overall SQNR, the share of changed values, the worst tensor and the sizes are computed from the JSON."""
    report, text = read(int4), words(page(int4, tmp_path))
    rounded = {name: Figures(**facts["figures"]) for name, facts in report["tensors"].items() if "figures" in facts}
    total = sum(rounded.values(), start=Figures())
    worst = min(rounded, key=lambda name: rounded[name].sqnr_db)
    assert f"Overall SQNR {total.sqnr_db:.2f} dB" in text
    assert f"Values changed {100 * total.changed / total.count:.2f}%" in text
    assert f"Worst tensor {rounded[worst].sqnr_db:.2f} dB {worst}" in text.replace(". ", ".").replace("_ ", "_")
    assert f"{report['bytes_read'] / 1e6:.1f} MB → {report['bytes_written'] / 1e6:.1f} MB" in text
    assert f"{report['bytes_written'] / report['bytes_read']:.2f} times the source" in text


def test_every_class_has_its_row(int4: Path, tmp_path: Path) -> None:
    """The table holds each class and pair of formats with its tensors, and its SQNR or that it is exact."""
    text = words(page(int4, tmp_path))
    experts = [facts for facts in read(int4)["tensors"].values() if facts["class"] == "routed experts"]
    total = sum((Figures(**facts["figures"]) for facts in experts), start=Figures())
    assert f"routed experts FP8 → INT4 {len(experts)} 12.6 million {total.sqnr_db:.2f} dB" in text
    assert "attention FP8 → BF16 15 1.57 million exact" in text
    assert "norm BF16, copied 13 4,640 exact" in text


def test_every_layer_has_its_row(int4: Path, tmp_path: Path) -> None:
    """The picture of the layers comes with its numbers as a table."""
    text = words(page(int4, tmp_path))
    for layer in (1, 2):
        total = sum(
            (
                Figures(**facts["figures"])
                for facts in read(int4)["tensors"].values()
                if facts["layer"] == layer and "figures" in facts
            ),
            start=Figures(),
        )
        assert f" {layer} {total.sqnr_db:.2f} dB" in text


def test_the_worst_tensors_stand_in_order(int4: Path, tmp_path: Path) -> None:
    """Twenty tensors are listed, the lowest SQNR first."""
    html = page(int4, tmp_path)
    listed = re.findall(r"<th scope=row><code>(.*?)</code></th><td>([\d.]+)&nbsp;dB", html)
    tensors = read(int4)["tensors"]
    ratios = {name: Figures(**facts["figures"]).sqnr_db for name, facts in tensors.items() if "figures" in facts}
    expected = sorted(ratios, key=lambda name: (ratios[name], name))[:20]
    assert [name.replace("<wbr>", "") for name, _ in listed] == expected
    assert [ratio for _, ratio in listed] == [f"{ratios[name]:.2f}" for name in expected]


def test_sizes_by_format_add_up(int4: Path, tmp_path: Path) -> None:
    """The bytes of each format follow from the shapes; what is left of the whole is scales and the rest."""
    report, text = read(int4), words(page(int4, tmp_path))
    weights = sum(
        facts["shape"][0] * facts["shape"][1] for facts in report["tensors"].values() if facts["to"] == "int4"
    )
    assert f"INT4 codes \N{EN DASH} {weights / 2e6:.1f} MB" in text
    assert f"all {report['bytes_read'] / 1e6:.1f} MB {report['bytes_written'] / 1e6:.1f} MB" in text


@pytest.mark.parametrize("to", ["nvfp4", "mxfp4"])
def test_codes_of_fp4_are_no_scales(to: Any, k2_source: Path, tmp_path: Path) -> None:
    """Codes are called by their format, what is beside them is what is left, and each part has a colour of its own."""
    done = convert(k2_source, tmp_path / "out", to)
    weights = sum(math.prod(facts["shape"]) for facts in read(done.folder)["tensors"].values() if facts["to"] == to)
    text = words(page(done.folder, tmp_path))
    assert f"{to.upper()} codes \N{EN DASH} {weights / 2e6:.1f} MB" in text
    found = re.search(r"scales and the rest \S+ (?:[kM]B )?(\d+)", text)
    assert found
    assert 0 < float(found[1]) * 1e6 < weights / 4 or "kB all" in text
    colours = re.findall(r"--part-\d+:(#\w+);", style_sheet())
    assert len(set(colours)) == len(colours) == 2 * len(PARTS)


def test_it_says_how_to_check(int4: Path, tmp_path: Path) -> None:
    """Options, fingerprint and the commands that check the folder stand at the end."""
    text, source = words(page(int4, tmp_path)), read(int4)["source"]
    assert "k2quant verify --checksums Small-INT4" in text
    assert "k2quant verify Kimi-K2-Small Small-INT4" in text
    assert source["tensors_sha256"] in text
    assert source["shards"]["model-1-of-3.safetensors"]["header_sha256"] in text
    assert "grid moonshot (default)" in text
    assert "scope experts (default)" in text


def test_bf16_says_that_nothing_was_rounded(bf16: Path, tmp_path: Path) -> None:
    """A conversion to BF16 shows no empty pictures of errors, but says why there is none."""
    html = page(bf16, tmp_path)
    assert "Nothing was rounded: every value is bit-equal to code \N{MULTIPLICATION SIGN} scale" in words(html).replace(
        " :", ":"
    )
    assert "Error by" not in html
    assert "SQNR" not in html
    assert "Size by format, in MB" in html


def test_float32_to_bf16_is_not_called_exact(bf16: Path, tmp_path: Path) -> None:
    """A weight that was F16 or F32 was rounded once to BF16, and the page says so."""
    report = read(bf16)
    report["tensors"]["model.embed_tokens.weight"].update({"from": "bf16", "to": "bf16"})
    text = words(page(write(tmp_path / "x", report), tmp_path))
    assert "Nothing was rounded" not in text
    assert "1 tensor, once, to the nearest BF16" in text
    assert "embedding F16/F32 → BF16 1 1.05 million rounded once" in text


def test_rounding_without_loss_is_called_so(bf16: Path, tmp_path: Path) -> None:
    """BF16 that came from FP8 goes back to FP8 without an error, and the page has no picture of it."""
    back = convert(bf16, tmp_path / "back", to="fp8").folder
    html = page(back, tmp_path)
    assert "Rounding lost nothing" in html
    assert "Error by" not in html


def test_a_single_tensor_is_enough(int4: Path, tmp_path: Path) -> None:
    """One rounded tensor of one layer makes a whole page."""
    report = read(int4)
    report["tensors"] = dict([next(item for item in report["tensors"].items() if "figures" in item[1])])
    text = words(page(write(tmp_path / "x", report), tmp_path))
    assert "Error by layer" in text
    assert "The one tensor that changed" in text


def test_no_tensor_is_enough(int4: Path, tmp_path: Path) -> None:
    """A report without tensors makes a page that says that there were none."""
    report = read(int4) | {"tensors": {}, "bytes_read": 0, "bytes_written": 0, "seconds": 0}
    assert "found nothing to convert" in page(write(tmp_path / "x", report), tmp_path)


def test_a_tensor_outside_the_layers_is_in_no_line(int4: Path, tmp_path: Path) -> None:
    """Where nothing that was rounded lies in a layer, there is no picture of layers, but one of classes."""
    report = read(int4)
    for facts in report["tensors"].values():
        facts["layer"] = None
    html = page(write(tmp_path / "x", report), tmp_path)
    assert "Error by layer" not in html
    assert "Error by tensor class" in html


def test_every_class_has_a_colour_in_both_modes() -> None:
    """Each class has a variable of its own in the light and in the dark scheme."""
    for number in range(len(TENSOR_CLASSES)):
        assert len(set(re.findall(rf"--class-{number}:(#[0-9a-f]{{6}});", style_sheet()))) == 2


# --- what it must not do ---------------------------------------------------------------------------------------------


def test_page_is_self_contained(int4: Path, tmp_path: Path) -> None:
    """No script, no address, nothing to load: what refers to something refers to this page."""
    html = page(int4, tmp_path)
    assert not re.search(r"https?:|@import|url\((?!#)|javascript:", html)
    for tag, attributes in Elements(html).found:
        assert tag not in {
            "script",
            "link",
            "iframe",
            "object",
            "embed",
            "img",
            "image",
            "base",
            "form",
            "foreignobject",
        }
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in {"src", "srcset", "data", "action"}
            assert name != "href" or (value or "").startswith("#")


def test_ids_are_unique(int4: Path, tmp_path: Path) -> None:
    """The pictures share no ids: a clip path of a hidden picture would hide the shown one."""
    ids = [attributes["id"] for _, attributes in Elements(page(int4, tmp_path)).found if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_pictures_are_named_and_take_colours_and_font_from_the_page(int4: Path, tmp_path: Path) -> None:
    """Each SVG has a label for those who hear the page, no colour that one of the modes would swallow, no own font."""
    html = page(int4, tmp_path)
    pictures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(pictures) == 6  # three, for wide and for narrow screens
    for picture in pictures:
        assert re.match(r'<svg class="(wide|narrow)" viewBox="0 0 \d+ \d+" role="img" aria-label="[^"]+">', picture)
        assert not re.search(r"#[0-9a-fA-F]{6}\b", picture)
        assert not re.search(r"font(-family)?:", picture)


def test_remarks_are_on_the_page(int4: Path, tmp_path: Path) -> None:
    """What a conversion had to say is on its page; a report of an earlier release has nothing to say."""
    report = read(int4) | {"remarks": ["the output splits what engines fuse"]}
    assert "<dt>note</dt><dd>the output splits what engines fuse</dd>" in page(
        write(tmp_path / "said", report), tmp_path
    )
    del report["remarks"]
    assert "<dt>note</dt>" not in page(write(tmp_path / "silent", report), tmp_path)


def test_hostile_names_are_text(int4: Path, tmp_path: Path) -> None:
    """Markup in names of source, tensors, shards, options and folder shows as text and is no element."""
    report, evil = read(int4), EVIL
    honest = [tag for tag, _ in Elements(page(int4, tmp_path)).found]
    name, facts = next(item for item in report["tensors"].items() if "figures" in item[1])
    del report["tensors"][name]
    facts["figures"]["error"] *= 100  # so that it is the worst
    report["tensors"][evil] = facts
    report["source"]["shards"] = {evil: report["source"]["shards"].popitem()[1] | {"header_sha256": evil}}
    report["source"] |= {"tensors_sha256": evil, "config_sha256": evil}
    report |= {"source_name": evil, "version": evil, "remarks": [evil]}
    report["options"] |= {"ignore": [evil], "scope": evil, "grid": evil}
    html = page(write(tmp_path / "<b>x", report), tmp_path).replace("<wbr>", "")
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 10
    assert "<script" not in html
    assert "<img" not in html
    assert "<b>x" not in html
    assert "\u202e" not in html
    found = [tag for tag, _ in Elements(html).found]
    assert set(found) <= set(honest)
    assert found.count("svg") == honest.count("svg")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a<b&c", "a&lt;b&amp;c"),
        ("\udcff\x00\n\u202ex", "\N{REPLACEMENT CHARACTER}" * 4 + "x"),
        ("x" * 201, "x" * 197 + "..."),
    ],
    ids=["markup", "unprintable", "long"],
)
def test_names_are_made_harmless(name: str, shown: str) -> None:
    """Markup is escaped, what does not print is marked, and what is too long is cut."""
    assert harmless(name) == shown


def test_page_allows_itself_nothing(int4: Path, tmp_path: Path) -> None:
    """A policy in the page forbids scripts and loads, should a name ever slip through."""
    policies = [
        a.get("content") for tag, a in Elements(page(int4, tmp_path)).found if tag == "meta" and "http-equiv" in a
    ]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_a_large_report_makes_a_small_page(int4: Path, tmp_path: Path) -> None:
    """A page of ten thousand tensors and sixty layers lists none but the worst, and stays small."""
    report = read(int4)
    facts = next(facts for facts in report["tensors"].values() if "figures" in facts)
    report["tensors"] = {
        f"model.layers.{number % 60 + 1}.mlp.experts.{number // 60}.up_proj.weight_packed": facts
        | {"layer": number % 60 + 1}
        for number in range(10_000)
    }
    assert len(page(write(tmp_path / "x", report), tmp_path)) < 300_000


# --- what it refuses -------------------------------------------------------------------------------------------------

BREAKS: dict[str, Callable[[Json], object]] = {
    "no version": lambda report: report.pop("version"),
    "seconds are text": lambda report: report.update(seconds="1"),
    "seconds are negative": lambda report: report.update(seconds=-1),
    "seconds are beyond counting": lambda report: report.update(seconds=10**400),
    "bytes are a fraction": lambda report: report.update(bytes_read=1.5),
    "bytes are a truth": lambda report: report.update(bytes_read=True),
    "date is none": lambda report: report.update(finished="yesterday"),
    "name is a list": lambda report: report.update(source_name=[]),
    "options are a list": lambda report: report.update(options=[]),
    "no option to": lambda report: report["options"].pop("to"),
    "unknown format": lambda report: report["options"].update(to="fp4"),
    "pattern is a number": lambda report: report["options"].update(ignore=[1]),
    "patterns are text": lambda report: report["options"].update(ignore="abc"),
    "remarks are text": lambda report: report.update(remarks="abc"),
    "a remark is a number": lambda report: report.update(remarks=[1]),
    "source is text": lambda report: report.update(source="x"),
    "tensor without class": lambda report: first(report).pop("class"),
    "unknown class": lambda report: first(report).update({"class": "<b>"}),
    "class is a list": lambda report: first(report).update({"class": []}),
    "unknown source format": lambda report: first(report).update({"from": "gguf"}),
    "format is a list": lambda report: first(report).update({"to": []}),
    "layer is text": lambda report: first(report).update(layer="1"),
    "shape of three": lambda report: first(report).update(shape=[1, 2, 3]),
    "shape of text": lambda report: first(report).update(shape=["1", "2"]),
    "shape below zero": lambda report: first(report).update(shape=[-1, 32]),
    "width that INT4 cannot have": lambda report: first(report).update(shape=[2, 33]),
    "energy below zero": lambda report: first(report)["figures"].update(energy=-1.0),
    "error beyond counting": lambda report: first(report)["figures"].update(error=1e300),
    "ratio below counting": lambda report: first(report)["figures"].update(energy=1e-300, error=1e90),
    "no figures": lambda report: first(report).update(figures={}),
}


def first(report: Json) -> Json:
    """Return the facts of the first rounded tensor."""
    facts: Json = next(facts for facts in report["tensors"].values() if "figures" in facts)
    return facts


@pytest.mark.parametrize("harm", BREAKS.values(), ids=BREAKS.keys())
def test_a_malformed_report_is_refused(int4: Path, tmp_path: Path, harm: Callable[[Json], object]) -> None:
    """A part that is missing or of the wrong kind is MalformedFile, names the file, and writes nothing."""
    report = read(int4)
    harm(report)
    folder = write(tmp_path / "x", report)
    with pytest.raises(MalformedFile, match=re.escape(str(folder / REPORT))):
        write_html(folder)
    assert [path.name for path in folder.iterdir()] == [REPORT]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'{"tool": "other"}', b'{"a": 1, "a": 2}'])
def test_what_is_no_report_is_refused(tmp_path: Path, data: bytes) -> None:
    """Bytes that are no JSON object, or another tool's, are MalformedFile."""
    (tmp_path / REPORT).write_bytes(data)
    with pytest.raises(MalformedFile):
        write_html(tmp_path)


def test_a_folder_without_report_is_refused(tmp_path: Path) -> None:
    """A folder that no conversion wrote is an error of one line, with exit code 1."""
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert "no such report" in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_conversion_is_refused(int4: Path, tmp_path: Path) -> None:
    """As long as the folder says that it is incomplete, there is no page of it."""
    folder = write(tmp_path / "x", read(int4))
    (folder / INCOMPLETE).touch()
    with pytest.raises(MalformedFile, match="not finished"):
        write_html(folder)


def test_the_page_is_written_whole(int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When writing fails half-way, the page that stood there before still stands there."""
    folder = write(tmp_path / "x", read(int4))
    target = folder / "k2quant_report.html"
    target.write_text("before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OutputError, match="No space left"):
            write_html(folder)
    assert target.read_text() == "before"
    assert write_html(folder).read_text().endswith("</html>\n")


@pytest.mark.parametrize("name", ["config.json", "page", "folder.html"])
def test_only_pages_are_written(int4: Path, tmp_path: Path, name: str) -> None:
    """A name that is no page's is refused, so that a slip cannot overwrite a config.json."""
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UsageError, match=r"\.html"):
        write_html(int4, tmp_path / name)


def test_a_missing_folder_for_the_page_is_an_output_error(int4: Path, tmp_path: Path) -> None:
    """Where the page cannot be written, the error names it."""
    with pytest.raises(OutputError, match=r"nowhere.page\.html"):
        write_html(int4, tmp_path / "nowhere" / "page.html")


def test_a_page_does_not_spoil_the_folder(int4: Path, tmp_path: Path) -> None:
    """A conversion with its page in it still passes its own checksums."""
    from k2quant.checking.verify import verify_checksums

    folder = tmp_path / "copy"
    shutil.copytree(int4, folder)
    write_html(folder)
    assert verify_checksums(folder).passed
