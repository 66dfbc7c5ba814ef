"""YAML as people write settings, and as a hostile file may hold it: plain data, no aliases, no key twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from k2quant.checkpoint.files.paths import read_limited
from k2quant.errors import CheckpointError, UsageError


class Placed(dict[Any, Any]):
    """A mapping that knows where it was read."""

    lines: Mapping[Any, int] = MappingProxyType({})
    """The line of each key, the first of the file is 1."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Plain data alone: no alias, which can stand for a billion values, and no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node that is no alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) have no place here")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002  PyYAML's own
        """Construct a mapping whose keys differ."""
        found = dict(super().construct_mapping(node, deep=deep))
        if len(found) != len(node.value):
            raise yaml.YAMLError("a key stands twice")
        return found

    def construct_placed(self, node: Any) -> Iterator[Placed]:
        """Construct a mapping that knows its lines, in PyYAML's two steps."""
        found = Placed()
        yield found
        found.update(self.construct_mapping(node))
        found.lines = {self.construct_object(key, deep=True): key.start_mark.line + 1 for key, _ in node.value}


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_placed)


def read_mapping(path: Path, limit: int) -> Placed:
    """Return the mapping that a YAML file holds.

    Args:
        path: of the file.
        limit: bytes that it may have.

    Raises:
        UsageError: it cannot be read, is too large, no YAML, or no mapping.
    """
    try:
        data = read_limited(path, limit)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except CheckpointError as error:  # a pipe, or too large
        raise UsageError(str(error)) from error
    return parse_mapping(data, file=path)


def parse_mapping(data: bytes, *, file: object) -> Placed:
    """Return the mapping that the bytes of a YAML file hold.

    Args:
        data: few enough to be parsed.
        file: where they come from, for messages.

    Raises:
        UsageError: no YAML, or no mapping.
    """
    try:
        content = yaml.load(data.decode(), _Loader)  # noqa: S506  a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{file}: not YAML: {' '.join(str(error).split())[:200]}") from error
    except (ArithmeticError, AttributeError, LookupError) as error:  # PyYAML's own, of `!!int ""` and the like
        raise UsageError(f"{file}: not YAML: a tag that its value does not have") from error
    if not isinstance(content, Placed):
        raise UsageError(f"{file}: expected keys and values, found {type(content).__name__}")
    return content
