"""NVFP4: E2M1 codes, two to a byte, an E4M3 scale for each 16 columns, and a float32 scale of the whole tensor.

NVIDIA's checkpoints of K2 have ModelOpt's layout (nvidia-modelopt 0.47, torch/quantization/qtensor/nvfp4_tensor.py), in
which the tensor scale multiplies; RedHatAI's have that of compressed-tensors' `nvfp4-pack-quantized` (0.20,
compressors/nvfp4), in which it divides. Codes and block scales are the same bytes in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from k2quant.errors import CheckpointError, DtypeMismatch, MalformedFile, ShapeMismatch, UnsupportedFormat
from k2quant.formats.configs import compressed_tensors, modelopt
from k2quant.formats.configs.keys import Key, Recast
from k2quant.formats.dtypes import TensorSpec
from k2quant.formats.format import Entry, Format, Layout, Method, Neighbours, Parts, Scope, Stored, contradiction
from k2quant.formats.mxfp4 import Mxfp4, check_group, check_shape, check_width, nibbles_changed, wide
from k2quant.kernels.codecs.grids import NVFP4_BLOCK

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.fp4 import TensorScale
    from k2quant.kernels.codecs.grids import Grid
    from k2quant.kernels.codecs.seam import Codecs
    from k2quant.kernels.codecs.values import F32, U16
    from k2quant.kernels.products.packed.weight import PackedWeight


class _Names(NamedTuple):
    """What a layout calls things."""

    codes: str
    """Suffix of the codes."""
    tensor: str
    """Suffix of the scale of the whole tensor."""
    inputs: str
    """Suffix of the scale of the inputs."""
    shape: tuple[int, ...]
    """Of each of these two."""
    divides: bool
    """Whether they divide."""


_NAMES: dict[Layout, _Names] = {
    "modelopt": _Names("weight", "weight_scale_2", "input_scale", (), divides=False),
    "compressed-tensors": _Names("weight_packed", "weight_global_scale", "input_global_scale", (1,), divides=True),
}

_ONE: tuple[tuple[int, ...], ...] = ((), (1,))
"""Shapes of one number, for in this some tools differ from their own."""

_SCHEME: dict[str, Any] = {"num_bits": 4, "symmetric": True, "type": "float"}

_LARGEST_BF16 = (2 - 2.0**-7) * 2.0**127

# A search looks one step of E4M3 down from amax / 6 and six up; a rule rounds it by 1/16 at the most, or by half the
# least scale where that is subnormal. compressed-tensors makes zeros of blocks below that half.
_BUDGET: dict[str, float] = {"least": 0.82, "most": 1.87}


class Exponents(NamedTuple):
    """The least and the largest exponent of blocks of MXFP4 that hold more than zeros."""

    lowest: int
    highest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvfp4(Format):
    """E2M1 codes, the even column in the low nibble, times an E4M3 scale of 16 columns, times one of the tensor."""

    name: ClassVar[str] = "nvfp4"
    served: ClassVar[str] = "vLLM, SGLang (ModelOpt's layout with scales of inputs), k2quant"
    mains: ClassVar[tuple[str, ...]] = tuple(called.codes for called in _NAMES.values())
    whole: ClassVar[tuple[str, ...]] = tuple(
        suffix for called in _NAMES.values() for suffix in (called.tensor, called.inputs)
    )
    partners: ClassVar[tuple[str, ...]] = (
        "weight_scale",
        *(called.tensor for called in _NAMES.values()),
        "pre_quant_scale",
    )
    adopted: ClassVar[tuple[str, ...]] = tuple(called.inputs for called in _NAMES.values())
    scale_suffix: ClassVar[str | None] = "weight_scale"
    reads: ClassVar[str] = "NVFP4 weights with weight_scale_2 or weight_global_scale"
    stands_for: ClassVar[str] = "NVFP4 weights with weight_global_scale, as format nvfp4-pack-quantized says"
    method: ClassVar[str | None] = modelopt.METHOD
    keys: ClassVar[Mapping[str, Key] | None] = modelopt.KEYS
    scheme_words: ClassVar[str] = "symmetric 4-bit float"
    packing: ClassVar[str] = "nvfp4-pack-quantized"
    default_scope: ClassVar[Scope | None] = "experts"
    unfit: ClassVar[tuple[str, ...]] = ("kv_b_proj",)  # absorbed into its neighbours by MLA, which takes BF16 or FP8
    layouts: ClassVar[tuple[str, ...]] = tuple(_NAMES)
    searches: ClassVar[bool] = True
    searched_from: ClassVar[tuple[str, ...]] = ("int4",)
    surveyed: ClassVar[bool] = True
    together: ClassVar[bool] = True
    trained: ClassVar[bool] = True
    clips: ClassVar[bool] = True
    ggml: ClassVar[str | None] = "NVFP4"
    mlx: ClassVar[str | None] = "nvfp4"
    searched_by: ClassVar[tuple[Method, ...]] = ("mse", "imatrix")
    takes_inputs: ClassVar[bool] = True
    carried_from: ClassVar[tuple[str, ...]] = ("mxfp4", "nvfp4")

    layout: Layout = "modelopt"
    """What the tensors are called, and whose config speaks of them."""
    tensor: TensorScale | None = None
    """The scale of the whole tensor; None until it is settled, and of a source, whose file has it."""
    inputs: float | None = None
    """What is written as the scale of the inputs, float32 as the layout has it; None: there is none, or the file's."""
    scaled: bool = False
    """Whether the file has a scale of the inputs beside the weight, which goes along with it."""
    exponent: int | None = None
    """Of the tensor scale, where MXFP4 keeps its codes: the block scale is 2 to its exponent less this."""
    rounding: bool = False
    """Whether MXFP4 may be rounded where its exponents are too far apart."""

    @property
    def main(self) -> str:
        """That of the layout."""
        return self._called.codes

    @property
    def _called(self) -> _Names:
        return _NAMES[self.layout]

    @property
    def streamed(self) -> tuple[str, ...]:
        """Codes, block scales and the tensor scale; and the scale of the inputs that a source has."""
        called = self._called
        return (called.codes, "weight_scale", called.tensor, *self.along)

    def suffix_of(self, part: str) -> str:
        """Know the tensor scale, too, and that of the inputs."""
        own = {"tensor scale": self._called.tensor, "input scale": self._called.inputs}
        return own.get(part) or Format.suffix_of(self, part)

    def state(self, shape: tuple[int, ...], *, name: str = "weight") -> dict[str, TensorSpec]:
        """Return codes and scales of a weight.

        Raises:
            ShapeMismatch: 16 does not divide the width.
        """
        rows, width = shape
        called = self._called
        check_width(width, NVFP4_BLOCK, name=name, shape=shape, called="NVFP4")
        return {
            called.codes: TensorSpec("U8", (rows, width // 2)),
            "weight_scale": TensorSpec("F8_E4M3", (rows, width // NVFP4_BLOCK)),
            called.tensor: TensorSpec("F32", called.shape),
            **({called.inputs: TensorSpec("F32", called.shape)} if self.scales_inputs else {}),
        }

    @property
    def scales_inputs(self) -> bool:
        """Whether a scale of the inputs stands beside the weight, so that engines quantise them too."""
        return self.scaled or self.inputs is not None

    def rows(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        """Return rows as they are; of one number, that."""
        return (0, 1) if suffix in self.whole else (start, stop)

    def constant(self, shape: tuple[int, ...]) -> dict[str, bytes]:
        """Return the scale of the inputs that was asked for."""
        import struct

        return {} if self.inputs is None else {self._called.inputs: struct.pack("<f", self.inputs)}

    @property
    def unit(self) -> tuple[int, Layout]:
        """The block, and the layout."""
        return NVFP4_BLOCK, self.layout

    @property
    def scales(self) -> int:
        """The block."""
        return NVFP4_BLOCK

    @property
    def label(self) -> str:
        """Such as `nvfp4 group 16`."""
        size = f"nvfp4 group {NVFP4_BLOCK}"
        return size if self.layout == "modelopt" else f"{size} {self.layout}"

    def same(self, other: Format) -> bool:
        """Tell whether the layout is the same, and no other scale of the inputs is asked for."""
        return isinstance(other, Nvfp4) and other.layout == self.layout and other.inputs is None

    def relabels(self, other: Format) -> bool:
        """Tell NVFP4 of whatever layout from all else."""
        return isinstance(other, Nvfp4)

    def relabel(self, parts: Parts, outputs: Parts, target: Format) -> None:
        """Copy codes and block scales, and say the tensor scale as the other layout has it, and that of the inputs.

        Raises:
            ValueAt: no tensor scale of the other form means the same, and rounding was not allowed.
        """
        import numpy as np

        if not isinstance(target, Nvfp4):
            raise TypeError(target)  # not asked
        np.copyto(outputs[target.main], parts[self.main])
        np.copyto(outputs["weight_scale"], parts["weight_scale"])
        mine, other = self._called, _NAMES[target.layout]
        tensor = self._stored_scale(parts)
        outputs[other.tensor][...] = tensor.value if mine == other else _in_other_form(tensor, target)
        if target.scaled:
            self.pass_on(parts, outputs, target)

    def check_relabel(self, parts: Parts, target: Format) -> None:
        """Look for a tensor scale of the other form."""
        if isinstance(target, Nvfp4) and self._called != _NAMES[target.layout]:
            _in_other_form(self._stored_scale(parts), target)

    @property
    def along(self) -> tuple[str, ...]:
        """The scale of the inputs that a source has."""
        return (self._called.inputs,) if self.scaled else ()

    def pass_on(self, parts: Parts, outputs: Parts, target: Format) -> None:
        """Say the scale of the inputs as the layout of the target has it.

        Raises:
            ValueAt: it is none.
        """
        if not isinstance(target, Nvfp4):
            raise TypeError(target)  # not asked
        mine, other = self._called, target._called  # noqa: SLF001  of the same class
        inputs = parts[mine.inputs]
        outputs[other.inputs][...] = inputs if mine == other else _inverse_of_inputs(inputs)

    def with_inputs(self, largest: float | None) -> Nvfp4:
        """Return it with a scale by the rule of the layout's tool, see `fp4.input_scale`; 1.0 where that is zero."""
        from k2quant.kernels.codecs.fp4 import input_scale

        found = 0.0 if largest is None else input_scale(largest, divides=self._called.divides)
        # Of an input up to 1.8e-42 the rule gives zero, by which no engine can divide.
        return replace(self, inputs=found or 1.0)

    def rounding_allowed(self) -> Nvfp4:
        """Round MXFP4 whose exponents are too far apart, and tensor scales that have no inverse."""
        return replace(self, rounding=True)

    @property
    def rounds(self) -> bool:
        """Whether that was allowed."""
        return self.rounding

    def taking(self, source: Format) -> Nvfp4:
        """Take over the scale of the inputs that NVFP4 has, unless another one is asked for."""
        goes_along = isinstance(source, Nvfp4) and source.scaled and self.inputs is None
        return replace(self, scaled=True) if goes_along else self

    @property
    def in_memory(self) -> Nvfp4:
        """What the products read: the layout as it is, without what is said of the inputs."""
        return Nvfp4(layout=self.layout)

    # --- recognising it ---

    @classmethod
    def recognise(cls, suffix: str, entry: Entry, beside: Neighbours) -> Stored | None:
        """Take bytes of codes with E4M3 scales, and with one of the two tensor scales."""
        layout = _layout_of(beside)
        if layout is None or suffix not in cls.mains or entry.dtype != "U8":
            return None
        if all(beside.get(main) is not None for main in cls.mains):
            raise MalformedFile(f"stored twice, as {' and as '.join(cls.mains)}", tensor=entry.name, file=entry.file)
        if (error := _scaled_twice(entry, beside)) is not None:
            raise error
        called = _NAMES[layout]
        shape = wide(entry)
        scale, tensor = beside.partner("weight_scale", entry), beside.partner(called.tensor, entry)
        if scale.dtype != "F8_E4M3":
            raise DtypeMismatch(tensor=scale.name, file=scale.file, expected="F8_E4M3", found=scale.dtype)
        inputs = beside.get(called.inputs)
        found = cls(layout=layout, scaled=inputs is not None)
        check_shape(scale, found, shape, NVFP4_BLOCK)
        for one in (tensor, *((inputs,) if inputs is not None else ())):
            _check_number(one)
        return Stored(found, shape, found.streamed)

    @classmethod
    def owns(cls, suffix: str, beside: Neighbours) -> bool:
        """Tell whether scales have bytes of codes, by the names of one layout."""
        layout = _layout_of(beside)
        if layout is None:
            return False
        called = _NAMES[layout]
        return suffix in {"weight_scale", called.tensor, called.inputs}

    @classmethod
    def refusal(cls, suffix: str, entry: Entry, beside: Neighbours) -> CheckpointError | None:
        """Know what else ModelOpt packs."""
        if suffix == "pre_quant_scale":
            return beside.foreign(entry, "inputs that are scaled first (pre_quant_scale, of AWQ) are not supported")
        return _scaled_twice(entry, beside) if suffix in cls.whole else None

    @classmethod
    def asked_for(
        cls, stored: Iterable[tuple[Format, Entry]] = (), grid: Grid | None = None, layout: Layout | None = None
    ) -> Format:
        """Return the layout that was asked for, weights only."""
        return cls(layout=layout or "modelopt")

    # --- its values ---

    def extent(self, parts: Parts) -> tuple[int, int]:
        """Return rows, and two columns for each byte."""
        rows, pairs = parts[self.main].shape
        return rows, pairs * 2

    def reading(self, parts: Parts) -> tuple[Any, ...]:
        """Return codes, block scales, and the tensor scale."""
        return parts[self.main], parts["weight_scale"], self._stored_scale(parts)

    def _stored_scale(self, parts: Parts) -> TensorScale:
        """Return the tensor scale of a panel.

        Raises:
            ValueAt: it is none.
        """
        from k2quant.kernels.codecs.fp4 import TensorScale, check_tensor

        tensor = TensorScale(float(parts[self._called.tensor].reshape(-1)[0]), self._called.divides)
        check_tensor(tensor, divisor=True)
        return tensor

    def writing(self, parts: Parts) -> tuple[Any, ...]:
        """Return the tensor scale, which is filled in, and codes and block scales to fill."""
        return self._fill_tensor_scale(parts), parts[self.main], parts["weight_scale"]

    def _fill_tensor_scale(self, parts: Parts) -> TensorScale:
        tensor = self._tensor_scale
        parts[self._called.tensor][...] = tensor.value
        return tensor

    @property
    def _tensor_scale(self) -> TensorScale:
        if self.tensor is None:
            raise AssertionError(f"{self.label} is written before it was settled")
        return self.tensor

    def decode(self, parts: Parts, out: U16, codecs: Codecs) -> None:
        """Multiply each block by its scale and the tensor's."""
        codecs.nvfp4.decode(parts[self.main], parts["weight_scale"], self._stored_scale(parts), out)

    def encode(self, weights: U16, parts: Parts, codecs: Codecs) -> Figures:
        """Compute each block's scale, and round."""
        return codecs.nvfp4.encode(weights, *self.writing(parts))

    def choose(self, weights: U16, codecs: Codecs) -> NDArray[Any]:
        """Return the E4M3 bits of each block's scale."""
        scale = _scales_for(weights)
        codecs.nvfp4.choose(weights, self._tensor_scale, scale)
        return scale

    def store(self, weights: U16, scales: NDArray[Any], parts: Parts, codecs: Codecs) -> Figures:
        """Round at given scales."""
        parts["weight_scale"][...] = scales
        return codecs.nvfp4.store(weights, scales, self._fill_tensor_scale(parts), parts[self.main])

    @property
    def candidates(self) -> int:
        """Those of the rule."""
        from k2quant.kernels.codecs.scales.fp4 import NVFP4_STEPS

        return len(NVFP4_STEPS)

    def search(self, weights: U16, importance: F32 | None, codecs: Codecs, mean: F32 | None = None) -> NDArray[Any]:
        """Return the E4M3 bits of the best scale of some for each block."""
        scale = _scales_for(weights)
        codecs.nvfp4.search(weights, importance, self._tensor_scale, scale, mean=mean)
        return scale

    def weighted_error(
        self,
        weights: U16,
        scales: NDArray[Any],
        importance: F32 | None,
        codecs: Codecs,
        mean: F32 | None = None,
    ) -> float:
        """Sum what columns lose at given scales."""
        return codecs.nvfp4.weighted_error(weights, scales, self._tensor_scale, importance, mean=mean)

    def survey(self, weights: U16, codecs: Codecs) -> float:
        """Return the largest magnitude."""
        return codecs.nvfp4.amax(weights)

    def survey_of(self, source: Format, parts: Parts, codecs: Codecs, scratch: Any) -> object:
        """Return the exponents that MXFP4 has, and of all else the largest magnitude."""
        if not isinstance(source, Mxfp4):
            return Format.survey_of(self, source, parts, codecs, scratch)
        found = codecs.mxfp4.exponents(*source.reading(parts))
        return None if found is None else Exponents(*found)

    def settled(self, surveys: list[object]) -> Nvfp4:
        """Take the tensor scale of the largest magnitude; of MXFP4 one at which its codes stay.

        Raises:
            UnsupportedFormat: the exponents of MXFP4 are too far apart for that, or it shares the tensor scale with
                another format, and rounding was not allowed.
        """
        from k2quant.kernels.codecs.fp4 import tensor_scale

        found = [each for each in surveys if each]  # panels of zeros, 0.0 or None, ask for nothing
        if found and all(isinstance(each, Exponents) for each in found):
            return self._restating([each for each in found if isinstance(each, Exponents)])
        mixed = any(isinstance(each, Exponents) for each in found)
        if mixed and not self.rounding:
            raise UnsupportedFormat(
                "MXFP4 that shares a tensor scale with weights of another format, which its codes do not fit",
                remedy="allow it with `allow_rounding=True`, or convert to bf16 first",
            )
        amax = max((_amax(each) for each in found), default=0.0)
        tensor = tensor_scale(amax, divides=self._called.divides)
        # Zeros of MXFP4 have no exponent: their codes, signs with them, stay at whichever tensor scale.
        return replace(self, tensor=tensor, exponent=None if mixed else 0)

    def _restating(self, found: list[Exponents]) -> Nvfp4:
        from k2quant.kernels.codecs.fp4 import LEAST_POWER, MOST_POWER, closed_form

        lowest, highest = min(each.lowest for each in found), max(each.highest for each in found)
        form = closed_form(lowest, highest, divides=self._called.divides)
        if form is None and not self.rounding:
            raise UnsupportedFormat(
                "MXFP4 whose scales lie too far apart for NVFP4 without rounding",
                expected=f"at most {MOST_POWER - LEAST_POWER} powers of two between them",
                found=f"{highest - lowest}, from 2^{lowest} to 2^{highest}",
                remedy="allow it with `allow_rounding=True`: blocks that are too small are rounded, and counted",
            )
        rounding = form is None
        form = form or closed_form(highest, highest, divides=self._called.divides)
        if form is None:
            raise AssertionError(f"2^{highest} has no closed form")  # one power has
        return replace(self, tensor=form.tensor, exponent=form.exponent, rounding=rounding)

    def restates(self, source: Format) -> bool:
        """Tell whether it was settled for the codes of MXFP4."""
        return isinstance(source, Mxfp4) and self.exponent is not None

    def restate(self, source: Format, parts: Parts, outputs: Parts, codecs: Codecs) -> Figures | None:
        """Copy codes, and write each exponent twice, less that of the tensor scale."""
        if self.exponent is None:
            raise TypeError(source)  # not asked
        given, (tensor, codes, scale) = source.reading(parts), self.writing(outputs)
        codecs.nvfp4.restate(given[0], given[1], self.exponent, tensor, codes, scale)
        if not self.rounding:
            return None
        before, after = (_decoded(stored, held, codecs) for stored, held in ((source, parts), (self, outputs)))
        return codecs.floats.compare(before, after)

    def outside(self, before: U16, after: U16, parts: Parts) -> int:
        """Allow the distance to the nearest code, at a scale that the rule or a search may choose."""
        from k2quant.kernels.codecs.cpu.fp4.budget import outside
        from k2quant.kernels.codecs.fp4 import LEAST_E4M3, block_scales

        tensor = self._stored_scale(parts)
        scale = block_scales(parts["weight_scale"], tensor)
        unit = LEAST_E4M3 / tensor.value if tensor.divides else LEAST_E4M3 * tensor.value
        zeros = 3.1 * unit if tensor.divides else 0.0
        return outside(before, after, scale, **_BUDGET, unit=(1.6 * unit, 6.6 * unit), zeros=zeros)

    def codes_changed(self, after: Parts, before: Parts) -> int:
        """Count nibbles that differ."""
        return nibbles_changed(after[self.main], before[self.main])

    # --- the config beside it ---

    def config(self, quantised: Iterable[str], kept: list[str]) -> dict[str, Any]:
        """Return the block of the layout."""
        if self.layout == "modelopt":
            return modelopt.block(list(quantised), kept, inputs=self.scales_inputs)
        return compressed_tensors.block([(self, list(quantised))], kept)

    @classmethod
    def companions(cls, block: Mapping[str, Any]) -> dict[str, bytes]:
        """Return ModelOpt's own file."""
        return {modelopt.COMPANION: modelopt.companion(block)}

    def cache_scheme(self) -> dict[str, Any]:
        """Return what the layout's tool says of an FP8 cache."""
        return modelopt.CACHE if self.layout == "modelopt" else compressed_tensors.CACHE

    def config_group(self) -> dict[str, Any] | None:
        """Return the scheme of the weights, of the one layout that has config groups of compressed-tensors."""
        if self.layout == "modelopt":
            return None
        return compressed_tensors.scheme(group_size=NVFP4_BLOCK, **_SCHEME) | {
            "scale_dtype": "torch.float8_e4m3fn",
            "strategy": "tensor_group",
        }

    def input_activations(self) -> dict[str, Any] | None:
        """Return what llm-compressor's NVFP4 says of a layer's inputs: scaled by the tensor scale and as they come."""
        scheme = self.config_group()
        return None if scheme is None or not self.scales_inputs else scheme | {"dynamic": "local"}

    @classmethod
    def claims(cls, scheme: Mapping[str, Any]) -> bool:
        """Tell symmetric 4-bit floats from all else."""
        return {key: scheme.get(key) for key in _SCHEME} == _SCHEME

    @classmethod
    def check_config(cls, block: Mapping[str, Any], stored: list[tuple[Format, tuple[int, ...]]]) -> None:
        """Compare whose names a config means, and the group size, with the weights that are there."""
        layouts = [each.layout for each, _ in stored if isinstance(each, cls)]
        if "quant_method" in block:
            modelopt.check(block)
            modelopt.check_layout(layouts)
            return
        check_group(block, NVFP4_BLOCK, "tensor_group", "float8_e4m3fn")
        if "modelopt" in layouts:
            raise contradiction(cls.stands_for, "weights with weight_scale_2")

    @classmethod
    def carried(cls, fresh: dict[str, Any], source: Mapping[str, Any], recast: Recast) -> dict[str, Any]:
        """Keep in a copy who made it, and what it says of the inputs."""
        return modelopt.carried(fresh, source, recast)

    @classmethod
    def static_inputs(cls, block: Mapping[str, Any]) -> bool:
        """Tell the two algorithms apart."""
        return modelopt.quantises_inputs(block)

    @classmethod
    def quantises_inputs(cls, block: Mapping[str, Any]) -> bool:
        """Know that ModelOpt's block says it."""
        return modelopt.quantises_inputs(block) if "quant_method" in block else bool(block.get("input_activations"))

    # --- in training ---

    def fake_quantized(self, weights: torch.Tensor, bits: int, largest: torch.Tensor | None = None) -> torch.Tensor:
        """Return codes times scales, the tensor scale for the largest weight of all that share it."""
        from k2quant.kernels import ops

        divides = self._called.divides
        return ops.fake_quantize_nvfp4(weights, self._tensor_for(weights, largest), divides=divides)

    def inside(self, weights: torch.Tensor, bits: int, largest: torch.Tensor | None = None) -> torch.Tensor:
        """Tell weights up to 6 times what their codes are multiplied with from those beyond."""
        from k2quant.kernels.codecs import reference

        divides = self._called.divides
        return reference.nvfp4_inside(weights, self._tensor_for(weights, largest), divides=divides)

    def exported(self, weights: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """Return codes, block scales, and the tensor scale that was settled."""
        from k2quant.kernels import ops

        tensor = self._tensor_for(weights, None)
        found = ops.bf16_to_nvfp4(weights, tensor, divides=self._called.divides)
        called = self._called
        return dict(zip((called.codes, "weight_scale", called.tensor), (*found, tensor.reshape(1)), strict=True))

    def _tensor_for(self, weights: torch.Tensor, largest: torch.Tensor | None) -> torch.Tensor:
        """Return the tensor scale, float32 `[]` where the weights lie: settled, or for a largest weight."""
        import torch

        from k2quant.kernels import ops

        if largest is not None:
            return ops.nvfp4_tensor_scale(largest, divides=self._called.divides)
        return torch.tensor(self._tensor_scale.value, dtype=torch.float32, device=weights.device)

    # --- in memory ---

    def unrunnable(self, shape: tuple[int, ...]) -> tuple[str, object] | None:
        """The products take whole groups of 32 columns."""
        from k2quant.kernels.products.packed.weight import GROUP

        return (f"a multiple of {GROUP} columns", shape) if shape[-1] % GROUP else None

    def packed(self, shape: tuple[int, ...], *, on: torch.device) -> PackedWeight:
        """Return a weight in the checkpoint's own layout."""
        from k2quant.kernels.products.prepare import empty

        return empty(self.name, shape, numbers=(int(self._called.divides),), device="meta", for_device=on)


def _layout_of(beside: Neighbours) -> Layout | None:
    """Return the layout whose codes stand beside its tensor scale, or at least beside E4M3 scales; None: no NVFP4."""
    packed = [layout for layout, called in _NAMES.items() if _dtype(beside, called.codes) == "U8"]
    told = [layout for layout, called in _NAMES.items() if beside.get(called.tensor) is not None]
    if not told and _dtype(beside, "weight_scale") != "F8_E4M3":
        return None
    return next((layout for layout in packed if layout in told), next(iter(packed), None))


def _dtype(beside: Neighbours, suffix: str) -> str | None:
    entry = beside.get(suffix)
    return None if entry is None else entry.dtype


def _scaled_twice(entry: Entry, beside: Neighbours) -> MalformedFile | None:
    """Return what is wrong where there are two tensor scales, of which only one can be meant."""
    suffixes = [called.tensor for called in _NAMES.values()]
    if any(beside.get(suffix) is None for suffix in suffixes):
        return None
    return MalformedFile(f"scaled twice, by {' and by '.join(suffixes)}", tensor=entry.name, file=entry.file)


def _check_number(entry: Entry) -> None:
    """Refuse what is not one float32.

    Raises:
        DtypeMismatch: it is of another dtype.
        ShapeMismatch: it is more than one, or none.
    """
    if entry.dtype != "F32":
        raise DtypeMismatch(tensor=entry.name, file=entry.file, expected="F32", found=entry.dtype)
    if entry.shape not in _ONE:
        raise ShapeMismatch(
            "a scale of the whole tensor", tensor=entry.name, file=entry.file, expected="one number", found=entry.shape
        )


def _amax(survey: object) -> float:
    """Return the largest magnitude that a panel can have: BF16's own where 6 at the largest exponent exceeds it."""
    from k2quant.kernels.codecs.fp4 import LARGEST_E2M1

    if not isinstance(survey, Exponents):
        return float(survey)  # type: ignore[arg-type]
    return min(LARGEST_E2M1 * 2.0**survey.highest, _LARGEST_BF16)


def _decoded(stored: Format, parts: Parts, codecs: Codecs) -> U16:
    import numpy as np

    out = np.empty(stored.extent(parts), np.uint16)
    stored.decode(parts, out, codecs)
    return out


def _in_other_form(tensor: TensorScale, target: Nvfp4) -> float:
    """Return the tensor scale that means the same in the layout of a target.

    Raises:
        ValueAt: there is none, and rounding was not allowed.
    """
    from k2quant.kernels.codecs.scales.tensor_forms import nearest_inverse, same_inverse
    from k2quant.kernels.codecs.values import ValueAt

    found = same_inverse(tensor) or (nearest_inverse(tensor) if target.rounding else None)
    if found is None:
        what = (
            f"tensor scale {tensor.value}: no float32 in the form of {target.layout} means the same weights; "
            "`allow_rounding=True` takes the nearest"
        )
        raise ValueAt(row=0, column=0, what=what, of="tensor scale")
    return found.value


def _inverse_of_inputs(scale: NDArray[Any]) -> NDArray[Any]:
    """Return a scale of inputs in the other form.

    Raises:
        ValueAt: it is none.
    """
    import numpy as np

    from k2quant.kernels.codecs.values import ValueAt

    with np.errstate(all="ignore"):
        found = np.float32(1) / scale
    if not (np.isfinite(scale) & np.isfinite(found) & (scale > 0)).all():
        what = f"input scale {scale.reshape(-1)[0]}: expected a number above 0 whose inverse is finite"
        raise ValueAt(row=0, column=0, what=what, of="input scale")
    return found


def _scales_for(weights: U16) -> NDArray[Any]:
    import numpy as np

    return np.empty((weights.shape[0], weights.shape[1] // NVFP4_BLOCK), np.uint8)
