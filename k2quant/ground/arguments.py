"""How messages name arguments: as Python has them, so marked that a command line can say its flags instead.

A mark is `` `restart=True` ``, or `` `scope=` `` where any value is meant: a name, an equals sign, perhaps a value, in
backticks. A message below the command line holds marks and no flags, so nothing is said twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_MARK = re.compile(r"`([a-z][a-z0-9_]*)=([^`\s]*)`")


def in_flags(text: str, flags: Mapping[str, str]) -> str:
    """Return a message with flags in place of its marks: `restart=True` becomes --restart, `device=cpu` --device cpu.

    Args:
        text: the message.
        flags: by the names of arguments. What has no flag stays as it is.
    """

    def shown(mark: re.Match[str]) -> str:
        name, value = mark.groups()
        if name not in flags:
            return mark[0]
        return f"{flags[name]} {value}" if value and value != "True" else flags[name]

    return _MARK.sub(shown, text)
