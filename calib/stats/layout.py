"""Which inputs a layer has, how they are named in a folder of statistics, and how many bytes that comes to.

An input is what matrices multiply. It has the name of its first consumer: `gate_proj` and `up_proj` share one,
`q_a_proj` and `kv_a_proj_with_mqa` share one, which is called `q_a_proj` even where queries are not compressed. The
routed experts of a layer stand in one tensor, a row for each; `...mlp.experts` itself is the input of the layer's
experts over all tokens, whichever expert each of them went to.

`layer-00003.safetensors` holds a layer's moments, `layer-00003.hessians.safetensors` its Hessians where they were asked
for, `layer-00003.json` what tells that both are whole, and the digests of the weights that they were measured with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

from k2quant.calib.stats.model import Model
from k2quant.formats.dtypes import TensorSpec
from k2quant.ground import names

Part = Literal["train", "validation"]
"""Of the data: what decides, and what is held out to judge."""

PARTS: tuple[Part, ...] = get_args(Part)

MANIFEST = "k2quant_stats.json"
"""Written last; a folder without it is not finished."""

OUTSIDE = "outside.json"
"""Digests of the weights outside the layers."""

_SHARED = {"up_proj": "gate_proj", "kv_a_proj_with_mqa": "q_a_proj", "q_proj": "q_a_proj"}
"""Whose input a projection multiplies, where it is not its own."""

_MOMENTS = {"mean_square": "F32", "mean": "F32", "weight": "F64", "tokens": "I64", "largest": "F32"}

_BY_COLUMN = ("mean_square", "mean")


class Place(NamedTuple):
    """Where the statistics of a matrix stand."""

    layer: int
    input: str
    """Such as `model.layers.3.mlp.experts.gate_proj`."""
    expert: int | None
    """The row, for a routed expert."""

    @property
    def prior(self) -> str | None:
        """The input of all tokens of the layer, for the gate and up of routed experts."""
        above, _, last = self.input.rpartition(".")
        return above if self.expert is not None and last == "gate_proj" else None


class Input(NamedTuple):
    """One input of a layer."""

    name: str
    width: int
    """Columns, K of the matrices that multiply it."""
    experts: int | None = None
    """Rows: one for each routed expert; None where there is but one."""

    def shape(self, *columns: int) -> tuple[int, ...]:
        """Return a shape with a row for each expert, where there are any."""
        return columns if self.experts is None else (self.experts, *columns)


def place_of(base: str) -> Place | None:
    """Return where the statistics of a matrix stand, or None for one that is no projection of a decoder layer.

    Args:
        base: the matrix's name in the language model without its suffix, such as
            `model.layers.3.mlp.experts.17.up_proj`.
    """
    if not names.is_projection(base) or (layer := names.layer(base)) is None:
        return None
    above, _, last = base.rpartition(".")
    expert = names.expert(base)
    above = above if expert is None else above.rpartition(".")[0]
    return Place(layer, f"{above}.{_SHARED.get(last, last)}", expert)


def inputs(model: Model, layer: int) -> tuple[Input, ...]:
    """Return all inputs of a decoder layer, in the order in which they are stored."""
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    found = [Input(f"{attention}.q_a_proj", model.hidden)]
    found += [Input(f"{attention}.q_b_proj", model.query)] if model.query is not None else []
    found += [Input(f"{attention}.kv_b_proj", model.latent), Input(f"{attention}.o_proj", model.values)]
    if layer < model.first_routed:
        return (*found, Input(f"{mlp}.gate_proj", model.hidden), Input(f"{mlp}.down_proj", model.dense))
    if model.shared:
        found += [Input(f"{mlp}.shared_experts.gate_proj", model.hidden)]
        found += [Input(f"{mlp}.shared_experts.down_proj", model.shared)]
    found += [Input(f"{mlp}.experts", model.hidden)]
    found += [Input(f"{mlp}.experts.gate_proj", model.hidden, model.experts)]
    return (*found, Input(f"{mlp}.experts.down_proj", model.inner, model.experts))


def moment_specs(model: Model, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of a layer's file: `{input}.{part}.{mean_square, mean, weight, tokens, largest}`."""
    return {
        f"{one.name}.{part}.{kind}": TensorSpec(dtype, one.shape(*((one.width,) if kind in _BY_COLUMN else ())))
        for one in inputs(model, layer)
        for part in PARTS
        for kind, dtype in _MOMENTS.items()
    }


def hessian_specs(model: Model, layer: int) -> dict[str, TensorSpec]:
    """Return the tensors of a layer's second file: `{input}.{part}.hessian`, `[K, K]` or `[E, K, K]`."""
    return {
        f"{one.name}.{part}.hessian": TensorSpec("F32", one.shape(one.width, one.width))
        for one in inputs(model, layer)
        for part in PARTS
    }


def moments_file(layer: int) -> str:
    """Return the name of the file with a layer's moments."""
    return f"layer-{layer:05}.safetensors"


def hessians_file(layer: int) -> str:
    """Return the name of the file with a layer's Hessians."""
    return f"layer-{layer:05}.hessians.safetensors"


def record_file(layer: int) -> str:
    """Return the name of the file that says that a layer is whole."""
    return f"layer-{layer:05}.json"


_HEADER_BYTES = 150  # of a tensor's line in a header
_DIGEST_BYTES = 110  # of a weight with two parts in a layer's JSON, as K2's experts are named


def stats_bytes(model: Model, *, hessians: bool) -> int:
    """Return about how many bytes a folder of statistics has on the disk.

    Moments are exact; headers and JSON are counted by what a line of them takes.
    """
    return sum(layer_bytes(model, layer, hessians=hessians) for layer in range(model.layers))


def layer_bytes(model: Model, layer: int, *, hessians: bool) -> int:
    """Return about how many bytes one layer of a folder of statistics has on the disk."""
    specs = [*moment_specs(model, layer).values(), *(hessian_specs(model, layer).values() if hessians else ())]
    weights = 3 * model.experts if layer >= model.first_routed else 0
    stored: int = sum(spec.nbytes + _HEADER_BYTES for spec in specs)
    return stored + _DIGEST_BYTES * (weights + 20)


def files(model: Model, *, hessians: bool) -> Iterator[str]:
    """Yield the name of every file of a finished folder; what makes it look finished comes first."""
    yield from (MANIFEST, OUTSIDE)
    for layer in range(model.layers):
        yield from (record_file(layer), moments_file(layer), *([hessians_file(layer)] if hessians else []))
