"""Block FP8: E4M3 codes with a float32 scale for each block, as moonshotai/Kimi-K2-Instruct and DeepSeek-V3 have it.

compressed-tensors (llm-compressor's FP8_BLOCK) has the same codes and the same multiplier under another name and
another config: the two layouts become one another without rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from k2quant.errors import CheckpointError, DtypeMismatch, MalformedFile, ShapeMismatch, UnsupportedFormat
from k2quant.formats.bf16 import check_stored_once
from k2quant.formats.configs import compressed_tensors
from k2quant.formats.configs.keys import ROTATIONS, Key, Recast, carry, is_flag, is_object, is_texts, shown
from k2quant.formats.dtypes import SCALES, TensorSpec, widened
from k2quant.formats.format import (
    Entry,
    Format,
    Layout,
    Neighbours,
    Parts,
    Scope,
    Stored,
    ceil_div,
    contradiction,
    listed,
    matrix,
)
from k2quant.ground import names
from k2quant.kernels.codecs.grids import BLOCK

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.grids import Grid
    from k2quant.kernels.codecs.seam import Codecs
    from k2quant.kernels.codecs.values import F32, U16
    from k2quant.kernels.products.packed.weight import PackedWeight

FP8_BLOCK = BLOCK
"""Rows and columns that share one FP8 scale in every K2 and DeepSeek-V3 release (`weight_block_size`)."""


class _Names(NamedTuple):
    """What a layout calls things."""

    scale: str
    """Suffix of the scales."""
    method: str
    """How a config speaks of it."""
    size: str
    """Where a config has the block."""
    fixed: tuple[str, str]
    """What else a config may say of it, and how alone."""


_NAMES: dict[Layout, _Names] = {
    "deepseek": _Names("weight_scale_inv", "quant_method fp8", "weight_block_size", ("fmt", "e4m3")),
    "compressed-tensors": _Names("weight_scale", "format float-quantized", "block_structure", ("strategy", "block")),
}

_SCHEME: dict[str, Any] = {"num_bits": 8, "symmetric": True, "type": "float"}

# E4M3 has three mantissa bits, so |w - w'| <= |w| / 16, or s * 2^-10 among its subnormal codes; rounding to BF16 adds
# |w| * 2^-8 at the most. `s` is the scale that is stored, but no more than 1.01 times amax/448 of the weights before.
# Where the scale itself is subnormal it has few bits left, hence 2^-130 on top.
_BUDGET = {"largest_code": 448.0, "steps": 2.0**-10 * 1.01, "relative": 1 / 16 + 2.0**-8, "floor": 2.0**-130}

_KEYS = {
    "quant_method": Key(fate="written", expected="fp8", fits=lambda value: value == "fp8"),
    "fmt": Key(fate="written", expected="e4m3", fits=lambda value: value == "e4m3"),
    "weight_block_size": Key(fate="written", expected="a block", fits=lambda _: True),  # against the scales
    "modules_to_not_convert": Key(fate="written", expected="a list of names", fits=is_texts),
    "ignored_layers": Key(fate="written", expected="a list of names", fits=is_texts),
    "modules_to_convert": Key(fate="loading", expected="a list of names", fits=is_texts),
    "transform_config": ROTATIONS,
    "scale_fmt": Key(fate="codes", expected="float or ue8m0", fits=lambda value: value in ("float", "ue8m0")),
    "expert_dtype": Key(fate="codes", expected="fp8", fits=lambda value: value == "fp8"),
    "activation_scheme": Key(
        fate="beyond",
        expected="dynamic or static",
        fits=lambda value: isinstance(value, str) and value.lower() in {"dynamic", "static"},
    ),
    "kv_cache_scheme": Key(fate="beyond", expected="an object", fits=is_object),
    "dequantize": Key(fate="loading", expected="true or false", fits=is_flag),
}
"""What K2, DeepSeek-V3 and transformers' FineGrainedFP8Config have in the block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8(Format):
    """Float8 E4M3 codes with a float32 scale for each block. The scale multiplies, though its name may say `inv`."""

    name: ClassVar[str] = "fp8"
    served: ClassVar[str] = "vLLM, SGLang, transformers, k2quant"
    mains: ClassVar[tuple[str, ...]] = ("weight",)
    partners: ClassVar[tuple[str, ...]] = tuple(called.scale for called in _NAMES.values())
    reads: ClassVar[str] = "block-FP8 with weight_scale_inv or weight_scale"
    stands_for: ClassVar[str] = "block-FP8 weights with weight_scale_inv, as quant_method fp8 says"
    method: ClassVar[str | None] = "fp8"
    keys: ClassVar[Mapping[str, Key] | None] = _KEYS
    scheme_words: ClassVar[str] = "symmetric 8-bit float"
    packing: ClassVar[str] = "float-quantized"
    default_scope: ClassVar[Scope | None] = "linear"
    layouts: ClassVar[tuple[str, ...]] = tuple(_NAMES)
    trained: ClassVar[bool] = True

    block: tuple[int, int] = FP8_BLOCK
    """Rows and columns that share one scale. Blocks at the edges may be cut off: `kv_a_proj_with_mqa` has 576 rows."""
    layout: Layout = "deepseek"
    """What the scales are called, and whose config speaks of them."""
    scale_dtype: str = "F32"
    """F32 as it is written; a source may hold any of `SCALES`, which are exact in float32."""

    @property
    def streamed(self) -> tuple[str, ...]:
        """Codes and scales."""
        return self.main, self.scale_suffix

    @property
    def scale_suffix(self) -> str:
        """That of the layout."""
        return _NAMES[self.layout].scale

    def state(self, shape: tuple[int, ...], *, name: str = "weight") -> dict[str, TensorSpec]:
        """Return codes and scales of a weight."""
        blocks = tuple(ceil_div(size, step) for size, step in zip(shape, self.block, strict=True))
        return {"weight": TensorSpec("F8_E4M3", shape), self.scale_suffix: TensorSpec(self.scale_dtype, blocks)}

    def rows(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        """Return rows of codes as they are, of scales by blocks."""
        return (start, stop) if suffix == "weight" else (start // self.block[0], ceil_div(stop, self.block[0]))

    @property
    def row_step(self) -> int:
        """Rows of a block."""
        return self.block[0]

    @property
    def unit(self) -> tuple[tuple[int, int], str, str]:
        """Block, layout, and dtype of the scales: what is written is all of one kind, whatever it was copied from."""
        return self.block, self.layout, self.scale_dtype

    @property
    def scales(self) -> tuple[int, int]:
        """The block."""
        return self.block

    @property
    def label(self) -> str:
        """Such as `fp8 128x128`."""
        size = f"fp8 {self.block[0]}x{self.block[1]}"
        return size if self.layout == "deepseek" else f"{size} {self.layout}"

    @property
    def unwritable(self) -> str | None:
        """Scales that are no float32."""
        return None if self.scale_dtype == "F32" else self.scale_dtype

    def relabels(self, other: Format) -> bool:
        """Tell whether the blocks are the same, and the other's scales float32."""
        return isinstance(other, Fp8) and other.block == self.block and other.unwritable is None

    def relabel(self, parts: Parts, outputs: Parts, target: Format) -> None:
        """Copy codes, and widen scales."""
        import numpy as np

        for suffix, array in zip(target.streamed, (parts["weight"], self._scale(parts)), strict=True):
            np.copyto(outputs[suffix], array)

    @property
    def in_memory(self) -> Fp8:
        """The products read float32 scales."""
        return replace(self, scale_dtype="F32")

    def in_words(self, bits: int) -> str:
        """Name it."""
        return "block FP8"

    # --- recognising it ---

    @classmethod
    def recognise(cls, suffix: str, entry: Entry, beside: Neighbours) -> Stored | None:
        """Take E4M3 codes with scales for blocks of 128x128 or 1x128."""
        if suffix not in cls.mains or entry.dtype != "F8_E4M3":
            return None
        check_stored_once(entry, beside)
        shape = matrix(entry)
        layout = _layout_of(entry, beside)
        scale = beside.partner(_NAMES[layout].scale, entry)
        blocks = (FP8_BLOCK, (1, FP8_BLOCK[1])) if layout == "deepseek" else (FP8_BLOCK,)
        kinds = [cls(block=block, layout=layout, scale_dtype=scale.dtype) for block in blocks]
        found = next((kind for kind in kinds if kind.state(shape)[kind.scale_suffix].shape == scale.shape), None)
        if found is None and layout != "deepseek" and scale.shape in {(), (1,), (1, 1), shape[:1], (shape[0], 1)}:
            raise beside.foreign(scale, _NO_BLOCKS)
        if scale.dtype not in SCALES:
            raise DtypeMismatch(tensor=scale.name, file=scale.file, expected=" or ".join(SCALES), found=scale.dtype)
        if found is None:
            expected = kinds[0].state(shape)[kinds[0].scale_suffix].shape
            raise ShapeMismatch(
                tensor=scale.name,
                file=scale.file,
                expected=f"{expected} for a weight of {shape} in blocks of 128x128",
                found=scale.shape,
            )
        return Stored(found, shape, found.streamed)

    @classmethod
    def owns(cls, suffix: str, beside: Neighbours) -> bool:
        """Tell whether scales have codes."""
        weight = beside.get("weight")
        return suffix in cls.partners and weight is not None and weight.dtype == "F8_E4M3"

    @classmethod
    def refusal(cls, suffix: str, entry: Entry, beside: Neighbours) -> CheckpointError | None:
        """Know FP8 of other tools."""
        weight = beside.get("weight")
        scaled = suffix == "weight_scale" and weight is not None and weight.dtype.startswith("F8")
        return beside.foreign(entry, _NO_BLOCKS) if scaled else None

    @classmethod
    def asked_for(
        cls, stored: Iterable[tuple[Format, Entry]] = (), grid: Grid | None = None, layout: Layout | None = None
    ) -> Format:
        """Keep the source's blocks, if it has some; its layout only where that is asked for."""
        blocks = {each.block for each, _ in stored if isinstance(each, cls)}
        if len(blocks) > 1:
            raise UnsupportedFormat("FP8 weights of several block sizes, which no config can describe", found=blocks)
        found = cls(block=blocks.pop() if blocks else FP8_BLOCK, layout=layout or "deepseek")
        if found.layout != "deepseek" and found.block != FP8_BLOCK:
            raise UnsupportedFormat(
                f"{found.layout} has block FP8 for blocks of 128x128 alone",
                expected="blocks of 128x128",
                found=found.label,
                remedy="convert to bf16 first, or leave out `layout=`",
            )
        return found

    # --- its values ---

    def reading(self, parts: Parts) -> tuple[Any, ...]:
        """Return codes, scales and block."""
        return parts["weight"], self._scale(parts), self.block

    def _scale(self, parts: Parts) -> F32:
        return widened(parts[self.scale_suffix])

    def writing(self, parts: Parts) -> tuple[Any, ...]:
        """Return the block, and codes and scales to fill."""
        return self.block, parts["weight"], parts[self.scale_suffix]

    def decode(self, parts: Parts, out: U16, codecs: Codecs) -> None:
        """Multiply each block by its scale."""
        codecs.fp8.decode(parts["weight"], self._scale(parts), self.block, out)

    def encode(self, weights: U16, parts: Parts, codecs: Codecs) -> Figures:
        """Recover or compute each block's scale, and round."""
        return codecs.fp8.encode(weights, *self.writing(parts))

    def choose(self, weights: U16, codecs: Codecs) -> NDArray[Any]:
        """Return the float32 scale of each block."""
        import numpy as np

        rows, columns = (ceil_div(size, step) for size, step in zip(weights.shape, self.block, strict=True))
        scale = np.empty((rows, columns), np.float32)
        codecs.fp8.choose(weights, self.block, scale)
        return scale

    def store(self, weights: U16, scales: NDArray[Any], parts: Parts, codecs: Codecs) -> Figures:
        """Round at given scales."""
        parts[self.scale_suffix][...] = scales
        return codecs.fp8.store(weights, scales, self.block, parts["weight"])

    def outside(self, before: U16, after: U16, parts: Parts) -> int:
        """Allow what three mantissa bits explain."""
        from k2quant.kernels.codecs.cpu.bf16 import outside

        return outside(before, after, self._scale(parts), self.block, **_BUDGET)

    # --- the config beside it ---

    def config(self, quantised: Iterable[str], kept: list[str]) -> dict[str, Any]:
        """Return the block of K2-Instruct. What it leaves out by itself (router, head, embedding) needs no entry."""
        if self.layout != "deepseek":
            return compressed_tensors.block([(self, list(quantised))], kept)
        block: dict[str, Any] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": self.method,
            "weight_block_size": list(self.block),
        }
        expected = [
            base
            for base in kept
            if names.is_projection(base)
            or names.is_unknown_matrix(base)
            or names.tensor_class(f"{base}.weight") in {"vision", "projector"}
        ]
        return block | ({"modules_to_not_convert": expected} if expected else {})

    def cache_scheme(self) -> dict[str, Any] | None:
        """Return what compressed-tensors says of an FP8 cache; DeepSeek's block has no word for one."""
        return None if self.layout == "deepseek" else compressed_tensors.CACHE

    def config_group(self) -> dict[str, Any] | None:
        """Return the scheme of the weights, of the one layout that has config groups."""
        return None if self.layout == "deepseek" else compressed_tensors.scheme(block=self.block, **_SCHEME)

    def input_activations(self) -> dict[str, Any] | None:
        """Return what llm-compressor's FP8_BLOCK says of a layer's inputs.

        That is compressed-tensors' preset of this name (compressed_tensors/quantization/quant_scheme.py): codes of
        FP8 in groups of 128, scaled as they come. vLLM's compressed-tensors loader takes block FP8 with FP8 inputs that
        are scaled so, and no other (CompressedTensorsW8A8Fp8); DeepSeek's `activation_scheme: dynamic` means the same.
        """
        if self.layout == "deepseek":
            return None
        return compressed_tensors.scheme(group_size=self.block[1], **_SCHEME) | {"dynamic": True, "observer": None}

    @classmethod
    def claims(cls, scheme: Mapping[str, Any]) -> bool:
        """Tell symmetric 8-bit floats from all else."""
        return {key: scheme.get(key) for key in _SCHEME} == _SCHEME

    @classmethod
    def check_config(cls, block: Mapping[str, Any], stored: list[tuple[Format, tuple[int, ...]]]) -> None:
        """Compare the block size, and whose names a config means, with the scales that are there."""
        layout: Layout = "deepseek" if "quant_method" in block else "compressed-tensors"
        called = _NAMES[layout]
        key, value = called.fixed
        if block.get(key, value) != value:
            raise UnsupportedFormat(key, file="config.json", expected=value, found=shown(block[key]))
        kinds = {each for each, _ in stored if isinstance(each, cls)}
        if {kind.layout for kind in kinds} != {layout}:
            found = listed(sorted(kind.scale_suffix for kind in kinds)) or "none"
            raise contradiction(f"block-FP8 weights with {called.scale}, as {called.method} says", found)
        blocks, size = sorted({kind.block for kind in kinds}), block.get(called.size)
        if blocks != ([tuple(size)] if isinstance(size, list) else None):
            raise contradiction(f"{called.size} {shown(size)}", f"scales for blocks of {listed(blocks)}")

    @classmethod
    def carried(cls, fresh: dict[str, Any], source: Mapping[str, Any], recast: Recast) -> dict[str, Any]:
        """Keep static activations where every weight has their scale, and how scales are written where they are."""
        block = carry(fresh, source, _KEYS, recast)
        if recast.copied or (recast.scaled and cls.static_inputs(source)):
            block["activation_scheme"] = source.get("activation_scheme") or fresh["activation_scheme"]
        return block

    @classmethod
    def static_inputs(cls, block: Mapping[str, Any]) -> bool:
        """Tell static from dynamic, in whatever case."""
        return str(block.get("activation_scheme")).lower() == "static"

    # --- in memory and in training ---

    def unrunnable(self, shape: tuple[int, ...]) -> tuple[str, object] | None:
        """The products take whole groups of 32 columns."""
        from k2quant.kernels.products.packed.weight import GROUP

        return (f"a multiple of {GROUP} columns", shape) if shape[-1] % GROUP else None

    def packed(self, shape: tuple[int, ...], *, on: torch.device) -> PackedWeight:
        """Return a weight in the checkpoint's own layout."""
        from k2quant.kernels.products.prepare import empty

        return empty(self.name, shape, numbers=self.block, device="meta", for_device=on)

    def fake_quantized(self, weights: torch.Tensor, bits: int, largest: torch.Tensor | None = None) -> torch.Tensor:
        """Return codes times scales."""
        from k2quant.kernels import ops

        return ops.fake_quantize_fp8(weights, self.block)

    def exported(self, weights: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """Return codes and scales."""
        from k2quant.kernels import ops

        return dict(zip(self.streamed, ops.bf16_to_fp8(weights, self.block), strict=True))


def _layout_of(entry: Entry, beside: Neighbours) -> Layout:
    """Return the layout in which a weight's scales are called as they are.

    Raises:
        MalformedFile: there are scales of both names, and only one of them can be meant.
    """
    found: list[Layout] = [layout for layout, called in _NAMES.items() if beside.get(called.scale) is not None]
    if len(found) > 1:
        raise MalformedFile("scaled twice, by weight_scale_inv and by weight_scale", tensor=entry.name, file=entry.file)
    return found[0] if found else "deepseek"


_NO_BLOCKS = "FP8 with a `weight_scale` for each row or tensor is not supported, only for each block of 128x128"
