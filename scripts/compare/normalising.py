"""What may differ between two runs of one program, in one list, each with its reason. Everything else may not.

Files stay as they are but for what a pattern finds: JSON is matched by its keys, text by the words beside a number. No
hash of a file or a tensor is in the list: none of them is made of a time or a place. The one that is made of the
version, the identity of an evaluation, is left out only where the versions differ.

Not in the list on purpose: `results.json` of `k2quant eval run` quotes the source of the function that reads a task's
data, as lm-eval dumps it. Whoever changes that function changes this file.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from compare.running import Record


class Rule(NamedTuple):
    """What is put in the place of something that differs by nature."""

    where: str
    """Pattern of paths: `files/GROUP/...` or `said/GROUP/NAME.stdout`; a star also stands for slashes."""
    what: bytes
    """Regular expression, line by line."""
    put: bytes
    reason: str


_NUMBER = rb"\d+(?:\.\d+)?(?:e-?\d+)?"
_DURATION = rb"(?:\d+\.\d s|\d+ min \d\d s|\d+ h \d\d min)"
_SIZE = rb"\d+(?:\.\d+)? (?:B|kB|MB|GB|TB)"

_CLOCK = "when it was done, or how long it took"
_TOUCHED = "when an input was last written, which tells a conversion whether it may go on"
_DISK = "what else lies on the disk"

RULES = (
    # JSON, by key
    Rule("*.json", rb'("finished": )"[\dT:Z+-]+"', rb"\1<time>", _CLOCK),
    Rule("*.json", rb'("seconds": )' + _NUMBER, rb"\1<seconds>", _CLOCK),
    Rule("*/history.jsonl", rb'("seconds":)' + _NUMBER, rb"\1<seconds>", _CLOCK),
    Rule("*/results.json", rb'("date": )' + _NUMBER, rb"\1<time>", _CLOCK),
    Rule("*.json*", rb'("mtime_ns": ?)\d+', rb"\1<time>", _TOUCHED),
    Rule("*.json*", rb'("[^"\n]+": ?\[\s*\d+,\s*)\d{19}(\s*\])', rb"\1<time>\2", _TOUCHED),  # other_files: size, time
    Rule("said/*.stdout", rb'("finished": )"[\dT:Z+-]+"', rb"\1<time>", _CLOCK),
    Rule("said/*.stdout", rb'("(?:prompt_)?seconds": )' + _NUMBER, rb"\1<seconds>", _CLOCK),
    Rule("said/*.stdout", rb'("tokens_per_second": )' + _NUMBER, rb"\1<rate>", _CLOCK),
    Rule("said/*.stdout", rb'("disk_free": )\d+', rb"\1<size>", _DISK),
    # the last lines of conversions, merges, trainings and exports
    Rule("said/*.stdout", rb"(\(\d+\.\d\dx\) in )" + _DURATION, rb"\1<duration>", _CLOCK),
    Rule("said/*.stdout", rb"(\(\d+\.\d\dx\) in <duration>, )" + _SIZE + rb"/s$", rb"\1<rate>", _CLOCK),
    Rule("said/*.stdout", rb"( in )" + _DURATION + rb"(; every weight equals)", rb"\1<duration>\2", _CLOCK),
    Rule("said/*.stdout", rb"(\d steps(?: from step \d+)? in )" + _DURATION + rb"$", rb"\1<duration>", _CLOCK),
    Rule("said/*.stdout", rb"( parameters, \d+ steps in )\d+( s)", rb"\1<seconds>\2", _CLOCK),
    # dry runs and plans
    Rule("said/*.stdout", rb"^(disk free +)" + _SIZE + rb"$", rb"\1<size>", _DISK),
    Rule("said/*.stdout", rb"^(time +about )" + _DURATION, rb"\1<duration>", _CLOCK),
    Rule("said/qat/plan-*.stdout", rb"(; )" + _SIZE + rb"( free)", rb"\1<size>\2", _DISK),
    # the tables of the demo; the last column sets the width of the first table
    Rule("said/demo/*.stdout", rb"^(Through every format and back) +$", rb"\1", _CLOCK),
    Rule("said/demo/*.stdout", rb"^(conversion .* ok) +(time) *$", rb"\1 \2", _CLOCK),
    Rule("said/demo/*.stdout", rb"( (?:yes|no|NO)) +\d+\.\d\d s *$", rb"\1 <seconds>", _CLOCK),
    Rule("said/demo/*.stdout", rb"^((?:bf16|fp8|int4) .*\S) +\d+$", rb"\1 <rate>", _CLOCK),
    # remarks on stderr
    Rule("said/eval/run*.stderr", rb"(: )" + _DURATION + rb"(; compare with)", rb"\1<duration>\2", _CLOCK),
    Rule(
        "said/nano/ask*.stderr",
        rb"( in )\d+\.\d\d( s, \d+ new, )\d+\.\d( a second| tokens/s)$",
        rb"\1<seconds>\2<rate>\3",
        _CLOCK,
    ),
    Rule("said/qat/launched.stderr", rb"^step (\d+) of (?!\1,).*\n", b"", "said each five seconds, however far it is"),
    Rule("said/qat/launched.stderr", rb"\d+\.\d\d( steps/s, )\d+( s left)$", rb"<rate>\1<seconds>\2", _CLOCK),
    Rule(
        "said/eval/gate-github.stdout",
        rb"^::(stop-commands::)?[0-9a-f]{32}(::)?$",
        rb"::\1<token>\2",
        "drawn anew each time, so that no answer of a model can name it",
    ),
    # reports as pages
    Rule("*.html", rb"(&middot; )\d{4}-\d\d-\d\d \d\d:\d\d( UTC)", rb"\1<time>\2", _CLOCK),
    Rule("*.html", rb"(<span>Time</span><strong>)" + _DURATION, rb"\1<duration>", _CLOCK),
    Rule("*.html", rb"(<small>)" + _SIZE + rb"/s( read</small>)", rb"\1<rate>\2", _CLOCK),
    Rule("files/qat/*.html", rb"(<small>)[\d,]+( a second</small>)", rb"\1<rate>\2", _CLOCK),
    Rule("files/qat/*.html", rb"(<small>in steps, )" + _DURATION + rb"( each)", rb"\1<duration>\2", _CLOCK),
)

_VERSION = "the versions differ"
_IDENTITY = "a hash of all that the answers depend on, the version among it"
VERSION_RULES = (
    Rule("*.json*", rb'("(?:version|k2quant)": ?)"VERSION"', rb'\1"<version>"', _VERSION),
    Rule("said/*.stdout", rb'("(?:version|k2quant)": )"VERSION"', rb'\1"<version>"', _VERSION),
    Rule("said/help/version.stdout", rb"(version )VERSION$", rb"\1<version>", _VERSION),
    Rule("said/python/print_names.stdout", rb"(__version__: ')VERSION'", rb"\1<version>'", _VERSION),
    Rule("*.html", rb"(&middot; k2quant |<dt>k2quant</dt><dd>)VERSION", rb"\1<version>", _VERSION),
    Rule("*/gate.md", rb"(power\. k2quant )VERSION(\.)$", rb"\1<version>\2", _VERSION),
    Rule("*/k2quant_eval.json", rb'("identity": )"[0-9a-f]{64}"', rb"\1<hash>", _IDENTITY),
    Rule("said/eval/run-*.stdout", rb'("identity": )"[0-9a-f]{64}"', rb"\1<hash>", _IDENTITY),
)
"""Count only where the two versions differ; VERSION stands for a side's own."""

