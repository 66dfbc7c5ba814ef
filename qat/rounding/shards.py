"""Tensors that lie in shards on several processes, gathered and shared out."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from k2quant.errors import MalformedFile


def like(value: Tensor, parameter: Tensor, *, file: object, name: str) -> Tensor:
    """Return a whole tensor as a parameter lies: on its device, and in its shards.

    Raises:
        MalformedFile: the shapes differ.
    """
    if value.shape != parameter.shape:
        raise MalformedFile(
            "another shape than the model's",
            tensor=name,
            file=file,
            expected=list(parameter.shape),
            found=list(value.shape),
        )
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        return distribute_tensor(value.to(sharded.device), sharded.device_mesh, sharded.placements)
    return value.to(parameter.device).clone()


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor lies in shards on several processes."""
    return type(tensor).__name__ == "DTensor"


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from its shards; every process has to ask."""
    found: Any = tensor.detach()
    gathered: Tensor = found.full_tensor() if is_sharded(tensor) else found
    return gathered
