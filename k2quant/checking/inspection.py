"""What is in a checkpoint, from its index, headers and config alone."""

from __future__ import annotations

import os
from math import prod
from typing import Any, NamedTuple

from k2quant.checkpoint.beside import other_files
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.remote.address import Address, spot
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.conversion.metadata import carrying, config, relatives
from k2quant.conversion.metadata.promises import broken_promises, inventory
from k2quant.errors import CheckpointError
from k2quant.ground import engines, names
from k2quant.ground.saying.showing import as_html, brief
from k2quant.ground.units import size


class ClassRow(NamedTuple):
    """The tensors of one class in one format."""

    tensor_class: str
    format: str
    """Such as `bf16`, `fp8 128x128`, `int4 group 32`, or a dtype for tensors that are no weights."""
    tensors: int
    """Tensors, partners included."""
    weights: int
    """Elements, partners not included."""
    nbytes: int


class Inspection(NamedTuple):
    """What a checkpoint holds."""

    folder: str
    rows: list[ClassRow]
    shards: int
    tensors: int
    nbytes: int
    """Bytes of tensor data."""
    layers: int
    """Decoder layers that have tensors."""
    experts: int
    """Routed experts of the layer that has most."""
    model_type: str | None
    quantization: dict[str, Any] | None
    """The first quantization block of the config."""
    unlisted: list[str]
    """Tensors in the shards that the index names nowhere."""
    stale: list[str]
    """Old copies: tensors in the shards that the index looks for in another place."""
    problems: list[str]
    """What would stop a conversion."""
    remarks: list[str]
    """What is worth saying, though it stops nothing."""
    traffic: int | None = None
    """Bytes that reading all of it would bring over a network; None where it is all here."""
    rate: float | None = None
    """Bytes a second at which its headers came over that network."""

    def facts(self) -> dict[str, object]:
        """Return what it comes to, in a few words."""
        formats = sorted({row.format for row in self.rows})
        sizes = {"size": size(self.nbytes), "tensors": self.tensors, "shards": self.shards}
        parts = {"layers": self.layers, "experts": self.experts, "formats": ", ".join(formats)}
        said = {"problems": len(self.problems), "remarks": len(self.remarks)}
        return {"folder": self.folder, "model_type": self.model_type, **sizes, **parts, **said}

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def _repr_html_(self) -> str:
        """Return it as a small table, for notebooks."""
        return as_html(self)


def inspect(folder: str | os.PathLike[str] | Address, *, follow_links: bool = False) -> Inspection:
    """Describe a checkpoint without reading a weight.

    Args:
        folder: of the checkpoint, or its address.
        follow_links: whether its links may lead out of it.

    Raises:
        CheckpointError: the folder holds no checkpoint, or its index or a header lies.
    """
    checkpoint = open_checkpoint(spot(folder), follow_links=follow_links)
    weights, problems = group_tensors(checkpoint.tensors)
    wrong = _config_problems(checkpoint, weights)
    found, stale = inventory(weights), frozenset(checkpoint.stale)
    return Inspection(
        folder=str(folder if checkpoint.supply is None else checkpoint.place),
        rows=_rows(weights),
        shards=len(checkpoint.shards),
        tensors=len(checkpoint.tensors),
        nbytes=sum(entry.nbytes for entry in checkpoint.tensors.values()),
        layers=len(found.prefixes),
        experts=max(map(len, found.experts.values()), default=0),
        model_type=_model_type(checkpoint),
        quantization=_quantization(checkpoint),
        unlisted=[name for name in checkpoint.unlisted if name not in stale],
        stale=[name for name in checkpoint.unlisted if name in stale],
        problems=[str(problem) for problem in problems + wrong + _file_problems(checkpoint)],
        remarks=[] if problems else _remarks(checkpoint, weights, sound=not wrong),  # of a part nothing can be said
        traffic=_traffic(checkpoint),
        rate=checkpoint.rate,
    )


def _traffic(checkpoint: Checkpoint) -> int | None:
    coming = [shard.size for shard in checkpoint.shards.values() if shard.supply is not None]
    return sum(coming) if coming else None


def _remarks(checkpoint: Checkpoint, weights: list[StoredWeight], *, sound: bool) -> list[str]:
    """Return what is worth saying; of what the config carries along only where it is sound."""
    return [
        *relatives.remarks(checkpoint.config, weights),
        *_of_splits(weights),
        *broken_promises(checkpoint.config, inventory(weights)),
        *(carrying.remarks(checkpoint.config, weights) if sound else ()),
    ]


def _file_problems(checkpoint: Checkpoint) -> list[CheckpointError]:
    """Look at the files that a conversion copies along."""
    try:
        other_files(checkpoint)
    except CheckpointError as problem:
        return [problem]
    except OSError as error:
        return [CheckpointError("cannot be read", file=error.filename or checkpoint.place, found=error.strerror)]
    return []


def _config_problems(checkpoint: Checkpoint, weights: list[StoredWeight]) -> list[CheckpointError]:
    try:
        config.check_source(checkpoint.config, weights)
    except CheckpointError as problem:
        return [problem]
    return []


def _of_splits(weights: list[StoredWeight]) -> list[str]:
    stored = ((weight.base, weight.format.name) for weight in weights if weight.format is not None)
    return relatives.split_remarks(engines.splits(stored), "the checkpoint")


def _model_type(checkpoint: Checkpoint) -> str | None:
    found = (checkpoint.config or {}).get("model_type")
    return relatives.shown(found) if found is not None else None


def _quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    try:
        blocks = config.quantization_blocks(checkpoint.config or {})
    except CheckpointError:
        return None
    return blocks[0] if blocks else None


def _rows(weights: list[StoredWeight]) -> list[ClassRow]:
    found: dict[tuple[str, str], ClassRow] = {}
    for weight in weights:
        key = (
            names.tensor_class(weight.main.name),
            weight.format.label if weight.format else weight.main.dtype.lower(),
        )
        row = found.get(key, ClassRow(*key, 0, 0, 0))
        found[key] = row._replace(
            tensors=row.tensors + len(weight.parts),
            weights=row.weights + prod(weight.shape),
            nbytes=row.nbytes + weight.nbytes,
        )
    return sorted(found.values(), key=lambda row: (names.TENSOR_CLASSES.index(row.tensor_class), row.format))
