"""A format is one class: 8-bit integers with a scale for each row, as docs/kernels.md has them, run on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import pytest
import torch
from torch import Tensor

from k2quant.kernels.ops import linear, moe, warmup
from k2quant.kernels.products import dispatch, reference
from k2quant.kernels.products.packed.weight import Layout, PackedWeight, check_parts, check_scale
from k2quant.kernels.products.prepare import PACKED, moved
from k2quant.kernels.products.tables.configs import Product


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """int8 codes `[.., N, K]` with float32 scales `[.., N]`."""

    codes: Tensor
    scale: Tensor

    format: ClassVar[str] = "int8"
    layout: ClassVar[Layout] = "rows"
    layouts: ClassVar[tuple[Layout, ...]] = ("rows",)
    gpu_layout: ClassVar[Layout] = "rows"
    products: ClassVar[tuple[Product, ...]] = ("linear", "gate_up", "down")
    tile_in_block: ClassVar[bool] = True
    tile_bytes: ClassVar[float] = 1.0
    views: ClassVar[bool] = True
    numbers: ClassVar[tuple[int, ...]] = ()
    whole: ClassVar[None] = None

    @property
    def block(self) -> tuple[int, int]:
        """See `PackedWeight`."""
        return 1, self.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """See `PackedWeight`."""
        return tuple(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """See `PackedWeight`."""
        return self.codes.nbytes + self.scale.nbytes

    @property
    def bits(self) -> Tensor:
        """See `PackedWeight`."""
        return self.codes

    @classmethod
    def of(
        cls,
        bits: Tensor,
        scale: Tensor,
        layout: Layout,  # noqa: ARG003
        numbers: tuple[int, ...],  # noqa: ARG003
        whole: Tensor | None = None,  # noqa: ARG003
    ) -> Self:
        """See `PackedWeight`."""
        return cls(bits, scale)

    @classmethod
    def laid_out(
        cls,
        codes: Tensor,
        scale: Tensor,
        layout: Layout = "rows",  # noqa: ARG003
        numbers: tuple[int, ...] = (),  # noqa: ARG003
        whole: Tensor | None = None,  # noqa: ARG003
    ) -> Self:
        """See `PackedWeight`."""
        check_scale(scale, "scale")
        weight = cls(codes.contiguous(), scale.contiguous())
        weight.check()
        return weight

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        layout: Layout = "rows",  # noqa: ARG003
        numbers: tuple[int, ...] = (),  # noqa: ARG003
        *,
        device: torch.device | str,
    ) -> Self:
        """See `PackedWeight`."""
        return cls(torch.empty(shape, dtype=torch.int8, device=device), torch.empty(shape[:-1], device=device))

    def check(self) -> None:
        """See `PackedWeight`."""
        check_parts(self.codes, self.scale, (torch.int8, torch.float32), self.shape[:-1])

    def checkpoint(self) -> tuple[Tensor, Tensor]:
        """See `PackedWeight`."""
        return self.codes, self.scale

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """See `PackedWeight`."""
        return (self.codes.float() * self.scale[..., None]).to(dtype)

    def expert(self, number: int) -> Self:
        """See `PackedWeight`."""
        return self.holding(self.codes[number], self.scale[number])

    def rows(self, first: int, last: int) -> Self:
        """See `PackedWeight`."""
        return self.holding(self.codes[..., first:last, :], self.scale[..., first:last])

    def holding(self, codes: Tensor, scale: Tensor, whole: Tensor | None = None) -> Self:  # noqa: ARG002
        """See `PackedWeight`."""
        return type(self)(codes, scale)

    def prepared(self, codes: Tensor, scale: Tensor, whole: Tensor | None = None) -> Self:  # noqa: ARG002
        """See `PackedWeight`."""
        return self.laid_out(codes, scale)

    def empty_like(self, device: torch.device | str) -> Self:
        """See `PackedWeight`."""
        return self.empty(self.shape, device=device)


def int8(*shape: int) -> Int8Weight:
    """Return a random weight."""
    codes = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    return Int8Weight.laid_out(codes, torch.rand(shape[:-1], generator=torch.Generator().manual_seed(1)) * 1e-3)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter the format into the table of formats, which is all that it takes."""
    monkeypatch.setitem(PACKED, "int8", Int8Weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_of_a_new_format(dtype: torch.dtype) -> None:
    """Products, gradients, a layer of experts and warming up are those of its dequantised weights."""
    weight: PackedWeight = int8(600, 96)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    out = linear(x, weight)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.allclose(out, reference.linear(x, weight), rtol=2**-6, atol=2**-8)
    assert torch.allclose(grad, reference.linear_backward(torch.ones_like(out), weight), rtol=2**-6, atol=2**-6)
    assert torch.equal(dispatch.dequantize(weight, dtype), weight.dequantize(dtype))
    gate, up, down = int8(4, 64, 96), int8(4, 64, 96), int8(4, 96, 64)
    ids, weights = torch.tensor([[0, 3]] * 5), torch.rand(5, 2).requires_grad_()
    routed = moe(x, gate, up, down, ids, weights)
    assert torch.allclose(routed, reference.moe(x, gate, up, down, ids, weights), rtol=2**-5, atol=2**-7)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(routed.sum(), (x, weights)))
    assert warmup([weight], [(gate, up, down)], top=2, rows=1) == 2
    assert moved(weight, torch.device("meta")).codes.is_meta


def test_a_new_format_compiles() -> None:
    """Under torch.compile its products are one graph, with the bits of eager ones."""
    weight = int8(64, 96)
    compiled = torch.compile(lambda x: linear(x, weight), backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (1, 3):
        x = torch.randn(rows, 96)
        assert torch.equal(compiled(x), linear(x, weight))
