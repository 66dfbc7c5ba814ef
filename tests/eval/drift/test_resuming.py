"""A search for blame that was stopped: it goes on to the same numbers, and with nobody else's."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from k2quant.checkpoint.files.locks import locked_file
from k2quant.cli import main
from k2quant.conversion.convert import convert
from k2quant.errors import DestinationForeign, DestinationInUse, DestinationStale
from k2quant.eval import discard_passes, find_blame
from k2quant.eval.drift.findings import Blame
from k2quant.eval.runs.folder import JOURNAL, LOCK
from k2quant.eval.runs.journal import Journal
from k2quant.model import stream_forward
from k2quant.nano import vocabulary

PASSES = 12
OPTIONS: dict[str, Any] = {"context": 17, "tokens": 272, "passes": PASSES}


@pytest.fixture(scope="module")
def int4(base: Path) -> Path:
    """The same, every projection in INT4."""
    return convert(base, base.parent / "int4", to="int4", scope="projections").folder


@pytest.fixture(scope="module")
def text(base: Path) -> Path:
    """Random characters, seventeen chunks of them."""
    path = base.parent / "text.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list(vocabulary.CHARACTERS[:-1]), 17 * 16)))
    return path


@pytest.fixture(scope="module")
def kept(base: Path) -> Path:
    """The folder of a search that came to its end."""
    return base.parent / "kept"


@pytest.fixture(scope="module")
def whole(base: Path, int4: Path, text: Path, kept: Path) -> Blame:
    """What that search found."""
    return find_blame(base, int4, text=text, resume=kept, **OPTIONS)


class Passes:
    """Counts the passes that are run, and may end one as a kill does: before anything of it is kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int = 0) -> None:
        self.count, self._stop = 0, stop
        run = stream_forward

        def counted(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self._stop:
                raise KeyboardInterrupt
            return run(*arguments, **options)

        monkeypatch.setattr("k2quant.eval.drift.measuring.stream_forward", counted)


def copied(kept: Path, target: Path, lines: int | None = None) -> Path:
    """Return a copy of a search's folder that was stopped after so many measurements."""
    target.mkdir()
    for path in kept.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    journal = target / JOURNAL
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:lines]))
    return target


