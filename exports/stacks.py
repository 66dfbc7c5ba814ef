"""Which weights of a checkpoint make which tensor of an engine's, and what is not written at all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from k2quant.checkpoint.reader import CONFIG, Checkpoint
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.conversion.metadata import config, relatives
from k2quant.conversion.metadata.promises import inventory
from k2quant.errors import MissingTensor, ShapeMismatch, UnsupportedFormat
from k2quant.exports.places import Names, Place, is_made_anew, place_of
from k2quant.exports.shapes import Sizes, missing, sizes_of
from k2quant.formats.activations import flow
from k2quant.formats.bf16 import Bf16
from k2quant.formats.dtypes import FLOATS
from k2quant.ground import names
from k2quant.ground.saying.showing import brief
from k2quant.ground.units import counted


class Engine(NamedTuple):
    """Who reads an export."""

    name: str
    called: Names
    as_which: str
    """Its model, as messages name it."""
    vision: str
    """What is said of the vision tower, which is not written."""


class Stack(NamedTuple):
    """One tensor and the weights that it is made of; `kv_b_proj` becomes two."""

    place: Place
    """Of the tensor, `expert` aside."""
    weights: tuple[StoredWeight, ...]
    """The experts in the order of their numbers, or the one weight. All have one shape."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def is_stacked(self) -> bool:
        """Whether it holds experts."""
        return self.place.expert is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each weight."""
        return self.weights[0].shape

    @property
    def first(self) -> StoredWeight:
        """The weight that messages name."""
        return self.weights[0]


class Found(NamedTuple):
    """What a checkpoint has for an engine."""

    sizes: Sizes
    stacks: tuple[Stack, ...]
    remarks: tuple[str, ...]
    """What of it is not written."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def stacks_of(source: Checkpoint, engine: Engine) -> Found:
    """Sort the weights of a checkpoint.

    Raises:
        CheckpointError: the tensors do not fit together or contradict the config, one is missing, or there is one for
            which the engine's model has no place.
    """
    weights, problems = group_tensors(source.tensors)
    if problems:
        raise problems[0]
    config.check_source(source.config, weights)
    sizes = sizes_of(source.config)
    _check_layers(weights, sizes)
    found: dict[str, dict[int | None, tuple[Place, StoredWeight]]] = {}
    left: dict[str, list[str]] = {}
    for weight in weights:
        name = weight.main.name
        if (why := _why_left(weight, sizes)) is not None:
            left.setdefault(why, []).append(name)
            continue
        place = _placed(weight, engine)
        _check_shape(place, weight, sizes)
        found.setdefault(place.name, {})[place.expert] = place, _as_float(weight)
    there = {(place.layer, place.part): set(each) for each in found.values() for place, _ in each.values()}
    if (lacking := next(missing(there, sizes), None)) is not None:
        raise MissingTensor(
            f"is not there, and {engine.name} does not load a model without it",
            tensor=lacking,
            file=source.named(CONFIG),
            remedy="is the checkpoint complete, and does config.json belong to it?",
        )
    stacks = [
        Stack(next(iter(each.values()))[0], tuple(weight for _, (_, weight) in sorted(each.items(), key=_number)))
        for each in found.values()
    ]
    return Found(
        sizes, tuple(sorted(stacks, key=lambda stack: _order(stack.place))), tuple(_remarks(source, left, engine))
    )


def _number(item: tuple[int | None, object]) -> int:
    return item[0] or 0


def _order(place: Place) -> tuple[int, str]:
    """Sort tensors as they are read: the embedding, the layers, the norm and the head."""
    outside = {"model.embed_tokens": -1, "model.norm": 2**31, "lm_head": 2**31 + 1}
    return (outside[place.part] if place.layer is None else place.layer), place.name


