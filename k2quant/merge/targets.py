"""Which weight of the checkpoint each part of an adapter changes, and how; every shape is checked here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.weights import StoredWeight
from k2quant.errors import CheckpointError, MalformedFile, MissingTensor, ShapeMismatch, UnsupportedFormat
from k2quant.ground import names
from k2quant.merge import layouts
from k2quant.merge.adapter import Adapter, Pair

LARGEST_RANK = 4096
"""A factor of this rank and K2's widest matrix are 0.6 GB in float64; a larger one is no low rank."""

_SHOWN = 3
_FUSED = re.compile(r"(?P<experts>.+\.mlp\.experts)(?:\.base_layer)*")
"""Wrappers of two parameters of one module are nested: PEFT names the inner one `base_layer`."""


class LowRank(NamedTuple):
    """scaling * B @ A for one matrix `[N, K]`.

    Factors of all experts of a layer lie in one pair. PEFT's: A is `[E*r, K]`, expert by expert, and B `[rows, r*E]`,
    its columns by rank and then by expert; before 0.19 it took a parameter's rows for its inputs: there A is
    `[E*r, rows]` and B `[K, r*E]`. Stacked ones: A is `[E*r, K]` and B `[E*N, r]`, both expert by expert.
    """

    pair: Pair
    """Both as matrices."""
    rank: int
    scaling: float
    first_rank: int = 0
    """The row of A that is this weight's first."""
    first_row: int = 0
    """The row of B, or of the fused parameter, that is this weight's first."""
    first_column: int = 0
    """The column of B that is this weight's first."""
    column_step: int = 1
    """Columns from one of this weight's to the next."""
    transposed: bool = False
    """Whether the factors are those of the transposed weight."""


class Whole(NamedTuple):
    """A tensor that takes the place of the base's."""

    entry: TensorEntry


Change = LowRank | Whole


def resolve(adapter: Adapter, weights: Iterable[StoredWeight]) -> dict[str, Change]:
    """Return what changes, by the name of the main tensor of each weight.

    Raises:
        CheckpointError: a part of the adapter fits no weight, or not the one that it names.
    """
    index = {name: weight for weight in weights for name in (_model_name(weight),) if name is not None}
    changes: dict[str, Change] = {}
    astray: list[str] = []
    for module, pair in adapter.pairs.items():
        found = list(_low_rank(adapter, module, pair, index))
        astray += [] if found else [pair.a.name]
        _add_all(changes, found, pair.a)
    for name, entry in adapter.whole.items():
        weight = index.get(_canonical(name) or "")
        astray += [] if weight else [entry.name]
        _add_all(changes, [(weight, _whole(entry, weight))] if weight else [], entry)
    if astray:
        raise MissingTensor(
            f"{len(astray)} of the adapter's parts match no weight of the language model",
            file=adapter.shard.path,
            found=", ".join(astray[:_SHOWN]) + (", ..." if len(astray) > _SHOWN else ""),
            remedy="was it trained on another model?",
        )
    return changes


def _model_name(weight: StoredWeight) -> str | None:
    """Return a weight's name as the unquantised language model has it, or None for one outside of it."""
    suffix = "weight" if weight.format else next(iter(weight.parts))
    return _canonical(f"{weight.base}.{suffix}" if weight.base else suffix)


def _canonical(name: str) -> str | None:
    return names.in_language_model(name)


def _add_all(changes: dict[str, Change], found: Iterable[tuple[StoredWeight, Change]], entry: TensorEntry) -> None:
    for weight, change in found:
        if weight.main.name in changes:
            raise MalformedFile(f"changes `{weight.main.name}` a second time", tensor=entry.name, file=entry.file)
        changes[weight.main.name] = change


