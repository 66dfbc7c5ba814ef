"""Tokens through a layer of experts: the contestants."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn import functional

from k2quant.kernels.ops import moe_fp8, moe_int4
from suites.products import cases
from suites.products.cases import Cell
from suites.products.inputs import Entry, ExpertsBank, Work, aten, normal, relative

CHECKED_TOKENS = 4
"""Tokens that are held against the truth."""

ID_SETS, FEW_ID_SETS, FEW_TOKENS = 20, 4, 64
"""Sets of experts that the calls go through, so that what one call left in a cache is of little use to the next; fewer
are needed with more than so many tokens."""

OURS: dict[str, Callable[..., Tensor]] = {"moe-int4": moe_int4, "moe-fp8": moe_fp8}


class ExpertsProblem:
    """Tokens through a layer of experts, in several sets of experts for the same tokens."""

    def __init__(self, bank: ExpertsBank, cell: Cell) -> None:
        self.bank, self.cell = bank, cell
        self.x = normal((cell.m, bank.size[2]), bank.device, seed=1).bfloat16()
        generator = torch.Generator().manual_seed(2)
        top = min(cases.TOP, bank.size[0])
        share = torch.rand(cell.m, top, generator=generator)
        self.weights = (share / share.sum(1, keepdim=True)).to(bank.device)
        self.ids = [
            _choose(cell.routing, cell.m, bank.size[0], top, generator).to(bank.device)
            for _ in range(ID_SETS if cell.m <= FEW_TOKENS else FEW_ID_SETS)
        ]

    @property
    def work(self) -> Work:
        """What the layer costs: the experts that are met, on average over the sets, are read once."""
        _, inner, hidden = self.bank.size
        met = sum(torch.unique(ids).numel() for ids in self.ids) / len(self.ids)
        flops = 2.0 * self.ids[0].numel() * 3 * inner * hidden
        return Work(bytes=met * self.bank.expert_bytes + 4 * self.x.numel(), flops=flops)

    @cached_property
    def exact(self) -> Tensor:
        """The result of the first tokens, float64, nothing rounded on the way."""
        out = []
        for token in range(min(self.cell.m, CHECKED_TOKENS)):
            row, total = self.x[token].double(), 0
            for expert, share in zip(self.ids[0][token].tolist(), self.weights[token].double(), strict=True):
                gate, up, down = (part.expert(expert).dequantize(torch.float64) for part in self.bank.plain)
                total = total + share * (down @ (functional.silu(gate @ row) * (up @ row)))
            out.append(total)
        return torch.stack(out)  # type: ignore[arg-type]

    def entry(self, layer: Callable[[Tensor], Tensor], weight_bytes: int) -> Entry:
        """Return an entry for a layer that takes the ids."""
        calls = [partial(layer, ids) for ids in self.ids]
        return Entry(
            calls=calls,
            weight_bytes=weight_bytes,
            error=lambda: relative(calls[0]()[: len(self.exact)], self.exact),
        )


def _our_experts(problem: ExpertsProblem) -> Entry:
    product, parts = OURS[problem.cell.section], problem.bank.parts
    return problem.entry(
        lambda ids: product(problem.x, *parts, ids, problem.weights), sum(part.nbytes for part in parts)
    )


def _grouped(problem: ExpertsProblem) -> Entry:
    """Dense experts by torch: pairs sorted by expert, three grouped products, and the weighted sum."""
    x, shares, (gate, up, down) = problem.x, problem.weights, problem.bank.dense
    product = aten("_grouped_mm")
    experts = torch.arange(problem.bank.size[0], device=x.device, dtype=torch.int32)

    def layer(ids: Tensor) -> Tensor:
        ordered, order = ids.flatten().sort(stable=True)
        ends = torch.searchsorted(ordered, experts, right=True, out_int32=True)
        rows = x[order // ids.shape[1]]
        hidden = functional.silu(product(rows, gate.mT, ends)) * product(rows, up.mT, ends)
        pairs = torch.empty_like(rows)
        pairs[order] = product(hidden, down.mT, ends)
        return (pairs.view(*ids.shape, -1) * shares[..., None]).sum(1).to(x.dtype)

    return problem.entry(layer, sum(part.nbytes for part in problem.bank.dense))


def _loop(problem: ExpertsProblem) -> Entry:
    """Dense experts one after the other, as a model without special kernels does."""
    x, shares, (gate, up, down) = problem.x, problem.weights, problem.bank.dense

    def layer(ids: Tensor) -> Tensor:
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert in torch.unique(ids).tolist():
            token, slot = torch.where(ids == expert)
            rows = x[token]
            hidden = functional.silu(functional.linear(rows, gate[expert])) * functional.linear(rows, up[expert])
            out.index_add_(0, token, functional.linear(hidden, down[expert]) * shares[token, slot, None])
        return out.to(x.dtype)

    return problem.entry(layer, sum(part.nbytes for part in problem.bank.dense))


def _choose(routing: str, tokens: int, experts: int, top: int, generator: torch.Generator) -> Tensor:
    """Return the experts of each token, int32 `[tokens, top]`, all different."""
    rank = torch.arange(1, experts + 1, dtype=torch.float64)
    share = torch.ones(experts) if routing == "uniform" else 1 / rank
    return torch.multinomial(share.expand(tokens, experts), top, generator=generator).int()


MOE: dict[str, Callable[[ExpertsProblem], Entry]] = {
    cases.OURS: _our_experts,
    cases.GROUPED: _grouped,
    cases.LOOP: _loop,
}
