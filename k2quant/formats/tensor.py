"""Quantise and dequantise one tensor in memory, as numpy or torch arrays.

For training loops that push weights to an inference engine without files. numpy has no BF16 and no FP8: they are seen
as their bit patterns, uint16 and uint8. A torch tensor on the CPU is worked on in place of its memory, without a copy;
one on a GPU is worked on there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from k2quant.errors import DtypeMismatch, ShapeMismatch
from k2quant.formats.bf16 import Bf16
from k2quant.formats.dtypes import DTYPES, FLOATS, TensorSpec, as_array, as_bits, torch_dtype
from k2quant.formats.format import Format, Layout, Parts
from k2quant.formats.known import FORMATS, FormatName, quantised_names
from k2quant.formats.transcode import Scratch, located, transcode
from k2quant.ground.saying.arguments import hinting
from k2quant.ground.saying.showing import brief
from k2quant.ground.units import one_of
from k2quant.kernels.codecs.choice import codecs
from k2quant.kernels.codecs.grids import Grid
from k2quant.kernels.codecs.values import ValueAt


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """One weight in a quantised format."""

    format: Format
    codes: Any
    """FP8: codes `[N, K]` (torch.float8_e4m3fn, or numpy uint8). INT4: packed words int32 `[N, K/8]`. NVFP4 and MXFP4:
    two codes to a byte, uint8 `[N, K/2]`."""
    scale: Any
    """FP8: float32 `[ceil(N/128), ceil(K/128)]`. INT4: BF16 `[N, K/32]` (torch.bfloat16, or numpy uint16 bits). NVFP4:
    E4M3 `[N, K/16]` (torch.float8_e4m3fn, or numpy uint8 bits). MXFP4: exponents plus 127, uint8 `[N, K/32]`."""
    shape: tuple[int, int]
    """`[N, K]`."""
    tensor_scale: Any = None
    """NVFP4: float32 of one number, as the layout has it: `[]` that multiplies, or `[1]` that divides. Else None."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def tensors(self, base: str) -> dict[str, Any]:
        """Return the tensors as a checkpoint names them, for the weight `base` (no suffix).

        Raises:
            ShapeMismatch: no weight of this shape can be in the format.
        """
        parts = dict(zip(self.format.streamed, _held(self), strict=True))
        state = self.format.state(self.shape)
        for suffix, content in self.format.constant(self.shape).items():
            array = as_array(np.frombuffer(bytearray(content), np.uint8), state[suffix])
            parts[suffix] = _like(self.codes, array, state[suffix].dtype, on_cpu=True)
        return {f"{base}.{suffix}": parts[suffix] for suffix in state}


@hinting({"dtype": "the format is `to`", "format": "the format is `to`", "bits": "the format is `to`: int4 or fp8"})
def quantize(
    weight: Any, to: FormatName, *, grid: Grid = "moonshot", layout: Layout | None = None, name: str = "weight"
) -> QuantizedTensor:
    """Quantise one matrix exactly as a conversion of a checkpoint would.

    Args:
        weight: `[N, K]`; torch bfloat16, float16 or float32, or numpy float16, float32 or uint16 (BF16 bits).
        to: `fp8` (blocks of 128x128), `int4` (groups of 32 columns), `nvfp4` (16) or `mxfp4` (32).
        grid: the INT4 rounding rule.
        layout: whose names and tensor scale NVFP4 has; None: ModelOpt's. FP8 of a layout has its names.
        name: the tensor's name, for error messages.

    Returns:
        codes and scale as arrays of the same library, on the same device.

    Raises:
        UsageError: `to` is no quantised format, or has no such layout.
        ShapeMismatch: no matrix, or a width that the format cannot have.
        BadValue: NaN or infinity in the weight.
    """
    one_of("quantised format", to, quantised_names())
    one_of("grid", grid, get_args(Grid))
    if layout is not None:
        one_of(f"layout of {to}", layout, FORMATS[to].layouts)
    target = FORMATS[to].asked_for(grid=grid, layout=layout)
    array, dtype = _as_numpy(weight, FLOATS, name)
    if array.ndim != 2 or not array.size:
        raise ShapeMismatch("a quantised weight is a matrix", tensor=name, expected="[N, K]", found=tuple(array.shape))
    shape = (int(array.shape[0]), int(array.shape[1]))
    state = target.state(shape, name=name)
    scratch, source, device = Scratch(), Bf16(dtype=dtype), _device(weight)
    if target.surveyed:
        target = _settled(target, source, array, name, device)
    outputs = {suffix: scratch.take(suffix, state[suffix]) for suffix in target.streamed}
    _guarded(source, target, {"weight": array}, outputs, name, device)
    codes, scale, *more = (_like(weight, part, state[suffix].dtype) for suffix, part in outputs.items())
    return QuantizedTensor(target, codes, scale, shape, *more)


