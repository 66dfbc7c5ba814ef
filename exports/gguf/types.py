"""Which type each tensor of GGUF gets: that of its codes where it keeps them, else what was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from k2quant.checkpoint.panels import PIECE_BYTES, naming, read_whole
from k2quant.checkpoint.reading import read_into
from k2quant.errors import UnsupportedFormat, UsageError
from k2quant.exports.gguf import blocks
from k2quant.exports.gguf.blocks import BF16, F32, NVFP4, Q4_0, Q8_0, Type
from k2quant.exports.gguf.names import SCALED
from k2quant.exports.heads import Heads
from k2quant.exports.shapes import BIAS, KV_B, ROUTER, Sizes
from k2quant.exports.written import multiplying
from k2quant.formats.bf16 import Bf16
from k2quant.formats.dtypes import as_array, widened
from k2quant.ground import pool
from k2quant.ground.saying.showing import brief
from k2quant.ground.units import counted, one_of

if TYPE_CHECKING:
    from k2quant.checkpoint.reader import Checkpoint
    from k2quant.checkpoint.weights import StoredWeight
    from k2quant.exports.stacks import Stack
    from k2quant.formats.format import Format

_PLAIN = {Bf16.name: BF16, blocks.Plain.name: F32, blocks.EightBits.name: Q8_0}
"""Types of what has no codes of GGUF's, by the words that ask for them."""

REST = tuple(_PLAIN)
"""What `rest=` takes, its default first."""
EXPERTS = (Bf16.name, blocks.EightBits.name)
"""What `experts=` takes, its default first, and `fallback=`, which has none."""

_OWN: Mapping[str, type[blocks.Block]] = {kind.type.name: kind for kind in (blocks.FourBits, blocks.Mx, blocks.Nv)}
"""Types that keep the codes of a format, by `Format.ggml`."""


@dataclass(frozen=True, slots=True)
class GgufOptions:
    """What the user asked for; two runs with equal options write the same bytes.

    Raises:
        UsageError: a value that does not exist, or makes no sense.
    """

    rest: str = Bf16.name
    """The type of all that is no routed expert and has no codes of GGUF's, norms and routers aside, which are F32."""
    experts: str = Bf16.name
    """That of routed experts in a format of which GGUF has no codes, such as FP8."""
    fallback: str | None = None
    """That of tensors whose codes cannot be kept; None: such a tensor is refused."""
    split_size: int | None = None
    """The most bytes of tensors in a file; None: one file."""

    def __post_init__(self) -> None:
        one_of("type of the rest", self.rest, REST)
        one_of("type of the experts", self.experts, EXPERTS)
        if self.fallback is not None:
            one_of("type to fall back to", self.fallback, EXPERTS)
        if self.split_size is not None and (type(self.split_size) is not int or self.split_size < 1):
            raise UsageError(f"split_size is {self.split_size!r}; expected bytes, at least 1")

    def as_json(self) -> dict[str, Any]:
        """Return what journals and reports say of it."""
        return asdict(self)


