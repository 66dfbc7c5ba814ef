"""A model on a Hugging Face hub: listed at one commit, read by that commit ever after.

Login, endpoint, cache and offline mode are huggingface_hub's own: HF_TOKEN and `hf auth login`, HF_ENDPOINT, HF_HOME,
HF_HUB_OFFLINE. Small files, and whole models that were downloaded before, lie in its cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from k2quant.checkpoint.remote import fetching
from k2quant.checkpoint.remote.address import Address
from k2quant.checkpoint.remote.listing import Listing, as_error, listed, of_a_client, refused
from k2quant.checkpoint.remote.place import RemoteFile
from k2quant.checkpoint.remote.ranges import Client, Ranges
from k2quant.checkpoint.remote.secrets import clean, guard
from k2quant.errors import CheckpointError, UsageError


class HubPlace:
    """A repository of a hub at one commit."""

    def __init__(self, asked: Address, listing: Listing) -> None:
        """Keep what the hub listed; see `open_hub`."""
        self.address = Address(asked.scheme, asked.path, listing.commit)
        self.files: Mapping[str, RemoteFile] = listing.files
        self._snapshot = listing.snapshot
        self._ranges = Ranges(_session, _headers, lambda answer, what: refused(answer, what, self.address))

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with a file's bytes from `start` on; see `Place.read_into`."""
        what = self.address.child(name)
        try:
            self._ranges.read_into(self._url(name), what, start, buffer, self.files[name].size)
        except Exception as error:  # a host that large files come from, whose certificate is none
            if not of_a_client(error):
                raise
            raise as_error(error, what, self.address) from None

    def fetch(self, name: str, target: Path, *, add: Callable[[int], None]) -> None:
        """Have a whole file at `target`, or nothing; see `Place.fetch`."""
        fetching.fetch(self, name, target, add=add)

    def local(self, name: str) -> Path | None:
        """Return where a file lies in the hub's own cache, whole as far as its size tells; None where it does not."""
        from huggingface_hub import try_to_load_from_cache

        if self._snapshot is not None:
            return self._snapshot / name
        found = try_to_load_from_cache(self.address.path, name, revision=self.address.revision)
        path = Path(found) if isinstance(found, str) else None
        return path if path is not None and path.is_file() and path.stat().st_size == self.files[name].size else None

    def folder(self, names: Iterable[str]) -> Path:
        """Return the folder of this commit in the hub's cache, with these files in it.

        Its path is made of the repository's name and the commit alone. huggingface_hub's own download goes by an ETag,
        which is whatever a server says, and may lead out of the cache.

        Raises:
            CheckpointError: one cannot be fetched.
            OutputError: one cannot be written.
        """
        if self._snapshot is not None:
            return self._snapshot
        wanted = list(names)
        if not wanted:
            raise CheckpointError("no checkpoint here", file=self.address, found="no file beside weights")
        folder = self._cache()
        fetching.fetch_all(self, wanted, folder, aside=folder.parents[1])
        return folder

    def _cache(self) -> Path:
        """Return where the hub's cache has this commit."""
        from huggingface_hub import constants

        name = constants.REPO_ID_SEPARATOR.join(("models", *self.address.path.split("/")))
        return Path(os.path.abspath(constants.HF_HUB_CACHE)) / name / "snapshots" / str(self.address.revision)  # noqa: PTH100  a link of the cache stays one

    def _url(self, name: str) -> str:
        from huggingface_hub import constants, hf_hub_url

        return hf_hub_url(self.address.path, name, revision=self.address.revision, endpoint=constants.ENDPOINT)


def open_hub(address: Address) -> HubPlace:
    """List a repository, with its revision resolved to a commit.

    Raises:
        CheckpointError: there is none, it may not be read, or the hub cannot be reached.
    """
    return HubPlace(address, listed(address, _session, _headers))


def _session() -> Client:
    """Return huggingface_hub's client: proxies and certificates are set there, and it keeps connections.

    Raises:
        UsageError: the environment names a proxy that it cannot use.
    """
    from huggingface_hub import get_session

    guard("huggingface_hub")
    try:
        client: Any = get_session()  # of httpx or its successor, as the release of huggingface_hub has it
    except (ValueError, ImportError) as error:  # an address that is none, or SOCKS without its package
        said = clean(" ".join(str(error).split()))[:300]
        raise UsageError(f"a proxy of the environment, such as HTTPS_PROXY, cannot be used: {said}") from None
    return cast("Client", client)


def _headers() -> dict[str, str]:
    """Return what goes to the hub and to nobody else: who asks, and the token."""
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    from k2quant.ground.version import __version__

    return dict(build_hf_headers(library_name="k2quant", library_version=__version__))