_EVENTS = re.compile(r"(/events\.out\.tfevents)\.\d+\.[^/]*\.\d+(\.\d+)$")


def normal_name(name: str) -> str:
    """Return a path without what differs: TensorBoard puts the time, the machine and the process into a name."""
    return _EVENTS.sub(r"\1\2", name)


def normalised(name: str, data: bytes, record: Record, other: Record) -> bytes:
    """Return a content without what may differ.

    Args:
        name: its path, as `normal_name` has it.
        data: the content.
        record: of the run that wrote it: where its output, Python's environment and the checkout lay, and the version.
        other: the same of the run that it is compared with.
    """
    if "/events.out.tfevents" in name:
        return b"".join(_events(data))
    for place in ("home", "prefix", "checkout"):  # in this order: an environment may lie in the checkout
        data = data.replace(record[place].encode(), f"<{place}>".encode())
    rules = RULES if record["version"] == other["version"] else RULES + VERSION_RULES
    for rule in rules:
        if fnmatchcase(name, rule.where):
            what = rule.what.replace(b"VERSION", re.escape(record["version"]).encode())
            data = re.sub(what, rule.put, data, flags=re.MULTILINE)
    return data


def _events(data: bytes) -> Iterator[bytes]:
    """Yield TensorBoard's events without time (the first field, eight bytes), rate and checksums, made of the event.

    A record is its length in eight bytes, four bytes of checksum, the event, and four bytes of checksum. A number lies
    behind its name and the byte 0x15, in four bytes.
    """
    place = 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        event = data[place + 12 : place + 12 + length]
        event = event[9:] if event[:1] == b"\x09" else event
        yield re.sub(rb"(train/tokens_per_second\x15)....", rb"\1<rate>", event, flags=re.DOTALL)
        place += length + 16
