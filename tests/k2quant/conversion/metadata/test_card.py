"""The model card that a conversion writes: what hubs read of it, what people do, and whose it is."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import k2quant
from k2quant.checkpoint.cards import is_ours, placed, sealed
from k2quant.cli import main
from k2quant.conversion.finishing.metadata import front, home_of

SOURCE_CARD = """---
license: other
license_name: modified-mit
license_link: LICENSE
language: [en, zh]
tags: [moe, fp8, conversational, 8-bit, "w8a8"]
library_name: transformers
pipeline_tag: text-generation
base_model: moonshotai/Kimi-K2-Base
model-index: [{name: x, results: []}]
---
# Kimi
"""


def head_of(card: Path) -> dict[str, Any]:
    """The YAML at the head of a card."""
    found = yaml.safe_load(card.read_text().split("---\n")[1])
    assert isinstance(found, dict)
    return found


@pytest.fixture
def source(k2_source: Path, tmp_path: Path) -> Path:
    """A checkpoint with a card, as it lies in huggingface_hub's cache."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--moonshotai--Kimi-K2-Instruct" / "snapshots" / commit
    shutil.copytree(k2_source, folder)
    (folder / "README.md").write_text(SOURCE_CARD)
    return folder


def test_hubs_are_told_what_is_true_of_the_output(source: Path, tmp_path: Path) -> None:
    """Licence, language and tags are the source's, but for what they say of its numbers; the base is the source."""
    out = k2quant.convert(source, tmp_path / "out", "int4").folder
    assert head_of(out / "README.md") == {
        "license": "other",
        "license_name": "modified-mit",
        "license_link": "LICENSE",
        "language": ["en", "zh"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "moonshotai/Kimi-K2-Instruct",
        "base_model_relation": "quantized",
        "tags": ["moe", "conversational", "k2quant", "int4", "compressed-tensors"],
    }
    assert (out / "README.source.md").read_text() == SOURCE_CARD
    text = (out / "README.md").read_text()
    assert "[README.source.md](README.source.md)" in text
    assert str(tmp_path) not in text
    facts = json.loads((out / "k2quant_report.json").read_text())["files"]
    assert facts["README.md"]["size"] == (out / "README.md").stat().st_size
    assert facts["README.source.md"]["size"] == len(SOURCE_CARD)


def test_the_errors_are_the_reports(source: Path, tmp_path: Path) -> None:
    """Each class of tensors has its line: how many, from what, to what, and what rounding left."""
    out = k2quant.convert(source, tmp_path / "out", "int4").folder
    said = CliRunner().invoke(main, ["convert", "--to", "int4", str(source), str(tmp_path / "again")])
    assert said.exit_code == 0
    ratio = said.output.split("SQNR: routed experts ")[1].split(" dB")[0]
    (line,) = [line for line in (out / "README.md").read_text().splitlines() if line.startswith("| routed experts")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["routed experts", "96", "FP8", "INT4"]
    assert f"{float(cells[4].removesuffix(' dB')):.1f}" == ratio


def test_a_conversion_writes_the_same_card_again(source: Path, tmp_path: Path) -> None:
    """Neither the time nor the destination's name is in it."""
    first, second = (k2quant.convert(source, tmp_path / name, "int4").folder / "README.md" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "flags",
    [
        ["--to", "int4", "--scope", "linear", "--ignore", "layers.1.*q_b", "--shard-size", "3MB"],
        ["--to", "fp8", "--layout", "compressed-tensors"],
        ["--config", "RECIPE"],
    ],
)
def test_its_command_makes_the_same_again(flags: list[str], k2_source: Path, tmp_path: Path) -> None:
    """The command that it shows, with the recipe that it shows, writes the same shards and the same card."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules:\n- {to: int4, classes: [routed experts]}\n- {to: bf16}\n")
    named = [str(recipe) if flag == "RECIPE" else flag for flag in flags]
    outs = tmp_path / "first", tmp_path / "second"
    assert CliRunner().invoke(main, ["convert", *named, str(k2_source), str(outs[0])]).exit_code == 0
    text = (outs[0] / "README.md").read_text()
    shown = shlex.split(text.split("```sh\n")[1].split("\n```")[0])
    assert shown[0] == "k2quant"
    assert shown[-2] == k2_source.name
    recipe.write_text(text.split("```yaml\n")[1].split("```")[0] if "```yaml" in text else "")
    again = [str(recipe) if word == "recipe.yaml" else word for word in shown[1:-2]]
    said = CliRunner().invoke(main, [*again, str(k2_source), str(outs[1])])
    assert said.exit_code == 0, said.output
    written = [{p.name: p.read_bytes() for p in out.iterdir() if p.name != "k2quant_report.json"} for out in outs]
    assert written[0] == written[1]


def test_a_card_of_the_users_own_stays(k2_source: Path, tmp_path: Path) -> None:
    """One that lies there before stays as it is, through a restart too, and is none of the report's files."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    report = k2quant.convert(k2_source, out, "int4").report
    assert (out / "README.md").read_text() == "mine"
    assert "README.md" not in report["files"]
    k2quant.convert(k2_source, out, "bf16", restart=True)
    assert (out / "README.md").read_text() == "mine"


def test_a_card_may_be_edited(k2_source: Path, tmp_path: Path) -> None:
    """An edited card makes a finished folder no less whole, and is nobody's to overwrite."""
    out = k2quant.convert(k2_source, tmp_path / "out", "int4").folder
    card = out / "README.md"
    written = card.read_bytes()
    card.write_bytes(written.replace(b"# Kimi", b"# My Kimi"))
    assert k2quant.convert(k2_source, out, "int4").already_done
    assert CliRunner().invoke(main, ["verify", "--checksums", str(out)]).exit_code == 0
    k2quant.convert(k2_source, out, "int4", restart=True)
    assert card.read_bytes() != written
    card.write_bytes(written)
    k2quant.convert(k2_source, out, "bf16", restart=True)
    assert head_of(card)["tags"] == ["k2quant"]
    card.unlink()
    assert k2quant.convert(k2_source, out, "bf16").already_done


def test_cards_of_a_chain_all_stay(source: Path, tmp_path: Path) -> None:
    """What is converted twice has the card of the release, that of the first output, and its own."""
    middle = k2quant.convert(source, tmp_path / "middle", "bf16").folder
    out = k2quant.convert(middle, tmp_path / "out", "int4").folder
    assert (out / "README.source.md").read_text() == SOURCE_CARD
    assert (out / "README.source-2.md").read_bytes() == (middle / "README.md").read_bytes()
    assert head_of(out / "README.md")["base_model"] == "moonshotai/Kimi-K2-Instruct"
    assert (
        "[README.source-2.md](README.source-2.md), [README.source.md](README.source.md)"
        in (out / "README.md").read_text()
    )


HOSTILE = """---
license: "mit\\n---\\nmalicious: true"
license_link: "javascript:alert(1)"
license_name: [a, b]
language: {a: b}
tags: ["ok", "a: b\\n- c", 5, null, "<script>"]
base_model: "../../etc"
pipeline_tag: !!python/object:os.system x
---
"""


@pytest.mark.parametrize(
    "head", [HOSTILE.replace("!!python/object:os.system x", "no"), HOSTILE, "---\n- a\n---\n", "--"]
)
def test_a_hostile_card_tells_hubs_nothing_of_its_own(head: str, k2_source: Path, tmp_path: Path) -> None:
    """What is no licence, link, tag or id is not taken over; the file itself goes along as it is."""
    folder = tmp_path / "x`](javascript:0)<b>"
    shutil.copytree(k2_source, folder)
    (folder / "README.md").write_text(head)
    out = k2quant.convert(folder, tmp_path / "out", "int4").folder
    told = head_of(out / "README.md")
    assert told.keys() - {"pipeline_tag"} == {"library_name", "tags"}
    assert set(told["tags"]) <= {"ok", "k2quant", "int4", "compressed-tensors"}
    assert (out / "README.source.md").read_text() == head
    title = next(line for line in (out / "README.md").read_text().splitlines() if line.startswith("# "))
    assert "<b>" not in title
    assert "](javascript" not in title


@settings(max_examples=30)
@given(st.dictionaries(st.sampled_from(["license", "tags"]), st.text(max_size=40) | st.lists(st.text(max_size=20))))
def test_the_head_is_yaml_whatever_it_says(told: dict[str, Any]) -> None:
    """A value cannot end the head, or become a key: it is read back as it was."""
    text = front(told)
    assert text.startswith("---\n")
    assert text.endswith("---\n")
    assert yaml.safe_load(text[4:-4]) == told
    assert "\n---" not in text[4:-5]


@settings(max_examples=50)
@given(st.text(), st.integers(0), st.integers(1, 255))
def test_an_edited_card_is_nobodys_but_its_editors(text: str, place: int, change: int) -> None:
    """A card as it was written is ours; with any byte changed, cut or added it is not."""
    data = sealed(text.encode("utf-8", "replace").decode())
    assert is_ours(data)
    at = place % len(data)
    assert not is_ours(data[:at] + bytes([data[at] ^ change]) + data[at + 1 :])
    assert not is_ours(data[:at] + data[at + 1 :])
    assert not is_ours(data + b"\n")


def test_no_two_files_go_to_one_place() -> None:
    """The source's card goes where none of its files stands."""
    assert placed(["README.md", "a"]) == {"README.md": "README.source.md", "a": "a"}
    names = ["README.md", "README.source.md", "README.source-2.md"]
    assert placed(names)["README.md"] == "README.source-3.md"


def test_a_place_on_the_hub_is_read_from_its_cache_alone(tmp_path: Path) -> None:
    """Other folders have none, whatever they are called."""
    cache = tmp_path / "models--org--na--me" / "snapshots" / "main"
    found = home_of(cache)
    assert found is not None
    assert (found.name, found.commit) == ("org/na--me", None)
    assert home_of(tmp_path / "models--org--name" / "other" / "main") is None
    assert home_of(tmp_path) is None
