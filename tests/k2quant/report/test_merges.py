"""The page of a merge: what became of the update, as the terminal says it and as a picture, and what was copied."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import k2quant
from k2quant.checkpoint.reader import REPORT
from k2quant.cli import main
from k2quant.cli.merge import table as terminal
from k2quant.errors import MalformedFile
from k2quant.merge.adapter import CONFIG, WEIGHTS
from k2quant.merge.figures import by_class

Json = dict[str, Any]
Draw = Callable[[Json], str]

SHAPES = {
    "model.layers.1.self_attn.q_a_proj": (256, 512),
    "model.layers.1.mlp.experts.3.gate_proj": (256, 512),
    "model.layers.2.mlp.experts.7.down_proj": (512, 256),
}
"""What the adapter updates, of the small K2 in INT4: of three tensors one is BF16."""


@pytest.fixture(scope="module")
def merged(k2_thinking: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `my-lora` of three small updates, and `int4` and `bf16`, merges of it. Not to be changed."""
    folder = tmp_path_factory.mktemp("merges")
    (folder / "my-lora").mkdir()
    random = torch.Generator().manual_seed(0)
    factors = {}
    for module, (rows, width) in SHAPES.items():
        factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn((4, width), generator=random)
        factors[f"base_model.model.{module}.lora_B.weight"] = torch.randn((rows, 4), generator=random) * 3e-4
    save_file(factors, folder / "my-lora" / WEIGHTS)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "peft_version": "0.21.2"}
    (folder / "my-lora" / CONFIG).write_text(json.dumps(settings))
    for to in ("int4", "bf16"):
        k2quant.merge(k2_thinking, folder / "my-lora", folder / to, to=to)
    return folder


def read(folder: Path) -> Json:
    """Return a merge's report."""
    report: Json = json.loads((folder / REPORT).read_text())
    return report


def test_the_headline_counts_what_was_merged_and_what_was_copied(merged: Path, said: Draw) -> None:
    """Adapter, rank, alpha, how many tensors have an update in which formats, and how many are copies."""
    report = read(merged / "int4")
    copied = len(report["tensors"]) - 3
    text = said(report)
    assert "K2-INT4 with my-lora, as INT4" in text
    merge = "k2quant merged my-lora of rank 4, alpha 8 into 3 tensors (2 in INT4, and 1 unquantised)"
    assert f"{merge}, and copied {copied} byte for byte." in text
    assert "attention BF16, merged 1 131,072 rounded once" in text
    assert "attention BF16, copied 14" in text
    assert "routed experts INT4, merged 2" in text


def test_the_table_is_that_of_the_terminal(merged: Path, said: Draw) -> None:
    """Class, tensors, norm, cosine, size of what arrived, what was lost and changed: the numbers of the command."""
    report = read(merged / "int4")
    text = said(report)
    rows = [re.split(r"\s{2,}", line) for line in terminal(by_class(report["tensors"])).splitlines()[1:]]
    assert [row[0] for row in rows] == ["routed experts", "attention"]
    for kind, tensors, norm, cosine, ratio, _, _ in rows:
        assert f"{kind} {tensors} {norm} {cosine} {ratio} " in text
    lost = [100 * row.figures.lost_share for row in by_class(report["tensors"])]
    assert lost[0] > 50 > lost[1]
    assert f"Update lost {lost[0]:.2f}% routed experts" in text


def test_a_picture_shows_what_came_through_and_what_was_lost(merged: Path, drawn: Draw, said: Draw) -> None:
    """A bar for each class and a line for each over the layers, for wide and for narrow screens."""
    report = read(merged / "int4")
    pictures = re.findall(r"<svg class=\"(\w+)\"[^>]*aria-label=\"(.*?)\.", drawn(report))
    titles = ["What rounding left of the update, by tensor class", "Update lost, by layer"]
    for screen in ("wide", "narrow"):
        assert [title for seen, title in pictures if seen == screen][:2] == titles
    text = said(report)
    for row in by_class(report["tensors"]):
        assert f"{100 * row.figures.lost_share:.1f}% lost" in text


