"""What config.json promises of layers, experts and parts, and which of these promises the tensors do not keep.

An engine builds its model from the config and looks for the tensors afterwards. A broken promise ends there in an
error, in weights that are whatever the memory held, or in tensors that nobody reads; here it is named before. None of
them stops a conversion, which writes what is there; what a model cannot run without, `k2quant.model` refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from typing import Any, NamedTuple

from k2quant.checkpoint.weights import StoredWeight
from k2quant.ground import names
from k2quant.ground.saying.showing import brief

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_UNFIT = "an engine fails there, or computes with what its memory held"


class Inventory(NamedTuple):
    """Which layers, experts and parts a checkpoint has, by the names of its tensors."""

    prefixes: dict[int, str]
    """For each layer that has tensors what stands before its name, up to and with `layers.N.`"""
    predictors: frozenset[int]
    """The layers that predict further tokens (MTP): they have an `eh_proj` or another tensor of such a layer alone."""
    dense: frozenset[int]
    """The layers that have a dense MLP."""
    experts: dict[int, dict[int, set[str]]]
    """The projections of each routed expert, by layer and number, as K2 calls them."""
    routed: dict[int, set[int]]
    """How many experts the tensors of each layer's router are for: one number, unless they contradict each other."""
    parts: frozenset[str]
    """The classes of tensors outside the layers, such as `head` and `vision`."""
    of_k3: bool
    """Whether its routed experts have K3's names."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def inventory(weights: Iterable[StoredWeight]) -> Inventory:
    """Count what a checkpoint has."""
    prefixes: dict[int, str] = {}
    predictors: set[int] = set()
    dense: set[int] = set()
    experts: dict[int, dict[int, set[str]]] = {}
    routed: dict[int, set[int]] = {}
    parts: set[str] = set()
    of_k3 = False
    for weight in weights:
        name, layer = weight.main.name, names.layer(weight.main.name)
        if layer is None:
            parts.add(names.tensor_class(name))
            continue
        prefixes.setdefault(layer, name[: name.index(f"layers.{layer}.") + len(f"layers.{layer}.")])
        if (expert := names.expert(weight.base)) is not None:
            experts.setdefault(layer, {}).setdefault(expert, set()).add(names.projection(weight.base))
            of_k3 |= names.is_of_k3(weight.base)
        elif names.predicts(name):
            predictors.add(layer)
        elif (kind := names.tensor_class(name)) == "dense mlp":
            dense.add(layer)
        elif kind == "router" and weight.shape:
            routed.setdefault(layer, set()).add(weight.shape[0])
    return Inventory(prefixes, frozenset(predictors), frozenset(dense), experts, routed, frozenset(parts), of_k3)


def broken_promises(config: Mapping[str, Any] | None, found: Inventory) -> list[str]:
    """Return a sentence for each promise that the tensors do not keep.

    Args:
        config: what config.json holds; of K2.5 and later, `text_config` speaks for the language model. A key that is
            not there, or holds nonsense, promises nothing.
        found: what the checkpoint has.
    """
    if config is None:
        return []
    text = language_config(config)
    checks: tuple[Callable[[Mapping[str, Any], Inventory], Iterator[str]], ...] = (
        _layers,
        _predictors,
        _dense,
        _experts,
    )
    broken = [f"config.json: {sentence}" for check in checks for sentence in check(text, found)]
    return [*broken, *overruled(config, found), *(f"config.json: {sentence}" for sentence in _parts(config, found))]


def overruled(config: Mapping[str, Any], found: Inventory) -> list[str]:
    """Return a sentence for each promise that does not keep a model from running, and that it does not keep either."""
    sentences = (*_left_out(language_config(config), found), *_two_heads(config, found))
    return [f"config.json: {sentence}" for sentence in sentences]


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the language model."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def tied(config: Mapping[str, Any]) -> bool:
    """Tell whether a config says that the embedding is the head too; DeepSeek-V3's default is that it is not."""
    return language_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings")) is True


def _number(text: Mapping[str, Any], key: str) -> int | None:
    value = text.get(key)
    return value if type(value) is int and 0 <= value < 2**63 else None


def _layers(text: Mapping[str, Any], found: Inventory) -> Iterator[str]:
    """Compare the decoder layers with `num_hidden_layers`."""
    promised = _number(text, "num_hidden_layers")
    if promised is None:
        return
    missing = promised - sum(layer < promised for layer in found.prefixes)
    if missing:
        first = next(layer for layer in count() if layer not in found.prefixes)
        yield f"num_hidden_layers is {promised}, but there is no layer {first} (missing layers: {missing}); {_UNFIT}"
    end = promised + (_number(text, "num_nextn_predict_layers") or 0)
    more = sorted(layer for layer in found.prefixes.keys() - found.predictors if layer >= end)
    if more:
        yield (
            f"num_hidden_layers is {promised}, but there is a layer {more[0]} (layers too many: {len(more)}); engines "
            "leave it out, or fail: does config.json belong to this checkpoint?"
        )


def _predictors(text: Mapping[str, Any], found: Inventory) -> Iterator[str]:
    """Look for the layers that `num_nextn_predict_layers` promises, which lie behind the decoder's."""
    begin, promised = _number(text, "num_hidden_layers"), _number(text, "num_nextn_predict_layers")
    if begin is None or not promised:
        return
    missing = promised - sum(begin <= layer < begin + promised for layer in found.predictors)
    if missing:
        first = next(layer for layer in count(begin) if layer not in found.predictors)
        yield (
            f"num_nextn_predict_layers is {promised}, but layer {first} is none that predicts further tokens (missing "
            f"layers: {missing}); engines run the model, but fail when they are to decode speculatively with it (MTP)"
        )


