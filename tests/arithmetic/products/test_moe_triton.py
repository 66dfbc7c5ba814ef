"""The Triton kernels of a mixture of experts: routing, forward, backward. Interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels.ops import Fp8Weight, Int4Weight, prepare_fp8, prepare_int4
from k2quant.kernels.products import reference as matmul_reference
from k2quant.kernels.products.tables.configs import Config

pytest.importorskip("triton")

import triton
import triton.language as tl

from k2quant.kernels.devices.launch import launch, recorded
from k2quant.kernels.products.gpu import moe as moe_triton
from k2quant.kernels.products.gpu import moe_backward as moe_backward_triton
from k2quant.kernels.products.gpu import routing as routing_triton
from k2quant.kernels.products.gpu.routing import direct, most_blocks, plan, route

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXPERTS = 16

Weight = Int4Weight | Fp8Weight


def config(rows: int = 16, **changes: Any) -> Config:
    """Small tiles, so that small matrices have several of them."""
    return Config(**({"rows": rows, "columns": 64, "depth": 64, "group": 2, "stages": 2} | changes))


def int4(*shape: int, seed: int = 0) -> Int4Weight:
    """Random INT4 weights `[E, N, K]` of a size such that products keep the size of x."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (*shape[:-1], shape[-1] // 8), generator=generator).int()
    scale = (torch.rand(*shape[:-1], shape[-1] // 32, generator=generator) + 0.5) * 0.25 * shape[-1] ** -0.5
    return prepare_int4(words.to(DEVICE), scale.bfloat16().to(DEVICE), layout="groups")


def fp8(*shape: int, seed: int = 0, block: tuple[int, int] = (64, 32)) -> Fp8Weight:
    """Random FP8 weights `[E, N, K]` in small blocks, so that a small matrix has several scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(*shape, generator=generator).mul(64).clamp(-448, 448).to(torch.float8_e4m3fn)
    blocks = shape[0], -(-shape[1] // block[0]), -(-shape[2] // block[1])
    scale = (torch.rand(*blocks, generator=generator) + 0.5) / 64 * shape[-1] ** -0.5
    return prepare_fp8(codes.to(DEVICE), scale.to(DEVICE), block=block)


MAKERS: dict[str, Callable[..., Any]] = {"int4": int4, "fp8": fp8}


def layer(kind: str, hidden: int, inner: int, experts: int = EXPERTS) -> tuple[Weight, Weight, Weight]:
    """The gate, up and down of all experts."""
    make = MAKERS[kind]
    return (
        make(experts, inner, hidden, seed=1),
        make(experts, inner, hidden, seed=2),
        make(experts, hidden, inner, seed=3),
    )


def tokens(
    count: int, hidden: int, dtype: torch.dtype, top: int = 4, low: int = 0, high: int = EXPERTS
) -> tuple[Tensor, Tensor, Tensor]:
    """Random x, ids from low to high - 1, and the router's weights."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, hidden, generator=generator).to(dtype)
    ids = torch.randint(low, high, (count, top), generator=generator)
    return x.to(DEVICE), ids.to(DEVICE), torch.rand(count, top, generator=generator).to(DEVICE)


def blocks_of(ids: list[int], experts: int, rows: int) -> tuple[list[int], list[int]]:
    """Do `route` in plain Python."""
    pairs: list[int] = []
    owners: list[int] = []
    for expert in range(experts):
        mine = [pair for pair, chosen in enumerate(ids) if chosen == expert]
        while mine:
            owners.append(expert)
            pairs += mine[:rows] + [-1] * (rows - len(mine[:rows]))
            mine = mine[rows:]
    spare = most_blocks(len(ids), experts, rows) - len(owners)
    return pairs + [-1] * spare * rows, owners + [-1] * spare


def check_route(ids: Tensor, experts: int, rows: int) -> None:
    """Hold `route` to `blocks_of`."""
    routing = route(ids.to(DEVICE), experts, rows)
    assert routing.pairs is not None
    pairs, owners = blocks_of(ids.flatten().tolist(), experts, rows)
    assert routing.pairs.tolist() == pairs
    assert routing.experts.tolist() == owners


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Ids `[T, k]`, some of them of no expert, with E and rows."""
    experts = draw(st.integers(1, 6))
    top = draw(st.integers(1, 4))
    row = st.lists(st.integers(-2, experts + 1), min_size=top, max_size=top)
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    ids = torch.tensor(draw(st.lists(row, max_size=9)), dtype=dtype).reshape(-1, top)
    return ids, experts, draw(st.sampled_from([1, 2, 4, 8]))


@given(routings())
@settings(max_examples=40, deadline=None)
def test_each_pair_with_an_expert_has_one_slot_in_a_block_of_that_expert(case: tuple[Tensor, int, int]) -> None:
    """For any ids: each valid pair once, in order, among its own expert's; the rest of the slots and blocks is -1."""
    check_route(*case)


@pytest.mark.parametrize(
    ("ids", "experts"),
    [
        pytest.param([[2, 2, 2]] * 7, 5, id="one-expert"),
        pytest.param([[0, 4], [4, 0], [0, 4]], 5, id="empty-experts"),
        pytest.param([[1, 1, 3], [3, 1, 3]], 4, id="twice-in-a-row"),
        pytest.param([[-1, 5], [-(2**31), 2**31 - 1]], 5, id="no-expert"),
        pytest.param([[0, 0], [0, 0]], 1, id="E1"),
    ],
)
def test_unusual_ids_are_routed_like_any(ids: list[list[int]], experts: int) -> None:
    """All tokens on one expert, experts without tokens, an expert named twice by a token, and ids of no expert."""
    check_route(torch.tensor(ids), experts, 4)


def test_more_pairs_than_a_program_reads_at_once_keep_their_order() -> None:
    """2,500 pairs take three steps of 1,024 ids; slots go on where the step before left off."""
    check_route(torch.randint(-1, 4, (500, 5), generator=torch.Generator().manual_seed(0)), 3, 64)


def test_no_tokens_need_no_blocks() -> None:
    """Without pairs there is neither a block nor a launch."""
    with recorded() as launches:
        routing = route(torch.empty(0, 8, dtype=torch.int64, device=DEVICE), 384, 16)
    assert (routing.blocks, launches) == (0, [])


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_bound_on_blocks_is_reached_and_never_passed(rows: int) -> None:
    """For up to 12 pairs and 5 experts, the fullest of all distributions has exactly `most_blocks` blocks."""

    def fullest(pairs: int, experts: int) -> int:
        if experts == 1:
            return -(-pairs // rows)
        return max(-(-own // rows) + fullest(pairs - own, experts - 1) for own in range(pairs + 1))

    for pairs in range(13):
        for experts in range(1, 6):
            assert most_blocks(pairs, experts, rows) == fullest(pairs, experts)


def test_few_pairs_are_not_routed_at_all() -> None:
    """Up to one pair for four experts, a block is a pair and nothing is launched: on K2 up to 12 tokens."""
    with recorded() as launches:
        assert plan(torch.empty(12, 8, dtype=torch.int64, device=DEVICE), 384, 8).pairs is None
        assert not launches
        assert plan(torch.empty(13, 8, dtype=torch.int64, device=DEVICE), 384, 8).pairs is not None
        assert [launched.kernel.__name__ for launched in launches] == ["_count", "_place"]


def error(value: Tensor, truth: Tensor) -> float:
    """The norm of the error in units of that of the truth."""
    return float((value.double() - truth).norm() / truth.norm())


def allowed(reference_error: float) -> float:
    """The error of the reference in the same dtype, with 5 % or a few last places of float32 to spare."""
    return max(1.05 * reference_error, 5e-7)


def check_moe(kind: str, dtype: torch.dtype, count: int, rows: int, hidden: int, inner: int) -> None:
    """Hold `moe` to the error of the reference, both against float64 from the unrounded weights."""
    parts = layer(kind, hidden, inner)
    x, ids, weights = tokens(count, hidden, dtype, low=-1, high=EXPERTS + 1)
    out = moe_triton.moe(x, *parts, ids, weights, config(rows), config(rows))
    truth = matmul_reference.moe(x.double(), *parts, ids, weights)
    expected = matmul_reference.moe(x, *parts, ids, weights)
    assert out.dtype == dtype
    assert out.shape == x.shape
    assert error(out, truth) <= allowed(error(expected, truth))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kind", MAKERS)
def test_moe_is_as_exact_as_the_reference(kind: str, dtype: torch.dtype) -> None:
    """33 tokens, with ids -1 and E among theirs: an error against float64 at most 1.05 times that of plain torch."""
    check_moe(kind, dtype, count=33, rows=16, hidden=64, inner=64)


@pytest.mark.parametrize(("count", "rows"), [(1, 8), (1, 16), (2, 8), (5, 16)])
@pytest.mark.parametrize("kind", MAKERS)
def test_moe_of_a_few_tokens_and_odd_sizes(kind: str, count: int, rows: int) -> None:
    """H = 160 and I = 96 leave tiles that are partly empty; 8 rows exchange the factors of the product."""
    check_moe(kind, torch.float16, count, rows, hidden=160, inner=96)


@pytest.mark.parametrize("count", [1, 9], ids=["direct", "routed"])
def test_deep_tiles_stay_in_registers(count: int) -> None:
    """INT4 tiles of 128 columns go to the matrix units as they are unpacked: the same bits as by way of memory."""
    gate, up, down = whole(16, 128, 256), whole(16, 128, 256), whole(16, 256, 128)
    _, ids, weights = tokens(count, 1, torch.bfloat16, high=16)
    x = torch.randint(-1, 2, (count, 256), generator=torch.Generator().manual_seed(6)).to(DEVICE, torch.bfloat16)
    parts = (x, gate, up, down, ids, weights)
    deep, shallow = (moe_triton.moe(*parts, config(16, depth=depth), config(16, depth=depth)) for depth in (128, 64))
    assert torch.equal(deep, shallow)
    truth = matmul_reference.moe(x.double(), gate, up, down, ids, weights)
    assert error(deep, truth) <= allowed(error(matmul_reference.moe(*parts), truth))


def test_one_scale_for_a_whole_tile() -> None:
    """FP8 blocks as high as two tiles: a tile then has one scale, which must be that of its own block."""
    for rows in (8, 16):
        gate, up, down = (fp8(4, *shape, block=(128, 32)) for shape in ((160, 64), (160, 64), (64, 160)))
        x, ids, weights = tokens(1, 64, torch.float32, high=4)
        out = moe_triton.moe(x, gate, up, down, ids, weights, config(rows), config(rows))
        assert error(out, matmul_reference.moe(x.double(), gate, up, down, ids, weights)) < 1e-6


@pytest.mark.parametrize("kind", MAKERS)
def test_no_tokens_give_no_rows(kind: str) -> None:
    """T = 0 gives `[0, H]`, and gradients without rows."""
    parts = layer(kind, 64, 32)
    x, ids, weights = tokens(0, 64, torch.bfloat16)
    assert moe_triton.moe(x, *parts, ids, weights, config(), config()).shape == (0, 64)
    grads = moe_backward_triton.moe_backward(x, x, *parts, ids, weights, config(), config())
    assert [grad.shape for grad in grads] == [(0, 64), (0, 4)]


def test_a_single_expert_and_tokens_without_any() -> None:
    """E = 1, k = 1; a token whose id is -1 becomes zeros, whatever its weight."""
    parts = layer("int4", 64, 32, experts=1)
    x, _, _ = tokens(3, 64, torch.float32)
    ids = torch.tensor([[0], [-1], [0]], device=DEVICE, dtype=torch.int32)
    weights = torch.tensor([[1.0], [torch.nan], [0.5]], device=DEVICE)
    out = moe_triton.moe(x, *parts, ids, weights, config(), config())
    assert not out[1].any()
    truth = matmul_reference.moe(x.double(), *parts, ids, weights.nan_to_num())
    assert error(out, truth) < 1e-6


def whole(*shape: int) -> Int4Weight:
    """INT4 weights of -1, 0 and 1 times a power of two: sums of theirs with whole numbers are exact."""
    generator = torch.Generator().manual_seed(9)
    nibbles = torch.randint(7, 10, (*shape[:-1], shape[-1] // 8, 8), generator=generator)
    words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    scale = torch.tensor([0.5, 1.0, 2.0])[torch.randint(0, 3, (*shape[:-1], shape[-1] // 32), generator=generator)]
    return prepare_int4(words.to(DEVICE), scale.bfloat16().to(DEVICE), layout="groups")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("rows", [8, 16])
def test_products_and_sums_of_whole_numbers_are_exact(dtype: torch.dtype, rows: int) -> None:
    """Where nothing needs rounding, products and weighted sums have the reference's bits: no index is off."""
    gate, up, down = whole(5, 96, 64), whole(5, 96, 64), whole(5, 64, 96)
    _, ids, _ = tokens(6, 1, dtype, top=3, high=5)
    x = torch.randint(-1, 2, (6, 64), generator=torch.Generator().manual_seed(4)).to(DEVICE, dtype)
    routing = route(ids, 5, rows)
    products = moe_triton.run_gate_up(x, gate, up, ids, routing, config(rows), products=True)
    for product, part in zip(products, (gate, up), strict=True):
        rows_of = part.dequantize(dtype)[ids.flatten()]
        assert torch.equal(product, torch.einsum("pnk,pk->pn", rows_of, x.repeat_interleave(3, 0)))
    hidden = torch.randint(-1, 2, (18, 96), generator=torch.Generator().manual_seed(5)).to(DEVICE, dtype)
    pairs = moe_triton._run_down(hidden, down, routing, config(rows))  # noqa: SLF001
    assert torch.equal(pairs, torch.einsum("pnk,pk->pn", down.dequantize(dtype)[ids.flatten()], hidden))
    weights = torch.tensor([0.5, 1.0, -2.0], device=DEVICE).repeat(6, 1)
    out = moe_triton.run_combine(pairs, ids, weights, 5)
    assert torch.equal(out, (pairs.float().reshape(6, 3, 64) * weights[..., None]).sum(1).to(dtype))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("rows", [8, 16])
def test_routed_and_direct_pairs_have_equal_bits(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair's product does not depend on the pairs beside it; and computing it again changes nothing."""
    parts = layer(kind, 64, 64, experts=4)
    x, ids, weights = tokens(2, 64, torch.float16, high=5)
    outs = []
    for factor in (0, 1_000_000, 1_000_000):
        monkeypatch.setattr(routing_triton, "SPARSITY_FACTOR", factor)
        outs.append(moe_triton.moe(x, *parts, ids, weights, config(rows), config(rows)))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[1], outs[2])


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `torch.empty` and `torch.empty_like` return NaN, and integers that are no index."""

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -(2**30))

    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: poison(empty(*shape, **kind)))
    monkeypatch.setattr(torch, "empty_like", lambda *other, **kind: poison(empty_like(*other, **kind)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("count", [1, 3], ids=["direct", "routed"])
def test_nothing_is_read_that_was_not_written(count: int) -> None:
    """With workspaces full of NaN, and pairs without expert that leave theirs so, all results are finite."""
    parts = layer("int4", 64, 32)
    x, ids, weights = tokens(count, 64, torch.float32)
    ids[0, 1], ids[-1, 2] = -1, EXPERTS
    out = moe_triton.moe(x, *parts, ids, weights, config(), config())
    assert out.isfinite().all()
    for grad in moe_backward_triton.moe_backward(out, x, *parts, ids, weights, config(), config()):
        assert grad.isfinite().all()


@pytest.mark.usefixtures("poisoned")
def test_pairs_without_expert_are_not_computed() -> None:
    """Ids -1 and E read no weights, which would lie outside the stack: the rows of their pairs stay as they were."""
    gate, up, down = layer("int4", 64, 32, experts=4)
    x, _, _ = tokens(1, 64, torch.float32)
    ids = torch.tensor([[-1, 4, 2, 2**31 - 1]], device=DEVICE)
    routing = direct(ids, 8)
    hidden, _ = moe_triton.run_gate_up(x, gate, up, ids, routing, config(8), products=False)
    pairs = moe_triton._run_down(hidden, down, routing, config(8))  # noqa: SLF001
    back = moe_backward_triton._run_back([x], [down], ids, routing, config(8), torch.float32)  # noqa: SLF001
    for rows in (hidden, pairs, back):
        assert rows.isnan().all(1).tolist() == [True, True, False, True]
        assert rows[2].isfinite().all()


def gradients(
    x: Tensor, parts: tuple[Weight, Weight, Weight], ids: Tensor, weights: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """What autograd makes of the reference in float64."""
    inputs = x.double().requires_grad_(), weights.double().requires_grad_()
    out = matmul_reference.moe(inputs[0], *parts, ids, inputs[1])
    return torch.autograd.grad(out, inputs, grad.double())


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 16e-3)],
    ids=["fp32", "fp16", "bf16"],
)
@pytest.mark.parametrize("kind", MAKERS)
def test_gradients_are_those_of_the_reference(kind: str, dtype: torch.dtype, bound: float) -> None:
    """Gradients for x and for the router's weights are within the dtype's error of autograd; 0 for no expert."""
    parts = layer(kind, 96, 64, experts=4)
    x, ids, weights = tokens(5, 96, dtype, top=3, low=-1, high=5)
    weights = weights.to(dtype)
    grad = torch.randn(5, 96, generator=torch.Generator().manual_seed(7)).to(DEVICE, dtype)
    found = moe_backward_triton.moe_backward(grad, x, *parts, ids, weights, config(), config())
    for value, truth, like in zip(found, gradients(x, parts, ids, weights, grad), (x, weights), strict=True):
        assert value.dtype == like.dtype
        assert error(value, truth) < bound
    assert not found[1][(ids < 0) | (ids >= 4)].any()


@pytest.mark.parametrize("kind", MAKERS)
def test_gradients_of_direct_pairs(kind: str) -> None:
    """One token, whose pairs are not routed, with 8 rows."""
    parts = layer(kind, 64, 32)
    x, ids, weights = tokens(1, 64, torch.float32)
    found = moe_backward_triton.moe_backward(x, x, *parts, ids, weights, config(8), config(8))
    for value, truth in zip(found, gradients(x, parts, ids, weights, x), strict=True):
        assert error(value, truth) < 1e-6


def meta(kind: str, experts: int, rows: int, columns: int) -> Weight:
    """Weights with a shape and nothing else."""
    if kind == "fp8":
        codes = torch.empty(experts, rows, columns, dtype=torch.float8_e4m3fn, device="meta")
        return Fp8Weight(codes, torch.empty(experts, -(-rows // 128), -(-columns // 128), device="meta"), (128, 128))
    codes = torch.empty(experts, columns // 32, rows, 4, dtype=torch.int32, device="meta")
    return Int4Weight(codes, torch.empty(experts, columns // 32, rows, dtype=torch.bfloat16, device="meta"), "groups")


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_launched_follows_from_shapes_alone(kind: str) -> None:
    """Tensors without data suffice to launch everything, K2's size, forward and backward: the host never waits."""
    parts = meta(kind, 384, 2048, 7168), meta(kind, 384, 2048, 7168), meta(kind, 384, 7168, 2048)
    tile = Config(rows=16)
    for count, forward in ((1, 3), (16, 5)):
        x = torch.empty(count, 7168, dtype=torch.bfloat16, device="meta")
        ids = torch.empty(count, 8, dtype=torch.int64, device="meta")
        weights = torch.empty(count, 8, device="meta")
        with recorded() as launches:
            moe_triton.moe(x, *parts, ids, weights, tile, tile)
        assert len(launches) == forward
        assert launches[-3].grid == (8 * count * (2048 // tile.columns),)
        with recorded() as launches:
            moe_backward_triton.moe_backward(x, x, *parts, ids, weights, tile, tile)
        assert len(launches) == forward + 2


def test_configs_that_do_not_fit_are_refused() -> None:
    """Gate and down share their blocks of rows; INT4 must lie in the layout that the kernels read."""
    parts = layer("int4", 64, 32, experts=1)
    x, ids, weights = tokens(1, 64, torch.float32)
    with pytest.raises(UsageError, match="found 8 rows for gate and up, 16 for down"):
        moe_triton.moe(x, *parts, ids, weights, config(8), config(16))
    gate, up, down = (prepare_int4(*part.checkpoint(), layout="rows") for part in parts)
    with pytest.raises(UsageError, match="expected an INT4 weight in the layout groups, found rows"):
        moe_triton.moe(x, gate, up, down, ids, weights, config(), config())


@triton.jit  # type: ignore[untyped-decorator]
def _places(
    out_ptr: Any, expert: Any, rows: tl.constexpr, columns: tl.constexpr, kind: tl.constexpr, block: tl.constexpr
) -> None:
    """Store where an expert's codes and scales begin, counted from 0."""
    zero = tl.program_id(0).to(tl.int64)
    codes, scale = moe_triton.of_expert(zero, zero, zero + expert, rows, columns, kind, block, block)
    tl.store(out_ptr, codes)
    tl.store(out_ptr + 1, scale)


def test_places_of_the_last_expert_do_not_wrap_around() -> None:
    """Expert 383 of K2 begins at code 5.6e9, word 7.0e8 and scale 1.8e8; one of 3,840, at words beyond 2^31 too."""
    out = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for experts in (384, 3840):
        launch(_places, (1,), out, experts - 1, rows=2048, columns=7168, kind="fp8", block=128)
        assert out.tolist() == [(experts - 1) * 2048 * 7168, (experts - 1) * 16 * 56]
        launch(_places, (1,), out, experts - 1, rows=2048, columns=7168, kind="int4", block=32)
        assert out.tolist() == [(experts - 1) * 2048 * 896, (experts - 1) * 2048 * 224]


def last_of(experts: int, part: Weight) -> Weight:
    """A stack of zeros whose last expert is the first of `part`."""
    codes = part.codes.new_zeros(experts, *part.codes.shape[1:])
    scale = part.scale.new_zeros(experts, *part.scale.shape[1:])
    codes[-1], scale[-1] = part.codes[0], part.scale[0]
    if isinstance(part, Int4Weight):
        return Int4Weight(codes, scale, part.layout)
    return Fp8Weight(codes, scale, part.block)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_last_of_some_experts_reads_its_own_weights(kind: str) -> None:
    """Expert 2 of three gives the bits that it gives in a stack of its own; the others are zeros."""
    own = layer(kind, 64, 32, experts=1)
    gate, up, down = (last_of(3, part) for part in own)
    x, _, weights = tokens(2, 64, torch.float32)
    ids = torch.full((2, 4), 2, device=DEVICE)
    out = moe_triton.moe(x, gate, up, down, ids, weights, config(), config())
    assert torch.equal(out, moe_triton.moe(x, *own, ids * 0, weights, config(), config()))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("kind", MAKERS)
def test_the_last_expert_of_k2_reads_its_own_weights(kind: str) -> None:
    """Expert 383 of a stack of K2's size, 5.6e9 codes each, gives the bits that it gives in a stack of its own."""
    hidden, inner, experts = 7168, 2048, 384
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free memory on the GPU")
    own = layer(kind, hidden, inner, experts=1)
    gate, up, down = (last_of(experts, part) for part in own)
    x, _, weights = tokens(40, hidden, torch.bfloat16)
    ids = torch.full((40, 4), experts - 1, device=DEVICE)
    tile = Config(rows=16)
    out = moe_triton.moe(x, gate, up, down, ids, weights, tile, tile)
    assert out.any()
    assert torch.equal(out, moe_triton.moe(x, *own, ids * 0, weights, tile, tile))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("count", [1, 33], ids=["direct", "routed"])
def test_a_captured_graph_follows_other_ids(count: int) -> None:
    """A CUDA graph captured with some ids gives, replayed with others, what a fresh call gives."""
    parts = layer("int4", 128, 64)
    x, ids, weights = tokens(count, 128, torch.bfloat16)
    moe_triton.moe(x, *parts, ids, weights, config(), config())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe_triton.moe(x, *parts, ids, weights, config(), config())
    for shift in range(3):
        ids.copy_((ids + shift) % (EXPERTS + 1) - (shift == 2))
        graph.replay()
        assert torch.equal(out, moe_triton.moe(x, *parts, ids, weights, config(), config()))


def test_direct_takes_ids_as_they_are() -> None:
    """The ids themselves are the experts of the blocks, in the order of the pairs."""
    ids = torch.tensor([[3, -1], [0, 3]], device=DEVICE)
    routing = direct(ids, 8)
    assert (routing.pairs, routing.experts.tolist(), routing.blocks) == (None, [3, -1, 0, 3], 4)
