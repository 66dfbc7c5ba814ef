"""The modules of a loaded model whose weights are quantised, or whose checkpoint names differ from their own.

`state_dict` and `load_state_dict` speak the checkpoint's names: `experts.17.up_proj.weight_packed`, not a fused tensor.
The tensors that `state_dict` gives are views wherever memory has the checkpoint's layout (see `matrices`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from k2quant.errors import UsageError
from k2quant.formats.format import Format
from k2quant.kernels.ops import linear, moe
from k2quant.kernels.products import reference
from k2quant.kernels.products.dispatch import dequantize
from k2quant.kernels.products.packed.weight import PackedWeight
from k2quant.kernels.products.prepare import moved
from k2quant.model.matrices import Dense, Matrix, Packed, joined

Backend = Literal["auto", "reference", "decoded"]
"""Who multiplies.

`auto`: the fused kernels of the device; `reference`: plain torch, the truth that they are held to; `decoded`: plain
torch on the BF16 values that a weight means, so that weights of equal values give equal bits, whatever their formats.
"""

_ALIGNMENT = 64
"""Bytes: with operands that begin elsewhere, MKL may sum in another order (its notes on reproducible results)."""

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class SpeaksCheckpoint(nn.Module, ABC):
    """A module whose state is named as a checkpoint names it."""

    @abstractmethod
    def matrices(self) -> Iterator[tuple[str, Matrix]]:
        """Yield the module's weights, each with its name below the module's own."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:  # noqa: FBT001  torch's signature
        for name, matrix in self.matrices():
            for suffix, tensor in matrix.parts().items():
                destination[f"{prefix}{joined(name, suffix)}"] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Any,  # noqa: ARG002  torch's signature
        strict: bool,  # noqa: FBT001  torch's signature
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known: set[str] = set()
        for name, matrix in self.matrices():
            names = {suffix: f"{prefix}{joined(name, suffix)}" for suffix in matrix.parts()}
            known.update(names.values())
            missing = [full for full in names.values() if full not in state_dict]
            missing_keys += missing
            if not missing:
                try:
                    matrix.put({suffix: state_dict[full] for suffix, full in names.items()})
                except UsageError as error:
                    error_msgs.append(f"{joined(prefix.removesuffix('.'), name)}: {error}")
        if strict:
            below = tuple(f"{prefix}{child}." for child in self._modules)  # what was put beside the weights
            unexpected_keys += [
                name
                for name in state_dict
                if name.startswith(prefix) and name not in known and not name.startswith(below)
            ]


