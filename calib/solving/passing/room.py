"""What is kept of the tokens of a layer: in memory, or in files that memory maps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from k2quant.checkpoint.files.paths import as_output_error


class Room:
    """Tensors with a place each; their values mean nothing after a kill."""

    def __init__(self, folder: Path, memory: int) -> None:
        """Take a folder, whose content is thrown away.

        Args:
            folder: for files; made when it is needed.
            memory: bytes; a tensor for which too few of them are left lies in a file.
        """
        self._folder, self._left = folder, memory
        self.clear()

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor with whatever content.

        Args:
            name: of its file.
            shape: its shape.
            dtype: its dtype.

        Raises:
            OutputError: the disk is full or fails.
        """
        nbytes = prod(shape) * dtype.itemsize
        if nbytes <= self._left:
            self._left -= nbytes
            return torch.empty(tuple(shape), dtype=dtype)
        path = self._folder / f"{name}.bin"
        with as_output_error(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:  # every byte has its place on the disk before memory maps it: a full one is an error, and no SIGBUS
                os.posix_fallocate(descriptor, 0, nbytes)
            finally:
                os.close(descriptor)
            return torch.from_file(str(path), shared=True, size=prod(shape), dtype=dtype).view(*shape)

    def clear(self) -> None:
        """Remove the files; what is mapped stays as long as its tensor."""
        with as_output_error(self._folder):
            if self._folder.is_dir():
                shutil.rmtree(self._folder)
