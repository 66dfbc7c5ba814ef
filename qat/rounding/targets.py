"""Which parameters of a model are fake-quantised, and which weights of a checkpoint they hold.

Experts are recognised by structure, three dimensions and their names, not by class: whatever implementation
transformers chooses to run them with reads the same two parameters.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.weights import group_tensors
from k2quant.conversion.recipes.recipe import in_scope
from k2quant.errors import ShapeMismatch, UnsupportedFormat, UsageError
from k2quant.ground import engines, names
from k2quant.ground.patterns import check_found
from k2quant.qat.config import QATConfig

STACKS = ("gate_up_proj", "down_proj")
"""Parameters of a module of fused experts, `[E, 2I, H]` and `[E, H, I]` (transformers 5, models/deepseek_v3)."""

_LAYER = re.compile(r"(?:^|\.)(layers\.[0-9]+\..*)")


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix of a checkpoint within a parameter."""

    base: str
    """Its name in the language model, suffix left out: `model.layers.3.mlp.experts.17.up_proj`."""
    expert: int | None
    """Its place along the first dimension of a stack; None: the parameter is the matrix itself."""
    rows: slice
    """Its rows within the expert."""

    def of(self, tensor: Tensor) -> Tensor:
        """Return the matrix as a view of the parameter, or of something of its shape."""
        return tensor if self.expert is None else tensor[self.expert, self.rows]


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A parameter that the forward pass sees rounded."""

    name: str
    """In the model."""
    module: nn.Module
    parameter: str
    """The parameter's name in its module."""
    parts: tuple[Part, ...]
    """The matrices that it holds, in the order of its rows."""

    @property
    def height(self) -> int | None:
        """Rows of each matrix of a stack; None: the parameter is no stack."""
        rows = self.parts[0].rows
        return None if self.parts[0].expert is None else rows.stop - rows.start

    @property
    def master(self) -> nn.Parameter:
        """The weight that is trained."""
        found = self.module._parameters[self.parameter]  # noqa: SLF001  an attribute may shadow it
        assert found is not None  # noqa: S101  it was there when the target was made
        return found


def canonical(name: str) -> str:
    """Return a parameter's name as a language model that stands alone has it, whatever it is wrapped in."""
    match = _LAYER.search(name)
    if match:
        return f"model.{match[1]}"
    return names.in_language_model(name.removeprefix("module.")) or name


def find_targets(model: nn.Module, config: QATConfig) -> list[Target]:
    """Return what a config fake-quantises in a model, in the model's order.

    Raises:
        UsageError: no routed expert is among them, a pattern is found nowhere, what engines fuse would be split, or the
            weights are packed.
        UnsupportedFormat: experts that lie otherwise than transformers' DeepSeek-V3 has them.
        ShapeMismatch: a group does not divide a width.
    """
    candidates = list(_candidates(model))
    if config.patterns:
        check_found(config.patterns, list(dict.fromkeys(_bases(model, candidates))), "ignore:")
    found = [target for target in candidates if _wanted(target, config)]
    experts = [part for target in found for part in target.parts if names.is_routed_expert(part.base)]
    if not experts:
        raise UsageError(_nothing(model, config))
    _check_fused(candidates, set(found), config)
    for target in found:
        _check(target, config)
    return found


def bases_digest(targets: Iterable[Target]) -> str:
    """Return a sha256 of which weights are fake-quantised: of their names in a checkpoint, whatever their order."""
    return hashlib.sha256("\n".join(sorted(bases_of(targets))).encode()).hexdigest()


def bases_of(targets: Iterable[Target]) -> set[str]:
    """Return the names in the language model of all matrices of some targets."""
    return {part.base for target in targets for part in target.parts}


def _bases(model: nn.Module, candidates: list[Target]) -> Iterator[str]:
    """Yield the names in which a pattern may be found: those of the model's checkpoint, where the export looks for it.

    Of a model that knows none, its matrices and tensors as a checkpoint would have them.
    """
    checkpoint = getattr(model, "checkpoint", None)
    if isinstance(checkpoint, Checkpoint):
        yield from (weight.base for weight in group_tensors(checkpoint.tensors).weights)
        return
    yield from (part.base for target in candidates for part in target.parts)
    stacks = {target.name for target in candidates if target.height is not None}
    own = itertools.chain(model.named_parameters(), model.named_buffers())
    yield from (names.split(canonical(name))[0] for name, _ in own if name not in stacks)


def _check_fused(candidates: list[Target], found: set[Target], config: QATConfig) -> None:
    """Refuse to fake-quantise a part of what engines fuse: the export would be in two formats.

    Raises:
        UsageError: so it would be, and nobody allowed it.
    """
    if config.allow_split:
        return
    kept = "BF16"
    parts = ((part.base, config.to if target in found else kept) for target in candidates for part in target.parts)
    if splits := engines.splits(parts):
        raise UsageError(
            f"this would split what engines fuse: {splits[0]}; take all of them or none with `scope` and `ignore`, or "
            "train it all the same with `allow_split: true`"
        )


