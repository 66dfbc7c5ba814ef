"""What the site is made of: every page is in it, every public name has its place, and shells complete what it lists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from k2quant.cli import main
from places import ROOT


def navigation() -> set[str]:
    """Return the pages that the navigation names."""

    def leaves(item: Any) -> set[str]:
        if isinstance(item, str):
            return {item}
        return set().union(*map(leaves, item.values() if isinstance(item, dict) else item))

    return leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])


def test_every_page_of_docs_is_in_the_navigation() -> None:
    """A new page is found by readers, and a page that went is not promised."""
    pages = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")}
    named = navigation()
    assert pages <= named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_rules_keep_their_numbers() -> None:
    """A list that goes on behind a table or a heading begins on the site with the number that stands in the file."""
    begun = re.compile(r"^\n(\d+)\. |^#.*\n(\d+)\. ", re.MULTILINE)
    numbers = {int(one or other) for name in navigation() for one, other in begun.findall((ROOT / name).read_text())}
    assert numbers > {1}
    assert "sane_lists" in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["markdown_extensions"]


@pytest.mark.parametrize(
    ("page", "module"),
    [
        ("k2quant", "k2quant"),
        ("calib", "k2quant.calib"),
        ("qat", "k2quant.qat"),
        ("eval", "k2quant.eval"),
        ("ops", "k2quant.kernels.ops"),
    ],
)
def test_every_public_name_has_its_entry(page: str, module: str) -> None:
    """The reference of a module has an entry for each of its public names, and no other."""
    entries = re.findall(r"^::: (?:\w+\.)*(\w+)$", Path(ROOT, "docs", "api", f"{page}.md").read_text(), re.MULTILINE)
    public = set(importlib.import_module(module).__all__) - {"__version__"}
    assert sorted(entries) == sorted(public)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_a_script_that_asks_k2quant(shell: str) -> None:
    """The line of docs/cli.md writes a script that asks the command for what can stand next."""
    variable = "_K2QUANT_COMPLETE"
    assert f"{variable}={shell}_source k2quant" in (ROOT / "docs" / "cli.md").read_text()
    done = CliRunner(env={variable: f"{shell}_source"}).invoke(main, prog_name="k2quant")
    assert done.exit_code == 0, done.output
    assert f"{variable}={shell}_complete" in done.output
    assert "k2quant" in done.output


@pytest.mark.parametrize(
    ("line", "listed"),
    [
        ("k2quant con", ["convert"]),
        ("k2quant qat ", ["plan", "train", "export"]),
        ("k2quant convert --to ", ["bf16", "fp8", "int4"]),
        ("k2quant convert --allow", ["--allow-split"]),
    ],
)
def test_a_shell_is_told_what_can_stand_next(line: str, listed: list[str]) -> None:
    """Commands, those of a group, an option's values, and options."""
    environment = {
        "_K2QUANT_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
    }
    done = CliRunner(env=environment).invoke(main, prog_name="k2quant")
    words = [answer.split(",")[1] for answer in done.output.splitlines()]
    assert set(listed) <= set(words)
