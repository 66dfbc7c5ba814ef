"""Every block of code in the documents is what it says: it parses, and what it names is there."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import json
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from k2quant.cli import main
from k2quant.conversion.recipes.rules import parse_recipe
from k2quant.eval.gating.policy import read_policy
from k2quant.qat.job import job_from
from pages import PAGES, Block, blocks, commands
from places import ROOT

SHELL = ("sh", "console")
LANGUAGES = {*SHELL, "python", "yaml", "json", "text"}
"""What a block may be. `console` is a session with prompts and output, `text` is output or a drawing."""

ALL = [block for page in PAGES for block in blocks(page)]


def of(*languages: str) -> list[Any]:
    """Return the blocks of these languages as parameters of a test."""
    return [pytest.param(block, id=block.place) for block in ALL if block.language in languages]


def test_every_block_says_its_language() -> None:
    """A block without a language, or with another, is checked by nothing."""
    assert [f"{block.place}: {block.language!r}" for block in ALL if block.language not in LANGUAGES] == []


# --- the shell ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def anything_may_be_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take paths as they come: a checkpoint of a document is on no disk."""

    def convert(self: click.Path, value: Any, *_: Any) -> Any:
        return self.coerce_path_result(value)

    monkeypatch.setattr(click.Path, "convert", convert)


ELSEWHERE = {"sglang.launch_server"}
"""Modules of engines, which the page on serving starts and no extra brings."""


def check_k2quant(words: list[str]) -> None:
    """Have click parse a command: its name, options, their values and the number of arguments.

    Raises:
        click.ClickException: it would be wrong usage.
    """
    if not words:
        return  # the list of commands
    command: click.Command = main
    context = click.Context(main, info_name="k2quant")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, found, words = command.resolve_command(context, words)
        assert found is not None
        context = click.Context(found, info_name=name, parent=context)
        command = found
    if isinstance(command, click.Group) and not words:
        msg = f"{context.command_path}: a command is missing"
        raise click.UsageError(msg)
    with contextlib.suppress(click.exceptions.Exit):  # --help and --version end there
        command.make_context(context.info_name, words, parent=context.parent)


def check_make(words: list[str]) -> None:
    """The Makefile has these targets."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in words if "=" not in word} <= targets


def check_python(words: list[str]) -> None:
    """The script is in the repository, or the module in the package."""
    if words[0] == "-m":
        assert words[1] in {"venv", "pip", *ELSEWHERE} or importlib.util.find_spec(words[1])
        if words[1] == "k2quant":
            check_k2quant(words[2:])
    elif words[0] == "-c":
        ast.parse(words[1])
    else:
        assert (ROOT / words[0]).is_file(), words[0]


def check_pip(words: list[str]) -> None:
    """Extras are those of pyproject.toml."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        for named in re.findall(r"^(?:\.|k2quant)\[(.*)\]", word):
            assert set(named.split(",")) <= set(extras), word


def check_accelerate(words: list[str]) -> None:
    """What is launched is a module of the package."""
    assert importlib.util.find_spec(words[words.index("-m") + 1])


CHECKS: Mapping[str, Callable[[list[str]], None]] = {
    "k2quant": check_k2quant,
    "make": check_make,
    "python": check_python,
    "python3": check_python,
    "pip": check_pip,
    "accelerate": check_accelerate,
}


@pytest.mark.parametrize("block", of(*SHELL))
def test_shell_parses_and_its_commands_are_there(block: Block) -> None:
    """Bash takes the block, and each command of ours has that name, those options and that many arguments."""
    shell = block.shell()
    done = subprocess.run(["/bin/bash", "-n"], input=shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{block.place}: {done.stderr}"
    for words in commands(shell):
        if words[0] in CHECKS:
            try:
                CHECKS[words[0]](words[1:])
            except click.ClickException as error:
                pytest.fail(f"{block.place}: {' '.join(words)}\n{error.format_message()}")


@pytest.mark.parametrize(
    "wrong",
    [
        "k2quant convrt --to int4 a b",
        "k2quant convert --too int4 a b",
        "k2quant convert --to int5 a b",
        "k2quant convert --to int4 a",
        "k2quant eval",
        "k2quant eval gate a --margin 1pp",
        "X=1 k2quant diff a | less > b",
    ],
)
def test_wrong_commands_are_found(wrong: str) -> None:
    """A name, option, value or number of arguments that a command does not have is wrong usage."""
    (words, *_) = commands(wrong)
    with pytest.raises(click.ClickException):
        check_k2quant(words[1:])


# --- Python ---------------------------------------------------------------------------------------------------------


def resolved(name: str) -> Any:
    """Return what a dotted name of the package stands for.

    Raises:
        AttributeError, ImportError: nothing has it.
    """
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:number]))
        found = getattr(found, part)
    return found