def dequantize(tensor: QuantizedTensor, *, name: str = "weight") -> Any:
    """Return the BF16 weight `[N, K]` that codes and scale mean: torch bfloat16, or numpy uint16 bits.

    Raises:
        ShapeMismatch: codes or scales do not have the shape that the format gives them.
        BadValue: a NaN code, a scale that is negative or not finite, or an overflow.
    """
    parts: Parts = {}
    state = tensor.format.state(tensor.shape)
    for suffix, part in zip(tensor.format.streamed, _held(tensor), strict=True):
        spec = state[suffix]
        parts[suffix], _ = _as_numpy(part, (spec.dtype,), f"{name} ({suffix})")
        if parts[suffix].shape != spec.shape:
            raise ShapeMismatch(tensor=f"{name} ({suffix})", expected=spec.shape, found=tuple(parts[suffix].shape))
    out = Scratch().take("weight", TensorSpec("BF16", tensor.shape))
    _guarded(tensor.format, Bf16(), parts, {"weight": out}, name, _device(tensor.codes))
    return _like(tensor.codes, out, "BF16")


def _held(tensor: QuantizedTensor) -> tuple[Any, ...]:
    """Return the arrays of a weight in the order of the format: codes, scales, and the tensor's scale if it has one.

    Raises:
        ShapeMismatch: it has one too many, or lacks it.
    """
    held = (tensor.codes, tensor.scale, *(() if tensor.tensor_scale is None else (tensor.tensor_scale,)))
    streamed = tensor.format.streamed
    if len(held) != len(streamed):
        raise ShapeMismatch(
            f"a scale of the whole tensor, beside {tensor.format.label}",
            tensor="tensor_scale",
            expected=streamed[2] if streamed[2:] else "none",
            found="one" if held[2:] else "none",
        )
    return held


def _settled(target: Format, source: Format, array: np.ndarray[Any, Any], name: str, device: str) -> Format:
    """Return a format that must see all of a weight first, when it has."""
    scratch = Scratch()
    try:
        return target.settled([target.survey_of(source, {"weight": array}, codecs(device), scratch)])
    except ValueAt as error:
        raise located(error, source, 0, {"weight": name}, "memory") from error


def _guarded(source: Format, target: Format, parts: Parts, outputs: Parts, name: str, device: str) -> None:
    try:
        transcode(source, target, parts, outputs, codecs=codecs(device), scratch=Scratch())
    except ValueAt as error:
        raise located(error, source, 0, dict.fromkeys(parts, name), "memory") from error


def _device(tensor: Any) -> str:
    return "cpu" if isinstance(tensor, np.ndarray) else str(tensor.device)


_NUMPY_BITS = {"BF16": "uint16", "F8_E4M3": "uint8"}  # numpy has neither type, so their bits stand for them
_DTYPES = {DTYPES[name].torch: name for name in ("BF16", "F16", "F32", "F8_E4M3", "U8", "I8", "I32")}


def _as_numpy(tensor: Any, allowed: tuple[str, ...], name: str) -> tuple[np.ndarray[Any, Any], str]:
    """Return a C-contiguous numpy view (or, from a GPU, a copy) and the safetensors dtype it stands for.

    Raises:
        DtypeMismatch: it is no array, or of a dtype that is not allowed here.
    """
    kind = str(getattr(tensor, "dtype", type(tensor).__name__)).removeprefix("torch.")
    dtype = _DTYPES.get(kind)
    if isinstance(tensor, np.ndarray):
        dtype = next((meant for meant in allowed if _NUMPY_BITS.get(meant) == kind), dtype)
    is_array = isinstance(tensor, np.ndarray) or (hasattr(tensor, "detach") and not tensor.is_meta)
    if dtype not in allowed or not is_array:
        raise DtypeMismatch(
            tensor=name, expected=f"a torch tensor or numpy array of {' or '.join(allowed)}", found=kind
        )
    if isinstance(tensor, np.ndarray):
        array = np.ascontiguousarray(tensor).reshape(tensor.shape)  # which makes a row of one number
        return (array.view(np.uint16) if kind == "bfloat16" else array), dtype  # ml_dtypes has a bfloat16 for numpy
    return as_bits(tensor), dtype


def _like(example: Any, array: np.ndarray[Any, Any], dtype: str, *, on_cpu: bool = False) -> Any:
    """Return an array as the library of the example has it, and on its device unless that shall be the CPU."""
    if isinstance(example, np.ndarray):
        return array
    import torch

    tensor = torch.from_numpy(array).view(torch_dtype(dtype))
    return tensor if on_cpu else tensor.to(example.device)
