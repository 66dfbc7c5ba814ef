"""Which tensors of a checkpoint make one weight, and in which format it is stored.

The tensors' names, dtypes and shapes decide; the config may only confirm them
(`k2quant.conversion.config.check_source`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from k2quant.checkpoint.header import TensorEntry
from k2quant.errors import (
    CheckpointError,
    DtypeMismatch,
    MalformedFile,
    MissingTensor,
    ShapeMismatch,
    UnsupportedFormat,
)
from k2quant.formats.dtypes import FLOATS
from k2quant.formats.layouts import FP8_BLOCK, PARTNER_SUFFIXES, Bf16, Format, Fp8, Int4
from k2quant.ground import names

_FOREIGN = frozenset({"qweight", "qzeros", "weight_global_scale", "weight_scale_2", "weight_blocks", "weight_scales"})
"""Suffixes of GPTQ, AWQ, NVFP4 and MXFP4 checkpoints."""

_SUPPORTED = "BF16, F16 or F32 weights, block-FP8 with weight_scale_inv, or symmetric INT4 pack-quantized weights"


class Weight(NamedTuple):
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


class Grouping(NamedTuple):
    """A checkpoint's tensors, grouped."""

    weights: list[Weight]
    """In the order of their main tensors."""
    problems: list[CheckpointError]
    """What does not fit together: partners missing, astray, of wrong shape or dtype, foreign formats."""


def group_tensors(tensors: Mapping[str, TensorEntry]) -> Grouping:
    """Group a checkpoint's tensors into weights."""
    weights: list[Weight] = []
    problems: list[CheckpointError] = []
    for name, entry in tensors.items():
        base, suffix = names.split(name)
        try:
            if suffix in PARTNER_SUFFIXES:
                _check_partner(base, suffix, entry, tensors)
            elif suffix == "weight_packed":
                weights.append(_int4(base, entry, tensors))
            elif suffix == "weight" and entry.dtype not in FLOATS:
                weights.append(_fp8(base, entry, tensors))
            elif suffix == "weight":
                weights.append(_plain(base, entry, tensors))
            elif suffix in _FOREIGN:
                raise _foreign(entry)
            else:
                weights.append(Weight(base, None, entry.shape, {suffix: entry}))
        except CheckpointError as problem:
            problems.append(problem)
    return Grouping(weights, problems)


def _foreign(entry: TensorEntry, why: str = "belongs to a format that k2quant does not read") -> UnsupportedFormat:
    return UnsupportedFormat(
        why, tensor=entry.name, file=entry.file, expected=_SUPPORTED, found=f"{entry.dtype} {list(entry.shape)}"
    )


def _partner(base: str, suffix: str, weight: TensorEntry, tensors: Mapping[str, TensorEntry]) -> TensorEntry:
    entry = tensors.get(f"{base}.{suffix}")
    if entry is None:
        raise MissingTensor(
            f"the index lacks this partner of `{weight.name}`",
            tensor=f"{base}.{suffix}",
            remedy="the checkpoint is incomplete: download it again",
        )
    return entry


def _check_partner(base: str, suffix: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry]) -> None:
    """Refuse a partner that has no weight, or one that no format of ours uses."""
    packed, weight = tensors.get(f"{base}.weight_packed"), tensors.get(f"{base}.weight")
    if suffix == "weight_zero_point":
        raise _foreign(entry, "asymmetric INT4 (weight_zero_point) is not supported")
    if suffix == "weight_g_idx":
        raise _foreign(entry, "INT4 with reordered columns (weight_g_idx) is not supported")
    if suffix == "weight_scale_inv":
        owned = weight is not None and weight.dtype == "F8_E4M3"
    else:
        owned = packed is not None
        if not owned and weight is not None and suffix == "weight_scale" and weight.dtype.startswith("F8"):
            raise _foreign(entry, "FP8 with `weight_scale` is not supported, only `weight_scale_inv`")
    if not owned:
        raise MissingTensor("a partner without its weight", tensor=entry.name, file=entry.file)


def _check_stored_once(base: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry]) -> None:
    if f"{base}.weight_packed" in tensors:
        raise MalformedFile("stored twice, also as weight_packed", tensor=entry.name, file=entry.file)


def _plain(base: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry]) -> Weight:
    _check_stored_once(base, entry, tensors)
    return Weight(base, Bf16(dtype=entry.dtype), entry.shape, {"weight": entry})


def _matrix(entry: TensorEntry) -> tuple[int, int]:
    if len(entry.shape) != 2 or not entry.nbytes:
        raise ShapeMismatch(
            "a quantised weight is a matrix", tensor=entry.name, file=entry.file, expected="[N, K]", found=entry.shape
        )
    return entry.shape[0], entry.shape[1]


def _fp8(base: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry]) -> Weight:
    if entry.dtype != "F8_E4M3":
        raise _foreign(entry, f"a weight of dtype {entry.dtype} is not supported")
    _check_stored_once(base, entry, tensors)
    shape = _matrix(entry)
    if f"{base}.weight_scale" in tensors and f"{base}.weight_scale_inv" not in tensors:
        raise _foreign(entry, "FP8 with `weight_scale` is not supported, only `weight_scale_inv`")
    scale = _partner(base, "weight_scale_inv", entry, tensors)
    _check_dtype(scale, ("F32",))
    for block in (FP8_BLOCK, (1, FP8_BLOCK[1])):
        layout = Fp8(block=block)
        if layout.state(shape)["weight_scale_inv"].shape == scale.shape:
            return Weight(base, layout, shape, {"weight": entry, "weight_scale_inv": scale})
    raise ShapeMismatch(
        tensor=scale.name,
        file=scale.file,
        expected=f"{Fp8().state(shape)['weight_scale_inv'].shape} for a weight of {shape} in blocks of 128x128",
        found=scale.shape,
    )


def _int4(base: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry]) -> Weight:
    if entry.dtype != "I32":
        raise _foreign(entry, f"packed weights of dtype {entry.dtype} are not supported (MXFP4 and NVFP4 pack bytes)")
    rows, words = _matrix(entry)
    shape = (rows, words * 8)
    scale = _partner(base, "weight_scale", entry, tensors)
    size = _partner(base, "weight_shape", entry, tensors)
    _check_dtype(scale, FLOATS)
    _check_dtype(size, ("I32", "I64"))
    if len(scale.shape) != 2 or scale.shape[0] != rows or not scale.shape[1] or shape[1] % scale.shape[1]:
        raise ShapeMismatch(
            tensor=scale.name,
            file=scale.file,
            expected=f"({rows}, {shape[1]} / group) for packed words of {entry.shape}",
            found=scale.shape,
        )
    if size.shape != (2,):
        raise ShapeMismatch(tensor=size.name, file=size.file, expected="(2,)", found=size.shape)
    layout = Int4(group=shape[1] // scale.shape[1], scale_dtype=scale.dtype, shape_dtype=size.dtype)
    return Weight(base, layout, shape, {"weight_packed": entry, "weight_scale": scale, "weight_shape": size})


def _check_dtype(entry: TensorEntry, allowed: tuple[str, ...]) -> None:
    if entry.dtype not in allowed:
        raise DtypeMismatch(tensor=entry.name, file=entry.file, expected=" or ".join(allowed), found=entry.dtype)
