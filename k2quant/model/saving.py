"""Write a model back as the checkpoint that it came from.

The shards keep their headers, so a model that nobody changed gives the very bytes back. Tensors that the model does
without (vision, projector, stray buffers) and other files come from the source.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k2quant.checkpoint.beside import other_files
from k2quant.checkpoint.files.paths import copy_file, read_limited, write_whole
from k2quant.checkpoint.header import ShardHeader, TensorEntry
from k2quant.checkpoint.reader import CONFIG, INCOMPLETE, INDEX, Checkpoint
from k2quant.checkpoint.reading import read_into
from k2quant.checkpoint.writing.writer import ShardWriter
from k2quant.errors import DestinationForeign, MissingTensor, OutputError, UsageError
from k2quant.formats.dtypes import as_memory, torch_dtype
from k2quant.ground import names
from k2quant.model.assembly import Assembled, Placed
from k2quant.model.filling import WINDOW
from k2quant.model.matrices import Matrix


def save_model(model: Assembled, folder: str | os.PathLike[str], *, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a loaded model as a checkpoint with the shards, names and formats of the one it came from.

    Unchanged weights give the source's bytes, where loading did not round them (as it does F16 and F32 to BF16). A
    part that waits on disk comes from there. The report of the conversion that made the source is not copied.

    Args:
        model: from `load_model`.
        folder: where; files that are there already are never overwritten.
        state: tensors that take the place of the model's own, named as its `state_dict` names them.

    Raises:
        DestinationForeign: the folder holds a checkpoint.
        OutputError: the disk is full or fails; the folder says that it is incomplete.
        UsageError: `state` does not fit; nothing is written.
        CheckpointError: the source, where it is needed, cannot be read any more.
    """
    there, source = Path(folder), model.checkpoint
    _refuse_overwriting(there, source)
    tensors = _Tensors(model, state)
    try:
        there.mkdir(parents=True, exist_ok=True)
        write_whole(there / INCOMPLETE, _MARK)
        for shard in source.shards.values():
            _write_shard(there / shard.path.name, shard, source, tensors)
        _write_rest(there, source)
        (there / INCOMPLETE).unlink()
    except OSError as error:
        raise OutputError(
            "cannot be written", file=error.filename or there, found=error.strerror or str(error)
        ) from error


