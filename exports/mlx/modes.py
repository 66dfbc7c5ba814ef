"""Which mode of mlx each tensor gets: that of its codes, else floats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from k2quant.errors import UnsupportedFormat
from k2quant.exports.heads import Heads
from k2quant.exports.mlx.packed import GROUPS, Affine, Floats, Mx, Nv, Packed
from k2quant.exports.shapes import KV_B, ROUTER, Sizes
from k2quant.formats.bf16 import Bf16
from k2quant.ground.saying.showing import brief
from k2quant.kernels.codecs.grids import MXFP4_BLOCK, NVFP4_BLOCK

if TYPE_CHECKING:
    from k2quant.checkpoint.weights import StoredWeight
    from k2quant.exports.stacks import Stack
    from k2quant.formats.format import Format


class Choice(NamedTuple):
    """What becomes of a tensor."""

    format: Format | None
    """What it is written in; None: its floats are copied."""
    why: str = ""
    """Why it does not keep the codes that it has."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def params(self) -> dict[str, Any] | None:
        """What a config says of the layer; None: it is not quantised."""
        return self.format.params if isinstance(self.format, Packed) else None

    def of(self, weight: StoredWeight) -> Format | None:
        """Return what one weight of a stack is written in: of a stack of BF16, those that are BF16 are copied."""
        alike = self.format is not None and weight.format is not None and weight.format.same(self.format)
        return None if alike else self.format

    def label(self, stack: Stack) -> str:
        """Return the mode, as a table has it."""
        if isinstance(self.format, Heads):
            return self.format.label.lower()
        return stack.first.main.dtype.lower() if self.format is None else self.format.label


def chosen(stacks: Iterable[Stack], sizes: Sizes) -> list[Choice]:
    """Return what becomes of each tensor.

    Raises:
        UnsupportedFormat: experts of a layer have several formats, or one that mlx has no mode for.
    """
    return [_choice(stack, sizes) for stack in stacks]


def _choice(stack: Stack, sizes: Sizes) -> Choice:
    dtypes = {weight.main.dtype for weight in stack.weights}
    floats = all(weight.format is None or not weight.format.quantised for weight in stack.weights)
    coded = any(weight.format is not None and weight.format.mlx is not None for weight in stack.weights)
    if stack.place.part == KV_B:
        half = Floats(dtype=stack.first.main.dtype) if floats else Bf16()
        why = "mlx-lm has it in two halves, one of them transposed" if coded else ""
        rows = {"nope": sizes.qk_nope_head_dim, "v": sizes.v_head_dim, "rank": sizes.kv_lora_rank}
        return Choice(Heads(for_keys=half, for_values=half, **rows), why)
    if floats:
        return Choice(None if len(dtypes) == 1 else Bf16())
    if stack.place.part == ROUTER:
        return Choice(Bf16(), "mlx-lm's router is not quantised" if coded else "")
    mode, why = _mode(stack)
    if mode is None and coded and stack.is_stacked:
        raise UnsupportedFormat(
            f"{stack.place.name} cannot keep its codes: {why}",
            tensor=stack.first.main.name,
            file=stack.first.main.file,
            remedy="convert the checkpoint first, to bf16 or to one of the 4-bit formats",
        )
    return Choice(mode or Bf16(), why)


def _mode(stack: Stack) -> tuple[Packed | None, str]:
    """Return the mode that keeps the codes of a tensor; where there is none but there are codes, why."""
    found = {weight.format for weight in stack.weights if weight.format is not None}
    if len({(each.name, each.scales) for each in found}) > 1 and any(each.mlx for each in found):
        return (
            None,
            f"its experts are {' and '.join(sorted({each.label for each in found}))}, and it has one mode for all",
        )
    stored = next(iter(found))
    if stored.mlx == Mx.name:
        return Mx(group=MXFP4_BLOCK), ""
    if stored.mlx == Nv.name:
        alone = "mlx-lm reads a scale of the whole beside experts alone"
        return (Nv(group=NVFP4_BLOCK), "") if stack.is_stacked else (None, alone)
    if stored.mlx is None or not isinstance(stored.scales, tuple):
        return None, ""
    group, dtype = stored.scales
    if group not in GROUPS:
        return None, f"it is {stored.label}, and mlx has kernels for groups of {', '.join(map(str, GROUPS))}"
    return Affine(group=group, dtype=dtype), ""
