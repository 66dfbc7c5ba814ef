"""YAML as people write settings, and as a hostile file may hold it: plain data, no aliases, no key twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from k2quant.checkpoint.files.paths import read_limited
from k2quant.errors import CheckpointError, UsageError


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


def read_mapping(path: Path, limit: int) -> dict[Any, Any]:
    """Return the mapping that a YAML file holds.

    Args:
        path: of the file.
        limit: bytes that it may have.

    Raises:
        UsageError: it cannot be read, is too large, no YAML, or no mapping.
    """
    try:
        content = yaml.load(read_limited(path, limit).decode(), _Loader)  # noqa: S506  a SafeLoader
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except CheckpointError as error:  # a pipe, or too large
        raise UsageError(str(error)) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())[:200]}") from error
    except (ArithmeticError, AttributeError, LookupError) as error:  # PyYAML's own, of `!!int ""` and the like
        raise UsageError(f"{path}: not YAML: a tag that its value does not have") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected keys and values, found {type(content).__name__}")
    return content