class Choice(NamedTuple):
    """The type of a tensor."""

    type: Type
    why: str = ""
    """Why it is not the one that its codes have, or that was asked for."""
    second: Choice | None = None
    """Of `kv_b_proj`, that of the values' half; this one is the keys'."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def chosen(stacks: Iterable[Stack], sizes: Sizes, options: GgufOptions, unfit: Mapping[str, str]) -> list[Choice]:
    """Return the type of each tensor.

    Args:
        stacks: the tensors.
        sizes: of the model.
        options: what was asked for.
        unfit: why scales of a tensor have no place in the type of its codes, by its name; see `survey`.

    Raises:
        UnsupportedFormat: codes of a tensor cannot be kept, and nothing was said to fall back to.
    """
    stacks = list(stacks)
    misfits = {stack.place.name: why for stack in stacks if (why := _misfit(stack, unfit))}
    if misfits and options.fallback is None:
        first = next(stack for stack in stacks if stack.place.name in misfits)
        others = f", and {counted(len(misfits) - 1, 'tensor')} more" if len(misfits) > 1 else ""
        raise UnsupportedFormat(
            f"{first.place.name} cannot keep its codes: {misfits[first.place.name]}{others}",
            tensor=first.first.main.name,
            file=first.first.main.file,
            remedy=f"say what such tensors become with `fallback=` {' or '.join(reversed(EXPERTS))}",
        )
    return [_choice(stack, sizes, options, misfits.get(stack.place.name)) for stack in stacks]


def _choice(stack: Stack, sizes: Sizes, options: GgufOptions, misfit: str | None) -> Choice:
    part = stack.place.part
    if len(stack.shape) == 1 or part in {ROUTER, BIAS}:
        return Choice(F32)
    asked = _PLAIN[options.experts if stack.is_stacked else options.rest]
    if part == KV_B:
        coded = stack.first.format is not None and stack.first.format.ggml is not None
        why = "a half of kv_b_proj, whose other half is transposed" if coded else ""
        keys, values = (_fitting(asked, width) for width in (sizes.qk_nope_head_dim, sizes.kv_lora_rank))
        return Choice(keys.type, keys.why or why, values._replace(why=values.why or why))
    if misfit is not None:
        return _fitting(_PLAIN[options.fallback or EXPERTS[0]], stack.shape[-1])._replace(why=misfit)
    if (kind := own(stack)) is None:
        return _fitting(asked, stack.shape[-1])
    return Choice(kind.type)


def own(stack: Stack) -> type[blocks.Block] | None:
    """Return the type that has the codes of all weights of a tensor; None where none has, or they differ."""
    found = {weight.format.ggml if weight.format is not None else None for weight in stack.weights}
    (name,) = found if len(found) == 1 else (None,)
    return None if name is None else _OWN[name]


def _fitting(asked: Type, width: int) -> Choice:
    """Return a type, or BF16 where its blocks do not divide the rows."""
    return Choice(BF16, f"{asked.per} does not divide {width} columns") if width % asked.per else Choice(asked)


def _misfit(stack: Stack, unfit: Mapping[str, str]) -> str | None:
    """Say why a tensor cannot keep the codes that GGUF has; None: it can, or has none."""
    if stack.place.part in {KV_B, ROUTER} or len(stack.shape) == 1:
        return None
    kind = own(stack)
    if kind is None:
        formats = {weight.format.label for weight in stack.weights if weight.format is not None}
        coded = any(weight.format is not None and weight.format.ggml is not None for weight in stack.weights)
        return f"its experts are {' and '.join(sorted(formats))}, and it has one type for all" if coded else None
    if why := unfit.get(stack.place.name):
        return why
    stored = {weight.format for weight in stack.weights if weight.format is not None}
    if len({each.scales_inputs for each in stored}) > 1:
        return "some of its experts have a scale of their inputs, and others none"
    return next(filter(None, (kind.misfit(each, stack.shape) for each in stored)), None)


def target(choice: Choice, weight: StoredWeight, sizes: Sizes) -> Format | None:
    """Return the format in which a weight is written, None where it is copied."""
    if choice.second is not None:
        return Heads(
            for_keys=_format(choice.type, weight),
            for_values=_format(choice.second.type, weight),
            nope=sizes.qk_nope_head_dim,
            v=sizes.v_head_dim,
            rank=sizes.kv_lora_rank,
        )
    stored = weight.format
    if stored is not None and not stored.quantised and weight.main.dtype == choice.type.name:
        return None
    return _format(choice.type, weight)


def _format(asked: Type, weight: StoredWeight) -> Format:
    if asked == BF16:
        return Bf16()
    if asked == NVFP4:
        return blocks.Nv(inputs=weight.format is not None and weight.format.scales_inputs)
    plain: Mapping[str, Format] = {F32.name: blocks.Plain(), Q8_0.name: blocks.EightBits()}
    return plain.get(asked.name) or _OWN[asked.name]()


class _Scales(NamedTuple):
    """A weight whose scales are looked at."""

    tensor: str
    """As `Place.tensor`."""
    weight: StoredWeight


def survey(source: Checkpoint, stacks: Iterable[Stack], *, workers: int) -> dict[str, str]:
    """Look at all scales that must be values of FP16, or have an inverse, before a type stands in a header.

    Returns:
        why a tensor has to fall back, by its name.

    Raises:
        BadValue: a scale that no weight can have.
    """
    unfit: dict[str, dict[str, str]] = {}

    def look(found: _Scales) -> None:
        stored = found.weight.format
        if stored is None:
            return
        why = _whole(source, found.weight, stored) if stored.whole else _no_half(source, found.weight)
        if why is not None and not (stored.whole and found.tensor.rpartition(".")[2] in SCALED):
            unfit.setdefault(f"{found.tensor}.weight", {})[found.weight.base] = why

    stacks = list(stacks)
    pool.run(_looked_at(stacks), look, workers=workers)
    first = {weight.base: place for place, weight in enumerate(each.weight for each in _looked_at(stacks))}
    return {name: whys[min(whys, key=first.__getitem__)] for name, whys in sorted(unfit.items())}


def _looked_at(stacks: Iterable[Stack]) -> Iterator[_Scales]:
    for stack in stacks:
        kind = own(stack)
        if kind is not None and kind.type in {Q4_0, NVFP4} and stack.place.part not in {KV_B, ROUTER}:
            yield from (_Scales(stack.place.tensor, weight) for weight in stack.weights)


def _whole(source: Checkpoint, weight: StoredWeight, stored: Format) -> str | None:
    """Say that a weight has a scale of the whole that is not 1.

    Raises:
        BadValue: it divides, and has no inverse.
    """
    with naming(weight, 0):
        parts = read_whole(source, weight)
        stored.check_relabel(parts, multiplying(stored))
    scale = float(parts[stored.streamed[2]].reshape(-1)[0])  # behind codes and scales of blocks
    if scale == 1:
        return None
    return f"`{weight.base}` has the scale {scale:g} of the whole, which llama.cpp's deepseek2 leaves out"


def _no_half(source: Checkpoint, weight: StoredWeight) -> str | None:
    """Name the first scale of a weight that is no value of FP16."""
    import numpy as np

    from k2quant.formats.dtypes import TensorSpec
    from k2quant.kernels.codecs.cpu import gguf

    stored = weight.format
    if stored is None or stored.scale_suffix is None:
        return None
    entry = weight.parts[stored.scale_suffix]
    width = entry.nbytes // max(entry.shape[0], 1)
    step = max(PIECE_BYTES // max(width, 1), 1)
    for start in range(0, entry.shape[0], step):
        rows = min(step, entry.shape[0] - start)
        data = np.empty(rows * width, np.uint8)
        read_into(source.shards[entry.file], entry.start + start * width, data.data)
        found = as_array(data, TensorSpec(entry.dtype, (rows, *entry.shape[1:])))
        if found.dtype == np.uint16 and gguf.are_plainly_halves(found):
            continue
        scale = np.abs(widened(found))
        scale = np.where(np.isfinite(scale), scale, 0)  # of one with a sign, or none, it is the panel that says so
        if (at := gguf.no_half(scale)) is not None:
            return f"scale {scale[at]:g} at row {start + at[0]}, column {at[1]} of `{entry.name}` is no value of FP16"
    return None
