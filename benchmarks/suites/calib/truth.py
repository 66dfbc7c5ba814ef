"""The true error of a rounded matrix: what its outputs lose on held-out activations, in plain torch and float64.

Nothing here uses what `k2quant.calib` collects, so the two can be held against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from k2quant.nano import vocabulary, writing
from k2quant.nano.batches import tokens_of
from k2quant.nano.tasks import Item

_AT_ONCE = 256  # documents of a forward pass
_LAYER_WIDE = "experts.layer"


@dataclass(slots=True)
class Moments:
    """What went into one matrix: sums over tokens, each weighted by p^2 for a routed expert and by 1 elsewhere."""

    second: Tensor
    """sum w x x^T, float64 `[K, K]`."""
    first: Tensor
    """sum w x, float64 `[K]`."""
    weight: float = 0.0
    """sum w."""
    tokens: int = 0

    @classmethod
    def of(cls, width: int) -> Moments:
        """Return sums of nothing."""
        return cls(torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens `[T, K]` with their weights `[T]`, 1 each by default."""
        x = x.double()
        given = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.double()
        weighted = x * given[:, None]
        self.second += weighted.T @ x
        self.first += weighted.sum(0)
        self.weight += float(given.sum())
        self.tokens += len(x)

    @property
    def mean_square(self) -> Tensor:
        """E[x^2], float64 `[K]`; zeros without tokens."""
        return self.second.diagonal() / max(self.weight, torch.finfo(torch.float64).tiny)

    def error(self, before: Tensor, after: Tensor) -> float:
        """Return sum w |(before - after) x|^2 over the tokens, for weights `[N, K]`."""
        difference = (before - after).double()
        return float(((difference @ self.second) * difference).sum())


@dataclass(slots=True)
class Seen:
    """The moments of a model's inputs on some items, by the base of their first consumer."""

    inputs: dict[str, Moments] = field(default_factory=dict)

    def of(self, base: str) -> Moments | None:
        """Return what went into a matrix; None where no token came."""
        return self.inputs.get(input_of(base))

    def layer_wide(self, base: str) -> Moments:
        """Return what all tokens are before the routed experts of the layer of a gate or up projection."""
        return self.inputs[f"{base.partition('experts.')[0]}{_LAYER_WIDE}"]

    def add(self, name: str, x: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens to an input."""
        self.inputs.setdefault(name, Moments.of(x.shape[-1])).add(x, weights)


def input_of(base: str) -> str:
    """Return the base of the first matrix that multiplies what a matrix does."""
    return base.replace("up_proj", "gate_proj") if ".experts." in base else base


def load(folder: Path) -> Any:
    """Return a nano-K2: BF16 values, float32 sums."""
    model: Any = writing.load(folder)
    return model.eval()


def matrices(model: Any) -> dict[str, Tensor]:
    """Return every projection of the layers by its base, float32 `[N, K]`; experts are views of their stacks."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            found[name] = module.weight.detach()
        if name.endswith(".experts"):
            for expert, (both, down) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
                gate, up = both.detach().chunk(2)
                for projection, matrix in (("gate", gate), ("up", up), ("down", down.detach())):
                    found[f"{name}.{expert}.{projection}_proj"] = matrix
    return found


@torch.no_grad()
def seen(model: Any, items: Sequence[Item]) -> Seen:
    """Run items through a model, each a text of its own, and return the moments of every input."""
    found = Seen()
    for first in range(0, len(items), _AT_ONCE):
        tokens, real = _rows(items[first : first + _AT_ONCE])
        hooks = list(_hooked(model, found, real.flatten()))
        model(input_ids=tokens, use_cache=False)
        for hook in hooks:
            hook.remove()
    return found


def _rows(items: Sequence[Item]) -> tuple[Tensor, Tensor]:
    """Return token ids `[B, T]` and which of them are no padding."""
    rows = [torch.tensor(tokens_of(item)[0]) for item in items]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=vocabulary.PAD)
    return tokens, tokens != vocabulary.PAD


def _hooked(model: Any, found: Seen, real: Tensor) -> Iterator[Any]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            yield module.register_forward_pre_hook(_linear(name, found, real))
        if name.endswith(".experts"):
            yield module.register_forward_pre_hook(_experts(name, found, real))


def _linear(name: str, found: Seen, real: Tensor) -> Callable[[Any, Any], None]:
    def hook(_: Any, given: Any) -> None:
        found.add(name, given[0].flatten(0, -2)[real])

    return hook


def _experts(name: str, found: Seen, real: Tensor) -> Callable[[Any, Any], None]:
    def hook(module: Any, given: Any) -> None:
        x, ids, shares = (part[real] for part in given)
        found.add(f"{name.removesuffix('experts')}{_LAYER_WIDE}", x)
        for expert, both in enumerate(module.gate_up_proj):
            token, place = torch.where(ids == expert)
            if len(token):
                weights = shares[token, place].double() ** 2
                gate, up = functional.linear(x[token], both).chunk(2, -1)
                found.add(f"{name}.{expert}.gate_proj", x[token], weights)
                found.add(f"{name}.{expert}.down_proj", functional.silu(gate) * up, weights)

    return hook
