"""Recipes as people write them: a file of rules, checked word by word, and what a report says of them again.

docs/recipes.md has the keys. A rule here is text; `recipe` beside it makes of it what decides about weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from k2quant.checkpoint.files.paths import read_limited
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.files.strict_yaml import Placed, parse_mapping
from k2quant.checkpoint.reader import REPORT
from k2quant.checkpoint.writing.destination import REPORT_LIMIT
from k2quant.errors import CheckpointError, UsageError, printable
from k2quant.formats.format import Layout, Method, Scope, listed
from k2quant.formats.known import FORMATS, FormatName
from k2quant.ground.names import TENSOR_CLASSES
from k2quant.ground.patterns import SAFE_PATTERN, may_take_for_ever
from k2quant.ground.units import one_of, parse_size, size
from k2quant.kernels.codecs.grids import Grid

VERSION = 1
"""Of the schema of a recipe."""

METHODS: tuple[Method, ...] = get_args(Method)
"""How scales are chosen; the first, rounding to nearest by the format's own rule, where nothing is said."""

SEARCHED_BY_DEFAULT = METHODS[:3]
"""Methods of a conversion beside which rules that name none search from `Format.searched_from`; in the last two of
`METHODS`, what is not solved or folded is rounded."""

LIMIT = 2**20
"""Bytes of a recipe; a report may be as large as reports are."""

MOST_RULES = 1000
"""Of a recipe: each is held against every other, and against every weight."""

LEAST_SHARD = 10**6
"""Bytes: in smaller shards a K2 would fall into tens of thousands of files, each with a header to read."""

