"""Products to check: odd shapes and real ones, few rows and many; what they should give in float64, and usually give.

x, gradients and the router's weights lie in the middle of tensors of NaN: whatever reads beside them is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import silu

from k2quant.ground.release import EXPERTS, HIDDEN, INNER, TOP
from k2quant.kernels.ops import (
    Fp8Weight,
    PackedWeight,
    fp8_linear,
    fp8_linear_w8a8,
    int4_linear,
    linear,
    moe,
    moe_fp8,
    moe_int4,
)
from k2quant.kernels.products import reference
from k2quant.kernels.tuning.choosing import random_weight

Tensors = dict[str, Tensor]

MARGIN = 4096
"""Bytes of NaN on either side of an input."""
FEW = 16
"""Experts that the tokens of a large layer use, the last among them: the truth is made in float64 for these only."""

DRY_LEFT_OUT = ("linear, MXFP4", "moe, MXFP4")
"""What a dry run leaves out, for it takes the way of NVFP4, and the interpreter its time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Which shapes and numbers of rows."""

    shapes: tuple[tuple[int, int], ...] = ((200, 96), (576, 7168), (2048, 7168), (7168, 2048), (18432, 7168))
    """N and K: odd ones, kv_a, an expert's, the dense layer's."""
    rows: tuple[int, ...] = (1, 3, 16, 33, 64, 200, 1000)
    many: int = 4096
    """Rows that are tried after everything else."""
    layers: tuple[tuple[int, int, int], ...] = ((16, 96, 160), (EXPERTS, INNER, HIDDEN))
    """Experts, inner and hidden width."""
    tokens: tuple[int, ...] = (1, 9, 64, 500)
    left_out: tuple[str, ...] = ()
    """Products that are not made."""

    @classmethod
    def tiny(cls) -> Sizes:
        """Return those of a dry run."""
        return cls(
            shapes=((72, 96),), rows=(1, 17), many=33, layers=((16, 32, 64),), tokens=(1, 9), left_out=DRY_LEFT_OUT
        )


class Problem(Protocol):
    """One product with its inputs."""

    @property
    def name(self) -> str:
        """Name it."""

    @property
    def small(self) -> bool:
        """Whether it is one of those that are also compiled and captured."""

    @property
    def late(self) -> bool:
        """Whether it has its turn after everything else: it takes long."""

    @property
    def unrounded(self) -> bool:
        """Whether it multiplies weights unrounded that `usual` rounds to BF16, so that their errors are independent."""

    @property
    def inputs(self) -> Sequence[Tensor]:
        """What `bound()` takes."""

    def bound(self) -> Callable[..., Tensor]:
        """Return the operator with its weights; it takes the inputs."""

    def others(self) -> Sequence[Tensor]:
        """Return other inputs of the same shapes."""

    def results(self) -> Tensors:
        """Return result and gradients by the operator."""

    def exact(self) -> Tensors:
        """Return them in float64, nothing rounded but what the product is defined to round."""

    def usual(self) -> Tensors:
        """Return them by dequantising and multiplying, in the operator's dtypes."""


def problems(device: torch.device, sizes: Sizes) -> list[Problem]:
    """Return all problems, small shapes first; what is random is the same in every run."""
    found: list[Problem] = []
    for number, shape in enumerate(sizes.shapes):
        for product in _made(LINEAR, sizes):
            found += [
                Linear(product, shape, rows, device, small=number == 0 and rows == max(sizes.rows[:2]))
                for rows in sizes.rows
            ]
    for number, layer in enumerate(sizes.layers):
        for product in _made(MOE, sizes):
            found += [
                Experts(product, layer, tokens, device, small=number == 0 and tokens == sizes.tokens[1])
                for tokens in sizes.tokens
            ]
    for shape in sizes.shapes:
        late = _made(LINEAR, sizes)
        found += [Linear(product, shape, sizes.many, device, small=False, late=True) for product in late]
    return found


def _made(products: Iterable[str], sizes: Sizes) -> list[str]:
    return [product for product in products if product not in sizes.left_out]


