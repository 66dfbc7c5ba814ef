"""Errors as KL divergence: what `k2quant eval blame` measured of groups of weights, shared out among their units.

Blame says how much of a candidate's damage goes when a group of weights is put back: of tensor classes, and of finer
groups, its suspects, which may lie in one another. Within a group the damage that no smaller group in it has is shared
out by the errors of the rest; what no group explains, among all that are in none. Effects of groups may overlap:
together they are scaled to all of the damage.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
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
    parts = _parts(units, errors)
    given: dict[str, float] = {}
    for share, group in _groups(damage, parts):
        _give(given, group, share - sum(given.get(base, 0.0) for base in group), parts)
    _give(given, parts, 1.0 - sum(given.values()), parts)
    total = sum(given.values()) or 1.0
    found = dict.fromkeys((unit.name for unit in units if unit.name in errors), 0.0)
    for base, share in given.items():
        found[parts[base].unit] += damage.kl * share / total
    return found


class _Part(NamedTuple):
    """A weight of a unit."""

    unit: str
    error: float
    """Its part of the unit's."""


def _parts(units: Iterable[Unit], errors: Mapping[str, float]) -> dict[str, _Part]:
    """Return the weights of the units that were measured, by base in the language model."""
    rates = [(unit, errors[unit.name] / unit.size) for unit in units if unit.name in errors]
    return {
        _base(weight): _Part(unit.name, rate * prod(weight.shape)) for unit, rate in rates for weight in unit.weights
    }


def _groups(damage: Damage, parts: Mapping[str, _Part]) -> list[tuple[float, list[str]]]:
    """Return the groups that are here, each with its share, the smallest first: an inner one before the outer."""
    told = [(one.share, matching(one.name)) for one in (*damage.suspects, *damage.classes)]
    found = [(share, [base for base in parts if test(base)]) for share, test in told if test is not None]
    return sorted((each for each in found if each[1]), key=lambda each: len(each[1]))


def _give(given: dict[str, float], group: Iterable[str], share: float, parts: Mapping[str, _Part]) -> None:
    """Share out among those of a group that have nothing yet, by their errors; evenly where none has any."""
    others = [base for base in group if base not in given]
    total = sum(parts[base].error for base in others)
    for base in others:
        given[base] = max(share, 0.0) * (parts[base].error / total if total else 1 / len(others))


def _base(weight: StoredWeight) -> str:
    return names.split(names.in_language_model(weight.main.name) or weight.main.name)[0]


class _Place(NamedTuple):
    """What a title may say of a weight."""

    kind: str
    layer: int | None
    expert: int | None
    last: str


@functools.lru_cache(maxsize=2**17)  # K2 has 70,000, and each group asks each
def _place(base: str) -> _Place:
    return _Place(names.tensor_class(f"{base}.weight"), names.layer(base), names.expert(base), names.split(base)[1])


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
    "kind": lambda said: lambda base: _place(base).kind == said,
    "layer": lambda said: lambda base: _place(base).layer == int(said),
    "layers": lambda said: lambda base: _holds(said, _place(base).layer),
    "expert": lambda said: lambda base: _place(base).expert == int(said),
    "experts": lambda said: lambda base: _holds(said, _place(base).expert),
    "lasts": lambda said: lambda base: _place(base).last in said.split(", "),
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
