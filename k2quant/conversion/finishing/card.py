"""The model card of an output: how it was made, what that did to its weights, and the command that does it again.

It says no time and no path of this machine: the same conversion of the same source writes the same card.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from k2quant.checkpoint.cards import CARD, placed, sealed
from k2quant.checkpoint.reader import REPORT
from k2quant.conversion.finishing.classes import Row, rows
from k2quant.conversion.finishing.metadata import Home, front, home_of, metadata, said
from k2quant.conversion.plan import Plan
from k2quant.errors import printable
from k2quant.formats.known import FORMATS
from k2quant.ground.units import counted, size
from k2quant.kernels.codecs.figures import Figures

_OF_A_RULE = ("to", "scope", "grid", "layout", "method")
_LONGEST = 120  # letters of a name


def card_of(plan: Plan, report: Mapping[str, Any]) -> bytes:
    """Return the card of an output.

    Args:
        plan: what was written.
        report: what its report says of tensors, shards and the source's name.
    """
    home, name = home_of(plan.source.folder), str(report["source_name"])
    parts = [
        front(metadata(plan, home, said(plan.source.folder) if CARD in plan.copies else {})),
        f"# {_text(_title(plan, name))}\n",
        _opening(plan, report, home, name),
        *_others(plan),
        "## Weights\n",
        _table(rows(report["tensors"])),
        _sizes(plan, report),
        "## Made with\n",
        *_made(plan, home, name),
        "## For\n",
        *_engines(plan),
    ]
    return sealed("\n".join(parts))


def _title(plan: Plan, name: str) -> str:
    base = name if plan.source.supply is None else plan.source.place.name
    return f"{base}-{plan.options.main.upper()}"


def _opening(plan: Plan, report: Mapping[str, Any], home: Home | None, name: str) -> str:
    source = _text(name)
    if home is not None:
        at = "" if home.commit is None else f" (revision {_code(home.commit)})"
        source = f"[{_text(home.name)}](https://huggingface.co/{home.name}){at}"
    tool = f"k2quant {_text(report['version'])}"
    values = {"convert": "", "merge": " with an adapter merged in", "qat export": " as a training left it"}
    return f"{source}{values[_command(plan)]}, converted to {plan.options.main.upper()} by {tool}.\n"


def _others(plan: Plan) -> Iterator[str]:
    own = placed(plan.copies)
    cards = [own[name] for name in plan.copies if own[name] != name or re.fullmatch(r"README\.source(-\d+)?\.md", name)]
    if cards:
        links = ", ".join(f"[{each}]({each})" for each in sorted(cards))
        yield f"What the source's own card says of the model: {links}.\n"


def _table(found: Iterable[Row]) -> str:
    lines = ["| tensors | number | from | to | SQNR | values changed |", "|---|---:|---|---|---:|---:|"]
    for row in found:
        source = row.source.upper() if row.source else "other"
        target = "as they were" if row.target is None else row.target.upper()
        lines.append(f"| {row.kind} | {row.tensors:,} | {source} | {target} | {_quality(row)} | {_changed(row)} |")
    return "\n".join(lines) + "\n"


def _quality(row: Row) -> str:
    if row.substituted:
        return "other values"
    if row.target is None or row.figures == Figures():
        return "exact"
    ratio = row.figures.sqnr_db
    return f"{ratio:.2f} dB" if math.isfinite(ratio) else "exact" if ratio > 0 else "no signal"


def _changed(row: Row) -> str:
    figures = row.figures
    return f"{100 * figures.changed / figures.count:.2f}%" if figures.count and not row.substituted else "-"


def _sizes(plan: Plan, report: Mapping[str, Any]) -> str:
    shards = counted(len(plan.shards), "shard")
    read, written = plan.bytes_read, sum(shard.size for shard in plan.shards)
    text = f"{size(written)} in {shards}; the source has {size(read)}. SQNR is the energy of the weights over that of"
    more = " the error, against the source's values as BF16, summed over each line's weights."
    kept = f"`{REPORT}` has it for each tensor, with checksums."
    return f"{text}{more} {kept}\n" if report["tensors"] else ""


def _made(plan: Plan, home: Home | None, name: str) -> Iterator[str]:
    source = name if home is None else f"hf://{home.name}" + (f"@{home.commit}" if home.commit else "")
    destination = _title(plan, name)
    command = _command(plan)
    recipe = plan.options.in_force
    first, *more = recipe.rules
    rules = bool(more or first.narrowed)
    words = ["k2quant", *command.split()]
    if command == "qat export":
        words += [str((plan.origin or {}).get("run") or (plan.origin or {}).get("job") or "RUN"), destination]
    else:
        words += [_flag("config"), "recipe.yaml"] if rules else []
        words += list(_flags(plan, rules=rules))
        adapter = [str(_adapter(plan).get("name", "ADAPTER"))] if command == "merge" else []
        words += [source, *adapter, destination]
    yield f"```sh\n{_plain(shlex.join(map(str, words)))}\n```\n"
    if rules and command != "qat export":
        text = yaml.safe_dump(recipe.as_json(methods=plan.values is None), sort_keys=False)
        yield f"recipe.yaml:\n\n{_fenced(text, 'yaml')}\n"
    if plan.remarks:
        yield "What k2quant remarked:\n\n" + "".join(f"- {_text(each)}\n" for each in plan.remarks)


def _flags(plan: Plan, *, rules: bool) -> Iterator[str]:
    recipe, options = plan.options.in_force, plan.options
    first = recipe.rules[0].as_json() if not rules else {}
    beside = {"shard_size": recipe.shard_size, "kv_cache": options.kv_cache}
    for key, value in ({name: first.get(name) for name in _OF_A_RULE} | beside).items():
        if value is not None:
            yield from (_flag(key), str(value))
    for pattern in first.get("ignore", []):
        yield from (_flag("ignore"), pattern)
    for key, allowed in (("allow_split", recipe.allow_split), ("allow_rounding", options.allow_rounding)):
        yield from [_flag(key)] if allowed else []
    if (inputs := plan.options.activation_scales) is not None:
        yield from (_flag("activation-scales"), "one" if inputs == "one" else "STATS")
    method = plan.method or {}
    if "stats" in method:
        yield from (_flag("stats"), "STATS")
    if method.get("asked") == "gptq":
        yield from (_flag("data"), "DATA")


def _flag(name: str) -> str:
    """Return a flag of the command that a card shows."""
    return f"--{name.replace('_', '-')}"


def _engines(plan: Plan) -> Iterator[str]:
    written = {job.written.name for job in plan.jobs() if job.written is not None}
    for name in (name for name in FORMATS if name in written):
        kind = FORMATS[name]
        if kind.quantised or len(written) == 1:
            yield f"- {name.upper()}: {kind.served}"
    yield "\nThese take the format by their documents and sources; which of them was tried is in k2quant's README."


def _command(plan: Plan) -> str:
    values = plan.values or {}
    return "merge" if "adapter" in values else "qat export" if "trained" in values else "convert"


def _adapter(plan: Plan) -> Mapping[str, Any]:
    found = (plan.values or {}).get("adapter")
    return found if isinstance(found, Mapping) else {}


def _plain(text: str) -> str:
    """Return text for a block of code, in a line."""
    return printable(text).replace("```", "'''")


def _text(value: object) -> str:
    """Return a name as Markdown shows it, with nothing in it that is markup."""
    letters = printable(str(value))
    cut = letters if len(letters) <= 10 * _LONGEST else f"{letters[: 10 * _LONGEST]}..."
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~$&])", r"\\\1", cut)


def _code(text: str) -> str:
    return f"`{printable(text).replace('`', ' ')}`"


def _fenced(text: str, kind: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{kind}\n{text}{fence}\n"
