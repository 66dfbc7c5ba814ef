"""Arguments that name a checkpoint: a folder here, or an address such as `hf://org/name`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from k2quant.checkpoint.remote.address import Address, spot

Place = Path | Address
"""What such an argument names."""


class _Place(click.ParamType[Place]):
    """A folder or an address; a path type of click would fold the slashes of `hf://` into one."""

    name = "place"

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,  # noqa: ARG002  click hands it to all
        ctx: click.Context | None,  # noqa: ARG002
    ) -> Place:
        """Return what the argument names.

        Raises:
            UsageError: it begins like an address, and is none.
        """
        return spot(os.fsdecode(value) if isinstance(value, bytes) else value)


PLACE = _Place()
"""The type of an argument that takes both."""
