"""Regular expressions that name weights: those that might never end, and those that are found nowhere."""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import SequenceMatcher, get_close_matches
from math import prod

from k2quant.errors import UsageError

_MOST_REPEATED = 3  # a few more in one pattern can keep the matcher busy for years

_MOST_WAYS = (4096, 4096, 1024, 16)
"""Ways through all that may be there or not and all alternatives, by the number of repetitions: each way is tried with
each of the places that these may take."""

SAFE_PATTERN = f"at most {_MOST_REPEATED} repetitions, none of a group, and few alternatives"
"""What is taken, for messages."""

_ESCAPE = re.compile(r"\\.", re.DOTALL)
_SET = re.compile(r"\[\^?\]?[^\]]*\]")
_UNREADABLE = re.compile(r"\(\?(#|[a-z]*x)", re.IGNORECASE)  # comments and spaces, which may hide what is repeated
_OPTION = re.compile(r"(?<![(*+?])\?")  # no part of `(?:`, nor of `*?`

_COMPARED = 200  # letters of a pattern or a name; K2's longest has 63
_KINDS = 1000  # names that differ in more than numbers; K2 has some 40


def may_take_for_ever(pattern: str) -> bool:
    """Tell of a regular expression that comes from a file whether matching it might never end."""
    if len(pattern) > 500:
        return True
    plain = _SET.sub("a", _ESCAPE.sub("a", pattern))
    repetitions = len(re.findall(r"[*+{]", plain))
    return (
        _UNREADABLE.search(plain) is not None
        or re.search(r"\)[*+{]", plain) is not None
        or repetitions > _MOST_REPEATED
        or _ways(plain) > _MOST_WAYS[repetitions]
    )


def _ways(plain: str) -> int:
    """Return how many ways lead through all options and alternatives of a pattern without escapes and sets."""
    ways = 1 << len(_OPTION.findall(plain))
    alternatives = [1]
    for letter in plain:
        if letter == "(":
            alternatives.append(1)
        elif letter == "|":
            alternatives[-1] += 1
        elif letter == ")" and len(alternatives) > 1:
            ways *= alternatives.pop()
    return ways * prod(alternatives)


def check_found(patterns: Collection[re.Pattern[str]], bases: Collection[str], option: str) -> None:
    """Refuse a pattern that is found in no name: what it was meant to spare would be quantised without a word.

    Args:
        patterns: that were asked for.
        bases: the names in which they are looked for, without `.weight`.
        option: whose patterns they are, for the message.

    Raises:
        UsageError: there is such a pattern.
    """
    for pattern in (each.pattern for each in patterns if not any(map(each.search, bases))):
        raise UsageError(f"{option} {pattern!r:.{_COMPARED}} is found in no name; {_advice(pattern, bases)}")


def _advice(pattern: str, bases: Collection[str]) -> str:
    """Say what was likely meant by a pattern that is found nowhere."""
    if pattern.startswith("re:"):
        return "`re:` belongs to the ignore list of a config: leave it out, a pattern is found anywhere in a name"
    if re.search(r"weight\w*\$?$", pattern):
        return "patterns see names without their last part, such as `.weight`: leave it out"
    nearest = _nearest(_without_numbers(re.sub(r"\\[dw]|[^\w.]", "", pattern))[:_COMPARED], bases)
    return f"the nearest names are {' and '.join(f'`{base}`' for base in nearest)}"


def _nearest(wanted: str, bases: Collection[str]) -> list[str]:
    """Return two names at most: those with words that are like one that none has, else those that are like the whole.

    Of names that differ in numbers alone, the last stands for all.
    """
    last = {_without_numbers(base[:_COMPARED]): base[:_COMPARED] for base in bases}
    kinds = list(last.values())[:_KINDS]
    words = {word: base for base in kinds for word in base.split(".") if not word.isdecimal()}
    strange = [word for word in wanted.split(".") if word not in words][:4]
    close = [words[near] for word in strange for near in get_close_matches(word, words, 2)]
    alike = sorted(kinds, key=lambda base: -SequenceMatcher(None, wanted, base).ratio())
    return list(dict.fromkeys(close or alike))[:2]


def _without_numbers(name: str) -> str:
    return re.sub(r"[0-9]+", "0", name)
