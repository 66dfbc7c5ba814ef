"""Shards that another process writes by an order are those that one process writes alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import k2quant
from k2quant.checkpoint.reader import INCOMPLETE, REPORT
from k2quant.checkpoint.writing.destination import locked
from k2quant.conversion.plan import Options
from k2quant.conversion.resume import begin
from k2quant.conversion.searching.asked import planned
from k2quant.conversion.spreading.order import Order, made, order, order_from
from k2quant.conversion.spreading.writing import write_shards
from k2quant.errors import CheckpointError, DestinationStale, UsageError

OPTIONS = Options(to="nvfp4")
"""With scales that gate and up share, whichever shards they lie in."""


def ordered(source: Path, there: Path, **more: Any) -> Order:
    """Return the order of a conversion of `OPTIONS`."""
    return order(planned(source, OPTIONS)[0], source, there, **more)


def begun(source: Path, there: Path) -> list[str]:
    """Begin a conversion for several processes; return the files of its shards."""
    plan, _ = planned(source, OPTIONS)
    with locked(there, report=REPORT, incomplete=INCOMPLETE) as folder:
        begin(folder, plan, fresh=False)
        folder.spread()
    return [shard.file for shard in plan.shards]


def files(folder: Path) -> dict[str, bytes]:
    """Return every file of an output but its report."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {str(name): path.read_bytes() for name, path in found.items() if path.name != REPORT}


def test_ordered_shards_are_those_of_one_process(k2_source: Path, tmp_path: Path) -> None:
    """An order goes through JSON; what is written by it is noted, and a whole run completes it with equal bytes."""
    k2quant.convert(k2_source, tmp_path / "whole", "nvfp4", sha256=True)
    there = tmp_path / "there"
    first, second, _ = begun(k2_source, there)
    asked = order_from(json.loads(json.dumps(ordered(k2_source, there, sha256=True).as_json())))
    heard: list[tuple[int, int]] = []
    (record,) = write_shards(asked, [second], attempt="a", progress=lambda *done: heard.append(done))
    assert record["shard"] == second
    assert "sha256" in record
    assert heard[-1][0] == heard[-1][1] < planned(k2_source, OPTIONS)[0].bytes_read
    assert [each["shard"] for each in write_shards(asked, [second, first], attempt="b", workers=1)] == [first, second]
    assert not list(there.glob("*.partial"))
    done = k2quant.convert(k2_source, there, "nvfp4", sha256=True)
    assert done.resumed == 2
    assert files(there) == files(tmp_path / "whole")


def test_an_order_of_another_source_is_refused(k2_source: Path, tmp_path: Path) -> None:
    """A process that sees a source of other times, or is of another release, writes nothing."""
    source, there = tmp_path / "source", tmp_path / "there"
    shutil.copytree(k2_source, source)
    asked = ordered(source, there)
    assert made(asked)[0].options == OPTIONS
    os.utime(next(source.glob("*.safetensors")))
    with pytest.raises(CheckpointError, match=r"sees another source.*found other source"):
        made(asked)
    content = asked.as_json()
    content["digests"]["version"] = "0"
    with pytest.raises(UsageError, match="another release ordered"):
        made(order_from(content))
    with pytest.raises(UsageError, match="not an order of k2quant"):
        order_from({"source": "/"})
    with pytest.raises(UsageError, match="no shard of this plan"):
        write_shards(ordered(source, there), ["other.safetensors"], attempt="a")
    assert not there.exists()


def test_a_late_process_changes_nothing_that_is_finished(k2_source: Path, tmp_path: Path) -> None:
    """A shard that is written once more when all is finished has the same bytes; its writer hears that it is late."""
    there = tmp_path / "there"
    first, *_ = begun(k2_source, there)
    asked = ordered(k2_source, there)
    k2quant.convert(k2_source, there, "nvfp4")
    before = files(there)
    with pytest.raises(DestinationStale, match="finished or emptied by another k2quant"):
        write_shards(asked, [first], attempt="late")
    assert files(there) == before
