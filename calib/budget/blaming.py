"""Errors as KL divergence: what `k2quant eval blame` measured of groups of weights, shared out among their units.

Blame says how much of a candidate's damage goes when a group of weights is put back: of tensor classes, and of finer
groups, its suspects. Within a group the damage is shared out by the units' own errors; what no group explains, among
all units that are in none. Effects of several groups may overlap: shares of more than all are scaled down to all.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from k2quant.calib.budget.units import Unit
from k2quant.checkpoint.files import json_kinds as kinds
from k2quant.checkpoint.files.paths import read_limited
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.weights import StoredWeight
from k2quant.errors import MalformedFile, MalformedResults
from k2quant.ground import names
from k2quant.ground.saying.showing import brief

_LIMIT = 2**26  # bytes, as whoever writes it allows
_SCHEMA = 1
_HUGE = 1e100
_ROUNDING = 1e-3  # a divergence of nothing may come out below 0 by so much


Told = Callable[[str], bool]
"""Whether a weight, by base, is of a group."""


class Share(NamedTuple):
    """A group of weights, and what of the damage goes when it is put back."""

    name: str
    share: float


class Damage(NamedTuple):
    """What `eval blame -o` wrote, as far as it says where damage comes from."""

    kl: float
    """Nats a token, of a candidate in which all of these weights are quantised."""
    classes: tuple[Share, ...]
    suspects: tuple[Share, ...]
    changed: int
    """Weights in which the candidate differs."""
    sha256: str
    """Of the file."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def read_damage(path: Path) -> Damage:
    """Read the JSON of `k2quant eval blame`.

    Raises:
        MalformedResults: it cannot be read, is something else, or a part is missing, of the wrong kind or out of range.
    """
    try:
        data = read_limited(path, _LIMIT)
        content = parse_object(data, file=path)
        found = (content["kind"], content["schema"])
        if found != ("blame", _SCHEMA) or isinstance(content["schema"], bool):
            raise MalformedResults(file=path, expected=f"blame of schema {_SCHEMA}", found=f"{found!r:.100}")
        classes, suspects = (tuple(map(_share, kinds.values(content[key]))) for key in ("classes", "suspects"))
        kl = kinds.number(kinds.mapping(content["damage"])["value"], -_ROUNDING, _HUGE)
        changed = kinds.whole(content["changed"])
        return Damage(max(kl, 0.0), classes, suspects, changed, hashlib.sha256(data).hexdigest())
    except OSError as error:
        raise MalformedResults("cannot be read", file=path, found=error.strerror or str(error)) from error
    except MalformedFile as error:
        raise MalformedResults(error.message, file=path, expected=error.expected, found=error.found) from error
    except KeyError as error:
        remedy = "write it with `k2quant eval blame BASE CANDIDATE -o FILE`"
        raise MalformedResults("a part is missing", file=path, expected=error, remedy=remedy) from error
    except (ValueError, TypeError, OverflowError) as error:
        raise MalformedResults("not what blame writes", file=path, found=str(error)[:200]) from error


def _share(value: object) -> Share:
    found = kinds.mapping(value)
    return Share(kinds.text(found["name"]), max(kinds.number(found["share"], -_HUGE), 0.0))


def shared_out(damage: Damage, units: Sequence[Unit], errors: Mapping[str, float]) -> dict[str, float]:
    """Return what each unit adds to the divergence where it is quantised, nats a token.

    Args:
        damage: what was measured.
        units: all of them.
        errors: of the units that were measured, by name: how damage is shared out within a group.

    Returns:
        by the name of each unit in `errors`. Together they are `damage.kl`.
    """
    parts = {unit.name: dict(_parts(unit, errors[unit.name])) for unit in units if unit.name in errors}
    found = dict.fromkeys(parts, 0.0)
    within = _scaled(damage.classes)
    taken: set[str] = set()
    explained: dict[str, float] = {}
    for suspect in _scaled(damage.suspects):
        told = matching(suspect.name)
        if told is None or not (group := _weights_of(parts, told, taken)):
            continue
        _give(found, group, suspect.share, parts)
        taken |= {base for base, _ in group}
        kind = _kind(group[0][0])
        explained[kind] = explained.get(kind, 0.0) + suspect.share
    left = 1.0 - sum(explained.values())
    for one in within:
        rest = max(min(one.share - explained.get(one.name, 0.0), left), 0.0)
        if group := _weights_of(parts, _TESTS["kind"](one.name), taken):
            _give(found, group, rest, parts)
            taken |= {base for base, _ in group}
            left -= rest
    others = _weights_of(parts, lambda _base: True, taken) or _weights_of(parts, lambda _base: True, set())
    _give(found, others, left, parts)
    return {name: damage.kl * share for name, share in found.items()}


