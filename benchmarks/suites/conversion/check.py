"""Compare two conversions of one source, tensor by tensor, without k2quant; print the result as JSON.

Usage: check.py REFERENCE OURS THEIRS

The matrices of two experts are decoded to float32 and held against REFERENCE, the BF16 checkpoint of the same
weights; for "same bits", all tensors of both are compared. Needs torch and safetensors.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

COMPARED = re.compile(r"experts\.[01]\.\w+_proj$|kv_a_proj_with_mqa$")
"""All matrices of two experts; the others are the same few, rolled."""


class Folder:
    """A checkpoint's tensors by name, whatever its shards are called."""

    def __init__(self, path: str) -> None:
        """Read the headers of all shards."""
        files: list[Any] = [safe_open(file, framework="pt") for file in sorted(Path(path).glob("*.safetensors"))]
        self.where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping

    def tensor(self, name: str) -> torch.Tensor | None:
        """Return a tensor, or nothing if the checkpoint has none of that name."""
        found: torch.Tensor | None = self.where[name].get_tensor(name) if name in self.where else None
        return found

    def decoded(self, module: str) -> torch.Tensor:
        """Return a matrix as float32 `[N, K]`, whatever its format."""
        words, scale = self.tensor(f"{module}.weight_packed"), self.tensor(f"{module}.weight_scale")
        if words is not None and scale is not None:
            nibbles = (words[..., None] >> torch.arange(0, 32, 4)) & 15
            codes = (nibbles - 8).flatten(1).view(*scale.shape, -1)
            return (codes.float() * scale.float()[..., None]).flatten(1)
        weight, inverse = self.tensor(f"{module}.weight"), self.tensor(f"{module}.weight_scale_inv")
        if weight is None:
            raise SystemExit(f"{module}: no weight")
        scale = scale if inverse is None else inverse
        if scale is None:
            return weight.float()
        spread = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        return weight.float() * spread[: weight.shape[0], : weight.shape[1]]


def errors(reference: Folder, converted: Folder) -> dict[str, float]:
    """Return the error over those matrices, relative to the reference's root mean square."""
    squares = power = largest = 0.0
    for name in reference.where:
        module, _, kind = name.rpartition(".")
        if kind == "weight" and COMPARED.search(module):
            wanted = reference.decoded(module)
            difference = (converted.decoded(module) - wanted).abs()
            squares += float(difference.square().sum(dtype=torch.float64))
            power += float(wanted.square().sum(dtype=torch.float64))
            largest = max(largest, float(difference.max()))
    return {"relative_rms": (squares / power) ** 0.5, "largest": largest}


def same_bits(ours: Folder, theirs: Folder) -> bool:
    """Say whether both hold the same tensors with the same bytes."""
    if ours.where.keys() != theirs.where.keys():
        return False
    for name in ours.where:
        one, other = ours.tensor(name), theirs.tensor(name)
        if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
            return False
        if not torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)):
            return False
    return True


def main(reference: str, ours: str, theirs: str) -> None:
    """Print the comparison."""
    truth, mine, other = Folder(reference), Folder(ours), Folder(theirs)
    result = {"k2quant": errors(truth, mine), "peer": errors(truth, other), "same_bits": same_bits(mine, other)}
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