def _low_rank(
    adapter: Adapter, module: str, pair: Pair, index: Mapping[str, StoredWeight]
) -> Iterator[tuple[StoredWeight, LowRank]]:
    """Yield what a pair of factors does to which weight; nothing where there is none."""
    if stack := layouts.stacked_experts(module):
        yield from _stacked(adapter, stack, pair, index)
        return
    for entry in pair:
        if len(entry.shape) != 2 or not entry.nbytes:
            raise ShapeMismatch(
                "a factor is a matrix, unless it is stacked by expert",
                tensor=entry.name,
                file=entry.file,
                expected="[rows, columns]",
                found=entry.shape,
            )
    weight = index.get(_canonical(f"{layouts.usual(module)}.weight") or "")
    if weight is not None:
        rank = _rank(adapter, pair, module, 1)
        _check_matrix(weight, pair)
        yield weight, LowRank(pair, rank, adapter.settings.scaling_of(module))
    elif match := _FUSED.fullmatch(module):
        yield from _experts(adapter, match["experts"], pair, index)


def _rank(adapter: Adapter, pair: Pair, name: str, experts: int) -> int:
    """Return the rank of a pair, which both factors and the config must agree on."""
    (rows, _), (_, columns) = pair.a.shape, pair.b.shape
    rank = adapter.settings.rank_of(name)
    if rows != columns or rows != rank * experts:
        each = f" for each of {experts} experts" if experts > 1 else ""
        raise ShapeMismatch(
            f"the rank of `{name}`",
            tensor=pair.a.name,
            file=pair.a.file,
            expected=f"{rank}{each}, as the config has it",
            found=f"lora_A of {pair.a.shape} and lora_B of {pair.b.shape}",
        )
    _check_rank(pair, rank)
    return rank


def _check_rank(pair: Pair, rank: int) -> None:
    if rank > LARGEST_RANK:
        raise UnsupportedFormat(
            "the rank", tensor=pair.a.name, file=pair.a.file, expected=f"at most {LARGEST_RANK}", found=rank
        )


def _check_matrix(weight: StoredWeight, pair: Pair) -> None:
    if (pair.b.shape[0], pair.a.shape[1]) != weight.shape:
        raise ShapeMismatch(
            f"does not fit `{weight.main.name}` of {weight.shape}",
            tensor=pair.a.name,
            file=pair.a.file,
            expected="lora_A [r, columns] and lora_B [rows, r]",
            found=f"{pair.a.shape} and {pair.b.shape}",
        )


def _stacked(
    adapter: Adapter, stack: layouts.Stack, pair: Pair, index: Mapping[str, StoredWeight]
) -> Iterator[tuple[StoredWeight, LowRank]]:
    """Yield what factors `[E, r, K]` and `[E, N, r]` do to the experts; one factor may serve all of them."""
    weights = list(_of_experts(_canonical(f"{stack.experts}.") or "", stack.projection, index))
    if not weights:
        return
    (rows, width), experts = _one_shape(stack.name, weights), len(weights)
    rank, counts = adapter.settings.rank_of(stack.name), [entry.shape[0] for entry in pair if entry.shape]
    shapes = {"lora_A": (experts, rank, width), "lora_B": (experts, rows, rank)}
    fit = all(entry.shape in {shape, (1, *shape[1:])} for entry, shape in zip(pair, shapes.values(), strict=True))
    if not fit or experts not in counts:
        raise ShapeMismatch(
            f"factors stacked by expert do not fit `{stack.name}`",
            tensor=pair.a.name,
            file=pair.a.file,
            expected=" and ".join(f"{side} {shape}" for side, shape in shapes.items())
            + ", or 1 in one of them for all",
            found=f"{pair.a.shape} and {pair.b.shape}",
        )
    _check_rank(pair, rank)
    flat = Pair(*(entry._replace(shape=(entry.shape[0] * entry.shape[1], entry.shape[2])) for entry in pair))
    scaling = adapter.settings.scaling_of(stack.name)
    for expert, weight in enumerate(weights):
        of_a, of_b = (expert % count for count in counts)  # 0 of a factor that serves all
        yield weight, LowRank(flat, rank, scaling, first_rank=of_a * rank, first_row=of_b * rows)


class _Fused(NamedTuple):
    """A parameter that holds all experts of a layer, as the checkpoint's weights make it up."""

    name: str
    rows: int
    """Of one projection."""
    projections: tuple[list[StoredWeight], ...]
    """For each projection in the parameter's rows, the weights of the experts."""
    transposed: bool


