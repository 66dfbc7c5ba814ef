"""Write a model back as the checkpoint that it came from.

The shards keep their headers, so a model that nobody changed gives the very bytes back. The model's tensors go where
the index looks for them and nowhere else: tensors that the model does without (vision, projector, stray buffers), old
copies that the index has left behind, and other files come from the source.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from k2quant.checkpoint.beside import PASSED_OVER, describes_quantization, other_files
from k2quant.checkpoint.files.paths import as_output_error, copy_file, read_limited, write_whole
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.checkpoint.header import ShardHeader, TensorEntry
from k2quant.checkpoint.reader import CONFIG, INCOMPLETE, INDEX, Checkpoint, open_checkpoint
from k2quant.checkpoint.reading import read_into
from k2quant.checkpoint.writing.writer import ShardWriter
from k2quant.conversion.metadata.relatives import shown
from k2quant.conversion.resume import refuse_nested
from k2quant.errors import (
    CheckpointError,
    CheckpointWarning,
    DestinationForeign,
    DestinationStale,
    MissingTensor,
    UsageError,
)
from k2quant.formats.dtypes import as_memory, torch_dtype
from k2quant.formats.format import listed
from k2quant.ground import names
from k2quant.model.assembly import EMBEDDING, HEAD, Assembled, Placed
from k2quant.model.filling import WINDOW
from k2quant.model.matrices import Matrix


def save_model(model: Assembled, folder: str | os.PathLike[str], *, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a loaded model as a checkpoint with the shards, names and formats of the one it came from.

    Unchanged weights give the source's bytes, also where loading rounded them (as it does F16 and F32 to BF16): what
    rounds to the model's value is written as the source has it. A part that waits on disk comes from there. The report
    of the conversion that made the source is not copied; what else is left out, a `CheckpointWarning` names.

    Args:
        model: from `load_model`.
        folder: where; files that are there already are never overwritten, but for those of the same save, stopped.
        state: tensors that take the place of the model's own, named as its `state_dict` names them.

    Raises:
        DestinationForeign: the folder holds a checkpoint.
        DestinationStale: a save of another model was stopped there.
        OutputError: the disk is full or fails; the folder says that it is incomplete.
        UsageError: `state`, or a tensor of the model, does not fit its place in the files, or the folder lies in the
            source's; nothing is written.
        CheckpointError: the source is not what the model was loaded from, or cannot be read any more.
    """
    there, source = Path(folder), model.checkpoint
    begun = _begun(there, source)
    _check_places(source)
    tensors = _Tensors(model, state)
    live = _by_shard(source)
    with as_output_error(there):
        there.mkdir(parents=True, exist_ok=True)
        write_whole(there / INCOMPLETE, begun.mark())
        for name, shard in source.shards.items():
            _write_shard(there / name, shard, live[name], tensors)
        _write_rest(there, source, begun)
        (there / INCOMPLETE).unlink()


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
        if model.assembly.tied:
            _untie(rest)
        for name, module in model.named_modules():
            for placed in _placed(model, name, module):
                for suffix, entry in placed.entries.items():
                    self._put(entry.name, placed.matrix, suffix)
                self._take(placed, rest)
        if rest:
            raise UsageError(f"state: the model has no tensor `{next(iter(rest))}`")

    def _put(self, name: str, matrix: Matrix, suffix: str) -> None:
        """Note where a tensor is; the embedding that is the head too is in two places."""
        before, self._places[name] = self._places.get(name), (matrix, suffix)
        if before is None:
            return
        first, second = before[0].parts()[suffix], matrix.parts()[suffix]
        if second.is_meta:
            self._places[name] = before
        elif not first.is_meta and not _equal(first, second):
            raise UsageError(f"`{name}` is the head too, but the model has two that differ; {_TIED}")

    def _take(self, placed: Placed, rest: dict[str, Tensor]) -> None:
        """Take what is given for one weight out of the rest, checked as a whole."""
        entries = placed.entries
        foundof = {suffix: names.in_language_model(entry.name) or "" for suffix, entry in entries.items()}
        given = {suffix: rest.pop(name) for suffix, name in foundof.items() if name in rest}
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


_TIED = "config.json ties them, and the checkpoint has room for one"


def _untie(state: dict[str, Tensor]) -> None:
    """Take the head out of a state whose embedding it is.

    Raises:
        UsageError: the state has two that differ.
    """
    head, name = state.pop(f"{HEAD}.weight", None), f"{EMBEDDING}.weight"
    if head is not None and not _equal(state.setdefault(name, head), head):
        raise UsageError(f"state: `{name}` and `{HEAD}.weight` differ; {_TIED}")


