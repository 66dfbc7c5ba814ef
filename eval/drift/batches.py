"""What two models made of one batch of a text: all that the figures of the whole text need of it.

Batches know nothing of each other, so whoever measures one gets the same, whatever else is measured beside it; and what
is taken over the whole text (means, percentiles, products with the head) is taken when all are there, in their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from k2quant.checkpoint.files.paths import check_inside, read_limited, replacing, write_all
from k2quant.checkpoint.header import TensorEntry, build_header, read_header
from k2quant.errors import CheckpointError, MalformedFile
from k2quant.formats.dtypes import DTYPES, TensorSpec, as_memory, torch_dtype

_ROWS = 5
"""Figures of a predicted token, see `Measured.scores`."""
_RUN, _SEAL = "run", "seal"
_DIGEST = TensorSpec("U8", (32,))
_HEADER = 2**16
"""Bytes that a header of six tensors stays far below."""


class Measured(NamedTuple):
    """One batch of `B` chunks of `T` tokens, `n` of which are predicted and `m` read out early; on the CPU.

    The first of two is the baseline, the second the candidate. There are `L` layers, `R` of them with a router.
    """

    scores: Tensor
    """float64 `[5, n]`: KL, reverse KL, -ln p of what came by both models, and 1 where the likeliest is the same."""
    sums: Tensor
    """float64 `[L, 3]`: over the tokens, squared error and energy of the hidden states, and their cosines."""
    routes: Tensor
    """int32 `[2, R, B * T, k]`: the experts of each token."""
    early: Tensor
    """`[2, L, m, H]`, as activations are: the hidden states at some places."""


class Layout(NamedTuple):
    """What a batch must be like, as text, models and options have it."""

    scored: int
    tokens: int
    places: int
    layers: int
    routers: int
    experts: int
    chosen: int
    hidden: int
    dtype: torch.dtype

    def specs(self) -> dict[str, TensorSpec]:
        """Return what is expected, by the fields of `Measured`."""
        activations = next(name for name, dtype in DTYPES.items() if dtype.torch == str(self.dtype).split(".")[1])
        return {
            "scores": TensorSpec("F64", (_ROWS, self.scored)),
            "sums": TensorSpec("F64", (self.layers, 3)),
            "routes": TensorSpec("I32", (2, self.routers, self.tokens, self.chosen)),
            "early": TensorSpec(activations, (2, self.layers, self.places, self.hidden)),
        }


def save(path: Path, measured: Measured, layout: Layout, *, run: bytes, attempt: str) -> None:
    """Write a batch into a safetensors file, which is whole or not there.

    Args:
        path: of the file.
        measured: what was measured.
        layout: what it is like.
        run: 32 bytes, what it was measured for.
        attempt: letters that no other process has which may write the same file.

    Raises:
        OSError: it cannot be written.
    """
    values = measured._asdict()
    specs = {**layout.specs(), _RUN: _DIGEST, _SEAL: _DIGEST}
    values[_RUN] = torch.frombuffer(bytearray(run), dtype=torch.uint8)
    values[_SEAL] = torch.frombuffer(bytearray(_seal(path.name, values, run)), dtype=torch.uint8)
    header, spans = build_header(specs)
    with replacing(path, attempt) as descriptor:
        write_all(descriptor, header, 0)
        for name, value in values.items():
            write_all(descriptor, as_memory(value.contiguous()), spans[name][0])


def load(path: Path, layout: Layout, *, run: bytes) -> Measured:
    """Read a batch, trusting nothing in its file.

    Args:
        path: of the file.
        layout: what the batch must be like.
        run: 32 bytes, what it must have been measured for.

    Raises:
        MalformedFile: it is not what was written, or no measurement of such a batch.
    """
    remedy = "delete it and run its part again"
    try:
        values = _values(path, {**layout.specs(), _RUN: _DIGEST, _SEAL: _DIGEST})
    except OSError as error:
        raise MalformedFile("cannot be read", file=path, found=error.strerror, remedy=remedy) from error
    except CheckpointError as error:
        raise type(error)(
            error.message, file=error.file, expected=error.expected, found=error.found, remedy=remedy
        ) from error
    if bytes(as_memory(values.pop(_RUN))) != run:
        remedy = "delete it, or name another file for the result"
        raise MalformedFile("measured by another run", file=path, remedy=remedy)
    if bytes(as_memory(values.pop(_SEAL))) != _seal(path.name, values, run):
        raise MalformedFile("not what was written", file=path, found="another SHA-256", remedy=remedy)
    wrong = _wrong(Measured(**values), layout)
    if wrong:
        raise MalformedFile(wrong, file=path, remedy=remedy)
    return Measured(**values)


def _values(path: Path, specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
    check_inside(path.parent, path)
    data = memoryview(read_limited(path, _HEADER + sum(spec.nbytes for spec in specs.values())))
    header = read_header(path)
    found = {name: TensorSpec(entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    if found != dict(specs) or header.size != len(data):
        raise MalformedFile("no measurement of this batch", file=path, expected=_said(specs), found=_said(found))
    return {name: _value(data, entry) for name, entry in header.tensors.items()}


def _value(data: memoryview, entry: TensorEntry) -> Tensor:
    value = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
    as_memory(value)[:] = data[entry.start : entry.stop]
    return value


def _said(specs: Mapping[str, TensorSpec]) -> str:
    return ", ".join(f"{name} {spec.dtype} {list(spec.shape)}" for name, spec in sorted(specs.items()))[:500]


def _seal(name: str, values: Mapping[str, Any], run: bytes) -> bytes:
    """Return the SHA-256 of what a file of this name holds."""
    digest = hashlib.sha256(f"{name} ".encode() + run)
    for field in Measured._fields:
        digest.update(as_memory(values[field].contiguous()))
    return digest.digest()


def _wrong(measured: Measured, layout: Layout) -> str | None:
    """Say what no models give."""
    for name in ("scores", "sums", "early"):
        if not bool(getattr(measured, name).isfinite().all()):
            return f"`{name}` holds NaN or infinity"
    routes = measured.routes
    if routes.numel() and not 0 <= int(routes.min()) <= int(routes.max()) < layout.experts:
        return f"`routes` names an expert that is none of {layout.experts}"
    return None
