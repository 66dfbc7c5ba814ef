"""What a file of a checkpoint's folder is, by its name."""

from __future__ import annotations

import re

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
REPORT = "k2quant_report.json"
INCOMPLETE = "INCOMPLETE"
"""A file that stands in the destination as long as it is not finished, and says so to whoever looks."""

_WEIGHTS = re.compile(
    r".*\.safetensors(\.index\.json)?|.*\.(pt|pth|ckpt|pkl|gguf|partial)"
    r"|(pytorch_model|model|consolidated|adapter_model|tf_model|training_args|optimizer|scheduler).*\.bin(\.index\.json)?",
)


def of_weights(name: str) -> bool:
    """Tell whether a file holds weights, or says where they are, by its plain name."""
    return _WEIGHTS.fullmatch(name) is not None


def fetched_at_once(path: str) -> bool:
    """Tell whether a file of a place, by its path below it, is wanted before anything is read: all but weights.

    Hidden files and folders do not count, as nowhere.
    """
    *folders, name = path.split("/")
    hidden = any(part.startswith(".") for part in (*folders, name))
    return path == INDEX or not (hidden or any(map(of_weights, (*folders, name))))