def _equal(first: object, second: object) -> bool:
    """Tell whether two tensors are one, or have the same values."""
    if first is second or not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return first is second
    return first.shape == second.shape and torch.equal(first.detach().cpu(), second.detach().cpu())


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
        parts = placed.matrix.parts()
        if set(parts) != set(placed.entries):
            raise UsageError(
                f"`{placed.source.base}` is dense here and packed in the checkpoint; k2quant.qat.export writes a model "
                "in training, and `state_dict` gives its weights"
            )
        for suffix, entry in placed.entries.items():
            try:
                _check_fits(parts[suffix], entry)
            except UsageError as error:
                raise UsageError(f"`{entry.name}` in the model: {error}") from error
    yield from found


def _check_fits(value: Tensor, entry: TensorEntry) -> None:
    """Refuse a tensor that its place in the file has no room for, or no words for."""
    dtype = torch_dtype(entry.dtype)
    # A float is rounded to the file's, as loading does; codes and whole numbers mean nothing in another dtype.
    fits = value.is_floating_point() if dtype in _ROUNDED else value.dtype == dtype
    if tuple(value.shape) != entry.shape or not fits:
        raise UsageError(
            f"found {value.dtype} {list(value.shape)}, its place in {entry.file} is for {entry.dtype} "
            f"{list(entry.shape)}; a model is saved with the shapes that it was loaded with"
        )


_WEIGHTS = (torch.bfloat16, torch.float16, torch.float32)
_ROUNDED = (*_WEIGHTS, torch.float8_e8m0fnu)


def _check_given(suffix: str, value: object, entry: TensorEntry) -> None:
    """Refuse what is no ordinary tensor, or would become NaN or infinite in the file."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
        raise UsageError(f"{suffix}: expected a tensor with values, found {type(value).__name__}")
    _check_fits(value, entry)
    if value.is_floating_point() and not value.to(torch_dtype(entry.dtype)).float().isfinite().all():
        raise UsageError(f"{suffix}: found NaN, infinity or a number beyond {entry.dtype}")


_MARK = b"k2quant is saving a model here, or was stopped while it did. The same call begins anew.\n"
_MARK_LIMIT = 2**24  # bytes, with the names of files that were there before


class _Begun(NamedTuple):
    """A save, as the file says that stands in its folder until it is finished."""

    source: str
    """A digest of what is saved from: config, headers, and which files lie beside the weights."""
    copies: tuple[str, ...]
    """The files beside the weights, which are copied."""
    kept: frozenset[str]
    """Those of the same names that were in the folder before, and stay."""

    def mark(self) -> bytes:
        """Return what `_begun` reads, after a word for whoever looks."""
        return _MARK + json.dumps({"source": self.source, "kept": sorted(self.kept)}).encode() + b"\n"


def _begun(folder: Path, source: Checkpoint) -> _Begun:
    """Begin a save, or one that was stopped anew; nothing is written yet.

    Raises:
        DestinationForeign: the folder holds a checkpoint, or is none.
        DestinationStale: a save from another source was stopped there.
        UsageError: the folder lies in the source's, or holds it.
        CheckpointError: a file beside the weights cannot be read.
    """
    try:
        copies = _copies(source)
        identity = hashlib.sha256(json.dumps([source.fingerprint(), sorted(copies)]).encode()).hexdigest()
        stopped = _stopped(folder / INCOMPLETE)
    except OSError as error:
        message = "cannot be read"
        raise CheckpointError(
            message, file=error.filename or source.folder, found=error.strerror or str(error)
        ) from error
    if stopped is None:
        _refuse_overwriting(folder, source)
        refuse_nested(source.folder, folder)
        return _Begun(identity, copies, frozenset(name for name in copies if (folder / name).exists()))
    kept = stopped.get("kept")
    if stopped.get("source") != identity or not isinstance(kept, list):
        raise DestinationStale(
            "holds a stopped save of another model, or of one whose files have changed since",
            file=folder,
            remedy="name another folder, or delete what that save left",
        )
    return _Begun(identity, copies, frozenset(filter(copies.__contains__, kept)))


def _copies(source: Checkpoint) -> tuple[str, ...]:
    """Return the files beside the weights that go along; a word tells of those that do not."""
    beside = other_files(source)
    described = tuple(filter(describes_quantization, beside.left_out))  # formats stay, so it is as true as it was
    strays = [name for name in beside.left_out if name not in described]
    for why, found in ((_STRAYS, strays), (PASSED_OVER, beside.passed_over)):
        if found:
            warnings.warn(f"{source.folder}: {why}: {listed(map(shown, found))}", CheckpointWarning, stacklevel=1)
    return (*beside.copied, *described)


_STRAYS = "left out, for the index does not name them"


def _stopped(mark: Path) -> dict[str, Any] | None:
    """Return what a save left that was stopped, or None where there is none of ours."""
    content = read_limited(mark, _MARK_LIMIT) if mark.is_file() else b""
    if not content.startswith(_MARK):
        return None
    return parse_object(content.removeprefix(_MARK) or b"{}", file=mark)


def _refuse_overwriting(folder: Path, source: Checkpoint) -> None:
    """Refuse a folder with a checkpoint."""
    taken = [name for name in (*source.shards, INDEX, CONFIG, INCOMPLETE) if (folder / name).exists()]
    if taken or (folder.exists() and not folder.is_dir()):
        raise DestinationForeign(
            "holds a checkpoint already" if taken else "not a folder",
            file=folder,
            found=", ".join(taken[:3]) or None,
            remedy="name another folder",
        )


def _check_places(source: Checkpoint) -> None:
    """Compare where a model's tensors will be written with index and headers, as they stand in the source now.

    Raises:
        CheckpointError: they are not what they were when the model was loaded.
    """
    now = open_checkpoint(source.place, follow_links=source.follow_links)
    for name in (*source.tensors, *now.tensors):
        meant, found = source.tensors.get(name), now.tensors.get(name)
        if meant != found:
            raise CheckpointError(
                "index or header is not what the model was loaded from",
                tensor=name,
                file=source.place,
                expected=_where(meant),
                found=_where(found),
                remedy="load the model again, or undo the change",
            )
    before, after = ({name: shard._replace(supply=None) for name, shard in of.shards.items()} for of in (source, now))
    changed = next((name for name in after if before.get(name) != after[name]), None)
    if changed is not None or before.keys() != after.keys():
        file = source.place if changed is None else source.named(changed)
        raise CheckpointError("changed since the model was loaded", file=file, remedy="load the model again")


def _where(entry: TensorEntry | None) -> str:
    if entry is None:
        return "nothing"
    return f"{entry.dtype} {list(entry.shape)} at bytes {entry.start} to {entry.stop} of {entry.file}"


def _by_shard(source: Checkpoint) -> dict[str, list[TensorEntry]]:
    """Return the tensors that the index names, fused ones taken apart, by shard and in the order of their bytes."""
    live: dict[str, list[TensorEntry]] = {name: [] for name in source.shards}
    for entry in source.tensors.values():
        live[entry.file].append(entry)
    return {name: sorted(entries, key=lambda entry: (entry.start, entry.stop)) for name, entries in live.items()}


def _write_shard(path: Path, shard: ShardHeader, live: list[TensorEntry], tensors: _Tensors) -> None:
    writer = ShardWriter(path, b"", shard.size)  # the header is copied like all that is not the model's
    try:
        for offset, piece in _pieces(shard, live, tensors):
            if writer.write(offset, piece):
                writer.flush()
        writer.finish()
    finally:
        writer.close()


def _pieces(shard: ShardHeader, live: list[TensorEntry], tensors: _Tensors) -> Iterator[tuple[int, memoryview]]:
    """Yield every byte of a shard: the model's tensors, and as they are the header and what the index does not name."""
    end = 0
    for entry in live:
        yield from _copied(shard, end, entry.start)
        value = tensors.find(entry)
        yield from _copied(shard, entry.start, entry.stop) if value is None else _cut(shard, entry, value)
        end = entry.stop
    yield from _copied(shard, end, shard.size)