def _left_out(text: Mapping[str, Any], found: Inventory) -> Iterator[str]:
    """Name the layers that predict further tokens although nothing promises them: engines leave them out."""
    begin, promised = _number(text, "num_hidden_layers"), _number(text, "num_nextn_predict_layers")
    more = sorted(layer for layer in found.predictors if begin is not None and layer >= begin + (promised or 0))
    if more:
        says = "not set" if promised is None else promised
        yield (
            f"num_nextn_predict_layers is {says}, but layer {more[0]} predicts further tokens (layers too many: "
            f"{len(more)}); a model is run without it"
        )


def _dense(text: Mapping[str, Any], found: Inventory) -> Iterator[str]:
    """Compare which layers have routed experts with `first_k_dense_replace`."""
    first = _number(text, "first_k_dense_replace")
    if first is None:
        return
    decoder = sorted(layer for layer in found.prefixes if _decodes(layer, text, found))
    sparse = [layer for layer in decoder if layer in found.experts and not _mixes(layer, text)]
    dense = [layer for layer in decoder if layer in found.dense and _mixes(layer, text)]
    for layers, has, lacks in (
        (sparse, "routed experts", "a dense MLP"),
        (dense, "a dense MLP", "a mixture of experts"),
    ):
        if layers:
            yield (
                f"first_k_dense_replace is {first}, but layer {layers[0]} has {has} where {lacks} belongs (such "
                f"layers: {len(layers)}); {_UNFIT}"
            )


def _decodes(layer: int, text: Mapping[str, Any], found: Inventory) -> bool:
    """Tell whether a layer is one of the decoder's."""
    end = _number(text, "num_hidden_layers")
    return layer < end if end is not None else layer not in found.predictors


def _mixes(layer: int, text: Mapping[str, Any]) -> bool:
    """Tell whether a layer of the decoder is promised to have routed experts."""
    first, step = _number(text, "first_k_dense_replace"), _number(text, "moe_layer_freq") or 1
    return first is not None and layer >= first and layer % step == 0


def _experts(text: Mapping[str, Any], found: Inventory) -> Iterator[str]:
    """Compare the routed experts of each layer, and what its router chooses from, with `n_routed_experts`.

    K3 calls it `num_experts`.
    """
    key = "num_experts" if "n_routed_experts" not in text else "n_routed_experts"
    promised = _number(text, key)
    if promised is None:
        return
    without = {layer for layer in found.prefixes if _decodes(layer, text, found) and _mixes(layer, text)} - found.dense
    layers = sorted(found.experts.keys() | without)
    missing = {layer: _missing(found.experts.get(layer, {}), promised) for layer in layers}
    lacking = [layer for layer in layers if missing[layer]]
    if lacking:
        yield (
            f"{key} is {promised}, but there is no `{_first_missing(found, lacking[0], promised)}` (missing "
            f"projections: {sum(missing.values())}, in layers: {len(lacking)}); {_UNFIT}"
        )
    beyond = [layer for layer in layers if max(found.experts.get(layer, {}), default=-1) >= promised]
    if beyond:
        number = min(number for number in found.experts[beyond[0]] if number >= promised)
        yield (
            f"{key} is {promised}, but layer {beyond[0]} has an expert {number} (such layers: "
            f"{len(beyond)}); engines leave it out, or fail"
        )
    other = sorted(layer for layer, sizes in found.routed.items() if sizes != {promised})
    if other:
        sizes = " and ".join(map(str, sorted(found.routed[other[0]])))
        yield (
            f"{key} is {promised}, but the router of layer {other[0]} is for {sizes} (such layers: "
            f"{len(other)}); an engine fails there"
        )


def _missing(experts: Mapping[int, set[str]], promised: int) -> int:
    there = sum(len(projections) for number, projections in experts.items() if number < promised)
    return len(_PROJECTIONS) * promised - there


def _first_missing(found: Inventory, layer: int, promised: int) -> str:
    experts = found.experts.get(layer, {})
    number = next(number for number in range(promised) if len(experts.get(number, ())) < len(_PROJECTIONS))
    part = next(part for part in _PROJECTIONS if part not in experts.get(number, ()))
    return found.prefixes[layer] + names.place_of_expert(number, part, of_k3=found.of_k3)


def _parts(config: Mapping[str, Any], found: Inventory) -> Iterator[str]:
    """Look for the vision tower and the projector that `vision_config` promises, and for the head."""
    words = {"vision": "a vision tower", "projector": "a projector"} if _sees(config) else {}
    missing = [word for kind, word in words.items() if kind not in found.parts]
    if missing:
        yield (
            f"vision_config is there, but no tensor of {' or of '.join(missing)}; an engine that loads them "
            "fails, or computes with what its memory held"
        )
    embeds = "embedding" in found.parts and _number(language_config(config), "vocab_size") is not None
    if embeds and "head" not in found.parts and not tied(config):
        yield f"tie_word_embeddings is not true, but `lm_head` is missing; {_UNFIT}"


def _sees(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("vision_config"), dict)


def _two_heads(config: Mapping[str, Any], found: Inventory) -> Iterator[str]:
    """Name a head that `tie_word_embeddings` makes superfluous."""
    if tied(config) and {"embedding", "head"} <= found.parts:
        yield (
            "tie_word_embeddings is true, but there is a head of its own, `lm_head`; it is kept and used, while "
            "engines that take the embedding for it may leave it out"
        )
