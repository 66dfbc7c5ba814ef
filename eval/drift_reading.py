"""Read back what `fidelity` and `blame` wrote, trusting nothing in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from k2quant.checkpoint.paths import read_limited
from k2quant.checkpoint.strict_json import parse_object
from k2quant.errors import MalformedFile, MalformedResults
from k2quant.eval.drift import SCHEMA, Blame, Estimate, Fidelity, LayerFidelity, Suspect
from k2quant.eval.verdict import Side

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
    layers = tuple(_layer(_object(layer)) for layer in _list(content["layers"]))
    numbers = [layer.layer for layer in layers]
    if numbers != sorted(set(numbers)):
        raise ValueError("layers out of order, or twice")
    return Fidelity(
        base=_side(content["base"]),
        candidate=_side(content["candidate"]),
        text=_string(content["text"]),
        text_hash=_string(content["text_hash"]),
        tokens=_whole(content["tokens"], least=1),
        chunks=_whole(content["chunks"], least=1),
        kl=_estimate(content["kl"], -_ROUNDING),
        kl_median=_number(content["kl_median"], -_ROUNDING),
        kl_99=_number(content["kl_99"], -_ROUNDING),
        kl_max=_number(content["kl_max"], -_ROUNDING),
        reverse_kl=_estimate(content["reverse_kl"], -_ROUNDING),
        same_top=_estimate(content["same_top"], 0, 1),
        base_perplexity=_number(content["base_perplexity"], 0),
        candidate_perplexity=_number(content["candidate_perplexity"], 0),
        log_ratio=_estimate(content["log_ratio"], -_HUGE),
        layers=layers,
        unread=_string(content.get("unread", "")),
    )


def _layer(layer: dict[str, Any]) -> LayerFidelity:
    same, overlap, shift = (
        None if layer[key] is None else _number(layer[key], -_ROUNDING, 1 + _ROUNDING)
        for key in ("same_experts", "overlap", "load_shift")
    )
    never, starved = (
        tuple(_whole(expert, limit=_LAYERS) for expert in _list(layer[key])) for key in ("never", "starved")
    )
    return LayerFidelity(
        layer=_whole(layer["layer"], limit=_LAYERS),
        relative_mse=_number(layer["relative_mse"], 0),
        cosine=_number(layer["cosine"], -1 - _ROUNDING, 1 + _ROUNDING),
        kl=_number(layer["kl"], -_ROUNDING),
        same_experts=same,
        overlap=overlap,
        load_shift=shift,
        never=never,
        starved=starved,
    )


def _blame(content: dict[str, Any]) -> Blame:
    classes, suspects = (tuple(map(_suspect, _list(content[key]))) for key in ("classes", "suspects"))
    return Blame(
        base=_side(content["base"]),
        candidate=_side(content["candidate"]),
        text=_string(content["text"]),
        text_hash=_string(content["text_hash"]),
        damage=_estimate(content["damage"], -_ROUNDING),
        noise=_estimate(content["noise"], -_ROUNDING),
        changed=_whole(content["changed"]),
        passes=_whole(content["passes"]),
        classes=classes,
        suspects=suspects,
        together=None if content["together"] is None else _suspect(content["together"]),
    )


def _suspect(value: object) -> Suspect:
    suspect = _object(value)
    low, high = (_number(edge, -_HUGE) for edge in _list(suspect["interval"]))
    if low > high:
        raise ValueError(f"interval from {low!r} to {high!r}")
    return Suspect(
        name=_string(suspect["name"]),
        tensors=_whole(suspect["tensors"], least=1),
        share=_number(suspect["share"], -_HUGE),  # what is put back may also do harm
        interval=(low, high),
    )


def _side(value: object) -> Side:
    side = _object(value)
    model_hash, tokenizer_hash = (
        None if side[key] is None else _string(side[key]) for key in ("model_hash", "tokenizer_hash")
    )
    return Side(
        folder=_string(side["folder"]),
        model=_string(side["model"]),
        model_hash=model_hash,
        tokenizer_hash=tokenizer_hash,
    )


def _estimate(value: object, low: float, high: float = _HUGE) -> Estimate:
    estimate = _object(value)
    return Estimate(value=_number(estimate["value"], low, high), error=_number(estimate["error"], 0))


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.100} where text stands")
    return value


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.100} where an object stands")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.100} where a list stands")
    return value


def _whole(value: object, least: int = 0, limit: int = 2**63) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < limit:
        raise ValueError(f"{value!r:.100} where a count from {least} stands")
    return value


def _number(value: object, low: float, high: float = _HUGE) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[operator, arg-type]  # a number by now
        raise ValueError(f"{value!r:.100} where a number from {low:g} to {high:g} stands")
    return float(value)  # type: ignore[arg-type]  # the same