def surrounded(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor within a larger one of NaN, aligned as torch aligns its own."""
    margin = MARGIN // tensor.element_size()
    whole = torch.full((tensor.numel() + 2 * margin,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    inside = whole[margin : margin + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return inside


LINEAR: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "int4_linear": ("int4", int4_linear),
    "fp8_linear": ("fp8", fp8_linear),
    "fp8_linear_w8a8": ("fp8", fp8_linear_w8a8),
    "linear, NVFP4": ("nvfp4", linear),
    "linear, MXFP4": ("mxfp4", linear),
}
"""The format of the weight, and the operator."""

MOE: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "moe_int4": ("int4", moe_int4),
    "moe_fp8": ("fp8", moe_fp8),
    "moe, NVFP4": ("nvfp4", moe),
    "moe, MXFP4": ("mxfp4", moe),
}

UNROUNDED = ("fp8_linear", "moe_fp8", "linear, NVFP4", "moe, NVFP4")
"""Products that scale sums instead of weights."""


class Linear:
    """x times one weight, and the gradient of x."""

    def __init__(
        self, product: str, shape: tuple[int, int], rows: int, device: torch.device, *, small: bool, late: bool = False
    ) -> None:
        self.late = late
        self.name, self.small = f"{product} {shape[0]}x{shape[1]}, M={rows}", small
        self.product, self.shape, self.rows, self.device = product, shape, rows, device
        self.format, self.operator = LINEAR[product]
        self.unrounded = product in UNROUNDED

    @property
    def weight(self) -> PackedWeight:
        """The weight."""
        (weight,) = _weights(self.format, (self.shape,), self.device)
        return weight

    @property
    def inputs(self) -> list[Tensor]:
        """The rows of x."""
        return [_normal((self.rows, self.shape[1]), self.device, seed=1)]

    @property
    def grad(self) -> Tensor:
        """The gradient of the result."""
        return _normal((self.rows, self.shape[0]), self.device, seed=2)

    def bound(self) -> Callable[..., Tensor]:
        """Return the operator with its weight."""
        operator, weight = self.operator, self.weight
        return lambda x: operator(x, weight)

    def others(self) -> list[Tensor]:
        """Return another x."""
        return [_normal((self.rows, self.shape[1]), self.device, seed=3)]

    def results(self) -> Tensors:
        """Return y and the gradient of x."""
        x = surrounded(self.inputs[0]).requires_grad_()
        out = self.operator(x, self.weight)
        (grad,) = torch.autograd.grad(out, x, surrounded(self.grad))
        return {"y": out.detach(), "grad x": grad}

    def exact(self) -> Tensors:
        """Return them in float64; where the product rounds x to FP8, of x so rounded."""
        weight, x = exact_of(self.weight), self.inputs[0]
        if self.product == "fp8_linear_w8a8":
            codes, scale = reference.fp8_quantize_activations(x)
            wide = codes.double() * scale.double().repeat_interleave(128, 1)[:, : x.shape[1]]
        else:
            wide = x.double()
        return {"y": wide @ weight.T, "grad x": self.grad.double() @ weight}

    def usual(self) -> Tensors:
        """Return them by plain torch."""
        weight, x = self.weight, self.inputs[0]
        forward = reference.fp8_linear_w8a8 if self.product == "fp8_linear_w8a8" else reference.linear
        return {"y": forward(x, cast("Fp8Weight", weight)), "grad x": reference.linear_backward(self.grad, weight)}


class Experts:
    """Tokens through a layer of experts, some of them to none, and the gradients of x and of the router's weights."""

    def __init__(
        self, product: str, layer: tuple[int, int, int], tokens: int, device: torch.device, *, small: bool
    ) -> None:
        experts, inner, hidden = layer
        self.late = False
        self.name, self.small = f"{product} {experts} experts {inner}x{hidden}, {tokens} tokens", small
        self.layer, self.tokens, self.device = layer, tokens, device
        self.format, self.operator = MOE[product]
        self.unrounded = product in UNROUNDED

    @property
    def parts(self) -> tuple[PackedWeight, ...]:
        """Gate, up and down."""
        experts, inner, hidden = self.layer
        shapes = ((experts, inner, hidden), (experts, inner, hidden), (experts, hidden, inner))
        return _weights(self.format, shapes, self.device)

    @property
    def inputs(self) -> list[Tensor]:
        """x, the experts' ids and the router's weights."""
        return self._given(seed=1)

    @property
    def grad(self) -> Tensor:
        """The gradient of the result."""
        return _normal((self.tokens, self.layer[2]), self.device, seed=2)

    def bound(self) -> Callable[..., Tensor]:
        """Return the operator with its weights."""
        operator, parts = self.operator, self.parts
        return lambda x, ids, weights: operator(x, *parts, ids, weights)

    def others(self) -> list[Tensor]:
        """Return other tokens that other experts get."""
        return self._given(seed=3)

    def results(self) -> Tensors:
        """Return y and both gradients."""
        x, ids, weights = self.inputs
        x, weights = surrounded(x).requires_grad_(), surrounded(weights).requires_grad_()
        out = self.operator(x, *self.parts, ids, weights)
        grads = torch.autograd.grad(out, (x, weights), surrounded(self.grad))
        return {"y": out.detach(), "grad x": grads[0], "grad weights": grads[1]}

    def exact(self) -> Tensors:
        """Return them in float64, one expert at a time."""
        x, ids, weights = self.inputs
        wide, shares, grad = x.double(), weights.double(), self.grad.double()
        out, grad_x, grad_weights = torch.zeros_like(wide), torch.zeros_like(wide), torch.zeros_like(shares)
        parts = self.parts
        for expert in ids[ids >= 0].unique().tolist():
            token, slot = torch.where(ids == expert)
            gate, up, down = (exact_of(part.expert(expert)) for part in parts)
            one, share = wide[token].requires_grad_(), shares[token, slot].requires_grad_()
            y = (silu(one @ gate.T) * (one @ up.T)) @ down.T * share[:, None]
            found = torch.autograd.grad(y, (one, share), grad[token])
            out.index_add_(0, token, y.detach())
            grad_x.index_add_(0, token, found[0])
            grad_weights[token, slot] = found[1]
        return {"y": out, "grad x": grad_x, "grad weights": grad_weights}

    def usual(self) -> Tensors:
        """Return them by plain torch."""
        x, ids, weights = self.inputs
        given: Any = x, *self.parts, ids, weights
        grad_x, grad_weights = reference.moe_backward(self.grad, *given)
        return {"y": reference.moe(*given), "grad x": grad_x, "grad weights": grad_weights}

    def _given(self, *, seed: int) -> list[Tensor]:
        experts, top = self.layer[0], min(TOP, self.layer[0] // 2)
        random = torch.Generator().manual_seed(seed)
        few = torch.cat([torch.randperm(experts - 1, generator=random)[: FEW - 1], torch.tensor([experts - 1])])
        places = torch.rand(self.tokens, len(few), generator=random).topk(top).indices
        ids = few[places]
        if self.tokens > 1:
            ids[torch.rand(ids.shape, generator=random) < 0.1] = -1  # no expert
        weights = torch.rand(ids.shape, generator=random)
        x = _normal((self.tokens, self.layer[2]), self.device, seed=seed)
        return [x, ids.to(self.device), weights.to(self.device)]


@lru_cache(maxsize=1)
def _weights(weight_format: str, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[PackedWeight, ...]:
    """Return random weights; those of one problem lie in memory at a time, and problems with equal ones follow."""
    torch.manual_seed(len(shapes))
    return tuple(random_weight(weight_format, *shape, device=device) for shape in shapes)


def exact_of(weight: PackedWeight) -> Tensor:
    """Return float64 weights with unrounded code * scale."""
    return weight.dequantize(torch.float64)


def _normal(shape: tuple[int, ...], device: torch.device, *, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).bfloat16()