def _copied(shard: ShardHeader, begin: int, end: int) -> Iterator[tuple[int, memoryview]]:
    for start in range(begin, end, WINDOW):
        piece = memoryview(bytearray(min(WINDOW, end - start)))
        read_into(shard, start, piece)
        yield start, piece


def _cut(shard: ShardHeader, entry: TensorEntry, value: Tensor) -> Iterator[tuple[int, memoryview]]:
    dtype = torch_dtype(entry.dtype)
    flat, step, narrow = value.reshape(-1), WINDOW // dtype.itemsize, _loses(value.dtype, dtype)
    for start in range(0, flat.numel(), step):
        place, held = entry.start + start * dtype.itemsize, flat[start : start + step].to("cpu")
        piece = _unrounded(shard, place, held, dtype) if narrow else held.to(dtype).contiguous()
        yield place, as_memory(piece)


def _loses(held: torch.dtype, stored: torch.dtype) -> bool:
    """Tell whether memory cannot hold all values that a file has for a weight that is not quantised."""
    if stored not in _WEIGHTS or held == stored:
        return False
    memory, file = torch.finfo(held), torch.finfo(stored)
    return memory.eps > file.eps or memory.max < file.max


def _unrounded(shard: ShardHeader, place: int, held: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values as the source has them, where they round to those that a model holds, and else the model's."""
    source = torch.empty(held.shape, dtype=dtype)
    read_into(shard, place, as_memory(source))
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[held.dtype.itemsize]  # zeros have signs
    return torch.where(source.to(held.dtype).view(bits) == held.contiguous().view(bits), source, held.to(dtype))


def _write_rest(folder: Path, source: Checkpoint, begun: _Begun) -> None:
    """Copy the other files, then the index, and config.json last."""
    last = [name for name in (INDEX, CONFIG) if (source.folder / name).exists()]
    for name in (*(name for name in begun.copies if name not in begun.kept), *last):
        copy_file(source.folder / name, folder / name)