@pytest.mark.parametrize("done", [0, 1, 6, PASSES - 3])
def test_stopped_after_any_pass_it_ends_with_the_same_numbers(
    done: int,
    base: Path,
    int4: Path,
    text: Path,
    whole: Blame,
    kept: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, from what was measured; the baseline runs again, and what is known does not."""
    resume = copied(kept, tmp_path / "stopped", done)
    passes = Passes(monkeypatch)
    steps: list[int] = []
    found = find_blame(base, int4, text=text, resume=resume, progress=lambda step, _: steps.append(step), **OPTIONS)
    assert found == whole
    assert json.dumps(found.as_dict()) == json.dumps(whole.as_dict())
    assert passes.count == whole.passes - done
    assert steps == list(range(1, whole.passes + 1))


def test_a_finished_search_runs_nothing(
    base: Path, int4: Path, text: Path, whole: Blame, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the baseline; and what was kept is what a search without a folder finds."""
    passes = Passes(monkeypatch)
    assert find_blame(base, int4, text=text, resume=kept, **OPTIONS) == whole
    assert passes.count == 0
    assert find_blame(base, int4, text=text, **OPTIONS) == whole
    assert passes.count == whole.passes


def test_more_passes_go_on(base: Path, int4: Path, text: Path, whole: Blame, kept: Path, tmp_path: Path) -> None:
    """What the shorter search measured is not measured again, and the numbers are those of a longer one."""
    resume = copied(kept, tmp_path / "longer")
    options = OPTIONS | {"passes": PASSES + 1}
    longer = find_blame(base, int4, text=text, resume=resume, **options)
    assert longer == find_blame(base, int4, text=text, **options)
    assert longer.passes > whole.passes


def test_killed_it_resumes(base: Path, int4: Path, text: Path, whole: Blame, tmp_path: Path) -> None:
    """SIGKILL in the middle of a process: the same command ends, writes the same bytes and tidies up."""
    output = tmp_path / "blame.json"
    options = ["--text", str(text), "--context", "17", "--tokens", "272", "--passes", str(PASSES)]
    command = ["eval", "blame", str(base), str(int4), *options, "-o", str(output)]
    script = (
        "import os, signal, sys\n"
        "from k2quant.eval.runs import journal\n"
        "add = journal.Journal.add\n"
        "def killed(self, *rest):\n"
        "    add(self, *rest)\n"
        "    if len(self) == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "journal.Journal.add = killed\n"
        "from k2quant.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not output.exists()
    folder = tmp_path / "blame.json.passes"
    assert len(Journal(folder / JOURNAL)) == 3
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    assert "blame.json.passes: resumes after 3 measurements" in shown.stderr
    assert json.loads(output.read_text()) == json.loads(json.dumps(whole.as_dict()))
    assert list(tmp_path.iterdir()) == [output]


def test_an_interrupted_command_says_how_to_go_on(
    base: Path, int4: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a file for the result the same command resumes; without one nothing is kept, and what would be is said."""
    Passes(monkeypatch, stop=1)
    command = ["eval", "blame", str(base), str(int4), "--text", str(text), "--context", "17", "--tokens", "272"]
    stopped = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "out.json")])
    assert "out.json.passes: the same command resumes" in stopped.stderr
    assert (tmp_path / "out.json.passes").is_dir()
    Passes(monkeypatch, stop=1)
    assert "nothing is kept; with -o FILE" in CliRunner().invoke(main, command).stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("candidate", "base"),
        ("text", None),
        ("context", 16),
        ("dtype", "bfloat16"),
        ("backend", "reference"),
    ],
)
def test_measurements_of_something_else_are_refused(
    name: str, value: object, base: Path, int4: Path, text: Path, whole: Blame, kept: Path
) -> None:
    """By the name of what differs, and what is kept is left as it was."""
    del whole
    before = (kept / JOURNAL).read_bytes()
    given = OPTIONS | {"base": base, "candidate": int4, "text": text} | {name: value}
    if name == "candidate":
        given |= {"base": int4, "candidate": base}
    with pytest.raises(DestinationStale, match=rf"other .*{name}"):
        find_blame(**given, resume=kept)
    assert (kept / JOURNAL).read_bytes() == before


def test_a_folder_in_use_or_of_others_is_refused(base: Path, int4: Path, text: Path, whole: Blame, kept: Path) -> None:
    """Two searches keep out of one folder, and nothing of anybody's is touched."""
    del whole
    with locked_file(kept / LOCK), pytest.raises(DestinationInUse):
        find_blame(base, int4, text=text, resume=kept, **OPTIONS)
    foreign = base.parent / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    with pytest.raises(DestinationForeign):
        find_blame(base, int4, text=text, resume=foreign, **OPTIONS)
    with pytest.raises(DestinationForeign):
        discard_passes(foreign)
    assert (foreign / "mine.txt").read_text() == "mine"


def damaged(line: bytes, content: object) -> bytes:
    """Return a journal's line with another content, whole by its checksum."""
    body = json.dumps(json.loads(line[9:]) | {"answers": content}).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


@pytest.mark.parametrize("content", [[1.0] * 16, [None] * 17, [True] * 17, [[1.0]] * 17])
def test_what_is_no_measurement_is_measured_again(
    content: list[Any], base: Path, int4: Path, text: Path, whole: Blame, kept: Path, tmp_path: Path
) -> None:
    """A line that another tool wrote changes nothing."""
    resume = copied(kept, tmp_path / "damaged")
    first, *rest = (resume / JOURNAL).read_bytes().splitlines(keepends=True)
    (resume / JOURNAL).write_bytes(damaged(first, content) + b"".join(rest))
    assert find_blame(base, int4, text=text, resume=resume, **OPTIONS) == whole


def test_a_torn_end_is_cut_off(base: Path, int4: Path, text: Path, whole: Blame, kept: Path, tmp_path: Path) -> None:
    """Half a line, as a power cut leaves it, was never measured for certain."""
    resume = copied(kept, tmp_path / "torn", PASSES - 2)
    journal = resume / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-20])
    assert find_blame(base, int4, text=text, resume=resume, **OPTIONS) == whole


def test_a_full_disk_names_the_folder(
    base: Path, int4: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was measured before stays."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("k2quant.eval.runs.journal.os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        find_blame(base, int4, text=text, resume=tmp_path / "full", **OPTIONS)
    assert Path(caught.value.filename).is_relative_to(tmp_path / "full")
    assert (tmp_path / "full").is_dir()


def test_equal_models_keep_nothing(base: Path, text: Path, tmp_path: Path) -> None:
    """Where there is nothing to measure, no folder is made, and none is missed."""
    found = find_blame(base, base, text=text, resume=tmp_path / "none", **OPTIONS)
    assert found.changed == 0
    discard_passes(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_settings_by_other_names_are_the_same(
    base: Path, int4: Path, text: Path, whole: Blame, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's own dtype and device are what their names are."""
    passes = Passes(monkeypatch)
    options = OPTIONS | {"dtype": "float32", "device": torch.device("cpu")}
    assert find_blame(base, int4, text=text, resume=kept, **options) == whole
    assert passes.count == 0
