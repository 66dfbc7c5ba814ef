"""Open a place, and have its small files here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from k2quant.checkpoint.files.kinds import fetched_at_once
from k2quant.checkpoint.remote.address import HUB, Address
from k2quant.checkpoint.remote.place import Place
from k2quant.errors import CheckpointError
from k2quant.ground.units import size

_SMALL = 4_000_000_000  # bytes of all files beside the weights; K2's are some 30 MB


class OpenedPlace(Place, Protocol):
    """A place as this module opens it."""

    def local(self, name: str) -> Path | None:
        """Return where a file lies here already, whole; None where it does not."""

    def folder(self, names: Iterable[str]) -> Path:
        """Return a local folder that holds these files, by their paths below it."""


def open_place(address: Address) -> OpenedPlace:
    """List what lies at an address; on a hub at one commit.

    Raises:
        CheckpointError: there is nothing, it may not be read, or cannot be reached.
        MissingExtra: the library of that kind of place is not installed.
    """
    if address.scheme == HUB:
        from k2quant.checkpoint.remote.hub import open_hub

        return open_hub(address)
    from k2quant.checkpoint.remote.bucket import open_bucket

    return open_bucket(address)


def small_files(place: OpenedPlace) -> Path:
    """Return a local folder with all files of a place that hold no weights: index, config, tokenizer, code, licence.

    Raises:
        CheckpointError: they cannot be read, or are far larger than such files are.
        OutputError: they cannot be written.
    """
    wanted = [name for name in place.files if fetched_at_once(name)]
    count = sum(place.files[name].size for name in wanted)
    if count > _SMALL:
        largest = max(wanted, key=lambda name: place.files[name].size)
        raise CheckpointError(
            "too much beside the weights to be fetched unasked",
            file=place.address,
            expected=f"at most {size(_SMALL)}",
            found=f"{size(count)}, {largest!a} the largest",
            remedy="copy the checkpoint to a folder here first, without what is none of its files",
        )
    return place.folder(wanted)
