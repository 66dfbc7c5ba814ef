"""Which store an address names, as one that outputs are written to."""

from __future__ import annotations

from k2quant.checkpoint.remote.address import Address
from k2quant.checkpoint.writing.objects import Objects
from k2quant.errors import OutputError


def objects_of(address: Address) -> Objects:
    """Return what lies below an address.

    Raises:
        MissingExtra: the store's library is not installed.
        OutputError: nothing can be written to places of that kind.
    """
    if address.scheme == "hf":
        raise OutputError(
            "a hub takes no output while it is written",
            file=address,
            remedy=f"convert to a folder, then `k2quant push FOLDER {address}`",
        )
    if address.scheme == "s3":
        from k2quant.checkpoint.writing.s3 import S3Objects

        return S3Objects(address)
    return Objects(address)
