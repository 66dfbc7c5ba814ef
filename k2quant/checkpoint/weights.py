"""Which tensors of a checkpoint make one weight, and in which format it is stored.

The tensors' names, dtypes and shapes decide; the config may only confirm them
(`k2quant.conversion.metadata.config.check_source`). What a format looks like, the format itself knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from k2quant.checkpoint.header import TensorEntry
from k2quant.errors import CheckpointError, MalformedFile, MissingTensor
from k2quant.formats.format import Entry, Format, Neighbours
from k2quant.formats.known import FORMATS, supported
from k2quant.ground import names
from k2quant.ground.saying.showing import brief

_FOREIGN = frozenset({"qweight", "qzeros", "weight_blocks", "weight_scales"})
"""Suffixes of GPTQ, AWQ and MXFP4 checkpoints."""
_GPT_OSS = ("_proj_blocks", "_proj_scales")
"""How suffixes of gpt-oss end (transformers, integrations/mxfp4.py)."""


class StoredWeight(NamedTuple):
    """One weight with its partners, or one tensor that is no weight."""

    base: str
    """The name without its suffix."""
    format: Format | None
    """How it is stored; None for a tensor that is no weight, such as a bias, which is only ever copied."""
    shape: tuple[int, ...]
    """The logical shape; `[N, K]` for a quantised weight."""
    parts: dict[str, TensorEntry]
    """The tensors it is made of, by suffix."""

    @property
    def main(self) -> TensorEntry:
        """The tensor that carries the values."""
        return self.parts[self.format.main] if self.format else next(iter(self.parts.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(entry.nbytes for entry in self.parts.values())


class Grouping(NamedTuple):
    """A checkpoint's tensors, grouped."""

    weights: list[StoredWeight]
    """In the order of their main tensors."""
    problems: list[CheckpointError]
    """What does not fit together: partners missing, astray, of wrong shape or dtype, foreign formats."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def group_tensors(tensors: Mapping[str, TensorEntry]) -> Grouping:
    """Group a checkpoint's tensors into weights."""
    weights: list[StoredWeight] = []
    problems: list[CheckpointError] = []
    partners = frozenset(suffix for kind in FORMATS.values() for suffix in kind.partners)
    adopted = frozenset(suffix for kind in FORMATS.values() for suffix in kind.adopted)
    words = supported()
    for name, entry in tensors.items():
        base, suffix = names.split(name)
        beside = Neighbours(base, tensors, words)
        try:
            if suffix in partners:
                _check_partner(suffix, entry, beside)
            elif suffix not in adopted or not any(kind.owns(suffix, beside) for kind in FORMATS.values()):
                weights.append(_weight(suffix, entry, beside, tensors))
        except CheckpointError as problem:
            problems.append(problem)
    return Grouping(weights, problems + _doubled(weights))


def _doubled(weights: list[StoredWeight]) -> list[CheckpointError]:
    """Return what is wrong where one weight stands under two spellings of its name: which is right, nobody knows."""
    first: dict[str, StoredWeight] = {}
    problems: list[CheckpointError] = []
    for weight in weights:
        name = names.unprefixed(weight.base if weight.format else weight.main.name)
        if (other := first.setdefault(name, weight)) is not weight:
            same = "stands for the same weight as another"
            problems.append(MalformedFile(same, tensor=weight.main.name, file=weight.main.file, found=other.main.name))
    return problems


def _weight(suffix: str, entry: TensorEntry, beside: Neighbours, tensors: Mapping[str, TensorEntry]) -> StoredWeight:
    """Return the weight whose main tensor this is, or the tensor itself as none."""
    base = beside.base
    for kind in FORMATS.values():
        found = kind.recognise(suffix, entry, beside)
        if found is not None:
            parts = {part: entry if part == suffix else tensors[f"{base}.{part}"] for part in found.suffixes}
            return StoredWeight(base, found.format, found.shape, parts)
    if suffix in _FOREIGN:
        raise beside.foreign(entry)
    if entry.dtype == "U8" and suffix.endswith(_GPT_OSS):
        raise beside.foreign(entry, "MXFP4 as gpt-oss packs it (blocks and scales of all experts) is not supported")
    if suffix in _mains():
        raise _refusal(suffix, entry, beside) or _unknown(entry, beside)
    return StoredWeight(base, None, entry.shape, {suffix: entry})


def _check_partner(suffix: str, entry: TensorEntry, beside: Neighbours) -> None:
    """Refuse a partner that has no weight, or one that no format of ours uses."""
    if not any(kind.owns(suffix, beside) for kind in FORMATS.values()):
        weight = next(filter(None, map(beside.get, _mains())), None)
        astray = MissingTensor(
            "a partner without its weight",
            tensor=entry.name,
            file=entry.file,
            found=f"`{weight.name}` of {weight.dtype}, which has none" if weight else None,
            remedy="take the tensor out of the index, if a cast left it behind" if weight else None,
        )
        unknown = _unknown(weight, beside) if weight and not _is_read(weight, beside) else None
        raise _refusal(suffix, entry, beside) or unknown or astray


def _is_read(weight: Entry, beside: Neighbours) -> bool:
    """Tell whether a format takes a main tensor, if only with other partners."""
    suffix = names.split(weight.name)[1]
    try:
        return any(kind.recognise(suffix, weight, beside) for kind in FORMATS.values())
    except CheckpointError:
        return True


def _mains() -> dict[str, None]:
    """Return the suffixes of tensors that carry values."""
    return dict.fromkeys(main for kind in FORMATS.values() for main in kind.mains)


def _unknown(weight: Entry, beside: Neighbours) -> CheckpointError:
    return beside.foreign(weight, f"a weight of dtype {weight.dtype} is not supported")


def _refusal(suffix: str, entry: TensorEntry, beside: Neighbours) -> CheckpointError | None:
    """Return what the first format that knows better has to say of a tensor that none takes."""
    return next(filter(None, (kind.refusal(suffix, entry, beside) for kind in FORMATS.values())), None)
