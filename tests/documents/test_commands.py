"""The commands of pages on accuracy, calibration, GPTQ, budgets, reasoning, tools and training run, on small things."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from k2quant.cli import main
from pages import blocks, commands
from places import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

PAGES = ("accuracy", "budget", "calibration", "fp4", "gptq", "qat", "thinking", "tools")

SHORTER: Mapping[str, str] = {
    "--tasks k2-quick": "--tasks gsm8k --data gsm8k=data",  # sixteen questions, and no hub
    "--tasks gsm8k": "--tasks gsm8k --data gsm8k=data",
    "-o runs/tools-": "--limit 12 -o runs/tools-",  # of the requests that ship
    "--samples 512 --length 2048": "--samples 8 --length 64",
    "chats.jsonl --dry-run": "chats.jsonl --length 64 --dry-run",
    "https://k2.example/v1": "SERVER",  # on a free port here
    "http://localhost:8000/v1": "SERVER",
}
"""What is changed in a command before it runs here; nothing else is."""

JOB: Mapping[str, str] = {
    "steps: 300": "steps: 2",
    "batch: 16": "batch: 2",
    "length: 256": "length: 64",
    "warmup: 15": "warmup: 1",
}
"""What is changed in the job that `qat init` writes, so that it takes seconds."""

NOT_RUN: Mapping[str, str] = {
    "--backend vllm": "vLLM needs a GPU; tests/eval/asking/test_engines.py has a stand-in for it",
    "accelerate launch": "a process for each GPU; tests/qat/training/test_processes.py starts several on the CPU",
    "torchrun": "tests/qat/training/test_processes.py starts it",
}
"""Commands with one of these in them do not run here, and why."""

EXITS = {"gate": {0, 3, 4}}
"""How a command may end, by its name; others end with 0."""


def written(page: str) -> list[str]:
    """Return the commands of a page's shell blocks, in its order."""
    shells = [block.shell() for block in blocks(ROOT / "docs" / f"{page}.md") if block.language in {"sh", "console"}]
    return [shlex.join(words) for shell in shells for words in commands(shell)]


def shortened(command: str, server: str) -> str:
    """Return a command as it runs here."""
    places = "|".join(map(re.escape, SHORTER))
    return re.sub(places, lambda found: SHORTER[found[0]], command).replace("SERVER", server)


def shorten_job(path: Path) -> None:
    """Make a job of two steps of one that `qat init` wrote."""
    text = path.read_text()
    for old, new in JOB.items():
        assert old in text, f"`qat init` no longer writes {old!r}"
        text = text.replace(old, new)
    path.write_text(text)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_as_written(
    named: Path, server: str, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, in one folder with what they name: each ends with 0, or with what the gate says."""
    folder = tmp_path / "clone"
    shutil.copytree(named, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MY_KEY", "secret")
    for command in written(page):
        if any(mark in command for mark in NOT_RUN):
            continue
        program, *words = shlex.split(shortened(command, server))
        assert program == "k2quant", f"docs/{page}.md: nobody runs {command!r}"
        if words[0] == "convert":  # several ways to the same folder are each shown from the start
            shutil.rmtree(words[-1], ignore_errors=True)
        done = CliRunner().invoke(main, words)
        assert done.exit_code in EXITS.get(words[1], {0}), f"{command}\n{done.output}\n{done.exception!r}"
        if words[:2] == ["qat", "init"]:
            shorten_job(Path(words[-1]))


def test_nothing_in_the_tables_is_stale() -> None:
    """Each change, and each reason not to run, belongs to a command that still stands on a page."""
    every = [command for page in PAGES for command in written(page)]
    assert [mark for mark in (*SHORTER, *NOT_RUN) if not any(mark in command for command in every)] == []