def _experts(
    adapter: Adapter, module: str, pair: Pair, index: Mapping[str, StoredWeight]
) -> Iterator[tuple[StoredWeight, LowRank]]:
    fused = _parameter(adapter, module, pair, index)
    if fused is None:
        return
    experts = len(fused.projections[0])
    rank, scaling = _rank(adapter, pair, fused.name, experts), adapter.settings.scaling_of(fused.name)
    for part, weights in enumerate(fused.projections):
        for expert, weight in enumerate(weights):
            yield (
                weight,
                LowRank(
                    pair,
                    rank,
                    scaling,
                    first_rank=expert * rank,
                    first_row=part * fused.rows,
                    first_column=expert,
                    column_step=experts,
                    transposed=fused.transposed,
                ),
            )


def _parameter(adapter: Adapter, module: str, pair: Pair, index: Mapping[str, StoredWeight]) -> _Fused | None:
    """Find out which fused parameter a pair belongs to, and which way round it is: the shapes tell."""
    found, width_of, possible = (pair.a.shape[1], pair.b.shape[0]), {}, []
    for parameter in ("gate_up_proj", "down_proj"):
        projections = _projections(f"{module}.{parameter}", index)
        if projections is None:
            return None
        rows, width = projections[0][0].shape
        total = rows * len(projections)
        width_of[parameter] = f"[{len(projections[0])}, {total}, {width}]"
        ways = {(width, total): False, (total, width): True}
        if width == total:
            ways = {found: _old_layout(adapter, pair)} if found == (width, total) else {}
        if found in ways:
            possible.append(_Fused(f"{module}.{parameter}", rows, projections, ways[found]))
    if len(possible) != 1:
        raise ShapeMismatch(
            f"factors of fused experts fit none of {width_of}",
            tensor=pair.a.name,
            file=pair.a.file,
            expected="lora_A [E*r, columns] and lora_B [rows, r*E]",
            found=f"{pair.a.shape} and {pair.b.shape}",
        )
    return possible[0]


def _old_layout(adapter: Adapter, pair: Pair) -> bool:
    """Tell whether PEFT took the rows of a square parameter for its inputs, as it did before 0.19."""
    if adapter.settings.version is None:
        raise UnsupportedFormat(
            "square experts: which factor belongs to the rows depends on the PEFT that wrote them",
            tensor=pair.a.name,
            file=adapter.folder,
            expected="peft_version in adapter_config.json",
        )
    return adapter.settings.version < (0, 19)


def _projections(name: str, index: Mapping[str, StoredWeight]) -> tuple[list[StoredWeight], ...] | None:
    """Return the weights that a fused parameter is made of, projection by projection, or None if it has none."""
    fused = names.fused_experts((_canonical(f"{name}.weight") or "").removesuffix(".weight"))
    if fused is None:
        return None
    projections = tuple(list(_of_experts(fused.prefix, projection, index)) for projection in fused.projections)
    if not projections[0]:
        return None
    _one_shape(name, [weight for weights in projections for weight in weights])
    if len({len(weights) for weights in projections}) != 1:
        raise CheckpointError("its projections have not as many experts, so they cannot be fused", tensor=name)
    return projections


def _one_shape(name: str, weights: Iterable[StoredWeight]) -> tuple[int, ...]:
    shapes = {weight.shape for weight in weights}
    if len(shapes) != 1:
        raise CheckpointError("its experts differ, so they cannot be fused", tensor=name, found=sorted(shapes))
    return shapes.pop()


def _of_experts(prefix: str, projection: str, index: Mapping[str, StoredWeight]) -> Iterator[StoredWeight]:
    expert = 0
    while (weight := index.get(f"{prefix}{expert}.{projection}.weight")) is not None:
        yield weight
        expert += 1


def _whole(entry: TensorEntry, weight: StoredWeight) -> Whole:
    if entry.shape != weight.shape:
        raise ShapeMismatch(
            f"cannot replace `{weight.main.name}`",
            tensor=entry.name,
            file=entry.file,
            expected=weight.shape,
            found=entry.shape,
            remedy="a resized vocabulary is not supported",
        )
    return Whole(entry)
