"""What a model holds beside what is fake-quantised: routers, what is only rounded, how much is covered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from k2quant.ground import names
from k2quant.qat.rounding import adapters, scales
from k2quant.qat.rounding.adapters import LowRank
from k2quant.qat.rounding.rules import as_bf16
from k2quant.qat.rounding.scales import LearnedScale
from k2quant.qat.rounding.targets import STACKS, Part, Target, canonical, is_fused, stack


def is_router(module: nn.Module) -> bool:
    """Tell whether a module chooses experts: it has a correction bias beside its weight."""
    return hasattr(module, "e_score_correction_bias") and "weight" in module._parameters  # noqa: SLF001


def coverage(model: nn.Module, targets: Iterable[Target]) -> dict[str, tuple[int, int]]:
    """Return, by tensor class, how many weights are fake-quantised and how many there are."""
    quantised = {id(target.master) for target in targets}
    table: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if scales.CHILD in name.split(".") or adapters.CHILD in name.split("."):
            continue
        row = table.setdefault(names.tensor_class(canonical(name)), [0, 0])
        row[0] += parameter.numel() if id(parameter) in quantised else 0
        row[1] += parameter.numel()
    return {kind: (table[kind][0], table[kind][1]) for kind in names.TENSOR_CLASSES if kind in table}


def rounded_only(model: nn.Module, targets: Iterable[Target]) -> Iterator[Target]:
    """Yield the parameters that are not fake-quantised but that an export rounds: float32, trained or not exact."""
    taken = {id(target.master) for target in targets}
    for name, module in model.named_modules():
        if isinstance(module, LowRank | LearnedScale):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{own}" if name else own
            if id(parameter) in taken or parameter.dtype != torch.float32:
                continue
            if not parameter.requires_grad and _exact(parameter.detach()):
                continue
            if own in STACKS and is_fused(module):
                yield stack(name, module, own)
            else:
                yield Target(full, module, own, (Part(canonical(full).removesuffix(".weight"), None, slice(None)),))


def _exact(values: Tensor) -> bool:
    """Tell whether values are BF16 numbers; those that a plan does not have are taken to be."""
    return values.is_meta or torch.equal(as_bf16(values).float(), values)
