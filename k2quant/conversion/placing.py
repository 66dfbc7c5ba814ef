"""Where everything goes in an output: which weight in which shard, each tensor at which byte."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from k2quant.checkpoint.header import TensorEntry, build_header
from k2quant.checkpoint.panels import PIECE_BYTES
from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.recipes.recipe import Recipe
from k2quant.errors import ShapeMismatch
from k2quant.formats.dtypes import TensorSpec
from k2quant.formats.format import Format
from k2quant.ground.saying.showing import brief

if TYPE_CHECKING:
    from k2quant.checkpoint.reader import Checkpoint


class Job(NamedTuple):
    """One weight on its way."""

    weight: StoredWeight
    target: Format | None
    """None: copied byte for byte."""
    outputs: dict[str, TensorEntry]
    """Where its tensors will lie in the output shard, by suffix."""
    name: str
    """What the output calls it, without a suffix."""
    settled: Format | None = None
    """In place of `target`, once a survey of all its values has decided what `target` leaves open."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def written(self) -> Format | None:
        """The format in which it is written; None for a tensor that is no weight."""
        return self.settled or self.target or self.weight.format

    @property
    def output_main(self) -> TensorEntry:
        """The output tensor that carries the values."""
        return self.outputs[self.written.main] if self.written else next(iter(self.outputs.values()))


def target_of(job: Job) -> Format:
    """Return the format that a weight is converted to, settled where that was done.

    Raises:
        TypeError: it is copied.
    """
    if job.target is None:
        msg = f"{job.name} is copied, not converted"  # never asked
        raise TypeError(msg)
    return job.settled or job.target


class ShardPlan(NamedTuple):
    """One output shard."""

    file: str
    header: bytes
    """The first bytes of the file."""
    size: int
    """Bytes of the whole file."""
    jobs: tuple[Job, ...]

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def bytes_read(self) -> int:
        """Bytes of the source that its jobs read."""
        return sum(job.weight.nbytes for job in self.jobs)

    def ranges(self) -> Iterator[tuple[str, int, int]]:
        """Yield what is read of the source, in about the order in which it is: file, first byte, one past the last.

        Panels of a weight's tensors are read in turn, so large ones stand here in slices.
        """
        for job in self.jobs:
            stored = job.weight.format
            taken = job.weight.parts if job.target is None or stored is None else stored.streamed
            parts = [job.weight.parts[suffix] for suffix in taken]
            slices = max((-(-entry.nbytes // PIECE_BYTES) for entry in parts), default=0)
            for number in range(slices):
                for entry in parts:
                    start, stop = (entry.start + entry.nbytes * edge // slices for edge in (number, number + 1))
                    if start < stop:
                        yield entry.file, start, stop


class Placed(Protocol):
    """What a stream carries out: the plan of a conversion, or of an export."""

    @property
    def source(self) -> Checkpoint:
        """The checkpoint that is read."""

    @property
    def shards(self) -> tuple[ShardPlan, ...]:
        """What is finished one by one: files, or parts of some."""

    def jobs(self) -> Iterator[Job]:
        """Yield every job, shard by shard."""


class Output(NamedTuple):
    """A weight as it will be written, before it has a place."""

    weight: StoredWeight
    target: Format | None
    state: dict[str, TensorSpec]
    """Its tensors, by suffix."""
    name: str
    """What the output calls it, without a suffix."""

    def full(self, suffix: str) -> str:
        """Return the name of one of its tensors."""
        return f"{self.name}.{suffix}" if self.name else suffix

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(spec.nbytes for spec in self.state.values())


def place(weights: Iterable[StoredWeight], recipe: Recipe, shard_size: int | None) -> tuple[ShardPlan, ...]:
    """Return the output shards in order.

    Args:
        weights: of the source, in its order.
        recipe: which of them gets which format.
        shard_size: the most bytes of tensors in a shard, a larger weight has its own; None: the source's shards.

    Raises:
        ShapeMismatch: a weight cannot be stored in its format.
    """
    outputs = [_output(weight, recipe.format_of(weight)) for weight in weights]
    if shard_size is None:
        by_file: dict[str, list[Output]] = {}
        for output in outputs:
            by_file.setdefault(output.weight.main.file, []).append(output)
        return tuple(_shard(file, group) for file, group in by_file.items())
    groups = _filled(outputs, shard_size)
    return tuple(
        _shard(f"model-{number:05}-of-{len(groups):05}.safetensors", group) for number, group in enumerate(groups, 1)
    )


def _output(weight: StoredWeight, target: Format | None) -> Output:
    return Output(weight, target, output_specs(weight, target), weight.base)


def output_specs(weight: StoredWeight, target: Format | None) -> dict[str, TensorSpec]:
    """Return the tensors that a weight becomes, by suffix.

    Raises:
        ShapeMismatch: it cannot be stored in this format.
    """
    if target is None:
        return {suffix: TensorSpec(entry.dtype, entry.shape) for suffix, entry in weight.parts.items()}
    if target.quantised and (len(weight.shape) != 2 or not weight.main.nbytes):
        raise ShapeMismatch(
            "only a matrix can be quantised",
            tensor=weight.main.name,
            file=weight.main.file,
            expected="[N, K]",
            found=weight.shape,
            remedy="keep it out of the conversion with `ignore=`",
        )
    return target.state(weight.shape, name=weight.main.name)


def _filled(outputs: Iterable[Output], shard_size: int) -> list[list[Output]]:
    """Share weights out among shards, in order, each as full as it may be."""
    groups: list[list[Output]] = []
    room = 0
    for output in outputs:
        if not groups or output.nbytes > room:
            groups.append([])
            room = shard_size
        groups[-1].append(output)
        room -= output.nbytes
    return groups


def _shard(file: str, group: list[Output]) -> ShardPlan:
    specs = {output.full(suffix): spec for output in group for suffix, spec in output.state.items()}
    header, spans = build_header(specs)
    jobs = tuple(
        Job(
            output.weight,
            output.target,
            {
                suffix: TensorEntry(name, spec.dtype, spec.shape, file, *spans[name])
                for suffix, spec in output.state.items()
                for name in (output.full(suffix),)
            },
            output.name,
        )
        for output in group
    )
    return ShardPlan(file, header, max((stop for _, stop in spans.values()), default=len(header)), jobs)


def index_of(shards: tuple[ShardPlan, ...]) -> bytes:
    """Return the index of an output, whole."""
    entries = [entry for shard in shards for job in shard.jobs for entry in job.outputs.values()]
    return as_json(
        {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
            "weight_map": {entry.name: entry.file for entry in sorted(entries, key=lambda entry: entry.name)},
        }
    )


def as_json(value: dict[str, Any]) -> bytes:
    """Return a file of JSON as releases have it."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
