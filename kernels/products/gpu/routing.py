"""Which (token, expert) pair is worked on where, found on the GPU: no sort, no atomics, no word to the host.

A pair is one token's choice of one expert, numbered t * k + j. The grouped products of `moe` work on blocks of
slots, each block for one expert. How many blocks there can be at most follows from the shapes alone; how many there are
is known to the GPU only, so the surplus ones are marked and their programs end at once. A captured CUDA graph may
therefore be replayed with other ids.

The order is that of the pairs within an expert and of the experts among blocks: the same ids give the same slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from k2quant.kernels.devices.launch import launch

SPARSITY_FACTOR = 4
"""Up to one pair for this many experts, hardly two pairs share an expert: each pair is then its own block, and the two
launches that would bring pairs together are saved. On K2, with 384 experts and 8 choices, that is up to 12 tokens."""

IDS = 1024
"""Ids that a program looks at together."""


@dataclass(frozen=True, slots=True)
class Routing:
    """The work of a grouped product, in blocks of slots; each block has one expert. Made by `plan` or `route`."""

    pairs: Tensor | None
    """int32 `[blocks * rows]`: the pair of each slot, -1 for padding. None: block b is pair b alone."""
    experts: Tensor
    """`[blocks]`, int32 or int64: the expert of each block. One outside 0..E-1 has nothing to do."""
    rows: int
    """Slots of a block."""

    @property
    def blocks(self) -> int:
        """Blocks to launch: as many as any ids of this shape can need."""
        return self.experts.shape[0]


def plan(ids: Tensor, experts: int, rows: int) -> Routing:
    """Return the routing that suits the number of pairs: `direct` for few, else `route`."""
    return direct(ids, rows) if ids.numel() * SPARSITY_FACTOR <= experts else route(ids, experts, rows)


def direct(ids: Tensor, rows: int) -> Routing:
    """Return a block for each pair of ids `[T, k]`, without any launch; its other slots are padding."""
    return Routing(None, ids.contiguous().reshape(-1), rows)


def most_blocks(pairs: int, experts: int, rows: int) -> int:
    """Return the largest number of blocks that any routing of `pairs` needs: every expert's last one may hold one."""
    return min(pairs, (pairs + experts * (rows - 1)) // rows)


def route(ids: Tensor, experts: int, rows: int) -> Routing:
    """Bring the pairs of each expert together.

    Args:
        ids: `[T, k]`, int32 or int64. One outside 0..experts-1, such as -1, is no expert; its pair gets no slot.
        experts: E.
        rows: slots of a block, a power of two.
    """
    ids = ids.contiguous().reshape(-1)
    blocks = most_blocks(ids.numel(), experts, rows)
    counts = torch.empty(experts, dtype=torch.int32, device=ids.device)
    pairs = torch.empty(blocks * rows, dtype=torch.int32, device=ids.device)
    owners = torch.empty(blocks, dtype=torch.int32, device=ids.device)
    if blocks:
        launch(_count, (experts,), ids, counts, ids.numel(), BLOCK=IDS)
        sizes = {"EXPERTS": triton.next_power_of_2(experts), "ROWS": rows, "BLOCK": IDS}
        launch(_place, (experts,), ids, counts, pairs, owners, ids.numel(), experts, blocks, **sizes)
    return Routing(pairs, owners, rows)


@triton.jit(do_not_specialize=["P"])
def _count(ids_ptr, counts_ptr, P, BLOCK: tl.constexpr):
    """Store how many of the P ids name this program's expert."""
    expert = tl.program_id(0)
    found = tl.zeros((BLOCK,), tl.int32)
    start = 0
    while start < P:
        pair = start + tl.arange(0, BLOCK)
        found += (tl.load(ids_ptr + pair, mask=pair < P, other=-1) == expert).to(tl.int32)
        start += BLOCK
    tl.store(counts_ptr + expert, tl.sum(found))


@triton.jit(do_not_specialize=["P", "blocks"])
def _place(
    ids_ptr,
    counts_ptr,
    pairs_ptr,
    experts_ptr,
    P,
    E,
    blocks,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fill the blocks of this program's expert, and its share of those that no expert needs."""
    expert = tl.program_id(0)
    every = tl.arange(0, EXPERTS)
    needed = tl.cdiv(tl.load(counts_ptr + every, mask=every < E, other=0), ROWS)
    first = tl.sum(tl.where(every < expert, needed, 0))
    own = tl.sum(tl.where(every == expert, needed, 0))

    slot = first * ROWS
    start = 0
    while start < P:
        pair = start + tl.arange(0, BLOCK)
        match = tl.load(ids_ptr + pair, mask=pair < P, other=-1) == expert
        rank = tl.cumsum(match.to(tl.int32), 0)
        tl.store(pairs_ptr + slot + rank - 1, pair, mask=match)
        slot += tl.sum(match.to(tl.int32))
        start += BLOCK

    lane = tl.arange(0, ROWS)
    tl.store(pairs_ptr + slot + lane, tl.full((ROWS,), -1, tl.int32), mask=slot + lane < (first + own) * ROWS)
    block = first
    while block < first + own:
        tl.store(experts_ptr + block, expert)
        block += 1
    # The surplus blocks are dealt out among the programs: there can be as many as there are experts.
    block = tl.sum(needed) + expert
    while block < blocks:
        tl.store(experts_ptr + block, -1)
        tl.store(pairs_ptr + block * ROWS + lane, tl.full((ROWS,), -1, tl.int32))
        block += E