def _check_layers(weights: list[StoredWeight], sizes: Sizes) -> None:
    """Refuse layers behind the last one that are none for multi-token prediction: whose config is this?

    Raises:
        UnsupportedFormat: there is one.
    """
    predictors = inventory(weights).predictors
    for weight in weights:
        layer = names.layer(weight.main.name)
        if layer is not None and layer >= sizes.num_hidden_layers and layer not in predictors:
            raise UnsupportedFormat(
                "lies in a layer behind num_hidden_layers, and in none that predicts further tokens",
                tensor=weight.main.name,
                file=weight.main.file,
                expected=f"layers 0 to {sizes.num_hidden_layers - 1}",
                remedy="take the config that belongs to these files",
            )


def _why_left(weight: StoredWeight, sizes: Sizes) -> str | None:
    """Say why a tensor is not written; None: it is."""
    name = weight.main.name
    if (own := names.in_language_model(name)) is None:
        return "vision"
    if weight.format is None and flow(next(iter(weight.parts))) is not None:
        return "scales"
    if is_made_anew(own):
        return "made anew"
    layer = names.layer(own)
    if layer is not None and layer >= sizes.num_hidden_layers:
        return "layers"
    return "tied" if sizes.tied and own == "lm_head.weight" else None


_LEFT = {
    "vision": "not written: {count} of the vision tower, such as {such}; {vision}",
    "scales": "not written: {count} of activations or of the KV cache, such as {such}, for which {engine} has no use",
    "made anew": "not written: {count} that {engine} makes itself, such as {such}",
    "layers": "not written: {count} of layers behind num_hidden_layers, such as {such}: those that predict further "
    "tokens (MTP), which {engine} does not run",
    "tied": "not written: {such}, for tie_word_embeddings says that the embedding is the head",
}


def _remarks(source: Checkpoint, left: dict[str, list[str]], engine: Engine) -> Iterable[str]:
    for why, tensors in left.items():
        count, such = counted(len(tensors), "tensor"), relatives.shown(tensors[0])
        yield _LEFT[why].format(count=count, such=such, engine=engine.name, vision=engine.vision)
    if source.unlisted:
        count = counted(len(source.unlisted), "tensor")
        yield (
            f"not written: {count} of the shards for which the index looks nowhere, or in another place, such as "
            f"{relatives.shown(source.unlisted[0])}"
        )


def _placed(weight: StoredWeight, engine: Engine) -> Place:
    """Return where a weight goes.

    Raises:
        UnsupportedFormat: the engine's model has no place for it, or it is no number.
    """
    entry = weight.main
    own = names.in_language_model(entry.name) or entry.name
    place = place_of(engine.called, *names.split(own), weight=weight.format is not None)
    if place is None:
        raise UnsupportedFormat(
            f"{engine.as_which} has no place for this tensor",
            tensor=entry.name,
            file=entry.file,
            found=f"{entry.dtype} {list(entry.shape)}",
        )
    if weight.format is None and entry.dtype not in FLOATS:
        expected = " or ".join(FLOATS)
        raise UnsupportedFormat("dtype", tensor=entry.name, file=entry.file, expected=expected, found=entry.dtype)
    return place


def _as_float(weight: StoredWeight) -> StoredWeight:
    """Return a tensor that is called no weight, and is read here like one."""
    if weight.format is not None:
        return weight
    stored = Bf16(dtype=weight.main.dtype)
    return weight._replace(format=stored, parts={stored.main: weight.main})


def _check_shape(place: Place, weight: StoredWeight, sizes: Sizes) -> None:
    """Compare a weight with what the config says of it.

    Raises:
        ShapeMismatch: they contradict each other.
    """
    shapes = sizes.outside() if place.layer is None else sizes.shapes(place.layer)
    expected, beyond = shapes.get(place.part), (place.expert or 0) >= sizes.n_routed_experts
    if expected == weight.shape and not beyond:
        return
    what = "nothing: such a weight is none of this layer's" if expected is None else expected
    raise ShapeMismatch(
        "config.json says otherwise",
        tensor=weight.main.name,
        file=weight.main.file,
        expected=f"at most {sizes.n_routed_experts} experts" if beyond and expected is not None else what,
        found=f"expert {place.expert}" if beyond and expected is not None else weight.shape,
        remedy="take the config that belongs to these files",
    )
