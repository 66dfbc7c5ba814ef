"""What goes into matrices that share an input: sums over training tokens, and held-out tokens themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from k2quant.calib.collecting.memory import BLOCK
from k2quant.calib.collecting.moments import Hessian
from k2quant.calib.solving.evidence import Evidence, Prior, even_sample
from k2quant.calib.solving.memory import HELD
from k2quant.calib.stats.layout import Part
from k2quant.errors import BadValue


class Seen:
    """One input while tokens pass."""

    def __init__(self, name: str, width: int, held: int, device: torch.device) -> None:
        """Begin with nothing.

        Args:
            name: of a matrix that has it, for the message.
            width: columns, K.
            held: held-out tokens that will come; `HELD` of them at most are kept, evenly spaced.
            device: where it is summed.
        """
        self._name = name
        self._hessian = Hessian(width, device)
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._weight, self._tokens = 0.0, 0
        self._wanted = even_sample(held, HELD)
        self._passed, self._sound = 0, True
        self._held: list[tuple[Tensor, Tensor]] = []
        self._empty = torch.zeros(0, width, dtype=torch.bfloat16, device=device)

    def see(self, part: Part, x: Tensor, weights: Tensor) -> None:
        """Add some tokens, padding left out.

        Args:
            part: theirs.
            x: BF16 `[M, K]`.
            weights: float32 `[M]`: how much each counts.
        """
        for rows, counts in zip(x.split(BLOCK), weights.split(BLOCK), strict=True):
            (self._train if part == "train" else self._hold)(rows, counts)

    def _train(self, x: Tensor, weights: Tensor) -> None:
        self._hessian.add(x, weights)
        self._sum += (weights @ x.float()).double()
        self._weight += float(weights.double().sum())
        self._tokens += len(x)

    def _hold(self, x: Tensor, weights: Tensor) -> None:
        self._sound = self._sound and bool(x.isfinite().all())
        begun, self._passed = self._passed, self._passed + len(x)
        rows = self._wanted[(self._wanted >= begun) & (self._wanted < self._passed)] - begun
        self._held.append((x[rows], weights[rows]))

    def evidence(self, prior: Prior | None = None) -> Evidence:
        """Return what is known of the input; the sums are gone afterwards.

        Raises:
            BadValue: it is not finite, also where it judges, or too large to be squared; all that comes after would be
                as little.
        """
        hessian = torch.from_numpy(self._hessian.mean(self._weight)).to(self._sum.device)
        if not self._sound or not bool((hessian.diagonal() + self._sum).isfinite().all()):
            raise not_finite(self._name, "what it is given")
        held = torch.cat([self._empty, *(rows for rows, _ in self._held)])
        weights = torch.cat([self._empty[:, 0].float(), *(counts for _, counts in self._held)])
        return Evidence(
            hessian=hessian,
            mean=(self._sum / (self._weight or 1.0)).float(),
            weight=self._weight,
            tokens=self._tokens,
            prior=prior,
            held=held,
            held_weights=weights,
        )


def not_finite(name: str, what: str) -> BadValue:
    """Return the error of what a matrix or an MLP is given, or gives, where that cannot be measured."""
    return BadValue(
        f"{what} cannot be measured",
        tensor=name,
        expected="finite values whose squares float32 holds",
        found="NaN or infinity",
        remedy="weights of this layer or of one before it are damaged or far too large",
    )