def there(name: str) -> bool:
    """Whether the package has what a dotted name spells."""
    try:
        resolved(name)
    except (AttributeError, ImportError):
        return False
    return True


def ours(tree: ast.Module) -> dict[str, str]:
    """Return the names that code imports from the package, and what each stands for."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [item for item in node.names if item.name.split(".")[0] == "k2quant"]
            found |= {item.asname: item.name for item in names if item.asname}
            if any(not item.asname for item in names):
                found["k2quant"] = "k2quant"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "k2quant":
            found |= {item.asname or item.name: f"{node.module}.{item.name}" for item in node.names}
    return found


def dotted(node: ast.expr, known: Mapping[str, str]) -> str | None:
    """Return the full name that an expression spells, if it begins with one of ours."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        home = dotted(node.value, known)
        return home and f"{home}.{node.attr}"
    return None


def wrong_keywords(called: Any, node: ast.Call) -> Iterator[str]:
    """Yield the keywords of a call that the function does not take."""
    parameters = inspect.signature(called).parameters.values()
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        names = {each.name for each in parameters}
        yield from (keyword.arg for keyword in node.keywords if keyword.arg and keyword.arg not in names)


def faults(text: str) -> list[str]:
    """Return what is wrong with code: names that the package does not have, keywords that its functions do not take."""
    tree = ast.parse(text)
    known = ours(tree) or {"k2quant": "k2quant"}  # a later block of a page goes on with an earlier one's import
    found = []
    for node in ast.walk(tree):
        name = dotted(node, known) if isinstance(node, ast.Attribute | ast.Name) else None
        if name is not None and not there(name):
            found.append(name)
        called = dotted(node.func, known) if isinstance(node, ast.Call) else None
        if isinstance(node, ast.Call) and called and there(called):
            found += [f"{called}({keyword}=)" for keyword in wrong_keywords(resolved(called), node)]
    return found


@pytest.mark.parametrize("block", of("python"))
def test_python_names_what_is_there(block: Block) -> None:
    """A block compiles, and what it takes from the package is there with those arguments."""
    assert faults(block.text) == [], block.place


def test_wrong_names_are_found() -> None:
    """A function that is not there, a module that is not there, and an argument that a function does not take."""
    assert faults('import k2quant\nk2quant.convrt("a", "b")') == ["k2quant.convrt"]
    assert faults("from k2quant.eval import gates as g\ng(1)") == ["k2quant.eval.gates"]
    assert faults('import k2quant\nk2quant.convert("a", "b", too="int4")') == ["k2quant.convert(too=)"]
    assert faults('import k2quant\nk2quant.convert("a", "b", to="int4")') == []


# --- data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", of("yaml"))
def test_yaml_is_taken_by_what_reads_it(block: Block, tmp_path: Path) -> None:
    """A whole job, recipe or policy of a document passes its reader; pieces of one load."""
    content = yaml.safe_load(block.text)
    keys = set(content) if isinstance(content, dict) else set()
    if {"model", "output"} <= keys:
        job_from(content)
    elif "rules" in keys:
        parse_recipe(block.text.encode(), file=block.place)
    elif "margin" in keys:
        path = tmp_path / "gate.yaml"
        path.write_text(block.text)
        read_policy(path)
    assert content


@pytest.mark.parametrize("block", of("json"))
def test_json_loads(block: Block) -> None:
    """It is JSON, or a piece of an object."""
    text = block.text.strip()
    assert json.loads(text if text[0] in "[{" else f"{{{text.rstrip(',')}}}")


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    """A link to a file or folder beside the page is not broken; `make site` checks the headings they name too."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)#\s]+)", text)
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
