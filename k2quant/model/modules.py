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
from torch.nn.functional import silu
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from k2quant.errors import UsageError
from k2quant.formats.layouts import Fp8, Int4
from k2quant.kernels.ops import fp8_linear, int4_linear, moe_fp8, moe_int4
from k2quant.kernels.products import reference
from k2quant.kernels.products.fp8_weight import Fp8Weight
from k2quant.kernels.products.int4_weight import Int4Weight
from k2quant.kernels.products.prepare import Weight, prepare_int4, select
from k2quant.model.experts import sorted_experts
from k2quant.model.matrices import Dense, Matrix, Packed, joined

Backend = Literal["auto", "reference"]
"""`auto`: the fused kernels of the device; `reference`: plain torch, the truth that they are held to."""

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
    """A module that holds quantised weights: for each, buffers of its codes and its scale.

    `to`, `half` and their like move them, with the layout that suits the new device, and never change their dtype.
    """

    def __init__(self, weights: Mapping[str, Weight], layout: Fp8 | Int4, backend: Backend) -> None:
        super().__init__()
        self.layout, self.backend = layout, backend
        self._names = tuple(weights)
        for name, weight in weights.items():
            self._hold(name, weight)

    def _hold(self, name: str, weight: Weight) -> None:
        self.register_buffer(f"{name}_codes", weight.codes)
        self.register_buffer(f"{name}_scale", weight.scale)
        self._order = weight.layout if isinstance(weight, Int4Weight) else "rows"

    def packed(self, name: str) -> Weight:
        """Return one of the weights, as the kernels take it."""
        codes, scale = getattr(self, f"{name}_codes"), getattr(self, f"{name}_scale")
        if isinstance(self.layout, Fp8):
            return Fp8Weight(codes, scale, self.layout.block)
        return Int4Weight(codes, scale, self._order)

    def replace(self, change: Callable[[Weight], Weight]) -> None:
        """Put another weight in the place of each."""
        changed = {name: change(self.packed(name)) for name in self._names}  # all, before the layout changes
        for name, weight in changed.items():
            self._hold(name, weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:  # noqa: FBT001, FBT002  torch's
        before = self.packed(self._names[0]).codes.device
        after = fn(torch.empty(0, dtype=torch.uint8, device=before)).device
        if after != before:
            self.replace(lambda weight: moved(weight, after))
        held, self._buffers = self._buffers, {}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers = held
        return self


def moved(weight: Weight, device: torch.device) -> Weight:
    """Return a weight on another device, in the layout that is best there."""
    if isinstance(weight, Fp8Weight):
        return Fp8Weight(weight.codes.to(device), weight.scale.to(device), weight.block)
    if "meta" in {device.type, weight.codes.device.type}:
        return Int4Weight(weight.codes.to(device), weight.scale.to(device), weight.layout)
    packed, scale = weight.checkpoint()
    return prepare_int4(packed.to(device), scale.to(device))


class QuantizedLinear(Quantized):
    """x @ weight.T for a quantised weight, with a bias where the checkpoint has one."""

    def __init__(self, weight: Weight, layout: Fp8 | Int4, backend: Backend, bias: nn.Parameter | None = None) -> None:
        super().__init__({"weight": weight}, layout, backend)
        self.bias = bias

    def matrices(self) -> Iterator[tuple[str, Matrix]]:
        """Yield the weight and the bias."""
        yield "", Packed(self.packed("weight"), self.layout)
        if self.bias is not None:
            yield "", Dense(self.bias, "bias")

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias, `[.., N]`, for x `[.., K]`."""
        product = _linear(x, self.packed("weight"), self.backend)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        rows, columns = self.packed("weight").shape
        return f"in_features={columns}, out_features={rows}, format={self.layout.name}"


def _linear(x: Tensor, weight: Weight, backend: Backend) -> Tensor:
    if backend == "reference":
        return reference.linear(x, weight)
    return int4_linear(x, weight) if isinstance(weight, Int4Weight) else fp8_linear(x, weight)


class Experts(nn.Module, ABC):
    """What transformers' experts interface asks of a module of experts, whatever holds the weights."""

    config: Any
    num_experts: int

    @abstractmethod
    def compute(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Send x `[T, H]` through the experts ids `[T, k]`, weighted by weights `[T, k]`; returns `[T, H]`."""


class QuantizedExperts(Quantized, Experts):
    """All routed experts of a layer in one quantised format: stacks of gate and up `[E, I, H]` and down `[E, H, I]`."""

    def __init__(self, weights: Mapping[str, Weight], layout: Fp8 | Int4, backend: Backend, config: Any) -> None:
        super().__init__({name: weights[name] for name in PROJECTIONS}, layout, backend)
        self.config, self.num_experts = config, weights["gate_proj"].shape[0]

    def matrices(self) -> Iterator[tuple[str, Matrix]]:
        """Yield the projections of each expert in turn."""
        stacks = {name: self.packed(name) for name in PROJECTIONS}
        for expert in range(self.num_experts):
            for name, stack in stacks.items():
                yield f"{expert}.{name}", Packed(select(stack, expert), self.layout)

    def compute(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See `Experts`."""
        gate, up, down = (self.packed(name) for name in PROJECTIONS)
        if self.backend == "reference":
            return reference.moe(x, gate, up, down, ids, weights)
        if isinstance(self.layout, Int4):
            return moe_int4(x, gate, up, down, ids, weights)  # type: ignore[arg-type]  # the layout says which
        return moe_fp8(x, gate, up, down, ids, weights)  # type: ignore[arg-type]  # the same

    forward = compute


class FusedExperts(SpeaksCheckpoint, Experts, DeepseekV3Experts):
    """All routed experts of a layer in BF16, fused as transformers has them, but named as in a checkpoint."""

    def matrices(self) -> Iterator[tuple[str, Matrix]]:
        """Yield the projections of each expert in turn."""
        inner = self.intermediate_dim
        for expert in range(self.num_experts):
            gate_up = self.gate_up_proj[expert]
            yield f"{expert}.gate_proj", Dense(gate_up[:inner])
            yield f"{expert}.up_proj", Dense(gate_up[inner:])
            yield f"{expert}.down_proj", Dense(self.down_proj[expert])

    def compute(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See `Experts`."""
        # On a CPU the loop is the faster one for small models and level for K2's (benchmarks/results/model-cpu.md), but
        # a traced body cannot loop over what the router finds, and its gradients are as large as all experts for each.
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            if torch.is_grad_enabled() and self.gate_up_proj.requires_grad:
                return sorted_experts(self, x, ids, weights)
            return cast("Tensor", _LOOP(self, x, ids, weights))
        return grouped_mm_experts_forward(self, x, ids, weights)


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
            hidden = silu(gate(x[token]).float()) * up(x[token]).float()
            return cast("Tensor", down(hidden.to(x.dtype)))

        return reference.mixture(x, self.num_experts, run, ids, weights)

    forward = compute


def _run_experts(module: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return module.compute(x, ids, weights)


IMPLEMENTATION = "k2quant"
"""The name under which transformers' experts interface finds `compute`."""

ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _run_experts)
