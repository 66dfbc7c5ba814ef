"""Routed experts on a CPU, for training: each once, on its tokens side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def sorted_experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Run the routed experts of one layer, each once, on its tokens side by side.

    transformers' own loop takes a gradient as large as all experts for each of them, and its grouped product is slow on
    CPUs.

    Args:
        module: the experts of a layer; `gate_up_proj` `[E, 2I, H]`, `down_proj` `[E, H, I]`.
        hidden: `[T, H]`.
        chosen: int64, `[T, k]`, the experts of each token.
        weights: `[T, k]`, how much each of them counts.

    Returns:
        `[T, H]`, dtype of `hidden`.
    """
    gate_up, down = module.gate_up_proj, module.down_proj
    order = chosen.flatten().argsort(stable=True)
    counts = chosen.flatten().bincount(minlength=len(gate_up)).tolist()
    rows = hidden.index_select(0, order // chosen.shape[1]).split(counts)
    gate, up = torch.cat([functional.linear(*pair) for pair in zip(rows, gate_up.unbind(), strict=True)]).chunk(2, 1)
    inner = (functional.silu(gate) * up).split(counts)
    outer = torch.cat([functional.linear(*pair) for pair in zip(inner, down.unbind(), strict=True)])
    back = outer.index_select(0, order.argsort()).view(*chosen.shape, -1)
    return (back * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)
