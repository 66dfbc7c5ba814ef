"""What each of several processes says."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from k2quant.errors import CheckpointWarning
from k2quant.qat.launch import main
from k2quant.qat.training import training
from tiny import job_content


@pytest.mark.parametrize(("rank", "said"), [("0", ["K2: scales that nobody uses\\x1b[2J", "{}: trained"]), ("1", [])])
def test_warnings_of_a_checkpoint_are_lines_of_the_first_process(
    rank: str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They come once, as sentences, without the line of code that says them; nothing in them reaches the terminal."""

    def train(*_: Any, **__: Any) -> None:
        warnings.warn("K2: scales that nobody uses\x1b[2J", CheckpointWarning, stacklevel=1)

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setenv("RANK", rank)
    before = warnings.showwarning
    (tmp_path / "job.yaml").write_text(str(job_content(tmp_path)))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main([str(tmp_path / "job.yaml")]) == 0
    assert warnings.showwarning is before
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(";")[0] for line in lines] == [line.format(tmp_path / "run") for line in said]