def _candidates(model: nn.Module) -> Iterator[Target]:
    """Yield every projection of the decoder layers, fused or not."""
    for name, module in model.named_modules():
        if is_fused(module):
            _check_layout(name, module)
            yield from (stack(name, module, parameter) for parameter in STACKS)
        elif isinstance(module, nn.Linear) and module._parameters.get("weight") is not None:  # noqa: SLF001
            base = canonical(name)
            if names.is_projection(base):
                yield Target(f"{name}.weight", module, "weight", (Part(base, None, slice(None)),))


def is_fused(module: nn.Module) -> bool:
    """Tell whether a module holds the experts of a layer in two stacks."""
    held = [module._parameters.get(name) for name in STACKS]  # noqa: SLF001  an attribute may shadow it
    return hasattr(module, "num_experts") and all(tensor is not None and tensor.ndim == 3 for tensor in held)


def _check_layout(name: str, module: nn.Module) -> None:
    wrong = {"is_transposed": True, "is_concatenated": False, "has_gate": False}
    for flag, value in wrong.items():
        if getattr(module, flag, not value) is value:
            raise UnsupportedFormat(
                "experts of another layout", tensor=name, expected="[E, 2I, H] and [E, H, I]", found=f"{flag}={value}"
            )
    gate_up, down = (module._parameters[parameter] for parameter in STACKS)  # noqa: SLF001
    assert gate_up is not None and down is not None  # noqa: S101, PT018  `is_fused` saw them
    experts, hidden, inner = down.shape
    if tuple(gate_up.shape) != (experts, 2 * inner, hidden):
        raise ShapeMismatch(
            "experts of another layout",
            tensor=f"{name}.gate_up_proj",
            expected=(experts, 2 * inner, hidden),
            found=tuple(gate_up.shape),
        )


def stack(name: str, module: nn.Module, parameter: str) -> Target:
    """Return one of the two parameters of a module of fused experts, with the matrices that it holds."""
    full = f"{name}.{parameter}"
    fused = names.fused_experts(canonical(full))
    tensor = module._parameters[parameter]  # noqa: SLF001  an attribute may shadow it
    if fused is None or tensor is None:
        raise UnsupportedFormat("experts outside of a decoder layer", tensor=full, expected="layers.N.mlp.experts")
    height = tensor.shape[1] // len(fused.projections)
    parts = tuple(
        Part(f"{fused.prefix}{expert}.{projection}", expert, slice(place * height, (place + 1) * height))
        for expert in range(tensor.shape[0])
        for place, projection in enumerate(fused.projections)
    )
    return Target(full, module, parameter, parts)


def _wanted(target: Target, config: QATConfig) -> bool:
    """Tell whether a target is in scope, whole or not at all.

    Raises:
        UsageError: a pattern takes some matrices of a stack out, which is rounded as one.
    """
    scope, form = config.resolved_scope, config.format
    scoped = [in_scope(part.base, scope, form) and not config.ignores(part.base) for part in target.parts]
    if any(scoped) and not all(scoped):
        out = target.parts[scoped.index(False)].base
        raise UsageError(
            f"ignore: takes `{out}` out of `{target.name}`, whose matrices are rounded together; match all or none"
        )
    return all(scoped)


def _check(target: Target, config: QATConfig) -> None:
    """Refuse what the format cannot hold, and dtypes that are not trained."""
    shape = tuple(target.master.shape)
    try:
        config.format.state(shape[-2:], name=target.name)
    except ShapeMismatch as error:
        raise ShapeMismatch(
            error.message,
            tensor=target.name,
            expected=error.expected,
            found=shape,
            remedy="keep it out with `ignore`",
        ) from error
    if target.master.dtype not in {torch.float32, torch.bfloat16}:
        raise UsageError(f"{target.name}: expected float32 or bfloat16 weights to train, found {target.master.dtype}")


def _nothing(model: nn.Module, config: QATConfig) -> str:
    """Say why no routed expert matched."""
    packed = next((name for name, module in model.named_modules() if hasattr(module, "packed")), None)
    if packed is not None:
        return f"the weights of `{packed}` are packed and cannot be trained; load the model with k2quant.qat.load"
    scope = f"scope {config.resolved_scope}" + (f", ignore {', '.join(config.ignore)}" if config.ignore else "")
    return (
        f"no routed expert would be fake-quantised ({scope}): expected modules with {' and '.join(STACKS)}, or linears "
        "such as layers.1.mlp.experts.0.up_proj; is this a K2 model, and does `ignore` match too much?"
    )
