"""Results that commands give back where the file for them cannot be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import click
import pytest

from k2quant.cli.parts.results import give


@pytest.mark.parametrize(("as_json", "shown"), [(True, '{\n "a": 1\n}\n'), (False, "a is 1\n")])
def test_a_full_disk_loses_the_file_and_not_the_result(
    as_json: bool,  # noqa: FBT001  a parameter of the test
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What took hours to measure is printed before the error, which names the file; nothing looks finished."""

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    output = tmp_path / "found.json"
    with pytest.raises(OSError, match="No space left") as caught:
        give({"a": 1}, lambda: click.echo("a is 1"), as_json=as_json, output=output)
    assert (caught.value.filename, output.exists()) == (str(output), False)
    assert capsys.readouterr().out == shown
