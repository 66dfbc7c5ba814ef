"""A candidate with some weights taken from the baseline: a checkpoint in memory only, which reads the files of both.

The two may be of different formats: each weight comes with all its partners. Nothing is copied.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import torch

from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.reading import read_into
from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.metadata.config import QUANTIZATION_KEYS
from k2quant.errors import Incomparable
from k2quant.ground import names, pool
from k2quant.ground.pool import available_cores
from k2quant.model.architecture import architecture
from k2quant.model.assembly import Assembly
from k2quant.model.loading import assemble

_WINDOW = 2**22
"""Bytes of each side that are compared at once."""
_READERS = 8
_BASELINE = "baseline:"
"""Stands before the names of the baseline's shards in a mixture; no file of the candidate's may begin so."""
_NO_MATTER = ("architectures", "dtype", "torch_dtype", "transformers_version", "bos_token_id", "eos_token_id")
"""Keys of a config in which two formats of one model may differ."""


class Part(NamedTuple):
    """One weight that both checkpoints hold."""

    name: str
    """As a language model that stands alone has it, `.weight` left out."""
    base: StoredWeight
    candidate: StoredWeight

    @property
    def kind(self) -> str:
        """Its tensor class."""
        return names.tensor_class(f"{self.name}.weight" if self.base.format else self.name)

    @property
    def key(self) -> tuple[str, int, int, str]:
        """Class, layer and expert (-1 for none), and name: ever smaller groups that it belongs to."""
        layer, expert = names.layer(self.name), names.expert(self.name)
        return self.kind, -1 if layer is None else layer, -1 if expert is None else expert, self.name

    @property
    def size(self) -> int:
        """Values that it holds."""
        return max(prod(self.base.shape), 1)


class Mixer:
    """Two checkpoints of one model, weight by weight."""

    def __init__(self, base: Checkpoint, candidate: Checkpoint) -> None:
        """Pair their weights; nothing but headers is read.

        Raises:
            CheckpointError: one of them is incomplete, contradicts its config, or is no model of this family.
            Incomparable: they are of different architectures.
        """
        self._base, self._candidate = base, candidate
        ours, theirs = (_weights(_assembled(checkpoint)) for checkpoint in (base, candidate))
        _check_config(base, candidate)
        self.parts = tuple(Part(name, ours[name], theirs[name]) for name in ours)
        """All weights that a forward pass uses, in the order of the model."""

    def changed(self) -> list[Part]:
        """Return the weights that are stored otherwise: in another format, or as other bytes. Reads both checkpoints.

        Raises:
            CheckpointError: a file cannot be read.
        """
        found: set[str] = set()

        def look(part: Part) -> None:
            if _other_layout(part) or self._other_bytes(part):
                found.add(part.name)

        pool.run(iter(self.parts), look, workers=min(available_cores(), _READERS))
        return sorted((part for part in self.parts if part.name in found), key=lambda part: part.key)

    def _other_bytes(self, part: Part) -> bool:
        pairs = [(entry, part.candidate.parts[suffix]) for suffix, entry in part.base.parts.items()]
        return any(not self._same(*pair) for pair in pairs)

    def _same(self, ours: TensorEntry, theirs: TensorEntry) -> bool:
        for start in range(0, ours.nbytes, _WINDOW):
            size = min(_WINDOW, ours.nbytes - start)
            first, second = bytearray(size), bytearray(size)
            read_into(self._base.shards[ours.file], ours.start + start, memoryview(first))
            read_into(self._candidate.shards[theirs.file], theirs.start + start, memoryview(second))
            if first != second:
                return False
        return True

    def mixed(self, restored: Collection[str]) -> Checkpoint:
        """Return the candidate with these weights taken from the baseline."""
        tensors: dict[str, TensorEntry] = {}
        chosen = frozenset(restored)
        for part in self.parts:
            source, prefix = (part.base, _BASELINE) if part.name in chosen else (part.candidate, "")
            tensors |= {entry.name: entry._replace(file=prefix + entry.file) for entry in source.parts.values()}
        shards = {_BASELINE + file: shard for file, shard in self._base.shards.items()} | self._candidate.shards
        return Checkpoint(self._candidate.folder, shards, tensors, (), _plain(self._candidate.config))


def _assembled(checkpoint: Checkpoint) -> Assembly:
    return assemble(checkpoint, device=torch.device("cpu"), dtype=torch.bfloat16, backend="reference")


def _weights(assembly: Assembly) -> dict[str, StoredWeight]:
    """Return the weights that a model uses, by name; stray buffers and layers that only predict more are left out."""
    return {_name(source): source for source in _sources(assembly)}


def _sources(assembly: Assembly) -> Iterator[StoredWeight]:
    for name, module in assembly.model.named_modules():
        for placed in assembly.placed(name, module):
            yield placed.source


def _name(weight: StoredWeight) -> str:
    name = names.in_language_model(f"{weight.base}.weight" if weight.format else weight.main.name)
    assert name is not None  # noqa: S101  what the model uses is a part of the language model
    return name.removesuffix(".weight") if weight.format else name


def _other_layout(part: Part) -> bool:
    ours, theirs = (
        {suffix: (entry.dtype, entry.shape) for suffix, entry in weight.parts.items()}
        for weight in (part.base, part.candidate)
    )
    return ours != theirs


def _check_config(base: Checkpoint, candidate: Checkpoint) -> None:
    """Refuse two models of which one is not the other in another format."""
    ours, theirs = (_assembled_config(checkpoint) for checkpoint in (base, candidate))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise Incomparable(
                f"the two are different models: {key}",
                file=candidate.folder / "config.json",
                expected=f"{ours.get(key)!r:.100} as in {base.folder}",
                found=f"{theirs.get(key)!r:.100}",
            )


def _assembled_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    return {key: value for key, value in architecture(checkpoint).to_dict().items() if key not in _NO_MATTER}


def _plain(config: dict[str, Any] | None) -> dict[str, Any]:
    """Return a config that claims no quantisation: the tensors of a mixture say how each is stored."""
    found = {key: value for key, value in (config or {}).items() if key not in QUANTIZATION_KEYS}
    if isinstance(found.get("text_config"), dict):
        found["text_config"] = _plain(found["text_config"])
    return found