_NARROWED: Scope = "linear"
_SHOWN = 100  # characters of a value in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenRule:
    """A format and the weights that get it, in words. What is not said is left to `in_force`.

    Raises:
        UsageError: a word that does not exist.
    """

    to: FormatName
    scope: Scope | None = None
    classes: tuple[str, ...] = ()
    """Of `TENSOR_CLASSES`; empty: of every class."""
    match: tuple[str, ...] = ()
    """Regular expressions, one of which is found in the name; empty: every name."""
    ignore: tuple[str, ...] = ()
    """Regular expressions, none of which is found in the name."""
    grid: Grid | None = None
    layout: Layout | None = None
    method: Method | None = None
    place: str = field(default="", compare=False, repr=False)
    """Where it stands, for messages; empty for what was asked for in arguments."""

    def __post_init__(self) -> None:
        one_of("format", self.to, tuple(FORMATS))
        for what, value, choices in (("scope", self.scope, Scope), ("grid", self.grid, Grid)):
            if value is not None:
                one_of(what, value, get_args(choices))
        if self.layout is not None:
            one_of("layout", self.layout, get_args(Layout))
        if self.method is not None:
            one_of("method", self.method, METHODS)
        for kind in self.classes:
            one_of("class", kind, TENSOR_CLASSES)
        for name in ("match", "ignore"):
            patterns = getattr(self, name)
            if not isinstance(patterns, tuple) or not all(isinstance(pattern, str) for pattern in patterns):
                raise UsageError(f"{name} is {patterns!r}; expected a tuple of regular expressions")

    @property
    def narrowed(self) -> bool:
        """Whether classes or patterns say which weights it takes."""
        return bool(self.classes or self.match)

    def called(self, name: str) -> str:
        """Return what one of its keys is called in a message."""
        return f"{self.place}: {name}" if self.place else f"`{name}=`"

    def as_json(self) -> dict[str, Any]:
        """Return its keys as a recipe has them, without those that say nothing."""
        said = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "place"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in said.items() if value}

    def summary(self) -> str:
        """Return what it says, in a line: `int4 moonshot: linear, of routed experts, without router`."""
        kind = " ".join(word for word in (self.to, self.grid, self.layout, self.method) if word)
        takes: list[str] = [self.scope or "everything"]
        takes += [f"of {' and '.join(self.classes)}"] if self.classes else []
        takes += [f"with {' or '.join(self.match)}"] if self.match else []
        takes += [f"without {' or '.join(self.ignore)}"] if self.ignore else []
        return printable(f"{kind}: {', '.join(takes)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenRecipe:
    """A whole recipe, in words."""

    rules: tuple[WrittenRule, ...]
    shard_size: int | None = None
    """Bytes; None: the source's shards."""
    allow_split: bool = False
    budget: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    """Why the rules are as they are, where `k2quant.calib.allot` made them: for the report alone."""

    @property
    def method(self) -> Method:
        """How the scales of weights are chosen that are not merely rounded; all rules that search agree on it."""
        return method_of(self.rules)

    def as_json(self, *, methods: bool = False) -> dict[str, Any]:
        """Return it as a file has it, so that `--config` reads it again.

        Args:
            methods: whether to say of each quantised format how its scales were chosen, for values were rounded so.
        """
        said = {name for name, kind in FORMATS.items() if kind.quantised} if methods else set()
        return {
            "version": VERSION,
            "rules": [
                rule.as_json() | ({"method": rule.method or METHODS[0]} if rule.to in said and not _open(rule) else {})
                for rule in self.rules
            ],
            "shard_size": self.shard_size,
            "allow_split": self.allow_split,
        }


def method_of(rules: Iterable[WrittenRule]) -> Method:
    """Return how scales are searched by some rules, which agree on it; the first of `METHODS` where none says it."""
    return next((rule.method for rule in rules if rule.method and rule.method != METHODS[0]), METHODS[0])


def _open(rule: WrittenRule) -> bool:
    """Tell whether the source decides how scales are chosen."""
    return rule.method is None and bool(FORMATS[rule.to].searched_from)


Recipes = str | os.PathLike[str] | Mapping[str, Any] | WrittenRecipe
"""What `read_recipe` takes."""


def in_force(rules: tuple[WrittenRule, ...]) -> tuple[WrittenRule, ...]:
    """Return rules with all that they leave to others said: scope, grid and layout; a method only where it searches.

    A grid or layout that one rule of a format says holds for all of that format. Beside another quantised format, a
    format is written in the layout that a config can describe there.

    Raises:
        UsageError: what a rule says has no meaning for its format, or two rules of one format contradict each other.
    """
    for rule in rules:
        _check_meaning(rule, alone=not any(FORMATS[other.to].quantised for other in rules))
    mixed = len({rule.to for rule in rules if FORMATS[rule.to].quantised}) > 1
    found = tuple(
        replace(
            rule,
            scope=_scope_of(rule),
            grid=_agreed(rule, rules, "grid"),
            layout=_layout_of(rule, rules, mixed),
            method=_method_of(rule.to, rule.method),
        )
        for rule in rules
    )
    _check_methods([rule for rule in found if rule.method and rule.method != METHODS[0]])
    return found


def _method_of(to: FormatName, method: Method | None) -> Method | None:
    """Return a method where it is none that is meant where nothing is said."""
    return None if method == METHODS[0] and not FORMATS[to].searched_from else method


def _scope_of(rule: WrittenRule) -> Scope | None:
    """Return the scope; one that names classes or patterns takes of these whatever engines run in the format."""
    default = FORMATS[rule.to].default_scope
    return rule.scope or (_NARROWED if default is not None and rule.narrowed else default)


def _agreed(rule: WrittenRule, rules: tuple[WrittenRule, ...], name: str) -> Any:
    """Return the grid or layout on which the rules of a format agree, the format's own where none says one.

    Raises:
        UsageError: they do not agree.
    """
    said = {getattr(other, name): other for other in rules if other.to == rule.to and getattr(other, name)}
    if len(said) > 1:
        (one, first), (two, second) = list(said.items())[:2]
        raise UsageError(
            f"{second.called(name)} {two}, where {first.called(name)} {one} stands for {rule.to} too: an output has "
            "one kind of each format, for config.json has one group for it"
        )
    known = getattr(FORMATS[rule.to], f"{name}s")
    return next(iter(said), known[0] if known else None)


def _layout_of(rule: WrittenRule, rules: tuple[WrittenRule, ...], mixed: bool) -> Layout | None:  # noqa: FBT001
    kind = FORMATS[rule.to]
    found: Layout | None = _agreed(rule, rules, "layout")
    if not mixed or any(other.layout for other in rules if other.to == rule.to):
        return found
    grouped = (each for each in get_args(Layout) if each in kind.layouts)
    return next((each for each in grouped if kind.asked_for(layout=each).config_group() is not None), found)


def _check_methods(searching: Sequence[WrittenRule]) -> None:
    """Refuse a search where there is nothing to be searched, and two kinds of it.

    Raises:
        UsageError: a rule asks for that.
    """
    for rule in searching:
        kind, first = FORMATS[rule.to], searching[0]
        owners = [name.upper() for name, other in FORMATS.items() if other.searches]
        if not kind.searches:
            raise UsageError(
                f"{rule.called('method')} {rule.method} has no meaning with {rule.to}: it searches better scales, "
                f"which is for {' and '.join(owners)}"
            )
        if rule.method not in kind.searched_by:
            raise UsageError(
                f"{rule.called('method')} {rule.method} is not there for {rule.to}: its scales are searched by "
                f"{' or '.join(kind.searched_by)}"
            )
        if kind.grids and rule.grid not in kind.searched_grids:
            raise UsageError(
                f"{rule.called('method')} {rule.method} searches scales on the grid {listed(kind.searched_grids)} "
                f"alone, found {rule.grid}"
            )
        if rule.method != first.method:
            raise UsageError(
                f"{rule.called('method')} {rule.method}, where {first.called('method')} says {first.method}: one "
                "conversion searches in one way"
            )


def _check_meaning(rule: WrittenRule, *, alone: bool) -> None:
    """Refuse what has no meaning for a rule's format; `alone`: nothing is quantised."""
    kind = FORMATS[rule.to]
    if alone and (rule.scope or rule.ignore or rule.narrowed):
        given = [name for name in ("scope", "classes", "match", "ignore") if getattr(rule, name)]
        what = " and ".join(rule.called(name) for name in given)
        keep = "; to keep the rest quantised, add a rule for its format" if rule.place else ""
        raise UsageError(f"{what} has no meaning with {rule.to} alone: everything becomes {rule.to.upper()}{keep}")
    for name, means in (("grid", "it is the rounding rule of"), ("layout", "it says whose names are written, of")):
        value, known = getattr(rule, name), getattr(kind, f"{name}s")
        if value and not known:
            owners = " and ".join(other.upper() for other, its in FORMATS.items() if getattr(its, f"{name}s"))
            raise UsageError(f"{rule.called(name)} has no meaning with {rule.to}: {means} {owners}")
        if value and value not in known:
            raise UsageError(f"{rule.called(name)} {value} is none of {rule.to}: expected {' or '.join(known)}")


# --- reading ---


def read_recipe(source: Recipes) -> WrittenRecipe:
    """Read a recipe: a YAML or JSON file, what such a file holds, or the report of a conversion, or its folder.

    Raises:
        UsageError: it cannot be read, or a key or a value makes no sense; the message says where.
    """
    if isinstance(source, WrittenRecipe):
        return source
    if isinstance(source, Mapping):
        return recipe_from(source)
    if not isinstance(source, str | os.PathLike):
        raise UsageError(f"recipe is {_shown(source)}; expected a path, or what such a file holds")
    path = Path(source)
    if path.is_dir():
        path = path / REPORT
    if path.suffix == ".json":
        try:
            content = parse_object(read_limited(path, REPORT_LIMIT), file=path)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror or error}") from error
        except CheckpointError as error:
            raise UsageError(str(error)) from error
        return _checked_shards(recipe_from(content, file=str(path)), content, str(path))
    return parse_recipe(_bytes_of(path), file=str(path))


