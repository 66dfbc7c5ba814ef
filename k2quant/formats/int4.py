"""INT4: four-bit codes with a scale for each group of columns, as moonshotai/Kimi-K2.5 and K2-Thinking have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from k2quant.errors import CheckpointError, DtypeMismatch, ShapeMismatch, UnsupportedFormat
from k2quant.formats.configs import compressed_tensors
from k2quant.formats.configs.keys import empty, shown
from k2quant.formats.dtypes import DTYPES, FLOATS, TensorSpec, widened
from k2quant.formats.format import (
    Entry,
    Format,
    Layout,
    Neighbours,
    Parts,
    Scope,
    Stored,
    contradiction,
    listed,
    matrix,
)
from k2quant.kernels.codecs.grids import FAKE_BITS, GROUP, Grid

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.seam import Codecs
    from k2quant.kernels.codecs.values import F32, U16
    from k2quant.kernels.products.packed.weight import PackedWeight

INT4_GROUP = GROUP
"""Columns that share one INT4 scale in every K2 release (`group_size`)."""

_SCALES = {DTYPES[name].torch: name for name in FLOATS}
"""Dtypes of scales by the name that a config gives them."""

_SCHEME: dict[str, Any] = {"num_bits": 4, "symmetric": True, "type": "int"}

# Codes are whole numbers, so |w - w'| <= s/2; rounding code * s to BF16 adds at most 7s * 2^-9, and the
# compressed-tensors grid clamps at 7.5 after a division in BF16: 0.55 s covers all of it. `s` is the scale that is
# stored, but no more than 1.01 times amax/7 of the weights before; where it is subnormal it has few bits left, hence
# 2^-130 on top.
_BUDGET = {"largest_code": 7.0, "steps": 0.55, "relative": 0.0, "floor": 2.0**-130}


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4(Format):
    """Four-bit codes, eight to an int32 with the lowest column in the lowest nibble, and a scale for each group."""

    name: ClassVar[str] = "int4"
    served: ClassVar[str] = "vLLM, SGLang, transformers with compressed-tensors, KTransformers (experts), k2quant"
    mains: ClassVar[tuple[str, ...]] = ("weight_packed",)
    streamed: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")
    partners: ClassVar[tuple[str, ...]] = ("weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    scale_suffix: ClassVar[str | None] = "weight_scale"
    reads: ClassVar[str] = "symmetric INT4 pack-quantized weights"
    stands_for: ClassVar[str] = "INT4 weights with weight_packed, as format pack-quantized says"
    method: ClassVar[str | None] = compressed_tensors.METHOD
    scheme_words: ClassVar[str] = "symmetric 4-bit int"
    packing: ClassVar[str] = "pack-quantized"
    default_scope: ClassVar[Scope | None] = "experts"
    unfit: ClassVar[tuple[str, ...]] = ("kv_b_proj",)  # absorbed into its neighbours by MLA, which takes BF16 or FP8
    grids: ClassVar[tuple[str, ...]] = get_args(Grid)
    searches: ClassVar[bool] = True
    searched_grids: ClassVar[tuple[str, ...]] = ("moonshot",)
    trained: ClassVar[bool] = True
    bit_widths: ClassVar[tuple[int, ...]] = FAKE_BITS
    clips: ClassVar[bool] = True
    ggml: ClassVar[str | None] = "Q4_0"
    mlx: ClassVar[str | None] = "affine"

    group: int = INT4_GROUP
    """Columns that share one scale."""
    grid: Grid = "moonshot"
    """How a weight is rounded when it is written. It does not matter for reading."""
    scale_dtype: str = "BF16"
    """BF16 as Moonshot writes it; sources of other tools may hold F16 or F32."""
    shape_dtype: str = "I32"
    """I32 as Moonshot writes it; compressed-tensors writes I64."""

    def state(self, shape: tuple[int, ...], *, name: str = "weight") -> dict[str, TensorSpec]:
        """Return packed words, scales and shape of a weight.

        Raises:
            ShapeMismatch: the group does not divide the width.
        """
        rows, width = shape
        if width % self.group or width % 8:
            raise ShapeMismatch(
                "this width cannot be INT4",
                tensor=name,
                expected=f"a width that {self.group} divides",
                found=shape,
                remedy="keep it out of the conversion with `ignore=`",
            )
        return {
            "weight_packed": TensorSpec("I32", (rows, width // 8)),
            "weight_scale": TensorSpec(self.scale_dtype, (rows, width // self.group)),
            "weight_shape": TensorSpec(self.shape_dtype, (2,)),
        }

    def constant(self, shape: tuple[int, ...]) -> dict[str, bytes]:
        """Return rows and columns of the weight as `weight_shape` holds them."""
        width = DTYPES[self.shape_dtype].nbytes
        return {"weight_shape": b"".join(length.to_bytes(width, "little") for length in shape)}

    def misread(self, suffix: str, content: bytes, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape that `weight_shape` holds, if it is another."""
        half = len(content) // 2
        found = tuple(int.from_bytes(content[at : at + half], "little", signed=True) for at in (0, half))
        return None if found == shape else found

    @property
    def unit(self) -> int:
        """The group; scales of another dtype are copied as they are."""
        return self.group

    @property
    def scales(self) -> tuple[int, str]:
        """The group, and the dtype of its scale."""
        return self.group, self.scale_dtype

    @property
    def label(self) -> str:
        """Such as `int4 group 32`."""
        return f"int4 group {self.group}"

    @property
    def unwritable(self) -> str | None:
        """Scales that are no BF16."""
        return None if self.scale_dtype == "BF16" else self.scale_dtype

    def rounded_as(self, asked: Format) -> Format:
        """Take over the grid."""
        return replace(self, grid=asked.grid) if isinstance(asked, Int4) else self

    def in_words(self, bits: int) -> str:
        """Name width and grid."""
        return f"INT4 codes of {bits} bits, {self.grid}"

    # --- recognising it ---

    @classmethod
    def recognise(cls, suffix: str, entry: Entry, beside: Neighbours) -> Stored | None:
        """Take packed words with scales for groups of columns, and the shape that says the same."""
        if suffix not in cls.mains or entry.dtype != "I32":
            return None
        rows, words = matrix(entry)
        shape = (rows, words * 8)
        scale, size = beside.partner("weight_scale", entry), beside.partner("weight_shape", entry)
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
        found = cls(group=shape[1] // scale.shape[1], scale_dtype=scale.dtype, shape_dtype=size.dtype)
        return Stored(found, shape, (*cls.streamed, "weight_shape"))

    @classmethod
    def owns(cls, suffix: str, beside: Neighbours) -> bool:
        """Tell whether scales or a shape have packed words."""
        packed = beside.get("weight_packed")
        return suffix in {"weight_scale", "weight_shape"} and packed is not None and packed.dtype != "U8"

    @classmethod
    def refusal(cls, suffix: str, entry: Entry, beside: Neighbours) -> CheckpointError | None:
        """Know INT4 of other tools, and what else packs weights."""
        packed = beside.get("weight_packed")
        if suffix == "weight_shape" and packed is not None and packed.dtype == "U8":
            return beside.foreign(packed, "packed weights of dtype U8 are not supported beside a weight_shape")
        why = {
            "weight_packed": f"packed weights of dtype {entry.dtype} are not supported: INT4 packs I32, FP4 packs U8",
            "weight_zero_point": "asymmetric INT4 (weight_zero_point) is not supported",
            "weight_g_idx": "INT4 with reordered columns (weight_g_idx) is not supported",
        }.get(suffix)
        return beside.foreign(entry, why) if why else None

    @classmethod
    def asked_for(
        cls, stored: Iterable[tuple[Format, Entry]] = (), grid: Grid | None = None, layout: Layout | None = None
    ) -> Format:
        """Return groups of 32 on a grid, and refuse a source in groups of another size."""
        target = cls(grid=grid or "moonshot")
        for found, entry in stored:
            if isinstance(found, cls) and found.group != target.group:
                raise UnsupportedFormat(
                    "INT4 of another group size is not rewritten as INT4",
                    tensor=entry.name,
                    expected=f"groups of {target.group}",
                    found=f"groups of {found.group}",
                    remedy="convert to bf16 or fp8",
                )
        return target

    # --- its values ---

    def extent(self, parts: Parts) -> tuple[int, int]:
        """Return rows, and eight columns for each word."""
        rows, words = parts["weight_packed"].shape
        return rows, words * 8

    def reading(self, parts: Parts) -> tuple[Any, ...]:
        """Return words, scales as float32, and the group."""
        return parts["weight_packed"], widened(parts["weight_scale"]), self.group

    def writing(self, parts: Parts) -> tuple[Any, ...]:
        """Return the grid, and words and scales to fill."""
        return self.grid, parts["weight_packed"], parts["weight_scale"]

    def decode(self, parts: Parts, out: U16, codecs: Codecs) -> None:
        """Multiply each group by its scale."""
        codecs.int4.decode(parts["weight_packed"], widened(parts["weight_scale"]), self.group, out)

    def encode(self, weights: U16, parts: Parts, codecs: Codecs) -> Figures:
        """Recover or compute each group's scale, and round."""
        return codecs.int4.encode(weights, *self.writing(parts))

    def choose(self, weights: U16, codecs: Codecs) -> NDArray[Any]:
        """Return the BF16 bits of each group's scale."""
        import numpy as np

        scale = np.empty((weights.shape[0], weights.shape[1] // self.group), np.uint16)
        codecs.int4.choose(weights, self.grid, scale)
        return scale

    def store(self, weights: U16, scales: NDArray[Any], parts: Parts, codecs: Codecs) -> Figures:
        """Round at given scales, BF16 bits."""
        parts["weight_scale"][...] = scales
        return codecs.int4.store(weights, scales, self.grid, parts["weight_packed"])

    @property
    def candidates(self) -> int:
        """Those of the rule."""
        from k2quant.kernels.codecs.scales.search import CANDIDATES

        return CANDIDATES

    def search(self, weights: U16, importance: F32 | None, codecs: Codecs, mean: F32 | None = None) -> NDArray[Any]:
        """Return the BF16 bits of the best of some shrunk scales for each group (docs/formats.md).

        Raises:
            UnsupportedFormat: on another grid than moonshot.
        """
        import numpy as np

        self._check_searched()
        scale = np.empty((weights.shape[0], weights.shape[1] // self.group), np.uint16)
        codecs.int4.search(weights, importance, scale, mean=mean)
        return scale

    def weighted_error(
        self,
        weights: U16,
        scales: NDArray[Any],
        importance: F32 | None,
        codecs: Codecs,
        mean: F32 | None = None,
    ) -> float:
        """Sum what columns lose at given scales.

        Raises:
            UnsupportedFormat: on another grid than moonshot.
        """
        self._check_searched()
        return codecs.int4.weighted_error(weights, scales, importance, mean=mean)

    def _check_searched(self) -> None:
        if self.grid not in self.searched_grids:
            raise UnsupportedFormat(
                "scales are not searched on this grid", expected=listed(self.searched_grids), found=self.grid
            )

    def outside(self, before: U16, after: U16, parts: Parts) -> int:
        """Allow half a step and what rounding to BF16 adds; and what a searched scale cuts off, if the code is 7."""
        from k2quant.kernels.codecs.cpu.bf16 import outside
        from k2quant.kernels.codecs.scales.search import least_share

        scale, block = widened(parts["weight_scale"]), (1, self.group)
        return outside(before, after, scale, block, **_BUDGET, least=least_share(4))

    def unsolved(self, before: U16, after: U16, parts: Parts, codecs: Codecs) -> int:
        """Count groups whose scale neither the plain rule nor a search would choose, and codes that the grid lacks."""
        import numpy as np

        from k2quant.kernels.codecs.scales.search import is_candidate

        if self.grid not in self.searched_grids or self.scale_dtype != "BF16":
            return self.outside(before, after, parts)
        scale: NDArray[np.uint16] = parts["weight_scale"]
        amax = (before & 0x7FFF).reshape(*scale.shape, self.group).max(-1)
        wrong = ~is_candidate(amax, scale) & (scale != self.choose(before, codecs))
        pairs = parts["weight_packed"].view(np.uint8)
        lacking = np.count_nonzero((pairs & 15) == 0) + np.count_nonzero((pairs >> 4) == 0)  # the code -8
        return int(np.count_nonzero(wrong) * self.group + lacking)

    def steps(self, parts: Parts) -> NDArray[Any]:
        """Return the scales."""
        return widened(parts["weight_scale"])

    def codes_changed(self, after: Parts, before: Parts) -> int:
        """Count nibbles that differ."""
        import numpy as np

        pairs = np.bitwise_xor(after[self.main].view(np.uint8), before[self.main].view(np.uint8))
        return int(np.count_nonzero(pairs & 15) + np.count_nonzero(pairs >> 4))

    # --- the config beside it ---

    def config(self, quantised: Iterable[str], kept: list[str]) -> dict[str, Any]:
        """Return the block of Kimi-K2.6."""
        return compressed_tensors.block([(self, list(quantised))], kept)

    def cache_scheme(self) -> dict[str, Any]:
        """Return what compressed-tensors says of an FP8 cache."""
        return compressed_tensors.CACHE

    def config_group(self) -> dict[str, Any]:
        """Return the scheme of the weights."""
        return compressed_tensors.scheme(group_size=self.group, **_SCHEME)

    @classmethod
    def claims(cls, scheme: Mapping[str, Any]) -> bool:
        """Tell symmetric 4-bit integers from all else."""
        return {key: scheme.get(key) for key in _SCHEME} == _SCHEME

    @classmethod
    def check_config(cls, block: Mapping[str, Any], stored: list[tuple[Format, tuple[int, ...]]]) -> None:
        """Compare the scheme of a config group with the weights that are there."""
        packed = {(each.group, shape[-1]) for each, shape in stored if isinstance(each, cls)}
        size, strategy = block.get("group_size"), block.get("strategy")
        if strategy is None:
            strategy = "channel" if size == -1 else "group"  # as compressed-tensors infers it
        if strategy not in ("group", "channel"):
            raise UnsupportedFormat("strategy", file="config.json", expected="group or channel", found=shown(strategy))
        if not empty(block.get("block_structure")):
            found = shown(block["block_structure"])
            raise UnsupportedFormat("block_structure", file="config.json", expected="none", found=found)
        groups = {(group, width) for group, width in packed if group != (width if strategy == "channel" else size)}
        if groups:
            claim = "one group a row" if strategy == "channel" else f"group_size {size!r}"
            raise contradiction(claim, f"scales for groups of {listed(sorted(group for group, _ in groups))}")
        dtypes = sorted({each.scale_dtype for each, _ in stored if isinstance(each, cls)})
        dtype = block.get("scale_dtype")
        if dtype is not None and [_SCALES.get(str(dtype).removeprefix("torch."))] != dtypes:
            raise contradiction(f"scale_dtype {shown(dtype)}", f"scales of {listed(dtypes)}")

    # --- in memory and in training ---

    def unrunnable(self, shape: tuple[int, ...]) -> tuple[str, object] | None:
        """The products read what Moonshot writes, in whole groups."""
        if (self.group, self.scale_dtype) != (INT4_GROUP, "BF16"):
            kimi = f"groups of {INT4_GROUP} with BF16 scales"
            return kimi, f"groups of {self.group} with {self.scale_dtype} scales"
        return (f"a multiple of {INT4_GROUP} columns", shape) if shape[-1] % INT4_GROUP else None

    def packed(self, shape: tuple[int, ...], *, on: torch.device) -> PackedWeight:
        """Return a weight in the layout of a device."""
        from k2quant.kernels.products.prepare import empty

        return empty(self.name, shape, device="meta", for_device=on)

    def fake_quantized(self, weights: torch.Tensor, bits: int, largest: torch.Tensor | None = None) -> torch.Tensor:
        """Return codes times scales, the scales from each group's amax, without recovery (docs/formats.md)."""
        from k2quant.kernels import ops

        return ops.fake_quantize_int4(weights, self.grid, bits=bits)

    def inside(self, weights: torch.Tensor, bits: int, largest: torch.Tensor | None = None) -> torch.Tensor:
        """Tell codes from those beyond the grid."""
        from k2quant.kernels.codecs import reference

        return reference.int4_inside(weights, self.grid, bits)

    def exported(self, weights: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """Return packed words and scales; narrower codes sit in the nibbles of INT4."""
        from k2quant.kernels import ops

        found = ops.bf16_to_int4(weights, self.grid, recover=False, bits=bits)
        return dict(zip(self.streamed, found, strict=True))


def _check_dtype(entry: Entry, allowed: tuple[str, ...]) -> None:
    if entry.dtype not in allowed:
        raise DtypeMismatch(tensor=entry.name, file=entry.file, expected=" or ".join(allowed), found=entry.dtype)
