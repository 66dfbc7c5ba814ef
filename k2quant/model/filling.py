"""Read weights from a checkpoint into the memory of a model's modules.

A file is read straight into the tensors that stay, so that loading takes the size of the packed model and little more.
Where memory differs from the file (another dtype, device or layout) a window of a few megabytes lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.panels import panel_rows
from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.reading import read_into
from k2quant.checkpoint.weights import StoredWeight
from k2quant.errors import BadValue, UsageError
from k2quant.formats.dtypes import as_memory, torch_dtype
from k2quant.ground import pool
from k2quant.ground.pool import available_cores
from k2quant.model.assembly import Assembly, Placed, own_tensors
from k2quant.model.decoding import decoded_rows
from k2quant.model.matrices import Dense, Parts
from k2quant.model.modules import Quantized

Progress = Callable[[int, int], None]
"""Called with the bytes read and all bytes."""

WINDOW = 2**24
"""Bytes of a tensor that is not quantised which a thread reads at once."""

READERS = 8
"""Threads at most: each may hold a window, and reading is the disk's work."""


class _Task(NamedTuple):
    """A weight to be read, or some rows of one that is not quantised."""

    placed: Placed
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes that it reads."""
        total = self.placed.source.nbytes
        if not isinstance(self.placed.matrix, Dense):
            return total
        return total * (self.stop - self.start) // max(_rows(self.placed.source), 1)


def fill(
    assembly: Assembly,
    modules: Iterable[tuple[str, nn.Module, torch.device]],
    *,
    progress: Progress | None = None,
) -> None:
    """Give modules memory on their devices and read their weights into it; their children are left out.

    Args:
        assembly: the model and its checkpoint.
        modules: names within the model, modules and devices.
        progress: called as the work goes on.

    Raises:
        CheckpointError: a file cannot be read, or holds values that no weight can hold.
    """
    tasks: list[_Task] = []
    for name, module, device in modules:
        allocate(module, device, assembly.dtype)
        for placed in assembly.placed(name, module):
            tasks += _tasks(placed)
    total, done = sum(task.nbytes for task in tasks), [0]

    def work(task: _Task) -> None:
        _read(assembly.checkpoint, task)
        done[0] += task.nbytes  # only a display: a lost update does no harm

    def tick() -> None:
        if progress:
            progress(done[0], total)

    pool.run(iter(tasks), work, workers=min(available_cores(), READERS), tick=tick)
    if progress:
        progress(total, total)


def allocate(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give a module's own tensors memory on a device, with whatever content.

    What is not quantised gets `dtype`, buffers such as the router's correction bias aside, which stay float32.
    """
    if isinstance(module, Quantized):
        module.replace(lambda weight: weight.empty_like(device))
    for name, tensor in list(own_tensors(module)):
        if isinstance(tensor, nn.Parameter):
            value = torch.empty(tensor.shape, dtype=dtype, device=device)
            module.register_parameter(name, nn.Parameter(value, requires_grad=tensor.requires_grad))
        else:
            module.register_buffer(name, torch.empty(tensor.shape, dtype=torch.float32, device=device))


def release(module: nn.Module, dtype: torch.dtype) -> None:
    """Take the memory of a module's own tensors away, dtypes and shapes aside."""
    allocate(module, torch.device("meta"), dtype)


def _tasks(placed: Placed) -> Iterator[_Task]:
    """Cut what is not quantised into rows, which can be read and converted in any order."""
    if not isinstance(placed.matrix, Dense):
        yield _Task(placed, 0, 0)
        return
    if _is_packed(placed.source):
        yield from (_Task(placed, start, stop) for start, stop in panel_rows(placed.source.shape))
        return
    rows = _rows(placed.source)
    step = max(WINDOW // max(placed.source.main.nbytes // max(rows, 1), 1), 1)
    for start in range(0, rows, step):
        yield _Task(placed, start, min(start + step, rows))


def _rows(source: StoredWeight) -> int:
    return source.shape[0] if source.shape else 1


def _is_packed(source: StoredWeight) -> bool:
    return source.format is not None and source.format.quantised


def _read(checkpoint: Checkpoint, task: _Task) -> None:
    source, matrix = task.placed
    if isinstance(matrix, Dense) and _is_packed(source):
        matrix.tensor.detach()[task.start : task.stop] = decoded_rows(checkpoint, source, task.start, task.stop)
        return
    if isinstance(matrix, Dense):
        _read_rows(checkpoint, next(iter(source.parts.values())), matrix.tensor.detach(), task.start, task.stop)
        return
    parts = matrix.parts() if matrix.views and _on_cpu(matrix.parts()) else None
    entries = task.placed.entries
    if parts is None:
        parts = {suffix: _empty(entry) for suffix, entry in entries.items()}
    for suffix, entry in entries.items():
        read_tensor_into(checkpoint, entry, parts[suffix])
    try:
        matrix.put(parts)
    except UsageError as error:
        raise BadValue(str(error), tensor=source.main.name, file=source.main.file) from error


def _on_cpu(parts: Parts) -> bool:
    return all(tensor.device.type == "cpu" for tensor in parts.values())


def _empty(entry: TensorEntry) -> Tensor:
    return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))


def _read_rows(checkpoint: Checkpoint, entry: TensorEntry, tensor: Tensor, start: int, stop: int) -> None:
    """Read some rows of a tensor, in place where they lie as in the file."""
    rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
    target = rows[start:stop]
    dtype = torch_dtype(entry.dtype)
    step = prod(entry.shape[1:]) * dtype.itemsize
    part = entry._replace(start=entry.start + start * step, stop=entry.start + stop * step)
    if target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous():
        read_tensor_into(checkpoint, part, target)
        return
    window = torch.empty(target.shape, dtype=dtype)
    read_tensor_into(checkpoint, part, window)
    target.copy_(window)


def read_tensor_into(checkpoint: Checkpoint, entry: TensorEntry, tensor: Tensor) -> None:
    """Fill a contiguous CPU tensor with the bytes of one in a checkpoint."""
    read_into(checkpoint.shards[entry.file], entry.start, as_memory(tensor))