def _scaled(shares: Iterable[Share]) -> tuple[Share, ...]:
    """Return shares that are no more than all together."""
    kept = tuple(shares)
    total = max(sum(one.share for one in kept), 1.0)
    return tuple(one._replace(share=one.share / total) for one in kept)


def _parts(unit: Unit, error: float) -> Iterable[tuple[str, float]]:
    """Yield the weights of a unit, by base in the language model, each with its part of the unit's error."""
    whole = max(unit.size, 1)
    for weight in unit.weights:
        yield _base(weight), error * weight.shape[0] * weight.shape[1] / whole


def _base(weight: StoredWeight) -> str:
    return names.split(names.in_language_model(weight.main.name) or weight.main.name)[0]


def _kind(base: str) -> str:
    return names.tensor_class(f"{base}.weight")


_Group = list[tuple[str, str]]
"""Bases, each with the unit that it is in."""


def _weights_of(parts: Mapping[str, Mapping[str, float]], told: Told, taken: set[str]) -> _Group:
    return [(base, name) for name, bases in parts.items() for base in bases if base not in taken and told(base)]


def _give(found: dict[str, float], group: _Group, share: float, parts: Mapping[str, Mapping[str, float]]) -> None:
    """Share out among the units of a group, by their errors; evenly where none has any."""
    total = sum(parts[name][base] for base, name in group)
    for base, name in group:
        found[name] += share * (parts[name][base] / total if total else 1 / len(group))


_LAYERS = r"(?P<layers>[0-9][0-9, -]{0,2000})"
_TITLES = (
    re.compile(r"expert (?P<expert>[0-9]{1,6}) of layer (?P<layer>[0-9]{1,6})"),
    re.compile(r"experts (?P<experts>[0-9][0-9, -]{0,5000}) of layer (?P<layer>[0-9]{1,6})"),
    re.compile(rf"(?P<kind>{'|'.join(names.TENSOR_CLASSES)}) of layers {_LAYERS}(?: and outside them)?"),
    re.compile(rf"(?P<kind>{'|'.join(names.TENSOR_CLASSES)}) of layer (?P<layer>[0-9]{{1,6}})"),
    re.compile(rf"(?P<kind>{'|'.join(names.TENSOR_CLASSES)})"),
    re.compile(
        r"(?P<lasts>[a-z_]{1,40}(?:, [a-z_]{1,40}){0,9})(?: of expert (?P<expert>[0-9]{1,6}))?"
        r" of layer (?P<layer>[0-9]{1,6})"
    ),
)


def matching(title: str) -> Told | None:
    """Return what tells which weights blame means by a group's title, by base; None for a title that it never gives."""
    match = next((match for each in _TITLES if (match := each.fullmatch(title))), None)
    if match is None:
        return (lambda base: base == title) if names.is_projection(title) else None
    said = {key: value for key, value in match.groupdict().items() if value is not None}

    tests = [_TESTS[key](value) for key, value in said.items()]
    return lambda base: all(test(base) for test in tests)


_TESTS: dict[str, Callable[[str], Told]] = {
    "kind": lambda said: lambda base: _kind(base) == said,
    "layer": lambda said: lambda base: names.layer(base) == int(said),
    "layers": lambda said: lambda base: _holds(said, names.layer(base)),
    "expert": lambda said: lambda base: names.expert(base) == int(said),
    "experts": lambda said: lambda base: _holds(said, names.expert(base)),
    "lasts": lambda said: lambda base: names.split(base)[1] in said.split(", "),
}
"""What a part of a title says of a base."""


def _holds(ranges: str, number: int | None) -> bool:
    """Tell whether a number is among ranges as people write them: `1, 3-5`."""
    if number is None:
        return False
    for each in ranges.split(","):
        first, _, last = each.strip().partition("-")
        if first.isdecimal() and int(first) <= number <= int(last if last.isdecimal() else first):
            return True
    return False