def test_the_commands_on_the_page_pass(merged: Path, drawn: Draw) -> None:
    """A merge is checked by its checksums; a comparison with the base would fail, and is not printed."""
    html = drawn(read(merged / "int4"))
    assert re.findall(r"<pre>(.*?)</pre>", html) == ["k2quant verify --checksums out"]
    assert CliRunner().invoke(main, ["verify", "--checksums", str(merged / "int4")]).exit_code == 0
    assert "values differ by design: the adapter changed them" in html


def test_a_sum_in_bf16_is_rounded_once_and_never_exact(merged: Path, said: Draw) -> None:
    """A merge to BF16 has no error of rounding to show, and no word of values that came through unchanged."""
    text = said(read(merged / "bf16"))
    assert "Nothing but sums was rounded" in text
    assert "every other value is bit-equal to code \N{MULTIPLICATION SIGN} scale." in text
    assert "k2quant merged my-lora of rank 4, alpha 8 into 3 tensors, wrote 94 tensors from INT4 as BF16" in text
    assert "routed experts INT4 → BF16, merged 2 262,144 rounded once" in text
    assert "What rounding left of the update" in text
    assert not re.search("Nothing was rounded|Rounding lost nothing|every value unchanged|SQNR", text)


def test_a_merge_of_an_earlier_release_is_known_by_its_figures(merged: Path, said: Draw) -> None:
    """Reports that do not say whose values a tensor has make the same page: figures of an update tell."""
    report = read(merged / "int4")
    expected = said(report)
    for facts in report["tensors"].values():
        facts.pop("substituted", None)
    assert said(report) == expected


def test_what_was_replaced_and_not_measured_is_said(merged: Path, said: Draw) -> None:
    """Tensors without figures are no part of the sums, and the page says how many there are."""
    report = read(merged / "int4")
    report["values"]["adapter"]["replaced"] = 2
    assert "2 more were replaced whole and not measured" in said(report)


def test_an_adapter_without_figures_is_enough(merged: Path, said: Draw) -> None:
    """Where nothing was measured the page says so."""
    report = read(merged / "int4")
    for facts in report["tensors"].values():
        facts.pop("figures", None)
    assert "What became of the update was not measured" in said(report)


def update(report: Json) -> Json:
    """Return the first figures of an update."""
    found: Json = next(f["figures"] for f in report["tensors"].values() if "update" in f.get("figures", ()))
    return found


BREAKS: dict[str, Callable[[Json], object]] = {
    "an adapter of text": lambda report: report["values"].update(adapter="x"),
    "no name": lambda report: report["values"]["adapter"].pop("name"),
    "a rank of text": lambda report: report["values"]["adapter"].update(r="4"),
    "an alpha beyond counting": lambda report: report["values"]["adapter"].update(lora_alpha=1e300),
    "digests in a list": lambda report: report["values"]["adapter"].update(sha256=[]),
    "a digest that is a number": lambda report: report["values"]["adapter"].update(sha256={"a": 1}),
    "updated below zero": lambda report: report["values"]["adapter"].update(updated=-1),
    "no sum of what arrived": lambda report: update(report).pop("effective"),
    "an update below zero": lambda report: update(report).update(update=-1.0),
    "a product beyond counting": lambda report: update(report).update(inner=-1e300),
    "more lost than there was": lambda report: update(report).update(lost=update(report)["update"] * 2),
    "more codes changed than there are": lambda report: update(report).update(codes_changed=2**40),
    "more groups below than there are": lambda report: update(report).update(groups_below_half_step=2**40),
}


@pytest.mark.parametrize("harm", BREAKS.values(), ids=BREAKS.keys())
def test_a_malformed_merge_is_refused(merged: Path, drawn: Draw, harm: Callable[[Json], object]) -> None:
    """What a report says of an adapter and its update is checked as strictly as all else: MalformedFile."""
    report = read(merged / "int4")
    harm(report)
    with pytest.raises(MalformedFile, match=REPORT):
        drawn(report)


def test_names_of_adapters_are_text(merged: Path, drawn: Draw) -> None:
    """Markup in the name of an adapter, of its files and in their digests is text."""
    report, evil = read(merged / "int4"), "<script>x</script>"
    report["values"]["adapter"] |= {"name": evil, "sha256": {evil: evil}}
    html = drawn(report).replace("<wbr>", "")
    assert "<script" not in html
    assert html.count("&lt;script&gt;x&lt;/script&gt;") >= 5
