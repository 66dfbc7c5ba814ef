"""Where the user's caches lie."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path | None:
    """Return the folder of k2quant's own caches, which need not be there.

    None where the user has no home, as in containers: `~` would be a folder of whatever place a command is run in.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    caches = Path(given) if given.startswith("/") else Path(os.path.expanduser("~/.cache"))  # noqa: PTH111  it never raises
    return caches / "k2quant" if caches.is_absolute() else None