def _bytes_of(path: Path) -> bytes:
    """Return a recipe's bytes; of a pipe too, for it is the user who names it.

    Raises:
        UsageError: it cannot be read, or is too large.
    """
    try:
        if path.is_fifo():
            with path.open("rb") as pipe:
                return pipe.read(LIMIT + 1)
        return read_limited(path, LIMIT)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except CheckpointError as error:
        raise UsageError(str(error)) from error


def parse_recipe(data: bytes, *, file: str) -> WrittenRecipe:
    """Read the bytes of a recipe in YAML or JSON.

    Args:
        data: at most `LIMIT` bytes.
        file: where they come from, for messages.

    Raises:
        UsageError: see `read_recipe`.
    """
    if len(data) > LIMIT:
        raise UsageError(f"{file}: too large for a recipe: expected at most {LIMIT:,} bytes")
    content = parse_mapping(data, file=file)
    return _checked_shards(recipe_from(content, file=file), content, file)


def recipe_from(content: Mapping[Any, Any], *, file: str = "recipe") -> WrittenRecipe:
    """Make a recipe of what a file holds: of its keys, or of a report's.

    Raises:
        UsageError: see `read_recipe`.
    """
    if _is_report(content):
        return _reported(content, file)
    _check_keys(content, ("version", "rules", "shard_size", "allow_split"), file)
    version = content.get("version", VERSION)
    if type(version) is not int or version != VERSION:
        raise UsageError(f"{_at(content, 'version', file)}: version: expected {VERSION}, found {_shown(version)}")
    rules = content.get("rules")
    if not isinstance(rules, list) or not rules:
        raise UsageError(f"{_at(content, 'rules', file)}: rules: expected a list of rules, found {_shown(rules)}")
    allow_split = content.get("allow_split", False)
    if type(allow_split) is not bool:
        where = _at(content, "allow_split", file)
        raise UsageError(f"{where}: allow_split: expected true or false, found {_shown(allow_split)}")
    if len(rules) > MOST_RULES:
        raise UsageError(f"{_at(content, 'rules', file)}: rules: expected at most {MOST_RULES:,}, found {len(rules):,}")
    return WrittenRecipe(
        rules=tuple(_rule(rule, number, file) for number, rule in enumerate(rules, 1)),
        shard_size=_size(content, file),
        allow_split=allow_split,
    )