def save_pretrained(
    model: Assembled,
    folder: Any,
    is_main_process: bool = True,  # noqa: FBT001, FBT002  transformers' signature
    state_dict: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> None:
    """Answer transformers' `save_pretrained`: its options `state_dict` and `is_main_process`, and no other.

    Raises:
        UsageError: an option that has no meaning here.
    """
    ignored = {"safe_serialization", "save_function", "max_shard_size", "save_original_format"}
    asked = {name for name, value in options.items() if value and name not in ignored}
    if asked:
        raise UsageError(f"save_pretrained: {', '.join(sorted(asked))} has no meaning for a K2 checkpoint")
    if is_main_process:
        save_model(model, folder, state=state_dict)


class _Tensors:
    """Where the tensors of a checkpoint are in a model, by their names in the checkpoint."""

    def __init__(self, model: Assembled, state: Mapping[str, Tensor] | None) -> None:
        """Find them, and check what is given instead of some.

        Raises:
            UsageError: the given state has a tensor that the model has not, or one that does not fit.
        """
        self._places: dict[str, tuple[Matrix, str]] = {}
        self._given: dict[str, Tensor] = {}
        if not isinstance(state, Mapping | None):
            raise UsageError(f"state: expected a map from names to tensors, found {type(state).__name__}")
        rest = dict(state or {})
        for name, module in model.named_modules():
            for placed in _placed(model, name, module):
                self._places |= {entry.name: (placed.matrix, suffix) for suffix, entry in placed.source.parts.items()}
                self._take(placed, rest)
        if rest:
            raise UsageError(f"state: the model has no tensor `{next(iter(rest))}`")

    def _take(self, placed: Placed, rest: dict[str, Tensor]) -> None:
        """Take what is given for one weight out of the rest, checked as a whole."""
        entries = placed.source.parts
        names_of = {suffix: names.in_language_model(entry.name) or "" for suffix, entry in entries.items()}
        given = {suffix: rest.pop(name) for suffix, name in names_of.items() if name in rest}
        if not given:
            return
        try:
            for suffix, tensor in given.items():
                _check_given(suffix, tensor, entries[suffix])
            placed.matrix.check(placed.matrix.parts() | given)
        except UsageError as error:
            raise UsageError(f"state: `{placed.source.base}`: {error}") from error
        self._given |= {entries[suffix].name: tensor for suffix, tensor in given.items()}

    def find(self, entry: TensorEntry) -> Tensor | None:
        """Return a tensor's value, or None where the source has the only one."""
        if entry.name in self._given:
            return self._given[entry.name].detach()
        if entry.name not in self._places:
            return None
        matrix, suffix = self._places[entry.name]
        value = matrix.parts()[suffix]
        return None if value.is_meta else value.detach()


def _placed(model: Assembled, name: str, module: nn.Module) -> Iterator[Placed]:
    """Yield a module's weights, if they are as the checkpoint has them.

    Raises:
        UsageError: the model was made dense or prepared for training.
    """
    try:
        found = list(model.assembly.placed(name, module))
    except MissingTensor as error:
        raise UsageError(
            f"`{name}` is none of the checkpoint's; a model in training is saved by k2quant.qat.export"
        ) from error
    for placed in found:
        if set(placed.matrix.parts()) != set(placed.source.parts):
            raise UsageError(
                f"`{placed.source.base}` is dense here and packed in the checkpoint; k2quant.qat.export writes a model "
                "in training, and `state_dict` gives its weights"
            )
    yield from found


def _check_given(suffix: str, value: object, entry: TensorEntry) -> None:
    """Refuse what is no ordinary tensor, or would become NaN or infinite in the file."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
        raise UsageError(f"{suffix}: expected a tensor with values, found {type(value).__name__}")
    if value.is_floating_point() and not value.to(torch_dtype(entry.dtype)).float().isfinite().all():
        raise UsageError(f"{suffix}: found NaN, infinity or a number beyond {entry.dtype}")


_MARK = b"k2quant is saving a model here, or was stopped while it did. The same call begins anew.\n"


def _refuse_overwriting(folder: Path, source: Checkpoint) -> None:
    """Refuse a folder with a checkpoint, unless it is a save of ours that was stopped."""
    mark = folder / INCOMPLETE
    if mark.is_file() and read_limited(mark, 2**16) == _MARK:
        return
    taken = [name for name in (*source.shards, INDEX, CONFIG, INCOMPLETE) if (folder / name).exists()]
    if taken or (folder.exists() and not folder.is_dir()):
        raise DestinationForeign(
            "holds a checkpoint already" if taken else "not a folder",
            file=folder,
            found=", ".join(taken[:3]) or None,
            remedy="name another folder",
        )


def _write_shard(path: Path, shard: ShardHeader, source: Checkpoint, tensors: _Tensors) -> None:
    header = bytearray(min((entry.start for entry in shard.tensors.values()), default=shard.size))
    read_into(shard, 0, memoryview(header))
    writer = ShardWriter(path, bytes(header), shard.size)
    try:
        for entry in _entries(shard, source):
            value = tensors.find(entry)
            for offset, piece in _copied(shard, entry) if value is None else _cut(entry, value):
                if writer.write(offset, piece):
                    writer.flush()
        writer.finish()
    finally:
        writer.close()


def _entries(shard: ShardHeader, source: Checkpoint) -> Iterator[TensorEntry]:
    """Yield what a shard holds: the index's tensors, fused ones taken apart, and those that the index leaves out."""
    yield from (entry for entry in source.tensors.values() if entry.file == shard.path.name)
    yield from (shard.tensors[name] for name in source.unlisted if name in shard.tensors)


def _copied(shard: ShardHeader, entry: TensorEntry) -> Iterator[tuple[int, memoryview]]:
    for start in range(entry.start, entry.stop, WINDOW):
        piece = memoryview(bytearray(min(WINDOW, entry.stop - start)))
        read_into(shard, start, piece)
        yield start, piece


def _cut(entry: TensorEntry, value: Tensor) -> Iterator[tuple[int, memoryview]]:
    dtype = torch_dtype(entry.dtype)
    flat, step = value.reshape(-1), WINDOW // dtype.itemsize
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step].to("cpu", dtype).contiguous()
        yield entry.start + start * dtype.itemsize, as_memory(piece)


def _write_rest(folder: Path, source: Checkpoint) -> None:
    """Copy the other files, then the index, and config.json last."""
    copies, _ = other_files(source)
    last = [name for name in (INDEX, CONFIG) if (source.folder / name).exists()]
    for name in copies:
        if not (folder / name).exists():
            copy_file(source.folder / name, folder / name)
    for name in last:
        copy_file(source.folder / name, folder / name)
