"""What a checkpoint's files hold, byte for byte: what sizes and times cannot tell of a copy, or of a damaged disk."""

from __future__ import annotations

import hashlib
import os

from k2quant.checkpoint.files.paths import open_regular
from k2quant.checkpoint.reader import CONFIG, Checkpoint
from k2quant.errors import CheckpointError
from k2quant.ground import pool


def contents(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the sha256 of every shard that the index names, and of the config, by file name. Every byte is read.

    Raises:
        CheckpointError: a file cannot be read.
    """
    paths = {name: shard.path for name, shard in checkpoint.shards.items()}
    if checkpoint.config is not None:
        paths[CONFIG] = checkpoint.folder / CONFIG
    found: dict[str, str] = {}

    def work(name: str) -> None:
        try:
            with os.fdopen(open_regular(paths[name]), "rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError("cannot be read", file=paths[name], found=error.strerror or str(error)) from error

    pool.run(iter(paths), work, workers=min(len(paths), os.cpu_count() or 1))
    return {name: found[name] for name in paths}
