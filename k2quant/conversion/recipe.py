"""Which weights get which format.

Defaults follow what Moonshot ships: INT4 releases quantise the routed experts, FP8 releases every projection.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from k2quant.checkpoint.weights import Weight
from k2quant.errors import CheckpointError, UnsupportedFormat, UsageError
from k2quant.formats.layouts import FP8_BLOCK, Bf16, Format, FormatName, Fp8, Int4
from k2quant.ground import names
from k2quant.kernels.codecs.grids import Grid

Scope = Literal["experts", "linear"]

DEFAULT_SCOPE: dict[FormatName, Scope] = {"int4": "experts", "fp8": "linear"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Decides, weight by weight, what a conversion writes."""

    target: Format
    """The format of the weights in scope."""
    scope: Scope
    """`experts`: the routed experts; `linear`: every projection of the decoder layers."""
    ignore: tuple[re.Pattern[str], ...] = ()
    """Weights in whose name one of these is found are out of scope."""

    def in_scope(self, base: str) -> bool:
        """Tell whether a weight is to be stored in the target format."""
        wanted = names.is_routed_expert(base) if self.scope == "experts" else names.is_projection(base)
        return wanted and not any(pattern.search(base) for pattern in self.ignore)

    def target_of(self, weight: Weight) -> Format | None:
        """Return the format that a weight is converted to, or None where it is copied byte for byte.

        A weight that is already in the target format is copied. Out of scope, one that is quantised in another format
        comes out as BF16 and everything else is copied.
        """
        if weight.format is None:
            return None
        if self.target.name == "bf16":
            return None if weight.format == self.target else self.target
        if self.in_scope(weight.base):
            return None if _same_layout(weight.format, self.target) else self.target
        return Bf16() if weight.format.name not in {"bf16", self.target.name} else None


def _same_layout(source: Format, target: Format) -> bool:
    if isinstance(source, Fp8) and isinstance(target, Fp8):
        return source.block == target.block
    return isinstance(source, Int4) and isinstance(target, Int4) and source.group == target.group


def make_policy(
    to: FormatName,
    weights: list[Weight],
    *,
    scope: Scope | None = None,
    ignore: tuple[str, ...] = (),
    grid: Grid | None,
) -> Policy:
    """Make the policy of a conversion from what the user asked for and what the source holds.

    Raises:
        UsageError: an option that has no meaning for this format, or a broken regular expression.
        CheckpointError: nothing is in scope.
        UnsupportedFormat: the source is INT4 of another group size and INT4 is asked for.
    """
    if to == "bf16" and (scope or ignore):
        raise UsageError("--scope and --ignore have no meaning with --to bf16: everything becomes BF16")
    if to != "int4" and grid:
        raise UsageError(f"--grid has no meaning with --to {to}: it is the rounding rule of INT4")
    policy = Policy(
        target=_target(to, weights, grid or "moonshot"),
        scope=scope or DEFAULT_SCOPE.get(to, "linear"),
        ignore=tuple(_compile(pattern) for pattern in ignore),
    )
    if to != "bf16" and not any(policy.in_scope(weight.base) for weight in weights if weight.format):
        raise CheckpointError(
            "no weight is in scope",
            expected="tensors such as model.layers.1.mlp.experts.0.gate_proj.weight",
            remedy="see `k2quant inspect`, and --scope and --ignore",
        )
    return policy


_QUANTIFIER = re.compile(r"(?<!\\)[*+{]")
MOST_QUANTIFIERS = 3
"""A few more in one pattern can keep the matcher busy for years."""


def may_take_for_ever(pattern: str) -> bool:
    """Tell of a regular expression that comes from a file whether matching it might never end."""
    return (
        len(pattern) > 500
        or re.search(r"\)[*+{]", pattern) is not None
        or len(_QUANTIFIER.findall(pattern)) > MOST_QUANTIFIERS
    )


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--ignore {pattern!r} is no regular expression: {error}") from error


def _target(to: FormatName, weights: list[Weight], grid: Grid) -> Format:
    if to == "bf16":
        return Bf16()
    if to == "fp8":
        blocks = {weight.format.block for weight in weights if isinstance(weight.format, Fp8)}
        if len(blocks) > 1:
            raise UnsupportedFormat("FP8 weights of several block sizes, which no config can describe", found=blocks)
        return Fp8(block=blocks.pop() if blocks else FP8_BLOCK)
    target = Int4(grid=grid)
    other = next((w for w in weights if isinstance(w.format, Int4) and w.format.group != target.group), None)
    if other is not None and isinstance(other.format, Int4):
        raise UnsupportedFormat(
            "INT4 of another group size is not rewritten as INT4",
            tensor=other.main.name,
            expected=f"groups of {target.group}",
            found=f"groups of {other.format.group}",
            remedy="convert to bf16 or fp8",
        )
    return target
