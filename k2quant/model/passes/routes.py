"""Which experts the router of each layer sends a text's tokens to, and how that differs between two models."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from k2quant.ground.saying.showing import brief


class Routing(NamedTuple):
    """Candidate against baseline in one layer; the fields are those of `LayerFidelity`."""

    same_experts: float
    overlap: float
    load_shift: float
    never: tuple[int, ...]
    starved: tuple[int, ...]

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def watch_router(layer: nn.Module, note: Callable[[Tensor], None]) -> list[RemovableHandle]:
    """Have the experts that a layer's router chooses noted, batch by batch, int32 `[T, k]` on the CPU.

    Returns:
        what takes the hook away again; nothing for a dense layer.
    """

    def chosen(_module: nn.Module, _inputs: object, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        note(outputs[2].to("cpu", torch.int32))

    routers = [module for module in layer.modules() if isinstance(module, DeepseekV3TopkRouter)]
    return [router.register_forward_hook(chosen) for router in routers]


def compare_routes(base: Tensor, candidate: Tensor, experts: int) -> Routing:
    """Compare what two routers chose for the same tokens; the order within a token's choice plays no part.

    Args:
        base: int `[T, k]`, the experts of each token, none twice.
        candidate: the same of the other model.
        experts: how many there are.
    """
    both = (base[:, :, None] == candidate[:, None, :]).any(-1).sum(-1)  # [T]: experts that both chose
    chosen = base.shape[1]
    before, after = (torch.bincount(ids.flatten().long(), minlength=experts) for ids in (base, candidate))
    return Routing(
        same_experts=float((both == chosen).double().mean()),
        overlap=float(both.double().mean() / chosen),
        load_shift=float((before - after).abs().sum() / (2 * base.numel())),
        never=tuple((before == 0).nonzero().flatten().tolist()),
        starved=tuple(((before > 0) & (after == 0)).nonzero().flatten().tolist()),
    )