def _checked_shards(recipe: WrittenRecipe, content: Mapping[Any, Any], file: str) -> WrittenRecipe:
    """Return a file's recipe; a report repeats what was done, but what people write has shards of a sound size."""
    found = recipe.shard_size
    if found is not None and found < LEAST_SHARD and not _is_report(content):
        where = _at(content, "shard_size", file)
        raise UsageError(f"{where}: shard_size: expected at least {size(LEAST_SHARD)}, found {size(found)}")
    return recipe


def _is_report(content: Mapping[Any, Any]) -> bool:
    return content.get("tool") == "k2quant"


def _reported(report: Mapping[Any, Any], file: str) -> WrittenRecipe:
    """Return the recipe that was in force where a report was written; those of older releases have its options."""
    recipe = report.get("recipe")
    if isinstance(recipe, Mapping):
        if _is_report(recipe):
            raise UsageError(f"{file}: recipe: expected the keys of a recipe, found another report")
        return recipe_from(recipe, file=file)
    options = report.get("options")
    if not isinstance(options, Mapping):
        raise UsageError(f"{file}: a report without a recipe and without options")
    whole = ("shard_size", "allow_split")
    rule = {name: value for name, value in options.items() if name not in whole and value not in (None, [])}
    return recipe_from({"rules": [rule], **{name: options[name] for name in whole if name in options}}, file=file)


def _size(content: Mapping[Any, Any], file: str) -> int | None:
    size = content.get("shard_size")
    where = _at(content, "shard_size", file)
    if isinstance(size, str):
        try:
            return parse_size(size)
        except UsageError as error:
            raise UsageError(f"{where}: shard_size: {error}") from error
    if size is not None and (type(size) is not int or not 0 < size < 2**63):
        raise UsageError(f"{where}: shard_size: expected bytes, or a size such as 5GB, found {_shown(size)}")
    return size


