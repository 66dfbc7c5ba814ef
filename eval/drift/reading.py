"""Read back what `fidelity` and `blame` wrote, trusting nothing in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from k2quant.checkpoint.files import json_kinds as kinds
from k2quant.checkpoint.files.paths import read_limited
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import MalformedFile, MalformedResults
from k2quant.eval.drift.findings import SCHEMA, Blame, Fidelity, LayerFidelity, Suspect
from k2quant.eval.gating.verdict import Side
from k2quant.ground.intervals import Estimate

_LIMIT = 2**26  # bytes; 61 layers with 384 experts each make less than one of its 64 MiB
_LAYERS = 100_000  # more than any model has, of experts too
_HUGE = 1e100
_ROUNDING = 1e-3  # a sum of many float32 may miss its limit by so much

_Result = TypeVar("_Result")


def read_fidelity(path: Path) -> Fidelity:
    """Read the JSON of a `Fidelity`.

    Raises:
        MalformedResults: it cannot be read, is something else, or a part is missing, of the wrong kind or out of range.
    """
    return _read(path, "fidelity", _fidelity)


def read_blame(path: Path) -> Blame:
    """Read the JSON of a `Blame`.

    Raises:
        MalformedResults: it cannot be read, is something else, or a part is missing, of the wrong kind or out of range.
    """
    return _read(path, "blame", _blame)


def _read(path: Path, kind: str, build: Callable[[dict[str, Any]], _Result]) -> _Result:
    try:
        content = parse_object(read_limited(path, _LIMIT), file=path)
        found = (content["kind"], content["schema"])
        if found != (kind, SCHEMA) or isinstance(content["schema"], bool):
            raise MalformedResults(file=path, expected=f"{kind} of schema {SCHEMA}", found=f"{found!r:.100}")
        return build(content)
    except OSError as error:
        raise MalformedResults("cannot be read", file=path, found=error.strerror or str(error)) from error
    except MalformedFile as error:
        raise MalformedResults(error.message, file=path, expected=error.expected, found=error.found) from error
    except KeyError as error:
        remedy = f"write it with k2quant eval {kind}"
        raise MalformedResults("a part is missing", file=path, expected=error, remedy=remedy) from error
    except (ValueError, TypeError, OverflowError) as error:
        raise MalformedResults(f"not what {kind} writes", file=path, found=str(error)[:200]) from error


def _fidelity(content: dict[str, Any]) -> Fidelity:
    layers = tuple(_layer(kinds.mapping(layer)) for layer in kinds.values(content["layers"]))
    numbers = [layer.layer for layer in layers]
    if numbers != sorted(set(numbers)):
        raise ValueError("layers out of order, or twice")
    return Fidelity(
        base=_side(content["base"]),
        candidate=_side(content["candidate"]),
        text=kinds.text(content["text"]),
        text_hash=kinds.text(content["text_hash"]),
        tokens=kinds.whole(content["tokens"], least=1),
        chunks=kinds.whole(content["chunks"], least=1),
        kl=_estimate(content["kl"], -_ROUNDING),
        kl_median=kinds.number(content["kl_median"], -_ROUNDING),
        kl_99=kinds.number(content["kl_99"], -_ROUNDING),
        kl_max=kinds.number(content["kl_max"], -_ROUNDING),
        reverse_kl=_estimate(content["reverse_kl"], -_ROUNDING),
        same_top=_estimate(content["same_top"], 0, 1),
        base_perplexity=kinds.number(content["base_perplexity"], 0),
        candidate_perplexity=kinds.number(content["candidate_perplexity"], 0),
        log_ratio=_estimate(content["log_ratio"], -_HUGE),
        layers=layers,
        unread=kinds.text(content.get("unread", "")),
        completions=kinds.truth(content.get("completions", False)),
        backend=kinds.text(content.get("backend", "auto")),
    )


def _layer(layer: dict[str, Any]) -> LayerFidelity:
    same, overlap, shift = (
        None if layer[key] is None else kinds.number(layer[key], -_ROUNDING, 1 + _ROUNDING)
        for key in ("same_experts", "overlap", "load_shift")
    )
    never, starved = (
        tuple(kinds.whole(expert, limit=_LAYERS) for expert in kinds.values(layer[key])) for key in ("never", "starved")
    )
    return LayerFidelity(
        layer=kinds.whole(layer["layer"], limit=_LAYERS),
        relative_mse=kinds.number(layer["relative_mse"], 0),
        cosine=kinds.number(layer["cosine"], -1 - _ROUNDING, 1 + _ROUNDING),
        kl=kinds.number(layer["kl"], -_ROUNDING),
        same_experts=same,
        overlap=overlap,
        load_shift=shift,
        never=never,
        starved=starved,
    )


def _blame(content: dict[str, Any]) -> Blame:
    classes, suspects = (tuple(map(_suspect, kinds.values(content[key]))) for key in ("classes", "suspects"))
    return Blame(
        base=_side(content["base"]),
        candidate=_side(content["candidate"]),
        text=kinds.text(content["text"]),
        text_hash=kinds.text(content["text_hash"]),
        damage=_estimate(content["damage"], -_ROUNDING),
        noise=_estimate(content["noise"], -_ROUNDING),
        changed=kinds.whole(content["changed"]),
        passes=kinds.whole(content["passes"]),
        classes=classes,
        suspects=suspects,
        together=None if content["together"] is None else _suspect(content["together"]),
        completions=kinds.truth(content.get("completions", False)),
        backend=kinds.text(content.get("backend", "auto")),
    )


def _suspect(value: object) -> Suspect:
    suspect = kinds.mapping(value)
    low, high = (kinds.number(edge, -_HUGE) for edge in kinds.values(suspect["interval"]))
    if low > high:
        raise ValueError(f"interval from {low!r} to {high!r}")
    return Suspect(
        name=kinds.text(suspect["name"]),
        tensors=kinds.whole(suspect["tensors"], least=1),
        share=kinds.number(suspect["share"], -_HUGE),  # what is put back may also do harm
        interval=(low, high),
    )


def _side(value: object) -> Side:
    side = kinds.mapping(value)
    model_hash, tokenizer_hash = (
        None if side[key] is None else kinds.text(side[key]) for key in ("model_hash", "tokenizer_hash")
    )
    return Side(
        folder=kinds.text(side["folder"]),
        model=kinds.text(side["model"]),
        model_hash=model_hash,
        tokenizer_hash=tokenizer_hash,
    )


def _estimate(value: object, low: float, high: float = _HUGE) -> Estimate:
    estimate = kinds.mapping(value)
    return Estimate(value=kinds.number(estimate["value"], low, high), error=kinds.number(estimate["error"], 0))
