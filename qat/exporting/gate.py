"""Equal bits or no export: what lies on the disk against what the forward pass uses, weight by weight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from k2quant.checkpoint.header import read_header
from k2quant.checkpoint.panels import panel_rows
from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.plan import Plan
from k2quant.errors import CheckFailed
from k2quant.formats.dtypes import torch_dtype
from k2quant.model.decoding import decoded_rows
from k2quant.qat.exporting.trained import Place, Trained
from k2quant.qat.preparing import Prepared
from k2quant.qat.rounding.targets import Target


def check_export(folder: Path, plan: Plan, trained: Trained) -> int:
    """Compare every weight of a model with the shards that stand in a folder; return how many were compared.

    The shards are read from the disk and decoded by the converter's own code. What they are compared with comes from
    the function that fills the forward pass's weights.

    Raises:
        CheckFailed: a value differs in a bit, and the message says which; or the model runs on values of older weights.
    """
    written = _written(folder, plan)
    for target, places in _by_target(trained).items():
        seen = None if target is None else _seen(trained.prepared, target)
        for name, place in places:
            values = place.tensor if seen is None or place.part is None else place.part.of(seen)
            _compare(written, name, trained, values)
    return len(trained.places)


def _written(folder: Path, plan: Plan) -> Checkpoint:
    shards = {shard.file: read_header(folder / shard.file) for shard in plan.shards}
    entries = {entry.name: entry for job in plan.jobs() for entry in job.outputs.values()}
    return Checkpoint(folder, shards, entries, (), None)


def _by_target(trained: Trained) -> dict[Target | None, list[tuple[str, Place]]]:
    groups: dict[Target | None, list[tuple[str, Place]]] = {}
    for name, place in trained.places.items():
        groups.setdefault(place.target, []).append((name, place))
    return groups


def _seen(prepared: Prepared, target: Target) -> Tensor:
    """Return what the forward pass sees of a parameter, BF16."""
    out = torch.empty_like(target.master, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    with torch.no_grad():
        prepared.fill(target, out)
    kept = prepared.kept(target)
    if kept is not None and not torch.equal(_bits(kept), _bits(out)):
        raise CheckFailed(
            "the forward pass runs on rounded values of older weights",
            tensor=target.name,
            remedy="after writing into a parameter's `.data`, call `prepared(model).refresh()`, and measure again",
        )
    return out


def _compare(written: Checkpoint, name: str, trained: Trained, seen: Tensor) -> None:
    job = trained.jobs[name]
    weight = StoredWeight(job.weight.base, job.written, job.weight.shape, job.outputs)
    columns = seen.shape[1] if seen.ndim == 2 else 1
    for start, stop, stored in _stored(written, weight):
        expected = seen.reshape(-1, columns)[start:stop].to("cpu")
        found = stored.reshape(expected.shape)
        if not torch.equal(_bits(found.to(expected.dtype)), _bits(expected)):
            _refuse(weight, start, found, expected)


def _stored(written: Checkpoint, weight: StoredWeight) -> Iterator[tuple[int, int, Tensor]]:
    """Yield first row, one past the last, and the values on the disk: decoded, or of what is no weight, as they are."""
    if weight.format is not None and weight.format.quantised:
        for start, stop in panel_rows(weight.shape):
            yield start, stop, decoded_rows(written, weight, start, stop)
        return
    data = bytearray(read_tensor(written, weight.main))
    values = torch.frombuffer(data, dtype=torch_dtype(weight.main.dtype)) if data else torch.empty(0)
    yield 0, max(values.numel(), 1), values


def _bits(values: Tensor) -> Tensor:
    """Return values with equal bits where they mean the same: -0 is 0, for INT4 has but one."""
    return (values.float() + 0.0).view(torch.int32)


def _refuse(weight: StoredWeight, start: int, found: Tensor, expected: Tensor) -> None:
    differing = (_bits(found.to(expected.dtype)) != _bits(expected)).nonzero()
    row, column = (int(place) for place in differing[0])
    raise CheckFailed(
        f"the export is not what was trained: {len(differing)} values differ, the first at row {start + row}, column "
        f"{column}",
        tensor=weight.base,
        file=weight.main.file,
        expected=float(expected[row, column]),
        found=float(found[row, column]),
        remedy="the folder was not finished: write it anew with `restart=True`; if that ends so too, the disk is "
        "failing, or this machine computes otherwise than the one that trained",
    )
