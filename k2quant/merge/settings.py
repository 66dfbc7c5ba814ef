"""What an adapter_config.json of PEFT says, checked: which update its two factors stand for, and how it is scaled.

The fields are those of `LoraConfig` of PEFT 0.21. Whatever would make the update something else than
scaling * B @ A on top of the base's own weights is refused, and so is a field that is not known here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files import json_kinds as kinds
from k2quant.checkpoint.files.paths import read_limited
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import MalformedFile, UnsupportedFormat
from k2quant.ground.patterns import SAFE_PATTERN, may_take_for_ever

_LIMIT = 16_000_000  # bytes; patterns may name each of a model's modules

_PLAIN_STARTS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Values of `init_lora_weights`, beside true and false, that leave the base's weights as they are."""

_OTHER_METHODS = {
    "use_dora": "DoRA scales whole columns by a magnitude of its own",
    "fan_in_fan_out": "its factors are those of transposed weights, which no K2 has",
    "lora_bias": "it adds biases, which K2's projections do not have",
    "layer_replication": "it is for a model with repeated layers",
    "use_qalora": "QA-LoRA pools its inputs, which needs zero points that K2's grid does not have",
    "alora_invocation_tokens": "an activated LoRA applies from some token on, so it has no merged form",
    "trainable_token_indices": "it holds rows of the embedding, not factors",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters, so it has no merged form",
    "kasa_config": "KaSA changes the base's weights",
    "monteclora_config": "it samples its factors",
    "velora_config": "it is a variant that is not supported",
    "megatron_config": "its factors may be shards",
}
"""Fields that must be false, null or empty, and what they would mean."""

_NO_MATTER = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "use_rslora",
    }
)
"""Fields that are read here, or that say how the adapter came to be and not what it is."""


class _Patterns:
    """Numbers by the names of modules, as `rank_pattern` and `alpha_pattern` give them: the first that matches."""

    def __init__(self, numbers: dict[str, float], file: Path) -> None:
        self._numbers = [(_compiled(key, file), number) for key, number in numbers.items()]

    def get(self, name: str, default: float) -> float:
        """Return the number of a module or parameter, by its full name."""
        return next((number for pattern, number in self._numbers if pattern.match(name)), default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the factors of an adapter mean."""

    rank: int
    """`r`, where no pattern says otherwise."""
    alpha: float
    """`lora_alpha`, likewise."""
    rank_stabilised: bool
    """rsLoRA: scaling by the root of the rank."""
    ranks: _Patterns
    """`rank_pattern`."""
    alphas: _Patterns
    """`alpha_pattern`."""
    saved: tuple[str, ...]
    """`modules_to_save`: names, or ends of names, of modules that are replaced as a whole."""
    version: tuple[int, int] | None
    """The PEFT that wrote it, major and minor; None where it does not say."""

    def rank_of(self, name: str) -> int:
        """Return the rank that a module or parameter should have, by its full name."""
        return int(self.ranks.get(name, self.rank))

    def scaling_of(self, name: str) -> float:
        """Return the factor of a module's or parameter's update: alpha/r, or alpha/sqrt(r)."""
        rank = self.rank_of(name)
        return self.alphas.get(name, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_settings(path: Path) -> Settings:
    """Read an adapter_config.json.

    Raises:
        MalformedFile: it is none, or a field is not what belongs there.
        UnsupportedFormat: the adapter is not one that can be merged by adding scaling * B @ A.
    """
    config = parse_object(read_limited(path, _LIMIT), file=path)
    try:
        _check_method(config, path)
        return Settings(
            rank=kinds.whole(config["r"], least=1, limit=2**31),
            alpha=_number(config["lora_alpha"]),
            rank_stabilised=kinds.truth(config.get("use_rslora", False)),
            ranks=_Patterns(_numbers(config.get("rank_pattern"), least=1), path),
            alphas=_Patterns(_numbers(config.get("alpha_pattern")), path),
            saved=tuple(kinds.text(name) for name in kinds.values(config.get("modules_to_save") or [])),
            version=_version(config.get("peft_version")),
        )
    except KeyError as error:
        raise MalformedFile("lacks a field", file=path, expected=error) from error
    except (TypeError, ValueError) as error:
        raise MalformedFile("a field is not what PEFT writes", file=path, found=str(error)[:200]) from error


def _check_method(config: dict[str, Any], path: Path) -> None:
    method = kinds.text(config["peft_type"])
    if method != "LORA":
        raise UnsupportedFormat("another method than LoRA", file=path, expected="peft_type LORA", found=repr(method))
    for name, value in config.items():
        if value and name in _OTHER_METHODS:
            raise UnsupportedFormat(f"`{name}` is set: {_OTHER_METHODS[name]}", file=path, remedy=_MERGE_ELSEWHERE)
        if value and name not in _OTHER_METHODS and name not in _NO_MATTER:
            raise UnsupportedFormat(
                "a field that k2quant does not know", file=path, found=repr(name)[:200], remedy=_MERGE_ELSEWHERE
            )
    if (bias := config.get("bias", "none")) != "none":
        raise UnsupportedFormat(
            "trained biases, which K2's projections do not have", file=path, expected="bias none", found=repr(bias)[:50]
        )
    start = config.get("init_lora_weights", True)
    if not (start is None or isinstance(start, bool) or (isinstance(start, str) and start in _PLAIN_STARTS)):
        raise UnsupportedFormat(
            "this start changes the base's weights, which BASE still has unchanged",
            file=path,
            expected=f"init_lora_weights true, false or one of {', '.join(sorted(_PLAIN_STARTS))}",
            found=repr(start)[:50],
            remedy="save the adapter with PEFT's path_initial_model_for_weight_conversion, which makes it a plain one",
        )


_MERGE_ELSEWHERE = "merge it with PEFT, where it was trained, and convert the result"


def _compiled(pattern: str, file: Path) -> re.Pattern[str]:
    """Compile a pattern as PEFT matches it: it ends where the name ends and begins at the start or behind a dot."""
    if may_take_for_ever(pattern):
        raise UnsupportedFormat(
            "a pattern that might take for ever to match",
            file=file,
            expected=f"a module's name, or {SAFE_PATTERN}",
            found=repr(pattern)[:200],
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise MalformedFile("a pattern is no regular expression", file=file, found=repr(pattern)[:200]) from error


def _numbers(value: object, least: float | None = None) -> dict[str, float]:
    if least is not None:
        return {key: kinds.whole(number, least=1, limit=2**31) for key, number in kinds.mapping(value or {}).items()}
    return {key: _number(number) for key, number in kinds.mapping(value or {}).items()}


def _number(value: object) -> float:
    return kinds.number(value, low=-1e9, high=1e9)


def _version(value: object) -> tuple[int, int] | None:
    match = re.match(r"(\d{1,6})\.(\d{1,6})", value) if isinstance(value, str) else None
    return (int(match[1]), int(match[2])) if match else None
