"""What mkdocs calls while it builds the site: the repository's own pages as they are, and every command's help.

The site has the folders of the repository, so a link that works beside the files works on the site. What a page links
to comes along: other pages as pages, anything else as a copy.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from k2quant.cli import main

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "build" / "source"
"""Where mkdocs.yml has the docstrings read."""
COMMANDS = "<!-- commands -->"
"""Where docs/cli.md wants the help of every command."""
WIDTH = 78
"""Columns of a page of help."""
_FENCED = re.compile(r"^ *```.*?^ *```[^\n]*$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
_LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//|<link\b[^>]*\bhref=[\"']?(?:https?:)?//"
)


def on_startup(**_: Any) -> None:
    """Lay out the package for the reader of docstrings: links followed, and an `__init__.py` in each folder."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(ROOT / "k2quant", SOURCE / "k2quant", ignore=shutil.ignore_patterns("__pycache__"))
    for module in list(SOURCE.rglob("k2quant/**/*.py")):
        (module.parent / "__init__.py").touch()


def on_files(files: Files, config: Any) -> Files:
    """Replace mkdocs' own list, which ends at docs/: pages of the navigation, and what can be reached from them."""
    found = Files([file for file in files if file.src_uri.startswith("assets/")])
    tracked = _tracked()
    waiting = [*_leaves(config.nav), *config.extra_css]
    seen = set(waiting)
    while waiting:
        name = waiting.pop()
        if not (ROOT / name).is_file():
            continue  # mkdocs says so itself, with the page that names it
        found.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
        if name.endswith(".md"):
            linked = {target for target in _targets(name) if target in tracked} - seen
            seen |= linked
            waiting += sorted(linked)
    return found


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to a folder at its README, and write the help of the commands where docs/cli.md has a mark for it."""
    home = Path(page.file.src_uri).parent
    text = _LINK.sub(lambda link: _to_readme(link, home), markdown)
    return text.replace(COMMANDS, "\n".join(_help(main, "k2quant"))) if COMMANDS in text else text


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would load something from another server.

    Raises:
        PluginError: it would.
    """
    found = _LOADED.search(output)
    if found:
        msg = f"{page.file.src_uri} loads from another server: {output[found.start() : found.end() + 60]}"
        raise PluginError(msg)
    return output


def _tracked() -> set[str]:
    """Return the files of the repository that git knows, or is about to know."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines())


def _leaves(nav: Any) -> Iterator[str]:
    """Yield the pages that the navigation names."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from _leaves(item)


def _targets(name: str) -> Iterator[str]:
    """Yield the files that a page links to, by their names in the repository."""
    home = (ROOT / name).parent
    for link in _LINK.finditer(_FENCED.sub("", (ROOT / name).read_text())):
        path = (home / link[1]).resolve()
        path = path / "README.md" if path.is_dir() else path
        if path.is_relative_to(ROOT):
            yield path.relative_to(ROOT).as_posix()


def _to_readme(link: re.Match[str], home: Path) -> str:
    """Return the link, or one to the README of the folder that it names."""
    if (ROOT / home / link[1] / "README.md").is_file():
        return f"]({link[1].rstrip('/')}/README.md{link[2] or ''})"
    return link[0]


def _help(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[str]:
    """Yield a heading and the help of a command, then of those below it."""
    context = click.Context(command, info_name=name.rsplit(maxsplit=1)[-1], parent=parent, terminal_width=WIDTH)
    yield f"{'##' if name.count(' ') < 2 else '###'} {name}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            if found is not None and not found.hidden:
                yield from _help(found, f"{name} {below}", context)