class Quantized(SpeaksCheckpoint):
    """A module that holds quantised weights: for each, buffers of its codes and its scales.

    `to`, `half` and their like move them, with the layout that suits the new device, and never change their dtype.
    """

    def __init__(self, weights: Mapping[str, PackedWeight], format: Format, backend: Backend) -> None:
        super().__init__()
        self.format, self.backend = format, backend
        self._like: dict[str, PackedWeight] = {}
        for name, weight in weights.items():
            self._hold(name, weight)

    def _hold(self, name: str, weight: PackedWeight) -> None:
        self.register_buffer(f"{name}_codes", weight.codes)
        self.register_buffer(f"{name}_scale", weight.scale)
        if weight.whole is not None:
            self.register_buffer(f"{name}_whole", weight.whole)
        self._like[name] = weight.empty_like("meta")

    def packed(self, name: str) -> PackedWeight:
        """Return one of the weights, as the kernels take it."""
        codes, scale = getattr(self, f"{name}_codes"), getattr(self, f"{name}_scale")
        return self._like[name].holding(codes, scale, getattr(self, f"{name}_whole", None))

    def replace(self, change: Callable[[PackedWeight], PackedWeight]) -> None:
        """Put another weight in the place of each."""
        changed = {name: change(self.packed(name)) for name in self._like}  # all, before the layout changes
        for name, weight in changed.items():
            self._hold(name, weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:  # noqa: FBT001, FBT002  torch's
        before = self.packed(next(iter(self._like))).codes.device
        after = fn(torch.empty(0, dtype=torch.uint8, device=before)).device
        if after != before:
            self.replace(lambda weight: moved(weight, after))
        held, self._buffers = self._buffers, {}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers = held
        return self


def decoded_linear(x: Tensor, weight: PackedWeight | Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by the values that a weight means, as torch multiplies by a BF16 weight of these values.

    Args:
        x: `[.., K]`.
        weight: `[N, K]`, packed, or the values themselves in the dtype of x.
        bias: `[N]`, or None.

    Returns:
        x @ weight.T + bias, `[.., N]`, each code * scale rounded to BF16 first, as `convert --to bf16` writes it.
    """
    values = weight if isinstance(weight, Tensor) else dequantize(weight, torch.bfloat16).to(x.dtype)
    if values.data_ptr() % _ALIGNMENT:
        values = values.clone()
    return functional.linear(x, values, bias)


class QuantizedLinear(Quantized):
    """x @ weight.T for a quantised weight, with a bias where the checkpoint has one."""

    def __init__(
        self, weight: PackedWeight, format: Format, backend: Backend, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__({"weight": weight}, format, backend)
        self.bias = bias

    def matrices(self) -> Iterator[tuple[str, Matrix]]:
        """Yield the weight and the bias."""
        yield "", Packed(self.packed("weight"), self.format)
        if self.bias is not None:
            yield "", Dense(self.bias, "bias")

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias, `[.., N]`, for x `[.., K]`."""
        if self.backend == "decoded":
            return decoded_linear(x, self.packed("weight"), self.bias)  # torch adds a bias within the product
        multiply = reference.linear if self.backend == "reference" else linear
        product = multiply(x, self.packed("weight"))
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        rows, columns = self.packed("weight").shape
        return f"in_features={columns}, out_features={rows}, format={self.format.name}"


class Experts(nn.Module, ABC):
    """What transformers' experts interface asks of a module of experts, whatever holds the weights."""

    config: Any
    num_experts: int

    @abstractmethod
    def compute(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Send x `[T, H]` through the experts ids `[T, k]`, weighted by weights `[T, k]`; returns `[T, H]`."""


class QuantizedExperts(Quantized, Experts):
    """All routed experts of a layer in one quantised format: stacks of gate and up `[E, I, H]` and down `[E, H, I]`."""

    def __init__(self, weights: Mapping[str, PackedWeight], format: Format, backend: Backend, config: Any) -> None:
        super().__init__({name: weights[name] for name in PROJECTIONS}, format, backend)
        self.config, self.num_experts = config, weights["gate_proj"].shape[0]

    def matrices(self) -> Iterator[tuple[str, Matrix]]:
        """Yield the projections of each expert in turn."""
        stacks = {name: self.packed(name) for name in PROJECTIONS}
        for expert in range(self.num_experts):
            for name, stack in stacks.items():
                yield f"{expert}.{name}", Packed(stack.expert(expert), self.format)

    def compute(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See `Experts`."""
        gate, up, down = (self.packed(name) for name in PROJECTIONS)
        if self.backend != "auto":
            product = reference.linear if self.backend == "reference" else decoded_linear
            return reference.moe(x, gate, up, down, ids, weights, product=product)
        return moe(x, gate, up, down, ids, weights)

    forward = compute


class FusedExperts(SpeaksCheckpoint, Experts, DeepseekV3Experts):
    """All routed experts of a layer in BF16, fused as transformers has them, but named as in a checkpoint."""

    backend: Backend = "auto"

    def matrices(self) -> Iterator[tuple[str, Dense]]:
        """Yield the projections of each expert in turn."""
        inner = self.intermediate_dim
        for expert in range(self.num_experts):
            gate_up = self.gate_up_proj[expert]
            yield f"{expert}.gate_proj", Dense(gate_up[:inner])
            yield f"{expert}.up_proj", Dense(gate_up[inner:])
            yield f"{expert}.down_proj", Dense(self.down_proj[expert])

    def compute(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See `Experts`."""
        if self.backend == "decoded":
            return reference.mixture(x, self.num_experts, self._decoded(x), ids, weights)
        # On a CPU the loop is the faster one for small models and level for K2's (benchmarks/results/model-cpu.md), but
        # a traced body cannot loop over what the router finds, and its gradients are as large as all experts for each.
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            if torch.is_grad_enabled() and self.gate_up_proj.requires_grad:
                return sorted_experts(self, x, ids, weights)
            return cast("Tensor", _LOOP(self, x, ids, weights))
        return grouped_mm_experts_forward(self, x, ids, weights)

    def _decoded(self, x: Tensor) -> Callable[[int, Tensor], Tensor]:
        """Return what makes of some tokens what an expert of another format with the same values makes of them."""
        parts = dict(self.matrices())

        def run(expert: int, token: Tensor) -> Tensor:
            gate, up, down = (parts[f"{expert}.{name}"].tensor for name in PROJECTIONS)
            return reference.expert_output(x[token], gate, up, down, decoded_linear)

        return run


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


_LOOP: Any = DeepseekV3Experts.forward.__wrapped__  # type: ignore[attr-defined]  # its decorator leaves it there
"""transformers' own loop over experts, beneath its choice of an implementation."""


class SeparateExperts(Experts):
    """The routed experts of a layer whose weights are not all in one format, one by one."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.num_experts = config, config.n_routed_experts
        for expert in range(self.num_experts):
            projections = nn.ModuleDict()
            for name in PROJECTIONS:
                shape = (config.hidden_size, config.moe_intermediate_size)
                projections[name] = nn.Linear(*(shape if name != "down_proj" else shape[::-1]), bias=False)
            self.add_module(str(expert), projections)

    def compute(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See `Experts`."""

        def run(expert: int, token: Tensor) -> Tensor:
            gate, up, down = (self.get_submodule(f"{expert}.{name}") for name in PROJECTIONS)
            return reference.expert_output(x[token], gate, up, down, _through)

        return reference.mixture(x, self.num_experts, run, ids, weights)

    forward = compute


def _through(x: Tensor, module: nn.Module) -> Tensor:
    product: Tensor = module(x)
    return product


def _run_experts(module: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return module.compute(x, ids, weights)


IMPLEMENTATION = "k2quant"
"""The name under which transformers' experts interface finds `compute`."""

ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _run_experts)
