"""Block FP8: E4M3 codes with a float32 scale for each block, as moonshotai/Kimi-K2-Instruct and DeepSeek-V3 have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from k2quant.errors import CheckpointError, DtypeMismatch, ShapeMismatch, UnsupportedFormat
from k2quant.formats.bf16 import check_stored_once
from k2quant.formats.dtypes import TensorSpec
from k2quant.formats.format import (
    Entry,
    Format,
    Neighbours,
    Parts,
    Scope,
    Stored,
    ceil_div,
    contradiction,
    listed,
    matrix,
)
from k2quant.formats.keys import Key, Recast, carry, is_flag, is_object, is_texts
from k2quant.ground import names
from k2quant.kernels.codecs.grids import BLOCK

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.grids import Grid
    from k2quant.kernels.codecs.seam import Codecs
    from k2quant.kernels.codecs.values import U16
    from k2quant.kernels.products.weights import PackedWeight

FP8_BLOCK = BLOCK
"""Rows and columns that share one FP8 scale in every K2 and DeepSeek-V3 release (`weight_block_size`)."""

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
    "modules_to_convert": Key(fate="codes", expected="a list of names", fits=is_texts),
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
    """Float8 E4M3 codes with a float32 scale for each block. The scale multiplies, though its name says `inv`."""

    name: ClassVar[str] = "fp8"
    main: ClassVar[str] = "weight"
    streamed: ClassVar[tuple[str, ...]] = ("weight", "weight_scale_inv")
    partners: ClassVar[tuple[str, ...]] = ("weight_scale_inv",)
    scale_suffix: ClassVar[str | None] = "weight_scale_inv"
    reads: ClassVar[str] = "block-FP8 with weight_scale_inv"
    stands_for: ClassVar[str] = "block-FP8 weights with weight_scale_inv, as quant_method fp8 says"
    method: ClassVar[str | None] = "fp8"
    keys: ClassVar[Mapping[str, Key] | None] = _KEYS
    default_scope: ClassVar[Scope | None] = "linear"
    trained: ClassVar[bool] = True

    block: tuple[int, int] = FP8_BLOCK
    """Rows and columns that share one scale. Blocks at the edges may be cut off: `kv_a_proj_with_mqa` has 576 rows."""

    def state(self, shape: tuple[int, ...], *, name: str = "weight") -> dict[str, TensorSpec]:
        """Return codes and scales of a weight."""
        blocks = tuple(ceil_div(size, step) for size, step in zip(shape, self.block, strict=True))
        return {"weight": TensorSpec("F8_E4M3", shape), "weight_scale_inv": TensorSpec("F32", blocks)}

    def rows(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        """Return rows of codes as they are, of scales by blocks."""
        return (start, stop) if suffix == "weight" else (start // self.block[0], ceil_div(stop, self.block[0]))

    @property
    def row_step(self) -> int:
        """Rows of a block."""
        return self.block[0]

    @property
    def unit(self) -> tuple[int, int]:
        """The block."""
        return self.block

    @property
    def label(self) -> str:
        """Such as `fp8 128x128`."""
        return f"fp8 {self.block[0]}x{self.block[1]}"

    def in_words(self, bits: int) -> str:
        """Name it."""
        return "block FP8"

    # --- recognising it ---

    @classmethod
    def recognise(cls, suffix: str, entry: Entry, beside: Neighbours) -> Stored | None:
        """Take E4M3 codes with scales for blocks of 128x128 or 1x128."""
        if suffix != cls.main or entry.dtype != "F8_E4M3":
            return None
        check_stored_once(entry, beside)
        shape = matrix(entry)
        if beside.get("weight_scale") is not None and beside.get("weight_scale_inv") is None:
            return None
        scale = beside.partner("weight_scale_inv", entry)
        if scale.dtype != "F32":
            raise DtypeMismatch(tensor=scale.name, file=scale.file, expected="F32", found=scale.dtype)
        for block in (FP8_BLOCK, (1, FP8_BLOCK[1])):
            found = cls(block=block)
            if found.state(shape)["weight_scale_inv"].shape == scale.shape:
                return Stored(found, shape, cls.streamed)
        raise ShapeMismatch(
            tensor=scale.name,
            file=scale.file,
            expected=f"{cls().state(shape)['weight_scale_inv'].shape} for a weight of {shape} in blocks of 128x128",
            found=scale.shape,
        )

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
        codes = suffix == "weight" and entry.dtype == "F8_E4M3" and beside.get("weight_scale") is not None
        return beside.foreign(entry, _NO_INV) if scaled or codes else None

    @classmethod
    def asked_for(cls, stored: Iterable[tuple[Format, Entry]] = (), grid: Grid | None = None) -> Format:
        """Keep the source's blocks, if it has some."""
        blocks = {each.block for each, _ in stored if isinstance(each, cls)}
        if len(blocks) > 1:
            raise UnsupportedFormat("FP8 weights of several block sizes, which no config can describe", found=blocks)
        return cls(block=blocks.pop() if blocks else FP8_BLOCK)

    # --- its values ---

    def reading(self, parts: Parts) -> tuple[Any, ...]:
        """Return codes, scales and block."""
        return parts["weight"], parts["weight_scale_inv"], self.block

    def writing(self, parts: Parts) -> tuple[Any, ...]:
        """Return the block, and codes and scales to fill."""
        return self.block, parts["weight"], parts["weight_scale_inv"]

    def decode(self, parts: Parts, out: U16, codecs: Codecs) -> None:
        """Multiply each block by its scale."""
        codecs.fp8.decode(parts["weight"], parts["weight_scale_inv"], self.block, out)

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
        parts["weight_scale_inv"][...] = scales
        return codecs.fp8.store(weights, scales, self.block, parts["weight"])

    def outside(self, before: U16, after: U16, parts: Parts) -> int:
        """Allow what three mantissa bits explain."""
        from k2quant.kernels.codecs.cpu.bf16 import outside

        return outside(before, after, parts["weight_scale_inv"], self.block, **_BUDGET)

    # --- the config beside it ---

    def config(self, quantised: Iterable[str], kept: list[str]) -> dict[str, Any]:
        """Return the block of K2-Instruct. What it leaves out by itself (router, head, embedding) needs no entry."""
        block: dict[str, Any] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": self.method,
            "weight_block_size": list(self.block),
        }
        expected = [
            base
            for base in kept
            if names.is_projection(base) or names.tensor_class(f"{base}.weight") in {"vision", "projector"}
        ]
        return block | ({"modules_to_not_convert": expected} if expected else {})

    @classmethod
    def check_config(cls, block: Mapping[str, Any], stored: list[tuple[Format, tuple[int, ...]]]) -> None:
        """Compare `weight_block_size` with the scales that are there."""
        blocks = sorted({each.block for each, _ in stored if isinstance(each, cls)})
        size = block.get("weight_block_size")
        if block.get("fmt", "e4m3") != "e4m3":
            raise UnsupportedFormat("fmt", file="config.json", expected="e4m3", found=repr(block["fmt"]))
        if not blocks:
            raise contradiction(cls.stands_for, "none")
        if blocks != ([tuple(size)] if isinstance(size, list) else None):
            raise contradiction(f"weight_block_size {size}", f"scales for blocks of {listed(blocks)}")

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
        from k2quant.kernels.products.weights import GROUP

        return (f"a multiple of {GROUP} columns", shape) if shape[-1] % GROUP else None

    def packed(self, shape: tuple[int, ...], *, on: torch.device) -> PackedWeight:
        """Return a weight in the checkpoint's own layout."""
        from k2quant.kernels.products.prepare import empty

        return empty(self.name, shape, numbers=self.block, device="meta", for_device=on)

    def fake_quantized(self, weights: torch.Tensor, bits: int) -> torch.Tensor:
        """Return codes times scales."""
        from k2quant.kernels import ops

        return ops.fake_quantize_fp8(weights, self.block)

    def exported(self, weights: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """Return codes and scales."""
        from k2quant.kernels import ops

        return dict(zip(self.streamed, ops.bf16_to_fp8(weights, self.block), strict=True))


_NO_INV = "FP8 with `weight_scale` is not supported, only `weight_scale_inv`"
