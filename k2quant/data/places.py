"""Whether a path can be one of training data, as far as its name and the disk tell."""

from __future__ import annotations

import os
import re

ENDING = ".jsonl"
"""Of files of examples."""
_DATASET = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def no_data(path: str) -> str | None:
    """Say why a path is neither there nor a dataset's name. None where it is one of these."""
    if os.path.lexists(path) or (_DATASET.fullmatch(path) and not path.endswith(ENDING)):
        return None
    return "no such file or folder, and no name of a dataset such as org/name"