_LISTS = ("classes", "match", "ignore")
_KEYS = ("to", "scope", *_LISTS, "grid", "layout", "method")
_WORDS: dict[str, tuple[str, ...]] = {
    "to": tuple(FORMATS),
    "scope": get_args(Scope),
    "grid": get_args(Grid),
    "layout": get_args(Layout),
    "method": METHODS,
}


def _rule(content: object, number: int, file: str) -> WrittenRule:
    if not isinstance(content, Mapping):
        raise UsageError(f"{file}: rule {number}: expected keys and values, found {_shown(content)}")
    place = f"{file}: rule {number}"
    _check_keys(content, _KEYS, place)
    if "to" not in content:
        raise UsageError(f"{place}: the key 'to' is missing: which format?")
    words: dict[str, Any] = {name: _word(content, name, place) for name in _WORDS}
    words["method"] = _method_of(words["to"], words["method"])  # reports say it where it is meant in any case
    lists: dict[str, Any] = {name: _texts(content, name, place) for name in _LISTS}
    lists["classes"] = tuple(_class(kind, _at(content, "classes", place)) for kind in lists["classes"])
    for name in ("match", "ignore"):
        for pattern in lists[name]:
            _check_pattern(pattern, f"{_at(content, name, place)}: {name}")
    return WrittenRule(**words, **lists, place=_at(content, "to", place))


def _word(content: Mapping[Any, Any], name: str, place: str) -> Any:
    """Return one of the words that a key may have, or None where it says nothing."""
    choices = _WORDS[name]
    value = content.get(name)
    if value is None and name != "to":
        return None
    if value not in list(choices):  # whatever a file has there
        where = _at(content, name, place)
        raise UsageError(f"{where}: {name}: expected {', '.join(choices)}, found {_shown(value)}")
    return value


def _texts(content: Mapping[Any, Any], name: str, place: str) -> tuple[str, ...]:
    value = content.get(name)
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        where = _at(content, name, place)
        raise UsageError(f"{where}: {name}: expected text or a list of texts, found {_shown(value)}")
    if name in content and value is not None and not texts and name != "ignore":
        raise UsageError(f"{_at(content, name, place)}: {name}: an empty list takes nothing; leave it out")
    return tuple(texts)


def _class(kind: str, where: str) -> str:
    """Return a class as tables call it; `routed_experts` is `routed experts`."""
    found = re.sub(r"[_-]", " ", kind.lower())
    if found not in TENSOR_CLASSES:
        raise UsageError(
            f"{where}: classes: unknown class {_shown(kind)}{_nearest(found, TENSOR_CLASSES)}; known are "
            f"{', '.join(TENSOR_CLASSES)}"
        )
    return found


def _check_pattern(pattern: str, where: str) -> None:
    if may_take_for_ever(pattern):
        raise UsageError(f"{where}: {_shown(pattern)} might take for ever to match; use {SAFE_PATTERN}")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{where}: {_shown(pattern)} is no regular expression: {error}") from error


def _check_keys(content: Mapping[Any, Any], known: Collection[str], where: str) -> None:
    for name in content:
        if name not in known:
            nearest = _nearest(name, known)
            raise UsageError(
                f"{_at(content, name, where)}: unknown key {_shown(name)}{nearest}; known are {', '.join(known)}"
            )


def _nearest(word: object, known: Iterable[str]) -> str:
    """Return a question for what was likely meant, if anything was."""
    close = get_close_matches(word[:_SHOWN], known, 1) if isinstance(word, str) else []
    return f", did you mean {close[0]!r}?" if close else ""


def _at(content: Mapping[Any, Any], key: object, where: str) -> str:
    """Return the place of a key: its line, where a file of lines says it."""
    line = content.lines.get(key) if isinstance(content, Placed) else None
    return where if line is None else f"{where} (line {line})"


def _shown(value: object) -> str:
    try:
        return f"{value!r:.{_SHOWN}}"
    except ValueError:
        return "a number of thousands of digits"
