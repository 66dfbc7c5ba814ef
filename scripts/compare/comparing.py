"""Hold what two runs left side by side, byte for byte."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from compare.normalising import normal_name, normalised
from compare.running import Record, Side

_SHOWN = 160  # characters of a line
_BINARY = (".safetensors", ".bin")
_BROKEN = b"Traceback (most recent call last)"


@dataclass(slots=True)
class Outcome:
    """What came of one group."""

    group: str
    commands: int = 0
    failing: int = 0
    """Commands that do not end with 0."""
    files: int = 0
    nbytes: int = 0
    """Of the old files, and of what was said."""
    normalised: int = 0
    """Files that were equal only after `normalising`."""
    differences: list[str] = field(default_factory=list)

    def text(self, most: int | None) -> str:
        """Return a line, and one more for each difference, up to so many; None for all."""
        head = (
            f"{self.group:<8} {self.commands:>4} commands, {self.failing:>2} not with 0, {self.files:>5} files "
            f"{self.nbytes / 1e6:>8.1f} MB"
        )
        if not self.differences:
            return f"{head}  equal ({self.normalised} but for times and places)"
        lines = [f"{head}  {len(self.differences)} DIFFER", *(f"  {each}" for each in self.differences[:most])]
        if more := self.differences[most:] if most is not None else []:
            lines.append(f"  ... and {len(more)} more; --all shows them")
        return "\n".join(lines)


def compare(old: Side, new: Side, group: str) -> Outcome:
    """Compare what the commands of a group wrote and said."""
    outcome, records = Outcome(group), (old.record(), new.record())
    before, after = dict(_paths(old, group)), dict(_paths(new, group))
    for name in sorted(before.keys() | after.keys()):
        outcome.commands += name.endswith(".exit")
        outcome.files += name.startswith("files/") and not name.endswith("/")
        if name in before and name in after:
            _compare_contents(name, _content(before[name]), _content(after[name]), records, outcome)
        else:
            outcome.differences.append(f"{name}: only {'old' if name in before else 'new'} has it")
    return outcome


def _compare_contents(name: str, old: bytes, new: bytes, records: tuple[Record, Record], outcome: Outcome) -> None:
    outcome.nbytes += len(old)
    outcome.failing += name.endswith(".exit") and old != b"0\n"
    if name.endswith(".unprepared") or (name.endswith(".stderr") and _BROKEN in old):
        # that it is equal on both sides proves nothing: OLD is broken, or a command is
        outcome.differences.append(f"{name}: {_line(old.splitlines()[-1], None)}")
    if old == new:
        return
    before, after = normalised(name, old, *records), normalised(name, new, *reversed(records))
    if before == after:
        outcome.normalised += 1
    else:
        outcome.differences.append(f"{name}: {difference(name, before, after)}")


def _paths(side: Side, group: str) -> Iterator[tuple[str, Path]]:
    """Yield the files, links and empty folders of a group, by the names that both sides share."""
    for kind in ("files", "said"):
        top = side.home / kind
        for folder, folders, files in os.walk(top / group):
            links = [name for name in folders if (Path(folder) / name).is_symlink()]
            for name in [*files, *links]:
                path = Path(folder) / name
                yield normal_name(f"{kind}/{path.relative_to(top)}"), path
            if not folders and not files:
                yield f"{kind}/{Path(folder).relative_to(top)}/", Path(folder)


def _content(path: Path) -> bytes:
    if path.is_symlink():
        return b"link to " + os.fsencode(path.readlink())
    return b"" if path.is_dir() else path.read_bytes()


def difference(name: str, old: bytes, new: bytes) -> str:
    """Say where two contents begin to differ: the line of a text, the offset and tensor of a binary file."""
    if not name.endswith(_BINARY) and b"\0" not in old[:8192]:
        lines = zip_longest(old.splitlines(), new.splitlines())
        for number, (before, after) in enumerate(lines, 1):
            if before != after:
                return f"line {number}\n    old: {_line(before, after)}\n    new: {_line(after, before)}"
        return "the ends of lines differ"
    count = sum(a != b for a, b in zip(old, new, strict=False))
    first = next((place for place, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    sizes = "" if len(old) == len(new) else f", {len(old)} and {len(new)} bytes"
    tensor = f" in {_tensor(old, first)}" if name.endswith(".safetensors") else ""
    return f"{count} bytes, the first at {first}{tensor}{sizes}"


def _line(line: bytes | None, other: bytes | None) -> str:
    """Return a line from a little before it begins to differ."""
    if line is None:
        return "(no such line)"
    first = next((n for n, (a, b) in enumerate(zip(line, other or b"", strict=False)) if a != b), 0)
    begin = max(0, first - 40)
    text = line[begin : begin + _SHOWN].decode(errors="backslashreplace")
    return f"{'...' if begin else ''}{text}{'...' if begin + _SHOWN < len(line) else ''}"


def _tensor(data: bytes, place: int) -> str:
    """Return what lies at a place of a safetensors file."""
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    if place < begin:
        return "the header"
    header = json.loads(data[8:begin])
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] <= place - begin < entry["data_offsets"][1]:
            return str(name)
    return "no tensor"
