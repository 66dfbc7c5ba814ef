"""Which backend is taken, and that the whole way from operator to Triton kernel gives the right numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels.codecs.reference import pack_int4
from k2quant.kernels.ops import (
    Fp8Weight,
    Int4Weight,
    fp8_linear,
    fp8_linear_w8a8,
    int4_linear,
    moe_fp8,
    moe_int4,
    prepare_fp8,
    prepare_int4,
)
from k2quant.kernels.products import dispatch
from k2quant.kernels.products import reference as matmul_reference
from k2quant.kernels.products.tables.configs import BUCKETS, TABLES, Config, Table, read_table

pytest.importorskip("triton")


@pytest.fixture(params=["sm_80", "sm_90"])
def like_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send CPU tensors to the Triton kernels, which are interpreted, with the configurations of a GPU."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU, test_on_gpu.py goes the same way for real")
    table = read_table(TABLES / f"{request.param}.json")
    monkeypatch.setattr(dispatch, "on_triton", lambda _: True)
    monkeypatch.setattr(dispatch, "table_of", lambda _: table)
    monkeypatch.setattr(dispatch, "_capability", lambda _: (9, 0))


def int4(*shape: int, seed: int = 0) -> Int4Weight:
    """Return random INT4 weights in a GPU's layout."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(*shape[:-1], shape[-1] // 32, generator=generator) * 0.01 + 0.001
    codes = torch.randint(-8, 8, shape, generator=generator)
    return prepare_int4(pack_int4(codes), scale.bfloat16(), layout="groups")


def fp8(*shape: int, seed: int = 0) -> Fp8Weight:
    """Return random FP8 weights."""
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.randn(shape, generator=generator) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    return prepare_fp8(codes, torch.rand(blocks, generator=generator) * 1e-3 + 1e-4)


def close(found: Tensor, expected: Tensor, roundings: int = 1) -> bool:
    """Return whether two results differ by no more than so many roundings of their dtype."""
    bound = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-20}[found.dtype]
    return bool((found.double() - expected.double()).norm() <= roundings * bound * expected.double().norm())


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 17, 70, 2100])
def test_linear_of_every_bucket(rows: int, dtype: torch.dtype) -> None:
    """Tiles of each height, dequantised weights beyond, and float32: products and gradients are the reference's."""
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    four, eight = int4(72, 96), fp8(72, 96)
    for weight, out in ((four, int4_linear(x, four)), (eight, fp8_linear(x, eight))):
        assert close(out, matmul_reference.linear(x, weight))
        (found,) = torch.autograd.grad(out.sum(), x)
        assert close(found, matmul_reference.linear_backward(torch.ones_like(out), weight))


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_w8a8(rows: int) -> None:
    """FP8 times FP8."""
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert close(fp8_linear_w8a8(x, fp8(72, 256)), matmul_reference.fp8_linear_w8a8(x, fp8(72, 256)))


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_experts(tokens: int, dtype: torch.dtype) -> None:
    """A layer of experts, few tokens and more, forward and backward, in both formats."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, 64, generator=generator).to(dtype).requires_grad_()
    ids = torch.randint(-1, 5, (tokens, 2), generator=generator)
    weights = torch.rand(tokens, 2, generator=generator).requires_grad_()
    shapes = ((4, 96, 64), (4, 96, 64), (4, 64, 96))
    four, eight = [int4(*shape) for shape in shapes], [fp8(*shape) for shape in shapes]
    reference: Callable[..., Tensor] = matmul_reference.moe
    gradients: Callable[..., tuple[Tensor, Tensor]] = matmul_reference.moe_backward
    cases: tuple[tuple[Any, Callable[..., Tensor]], ...] = ((four, moe_int4), (eight, moe_fp8))
    for parts, op in cases:
        out = op(x, *parts, ids, weights)
        expected = reference(x.detach(), *parts, ids, weights.detach())
        assert close(out, expected)
        found = torch.autograd.grad(out.sum(), (x, weights), retain_graph=True)
        truth = gradients(torch.ones_like(out), x.detach(), *parts, ids, weights.detach())
        assert all(close(one.to(dtype), two.to(dtype), roundings=4) for one, two in zip(found, truth, strict=True))


@pytest.mark.usefixtures("like_a_gpu")
def test_another_layout_is_refused() -> None:
    """A weight in the checkpoint's own layout is no weight for a GPU's kernels."""
    weight = prepare_int4(torch.zeros(64, 12).int(), torch.ones(64, 3).bfloat16(), layout="rows")
    with pytest.raises(UsageError, match="expected an INT4 weight in the layout groups, found rows"):
        int4_linear(torch.ones(2, 96).bfloat16(), weight)


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("tokens", [1, 3, 100, 700, 2048, 9999])
def test_both_products_of_experts_have_equal_rows(path: Path, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a table says, the two products of a layer cut the tokens of an expert alike."""
    monkeypatch.setattr(dispatch, "table_of", lambda _: read_table(path))
    x, ids = torch.empty(tokens, 64).bfloat16(), torch.empty(tokens, 2).int()
    inward, outward = dispatch._moe_configs(x, int4(8, 96, 64), int4(8, 64, 96), ids)  # noqa: SLF001
    assert inward.rows == outward.rows


@pytest.mark.parametrize(
    ("experts", "top", "tokens", "bucket"),
    [
        (384, 8, 256, 256),  # Kimi K2 itself
        (384, 8, 257, 512),
        (256, 8, 170, 256),  # DeepSeek-V3: 5.3 rows an expert are 255 of K2's tokens
        (256, 8, 171, 512),  # 256.5 tokens, rounded up
        (8, 2, 5, 64),  # 1.25 rows an expert are 60 of K2's tokens
        (8, 2, 6, 128),
    ],
)
def test_experts_are_looked_up_by_rows_an_expert(
    experts: int, top: int, tokens: int, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables speak of K2's tokens: any layer of experts counts as one of K2's with as many rows an expert."""
    by_bucket = {"*": {size: Config(columns=size) for size in BUCKETS}}  # each tells its name
    table = Table("any", None, {"gate_up/int4": by_bucket, "down/int4": by_bucket})
    monkeypatch.setattr(dispatch, "table_of", lambda _: table)
    x, ids = torch.empty(tokens, 32).bfloat16(), torch.zeros(tokens, top).int()
    chosen = dispatch._moe_configs(x, int4(experts, 32, 32), int4(experts, 32, 32), ids)  # noqa: SLF001
    assert [config.columns for config in chosen] == [bucket, bucket]
